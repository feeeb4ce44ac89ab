"""Everything of flatten-ext on a device that it has no kernels for.

A program, because a process can name such a device once:

    python host_device.py FOLDER        builds host_device.cpp in FOLDER, and checks
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from families import SMALL, small
from torch import Tensor, nn
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.cpp_extension import load

from flatten_ext import FocusedLinearAttention, attention, depthwise_conv, linear_attention

DEVICE = "hostdevice"
TAPS = {"dwc_weight": (8, 1, 3, 3), "dwc_bias": (8,)}
WINDOWS = {"size": (8, 6), "window": (4, 3), "shift": (1, 2)}
OPERATORS = {
    "attention": (attention, {"scale": (32,), "key_bias": (48, 32), **TAPS}, {"size": (8, 6)}),
    "windows": (attention, {"key_bias": (12, 32), **TAPS}, WINDOWS),
    "linear": (linear_attention, TAPS, WINDOWS),
    "conv": (depthwise_conv, {"weight": (8, 1, 3, 3), "bias": (8,)}, {"size": (8, 6)}),
}


def close(actual: Tensor, expected: Tensor, scale: float | None = None) -> None:
    """What the kernels compute on the CPU; both in float64. `scale` is that of the rounding errors."""
    assert actual.device.type == DEVICE
    scale = float(expected.detach().abs().max()) if scale is None else scale
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-10 * scale)


def operators() -> None:
    for name, (function, shapes, options) in OPERATORS.items():
        count = 1 if function is depthwise_conv else 3
        heads = () if function is depthwise_conv else (4,)
        values = [torch.rand(2, 48, 32) + 0.1 for _ in range(count)]
        values += [torch.rand(shape) + 0.5 for shape in shapes.values()]

        def call(values, function=function, heads=heads, shapes=shapes, options=options, count=count):
            inputs = [x.requires_grad_() for x in values]
            parameters = dict(zip(shapes, inputs[count:], strict=True))
            out = function(*inputs[:count], *heads, **parameters, **options)
            return [out, *torch.autograd.grad(out.square().sum(), inputs)]

        expected = call([x.clone() for x in values])
        for actual, wanted in zip(call([x.to(DEVICE) for x in values]), expected, strict=True):
            close(actual, wanted)
        with torch.no_grad():
            values = [x.to(DEVICE) for x in values]
            parameters = dict(zip(shapes, values[count:], strict=True))
            out = function(*values[:count], *heads, **parameters, **options)
        close(out, expected[0])
        print("operator", name, flush=True)
    with pytest.raises(RuntimeError, match=r"flatten.attention: num_heads is 5"):
        attention(*[x.to(DEVICE) for x in torch.rand(3, 2, 48, 32)], 5)


def module(model: nn.Module, x: Tensor, *args, compiled: bool = False) -> None:
    """Output and every parameter's gradient, on the CPU and on the device."""
    results = []
    for device in ("cpu", DEVICE):
        model = model.to(device)
        model.zero_grad()
        run = torch.compile(model, backend="aot_eager") if compiled and device == DEVICE else model
        out = run(x.to(device), *args)
        out.square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((out.detach(), gradients))
    (expected, expected_gradients), (actual, gradients) = results
    close(actual, expected)
    assert gradients.keys() == expected_gradients.keys()
    # Some gradients are nothing but what is left of larger ones.
    scale = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        close(gradient, expected_gradients[name], scale)
    print("module", type(model).__name__, "compiled" if compiled else "", flush=True)


def main(folder: Path) -> None:
    _setup_privateuseone_for_python_backend(DEVICE)
    source = str(Path(__file__).with_suffix(".cpp"))
    load("host_device", [source], build_directory=str(folder), is_python_module=False, extra_cflags=["-O0"])
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    operators()
    for compiled in (False, True):
        attend = FocusedLinearAttention(32, 4, positional_encoding=(8, 6))
        module(attend, torch.randn(2, 48, 32), (8, 6), compiled=compiled)
    for family in SMALL:
        module(small(family, drop_path_rate=0.0).eval(), torch.randn(2, 3, 96, 96))
    module(small("pvt_v2", drop_path_rate=0.0).eval(), torch.randn(2, 3, 96, 96), compiled=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
