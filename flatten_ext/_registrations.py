"""torch's other hooks for torch.ops.flatten, in the order a call meets them; autograd is in _autograd.py.

nested        refuses nested tensors by the argument's name
jit tracing   records a twin of the operator, with plain ints in place of sizes that the trace follows
autocast      casts q, k, v to the active autocast dtype and leaves the parameters alone
vmap          folds the mapped dimension into the batch, or maps sample by sample
fake tensors  shapes and dtypes for torch.compile and torch.export
fallback      the reference, on devices without kernels
FLOPs         formulas for torch.utils.flop_counter
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensor
from torch.nested._internal.nested_tensor import NestedTensor
from torch.utils.flop_counter import register_flop_formula

from . import reference
from ._autograd import ATTENTION, CONV, attention_arguments, reference_gradients

_ops = torch.ops.flatten
_library = torch.library.Library("flatten", "IMPL")


OPERATORS = (
    "attention",
    "linear_attention",
    "depthwise_conv",
    "attention_forward",
    "attention_backward",
    "depthwise_conv_backward",
)


# ----------------------------------------------------------------------------------------------------- nested
def _register_nested(name: str) -> None:
    """Nested tensors come by keys of their own, or as a subclass: calls without one never ask."""
    names = [argument.name for argument in getattr(_ops, name).default._schema.arguments]

    def refuse(*args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        nested = next(n for n, value in given.items() if isinstance(value, Tensor) and value.is_nested)
        raise RuntimeError(
            f"flatten.{name}: {nested} is a nested tensor, expected a dense strided tensor; "
            "call the operator for each of its tensors (unbind())"
        )

    for key in ("AutogradNestedTensor", "NestedTensorCPU", "NestedTensorCUDA"):
        _library.impl(name, refuse, key)
    torch.library.register_torch_dispatch(
        f"flatten::{name}",
        NestedTensor,
        lambda _, func, types, args, kwargs: refuse(*args, **kwargs),
        lib=_library,
    )


for _name in OPERATORS:
    _register_nested(_name)


# ------------------------------------------------------------------------------------------------ jit tracing
def _register_tracing(name: str, tokens: str) -> None:
    """Records the twin `name`_traced (csrc/traced.cpp): torch.jit.trace has no way to record a SymInt that a
    shape gave. A recorded call has the numbers of its trace for good, so it also gets what shows in a later
    run that another size has come: the number of tokens where there is a size, and every number from a shape.
    """
    op, twin = getattr(_ops, name).default, getattr(_ops, f"{name}_traced").default
    arguments = [argument.name for argument in op._schema.arguments]
    numbers = [name for name in ("num_heads", "size", "window", "shift") if name in arguments]

    def kernel(*args):
        given = dict(
            zip(arguments, args, strict=False)
        )  # what the caller left out at the end is not among args
        measured = []
        if given.get("size") is not None and given[tokens] is not None and given[tokens].dim() > 1:
            measured.append(given[tokens].shape[1])
        measured += [n for n in _numbers_as_typed(op, numbers) if isinstance(n, Tensor)]
        values = (
            torch.stack([torch.as_tensor(n) for n in measured])
            if measured
            else torch.empty(0, dtype=torch.int64)
        )
        return twin(values, [int(n) for n in measured], *args)

    _library.impl(name, kernel, "Tracer")


def _numbers_as_typed(op, numbers: Sequence[str]) -> list:
    """The arguments `numbers` of the call to `op` under way as its caller typed them, lists opened out. The
    dispatcher made them ints; the frame of the call still has the tensors by which a trace follows a shape.
    In a torch that has no such frame the list is empty, and a traced call does not see that they differ."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        callee = frame.f_locals.get("self") if frame.f_code.co_name == "__call__" else None
        if callee is op or callee is op.overloadpacket:
            names = [argument.name for argument in op._schema.arguments]
            given = dict(zip(names, frame.f_locals["args"], strict=False)) | frame.f_locals["kwargs"]
            lists = [given.get(name) for name in numbers]
            found = [n for value in lists for n in (value if isinstance(value, (list, tuple)) else [value])]
            if any(isinstance(n, Tensor) for n in found):
                return found
        frame = frame.f_back
    return []


_register_tracing("attention", "k")
_register_tracing("linear_attention", "k")
_register_tracing("depthwise_conv", "x")


# --------------------------------------------------------------------------------------------------- autocast
def _register_autocast(name: str, tokens: int, device: str, key: str) -> None:
    """Casts the first `tokens` arguments to the dtype that is active when the call is made."""
    op = getattr(_ops, name).default
    autocast = DispatchKeySet(getattr(DispatchKey, key))

    def kernel(*args):
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return op(*(_autocast_to(t, dtype) for t in args[:tokens]), *args[tokens:])

    _library.impl(name, kernel, key)


def _autocast_to(t: Tensor, dtype: torch.dtype) -> Tensor:
    # As torch's own rules: float64 and what is no floating-point number stay.
    # What is no dense tensor stays too: the operator says so.
    if t is None or t.layout != torch.strided or t.dtype == torch.float64 or not t.is_floating_point():
        return t
    return t.to(dtype)


for _device, _key in {
    "cpu": "AutocastCPU",
    "cuda": "AutocastCUDA",
    "xpu": "AutocastXPU",
    "mps": "AutocastMPS",
}.items():
    _register_autocast("attention", 3, _device, _key)
    _register_autocast("linear_attention", 3, _device, _key)
    _register_autocast("depthwise_conv", 1, _device, _key)


# ------------------------------------------------------------------------------------------------------- vmap
def _register_vmap(
    name: str, tokens: int, saved: int | None = None, state: int | None = None, mask: int | None = None
) -> None:
    """Folds the mapped dimension into the batch where only the first `tokens` arguments and `state` are
    mapped and no parameter's gradient is asked for; else runs sample by sample. A folded call neither leaves
    a state (`saved` is its number of windows) nor takes one: which windows that holds depends on the batch.
    """
    op = getattr(_ops, name).default

    def mapped(outputs):
        """Tensors whose mapped dimension is the first, in the operator's container, and their dims."""
        if len(op._schema.returns) > 1:
            return tuple(outputs), (0,) * len(outputs)
        return list(outputs), [0] * len(outputs)

    def rule(info, in_dims, *args):
        dims = [d if isinstance(d, int) else None for d in in_dims]  # lists of numbers have lists of None

        only_tokens = all(d is None or i < tokens or i == state for i, d in enumerate(dims))
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

        folded = [*map(fold, args[:tokens], dims[:tokens]), *args[tokens:]]
        if saved is not None:
            folded[saved] = 0
        if state is not None:
            folded[state] = args[state].new_empty(0)
        result = op(*folded)
        if isinstance(result, Tensor):
            return result.unflatten(0, (info.batch_size, -1)), 0
        return mapped([t.unflatten(0, (info.batch_size, t.shape[0] // info.batch_size)) for t in result])

    torch.library.register_vmap(f"flatten::{name}", rule, lib=_library)


_register_vmap("attention", 3)
_register_vmap("linear_attention", 3)
_register_vmap("depthwise_conv", 1)
_register_vmap("attention_forward", 3, saved=13)
_register_vmap("attention_backward", 4, state=14, mask=15)
_register_vmap("depthwise_conv_backward", 2, mask=7)


# ----------------------------------------------------------------------------------------------- fake tensors
def _state_shape(q: Tensor, num_heads: int, saved_windows) -> list:
    """S and m of a window: (head_dim + 1) * channels numbers."""
    return [saved_windows * (q.shape[2] // num_heads + 1) * q.shape[2]]


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_traced(t: Tensor) -> bool:
    """A traced call is checked when it runs, with its true sizes; one on meta tensors at once."""
    return isinstance(t, FakeTensor)


def _fake_attention(
    q, k, v, num_heads, scale=None, key_bias=None, dwc_weight=None, dwc_bias=None,
    size=None, window=None, shift=None, focusing_factor=3.0, eps=1e-6,
):  # fmt: skip
    if not _is_traced(q):
        _ops.check_attention.default(
            q,
            k,
            v,
            num_heads,
            scale,
            key_bias,
            dwc_weight,
            dwc_bias,
            size,
            window,
            shift,
            focusing_factor,
            eps,
        )
    return q.new_empty(q.shape)


def _fake_linear_attention(
    q, k, v, num_heads, dwc_weight=None, dwc_bias=None, size=None, window=None, shift=None, eps=1e-6
):
    return _fake_attention(
        q, k, v, num_heads, None, None, dwc_weight, dwc_bias, size, window, shift, None, eps
    )


def _fake_conv(x, weight, bias, size, window=None, shift=None):
    if not _is_traced(x):
        _ops.check_depthwise_conv.default(x, weight, bias, size, window, shift)
    return x.new_empty(x.shape)


def _fake_forward(
    q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift,
    focusing_factor, eps, saved_windows,
):  # fmt: skip
    out = _fake_attention(
        q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift, focusing_factor, eps
    )
    return out, q.new_empty(_state_shape(q, num_heads, saved_windows), dtype=_accumulate_dtype(q.dtype))


def _fake_gradients(tensors, mask) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, wanted in zip(tensors, mask, strict=True) if wanted]


def _fake_attention_backward(
    grad_out, q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift,
    focusing_factor, eps, state, output_mask,
):  # fmt: skip
    tensors = (q, k, v, scale, key_bias, dwc_weight, dwc_bias)
    if not _is_traced(q):
        options = (num_heads, size, window, shift, focusing_factor, eps)
        _ops.check_attention.default(*attention_arguments(tensors, options), grad_out, state)
    return _fake_gradients(tensors, output_mask)


def _fake_conv_backward(grad_out, x, weight, bias, size, window, shift, output_mask):
    if not _is_traced(x):
        _ops.check_depthwise_conv.default(x, weight, bias, size, window, shift, grad_out)
    return _fake_gradients((x, weight, bias), output_mask)


def _register_fake(name: str, function: Callable) -> None:
    torch.library.register_fake(f"flatten::{name}", function, lib=_library)


_register_fake("attention", _fake_attention)
_register_fake("linear_attention", _fake_linear_attention)
_register_fake("depthwise_conv", _fake_conv)
_register_fake("attention_forward", _fake_forward)
_register_fake("attention_backward", _fake_attention_backward)
_register_fake("depthwise_conv_backward", _fake_conv_backward)


# --------------------------------------------------------------------------------------------------- fallback
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
    _ops.check_attention.default(*attention_arguments(tensors, options))
    return ATTENTION.reference(tensors, options)


def _fallback_conv(x, weight, bias, size, window=None, shift=None):
    _ops.check_depthwise_conv.default(x, weight, bias, size, window, shift)
    return reference.depthwise_conv(x, weight, bias, size, window, shift)


def _fallback_forward(
    q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift,
    focusing_factor, eps, saved_windows,
):  # fmt: skip
    options = (num_heads, size, window, shift, focusing_factor, eps)
    tensors = (q, k, v, scale, key_bias, dwc_weight, dwc_bias)
    _ops.check_attention.default(*attention_arguments(tensors, options))
    # The shape that the fake kernel promised; the fallback's backward does not read it.
    state = _state_shape(q, num_heads, saved_windows)
    return ATTENTION.reference(tensors, options), q.new_zeros(state, dtype=_accumulate_dtype(q.dtype))


def _fallback_attention_backward(
    grad_out, q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift,
    focusing_factor, eps, state, output_mask,
):  # fmt: skip
    options = (num_heads, size, window, shift, focusing_factor, eps)
    tensors = (q, k, v, scale, key_bias, dwc_weight, dwc_bias)
    _ops.check_attention.default(*attention_arguments(tensors, options), grad_out, state)
    return _detached(reference_gradients(ATTENTION, options, output_mask, grad_out, tensors))


def _fallback_conv_backward(grad_out, x, weight, bias, size, window, shift, output_mask):
    _ops.check_depthwise_conv.default(x, weight, bias, size, window, shift, grad_out)
    return _detached(
        reference_gradients(CONV, (size, window, shift), output_mask, grad_out, (x, weight, bias))
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


# ------------------------------------------------------------------------------------------------------ FLOPs
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
    # Two products for each of the forward's. Computing S again is the schedule's choice and not counted.
    return 2 * _attention_flops(q, k, num_heads, dwc_weight, size)


@register_flop_formula(_ops.depthwise_conv)
def _conv_flops(x, weight, bias, size, *_, **__) -> int:
    return _taps_flops(x, weight, size)


@register_flop_formula(_ops.depthwise_conv_backward)
def _conv_backward_flops(grad_out, x, weight, bias, size, *_, **__) -> int:
    return 2 * _taps_flops(x, weight, size)
