"""Random arguments of the general form and its states, several broken at once: a call succeeds exactly if the
contract allows it, else it names an argument that is at fault. Arguments that nobody broke give what the
reference gives in float64.

The contract is stated here a second time, independently of csrc; test_fuzz.py has that of older arguments.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import test_fuzz as old
import torch

import flatten_ext
from flatten_ext import reference

CHOICES = {
    "feature_map": ("focused", "elu", "relu", "none"),
    "normalizer": ("divide", "none", "subtract", "magnitude"),
    "gate_activation": ("none", "silu", "sigmoid"),
}
WORDS = (*(word for choices in CHOICES.values() for word in choices), "", "Divide", "gelu")


# --- the contract
def choice_faults(a: dict[str, Any]) -> set[str]:
    faults = {name for name, choices in CHOICES.items() if name in a and a[name] not in choices}
    if a.get("gate_activation", "none") != "none" and a.get("gate") is None:
        faults.add("gate_activation")
    if "similarity_scale" in a:
        c = abs(a["similarity_scale"])
        tokens = a["q"]
        if not (math.isfinite(c) and (c == 0 or old.is_held(c, tokens))):
            faults.add("similarity_scale")
    return faults


def map_faults(a: dict[str, Any], tokens: torch.Tensor, rows: int) -> set[str]:
    faults, channels = set(), tokens.shape[2]
    focused = a["feature_map"] == "focused"
    power, scale, key_bias = a["focusing_factor"], a.get("scale"), a.get("key_bias")
    if not (power >= 1 and old.is_held(power, tokens) if focused else power == 3):
        faults.add("focusing_factor")
    if scale is not None and not (
        focused and old.is_parameter(scale, (channels,), tokens) and old.divides(scale)
    ):
        faults.add("scale")
    if key_bias is not None and not old.is_parameter(key_bias, (rows, channels), tokens):
        faults.add("key_bias")
    if not (a["eps"] == 0 or old.is_held(a["eps"], tokens)):
        faults.add("eps")
    return faults


def table_faults(a: dict[str, Any], tokens: torch.Tensor, count: int) -> set[str]:
    table = a.get("rotary")
    if table is None:
        return set()
    channels = tokens.shape[2]
    dim = channels // a["num_heads"]
    shapes = [(count, dim // 2, 2), (count, channels // 2, 2)]
    right = dim % 2 == 0 and any(old.is_parameter(table, shape, tokens) for shape in shapes)
    return set() if right else {"rotary"}


def weight_faults(a: dict[str, Any], k: torch.Tensor) -> set[str]:
    weight = a.get("key_weight")
    shapes = [tuple(k.shape[:2]), (*k.shape[:2], a["num_heads"])]
    if weight is None or any(old.is_parameter(weight, shape, k) for shape in shapes):
        return set()
    return {"key_weight"}


def beside_faults(a: dict[str, Any], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> set[str]:
    return {
        name
        for name, shape in shapes.items()
        if a.get(name) is not None and (a[name].shape != shape or a[name].dtype != dtype)
    }


def attention_faults(a: dict[str, Any]) -> set[str]:
    q, k, v = a["q"], a["k"], a["v"]
    linear = "feature_map" not in a
    faults = {n for n in "qkv" if a[n].ndim != 3 or a[n].dtype not in old.FLOATS}
    if faults or q.shape[2] == 0:
        return faults or {"q"}
    faults |= {n for n in "kv" if a[n].dtype != q.dtype}
    if k.shape[1] == 0 or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        faults.add("k")
    heads, channels = a["num_heads"], q.shape[2]
    if heads < 1 or channels % heads:
        return faults | {"num_heads"} | (set() if v.shape[:2] == k.shape[:2] else {"v"})
    if v.shape[:2] != k.shape[:2] or v.shape[2] < 1 or v.shape[2] % heads:
        return faults | {"v"}
    if not linear and v.shape[2] != channels:
        return faults | {"v"}
    queries, keys = q.shape[1], k.shape[1]
    faults |= old.map_faults(queries, keys, a["size"], a["window"], a["shift"])
    if a["dwc_weight"] is not None and (a["size"] is None or queries != keys):
        faults.add("dwc_weight")
    widths = {v.shape[2], v.shape[2] // heads}
    faults |= old.taps_faults(("dwc_weight", "dwc_bias"), a["dwc_weight"], a["dwc_bias"], widths, v)
    in_window = keys if a["window"] is None else math.prod(a["window"])
    if linear and not (a["eps"] == 0 or old.is_held(a["eps"], q)):
        faults.add("eps")
    if not linear:
        faults |= map_faults(a, q, in_window)
    if a["rotary"] is not None and queries != keys:
        faults.add("rotary")
    windows = a["window"] is not None and a["size"] is not None and a["size"] != a["window"]
    faults |= table_faults(a, q, in_window if windows else keys) | weight_faults(a, k) | choice_faults(a)
    shapes = {
        "gate": (*q.shape[:2], v.shape[2]),
        "normalizer_q": tuple(q.shape),
        "normalizer_k": tuple(k.shape),
    }
    return faults | beside_faults(a, shapes, q.dtype)


def state_faults(a: dict[str, Any]) -> set[str]:
    k, v, heads = a["k"], a["v"], a["num_heads"]
    faults = {n for n in "kv" if a[n].ndim != 3 or a[n].dtype not in old.FLOATS}
    if faults or k.shape[2] == 0:
        return faults or {"k"}
    faults |= {"v"} if v.dtype != k.dtype or v.shape[:2] != k.shape[:2] else set()
    if heads < 1 or k.shape[2] % heads:
        return faults | {"num_heads"}
    if v.shape[2] < 1 or v.shape[2] % heads:
        return faults | {"v"}
    faults |= map_faults(a, k, k.shape[1]) | table_faults(a, k, k.shape[1])
    faults |= weight_faults(a, k) | choice_faults({"feature_map": a["feature_map"]})
    faults |= beside_faults(a, {"normalizer_k": tuple(k.shape)}, k.dtype)
    if a["normalizer_k"] is not None and a["feature_map"] != "none":
        faults.add("normalizer_k")
    return faults


def from_state_faults(a: dict[str, Any]) -> set[str]:
    q, state, heads = a["q"], a["state"], a["num_heads"]
    if q.ndim != 3 or q.dtype not in old.FLOATS or q.shape[2] == 0:
        return {"q"}
    if heads < 1 or q.shape[2] % heads:
        return {"num_heads"}
    fits = (q.shape[0], heads, q.shape[2] // heads + 1)
    if state.ndim != 4 or state.shape[:3] != fits or state.shape[3] < 2:
        return {"state"}
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    faults = set() if state.dtype == sums else {"state"}
    faults |= map_faults(a, q, 0) | table_faults(a, q, q.shape[1]) | choice_faults(a)
    gate = (*q.shape[:2], heads * (state.shape[3] - 1))
    faults |= beside_faults(a, {"normalizer_q": tuple(q.shape), "gate": gate}, q.dtype)
    if a["normalizer_q"] is not None and a["feature_map"] != "none":
        faults.add("normalizer_q")
    return faults


# --- arguments, then worse
def some(rng: random.Random, value: Any, chance: float = 0.5) -> Any:
    return value if rng.random() < chance else None


def features(rng: random.Random, like: torch.Tensor) -> torch.Tensor:
    return torch.rand(like.shape).add(0.1).to(like.dtype)


def general_options(rng: random.Random, a: dict[str, Any], q, k, value_channels: int, count: int) -> None:
    heads, channels, dtype = a["num_heads"], q.shape[2], q.dtype
    dim = channels // heads
    wide = torch.float64 if dtype == torch.float64 else rng.choice([torch.float32, dtype])
    pairs = rng.choice([dim // 2, channels // 2])
    table = torch.randn(count, pairs, 2).to(wide)
    a["rotary"] = some(rng, table) if dim % 2 == 0 and q.shape[1] == k.shape[1] else None
    shape = rng.choice([k.shape[:2], (*k.shape[:2], heads)])
    a["key_weight"] = some(rng, torch.rand(shape).add(0.1).to(wide))
    a["normalizer"] = rng.choice(CHOICES["normalizer"])
    a["similarity_scale"] = rng.choice([1.0, 0.5])
    a["gate"] = some(rng, torch.randn(*q.shape[:2], value_channels).to(dtype))
    a["gate_activation"] = "none" if a["gate"] is None else rng.choice(CHOICES["gate_activation"])


def good_arguments(rng: random.Random, name: str) -> dict[str, Any]:
    if name in ("attention", "linear_attention"):
        a = old.good_arguments(rng, name)
        q, k, heads, dtype = a["q"], a["k"], a["num_heads"], a["q"].dtype
        value_channels = q.shape[2]
        if name == "linear_attention" and a["dwc_weight"] is None:
            value_channels = heads * rng.choice([1, 2, 5])
            a["v"] = torch.randn(*k.shape[:2], value_channels).to(dtype)
        if a["dwc_weight"] is not None and rng.random() < 0.3:
            a["dwc_weight"] = torch.randn(q.shape[0], value_channels, 1, 3, 3).to(dtype)
            a["dwc_bias"] = None
        count = k.shape[1] if a["window"] is None else math.prod(a["window"])
        general_options(rng, a, q, k, value_channels, count)
        if name == "linear_attention":
            a["normalizer_q"], a["normalizer_k"] = some(rng, features(rng, q)), some(rng, features(rng, k))
        else:
            a["feature_map"] = rng.choice(CHOICES["feature_map"])
            if a["feature_map"] != "focused":
                a |= {"scale": None, "focusing_factor": 3.0}
            if a["feature_map"] == "none":
                a |= {"q": features(rng, q), "k": features(rng, k), "key_bias": None}
        return a
    heads, dim, batch = rng.choice([1, 2, 3]), rng.choice([1, 2, 4]), rng.choice([0, 1, 2])
    dtype, tokens, width = rng.choice(old.FLOATS), rng.choice([1, 6]), rng.choice([1, 2, 5])
    x = torch.randn(batch, tokens, heads * dim).to(dtype)
    a = {"num_heads": heads, "eps": 1e-6, "feature_map": rng.choice(CHOICES["feature_map"])}
    focused = a["feature_map"] == "focused"
    a["scale"] = some(rng, torch.rand(heads * dim).add(0.5).to(dtype)) if focused else None
    a["focusing_factor"] = rng.choice([1.0, 2.5]) if focused else 3.0
    given = some(rng, features(rng, x)) if a["feature_map"] == "none" else None
    if a["feature_map"] == "none":
        x = features(rng, x)
    general_options(rng, a, x, x, heads * width, tokens)
    if name == "attention_state":
        for of_queries in ("normalizer", "similarity_scale", "gate", "gate_activation"):
            del a[of_queries]
        bias = torch.randn(tokens, heads * dim).to(dtype)
        a |= {"k": x, "v": torch.randn(batch, tokens, heads * width).to(dtype), "normalizer_k": given}
        return a | {"key_bias": None if a["feature_map"] == "none" else some(rng, bias)}
    del a["key_weight"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = torch.rand(batch, heads, dim + 1, width + 1).add(0.1).to(wide)
    return a | {"q": x, "state": state, "normalizer_q": given}


def worse(rng: random.Random, name: str, value: Any) -> Any:
    if name in CHOICES:
        return rng.choice(WORDS)
    if name in ("q", "k", "v", "state") or not isinstance(value, torch.Tensor):
        return (
            old.worse_tensor(rng, value) if isinstance(value, torch.Tensor) else old.worse(rng, name, value)
        )
    return old.worse(rng, name, value)


FAULTS = {
    "attention": attention_faults,
    "linear_attention": attention_faults,
    "attention_state": state_faults,
    "attention_from_state": from_state_faults,
}


@pytest.mark.parametrize("chunk", range(6))
@pytest.mark.parametrize("name", FAULTS)
def test_random_arguments(name: str, chunk: int) -> None:
    rng = random.Random(f"general {name} {chunk}")
    torch.manual_seed(chunk)
    accepted = 0
    for _ in range(60):
        arguments = good_arguments(rng, name)
        victims = rng.sample(sorted(arguments), rng.choice([0, 0, 1, 1, 2, 3]))
        for victim in victims:
            arguments[victim] = worse(rng, victim, arguments[victim])
        if faults := FAULTS[name](arguments):
            with pytest.raises(RuntimeError, match=rf"flatten\.{name}: .*\b({'|'.join(faults)})\b"):
                getattr(flatten_ext, name)(**arguments)
            continue
        accepted += 1
        out = getattr(flatten_ext, name)(**arguments)
        if victims:
            continue
        wide = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
        expected = getattr(reference, name)(**wide)
        assert out.shape == expected.shape
        assert out.dtype == (arguments.get("q", out).dtype if name != "attention_state" else out.dtype)
        tolerance = {torch.float64: 1e-10, torch.float32: 3e-5}.get(out.dtype, 3e-2)
        assert (out.double() - expected).norm() <= tolerance * expected.norm().clamp_min(1e-300)
    assert 10 <= accepted <= 55, "the fuzz has become all good or all bad"
