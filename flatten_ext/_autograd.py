"""Autograd of torch.ops.flatten: first derivatives by the kernels, further ones through the reference.

    attention, linear_attention   -> attention_forward, attention_backward
    depthwise_conv                -> depthwise_conv, depthwise_conv_backward
    the backward operators        -> vector-Jacobian products of the plain-torch reference

The stable ABI has no C++ autograd, so these kernels are Python. They are registered directly and not through
torch.library.register_autograd, whose generic wrapper triples what a call costs. Inside a forward-mode level
the reference runs: its operations carry tangents, a kernel would drop them silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import _load as _load  # registers torch.ops.flatten, whose handles are taken below
from . import reference

_ops = torch.ops.flatten
_library = torch.library.Library("flatten", "IMPL")
_after_autograd = torch._C._after_autograd_keyset
_below_autograd = torch._C._AutoDispatchBelowAutograd
_autograd_keys = DispatchKeySet(DispatchKey.AutogradFunctionality) | DispatchKeySet(
    DispatchKey.ADInplaceOrView
)

# The operators' handles: a call that records nothing goes on below autograd through redispatch_boxed, as
# torch's own autograd fallback does, without the Python that OpOverload puts before it.
_attention, _linear_attention, _depthwise_conv = (
    op.default._handle for op in (_ops.attention, _ops.linear_attention, _ops.depthwise_conv)
)
_attention_forward, _attention_backward, _depthwise_conv_backward = (
    op.default._handle
    for op in (_ops.attention_forward, _ops.attention_backward, _ops.depthwise_conv_backward)
)

# What is saved for backward beside q, k and v may add a twentieth of their memory; S and m of windows beyond
# it are computed again.
_STATE_SHARE = 20


@dataclass(frozen=True)
class Family:
    """How autograd runs an operator whose arguments are split into `tensors`, which have gradients, in schema
    order, and `options`, which have none."""

    forward: Callable  # (keys, tensors, options, saved_windows) -> out, state or None; see _forward_by
    backward: Callable  # (grad_out, tensors, options, state, mask) -> the gradients in mask
    reference: Callable  # (tensors, options) -> out, differentiable in any mode
    check: Callable  # (tensors, options, what a backward gets besides) -> None; raises what the kernels would

    def checked_reference(self, tensors: Sequence[Any], options: tuple) -> Tensor:
        """The reference, after the checks that the kernels make."""
        with _below_autograd():
            self.check(tensors, options)
        return self.reference(tensors, options)


def attention_arguments(tensors: Sequence[Any], options: tuple) -> tuple[Any, ...]:
    """(q, k, v, scale, key_bias, dwc_weight, dwc_bias), options -> the arguments of attention_forward."""
    num_heads, size, window, shift, focusing_factor, eps = options
    return *tensors[:3], num_heads, *tensors[3:], size, window, shift, focusing_factor, eps


def count_windows(q: Tensor, window: Sequence[int] | None) -> Any:
    """Windows of the whole batch."""
    return q.shape[0] if window is None else q.shape[0] * (q.shape[1] // (window[0] * window[1]))


def _saved_windows(q: Tensor, k: Tensor, num_heads: int, window: Sequence[int] | None) -> Any:
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


def _attention_reference(tensors: Sequence[Any], options: tuple) -> Tensor:
    if options[4] is not None:
        return reference.attention(*attention_arguments(tensors, options))
    q, k, v, _, _, dwc_weight, dwc_bias = tensors
    num_heads, size, window, shift, _, eps = options
    return reference.linear_attention(q, k, v, num_heads, dwc_weight, dwc_bias, size, window, shift, eps)


def _forward_by(keys: DispatchKeySet | None, overload: Any, *args: Any) -> Any:
    """Calls an operator by the keys below autograd; without any, by its overload, which finds its own."""
    if keys is None:
        return overload(*args)
    return overload._handle.redispatch_boxed(keys, *args)


ATTENTION = Family(
    forward=lambda keys, tensors, options, saved_windows: _forward_by(
        keys, _ops.attention_forward.default, *attention_arguments(tensors, options), saved_windows
    ),
    backward=lambda grad_out, tensors, options, state, mask: _ops.attention_backward.default(
        grad_out, *attention_arguments(tensors, options), state, mask
    ),
    reference=_attention_reference,
    check=lambda tensors, options, *besides: _ops.check_attention.default(
        *attention_arguments(tensors, options), *besides
    ),
)

CONV = Family(
    forward=lambda keys, tensors, options, saved_windows: (
        _forward_by(keys, _ops.depthwise_conv.default, *tensors, *options),
        None,
    ),
    backward=lambda grad_out, tensors, options, state, mask: _ops.depthwise_conv_backward.default(
        grad_out, *tensors, *options, mask
    ),
    reference=lambda tensors, options: reference.depthwise_conv(*tensors, *options),
    check=lambda tensors, options, *besides: _ops.check_depthwise_conv.default(*tensors, *options, *besides),
)


class _Forward(_SingleLevelFunction):
    """First derivatives, by the kernels. Returns what family.forward returns. `keyset` is the caller's."""

    @staticmethod
    def forward(ctx, keyset, family, options, saved_windows, *tensors):
        if torch._C._are_functorch_transforms_active():
            with _this_level_off():
                out, state = family.forward(None, tensors, options, saved_windows)
        else:
            out, state = family.forward(keyset & _after_autograd, tensors, options, saved_windows)
        ctx.family, ctx.options = family, options
        ctx.save_for_backward(state, *tensors)
        ctx.set_materialize_grads(False)  # the state has none: no zeros of its size
        if state is not None:
            ctx.mark_non_differentiable(state)
        return out, state

    @staticmethod
    def backward(ctx, grad_out, grad_state):
        mask = ctx.needs_input_grad[4:]
        if grad_out is None:
            return None, None, None, None, *(None for _ in mask)
        state, *tensors = ctx.saved_tensors
        with nullcontext() if _may_record() else _below_autograd():
            gradients = iter(ctx.family.backward(grad_out, tensors, ctx.options, state, list(mask)))
        return None, None, None, None, *(next(gradients) if wanted else None for wanted in mask)


class _Backward(_SingleLevelFunction):
    """First derivatives by the kernels, their derivatives by the reference."""

    @staticmethod
    def forward(ctx, family, options, mask, state, grad_out, *tensors):
        with _this_level_off():
            gradients = family.backward(grad_out, tensors, options, state, mask)
        ctx.family, ctx.options, ctx.mask = family, options, mask
        ctx.save_for_backward(grad_out, *tensors)
        return tuple(gradients)

    @staticmethod
    def backward(ctx, *grad_gradients):
        needed = ctx.needs_input_grad[4:]
        saved = ctx.saved_tensors

        def first(*wanted):
            grad_out, *tensors = _replace(saved, needed, wanted)
            return reference_gradients(ctx.family, ctx.options, ctx.mask, grad_out, tensors)

        second = iter(_vjp(first, _select(saved, needed), grad_gradients))
        return None, None, None, None, *(next(second) if need else None for need in needed)


def reference_gradients(family: Family, options, mask, grad_out: Tensor, tensors) -> tuple[Tensor, ...]:
    """The gradients in `mask` through the reference, differentiable again."""
    return _vjp(
        lambda *wanted: family.reference(_replace(tensors, mask, wanted), options),
        _select(tensors, mask),
        grad_out,
    )


def _vjp(function: Callable, inputs: Sequence[Tensor], cotangents) -> tuple[Tensor, ...]:
    """Vector-Jacobian product that nests with autograd and torch.func at any depth. Autograd's keys may be
    switched off here, as inside every kernel; they are needed for the while."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - _autograd_keys):
        return torch.func.vjp(function, *inputs)[1](cotangents)


def _select(tensors: Sequence, mask: Sequence[bool]) -> list:
    return [t for t, asked in zip(tensors, mask, strict=True) if asked]


def _replace(tensors: Sequence, mask: Sequence[bool], values: Sequence) -> list:
    """`tensors` with those in `mask` replaced by `values`, in order."""
    remaining = iter(values)
    return [next(remaining) if asked else t for t, asked in zip(tensors, mask, strict=True)]


def _apply(function: Any, *args):
    """function.apply, with leave inside torch.func's transforms: they dispatch to us one level at a time."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    with enable_single_level_autograd_function():
        return function.apply(*args)


def _this_level_off() -> AbstractContextManager:
    """Switches autograd off for the level whose forward runs, by its dispatch keys. Grad mode, off in a
    forward, comes on for torch.func's levels below."""
    if not torch._C._are_functorch_transforms_active():
        return _below_autograd()
    levels_below = ExitStack()
    levels_below.enter_context(_below_autograd())
    levels_below.enter_context(torch.enable_grad())
    return levels_below


def _may_record() -> bool:
    """Whether a derivative of what runs now may be asked for, in any mode."""
    return torch.is_grad_enabled() or _in_forward_mode() or torch._C._are_functorch_transforms_active()


def _in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def _records(*tensors: Tensor | None) -> bool:
    return torch._C.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


def _attention_autograd(
    keyset, q, k, v, num_heads, scale=None, key_bias=None, dwc_weight=None, dwc_bias=None,
    size=None, window=None, shift=None, focusing_factor=3.0, eps=1e-6,
):  # fmt: skip
    tensors = (q, k, v, scale, key_bias, dwc_weight, dwc_bias)
    options = (num_heads, size, window, shift, focusing_factor, eps)
    if _in_forward_mode():
        return ATTENTION.checked_reference(tensors, options)
    if _records(*tensors):
        saved = _saved_windows(q, k, num_heads, window)
        return _apply(_Forward, keyset, ATTENTION, options, saved, *tensors)[0]
    return _attention.redispatch_boxed(
        keyset & _after_autograd, q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias,
        size, window, shift, focusing_factor, eps,
    )  # fmt: skip


def _linear_attention_autograd(
    keyset, q, k, v, num_heads, dwc_weight=None, dwc_bias=None, size=None, window=None, shift=None, eps=1e-6
):
    tensors = (q, k, v, None, None, dwc_weight, dwc_bias)
    options = (num_heads, size, window, shift, None, eps)
    if _in_forward_mode():
        return ATTENTION.checked_reference(tensors, options)
    if _records(*tensors):
        saved = _saved_windows(q, k, num_heads, window)
        return _apply(_Forward, keyset, ATTENTION, options, saved, *tensors)[0]
    return _linear_attention.redispatch_boxed(
        keyset & _after_autograd, q, k, v, num_heads, dwc_weight, dwc_bias, size, window, shift, eps
    )


def _conv_autograd(keyset, x, weight, bias, size, window=None, shift=None):
    tensors, options = (x, weight, bias), (size, window, shift)
    if _in_forward_mode():
        return CONV.checked_reference(tensors, options)
    if _records(*tensors):
        return _apply(_Forward, keyset, CONV, options, 0, *tensors)[0]
    return _depthwise_conv.redispatch_boxed(keyset & _after_autograd, x, weight, bias, size, window, shift)


def _attention_forward_autograd(
    keyset, q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift,
    focusing_factor, eps, saved_windows,
):  # fmt: skip
    # Reached from _Forward, one torch.func level further down, or by a direct call.
    tensors = (q, k, v, scale, key_bias, dwc_weight, dwc_bias)
    options = (num_heads, size, window, shift, focusing_factor, eps)
    if _records(*tensors):
        return _apply(_Forward, keyset, ATTENTION, options, saved_windows, *tensors)
    return _attention_forward.redispatch_boxed(
        keyset & _after_autograd, *attention_arguments(tensors, options), saved_windows
    )


def _attention_backward_autograd(
    keyset, grad_out, q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift,
    focusing_factor, eps, state, output_mask,
):  # fmt: skip
    tensors = (q, k, v, scale, key_bias, dwc_weight, dwc_bias)
    options = (num_heads, size, window, shift, focusing_factor, eps)
    if _in_forward_mode():
        return list(reference_gradients(ATTENTION, options, output_mask, grad_out, tensors))
    if _records(grad_out, *tensors):
        return list(_apply(_Backward, ATTENTION, options, output_mask, state, grad_out, *tensors))
    return _attention_backward.redispatch_boxed(
        keyset & _after_autograd, grad_out, *attention_arguments(tensors, options), state, output_mask
    )


def _conv_backward_autograd(keyset, grad_out, x, weight, bias, size, window, shift, output_mask):
    tensors, options = (x, weight, bias), (size, window, shift)
    if _in_forward_mode():
        return list(reference_gradients(CONV, options, output_mask, grad_out, tensors))
    if _records(grad_out, *tensors):
        return list(_apply(_Backward, CONV, options, output_mask, None, grad_out, *tensors))
    return _depthwise_conv_backward.redispatch_boxed(
        keyset & _after_autograd, grad_out, *tensors, *options, output_mask
    )


_library.impl("attention", _attention_autograd, "Autograd", with_keyset=True)
_library.impl("linear_attention", _linear_attention_autograd, "Autograd", with_keyset=True)
_library.impl("depthwise_conv", _conv_autograd, "Autograd", with_keyset=True)
_library.impl("attention_forward", _attention_forward_autograd, "Autograd", with_keyset=True)
_library.impl("attention_backward", _attention_backward_autograd, "Autograd", with_keyset=True)
_library.impl("depthwise_conv_backward", _conv_backward_autograd, "Autograd", with_keyset=True)
