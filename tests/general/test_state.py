"""The state: all that attention knows of its keys, additive over them."""

from __future__ import annotations

import math

import pytest
import torch
from general_cases import NORMALIZERS, General, leaves, results, upstream
from implementations import every_implementation

OF_KEYS = ("k", "v", "key_bias", "rotary", "key_weight", "normalizer_k")
OF_QUERIES = ("q", "normalizer_q", "normalizer", "similarity_scale", "gate", "gate_activation")
OF_BOTH = ("num_heads", "scale", "focusing_factor", "eps", "feature_map")

CASES = {
    "focused": General(feature_map="focused", scale=True, key_bias=True, p=2.5),
    "focused-weights": General(feature_map="focused", key_weight="keys", rotary="channels", gate="sigmoid"),
    "elu-rotary": General(feature_map="elu", rotary="heads", gate="silu"),
    "rala": General(feature_map="elu", rotary="heads", key_weight="heads", gate="none", key_bias=True),
    "mala": General(feature_map="elu", rotary="heads", normalizer="magnitude", similarity_scale=0.5),
    "inline": General(normalizer="subtract", similarity_scale=0.5, prefix=1),
    "relu-cross": General(feature_map="relu", keys=5, key_weight="heads", normalizer="subtract"),
    "polaformer": General(feature_map=None, head_dim=6, value_dim=2),
    "agent": General(feature_map=None, normalizer="none", similarity_scale=12.0, head_dim=3, value_dim=5),
    "apart": General(
        feature_map=None, normalizer_q=True, normalizer_k=True, rotary="heads", key_weight="keys",
        normalizer="magnitude", gate="silu", value_dim=3,
    ),
}  # fmt: skip


def through_a_state(operators, parts: int = 1):
    """attention, or linear_attention, as the two halves that a state joins; keys in so many parts."""

    def function(**arguments):
        arguments = {"feature_map": "none"} | arguments
        of_queries = {k: arguments[k] for k in (*OF_QUERIES, *OF_BOTH, "rotary") if k in arguments}
        return operators.attention_from_state(state=states(operators, arguments, parts), **of_queries)

    return function


def states(operators, arguments: dict, parts: int = 1):
    """The sum of the states of so many parts of the keys."""
    total = None
    for index in torch.arange(arguments["k"].shape[1]).tensor_split(parts):
        part = {k: arguments[k] for k in (*OF_KEYS, *OF_BOTH) if k in arguments}
        for name in ("k", "v", "key_weight", "normalizer_k"):
            if name in part:
                part[name] = part[name][:, index]
        for name in ("key_bias", "rotary"):
            if name in part:
                part[name] = part[name][index]
        state = operators.attention_state(**part)
        total = state if total is None else total + state
    return total


def operands(case: General, dtype=torch.float64) -> dict:
    arguments = case.arguments(dtype, seed=9)
    return {k: a for k, a in arguments.items() if k != "size"}


@every_implementation
@pytest.mark.parametrize("name", CASES)
def test_a_state_and_its_queries_are_attention(operators, name):
    """Values and every gradient, those that pass through the state included."""
    arguments = operands(CASES[name])
    grad_out = upstream(arguments)
    expected = results(getattr(operators, CASES[name].operator), arguments, grad_out)
    found = results(through_a_state(operators), arguments, grad_out)
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-12, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}"
        )


@every_implementation
@pytest.mark.parametrize("parts", [2, 5, 15])
@pytest.mark.parametrize("name", CASES)
def test_states_of_parts_add_up(operators, name, parts):
    """To that of the whole, to 1e-13 of its largest entry; some of 15 parts hold no key."""
    arguments = {"feature_map": "none"} | operands(CASES[name])
    whole, sum_of_parts = states(operators, arguments), states(operators, arguments, parts)
    assert (sum_of_parts - whole).abs().max() <= 1e-13 * whole.abs().max()
    found = through_a_state(operators, parts)(**arguments)
    torch.testing.assert_close(found, through_a_state(operators)(**arguments), rtol=1e-12, atol=1e-12)


@every_implementation
def test_what_a_state_holds(operators):
    arguments = operands(CASES["apart"])
    k, v, kd = arguments["k"], arguments["v"], arguments["normalizer_k"]
    w, table = arguments["key_weight"], arguments["rotary"]
    state = operators.attention_state(
        k, v, 2, feature_map="none", rotary=table, key_weight=w, normalizer_k=kd
    )  # fmt: skip
    assert state.shape == (2, 2, 5, 4)
    cos, sin = table.unbind(-1)
    for head in range(2):
        a, b = k[..., 4 * head : 4 * head + 4].unflatten(-1, (2, 2)).unbind(-1)
        kn = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        values = v[..., 3 * head : 3 * head + 3]
        of_head = state[:, head]
        torch.testing.assert_close(of_head[:, :4, :3], torch.einsum("bj,bjc,bjd->bcd", w, kn, values))
        torch.testing.assert_close(
            of_head[:, :4, 3], torch.einsum("bj,bjc->bc", w, kd[..., 4 * head : 4 * head + 4])
        )
        torch.testing.assert_close(of_head[:, 4, :3], torch.einsum("bj,bjd->bd", w, values))
        torch.testing.assert_close(of_head[:, 4, 3], w.sum(1))


@every_implementation
def test_frames_of_a_video_attend_to_the_past(operators):
    """Block-causal attention in constant memory: a running sum of the frames' states."""
    frames, per_frame = 4, 6
    case = General(size=(frames, per_frame), feature_map="relu", rotary="heads", normalizer="divide")
    arguments = operands(case)
    q, k, v, table = (arguments[name] for name in ("q", "k", "v", "rotary"))
    running = 0
    for frame in range(frames):
        now, past = slice(frame * per_frame, (frame + 1) * per_frame), slice(0, (frame + 1) * per_frame)
        running = running + operators.attention_state(
            k[:, now], v[:, now], 2, feature_map="relu", rotary=table[now]
        )  # fmt: skip
        found = operators.attention_from_state(q[:, now], running, 2, feature_map="relu", rotary=table[now])
        all_rows = operators.attention(
            q[:, past], k[:, past], v[:, past], 2, feature_map="relu", rotary=table[past]
        )  # fmt: skip
        torch.testing.assert_close(found, all_rows[:, now], rtol=1e-12, atol=1e-13)


@every_implementation
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_state_without_keys_gives_zeros(operators, normalizer, eps):
    arguments = General(feature_map="elu", key_weight="keys", normalizer=normalizer, eps=eps).arguments()
    arguments["key_weight"] = torch.zeros_like(arguments["key_weight"])
    arguments["k"].fill_(math.nan)
    found = results(through_a_state(operators), arguments, upstream(arguments))
    for name, value in found.items():
        assert (value == 0).all(), name


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_state_is_float32(operators, dtype):
    arguments = operands(CASES["rala"], dtype)
    part = {k: arguments[k] for k in (*OF_KEYS, *OF_BOTH) if k in arguments}
    state = operators.attention_state(**part)
    assert state.dtype == torch.float32
    wide = {k: a.double() if isinstance(a, torch.Tensor) else a for k, a in part.items()}
    expected = operators.attention_state(**wide)
    assert expected.dtype == torch.float64
    assert (state.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert through_a_state(operators)(**arguments).dtype == dtype


@every_implementation
@pytest.mark.parametrize("name", ["focused-weights", "rala", "apart"])
def test_gradcheck_through_a_state(operators, name):
    case = CASES[name]
    small = General(**{**case.__dict__, "size": (1, 3), "batch": 1, "head_dim": 2, "keys": None, "heads": 2})
    arguments = operands(small)
    names = list(leaves(arguments))
    tensors = [arguments[key].detach().requires_grad_() for key in names]

    def function(*tensors):
        return through_a_state(operators, parts=2)(**(arguments | dict(zip(names, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors, atol=1e-4)
