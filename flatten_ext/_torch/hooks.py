"""torch's other hooks for torch.ops.flatten, in the order a call meets them; autograd is in autograd.py.

autocast      casts the tokens to the active autocast dtype and leaves the parameters alone
vmap          folds the mapped dimension into the batch, or maps sample by sample
fake tensors  shapes and dtypes for torch.compile and torch.export
fallback      the reference, on devices without kernels
FLOPs         formulas for torch.utils.flop_counter
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import private
from .arguments import TOKENS
from .families import ATTENTION, BACKWARD, FORWARD, OPERATORS, Family, signature, state_like

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
    """Folds the mapped dimension into the batch where only tokens and the state are mapped and no parameter's
    gradient is asked for; else runs sample by sample. A folded call neither leaves a state (saved_windows is
    its number of windows) nor takes one: which windows that holds depends on the batch.
    """
    own = signature(name)
    op, names = own.op, own.names
    several = len(private.schema(op).returns) > 1
    parameters = [t not in TOKENS for t in own.tensors if t not in ("grad_out", "state")]

    def mapped(outputs):
        """Tensors whose mapped dimension is the first, in the operator's container, and their dims."""
        if several:
            return tuple(outputs), (0,) * len(outputs)
        return list(outputs), [0] * len(outputs)

    def rule(info, in_dims, *args):
        dims = [d if isinstance(d, int) else None for d in in_dims]  # lists of numbers have lists of None
        given = dict(zip(names, args, strict=False))
        mapped_names = {n for n, d in zip(names, dims, strict=False) if d is not None}
        asked = given.get("output_mask", [False] * len(parameters))
        any_parameter = any(wanted and p for wanted, p in zip(asked, parameters, strict=True))
        if not mapped_names <= {*TOKENS, "state"} or any_parameter:
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
            if argument == "state":
                return value.new_empty(0)
            if argument not in TOKENS or value is None:
                return value
            value = value.expand(info.batch_size, *value.shape) if d is None else value.movedim(d, 0)
            return value.flatten(0, 1)

        result = op(*map(fold, names, args, dims))
        if isinstance(result, Tensor):
            return result.unflatten(0, (info.batch_size, -1)), 0
        return mapped([t.unflatten(0, (info.batch_size, t.shape[0] // info.batch_size)) for t in result])

    torch.library.register_vmap(f"flatten::{name}", rule, lib=_library)


for _name in OPERATORS:
    _register_vmap(_name)


# ------------------------------------------------------------------------------------ fake tensors, fallback
FALLBACK: dict[str, Callable[..., Any]] = {}


def _register_forward(name: str, family: Family) -> None:
    own = signature(name)
    tensors_of, options_of = own.take(family.arguments.tensors), own.take(family.arguments.options)
    state_by = own.take(("q", "num_heads", "saved_windows"))
    with_state = "saved_windows" in own.names

    def fake(*args, **kwargs):
        given = own.complete(args, kwargs)
        tensors = tensors_of(given)
        if not private.is_fake(tensors[0]):
            family.check(tensors, options_of(given))
        out = tensors[0].new_empty(tensors[0].shape)
        if not with_state:
            return out
        shape, dtype = state_like(*state_by(given))
        return out, tensors[0].new_empty(shape, dtype=dtype)

    def fallback(*args, **kwargs):
        given = own.complete(args, kwargs)
        tensors, options = tensors_of(given), options_of(given)
        family.check(tensors, options)
        out = family.reference(tensors, options)
        if not with_state:
            return out
        # The shape that the fake kernel promised; the fallback's backward does not read it.
        shape, dtype = state_like(*state_by(given))
        return out, tensors[0].new_zeros(shape, dtype=dtype)

    torch.library.register_fake(f"flatten::{name}", fake, lib=_library)
    _library.impl(name, fallback, "CompositeExplicitAutograd")
    FALLBACK[name] = fallback


def _register_backward(name: str, family: Family) -> None:
    own = signature(name)
    tensors_of, options_of = own.take(family.arguments.tensors), own.take(family.arguments.options)
    besides_of = own.take(("grad_out", "state", "output_mask"))

    def fake(*args):
        given = own.complete(args)
        tensors, (grad_out, state, mask) = tensors_of(given), besides_of(given)
        if not private.is_fake(tensors[0]):
            family.check(tensors, options_of(given), grad_out, state)
        return [t.new_empty(t.shape) for t, wanted in zip(tensors, mask, strict=True) if wanted]

    def fallback(*args):
        given = own.complete(args)
        tensors, options, (grad_out, state, mask) = tensors_of(given), options_of(given), besides_of(given)
        family.check(tensors, options, grad_out, state)
        return [t.detach().contiguous() for t in family.gradients(options, mask, grad_out, tensors)]

    torch.library.register_fake(f"flatten::{name}", fake, lib=_library)
    _library.impl(name, fallback, "CompositeExplicitAutograd")
    FALLBACK[name] = fallback


for _name, _family in (*FORWARD.items(), ("attention_forward", ATTENTION)):
    _register_forward(_name, _family)
for _name, _family in BACKWARD.items():
    _register_backward(_name, _family)


# ------------------------------------------------------------------------------------------------------ FLOPs
def _flops(given: dict[str, Any]) -> int:
    """Multiply-adds counted twice, per image: of S and Q S, 2 (N + M) C D, of Q m, 2 N C, and of the taps,
    2 kh kw H W C. Shapes are given in place of tensors."""
    if "x" in given:
        return _taps_flops(given["x"], given["weight"], given["size"])
    (batch, queries, channels), keys = given["q"], given["k"][1]
    products = 2 * (queries + keys) * channels * (channels // given["num_heads"]) + 2 * queries * channels
    taps = given["dwc_weight"]
    return batch * products + (_taps_flops(given["q"], taps, given["size"]) if taps else 0)


def _taps_flops(x_shape: Sequence[int], weight_shape: Sequence[int], size: Sequence[int]) -> int:
    return 2 * x_shape[0] * size[0] * size[1] * x_shape[2] * weight_shape[2] * weight_shape[3]


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
