"""torch.jit.trace: a traced call gives what the operator gives at its size, in any process, and never runs at
another size."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import relative_error
from torch import Tensor

import flatten_ext

ops = torch.ops.flatten
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated")

WEIGHT = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))


# Functions of a (B, H, W, C) map that read the size from its shape, which a trace follows.
def attention(x: Tensor) -> Tensor:
    t = x.flatten(1, 2)
    return ops.attention(t, t, t, 2, dwc_weight=WEIGHT, size=list(x.shape[1:3]))


def attention_in_windows(x: Tensor) -> Tensor:
    t = x.flatten(1, 2)
    window = [x.shape[1] // 2, x.shape[2] // 2]
    return ops.attention.default(t, t, t, 2, size=x.shape[1:3], window=window, shift=(1, 1))


def linear_attention(x: Tensor) -> Tensor:
    t = x.flatten(1, 2).abs()
    return ops.linear_attention(t, t, t, 2, WEIGHT, None, list(x.shape[1:3]))


def depthwise_conv(x: Tensor) -> Tensor:
    return ops.depthwise_conv(x.flatten(1, 2), WEIGHT, None, x.shape[1:3])


def by_the_package(x: Tensor) -> Tensor:
    t = x.flatten(1, 2)
    out = flatten_ext.attention(t, t, t, 2, size=list(x.shape[1:3]), window=[2, 2])
    out = flatten_ext.linear_attention(out, out, t, 2, WEIGHT, size=x.shape[1:3])
    return flatten_ext.depthwise_conv(out, WEIGHT, None, list(x.shape[1:3]))


def under_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return attention(x)


FUNCTIONS = [
    attention,
    attention_in_windows,
    linear_attention,
    depthwise_conv,
    by_the_package,
    under_autocast,
]


def loaded(function: Callable[[Tensor], Tensor], x: Tensor, path: Path) -> torch.jit.ScriptModule:
    torch.jit.trace(function, x).save(str(path))
    return torch.jit.load(str(path))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_traced_call_is_the_call(function, requires_grad, tmp_path):
    x = torch.randn(2, 4, 4, 8, requires_grad=requires_grad)
    traced = loaded(function, x, tmp_path / "traced.pt")
    for batch in (2, 1, 3):
        x = torch.randn(batch, 4, 4, 8, requires_grad=requires_grad)
        assert torch.equal(traced(x), function(x))
    if requires_grad:
        found, expected = (torch.autograd.grad(f(x).float().square().sum(), x)[0] for f in (traced, function))
        # TorchScript casts q, k and v once, where they are one tensor, and adds their gradients in bfloat16.
        assert relative_error(found, expected) < (1e-2 if function is under_autocast else 1e-6)


@pytest.mark.parametrize("size", [(6, 4), (8, 8), (2, 8), (8, 2), (2, 2), (4, 6)])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_another_size_is_an_error(function, size, tmp_path):
    """Fewer tokens, more of them, which could pass for prefix tokens, and as many on another map."""
    traced = loaded(function, torch.randn(1, 4, 4, 8), tmp_path / "traced.pt")
    with pytest.raises(RuntimeError, match=r"flatten\.\w+: (size|window) "):
        traced(torch.randn(1, *size, 8))


@pytest.mark.parametrize("function", [attention_in_windows, linear_attention, depthwise_conv])
def test_another_size_is_told_before_the_operator_runs(function, tmp_path):
    """And none of its arguments is kept."""
    traced = loaded(function, torch.randn(1, 4, 4, 8), tmp_path / "traced.pt")
    array = np.random.default_rng(0).random((1, 6, 4, 8), dtype=np.float32)
    memory = weakref.ref(array)
    with (
        torch.profiler.profile() as profile,
        pytest.raises(RuntimeError, match="differs from that of the trace"),
    ):
        traced(torch.from_numpy(array))
    names = {event.key for event in profile.key_averages() if event.key.startswith("flatten::")}
    assert {name[-7:] for name in names} == {"_traced"}
    del array
    gc.collect()
    assert memory() is None


def test_more_tokens_than_traced_are_no_prefix(tmp_path):
    """A size of plain ints shows no shape; the number of tokens does."""
    traced = loaded(
        lambda t: ops.attention(t, t, t, 2, dwc_weight=WEIGHT, size=[4, 4]),
        torch.randn(1, 18, 8),
        tmp_path / "t",
    )
    traced(torch.randn(3, 18, 8))
    with pytest.raises(RuntimeError, match=r"shapes are \(20,\), expected \(18,\)"):
        traced(torch.randn(1, 20, 8))


def test_without_a_size_any_number_of_tokens_will_do(tmp_path):
    def function(t: Tensor) -> Tensor:
        return ops.attention(t, t, t, 2)

    traced = loaded(function, torch.randn(1, 16, 8), tmp_path / "traced.pt")
    t = torch.randn(2, 25, 8)
    assert torch.equal(traced(t), function(t))


def test_the_module(tmp_path):
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = flatten_ext.FocusedLinearAttention(32, 4, positional_encoding=(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x.flatten(1, 2), x.shape[1:3])

    block, x = Block().eval(), torch.randn(2, 4, 6, 32)
    assert torch.equal(loaded(block, x, tmp_path / "traced.pt")(x), block(x))


@pytest.mark.parametrize("libraries", ["import flatten_ext", "torch.ops.load_library(LIBRARY)"])
def test_a_new_process_runs_the_file(libraries, tmp_path):
    """With the package, or with its library alone."""
    x = torch.randn(2, 4, 4, 8)
    traced = loaded(attention, x, tmp_path / "traced.pt")
    torch.save((x, traced(x)), tmp_path / "expected.pt")
    library = next((Path(flatten_ext.__file__).parent / "lib").glob("libflatten.*"))
    script = f"""
import torch
LIBRARY = {str(library)!r}
{libraries}
traced = torch.jit.load({str(tmp_path / "traced.pt")!r})
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.equal(traced(x), expected)
for size in ((1, 6, 4, 8), (1, 2, 8, 8)):
    try:
        traced(torch.randn(size))
    except RuntimeError as error:
        assert "expected (16, 4, 4)" in str(error), error
    else:
        raise AssertionError("another size was taken")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_call_that_is_not_traced_does_not_meet_the_twin():
    """Nor is the tracer asked."""
    t = torch.randn(1, 16, 8)
    with torch.profiler.profile() as profile:
        ops.attention(t, t, t, 2, size=[4, 4])
    names = {event.key for event in profile.key_averages()}
    assert "flatten::attention" in names
    assert not any("traced" in name for name in names)
