"""FocusedLinearAttention: the published module under its parameters' own names, on maps of any size."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
import textwrap
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from golden_data import Golden

import flatten_ext
from flatten_ext import FocusedLinearAttention, reference
from flatten_ext.nn import resize_positional_encoding


def test_published_weights_give_the_published_output() -> None:
    golden = Golden("mod_swin_m01")
    meta, size = golden.meta, (golden.meta["H"], golden.meta["W"])
    module = FocusedLinearAttention(
        meta["C"],
        meta["heads"],
        focusing_factor=meta["p"],
        kernel_size=meta["kernel"],
        positional_encoding=size,
        dtype=torch.float64,
    )
    module.load_state_dict(golden.under("param."))
    x = golden["in.x"].requires_grad_()
    out = module(x, size)
    torch.testing.assert_close(out, golden["out.y"], rtol=0, atol=1e-12)
    out.backward(golden["in.dy"])
    gradients = {name: p.grad for name, p in module.named_parameters()} | {"x": x.grad}
    for key, expected in golden.under("grad.").items():
        torch.testing.assert_close(gradients[key], expected, rtol=1e-10, atol=1e-11, msg=key)


CASES = {
    "plain": {"kernel_size": None, "qkv_bias": False},
    "shifted windows": {"window": (2, 3), "shift": (1, 2), "positional_encoding": (2, 3)},
    "prefix tokens": {"num_prefix_tokens": 2, "positional_encoding": (4, 6), "focusing_factor": 4},
    "another map": {"num_prefix_tokens": 1, "positional_encoding": (3, 3), "kernel_size": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_formula_between_the_projections(name: str) -> None:
    size, options = [4, 6], CASES[name]
    module = FocusedLinearAttention(12, 3, **options, dtype=torch.float64)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, module.num_prefix_tokens + 24, 12, dtype=torch.float64)
    encoding = module.positional_encoding
    if name == "another map":
        encoding = resize_positional_encoding(encoding, (3, 3), size, 1)
    q, k, v = module.qkv(x).chunk(3, -1)
    expected = reference.attention(
        q, k, v, 3, F.softplus(module.scale).flatten(), None if encoding is None else encoding[0],
        None if module.dwc is None else module.dwc.weight, None if module.dwc is None else module.dwc.bias,
        size, module.window, module.shift, module.focusing_factor,
    )  # fmt: skip
    torch.testing.assert_close(module(x, size), module.proj(expected))


def test_the_encoding_is_interpolated_and_prefix_rows_stay() -> None:
    encoding = torch.randn(1, 2 + 12, 5)
    assert resize_positional_encoding(encoding, (3, 4), (3, 4), 2) is encoding
    found = resize_positional_encoding(encoding, (3, 4), (6, 5), 2)
    image = encoding[:, 2:].transpose(1, 2).reshape(1, 5, 3, 4)
    expected = F.interpolate(image, (6, 5), mode="bicubic").flatten(2).transpose(1, 2)
    assert torch.equal(found, torch.cat((encoding[:, :2], expected), 1))


def test_the_size_of_a_square_map_may_be_left_out() -> None:
    module = FocusedLinearAttention(8, 2, num_prefix_tokens=1)
    x = torch.randn(2, 17, 8)
    assert torch.equal(module(x), module(x, (4, 4)))
    with pytest.raises(ValueError, match=r"18 tokens, 1 of them prefix.*pass size"):
        module(torch.randn(2, 18, 8))


def test_reset_parameters_forgets() -> None:
    module = FocusedLinearAttention(8, 2, positional_encoding=(4, 4))
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    module.reset_parameters()
    for name, parameter in module.named_parameters():
        assert (parameter != 7).all(), name
        assert bool(parameter.any()) == (name not in ("scale", "positional_encoding")), name


def test_it_shows_what_it_was_made_with_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    module = FocusedLinearAttention(12, 3, window=(2, 2), shift=(1, 0), focusing_factor=2.5)
    assert module.extra_repr() == "dim=12, num_heads=3, focusing_factor=2.5, window=(2, 2), shift=(1, 0)"
    assert "positional_encoding_size=(4, 6)" in repr(
        FocusedLinearAttention(12, positional_encoding=(4, 6), num_heads=2)
    )
    module(torch.randn(1, 16, 12), (4, 4)).sum().backward()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kernel_size", [1, 3, (3, 5), [7, 1]])
def test_kernels_of_any_odd_sides(kernel_size: int | tuple[int, int]) -> None:
    module = FocusedLinearAttention(12, 3, kernel_size=kernel_size, dtype=torch.float64)
    pair = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    assert module.dwc.weight.shape == (4, 1, *pair)
    x = torch.randn(2, 24, 12, dtype=torch.float64)
    q, k, v = module.qkv(x).chunk(3, -1)
    scale = F.softplus(module.scale).flatten()
    expected = reference.attention(q, k, v, 3, scale, None, module.dwc.weight, module.dwc.bias, (4, 6))
    torch.testing.assert_close(module(x, (4, 6)), module.proj(expected))


def test_the_encoding_of_windows() -> None:
    module = FocusedLinearAttention(12, 3, window=(2, 3), positional_encoding=(2, 3))
    assert module.positional_encoding.shape == (1, 6, 12)
    assert module.positional_encoding_size == (2, 3)


@pytest.mark.parametrize("module", [flatten_ext.nn, flatten_ext.ops])
def test_examples_run(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted >= 5


BAD = {
    "num_prefix_tokens is -1, expected 0 or more": {"num_prefix_tokens": -1},
    "kernel_size is -3, expected a positive odd number": {"kernel_size": -3},
    "kernel_size is 0, expected": {"kernel_size": 0},
    "kernel_size is 2.5, expected": {"kernel_size": 2.5},
    "kernel_size is (3, 4), expected": {"kernel_size": (3, 4)},
    "kernel_size is (3, 3, 3), expected": {"kernel_size": (3, 3, 3)},
    "window is (0, 7), expected two numbers (height, width) of at least 1": {"window": (0, 7)},
    "shift is (-1, 0), expected two numbers": {"window": (7, 7), "shift": (-1, 0)},
    "positional_encoding is (56, 56), expected (7, 7)": {
        "positional_encoding": (56, 56),
        "window": (7, 7),
    },
    "dim is 0": {"dim": 0},
    "num_heads is 0": {"num_heads": 0},
    "dim is 12, expected a multiple of num_heads, 5": {"num_heads": 5},
    "kernel_size is 4": {"kernel_size": 4},
    "window is 7, expected two numbers": {"window": 7},
    "shift is [1], expected two numbers": {"window": (2, 2), "shift": [1]},
    "positional_encoding is 14, expected two numbers": {"positional_encoding": 14},
    "num_prefix_tokens is 1, expected 0 with a window": {"window": (2, 2), "num_prefix_tokens": 1},
    "shift (1, 1) was given without window": {"shift": (1, 1)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FocusedLinearAttention(**{"dim": 12, "num_heads": 3, **BAD[message]})


BAD_INPUTS = {
    "x is (16, 12), expected (batch, tokens, 12)": (torch.empty(16, 12), None),
    "x is (1, 16, 13), expected (batch, tokens, 12)": (torch.empty(1, 16, 13), None),
    "x has 3 tokens, 5 of them prefix, which leave none for a map": (torch.empty(1, 3, 12), None),
    "x has 23 tokens, 5 of them prefix": (torch.empty(1, 23, 12), None),
    "size is 4, expected two numbers": (torch.empty(1, 21, 12), 4),
    "size is (4, 4, 4), expected two numbers": (torch.empty(1, 21, 12), (4, 4, 4)),
    "x has 21 tokens, expected 17: size is (3, 4), with 5 prefix tokens": (torch.empty(1, 21, 12), (3, 4)),
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_inputs_are_named(message: str) -> None:
    module = FocusedLinearAttention(12, 3, num_prefix_tokens=5)
    x, size = BAD_INPUTS[message]
    with pytest.raises(ValueError, match=re.escape(message)):
        module(x, size)


def test_the_public_names() -> None:
    listed = dir(flatten_ext)
    for name in ("convert", "load_official", "attention_map", "self_check", "FocusedLinearAttention"):
        assert name in listed
    assert set(flatten_ext.__all__) <= set(listed)


def test_a_star_import_needs_torch_alone() -> None:
    code = """
        import sys
        for extra in ("timm", "torchvision", "typer", "matplotlib"):
            sys.modules[extra] = None
        from flatten_ext import *
        attention, FocusedLinearAttention, attention_map, self_check
        assert "convert" not in globals()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
