"""The two families of operators, attention and convolution: what runs them forward, backward and by the
reference.

    attention, linear_attention   -> attention_forward, attention_backward
    depthwise_conv                -> depthwise_conv, depthwise_conv_backward
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _load as _load  # registers torch.ops.flatten, whose operators are taken below
from .. import reference
from . import private
from .arguments import Arguments, Signature

_ops = torch.ops.flatten

# What is saved for backward beside q, k and v may add a twentieth of their memory; S and m of windows beyond
# it are computed again.
_STATE_SHARE = 20


def signature(name: str) -> Signature:
    return Signature(getattr(_ops, name).default)


class Family:
    """How autograd runs operators of one kind, whose arguments are split into `tensors`, which have
    gradients, and `options`, which have none. A forward operator with `saved_windows` leaves a state, which
    its backward takes."""

    def __init__(self, forward: str, backward: str, check: str, by_reference: Callable[..., Tensor]) -> None:
        self.signature = signature(forward)
        self.has_state = "saved_windows" in self.signature.names
        self.arguments = Arguments(self.signature, besides=("saved_windows",))
        names, state = self.arguments.names, ("state",) if self.has_state else ()
        self._forward = self.signature.op
        self._forward_below, self._after = private.goes_on_below(self._forward)
        self._order_forward = self.signature.ordered(
            (*names, *(("saved_windows",) if self.has_state else ()))
        )
        backward_signature, check_signature = signature(backward), signature(check)
        self._backward = backward_signature.op
        self._order_backward = backward_signature.ordered((*names, "grad_out", *state, "output_mask"))
        self._check = check_signature.op
        self._order_check = check_signature.ordered((*names, "grad_out", *state))
        self._by_reference = by_reference

    def forward(self, keys: Any, tensors: Sequence[Any], options: tuple, saved_windows: Any) -> tuple:
        """out and the state, or None. By the keys of the set after autograd's; without any the operator finds
        its own."""
        arguments = self.arguments.join(tensors, options)
        if self.has_state:
            arguments = self._order_forward((*arguments, saved_windows))
        out = (
            self._forward(*arguments) if keys is None else self._forward_below(keys & self._after, *arguments)
        )
        return out if self.has_state else (out, None)

    def backward(self, grad_out, tensors, options, state, mask) -> list[Tensor]:
        """The gradients in `mask`, which has an entry for each of `tensors`."""
        besides = (grad_out, state, mask) if self.has_state else (grad_out, mask)
        return self._backward(*self._order_backward((*self.arguments.join(tensors, options), *besides)))

    def check(self, tensors: Sequence[Any], options: tuple, grad_out=None, state=None) -> None:
        """Raises what the kernels would, forward or backward."""
        besides = (grad_out, state) if self.has_state else (grad_out,)
        self._check(*self._order_check((*self.arguments.join(tensors, options), *besides)))

    def reference(self, tensors: Sequence[Any], options: tuple) -> Tensor:
        """out, differentiable in any mode."""
        return self._by_reference(self.arguments.bind(tensors, options))

    def checked_reference(self, tensors: Sequence[Any], options: tuple) -> Tensor:
        """The same after the checks that the kernels make."""
        with private.below_autograd():
            self.check(tensors, options)
        return self.reference(tensors, options)

    def gradients(self, options: tuple, mask, grad_out: Tensor, tensors) -> tuple[Tensor, ...]:
        """The gradients in `mask` through the reference, differentiable again."""
        return vjp(
            lambda *wanted: self.reference(replace(tensors, mask, wanted), options),
            select(tensors, mask),
            grad_out,
        )


_LINEAR = signature("linear_attention").names


def _attention(given: dict[str, Any]) -> Tensor:
    if given["focusing_factor"] is not None:
        return reference.attention(**given)
    return reference.linear_attention(**{name: given[name] for name in _LINEAR})


ATTENTION = Family("attention_forward", "attention_backward", "check_attention", _attention)
CONV = Family(
    "depthwise_conv",
    "depthwise_conv_backward",
    "check_depthwise_conv",
    lambda given: reference.depthwise_conv(**given),
)

# The operators people call, with their families.
FORWARD = {"attention": ATTENTION, "linear_attention": ATTENTION, "depthwise_conv": CONV}
BACKWARD = {"attention_backward": ATTENTION, "depthwise_conv_backward": CONV}
OPERATORS = (*FORWARD, "attention_forward", *BACKWARD)


# ------------------------------------------------------------------------------------------------ the state
def count_windows(q: Tensor, window: Sequence[int] | None) -> Any:
    """Windows of the whole batch."""
    return q.shape[0] if window is None else q.shape[0] * (q.shape[1] // (window[0] * window[1]))


def count_saved_windows(q: Tensor, k: Tensor, num_heads: int, window: Sequence[int] | None) -> Any:
    """How many windows' S and m are kept for the backward: what the budget allows, but none of windows with
    fewer keys than a head has channels, whose S is larger than what it is made from. On CUDA all or none.
    Formed without asking which is larger, so that dynamic shapes stay dynamic."""
    if q is None or k is None:
        return 0  # attention_forward will say which
    q_shape, k_shape, size = q.shape, k.shape, q.element_size()
    if len(q_shape) != 3 or len(k_shape) != 3 or not 1 <= num_heads <= q_shape[2]:
        return 0  # attention_forward will say what is wrong
    if window is not None and (len(window) != 2 or min(window) < 1):
        return 0
    head_dim, windows = q_shape[2] // num_heads, count_windows(q, window)
    keys = k_shape[1] if window is None else window[0] * window[1]
    budget = 3 * keys * size
    each = _STATE_SHARE * (head_dim + 1) * max(size, 4)
    least = min if type(windows * keys * head_dim) is int else torch.sym_min  # min would ask
    if q.is_cuda:
        return windows * least(1, budget // each)
    return least(windows, windows * budget // each) * least(1, keys // head_dim)


def state_like(q: Tensor, num_heads: int, saved_windows: Any) -> tuple[list, torch.dtype]:
    """Shape and dtype of the state: S and m of a window are (head_dim + 1) * channels numbers."""
    shape = [saved_windows * (q.shape[2] // num_heads + 1) * q.shape[2]]
    return shape, torch.float64 if q.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------ derivatives
def vjp(function: Callable, inputs: Sequence[Tensor], cotangents) -> tuple[Tensor, ...]:
    """Vector-Jacobian product that nests with autograd and torch.func at any depth, and inside a kernel."""
    with private.autograd_keys_on():
        return torch.func.vjp(function, *inputs)[1](cotangents)


def select(tensors: Sequence, mask: Sequence[bool]) -> list:
    return [t for t, asked in zip(tensors, mask, strict=True) if asked]


def replace(tensors: Sequence, mask: Sequence[bool], values: Sequence) -> list:
    """`tensors` with those in `mask` replaced by `values`, in order."""
    remaining = iter(values)
    return [next(remaining) if asked else t for t, asked in zip(tensors, mask, strict=True)]
