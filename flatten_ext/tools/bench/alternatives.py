"""The op beside the alternatives a user would pick: time and memory, at stage shapes and against tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from flatten_ext.extras import MissingExtra
from flatten_ext.tools.bench import mixers, timing
from flatten_ext.tools.bench.check import CheckFailed, relative_error
from flatten_ext.tools.bench.shapes import Shape
from flatten_ext.tools.bench.stages import MODES, Measurement, measure, modes_of

__all__ = ["ALTERNATIVES", "GPU_ONLY", "LABELS", "check", "runnable", "time_at", "time_ladder"]

CHECK_BOUND = 1e-5

ALTERNATIVES: dict[str, type[mixers.Mixer]] = {
    "flatten": mixers.Focused,
    "eager": mixers.EagerFocused,
    "softmax": mixers.Softmax,
    "softmax + DWC": mixers.SoftmaxDWC,
    "window softmax": mixers.WindowSoftmax,
    "LiteMLA": mixers.LiteMLA,
    "efficient attention": mixers.EfficientAttention,
    "Hydra": mixers.Hydra,
    "Performer": mixers.Performer,
    "Linformer": mixers.Linformer,
    "NATTEN": mixers.Neighborhood,
    "fla": mixers.CausalLinear,
}
GPU_ONLY = ("NATTEN", "fla")
LABELS = {name: mixer.label for name, mixer in ALTERNATIVES.items()} | {"flatten": "flatten (ours)"}


def _build(name: str, shape: Shape, device: torch.device) -> mixers.Mixer:
    torch.manual_seed(0)
    options = {"window": shape.window} if name == "window softmax" else {}
    return ALTERNATIVES[name](shape.channels, shape.heads, shape.size, **options).to(device)


def _inputs(shape: Shape, device: torch.device) -> list[Tensor]:
    """q, k, v to differentiate by, and a gradient to send back."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.tokens, shape.channels)
    tensors = [torch.randn(size, generator=generator).to(device) for _ in range(4)]
    return [t.requires_grad_() for t in tensors[:3]] + tensors[3:]


def check(name: str, shape: Shape, device: torch.device) -> None:
    """Compares output and gradients with the quadratic formula in float64, on four windows at most."""
    height, width = (min(side, 2 * shape.window) for side in shape.size)
    shape = replace(shape, batch=2, size=(height, width))
    mixer = _build(name, shape, device)
    *qkv, grad_out = _inputs(shape, device)
    out = mixer(*qkv)
    got = out, *torch.autograd.grad(out, qkv, grad_out)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    out = mixer.double().exact(*exact)
    expected = out, *torch.autograd.grad(out, exact, grad_out.double())
    for what, x, y in zip(("output", "dq", "dk", "dv"), got, expected, strict=True):
        error = relative_error(x, y)
        if not error <= CHECK_BOUND:
            raise CheckFailed(f"{LABELS[name]}: {what} has relative error {error:.1e} at {shape.label}")


def runnable(device: torch.device, names: Iterable[str] = ALTERNATIVES) -> tuple[list[str], dict[str, str]]:
    """The contenders that can be timed here, and why each of the others cannot.

    A contender's package may be missing, or compute something else than it should; neither stops the rest.

    Raises:
        CheckFailed: the op itself is wrong.
    """
    shape = Shape("check", 2, (14, 14), 64, 2)
    good, reasons = [], {}
    for name in names:
        if name in GPU_ONLY and device.type != "cuda":
            reasons[name] = "has GPU kernels only"
            continue
        try:
            check(name, shape, device)
            good.append(name)
        except MissingExtra as missing:
            reasons[name] = f"{missing.name} is not installed"
        except Exception as error:  # another project's package: whatever it raises, it is its row's result
            if name == "flatten":
                raise
            reasons[name] = f"failed its check: {error}"
    return good, reasons


def _calls(name: str, shape: Shape, device: torch.device) -> Mapping[str, Callable[[], object]]:
    mixer = _build(name, shape, device)
    *qkv, grad_out = _inputs(shape, device)
    leaves = [*qkv, *(p for p in mixer.parameters() if p.requires_grad)]
    return modes_of(lambda: mixer(*qkv), leaves, grad_out)


def time_at(
    shapes: Iterable[Shape], names: Iterable[str], device: torch.device, seconds: float
) -> Iterator[list[Measurement]]:
    """Times the contenders at each shape, each checked at that width first.

    Raises:
        CheckFailed: a contender computes something else.
    """
    for shape in shapes:
        for name in names:
            check(name, shape, device)
        calls = {name: _calls(name, shape, device) for name in names}
        yield measure("alternatives", shape, calls, device, seconds)


def time_ladder(
    shapes: Iterable[Shape],
    names: Iterable[str],
    device: torch.device,
    seconds: float,
    give_up_ms: float = 1000,
) -> Iterator[list[Measurement]]:
    """Time and peak memory against tokens, shapes in ascending order.

    A contender whose training step takes longer than `give_up_ms` is left out of the larger shapes.
    """
    names = list(names)
    for shape in shapes:
        calls = {name: _calls(name, shape, device) for name in names}
        timed = measure("tokens", shape, calls, device, seconds)
        yield [replace(m, peak_bytes=timing.peak_memory(calls[m.contender][m.mode], device)) for m in timed]
        slow = {m.contender for m in timed if m.mode == MODES[1] and m.ms and m.ms.median > give_up_ms}
        names = [name for name in names if name not in slow]
