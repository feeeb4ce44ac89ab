"""The private names of torch that this package uses, why, and what it does in a torch that has one no longer.

OpOverload._schema
    Names and defaults of arguments. torch's documentation of custom operators reads it too.
_C._AutoDispatchBelowAutograd
    The kernel under an autograd kernel. torch's documentation uses it too.
OpOverload._handle.redispatch_boxed, _C._after_autograd_keyset
    The same for 1 us less. Without them: the guard above.
_C._any_requires_grad
    Without it: requires_grad of each tensor, one by one.
_C._are_functorch_transforms_active, autograd.function._SingleLevelFunction and
_functorch.utils.enable_single_level_autograd_function
    torch.func at any depth, and 1 us less. Without them: torch.autograd.Function, and torch.func raises.
_C._ForceDispatchKeyGuard, _C._dispatch_tls_local_include_set, _C._dispatch_tls_local_exclude_set
    Derivatives of the reference inside a kernel. Without them: a backward raises on devices without kernels.
autograd.forward_ad._current_level
    Without it: a look for a tangent at each tensor, and nested transforms of torch.func raise.
_C._ExcludeDispatchKeyGuard
    Autocast off below its own kernel. Without it: torch.autocast(enabled=False).
_functorch.autograd_function.custom_function_call_vmap_helper and
_functorch.pyfunctorch.retrieve_current_functorch_interpreter
    Batching rules of operators with tensors by keyword, which torch.library.register_vmap refuses. Without
    them: torch.vmap loops over the samples, and warns.
_C._functorch.is_legacy_batchedtensor, _C._vmapmode_increment_nesting, _vmapmode_decrement_nesting,
torch._add_batch_dim and _remove_batch_dim
    torch's older vmap, which torch.autograd.grad(is_grads_batched=True) and gradcheck still call. Without
    them: it raises where a backward has several gradients.
_subclasses.fake_tensor.FakeTensor
    Tells a traced call from one on meta tensors. Without it: the name of the class.
nested._internal.nested_tensor.NestedTensor
    Refuses jagged tensors in inference mode in our words. Without it: in torch's.
The frame of OpOverload.__call__
    Sizes that torch.jit.trace follows. Without it: a traced call does not see that a size differs.

FLATTEN_PUBLIC_AUTOGRAD=1 takes what is written as "without" wherever that loses nothing but time; the tests
of the hooks run both ways.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PUBLIC = os.environ.get("FLATTEN_PUBLIC_AUTOGRAD", "") not in ("", "0")


def _find(path: str, *, costs_only_time: bool = False) -> Any:
    """What torch has under `path`, or None."""
    if PUBLIC and costs_only_time:
        return None
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


# --------------------------------------------------------------------------------------------------- dispatch
below_autograd: Callable[[], AbstractContextManager] = torch._C._AutoDispatchBelowAutograd
_after_autograd = _find("_C._after_autograd_keyset", costs_only_time=True)


def schema(op: Any) -> Any:
    return op._schema


def goes_on_below(op: Any) -> tuple[Callable[..., Any], Any]:
    """(call, after): call(keyset & after, *arguments) goes on by the keys of the set that come after
    autograd's: as torch's own autograd fallback, without the Python that OpOverload puts before a call."""
    redispatch = getattr(getattr(op, "_handle", None), "redispatch_boxed", None)
    if redispatch is not None and _after_autograd is not None:
        return redispatch, _after_autograd

    def guarded(keyset, *args, **kwargs):
        with below_autograd():
            return op(*args, **kwargs)

    return guarded, torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # the dispatcher finds its own


@contextmanager
def _autograd_keys_on() -> Iterator[None]:
    keys = torch._C.DispatchKey
    autograd = torch._C.DispatchKeySet(keys.AutogradFunctionality) | torch._C.DispatchKeySet(
        keys.ADInplaceOrView
    )
    excluded = torch._C._dispatch_tls_local_exclude_set()
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - autograd):
        yield


# Autograd's keys may be switched off, as inside every kernel; for what is differentiated there they come on.
autograd_keys_on: Callable[[], AbstractContextManager] = (
    _autograd_keys_on
    if _find("_C._ForceDispatchKeyGuard") and _find("_C._dispatch_tls_local_exclude_set")
    else nullcontext
)


def autocast_off(device: str, key: str) -> Callable[[], AbstractContextManager]:
    guard = _find("_C._ExcludeDispatchKeyGuard", costs_only_time=True)
    if guard is None:
        return lambda: torch.autocast(device, enabled=False)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return lambda: guard(keys)


# --------------------------------------------------------------------------------------------------- autograd
any_requires_grad: Callable[..., bool] = _find("_C._any_requires_grad", costs_only_time=True) or (
    lambda *arguments: any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
)
transforms_active: Callable[[], bool] = _find("_C._are_functorch_transforms_active") or (lambda: False)

try:
    from torch._functorch.utils import enable_single_level_autograd_function as _single_level
    from torch.autograd.function import _SingleLevelFunction as _Nesting
except ImportError:  # then torch says that torch.func needs setup_context
    _single_level, _Nesting = nullcontext, torch.autograd.Function  # type: ignore[assignment, misc]


def autograd_function(rules: type) -> Callable[..., Any]:
    """`apply` of the autograd function with the static methods forward(ctx, ...) and backward(ctx, ...) of
    `rules`. Inside torch.func's transforms it runs with their leave: they dispatch to it level by level."""
    nesting: Any = type(rules.__name__, (rules, _Nesting), {})
    plain: Any = type(rules.__name__, (rules, torch.autograd.Function), {}) if PUBLIC else nesting
    apply = plain.apply

    def function(*args):
        if not transforms_active():
            return apply(*args)
        with _single_level():
            return nesting.apply(*args)

    return function


def _has_tangent(arguments: Iterable[Any]) -> bool:
    return any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in arguments)


def _has_forward_level(_: Iterable[Any]) -> bool:
    return forward_ad._current_level >= 0


# Whether tangents may ride on tensors among the arguments.
in_forward_mode: Callable[[Iterable[Any]], bool] = (
    _has_forward_level if hasattr(forward_ad, "_current_level") else _has_tangent
)


# ------------------------------------------------------------------------------------------------------- vmap
_batch: Any
_interpreter: Any
try:
    from torch._functorch.autograd_function import custom_function_call_vmap_helper as _batch
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter as _interpreter
except ImportError:
    _batch = _interpreter = None


def register_batching_rule(library: Any, own: Any, name: str, rule: Callable[..., Any]) -> None:
    """torch.library.register_vmap with a rule that takes all arguments in order, also those that the operator
    takes by keyword only. `own` is the operator's Signature."""
    if not own.keywords:
        torch.library.register_vmap(f"flatten::{name}", rule, lib=library)
    elif _batch is not None:
        op = own.by_keyword(own.op)

        def kernel(*args, **kwargs):
            return _batch(_interpreter(), rule, op, *own.complete(args, kwargs)[:-1])

        library.impl(name, kernel, "FuncTorchBatched")


_is_batched = _find("_C._functorch.is_legacy_batchedtensor")
_nest, _unnest = _find("_C._vmapmode_increment_nesting"), _find("_C._vmapmode_decrement_nesting")


def register_older_batching_rule(library: Any, own: Any, name: str) -> None:
    """Sample by sample, in torch's older vmap, which keeps the mapped dimension in tensors of its own."""
    if None in (_is_batched, _nest, _unnest):
        return
    op = own.by_keyword(own.op)

    def kernel(*args, **kwargs):
        level = _nest() - 1
        _unnest()
        arguments = own.complete(args, kwargs)[:-1]
        mapped = [isinstance(a, Tensor) and _is_batched(a) for a in arguments]
        opened = [
            torch._remove_batch_dim(a, level, 0, 0) if m else a  # type: ignore[attr-defined]
            for a, m in zip(arguments, mapped, strict=True)
        ]
        count = next(a.shape[0] for a, m in zip(opened, mapped, strict=True) if m)
        samples = [op(*(a[i] if m else a for a, m in zip(opened, mapped, strict=True))) for i in range(count)]

        def closed(outputs: Iterable[Tensor]) -> Tensor:
            return torch._add_batch_dim(torch.stack(tuple(outputs)), 0, level)  # type: ignore[attr-defined]

        if isinstance(samples[0], Tensor):
            return closed(samples)
        return type(samples[0])(map(closed, zip(*samples, strict=True)))

    library.impl(name, kernel, "Batched")


# ----------------------------------------------------------------------------------------- tensors and traces
try:
    from torch.nested._internal.nested_tensor import NestedTensor as JaggedTensor
except ImportError:
    JaggedTensor = None  # type: ignore[assignment, misc]

_FakeTensor = _find("_subclasses.fake_tensor.FakeTensor", costs_only_time=True)


def is_fake(t: Any) -> bool:
    """A tensor of a traced call, which is checked when it runs, with its true sizes."""
    if _FakeTensor is not None:
        return isinstance(t, _FakeTensor)
    return any(base.__name__ == "FakeTensor" for base in type(t).__mro__)


def typed_arguments(op: Any) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """(args, kwargs) of the calls of `op` under way, innermost first, as their callers typed them."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        callee = frame.f_locals.get("self") if frame.f_code.co_name == "__call__" else None
        if callee is not None and (callee is op or callee is getattr(op, "overloadpacket", None)):
            yield frame.f_locals.get("args", ()), frame.f_locals.get("kwargs", {})
        frame = frame.f_back
