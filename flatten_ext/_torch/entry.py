"""What happens to a call before torch's other hooks see it: nested tensors are refused, and torch.jit.trace
records an operator of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import private
from .families import OPERATORS, TRACED, signature

_library = torch.library.Library("flatten", "IMPL")


def _register_nested(name: str) -> None:
    """Nested tensors come by keys of their own, or as a subclass: calls without one never ask."""
    own = signature(name)

    def refuse(*args, **kwargs):
        nested = next(n for n, t in own.bind(args, kwargs).items() if isinstance(t, Tensor) and t.is_nested)
        raise RuntimeError(
            f"flatten.{name}: {nested} is a nested tensor, expected a dense strided tensor; "
            "call the operator for each of its tensors (unbind())"
        )

    for key in ("AutogradNestedTensor", "NestedTensorCPU", "NestedTensorCUDA"):
        _library.impl(name, refuse, key)
    if private.JaggedTensor is not None:
        torch.library.register_torch_dispatch(
            f"flatten::{name}",
            private.JaggedTensor,
            lambda _, func, types, args=(), kwargs=None: refuse(*args, **(kwargs or {})),
            lib=_library,
        )


def _register_tracing(name: str) -> None:
    """Records the twin `name`_traced (csrc/traced.cpp): torch.jit.trace has no way to record a SymInt that a
    shape gave. A recorded call has the numbers of its trace for good, so it also gets what shows in a later
    run that another size has come: the number of tokens where there is a size, and every number from a shape.
    """
    own, twin = signature(name), signature(f"{name}_traced").op
    tokens = "x" if "x" in own.names else "k"

    def kernel(*args, **kwargs):
        given = own.bind(args, kwargs)
        measured = []
        if given["size"] is not None and given[tokens] is not None and given[tokens].dim() > 1:
            measured.append(given[tokens].shape[1])
        measured += [n for n in _numbers_as_typed(own) if isinstance(n, Tensor)]
        values = torch.empty(0, dtype=torch.int64)
        if measured:
            values = torch.stack([torch.as_tensor(n) for n in measured])
        return twin(values, [int(n) for n in measured], *args, **kwargs)

    _library.impl(name, kernel, "Tracer")


def _numbers_as_typed(own: Any) -> list:
    """The integers of the call under way as its caller typed them, lists opened out. The dispatcher made them
    ints; the frame of the call still has the tensors by which a trace follows a shape."""
    numbers = [name for name in own.names if name in ("num_heads", "size", "window", "shift")]
    for args, kwargs in private.typed_arguments(own.op):
        given = {**dict(zip(own.names, args, strict=False)), **kwargs}
        lists = [given.get(name) for name in numbers]
        found = [n for value in lists for n in (value if isinstance(value, (list, tuple)) else [value])]
        if any(isinstance(n, Tensor) for n in found):
            return found
    return []


for _name in OPERATORS:
    _register_nested(_name)
for _name in TRACED:
    _register_tracing(_name)
