"""The gradient of a gate from the output it made, which the CPU's kernels take where that is exact."""

from __future__ import annotations

import pytest
import torch

from flatten_ext import reference
from flatten_ext.tools.bench.check import relative_error

ops = torch.ops.flatten
ACTIVATIONS = ("none", "sigmoid", "silu")
# Gates whose output alone says nothing, or not enough, of what they multiplied.
HARD = {"zero": 0.0, "subnormal": 1e-40, "tiny": -1e-9, "large": 3e7, "very negative": -90.0}
MASK = [False] * 9 + [True, False, False]  # of the gate alone


def call(dtype: torch.dtype = torch.float32, **more) -> dict:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = {name: randn(2, 70, 64) for name in ("q", "k", "v", "gate")}
    taps = {"dwc_weight": randn(64, 1, 3, 3), "dwc_bias": randn(64), "size": [7, 10]}
    return {"num_heads": 2, "feature_map": "elu", **tokens, **taps, **more}


def gradients(operators, arguments: dict, *names: str) -> list[torch.Tensor]:
    given = {n: t.detach().requires_grad_() if n in names else t for n, t in arguments.items()}
    out = operators.attention(**given)
    generator = torch.Generator().manual_seed(4)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return list(torch.autograd.grad(out, [given[n] for n in names], grad))


def exactly(arguments: dict) -> dict:
    return {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalizer", ["divide", "magnitude"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hard", [None, *HARD])
def test_every_gate_has_its_gradient(hard, activation, normalizer, dtype):
    arguments = call(dtype, gate_activation=activation, normalizer=normalizer)
    if hard is not None:  # in one block of tokens, and in one head
        arguments["gate"][1, 3, 40] = HARD[hard]
    names = ("q", "k", "v", "gate", "dwc_weight")
    found, expected = gradients(ops, arguments, *names), gradients(reference, exactly(arguments), *names)
    for name, got, want in zip(names, found, expected, strict=True):
        assert relative_error(got, want) < (1e-5 if dtype == torch.float32 else 1e-12), name
    if hard is not None:
        at = (1, 3, 40)
        assert torch.isclose(found[3][at].double(), expected[3][at], rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_output_takes_the_place_of_computing_it_again(activation):
    """One backward reads the output, and one that is not given it finds the same."""
    arguments = call(gate_activation=activation)
    out, state = ops.attention_forward(**positional(arguments), saved_windows=0)
    rest = {**positional(arguments), "grad_out": torch.ones_like(out), "state": state, "output_mask": MASK}
    (again,) = ops.attention_backward(**rest)
    (from_out,) = ops.attention_backward(**rest, out=out)
    assert relative_error(from_out, again) < 1e-5
    (doubled,) = ops.attention_backward(**rest, out=2 * out)
    assert relative_error(doubled, 2 * again) < 1e-5  # the output is what it was read from


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["gate", "v"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite(activation, where, bad):
    """Where the formula is finite the gradient is, and nowhere is NaN lost."""
    arguments = call(gate_activation=activation, dwc_weight=None, dwc_bias=None, size=None)
    arguments[where][0, 5, 20] = bad
    (found,), (expected,) = (
        gradients(ops, arguments, "gate"),
        gradients(reference, exactly(arguments), "gate"),
    )
    assert torch.equal(found.isfinite(), expected.isfinite())


def test_an_output_that_was_changed_in_place_is_an_error():
    arguments = call()
    arguments["gate"].requires_grad_()
    out = ops.attention(**arguments)
    grad_out = torch.ones_like(out)
    out.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(grad_out)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.ones(2, 70, 32), "out has shape (2, 70, 32), expected (2, 70, 64)"),
        (torch.ones(2, 70, 64).double(), "out has dtype float64, expected the input's float32"),
    ],
)
def test_an_output_of_another_call_is_an_error(out, message):
    arguments = call()
    rest = {**positional(arguments), "grad_out": torch.ones(2, 70, 64), "state": torch.empty(0)}
    with pytest.raises(RuntimeError) as error:
        ops.attention_backward(**rest, output_mask=MASK, out=out)
    assert f"flatten.attention_backward: {message}" in str(error.value)


def positional(arguments: dict) -> dict:
    rest = dict.fromkeys(("scale", "key_bias", "window", "shift"))
    return {**rest, "focusing_factor": 3.0, "eps": 1e-6, **arguments}
