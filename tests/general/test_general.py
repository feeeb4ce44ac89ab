"""The general form against an oracle that was written independently, and its derivatives of every kind."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import CASES, TOLERANCE, replace
from general_cases import NAMED, NORMALIZERS, General, drawn, leaves, results, upstream
from implementations import every_implementation

from flatten_ext import reference

DRAWN = 120


def check(operators, case: General, seed: int, tolerance: float = 1e-12) -> None:
    arguments = case.arguments(seed=seed)
    grad_out = upstream(arguments)
    expected = results(oracle.attention, arguments, grad_out)
    found = results(getattr(operators, case.operator), arguments, grad_out)
    largest = max(torch.linalg.vector_norm(value) for value in expected.values())
    for name, value in expected.items():
        error = torch.linalg.vector_norm(found[name] - value)
        error = error / torch.linalg.vector_norm(value).clamp_min(1e-3 * largest)
        assert error <= tolerance, f"{name}: {error:.1e} in {case}"


@every_implementation
@pytest.mark.parametrize("name", NAMED)
def test_named_combinations(operators, name):
    check(operators, NAMED[name], seed=3)


@every_implementation
@pytest.mark.parametrize("seed", range(DRAWN))
def test_random_combinations(operators, seed):
    check(operators, drawn(seed), seed)


def test_the_draw_reaches_every_option():
    cases = [drawn(seed) for seed in range(DRAWN)]
    for option in ("normalizer", "gate", "rotary", "key_weight", "feature_map", "taps", "kernel"):
        seen = {getattr(case, option) for case in cases}
        possible = {getattr(drawn(seed), option) for seed in range(1000)}
        assert seen == possible, option
    assert sum(case.rotary is not None and case.window is not None for case in cases) > 10
    assert sum(case.key_weight is not None and case.shift is not None for case in cases) > 5
    assert sum(case.keys is not None and case.key_weight is not None for case in cases) > 3


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMED)
def test_lower_precision(operators, name, dtype):
    """Against float64 on the same rounded numbers. Differences of large terms (magnitude) lose a digit."""
    case = NAMED[name]
    arguments = case.arguments(dtype, seed=3)
    wide = {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
    grad_out = upstream(arguments).to(dtype)
    expected = results(getattr(reference, case.operator), wide, grad_out.double())
    found = results(getattr(operators, case.operator), arguments, grad_out)
    largest = max(torch.linalg.vector_norm(value) for value in expected.values())
    assert found["out"].dtype == dtype
    for key, value in expected.items():
        if key in arguments:
            assert found[key].dtype == arguments[key].dtype
        error = torch.linalg.vector_norm(found[key].double() - value)
        error = error / torch.linalg.vector_norm(value).clamp_min(1e-2 * largest)
        assert error <= TOLERANCE[dtype].out * (10 if case.normalizer == "magnitude" else 2), (
            f"{key}: {error:.1e}"
        )


SMALL = {
    "attention": General(
        size=(2, 2), batch=1, feature_map="elu", kernel=(3, 3), taps="image", rotary="heads",
        key_weight="heads", gate="silu", normalizer="magnitude", similarity_scale=0.7, key_bias=True,
        head_dim=2,
    ),
    "focused": General(
        size=(2, 2), batch=1, feature_map="focused", scale=True, key_bias=True, rotary="channels",
        key_weight="keys", gate="sigmoid", normalizer="subtract", head_dim=2, kernel=(1, 3), prefix=1,
    ),
    "windows": General(
        size=(2, 4), window=(2, 2), shift=(1, 1), batch=1, feature_map="elu", rotary="heads",
        key_weight="keys", gate="none", head_dim=2, heads=1,
    ),
    "linear": General(
        size=(2, 2), batch=2, feature_map=None, normalizer_q=True, normalizer_k=True, value_dim=3, head_dim=2,
        key_weight="keys", rotary="heads", gate="silu", heads=1,
    ),
    "relu-none": General(
        size=(1, 3), batch=1, feature_map="relu", normalizer="none", gate="none", head_dim=2,
    ),
}  # fmt: skip


def _function(operators, case: General):
    arguments = case.arguments(seed=5)
    names = list(leaves(arguments))
    tensors = [arguments[name].detach().requires_grad_() for name in names]

    def function(*tensors):
        return getattr(operators, case.operator)(**(arguments | dict(zip(names, tensors, strict=True))))

    return function, tensors


@every_implementation
@pytest.mark.parametrize("name", SMALL)
def test_gradcheck_of_every_argument(operators, name):
    function, tensors = _function(operators, SMALL[name])
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)


@every_implementation
@pytest.mark.parametrize("name", SMALL)
def test_second_derivatives(operators, name):
    function, tensors = _function(operators, SMALL[name])
    assert torch.autograd.gradgradcheck(function, tensors, atol=1e-4)


@every_implementation
@pytest.mark.parametrize("name", ["mlla", "rala", "inline", "masked-windows", "apart"])
def test_vmap(operators, name):
    """One call for a stack of calls, in which tables and options are shared."""
    case = NAMED[name]
    stacks = [case.arguments(seed=seed) for seed in range(3)]
    names = list(leaves(stacks[0]))
    shared = {key: x for key, x in stacks[0].items() if key not in names}

    def function(*tensors):
        return getattr(operators, case.operator)(**shared, **dict(zip(names, tensors, strict=True)))

    one_by_one = torch.stack([function(*(stack[key] for key in names)) for stack in stacks])
    at_once = torch.vmap(function)(*(torch.stack([stack[key] for stack in stacks]) for key in names))
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-12, atol=1e-12)


@every_implementation
@pytest.mark.parametrize("name", ["taps", "prefix", "cross", "shifted", "per-channel", "p2.5"])
def test_the_defaults_of_the_new_arguments_change_nothing(operators, name):
    arguments = CASES[name].arguments(torch.float32)
    defaults = {
        "rotary": None, "key_weight": None, "normalizer": "divide", "similarity_scale": 1.0, "gate": None,
        "gate_activation": "none",
    }  # fmt: skip
    for function, call, more in (
        (operators.attention, arguments, {"feature_map": "focused"}),
        (
            operators.linear_attention,
            replace(CASES[name], p=None).arguments(),
            {"normalizer_q": None, "normalizer_k": None},
        ),
    ):
        old, new = results(function, call), results(function, {**call, **defaults, **more})
        for key in old:
            assert torch.equal(old[key], new[key]), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_plain_call_is_the_plain_formula_bit_by_bit(dtype):
    """The reference's old calls: one product, one mean, one division, as before the general form."""
    arguments = replace(CASES["plain"], p=None).arguments(dtype)

    def plain(q, k, v, num_heads, eps):
        q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        s = k.transpose(-2, -1) @ v / k.shape[-2]
        out = (q @ s) / ((q * k.mean(-2, keepdim=True)).sum(-1, keepdim=True) + eps)
        return out.transpose(1, 2).flatten(-2)

    grad_out = upstream(arguments)
    expected = results(plain, arguments, grad_out)
    found = results(reference.linear_attention, arguments, grad_out)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@every_implementation
def test_weights_that_are_all_the_same_are_no_weights(operators):
    arguments = NAMED["masked-windows"].arguments()
    weight = arguments.pop("key_weight")
    expected = operators.attention(**arguments)
    for value in (1.0, 0.125, 7.0):
        out = operators.attention(**arguments, key_weight=torch.full_like(weight, value))
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)


@every_implementation
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_turn_by_nothing_changes_nothing(operators, normalizer):
    arguments = General(feature_map="elu", rotary="heads", normalizer=normalizer).arguments()
    table = arguments.pop("rotary")
    still = torch.stack((torch.ones_like(table[..., 0]), torch.zeros_like(table[..., 0])), -1)
    assert torch.equal(operators.attention(**arguments, rotary=still), operators.attention(**arguments))


@every_implementation
def test_elu_keeps_small_features(operators):
    """elu(x) + 1 of -30 is 9.4e-14; through elu, it would be 1 - 1 in float32."""
    q = torch.full((1, 3, 4), -30.0)
    v = torch.randn(1, 3, 4)
    out = operators.attention(q, q, v, 1, feature_map="elu", eps=0.0)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(v))


@every_implementation
def test_slopes_at_exact_zeros(operators):
    """Zeros do occur (padding, ReLU before): torch's slopes there are 1 of elu and 0 of relu."""
    for feature_map, slope in (("elu", 1.0), ("relu", 0.0)):
        q = torch.zeros(1, 2, 2, dtype=torch.float64).requires_grad_()
        k = torch.tensor([[[1.0, 2.0], [3.0, 0.5]]], dtype=torch.float64)
        v = torch.tensor([[[1.0], [-2.0]]], dtype=torch.float64).repeat(1, 1, 2)
        out = operators.attention(q, k, v, 1, feature_map=feature_map, normalizer="none")
        (found,) = torch.autograd.grad(out.sum(), q)
        features = torch.nn.functional.elu(k) + 1 if feature_map == "elu" else k
        expected = slope * 2 * (features * v[..., :1]).mean(1, keepdim=True).expand_as(q)
        torch.testing.assert_close(found, expected)
