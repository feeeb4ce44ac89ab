"""The operators' arguments by the names of their schemas (csrc/schemas.cpp): nothing here counts positions,
so an argument that a schema gains is carried everywhere without a change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from . import private

# Tensors of (batch, tokens, channels).
TOKENS = ("grad_out", "q", "k", "v", "x", "gate", "normalizer_q", "normalizer_k")
# These and all others whose first dimension is the batch; what is left belongs to the whole batch.
BATCHED = (*TOKENS, "key_weight", "state", "out")


def _picker(indices: Sequence[int]) -> Callable[[tuple], tuple]:
    if len(indices) == 1:  # itemgetter of one index gives no tuple
        return lambda values: (values[indices[0]],)
    return itemgetter(*indices)


class Signature:
    """An operator's arguments."""

    def __init__(self, op: Any) -> None:
        arguments = private.schema(op).arguments
        self.op = op
        self.names = tuple(argument.name for argument in arguments)
        self.defaults = tuple(argument.default_value for argument in arguments)
        self.tensors = tuple(argument.name for argument in arguments if "Tensor" in str(argument.type))
        self.keywords = tuple(argument.name for argument in arguments if argument.kwarg_only)
        # What the dispatcher left out at the end of a call, and then None, which stands for every other name.
        self._rest = [(*self.defaults[count:], None) for count in range(len(arguments) + 1)]

    def complete(self, args: tuple, kwargs: dict[str, Any] | None = None) -> tuple:
        """Every argument in order, and None."""
        if not kwargs:
            return args + self._rest[len(args)]
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        return (*(given.get(n, d) for n, d in zip(self.names, self.defaults, strict=True)), None)

    def bind(self, args: tuple, kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
        """Every argument by name."""
        return dict(zip(self.names, self.complete(args, kwargs), strict=False))

    def take(self, names: Sequence[str]) -> Callable[[tuple], tuple]:
        """A function that takes `names` out of what `complete` gives; None for a name that is no argument."""
        return _picker([self.names.index(n) if n in self.names else len(self.names) for n in names])

    def ordered(self, names: Sequence[str]) -> Callable[[tuple], tuple]:
        """A function from values in the order of `names`, which are all arguments of the operator or all of
        the first ones, to these arguments."""
        own = self.names[: len(names)]
        if tuple(names) == own:
            return lambda values: values
        return _picker([names.index(name) for name in own])

    def by_keyword(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` of the operator, which takes some arguments by keyword only, with all of them in order."""
        if not self.keywords:
            return call
        count = len(self.names) - len(self.keywords)

        def in_order(*arguments):
            before = len(arguments) - len(self.names)  # a set of keys
            keywords = dict(zip(self.keywords, arguments[before + count :], strict=True))
            return call(*arguments[: before + count], **keywords)

        return in_order


class Arguments:
    """The arguments of a family of operators: those of one of them but for what is its own (`besides`). They
    split into `tensors`, which have gradients, and `options`, which have none."""

    def __init__(self, signature: Signature, besides: Sequence[str] = ()) -> None:
        self.names = tuple(name for name in signature.names if name not in besides)
        self.tensors = tuple(name for name in self.names if name in signature.tensors)
        self.options = tuple(name for name in self.names if name not in signature.tensors)
        order = (*self.tensors, *self.options)
        self._join = _picker([order.index(name) for name in self.names])

    def join(self, tensors: Sequence[Any], options: tuple) -> tuple:
        return self._join((*tensors, *options))

    def bind(self, tensors: Sequence[Any], options: tuple) -> dict[str, Any]:
        return {
            **dict(zip(self.tensors, tensors, strict=True)),
            **dict(zip(self.options, options, strict=True)),
        }
