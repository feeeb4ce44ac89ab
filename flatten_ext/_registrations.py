"""All of torch's hooks for torch.ops.flatten, in the order a call meets them.

    autocast      casts q, k, v to the active autocast dtype and leaves the parameters alone
    vmap          folds the mapped dimension into the batch, or maps sample by sample
    autograd      attention -> attention_forward and attention_backward; second derivatives and forward mode
                  through the plain-torch reference
    fake tensors  shapes and dtypes for torch.compile and torch.export
    fallback      the reference, on devices without kernels
    FLOPs         formulas for torch.utils.flop_counter

The stable ABI has no C++ autograd, so the autograd kernels are Python. They are registered directly instead of
through torch.library.register_autograd, whose generic wrapper triples what a call costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.flop_counter import register_flop_formula

from . import reference

_ops = torch.ops.flatten
_library = torch.library.Library("flatten", "IMPL")
_after_autograd = torch._C._after_autograd_keyset
_below_autograd = torch._C._AutoDispatchBelowAutograd
_autograd_keys = DispatchKeySet(DispatchKey.AutogradFunctionality) | DispatchKeySet(
    DispatchKey.ADInplaceOrView
)

# What is saved for backward beside q, k and v may add this much memory; beyond it S and m are computed again.
_STATE_BUDGET = 0.05


# ----------------------------------------------------------------------------------------------- families
@dataclass(frozen=True)
class _Family:
    """How autograd runs an operator whose arguments are split into `tensors`, which have gradients, in schema
    order, and `options`, which have none."""

    forward: Callable  # (tensors, options, save_state) -> out, state or None
    backward: Callable  # (grad_out, tensors, options, state, mask) -> the gradients in mask
    reference: Callable  # (tensors, options) -> out, differentiable in any mode


def _attention_arguments(tensors, options):
    """(q, k, v, scale, key_bias, dwc_weight, dwc_bias), options -> the arguments of attention_forward."""
    q, k, v, *parameters = tensors
    num_heads, size, window, shift, focusing_factor, eps = options
    return q, k, v, num_heads, *parameters, size, window, shift, focusing_factor, eps


def _worth_saving(q: Tensor, k: Tensor, num_heads: int, window: Sequence[int] | None) -> bool:
    """Whether S and m stay within the budget. Under dynamic shapes, only if that holds for all of them."""
    per_window = k.shape[1] if window is None else window[0] * window[1]
    state_bytes = (q.shape[2] // num_heads + 1) * max(q.element_size(), 4)
    return statically_known_true(state_bytes <= _STATE_BUDGET * 3 * per_window * q.element_size())


def _attention_reference(tensors, options):
    q, k, v, num_heads, *parameters, size, window, shift, focusing_factor, eps = _attention_arguments(
        tensors, options
    )
    if focusing_factor is None:
        return reference.linear_attention(q, k, v, num_heads, *parameters[2:], size, window, shift, eps)
    return reference.attention(q, k, v, num_heads, *parameters, size, window, shift, focusing_factor, eps)


_ATTENTION = _Family(
    forward=lambda tensors, options, save_state: _ops.attention_forward.default(
        *_attention_arguments(tensors, options), save_state
    ),
    backward=lambda grad_out, tensors, options, state, mask: _ops.attention_backward.default(
        grad_out, *_attention_arguments(tensors, options), state, mask
    ),
    reference=_attention_reference,
)

_CONV = _Family(
    forward=lambda tensors, options, save_state: (_ops.depthwise_conv.default(*tensors, *options), None),
    backward=lambda grad_out, tensors, options, state, mask: _ops.depthwise_conv_backward.default(
        grad_out, *tensors, *options, mask
    ),
    reference=lambda tensors, options: reference.depthwise_conv(*tensors, *options),
)


# ----------------------------------------------------------------------------------------------- autograd
class _Forward(_SingleLevelFunction):
    """First derivatives, by the kernels. Returns what family.forward returns."""

    @staticmethod
    def forward(ctx, family, options, save_state, *tensors):
        # Autograd is off for this level by its dispatch keys; grad mode is on for torch.func's levels below.
        with _below_autograd(), torch.enable_grad():
            out, state = family.forward(tensors, options, save_state)
        ctx.family, ctx.options = family, options
        ctx.save_for_backward(state, *tensors)
        if state is not None:
            ctx.mark_non_differentiable(state)
        return out, state

    @staticmethod
    def backward(ctx, grad_out, grad_state):
        state, *tensors = ctx.saved_tensors
        mask = ctx.needs_input_grad[3:]
        gradients = iter(ctx.family.backward(grad_out, tensors, ctx.options, state, list(mask)))
        return None, None, None, *(next(gradients) if wanted else None for wanted in mask)


class _Backward(_SingleLevelFunction):
    """First derivatives by the kernels, their derivatives by the reference."""

    @staticmethod
    def forward(ctx, family, options, mask, state, grad_out, *tensors):
        with _below_autograd(), torch.enable_grad():
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
            return _reference_gradients(ctx.family, ctx.options, ctx.mask, grad_out, tensors)

        second = iter(_vjp(first, _select(saved, needed), grad_gradients))
        return None, None, None, None, *(next(second) if need else None for need in needed)


def _reference_gradients(family: _Family, options, mask, grad_out: Tensor, tensors) -> tuple[Tensor, ...]:
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


def _apply(function: type[_SingleLevelFunction], *args):
    """function.apply; inside torch.func's transforms, which dispatch to us one level at a time, with leave."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    with enable_single_level_autograd_function():
        return function.apply(*args)


def _in_forward_mode() -> bool:
    """Inside a dual level the reference runs: its operations carry tangents, a kernel would drop them."""
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
        return _attention_reference(tensors, options)
    if _records(*tensors):
        return _apply(_Forward, _ATTENTION, options, _worth_saving(q, k, num_heads, window), *tensors)[0]
    with _below_autograd():
        return _ops.attention.default.redispatch(
            keyset & _after_autograd, *_attention_arguments(tensors, options)
        )


def _linear_attention_autograd(
    keyset, q, k, v, num_heads, dwc_weight=None, dwc_bias=None, size=None, window=None, shift=None, eps=1e-6
):
    tensors = (q, k, v, None, None, dwc_weight, dwc_bias)
    options = (num_heads, size, window, shift, None, eps)
    if _in_forward_mode():
        return _attention_reference(tensors, options)
    if _records(*tensors):
        return _apply(_Forward, _ATTENTION, options, _worth_saving(q, k, num_heads, window), *tensors)[0]
    with _below_autograd():
        return _ops.linear_attention.default.redispatch(
            keyset & _after_autograd, q, k, v, num_heads, dwc_weight, dwc_bias, size, window, shift, eps
        )


def _conv_autograd(keyset, x, weight, bias, size, window=None, shift=None):
    tensors, options = (x, weight, bias), (size, window, shift)
    if _in_forward_mode():
        return _CONV.reference(tensors, options)
    if _records(*tensors):
        return _apply(_Forward, _CONV, options, False, *tensors)[0]
    with _below_autograd():
        return _ops.depthwise_conv.default.redispatch(keyset & _after_autograd, *tensors, *options)


def _attention_forward_autograd(
    keyset, q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift,
    focusing_factor, eps, save_state,
):  # fmt: skip
    # Reached from _Forward, one torch.func level further down, or by a direct call.
    tensors = (q, k, v, scale, key_bias, dwc_weight, dwc_bias)
    options = (num_heads, size, window, shift, focusing_factor, eps)
    if _records(*tensors):
        return _apply(_Forward, _ATTENTION, options, save_state, *tensors)
    with _below_autograd():
        return _ops.attention_forward.default.redispatch(
            keyset & _after_autograd, *_attention_arguments(tensors, options), save_state
        )


def _attention_backward_autograd(
    keyset, grad_out, q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift,
    focusing_factor, eps, state, output_mask,
):  # fmt: skip
    tensors = (q, k, v, scale, key_bias, dwc_weight, dwc_bias)
    options = (num_heads, size, window, shift, focusing_factor, eps)
    if _in_forward_mode():
        return list(_reference_gradients(_ATTENTION, options, output_mask, grad_out, tensors))
    if _records(grad_out, *tensors):
        return list(_apply(_Backward, _ATTENTION, options, output_mask, state, grad_out, *tensors))
    with _below_autograd():
        return _ops.attention_backward.default.redispatch(
            keyset & _after_autograd, grad_out, *_attention_arguments(tensors, options), state, output_mask
        )


def _conv_backward_autograd(keyset, grad_out, x, weight, bias, size, window, shift, output_mask):
    tensors, options = (x, weight, bias), (size, window, shift)
    if _in_forward_mode():
        return list(_reference_gradients(_CONV, options, output_mask, grad_out, tensors))
    if _records(grad_out, *tensors):
        return list(_apply(_Backward, _CONV, options, output_mask, None, grad_out, *tensors))
    with _below_autograd():
        return _ops.depthwise_conv_backward.default.redispatch(
            keyset & _after_autograd, grad_out, *tensors, *options, output_mask
        )


_library.impl("attention", _attention_autograd, "Autograd", with_keyset=True)
_library.impl("linear_attention", _linear_attention_autograd, "Autograd", with_keyset=True)
_library.impl("depthwise_conv", _conv_autograd, "Autograd", with_keyset=True)
_library.impl("attention_forward", _attention_forward_autograd, "Autograd", with_keyset=True)
_library.impl("attention_backward", _attention_backward_autograd, "Autograd", with_keyset=True)
_library.impl("depthwise_conv_backward", _conv_backward_autograd, "Autograd", with_keyset=True)


# ----------------------------------------------------------------------------------------------- autocast
def _register_autocast(name: str, tokens: int, device: str, key: DispatchKey) -> None:
    """Casts the first `tokens` arguments to the dtype that is active when the call is made."""
    op = getattr(_ops, name).default
    autocast = DispatchKeySet(key)

    def kernel(*args):
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return op(*(_autocast_to(t, dtype) for t in args[:tokens]), *args[tokens:])

    _library.impl(name, kernel, key.name)


def _autocast_to(t: Tensor, dtype: torch.dtype) -> Tensor:
    # As torch's own rules: float64 and what is no floating-point number stay.
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


for _device, _key in {
    "cpu": DispatchKey.AutocastCPU,
    "cuda": DispatchKey.AutocastCUDA,
    "xpu": DispatchKey.AutocastXPU,
    "mps": DispatchKey.AutocastMPS,
}.items():
    _register_autocast("attention", 3, _device, _key)
    _register_autocast("linear_attention", 3, _device, _key)
    _register_autocast("depthwise_conv", 1, _device, _key)


# --------------------------------------------------------------------------------------------------- vmap
def _register_vmap(name: str, tokens: int, state: int | None = None, mask: int | None = None) -> None:
    """Folds the mapped dimension into the batch where only the first `tokens` arguments (and `state`, which is
    batch-major) are mapped and no parameter's gradient is asked for; else runs sample by sample."""
    op = getattr(_ops, name).default

    def mapped(outputs):
        """Tensors with the mapped dimension in front, in the container the operator returns, and their dims."""
        if len(op._schema.returns) > 1:
            return tuple(outputs), (0,) * len(outputs)
        return list(outputs), [0] * len(outputs)

    def rule(info, in_dims, *args):
        dims = [d if isinstance(d, int) else None for d in in_dims]  # lists of numbers have lists of None

        def folds(i: int) -> bool:
            return i < tokens or i == state

        only_tokens = all(d is None or folds(i) for i, d in enumerate(dims))
        if not only_tokens or (mask is not None and any(args[mask][tokens - 1 :])):
            samples = [
                op(*(a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)))
                for i in range(info.batch_size)
            ]
            if isinstance(samples[0], Tensor):
                return torch.stack(samples), 0
            return mapped([torch.stack(outputs) for outputs in zip(*samples, strict=True)])

        def fold(t: Tensor, d: int | None) -> Tensor:
            t = t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            return t.flatten(0, 1)

        result = op(*(fold(a, d) if folds(i) else a for i, (a, d) in enumerate(zip(args, dims, strict=True))))
        if isinstance(result, Tensor):
            return result.unflatten(0, (info.batch_size, -1)), 0
        return mapped([t.unflatten(0, (info.batch_size, t.shape[0] // info.batch_size)) for t in result])

    torch.library.register_vmap(f"flatten::{name}", rule, lib=_library)


_register_vmap("attention", 3)
_register_vmap("linear_attention", 3)
_register_vmap("depthwise_conv", 1)
_register_vmap("attention_forward", 3)
_register_vmap("attention_backward", 4, state=14, mask=15)
_register_vmap("depthwise_conv_backward", 2, mask=7)


# ------------------------------------------------------------------------------------------- fake tensors
def _state_shape(q: Tensor, k: Tensor, num_heads: int, size, window) -> list:
    """S and m of every window: batch * windows * (head_dim + 1) * channels numbers."""
    windows = 1 if window is None else (size[0] // window[0]) * (size[1] // window[1])
    return [q.shape[0] * windows * (q.shape[2] // num_heads + 1) * q.shape[2]]


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_forward(
    q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift, focusing_factor, eps, save
):
    state = _state_shape(q, k, num_heads, size, window) if save else [0]
    return q.new_empty(q.shape), q.new_empty(state, dtype=_accumulate_dtype(q.dtype))


def _fake_gradients(tensors, mask) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, wanted in zip(tensors, mask, strict=True) if wanted]


def _fake_attention_backward(
    grad_out, q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift,
    focusing_factor, eps, state, output_mask,
):  # fmt: skip
    return _fake_gradients((q, k, v, scale, key_bias, dwc_weight, dwc_bias), output_mask)


def _fake_conv_backward(grad_out, x, weight, bias, size, window, shift, output_mask):
    return _fake_gradients((x, weight, bias), output_mask)


def _register_fake(name: str, function: Callable) -> None:
    torch.library.register_fake(f"flatten::{name}", function, lib=_library)


_register_fake("attention", lambda q, *args, **kwargs: q.new_empty(q.shape))
_register_fake("linear_attention", lambda q, *args, **kwargs: q.new_empty(q.shape))
_register_fake("depthwise_conv", lambda x, *args, **kwargs: x.new_empty(x.shape))
_register_fake("attention_forward", _fake_forward)
_register_fake("attention_backward", _fake_attention_backward)
_register_fake("depthwise_conv_backward", _fake_conv_backward)


# ----------------------------------------------------------------------------------------------- fallback
def _fallback_attention(
    q, k, v, num_heads, scale=None, key_bias=None, dwc_weight=None, dwc_bias=None,
    size=None, window=None, shift=None, focusing_factor=3.0, eps=1e-6,
):  # fmt: skip
    arguments = (
        q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift, focusing_factor, eps,
    )  # fmt: skip
    _ops.check_attention.default(*arguments)
    return reference.attention(*arguments)


def _fallback_linear_attention(
    q, k, v, num_heads, dwc_weight=None, dwc_bias=None, size=None, window=None, shift=None, eps=1e-6
):
    tensors, options = (
        (q, k, v, None, None, dwc_weight, dwc_bias),
        (num_heads, size, window, shift, None, eps),
    )
    _ops.check_attention.default(*_attention_arguments(tensors, options))
    return _attention_reference(tensors, options)


def _fallback_conv(x, weight, bias, size, window=None, shift=None):
    _ops.check_depthwise_conv.default(x, weight, bias, size, window, shift)
    return reference.depthwise_conv(x, weight, bias, size, window, shift)


def _fallback_forward(
    q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift, focusing_factor, eps, save
):
    options = (num_heads, size, window, shift, focusing_factor, eps)
    tensors = (q, k, v, scale, key_bias, dwc_weight, dwc_bias)
    _ops.check_attention.default(*_attention_arguments(tensors, options))
    # The shape that the fake kernel promised; the fallback's backward does not read it.
    state = _state_shape(q, k, num_heads, size, window) if save else [0]
    return _attention_reference(tensors, options), q.new_zeros(state, dtype=_accumulate_dtype(q.dtype))


def _fallback_attention_backward(
    grad_out, q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift,
    focusing_factor, eps, state, output_mask,
):  # fmt: skip
    options = (num_heads, size, window, shift, focusing_factor, eps)
    tensors = (q, k, v, scale, key_bias, dwc_weight, dwc_bias)
    _ops.check_attention.default(*_attention_arguments(tensors, options))
    return _detached(_reference_gradients(_ATTENTION, options, output_mask, grad_out, tensors))


def _fallback_conv_backward(grad_out, x, weight, bias, size, window, shift, output_mask):
    _ops.check_depthwise_conv.default(x, weight, bias, size, window, shift)
    return _detached(
        _reference_gradients(_CONV, (size, window, shift), output_mask, grad_out, (x, weight, bias))
    )


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().contiguous() for t in tensors]


for _name, _function in {
    "attention": _fallback_attention,
    "linear_attention": _fallback_linear_attention,
    "depthwise_conv": _fallback_conv,
    "attention_forward": _fallback_forward,
    "attention_backward": _fallback_attention_backward,
    "depthwise_conv_backward": _fallback_conv_backward,
}.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")


# -------------------------------------------------------------------------------------------------- FLOPs
def _attention_flops(q_shape, k_shape, num_heads, dwc_weight_shape, size) -> int:
    """Multiply-adds counted twice, per image: of S and Q S, 2 (N + M) C D, of Q m, 2 N C, and of the taps,
    2 kh kw H W C."""
    batch, queries, channels = q_shape
    products = 2 * (queries + k_shape[1]) * channels * (channels // num_heads) + 2 * queries * channels
    return batch * products + (_taps_flops(q_shape, dwc_weight_shape, size) if dwc_weight_shape else 0)


def _taps_flops(x_shape, weight_shape, size) -> int:
    return 2 * x_shape[0] * size[0] * size[1] * x_shape[2] * weight_shape[2] * weight_shape[3]


@register_flop_formula([_ops.attention, _ops.attention_forward])
def _focused_flops(
    q, k, v, num_heads, scale=None, key_bias=None, dwc_weight=None, dwc_bias=None, size=None, *_, **__
) -> int:
    return _attention_flops(q, k, num_heads, dwc_weight, size)


@register_flop_formula(_ops.linear_attention)
def _linear_flops(q, k, v, num_heads, dwc_weight=None, dwc_bias=None, size=None, *_, **__) -> int:
    return _attention_flops(q, k, num_heads, dwc_weight, size)


@register_flop_formula(_ops.attention_backward)
def _attention_backward_flops(
    grad_out, q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, *_, **__
) -> int:
    # Two products for each of the forward's; computing S again is not counted, as it is the schedule's choice.
    return 2 * _attention_flops(q, k, num_heads, dwc_weight, size)


@register_flop_formula(_ops.depthwise_conv)
def _conv_flops(x, weight, bias, size, *_, **__) -> int:
    return _taps_flops(x, weight, size)


@register_flop_formula(_ops.depthwise_conv_backward)
def _conv_backward_flops(grad_out, x, weight, bias, size, *_, **__) -> int:
    return 2 * _taps_flops(x, weight, size)
