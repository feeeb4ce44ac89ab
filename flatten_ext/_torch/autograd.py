"""Autograd of torch.ops.flatten: first derivatives by the kernels, further ones through the reference.

The stable ABI has no C++ autograd, so these kernels are Python. They are registered directly and not through
torch.library.register_autograd, whose generic wrapper triples what a call costs and which raises under
torch.func. Inside a forward-mode level the reference runs: its operations carry tangents, a kernel would drop
them silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import private
from .families import (
    ATTENTION,
    BACKWARD,
    FORWARD,
    PLAIN_ATTENTION,
    Family,
    count_saved_windows,
    count_saved_windows_in_general,
    mask_of,
    replace,
    select,
    signature,
    vjp,
)

_library = torch.library.Library("flatten", "IMPL")


class Flatten:
    """First derivatives, by the kernels. Returns what family.forward returns. `keyset` is the caller's."""

    @staticmethod
    def forward(ctx, keyset, family, options, saved_windows, *tensors):
        if private.transforms_active():
            with _this_level_off():
                out, state = family.forward(None, tensors, options, saved_windows)
        else:
            out, state = family.forward(keyset, tensors, options, saved_windows)
        ctx.family, ctx.options = family, options
        ctx.save_for_backward(state, out if _needs_out(family, out, tensors) else None, *tensors)
        ctx.set_materialize_grads(False)  # the state has none: no zeros of its size
        if state is not None:
            ctx.mark_non_differentiable(state)
        return out, state

    @staticmethod
    def backward(ctx, grad_out, grad_state):
        mask = ctx.needs_input_grad[4:]
        if grad_out is None:
            return None, None, None, None, *(None for _ in mask)
        state, out, *tensors = ctx.saved_tensors
        if out is not None:
            out = out.detach()  # a derivative by it is one by the tensors, which are given
        with nullcontext() if _may_record(grad_out) else private.below_autograd():
            gradients = iter(ctx.family.backward(grad_out, tensors, ctx.options, state, out, list(mask)))
        return None, None, None, None, *(next(gradients) if wanted else None for wanted in mask)


class FlattenGradient:
    """First derivatives by the kernels, their derivatives by the reference."""

    @staticmethod
    def forward(ctx, family, options, mask, state, out, grad_out, *tensors):
        with _this_level_off():
            gradients = family.backward(grad_out, tensors, options, state, out, mask)
        ctx.family, ctx.options, ctx.mask = family, options, mask
        ctx.save_for_backward(grad_out, *tensors)
        return tuple(gradients)

    @staticmethod
    def backward(ctx, *grad_gradients):
        needed = ctx.needs_input_grad[5:]
        saved = ctx.saved_tensors

        def first(*wanted):
            grad_out, *tensors = replace(saved, needed, wanted)
            return ctx.family.gradients(ctx.options, ctx.mask, grad_out, tensors)

        second = iter(vjp(first, select(saved, needed), grad_gradients))
        return *(None,) * 5, *(next(second) if need else None for need in needed)


# The gate's gradient needs the output before the gate, which the kernels of the CPU take from the output
# itself where its dtype leaves it exact enough; others compute it again.
_GATE = ATTENTION.arguments.tensors.index("gate")


def _needs_out(family: Family, out: Tensor, tensors: Sequence[Any]) -> bool:
    if not family.takes_out or (gate := tensors[_GATE]) is None or not gate.requires_grad:
        return False
    return out.device.type == "cpu" and out.dtype in (torch.float32, torch.float64)


_flatten = private.autograd_function(Flatten)
_flatten_gradient = private.autograd_function(FlattenGradient)


def _this_level_off() -> AbstractContextManager:
    """Switches autograd off for the level whose forward runs, by its dispatch keys. Grad mode, off in a
    forward, comes on for torch.func's levels below."""
    if not private.transforms_active():
        return private.below_autograd()
    levels_below = ExitStack()
    levels_below.enter_context(private.below_autograd())
    levels_below.enter_context(torch.enable_grad())
    return levels_below


def _may_record(grad_out: Tensor) -> bool:
    """Whether a derivative of what runs now may be asked for, in any mode."""
    return torch.is_grad_enabled() or private.in_forward_mode((grad_out,)) or private.transforms_active()


def _refuse_gradient(name: str, rotary: Tensor | None) -> None:
    if rotary is not None and rotary.requires_grad:
        raise RuntimeError(
            f"flatten.{name}: rotary requires a gradient, but it is a table and has no gradient: pass "
            "rotary.detach()"
        )


def _register_forward(name: str, family: Family) -> None:
    """A call of `name` that records goes to the family's forward operator, another to the kernel below. The
    arguments by keyword are those of the general form; without one, fewer tensors are carried."""
    own = signature(name)
    below, after = private.goes_on_below(own.op)

    def ways(family: Family, count, counted: tuple[str, ...]) -> tuple:
        arguments = family.arguments
        return (
            family, own.take(arguments.tensors), own.take(arguments.options), own.take(counted), count,
        )  # fmt: skip

    if family is ATTENTION:
        general = ways(family, count_saved_windows_in_general, ("q", "k", "v", "num_heads", "window"))
        plain = ways(PLAIN_ATTENTION, count_saved_windows, ("q", "k", "num_heads", "window"))
    else:
        general = plain = ways(family, lambda _: None, ("q",))
    in_forward_mode, any_requires_grad = private.in_forward_mode, private.any_requires_grad
    is_grad_enabled = torch.is_grad_enabled

    def kernel(keyset, *args, **kwargs):
        arguments = args
        if kwargs:
            arguments = (*args, *kwargs.values())
            _refuse_gradient(name, kwargs.get("rotary"))
        if in_forward_mode(arguments):
            given = own.complete(args, kwargs)
            family, tensors_of, options_of, _, _ = general
            return family.checked_reference(tensors_of(given), options_of(given))
        if is_grad_enabled() and any_requires_grad(*arguments):
            given = own.complete(args, kwargs)
            family, tensors_of, options_of, counted_of, count = general if kwargs else plain
            saved = count(*counted_of(given))
            return _flatten(keyset, family, options_of(given), saved, *tensors_of(given))[0]
        return below(keyset & after, *args, **kwargs)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def _register_attention_forward() -> None:
    # Reached from Flatten, one torch.func level further down, or by a direct call.
    own = ATTENTION.signature
    below, after = private.goes_on_below(own.op)
    saved_of = own.take(("saved_windows",))
    of_plain = own.names.index("saved_windows") + 1
    ways = [
        (family, own.take(family.arguments.tensors), own.take(family.arguments.options))
        for family in (PLAIN_ATTENTION, ATTENTION)
    ]

    def kernel(keyset, *args):
        given = own.complete(args)
        family, tensors_of, options_of = ways[len(args) > of_plain]
        tensors = tensors_of(given)
        if torch.is_grad_enabled() and private.any_requires_grad(*tensors):
            return _flatten(keyset, family, options_of(given), *saved_of(given), *tensors)
        return below(keyset & after, *args)

    _library.impl("attention_forward", kernel, "Autograd", with_keyset=True)


def _register_backward(name: str, family: Family) -> None:
    own = signature(name)
    below, after = private.goes_on_below(own.op)
    tensors_of, options_of, besides_of = family.pickers(own)

    def kernel(keyset, *args):
        given = own.complete(args)
        tensors, (grad_out, state, mask, out) = tensors_of(given), besides_of(given)
        if private.in_forward_mode((grad_out, *tensors)):
            return list(family.gradients(options_of(given), mask_of(mask, tensors), grad_out, tensors))
        if torch.is_grad_enabled() and private.any_requires_grad(grad_out, *tensors):
            mask = mask_of(mask, tensors)
            out = None if out is None else out.detach()
            return list(_flatten_gradient(family, options_of(given), mask, state, out, grad_out, *tensors))
        return below(keyset & after, *args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


for _name, _family in FORWARD.items():
    _register_forward(_name, _family)
_register_attention_forward()
for _name, _family in BACKWARD.items():
    _register_backward(_name, _family)
