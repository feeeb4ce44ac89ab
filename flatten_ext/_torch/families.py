"""The families of operators: what runs them forward, backward and by the reference.

attention, linear_attention   -> attention_forward, attention_backward
depthwise_conv                -> depthwise_conv, depthwise_conv_backward
attention_state               -> attention_state, attention_state_backward
attention_from_state          -> attention_from_state, attention_from_state_backward
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

# What is saved for backward beside q, k and v may add a twentieth of their memory, on CUDA a sixteenth, which
# holds PVT's second stage; S and m of windows beyond it are computed again.
_STATE_SHARE, _CUDA_STATE_SHARE = 20, 16


def signature(name: str) -> Signature:
    return Signature(getattr(_ops, name).default)


class Family:
    """How autograd runs operators of one kind, whose arguments are split into `tensors`, which have
    gradients, and `options`, which have none. A forward operator with `saved_windows` leaves a state, which
    its backward takes. What is in `without` stays at its default."""

    def __init__(
        self,
        forward: str,
        backward: str,
        check: str,
        by_reference: Callable[..., Tensor],
        without: Sequence[str] = (),
    ) -> None:
        self.signature = signature(forward)
        self.has_state = "saved_windows" in self.signature.names
        self.arguments = Arguments(self.signature, besides=("saved_windows", *without))
        names, state = self.arguments.names, ("state",) if self.has_state else ()
        below, self._after = private.goes_on_below(self.signature.op)
        self._forward = self.signature.by_keyword(self.signature.op)
        self._forward_below = self.signature.by_keyword(below)
        self._order_forward = self.signature.ordered(
            (*names, *(("saved_windows",) if self.has_state else ()))
        )
        backward_signature, check_signature = signature(backward), signature(check)
        self._backward = backward_signature.op
        self.takes_out = "out" in backward_signature.names and not without
        self._order_backward = backward_signature.ordered(
            (*names, "grad_out", *state, "output_mask", *(("out",) if self.takes_out else ()))
        )
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

    def backward(self, grad_out, tensors, options, state, out, mask) -> list[Tensor]:
        """The gradients in `mask`, which has an entry for each of `tensors`."""
        besides = (grad_out, state, mask) if self.has_state else (grad_out, mask)
        if self.takes_out:
            besides = (*besides, out)
        return self._backward(*self._order_backward((*self.arguments.join(tensors, options), *besides)))

    def pickers(self, of: Signature) -> tuple[Callable[[tuple], tuple], ...]:
        """Functions that take tensors, options, and (grad_out, state, output_mask, out) out of the complete
        arguments of the backward operator; state and out are None where it is not attention_backward."""
        besides = ("grad_out", "state" if self.has_state else "", "output_mask", "out")
        return of.take(self.arguments.tensors), of.take(self.arguments.options), of.take(besides)

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

    def first_gradients(self, options: tuple, mask, grad_out: Tensor, tensors) -> Sequence[Tensor]:
        """The same inside a kernel, where nobody differentiates again: by torch.autograd, which works under
        torch's dispatch modes as well. Only inside torch.func's transforms does it not."""
        if private.transforms_active():
            return self.gradients(options, mask, grad_out, tensors)
        if torch.is_inference_mode_enabled():  # whose tensors cannot be leaves
            with torch.inference_mode(False):
                tensors = [None if t is None else t.clone() for t in tensors]
                return self.first_gradients(options, mask, grad_out.clone(), tensors)
        with private.autograd_keys_on(), torch.enable_grad():
            wanted = [t.detach().requires_grad_() for t in select(tensors, mask)]
            if not wanted:
                return []
            out = self.reference(replace(tensors, mask, wanted), options)
            return torch.autograd.grad(out, wanted, grad_out, allow_unused=True, materialize_grads=True)

    def gradients(self, options: tuple, mask, grad_out: Tensor, tensors) -> tuple[Tensor, ...]:
        """The gradients in `mask` through the reference, differentiable again."""
        return vjp(
            lambda *wanted: self.reference(replace(tensors, mask, wanted), options),
            select(tensors, mask),
            grad_out,
        )


# What the general form has beyond focused linear attention: the arguments after those of attention_forward.
_names = signature("attention_forward").names
GENERAL = _names[_names.index("saved_windows") + 1 :]
_LINEAR, _FOCUSED = signature("linear_attention").names, signature("attention").names


def _attention(given: dict[str, Any]) -> Tensor:
    linear = given["focusing_factor"] is None
    if not linear and given.get("feature_map", "") is None:
        given["feature_map"] = "focused"
    function, names = (reference.linear_attention, _LINEAR) if linear else (reference.attention, _FOCUSED)
    return function(**{name: given[name] for name in names if name in given})


def _of(function: Callable[..., Tensor]) -> Callable[[dict[str, Any]], Tensor]:
    return lambda given: function(**given)


_ATTENTION = ("attention_forward", "attention_backward", "check_attention", _attention)
ATTENTION = Family(*_ATTENTION)
# Calls of focused linear attention alone: autograd then carries half as many tensors.
PLAIN_ATTENTION = Family(*_ATTENTION, without=GENERAL)


def _family(name: str, function: Callable[..., Tensor]) -> Family:
    return Family(name, f"{name}_backward", f"check_{name}", _of(function))


CONV = _family("depthwise_conv", reference.depthwise_conv)
STATE = _family("attention_state", reference.attention_state)
FROM_STATE = _family("attention_from_state", reference.attention_from_state)

# The operators people call, with their families.
FORWARD = {
    "attention": ATTENTION,
    "linear_attention": ATTENTION,
    "depthwise_conv": CONV,
    "attention_state": STATE,
    "attention_from_state": FROM_STATE,
}
BACKWARD = {
    "attention_backward": ATTENTION,
    "depthwise_conv_backward": CONV,
    "attention_state_backward": STATE,
    "attention_from_state_backward": FROM_STATE,
}
OPERATORS = (*FORWARD, "attention_forward", *BACKWARD)
# Those that record SymInts, which torch.jit.trace cannot (csrc/traced.cpp).
TRACED = ("attention", "linear_attention", "depthwise_conv")


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
    each = (_CUDA_STATE_SHARE if q.is_cuda else _STATE_SHARE) * (head_dim + 1) * max(size, 4)
    least = min if type(windows * keys * head_dim) is int else torch.sym_min  # min would ask
    if q.is_cuda:
        return windows * least(1, budget // each)
    return least(windows, windows * budget // each) * least(1, keys // head_dim)


def count_saved_windows_in_general(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, window: Sequence[int] | None
) -> Any:
    """The same where values may have other channels; then none."""
    if v is None or q is None or k is None or v.shape != k.shape:
        return 0
    return count_saved_windows(q, k, num_heads, window)


def state_like(
    q: Tensor,
    v: Tensor,
    num_heads: int,
    saved_windows: Any,
    key_weight: Tensor | None,
    normalizer: str | None,
) -> tuple[list, torch.dtype]:
    """Shape and dtype of the saved state (csrc/params.h, window_state_elements): S and m of each head, and
    u and W where they are needed."""
    rows = q.shape[2]
    if key_weight is not None or normalizer in ("subtract", "magnitude"):
        rows = rows + num_heads
    return [saved_windows * rows * (v.shape[2] // num_heads + 1)], sum_dtype(q.dtype)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def out_like(given: dict[str, Any]) -> Tensor:
    """A new tensor of the shape and dtype of what an operator returns."""
    if "x" in given:
        return given["x"].new_empty(given["x"].shape)
    heads = given["num_heads"]
    if "q" not in given:  # attention_state
        k, v = given["k"], given["v"]
        shape = (k.shape[0], heads, k.shape[2] // heads + 1, v.shape[2] // heads + 1)
        return k.new_empty(shape, dtype=sum_dtype(k.dtype))
    q = given["q"]
    channels = given["v"].shape[2] if "v" in given else heads * (given["state"].shape[3] - 1)
    return q.new_empty((*q.shape[:2], channels))


# ------------------------------------------------------------------------------------------------ derivatives
def vjp(function: Callable, inputs: Sequence[Tensor], cotangents) -> tuple[Tensor, ...]:
    """Vector-Jacobian product that nests with autograd and torch.func at any depth, and inside a kernel."""
    with private.autograd_keys_on():
        return torch.func.vjp(function, *inputs)[1](cotangents)


def mask_of(mask: Sequence[bool], tensors: Sequence) -> list[bool]:
    """An entry for each of `tensors`; one that ends early asks for no more."""
    return [*mask, *[False] * (len(tensors) - len(mask))]


def select(tensors: Sequence, mask: Sequence[bool]) -> list:
    return [t for t, asked in zip(tensors, mask, strict=True) if asked]


def replace(tensors: Sequence, mask: Sequence[bool], values: Sequence) -> list:
    """`tensors` with those in `mask` replaced by `values`, in order."""
    remaining = iter(values)
    return [next(remaining) if asked else t for t, asked in zip(tensors, mask, strict=True)]
