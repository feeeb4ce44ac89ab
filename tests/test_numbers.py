"""Numbers at the ends: where NaN goes, and which finite inputs give finite outputs."""

from __future__ import annotations

import random

import pytest
import torch
from cases import Case, gradients, relative_error, replace
from torch import Tensor

import flatten_ext
from flatten_ext import reference

WINDOWS = Case(size=(4, 6), window=(2, 3), shift=(1, 1), kernel=(3, 3), head_dim=4)
MAP = Case(size=(4, 6), kernel=(3, 3), head_dim=4)
SMALL = Case(size=(4, 6), kernel=None, head_dim=32)  # fewer tokens than a head has channels


def rows_with_nan(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of tokens, which; of a parameter, whether."""
    return {name: t.isnan().any(-1) if t.dim() == 3 else t.isnan().any() for name, t in found.items()}


@pytest.mark.parametrize("p", [1.0, 2.0, 2.5, 3.0, 4.0])
@pytest.mark.parametrize("name", ["q", "k", "v", "grad_out"])
@pytest.mark.parametrize("case", [WINDOWS, MAP, SMALL], ids=["windows", "map", "small"])
def test_nan_goes_where_the_formula_takes_it(case, name, p):
    """In the reference as in the kernels: that of a query stays in its token, of the rest in the window."""
    arguments = Case(**{**vars(case), "p": p}).arguments(torch.float32)
    grad_out = torch.randn_like(arguments["q"])
    poisoned = grad_out if name == "grad_out" else arguments[name]
    poisoned[1, 5, 2] = float("nan")
    found = gradients(torch.ops.flatten.attention, arguments, grad_out)
    expected = gradients(reference.attention, arguments, grad_out)
    if name != "grad_out":
        assert torch.equal(found["out"].isnan(), expected["out"].isnan())
        assert found["out"].isnan().any()
    for which, nans in rows_with_nan(expected).items():
        assert torch.equal(rows_with_nan(found)[which], nans), which
    if name == "q":
        assert rows_with_nan(expected)["out"].sum() == 1
    assert not expected["out"][0].isnan().any(), "NaN has left its image"


@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("p", [1.0, 2.0, 2.5, 3.0, 4.0])
@pytest.mark.parametrize("name", ["q", "k", "v", "key_bias", "grad_out"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", [WINDOWS, MAP, SMALL], ids=["windows", "map", "small"])
def test_no_entry_is_finite_that_the_formula_has_not(case, value, name, p, eps):
    """Nor the other way round, entry by entry: of the output, and of the gradients but those of the taps."""
    for alone in (False, True):  # alone in its row above zero
        arguments = replace(case, p=p, eps=eps).arguments(torch.float32)
        grad_out = torch.randn_like(arguments["q"])
        poisoned = grad_out if name == "grad_out" else arguments[name]
        row = poisoned[5] if name == "key_bias" else poisoned[1, 5]
        if alone and name in ("q", "k"):
            row.copy_(-row.abs())
        row[2] = value
        found = gradients(torch.ops.flatten.attention, arguments, grad_out)
        expected = gradients(reference.attention, arguments, grad_out)
        for which in ("out", "q", "k", "v", "key_bias", "scale"):
            finite = expected[which].isfinite()
            assert torch.equal(found[which].isfinite(), finite), f"{which}, alone: {alone}"


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_in_features(name):
    arguments = replace(MAP, p=None).arguments()
    arguments[name][1, 5, 2] = float("nan")
    grad_out = torch.randn_like(arguments["q"])
    found = rows_with_nan(gradients(torch.ops.flatten.linear_attention, arguments, grad_out))
    expected = rows_with_nan(gradients(reference.linear_attention, arguments, grad_out))
    for which, nans in expected.items():
        assert torch.equal(found[which], nans), which
    assert expected["out"].any()


@pytest.mark.parametrize("p", [1.0, 3.0])
def test_second_derivatives_and_tangents_hand_nan_on(p):
    """They run through the reference."""
    q, k, v = (torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        q[0, 2, 3] = float("nan")
    out = flatten_ext.attention(q, k, v, 2, focusing_factor=p)
    (first,) = torch.autograd.grad(out.square().sum(), v, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), k)
    assert second.isnan().any()
    tangent = torch.func.jvp(lambda v: flatten_ext.attention(q.detach(), k.detach(), v, 2), (v,), (v,))[1]
    assert tangent.isnan().any(-1).sum() == 1


# README names the numbers that must lie between these. A row's powers are kept without scaling while their
# norm is between 1e-10 and 1e10, on CUDA between 1e-18 and 3e18: products need that much room within float32.
LEAST, MOST = 1e-19, 1e19


def magnitude(rng: random.Random, low: float, high: float) -> float:
    return 10 ** rng.uniform(low, high)


def random_call(rng: random.Random) -> dict:
    """Any magnitudes, divisors, eps and p that the checks let pass."""
    dtype = rng.choice([torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16])
    end = 4 if dtype == torch.float16 else 37
    tokens, heads, head_dim = rng.choice([2, 5, 20]), rng.choice([1, 2]), rng.choice([1, 4, 8, 33])
    channels = heads * head_dim
    call: dict = {"num_heads": heads}
    for name in "qkv":
        amplitude = rng.choice([1.0, magnitude(rng, -end, end), magnitude(rng, -4, 4)])
        call[name] = (torch.randn(1, tokens, channels).clamp(-5, 5) * amplitude).to(dtype)
    spread = torch.tensor([magnitude(rng, -37, 37) for _ in range(channels)])
    scale = rng.choice([None, torch.rand(channels) + 0.5, (torch.rand(channels) + 0.5) * spread[0], spread])
    call["scale"] = None if scale is None else scale.clamp(2.0**-126, 2.0**126)
    call["focusing_factor"] = rng.choice([1.0, 1.0, 1.5, 2.0, 3.0, 3.0, 4.0, 8.0, 64.0, 1e4, 1e20, 3e38])
    call["eps"] = rng.choice([1e-6, 1e-6, 1.2e-38, 1e-30, 1e-3, 1.0, magnitude(rng, -37, 37)])
    return call


def is_held(call: dict) -> bool:
    """Whether the formula's own numbers have room in float32, and the output in its dtype."""
    q, k = (
        (
            (call[name].double().relu() + call["eps"])
            / (1 if call["scale"] is None else call["scale"].double())
        )
        .norm(dim=-1)
        .flatten()
        for name in "qk"
    )
    v = call["v"].double()
    numbers = [q.min(), q.max(), k.min(), k.max(), call["eps"] / q.max(), call["eps"] / q.min()]
    products = [k.max() * v.norm(dim=-1).max()]
    if call["focusing_factor"] == 1:
        products += [q.max() * k.max(), q.max() * products[0]]
    return (
        all(LEAST <= n <= MOST for n in numbers)
        and all(n <= MOST for n in products)
        and bool(v.abs().max() <= torch.finfo(call["v"].dtype).max / 2)
    )


@pytest.mark.parametrize("chunk", range(4))
def test_finite_inputs_give_finite_outputs(chunk):
    rng = random.Random(chunk)
    torch.manual_seed(chunk)
    held = 0
    for _ in range(1000):
        call = random_call(rng)
        if not is_held(call):
            continue
        held += 1
        assert torch.ops.flatten.attention(**call).isfinite().all(), call
    assert held > 100


@pytest.mark.parametrize("p", [1.0, 1e39, 1e300])
def test_float64_has_ends_of_its_own(p):
    """Where float32 would be refused or overflow."""
    q = torch.full((1, 4, 8), 1e20, dtype=torch.float64)
    v = torch.rand(1, 4, 8, dtype=torch.float64)
    found = flatten_ext.attention(q, q, v, 2, focusing_factor=p, eps=1e-60)
    assert relative_error(found, v.mean(1, keepdim=True).expand_as(v)) < 1e-12
