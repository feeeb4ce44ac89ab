"""Random arguments, several broken at once: a call succeeds exactly if the contract allows it, else it names
an argument that is at fault. Arguments that nobody broke give what the reference gives.

The contract is stated a second time below, in Python, independently of csrc/arguments.cpp.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

import flatten_ext
from flatten_ext import reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = (*FLOATS, torch.int32, torch.complex64)
NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 4, 5, 6, 8, 12, 2**31, 2**62, 2**63 - 1)
REALS = (
    math.nan,
    math.inf,
    -math.inf,
    -1.0,
    0.0,
    0.5,
    1.0,
    1.5,
    4.0,
    1e300,
    1e39,
    3e38,
    2e-38,
    1e-38,
    1e-320,
)


# --- the contract
def is_parameter(t: torch.Tensor, shape: tuple[int, ...], x: torch.Tensor) -> bool:
    allowed = {x.dtype} if x.dtype == torch.float64 else {x.dtype, torch.float32}
    return t.shape == shape and t.dtype in allowed


def map_faults(queries: int, keys: int, size, window, shift) -> set[str]:
    if size is not None and not (len(size) == 2 and min(size) >= 1 and size[0] * size[1] <= keys):
        return {"size"}
    if window is not None:
        if size is None:
            return {"window"}
        fits = len(window) == 2 and min(window) >= 1 and size[0] % window[0] == 0 == size[1] % window[1]
        if not (fits and queries == keys == size[0] * size[1]):
            return {"window"}
    if shift is not None:
        if window is None or len(shift) != 2:
            return {"shift"}
        if not all(0 <= s < w for s, w in zip(shift, window, strict=True)):
            return {"shift"}
    return set()


def taps_faults(names, weight, bias, widths: set[int], x: torch.Tensor) -> set[str]:
    """Faults of a depthwise kernel over x, whose filters may be `widths` many, or each image's own."""
    weight_name, bias_name = names
    if weight is None:
        return set() if bias is None else {bias_name}
    if weight.ndim == 5:
        odd = weight.shape[3] % 2 == 1 == weight.shape[4] % 2
        shape = (x.shape[0], x.shape[2], 1, *weight.shape[3:])
        faults = set() if odd and is_parameter(weight, shape, x) else {weight_name}
        return faults | (set() if bias is None else {bias_name})
    odd = weight.ndim == 4 and weight.shape[2] % 2 == 1 and weight.shape[3] % 2 == 1
    if not (odd and weight.shape[1] == 1 and weight.shape[0] in widths):
        return {weight_name}
    faults = set() if is_parameter(weight, weight.shape, x) else {weight_name}
    if bias is not None and not is_parameter(bias, weight.shape[:1], x):
        faults.add(bias_name)
    return faults


def attention_faults(a: dict[str, Any]) -> set[str]:
    q, k, v = a["q"], a["k"], a["v"]
    faults = {n for n in "qkv" if a[n].ndim != 3 or a[n].dtype not in FLOATS}
    if faults or q.shape[2] == 0:
        return faults or {"q"}
    faults |= {n for n in "kv" if a[n].dtype != q.dtype}
    if k.shape[1] == 0 or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        faults.add("k")
    heads, linear = a["num_heads"], "focusing_factor" not in a
    other_channels = linear and v.shape[:2] == k.shape[:2] and v.shape[2] >= 1
    if v.shape != k.shape and not other_channels:
        faults.add("v")
    if heads < 1 or q.shape[2] % heads:
        return faults | {"num_heads"}
    if v.shape[2] % heads:
        return faults | {"v"}
    channels, queries, keys = q.shape[2], q.shape[1], k.shape[1]
    faults |= map_faults(queries, keys, a["size"], a["window"], a["shift"])
    if a["dwc_weight"] is not None and (a["size"] is None or queries != keys):
        faults.add("dwc_weight")
    widths = {v.shape[2], v.shape[2] // heads}
    faults |= taps_faults(("dwc_weight", "dwc_bias"), a["dwc_weight"], a["dwc_bias"], widths, v)
    if not (a["eps"] == 0 or is_held(a["eps"], q)):
        faults.add("eps")
    if "focusing_factor" in a:
        if not (a["focusing_factor"] >= 1 and is_held(a["focusing_factor"], q)):
            faults.add("focusing_factor")
        scale, key_bias = a["scale"], a["key_bias"]
        if scale is not None and not (is_parameter(scale, (channels,), q) and divides(scale)):
            faults.add("scale")
        rows = keys if a["window"] is None else math.prod(a["window"])
        if key_bias is not None and not is_parameter(key_bias, (rows, channels), q):
            faults.add("key_bias")
    return faults


def is_held(value: float, q: torch.Tensor) -> bool:
    """By the numbers that the call is computed in, and not as a subnormal one."""
    limits = torch.finfo(q.dtype if q.dtype == torch.float64 else torch.float32)
    return limits.tiny <= value <= limits.max


def divides(scale: torch.Tensor) -> bool:
    """As a normal number that has a normal reciprocal."""
    least = torch.finfo(torch.float64 if scale.dtype == torch.float64 else torch.float32).tiny
    return bool(((scale.double() >= least) & (scale.double() <= 1 / least)).all())


def conv_faults(a: dict[str, Any]) -> set[str]:
    x, weight = a["x"], a["weight"]
    if x.ndim != 3 or x.dtype not in FLOATS or x.shape[1] == 0 or x.shape[2] == 0:
        return {"x"}
    channels, tokens = x.shape[2], x.shape[1]
    widths = {d for d in range(1, channels + 1) if channels % d == 0}
    faults = taps_faults(("weight", "bias"), weight, a["bias"], widths, x)
    return faults | map_faults(tokens, tokens, a["size"], a["window"], a["shift"])


# --- arguments, then worse
def good_arguments(rng: random.Random, name: str) -> dict[str, Any]:
    height, width = rng.choice([(2, 4), (4, 4), (4, 6), (3, 5)])
    windowed = height % 2 == 0 == width % 2 and rng.random() < 0.6
    prefix = 0 if windowed else rng.choice([0, 0, 1, 3])
    heads, dim, batch = rng.choice([1, 2, 3]), rng.choice([1, 2, 4, 8]), rng.choice([0, 1, 2])
    tokens, channels, dtype = height * width + prefix, heads * dim, rng.choice(FLOATS)
    x = {n: torch.randn(batch, tokens, channels, dtype=dtype) for n in "qkv"}
    if name == "linear_attention":  # features; others may divide by a sum near zero
        x["q"], x["k"] = x["q"].abs(), x["k"].abs()
    filters, kernel = rng.choice([dim, channels]), rng.choice([(1, 1), (3, 3), (3, 5), (7, 1)])
    weight, bias = torch.randn(filters, 1, *kernel, dtype=dtype), torch.randn(filters, dtype=dtype)
    where = {
        "size": [height, width],
        "window": [2, rng.choice([1, 2])] if windowed else None,
        "shift": None,
    }
    if windowed and rng.random() < 0.6:
        where["shift"] = [rng.randrange(s) for s in where["window"]]
    if name == "depthwise_conv":
        if rng.random() < 0.2:  # taps of each image's own
            weight, bias = torch.randn(batch, channels, 1, *kernel, dtype=dtype), None
        return {"x": x["q"], "weight": weight, "bias": rng.choice([bias, None]), **where}
    taps = rng.choice([{"dwc_weight": weight, "dwc_bias": bias}, {"dwc_weight": None, "dwc_bias": None}])
    arguments = {**x, "num_heads": heads, **taps, **where, "eps": 1e-6}
    if name == "attention":
        rows = tokens if where["window"] is None else math.prod(where["window"])
        arguments["scale"] = rng.choice([None, torch.rand(channels).add(0.5).to(dtype)])
        arguments["key_bias"] = rng.choice([None, torch.randn(rows, channels, dtype=dtype)])
        arguments["focusing_factor"] = rng.choice([1.0, 2.0, 3.0, 2.5])
    return arguments


def worse_tensor(rng: random.Random, t: torch.Tensor) -> torch.Tensor:
    """Another dtype, rank or extent, or a bad value."""
    kind = rng.randrange(5)
    if kind == 0:
        return t.to(rng.choice(DTYPES))
    if kind == 1:
        return t.unsqueeze(rng.randrange(t.ndim + 1)) if rng.random() < 0.5 else t.sum(rng.randrange(t.ndim))
    if kind == 2:
        axis = rng.randrange(t.ndim)
        return torch.randn(*t.shape[:axis], rng.randrange(10), *t.shape[axis + 1 :]).to(t.dtype)
    if kind == 3:
        return torch.empty(0, dtype=t.dtype)
    t = t.clone()
    if t.numel():
        bad = rng.choice([0.0, -1.0, 3.0, 1e-39, 9e37])  # the last two: where the dtype holds them
        t.view(-1)[rng.randrange(t.numel())] = (
            bad if abs(bad) < torch.finfo(torch.float16).max else t.new_tensor(bad)
        )
    return t


def worse(rng: random.Random, name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        optional = name not in ("q", "k", "v", "x", "weight")
        return None if optional and rng.random() < 0.2 else worse_tensor(rng, value)
    if name in ("size", "window", "shift") or isinstance(value, list):
        if rng.random() < 0.2 and name in ("window", "shift"):
            return None
        return [rng.choice(NUMBERS) for _ in range(rng.choice([0, 1, 2, 2, 2, 2, 3]))]
    if name == "num_heads":
        return rng.choice(NUMBERS)
    return rng.choice(REALS) if isinstance(value, float) else value


@pytest.mark.parametrize("chunk", range(8))
@pytest.mark.parametrize("name", ["attention", "linear_attention", "depthwise_conv"])
def test_random_arguments(name: str, chunk: int) -> None:
    rng = random.Random(f"{name} {chunk}")
    find_faults = conv_faults if name == "depthwise_conv" else attention_faults
    accepted = 0
    for _ in range(100):
        arguments = good_arguments(rng, name)
        victims = rng.sample(sorted(arguments), rng.choice([0, 0, 1, 1, 2, 3]))
        for victim in victims:
            arguments[victim] = worse(rng, victim, arguments[victim])
        if faults := find_faults(arguments):
            with pytest.raises(RuntimeError, match=rf"flatten\.{name}: .*\b({'|'.join(faults)})\b"):
                getattr(flatten_ext, name)(**arguments)
        else:
            out = getattr(flatten_ext, name)(**arguments)
            first, last = ("x", "x") if name == "depthwise_conv" else ("q", "v")
            assert out.shape == (*arguments[first].shape[:2], arguments[last].shape[2])
            if not victims:
                expected = getattr(reference, name)(**arguments)
                tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(out.dtype, 1e-2)
                assert (out - expected).norm() <= tolerance * expected.norm()
            accepted += 1
    assert 10 <= accepted <= 90, "the fuzz has become all good or all bad"


# --- at the limits
def test_more_elements_than_memory() -> None:
    """Expanded tensors pretend to be huge; what cannot be allocated is an error like any other."""
    few = torch.randn(1, 1, 8)
    for shape in [(2**40, 1, 8), (1, 2**50, 8), (2**20, 2**31, 8)]:
        huge = few.expand(shape)
        with pytest.raises(RuntimeError):
            flatten_ext.attention(huge, huge, huge, 2)
        with pytest.raises(RuntimeError):
            flatten_ext.depthwise_conv(huge, torch.randn(8, 1, 3, 3), None, [1, 1])


def test_a_kernel_larger_than_the_map() -> None:
    x, weight = torch.randn(1, 6, 4, dtype=torch.float64), torch.randn(4, 1, 31, 17, dtype=torch.float64)
    torch.testing.assert_close(
        flatten_ext.depthwise_conv(x, weight, None, [2, 3]), reference.depthwise_conv(x, weight, None, [2, 3])
    )


def test_freed_storage() -> None:
    q = torch.randn(2, 16, 8)
    q.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"flatten\.attention: q has no storage"):
        flatten_ext.attention(q, torch.randn(2, 16, 8), torch.randn(2, 16, 8), 2)


def test_lazy_negation_is_applied() -> None:
    q, k, v = torch.randn(3, 2, 16, 8, dtype=torch.complex64).conj().imag
    assert q.is_neg()
    plain = [t.resolve_neg().clone() for t in (q, k, v)]
    assert torch.equal(flatten_ext.attention(q, k, v, 2), flatten_ext.attention(*plain, 2))
