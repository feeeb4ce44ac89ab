"""Nothing is timed before it has been checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flatten_ext import reference
from flatten_ext.tools.bench.formulas import Inputs
from flatten_ext.tools.bench.shapes import Shape

__all__ = ["CheckFailed", "check_focused", "relative_error"]

# Relative Frobenius error against float64. Float32 sums of this length leave about 1e-7.
FORWARD_BOUND = 5e-6
BACKWARD_BOUND = 2e-5


class CheckFailed(RuntimeError):
    """A contender's result is wrong, so its time means nothing."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected| in float64, Frobenius norms; inf when `got` is not finite."""
    got, expected = got.detach().double(), expected.detach().double()
    if not torch.isfinite(got).all():
        return float("inf")
    return float((got - expected).norm() / expected.norm().clamp(min=1e-300))


def check_focused(name: str, attention: Callable[..., Tensor], inputs: Inputs, shape: Shape) -> None:
    """Checks an implementation of focused linear attention + DWC, and its gradients, against the oracle.

    Raises:
        CheckFailed: naming the contender, the shape, the tensor and its error.
    """

    def results(attend: Callable[..., Tensor], given: Inputs) -> Sequence[Tensor]:
        q, k, v, scale, key_bias, weight, bias = given.tensors
        out = attend(q, k, v, shape.heads, scale, key_bias, weight, bias, shape.size)
        return out.detach(), *torch.autograd.grad(out, given.tensors, given.grad_out)

    expected = results(reference.attention, inputs.to(torch.float64))
    got = results(attention, inputs)
    names = (
        "output",
        *(f"gradient of {x}" for x in ("q", "k", "v", "scale", "key_bias", "dwc_weight", "dwc_bias")),
    )
    for what, x, y in zip(names, got, expected, strict=True):
        error, bound = relative_error(x, y), FORWARD_BOUND if what == "output" else BACKWARD_BOUND
        if not error <= bound:
            raise CheckFailed(f"{name}: {what} has relative error {error:.1e} > {bound:.0e} at {shape.label}")
