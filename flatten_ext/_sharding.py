"""The operators on DTensors (torch.distributed.tensor): what each process computes, and what is exchanged.

Decided for each dimension of the device mesh, by how q, k and v lie on it:

batch     one of them is sharded by image: all are, and nothing is exchanged. Parameters are whole; their
          gradients are each process's part of a sum (Partial).
heads     one of them is sharded by channel, num_heads is a multiple of the processes, and heads or channels
          are independent, as all are but those of the feature map "focused", which norms a token over all of
          its channels: nothing is exchanged.
whole     else, tokens sharded included: tensors are gathered, and every process computes the same.

These are rules for tensor subclasses (torch.library.register_torch_dispatch) and not sharding strategies
(register_sharding), since a process must be told of its own heads and of its own saved states: strategies
change tensors only. Imported when torch.distributed.tensor is: see `register_on_import`.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["register_on_import"]

_TENSORS = "torch.distributed.tensor"
_ops = torch.ops.flatten
_library = torch.library.Library("flatten", "IMPL")

# How a tensor lies on one dimension of the mesh, in each plan: sharded by its dimension, whole, or a summand.
_WHOLE, _SUMMAND = "whole", "summand"
_Lie = int | str


def register_on_import() -> None:
    """Registers the rules now if torch.distributed.tensor is imported, else when it will be."""
    if _TENSORS in sys.modules:
        _register(sys.modules[_TENSORS])
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for torch.distributed.tensor, and calls `_register` after it."""

    def find_spec(self, name, path=None, target=None):
        if name != _TENSORS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


@dataclass(frozen=True)
class _Rule:
    """How one operator is sharded; its arguments are named as in its schema."""

    tokens: tuple[str, ...]  # (B, N, C): the plan is made for these
    others: tuple[str, ...] = ()  # further tensors, in the order of the schema


_QKV = ("q", "k", "v")
_TAPS = ("dwc_weight", "dwc_bias")
_GENERAL = ("rotary", "key_weight", "gate", "normalizer_q", "normalizer_k")
_OF_IMAGES = ("state", "key_weight", "gate", "normalizer_q", "normalizer_k")
_ATTENTION = _Rule(_QKV, ("scale", "key_bias", *_TAPS, *_GENERAL))
_CONV = _Rule(("x",), ("weight", "bias"))
_STATE = _Rule(("k", "v"), ("scale", "key_bias", "rotary", "key_weight", "normalizer_k"))
_FROM_STATE = _Rule(("q",), ("state", "scale", "rotary", "normalizer_q", "gate"))
_RULES = {
    "attention": _ATTENTION,
    "linear_attention": _Rule(_QKV, (*_TAPS, *_GENERAL)),
    "attention_forward": _ATTENTION,
    "attention_backward": _ATTENTION,
    "depthwise_conv": _CONV,
    "depthwise_conv_backward": _CONV,
    "attention_state": _STATE,
    "attention_state_backward": _STATE,
    "attention_from_state": _FROM_STATE,
    "attention_from_state_backward": _FROM_STATE,
}


def _register(tensors: ModuleType) -> None:
    for name, rule in _RULES.items():
        _library_rule(name, tensors, _Sharded(name, rule, tensors))


def _library_rule(name: str, tensors: ModuleType, function: Callable) -> None:
    def dispatch(cls, func, types, args=(), kwargs=None):
        return function(args, kwargs or {})

    torch.library.register_torch_dispatch(f"flatten::{name}", tensors.DTensor, dispatch, lib=_library)


class _Sharded:
    """One operator on DTensors."""

    def __init__(self, name: str, rule: _Rule, tensors: ModuleType) -> None:
        self.name, self.rule, self.tensors = name, rule, tensors
        self.op = getattr(_ops, name).default
        self.schema = self.op._schema.arguments

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        call = {a.name: a.default_value for a in self.schema if a.has_default_value()}
        call |= dict(zip((a.name for a in self.schema), args, strict=False)) | kwargs
        self._check(call)
        with torch.no_grad():
            return self._run(call)

    def _check(self, call: dict[str, Any]) -> None:
        meshes = set()
        for name, value in call.items():
            if isinstance(value, self.tensors.DTensor):
                meshes.add(value.device_mesh)
            elif isinstance(value, Tensor):
                raise RuntimeError(
                    f"flatten.{self.name}: {name} is a torch.Tensor beside DTensors, expected a DTensor "
                    "(torch.distributed.tensor.distribute_tensor makes one)"
                )
        if len(meshes) != 1:
            raise RuntimeError(
                f"flatten.{self.name}: tensors lie on {len(meshes)} device meshes, expected one"
            )

    def _run(self, call: dict[str, Any]) -> Any:
        first = call[self.rule.tokens[0]]
        mesh, plans = first.device_mesh, self._plans(call, first.device_mesh)
        by_heads, by_images = (
            math.prod(mesh.size(i) for i, plan in enumerate(plans) if plan == kind)
            for kind in ("heads", "batch")
        )

        def wrapped(local: Tensor, shape: Sequence[int], lies: Sequence[_Lie]) -> Any:
            stride = torch.empty(shape, device="meta").stride()
            placements = self._placements(lies)
            return self.tensors.DTensor.from_local(
                local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
            )

        local = dict(call)
        for name, value in call.items():
            if name == "state" and "state" not in self.rule.others:  # a saved one
                local[name] = value.to_local()
            elif isinstance(value, Tensor):
                placements = self._placements([self._lie(name, value, plan, call) for plan in plans])
                local[name] = value.redistribute(placements=placements).to_local()  # type: ignore[attr-defined]
        if "num_heads" in call:
            local["num_heads"] //= by_heads
        if "saved_windows" in call:
            # The states of a process's own images, where all processes have as many.
            even = first.shape[0] % by_images == 0
            local["saved_windows"] = local["saved_windows"] // by_images if even else 0
        by_keyword = {argument.name for argument in self.schema if argument.kwarg_only}
        result = self.op(
            *(local[argument.name] for argument in self.schema if not argument.kwarg_only),
            **{name: local[name] for name in by_keyword},
        )

        if "output_mask" in call:
            names = self._in_order()
            wanted = [name for name, asked in zip(names, call["output_mask"], strict=False) if asked]
            return [
                wrapped(value, call[name].shape, [self._gradient_lie(name, plan, call) for plan in plans])
                for name, value in zip(wanted, result, strict=True)
            ]
        if self.rule is _STATE:
            shape = (first.shape[0], call["num_heads"], *result.shape[2:])
            of_heads: dict[str, _Lie] = {"whole": _WHOLE, "batch": 0, "heads": 1}
            return wrapped(result, shape, [of_heads[plan] for plan in plans])
        out_lies = [self._lie("", first, plan, call) for plan in plans]
        out_shape = (*first.shape[:2], self._value_channels(call))
        if isinstance(result, Tensor):
            return wrapped(result, out_shape, out_lies)
        out, state = result
        state_lies: list[_Lie] = [_WHOLE if plan == "whole" else 0 for plan in plans]
        state_shape = (state.numel() * by_heads * by_images,)
        return wrapped(out, out_shape, out_lies), wrapped(state, state_shape, state_lies)

    def _in_order(self) -> list[str]:
        """The tensors that have gradients, as output_mask has them."""
        known = (*self.rule.tokens, *self.rule.others)
        return [argument.name for argument in self.schema if argument.name in known]

    def _value_channels(self, call: dict[str, Any]) -> int:
        if "x" in call:
            return call["x"].shape[2]
        return call["v"].shape[2] if "v" in call else call["num_heads"] * (call["state"].shape[3] - 1)

    def _lie(self, name: str, value: Tensor, plan: str, call: dict[str, Any]) -> _Lie:
        """How an argument lies under a plan."""
        if plan == "whole":
            return _WHOLE
        images = value.ndim == 5 or name not in self.rule.others or name in _OF_IMAGES
        if plan == "batch":
            return 0 if images else _WHOLE
        of_state = name == "state" or (name == "grad_out" and self.rule is _STATE)
        if of_state or name == "key_bias" or value.ndim == 5:
            return 1
        if name == "rotary":
            return 1 if value.shape[1] == call[self.rule.tokens[0]].shape[2] // 2 else _WHOLE
        if name == "key_weight":
            return 2 if value.ndim == 3 else _WHOLE
        if images:
            return 2
        return 0 if value.shape[0] == self._value_channels(call) else _WHOLE  # taps

    def _gradient_lie(self, name: str, plan: str, call: dict[str, Any]) -> _Lie:
        """How its gradient does: what all processes have whole gets a part of its gradient from each."""
        lie = self._lie(name, call[name], plan, call)
        return _SUMMAND if lie == _WHOLE and plan != "whole" else lie

    def _heads_are_independent(self, call: dict[str, Any]) -> bool:
        """Whether no token is normed over all of its channels."""
        if "focusing_factor" not in call or call["focusing_factor"] is None:
            return True
        return call["feature_map"] not in ("focused", None)

    def _plans(self, call: dict[str, Any], mesh: Any) -> list[str]:
        """ "batch", "heads" or "whole" for each dimension of the mesh."""
        tokens = [call[name] for name in self.rule.tokens]
        by_heads = self._heads_are_independent(call)
        # Channels of a depthwise convolution go by whole kernels, as heads do.
        units = call["num_heads"] if "num_heads" in call else tokens[0].shape[2] // call["weight"].shape[0]
        if "num_heads" not in call and units == 1:
            units = tokens[0].shape[2]
        plans = []
        for i in range(mesh.ndim):
            lie = {t.placements[i].dim for t in tokens if isinstance(t.placements[i], self.tensors.Shard)}
            if 0 in lie:
                plans.append("batch")
            elif 2 in lie and by_heads and units % mesh.size(i) == 0:
                plans.append("heads")
                units //= mesh.size(i)
            else:
                plans.append("whole")
        return plans

    def _placements(self, lies: Sequence[_Lie]) -> list[Any]:
        kinds = {_WHOLE: self.tensors.Replicate, _SUMMAND: self.tensors.Partial}
        return [self.tensors.Shard(lie) if isinstance(lie, int) else kinds[lie]() for lie in lies]
