"""torch's other hooks for torch.ops.flatten, in the order a call meets them; autograd is in autograd.py.

autocast      casts the tokens to the active autocast dtype and leaves the parameters alone
vmap          folds the mapped dimension into the batch, or maps sample by sample
fake tensors  shapes and dtypes for torch.compile and torch.export
fallback      the reference, on devices without kernels
FLOPs         formulas for torch.utils.flop_counter
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import private
from .arguments import BATCHED, TOKENS
from .families import (
    ATTENTION,
    BACKWARD,
    FORWARD,
    OPERATORS,
    Family,
    mask_of,
    out_like,
    select,
    signature,
    state_like,
)

_ops = torch.ops.flatten
_library = torch.library.Library("flatten", "IMPL")


# --------------------------------------------------------------------------------------------------- autocast
def _register_autocast(name: str, device: str, key: str) -> None:
    """Casts the tokens to the dtype that is active when the call is made."""
    own = signature(name)
    casts = [own_name in TOKENS for own_name in own.names]
    off = private.autocast_off(device, key)

    def kernel(*args, **kwargs):
        dtype = torch.get_autocast_dtype(device)
        cast = [_autocast_to(a, dtype) if is_token else a for a, is_token in zip(args, casts, strict=False)]
        if kwargs:
            kwargs = {n: _autocast_to(a, dtype) if n in TOKENS else a for n, a in kwargs.items()}
        with off():
            return own.op(*cast, **kwargs)

    _library.impl(name, kernel, key)


def _autocast_to(t: Tensor, dtype: torch.dtype) -> Tensor:
    # As torch's own rules: float64 and what is no floating-point number stay. What is no dense tensor stays
    # too: the operator says so.
    if t is None or t.layout != torch.strided or t.dtype == torch.float64 or not t.is_floating_point():
        return t
    return t.to(dtype)


for _device in ("cpu", "cuda", "xpu", "mps"):
    for _name in FORWARD:
        _register_autocast(_name, _device, f"Autocast{_device.upper()}")


# ------------------------------------------------------------------------------------------------------- vmap
def _register_vmap(name: str) -> None:
    """Folds the mapped dimension into the batch where only tensors of images are mapped (and a saved state)
    and no parameter's gradient is asked for; else runs sample by sample. A folded call neither leaves a saved
    state (saved_windows is its number of windows) nor takes one: which windows that holds depends on the
    batch.
    """
    own = signature(name)
    op, names = own.by_keyword(own.op), own.names
    several = len(private.schema(own.op).returns) > 1
    saved = ("state", "out") if name == "attention_backward" else ()
    asked_for = [n for n in own.tensors if n not in ("grad_out", *saved)]

    def mapped(outputs):
        """Tensors whose mapped dimension is the first, in the operator's container, and their dims."""
        if several:
            return tuple(outputs), (0,) * len(outputs)
        return list(outputs), [0] * len(outputs)

    def rule(info, in_dims, *args):
        dims = [d if isinstance(d, int) else None for d in in_dims]  # lists of numbers have lists of None
        dims += [None] * (len(names) - len(args))
        args = own.complete(args)[:-1]
        given = dict(zip(names, args, strict=True))

        def of_images(argument: str) -> bool:
            d = dims[names.index(argument)]
            is_taps = argument in ("weight", "dwc_weight") and given[argument] is not None
            return argument in BATCHED or (is_taps and given[argument].dim() - (d is not None) == 5)

        asked = [n for n, wanted in zip(asked_for, given.get("output_mask", ()), strict=False) if wanted]
        together = [n for n, d in zip(names, dims, strict=True) if d is not None] + asked
        if not all(map(of_images, together)):
            samples = [
                op(*(a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)))
                for i in range(info.batch_size)
            ]
            if isinstance(samples[0], Tensor):
                return torch.stack(samples), 0
            return mapped([torch.stack(outputs) for outputs in zip(*samples, strict=True)])

        def fold(argument: str, value: Any, d: int | None) -> Any:
            if argument == "saved_windows":
                return 0
            if argument == "out":
                return None
            if argument in saved:
                return value.new_empty(0)
            if value is None or not of_images(argument):
                return value
            value = value.expand(info.batch_size, *value.shape) if d is None else value.movedim(d, 0)
            return value.flatten(0, 1)

        result = op(*map(fold, names, args, dims))
        if isinstance(result, Tensor):
            return result.unflatten(0, (info.batch_size, -1)), 0
        return mapped([t.unflatten(0, (info.batch_size, t.shape[0] // info.batch_size)) for t in result])

    private.register_batching_rule(_library, own, name, rule)
    private.register_older_batching_rule(_library, own, name)


for _name in OPERATORS:
    _register_vmap(_name)


# ------------------------------------------------------------------------------------ fake tensors, fallback
FALLBACK: dict[str, Callable[..., Any]] = {}


def _register_forward(name: str, family: Family) -> None:
    own = signature(name)
    tensors_of, options_of = own.take(family.arguments.tensors), own.take(family.arguments.options)
    saved_by = own.take(("q", "v", "num_heads", "saved_windows", "key_weight", "normalizer"))
    with_state = "saved_windows" in own.names

    def fake(*args, **kwargs):
        given = own.complete(args, kwargs)
        tensors = tensors_of(given)
        if not private.is_fake(tensors[0]):
            family.check(tensors, options_of(given))
        try:
            out = out_like(own.bind(args, kwargs))
            shape, dtype = state_like(*saved_by(given)) if with_state else ([0], None)
        except (
            AttributeError,
            IndexError,
            ZeroDivisionError,
        ):  # the call says what is wrong when it runs
            out, shape, dtype = tensors[0].new_empty(tensors[0].shape), [0], None
        return (out, tensors[0].new_empty(shape, dtype=dtype)) if with_state else out

    def fallback(*args, **kwargs):
        given = own.complete(args, kwargs)
        tensors, options = tensors_of(given), options_of(given)
        family.check(tensors, options)
        with _autocast_off(tensors[0]):
            out = family.reference(tensors, options)
        if not with_state:
            return out
        # The shape that the fake kernel promised; the fallback's backward does not read it.
        shape, dtype = state_like(*saved_by(given))
        return out, tensors[0].new_zeros(shape, dtype=dtype)

    torch.library.register_fake(f"flatten::{name}", fake, lib=_library)
    _library.impl(name, fallback, "CompositeExplicitAutograd")
    FALLBACK[name] = fallback


def _register_backward(name: str, family: Family) -> None:
    own = signature(name)
    tensors_of, options_of, besides_of = family.pickers(own)

    def fake(*args):
        given = own.complete(args)
        tensors, (grad_out, state, mask, _) = tensors_of(given), besides_of(given)
        if not private.is_fake(tensors[0]):
            family.check(tensors, options_of(given), grad_out, state)
        return [t.new_empty(t.shape) for t in select(tensors, mask_of(mask, tensors))]

    def fallback(*args):
        given = own.complete(args)
        tensors, options = tensors_of(given), options_of(given)
        grad_out, state, mask, _ = besides_of(given)
        family.check(tensors, options, grad_out, state)
        return _gradients(family, options, mask, grad_out, tensors)

    torch.library.register_fake(f"flatten::{name}", fake, lib=_library)
    _library.impl(name, fallback, "CompositeExplicitAutograd")
    FALLBACK[name] = fallback


def _autocast_off(t: Tensor) -> AbstractContextManager:
    """The kernels' precision does not depend on where they are called; a backward may run under autocast."""
    device = t.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _gradients(family: Family, options: tuple, mask, grad_out: Tensor, tensors) -> list[Tensor]:
    with _autocast_off(grad_out):
        gradients = family.first_gradients(options, mask_of(mask, tensors), grad_out, tensors)
    return [t.detach().contiguous() for t in gradients]


def _register_reference(name: str, family: Family) -> None:
    """What the kernels' host calls where the device has none for a call (csrc/plain_torch.h). It has checked
    the arguments."""
    forward, backward = signature(f"reference_{name}"), signature(f"reference_{name}_backward")
    tensors_of, options_of = forward.take(family.arguments.tensors), forward.take(family.arguments.options)
    tensors_of_backward, options_of_backward, besides_of = family.pickers(backward)

    def run(*args):
        given = forward.complete(args)
        with _autocast_off(args[0]):
            return family.reference(tensors_of(given), options_of(given)).contiguous()

    def run_backward(*args):
        given = backward.complete(args)
        grad_out, _, mask, _ = besides_of(given)
        return _gradients(family, options_of_backward(given), mask, grad_out, tensors_of_backward(given))

    _library.impl(forward.op.name(), run, "CompositeExplicitAutograd")
    _library.impl(backward.op.name(), run_backward, "CompositeExplicitAutograd")


for _name, _family in (*FORWARD.items(), ("attention_forward", ATTENTION)):
    _register_forward(_name, _family)
for _name, _family in BACKWARD.items():
    _register_backward(_name, _family)
    _register_reference(_name.removesuffix("_backward"), _family)


# ------------------------------------------------------------------------------------------------------ FLOPs
def _flops(given: dict[str, Any]) -> int:
    """Multiply-adds counted twice, per image: of S, 2 M C_k D_v, of Q S, 2 N C_k D_v, of Q m, 2 N C_k, and of
    the taps, 2 kh kw H W C_v. Shapes are given in place of tensors. Rotations, weights, normalizers and gates
    are a few operations a number and not counted."""
    if "x" in given:
        return _taps_flops(given["x"], given["weight"], given["size"])
    heads, flops = given["num_heads"], 0
    if "k" in given:
        (batch, keys, channels), value_dim = given["k"], given["v"][2] // heads
        flops += 2 * batch * keys * channels * value_dim
    if "q" in given:
        batch, queries, channels = given["q"]
        value_dim = given["v"][2] // heads if "v" in given else given["state"][3] - 1
        flops += 2 * batch * queries * channels * (value_dim + 1)
    taps = given.get("dwc_weight")
    return flops + (_taps_flops(given["v"], taps, given["size"]) if taps else 0)


def _taps_flops(x_shape: Sequence[int], weight_shape: Sequence[int], size: Sequence[int]) -> int:
    return 2 * x_shape[0] * size[0] * size[1] * x_shape[2] * weight_shape[-2] * weight_shape[-1]


def _register_flops(name: str) -> None:
    own = signature(name)
    # A backward has two products for each of the forward's. Computing S again is the schedule's choice and
    # not counted.
    factor = 2 if name in BACKWARD else 1

    def formula(*args, out_shape=None, **kwargs) -> int:
        return factor * _flops(own.bind(args, kwargs))

    register_flop_formula(getattr(_ops, name))(formula)


for _name in OPERATORS:
    _register_flops(_name)
