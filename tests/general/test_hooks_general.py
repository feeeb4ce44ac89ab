"""What torch asks of an operator, for the general form's arguments and the state operators."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from general_cases import NAMED, General, leaves, results, upstream
from torch.utils.flop_counter import FlopCounterMode

import flatten_ext
from flatten_ext import reference

ops = torch.ops.flatten
STATES = {
    "elu": General(feature_map="elu", rotary="heads", key_weight="heads", gate="silu", key_bias=True),
    "focused": General(feature_map="focused", scale=True, key_bias=True, p=2.5, normalizer="subtract"),
    "apart": General(
        feature_map="none", normalizer_q=True, normalizer_k=True, key_weight="keys", normalizer="magnitude",
        gate="sigmoid",
    ),
}  # fmt: skip


def with_gradients(arguments: dict) -> dict:
    tensors = {n: t.detach().clone().requires_grad_() for n, t in leaves(arguments).items()}
    return arguments | tensors


def state_calls(case: General, dtype=torch.float64) -> tuple[dict, dict]:
    """Arguments of attention_state, and of attention_from_state but for the state."""
    a = case.arguments(dtype, seed=2)
    both = {
        n: a[n] for n in ("num_heads", "scale", "focusing_factor", "eps", "feature_map", "rotary") if n in a
    }
    of_keys = ("k", "v", "key_bias", "key_weight", "normalizer_k")
    of_queries = ("q", "normalizer_q", "normalizer", "similarity_scale", "gate", "gate_activation")
    return (
        both | {n: a[n] for n in of_keys if n in a}, both | {n: a[n] for n in of_queries if n in a},
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_opcheck(name):
    case = NAMED[name]
    operator = getattr(ops, case.operator).default
    torch.library.opcheck(operator, (), with_gradients(case.arguments(torch.float32)))


@pytest.mark.parametrize("name", STATES)
def test_opcheck_of_the_states(name):
    of_keys, of_queries = state_calls(STATES[name], torch.float32)
    torch.library.opcheck(ops.attention_state.default, (), with_gradients(of_keys))
    state = ops.attention_state(**of_keys).requires_grad_()
    torch.library.opcheck(ops.attention_from_state.default, (), with_gradients(of_queries) | {"state": state})


def test_opcheck_of_the_operators_below():
    case = NAMED["rala"]
    a = case.arguments(torch.float32)
    q, k, v = a["q"], a["k"], a["v"]
    call = {n: a.get(n) for n in ("scale", "key_bias", "dwc_weight", "dwc_bias", "size", "window", "shift")}
    call |= {n: a[n] for n in a if n not in ("q", "k", "v", *call)}
    torch.library.opcheck(ops.attention_forward.default, (q, k, v), {**call, "saved_windows": 1})
    _, state = ops.attention_forward(q, k, v, **call, saved_windows=1)
    mask = [True, False, True, False, False, True, False, False, True, True, False, False]
    torch.library.opcheck(
        ops.attention_backward.default,
        (torch.randn_like(v), q, k, v),
        {**call, "state": state, "output_mask": mask},
    )
    taps = torch.randn(2, 8, 1, 3, 3, requires_grad=True)
    x = torch.randn(2, 12, 8, requires_grad=True)
    torch.library.opcheck(ops.depthwise_conv.default, (x, taps, None, [3, 4]))


@pytest.mark.parametrize("name", [name for name in NAMED if NAMED[name].operator == "attention"])
def test_every_number_of_a_saved_state_is_written(name):
    """opcheck, and whoever keeps a graph's results, compares all of it: it may not show what memory held."""
    call = dict.fromkeys(("scale", "key_bias", "dwc_weight", "dwc_bias", "size", "window", "shift"))
    call |= NAMED[name].arguments(torch.float32)
    _, state = ops.attention_forward(**call, saved_windows=1)
    for _ in range(8):  # the allocator hands out what was freed last
        dirty = [torch.full_like(state, float("nan")) for _ in range(64)]
        del dirty
        _, again = ops.attention_forward(**call, saved_windows=1)
        assert torch.equal(again, state)


@pytest.mark.parametrize("name", STATES)
def test_derivatives_through_states(name):
    of_keys, of_queries = state_calls(replace(STATES[name], size=(1, 3), head_dim=2, batch=1))
    keys, queries = list(leaves(of_keys)), [n for n in leaves(of_queries) if n not in leaves(of_keys)]

    def function(*tensors):
        given = dict(zip((*keys, *queries), tensors, strict=True))
        k = of_keys | {n: given[n] for n in keys}
        q = of_queries | {n: given[n] for n in (*queries, "scale") if n in given}
        return ops.attention_from_state(state=ops.attention_state(**k), **q)

    tensors = [(of_keys | of_queries)[n].detach().requires_grad_() for n in (*keys, *queries)]
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, tensors, atol=1e-4)


@pytest.mark.parametrize("name", STATES)
def test_vmap_of_states(name):
    of_keys, of_queries = state_calls(STATES[name])
    names = [n for n in leaves(of_keys) if n not in ("scale", "key_bias")]
    stack = {n: torch.stack([of_keys[n], 2 * of_keys[n], of_keys[n] + 1]) for n in names}

    def function(*tensors):
        return ops.attention_state(**(of_keys | dict(zip(names, tensors, strict=True))))

    states = torch.vmap(function)(*stack.values())
    one_by_one = torch.stack([function(*(t[i] for t in stack.values())) for i in range(3)])
    torch.testing.assert_close(states, one_by_one, rtol=1e-12, atol=1e-12)
    out = torch.vmap(lambda state: ops.attention_from_state(state=state, **of_queries))(states)
    expected = torch.stack([ops.attention_from_state(state=state, **of_queries) for state in states])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_tokens_and_nothing_else(dtype):
    case = General(
        feature_map=None, rotary="heads", key_weight="keys", gate="silu", normalizer_q=True,
        normalizer_k=True,
    )  # fmt: skip
    a = case.arguments(torch.float32)
    tokens = ("q", "k", "v", "gate", "normalizer_q", "normalizer_k")
    cast = a | {n: a[n].to(dtype) for n in tokens}
    assert a["rotary"].dtype == a["key_weight"].dtype == torch.float32
    expected = results(ops.linear_attention, cast, upstream(a))
    with torch.autocast("cpu", dtype):
        found = results(ops.linear_attention, a, upstream(a))
    assert found["out"].dtype == dtype
    for n, value in expected.items():
        assert torch.equal(found[n], value.to(found[n].dtype)), n


def test_states_are_float32_under_autocast():
    of_keys, of_queries = state_calls(STATES["elu"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        state = ops.attention_state(**of_keys)
        out = ops.attention_from_state(state=state, **of_queries)
    assert state.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    low = {n: t.bfloat16() if n in ("k", "v") else t for n, t in of_keys.items()}
    assert torch.equal(state, ops.attention_state(**low))


def test_a_backward_under_autocast_is_as_precise():
    a = with_gradients(NAMED["mlla"].arguments(torch.float32))
    tensors = list(leaves(a).values())
    plain = torch.autograd.grad(ops.attention(**a).sum(), tensors)
    out = ops.attention(**a).sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out, tensors)
    for x, y in zip(plain, found, strict=True):
        assert torch.equal(x, y)


class Block(torch.nn.Module):
    def forward(self, q, k, v, gate, weight):
        size = (q.shape[1] // 4, 4)
        table = flatten_ext.rotary_table(size, 8, 2)
        out = flatten_ext.attention(
            q, k, v, 2, size=size, feature_map="elu", rotary=table, key_weight=weight, normalizer="magnitude",
            gate=gate, gate_activation="silu",
        )  # fmt: skip
        state = flatten_ext.attention_state(k, v, 2, feature_map="relu", key_weight=weight)
        return out + flatten_ext.attention_from_state(q, state, 2, feature_map="relu", normalizer="subtract")


def inputs(batch: int, rows: int) -> list[torch.Tensor]:
    q, k, v, gate = torch.randn(4, batch, 4 * rows, 8)
    return [q, k, v, gate, torch.rand(batch, 4 * rows)]


def test_compile_without_break_or_recompile():
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(Block(), fullgraph=True, dynamic=True, backend=counter)
    for batch, rows in ((2, 3), (3, 5), (2, 7)):
        given = inputs(batch, rows)
        torch.testing.assert_close(compiled(*given), Block()(*given))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": torch.randn(2, 12)}, r"flatten\.attention: v has shape \(2, 12\)"),
        ({"num_heads": 0}, r"flatten\.attention: num_heads is 0"),
        ({"gate": torch.randn(2, 12, 7)}, r"flatten\.attention: gate has shape \(2, 12, 7\)"),
        ({"normalizer": "mean"}, r"flatten\.attention: normalizer must be"),
    ],
)
def test_a_compiled_call_says_what_is_wrong(changes, message):
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 2, 12, 8).unbind()
    arguments = {"q": q, "k": k, "v": v, "num_heads": 2, "feature_map": "elu", **changes}
    compiled = torch.compile(lambda: flatten_ext.attention(**arguments), backend="eager")
    with pytest.raises(Exception, match=message):
        compiled()


def test_compile_training():
    torch._dynamo.reset()
    compiled = torch.compile(Block(), fullgraph=True, backend="aot_eager")
    given = [t.requires_grad_() for t in inputs(2, 3)]
    expected = torch.autograd.grad(Block()(*given).square().sum(), given)
    found = torch.autograd.grad(compiled(*given).square().sum(), given)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_export_keeps_the_operators_and_decomposes_to_the_formula():
    given = inputs(2, 3)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Block(), tuple(given), dynamic_shapes=[{0: batch}] * 5)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    for name in ("attention", "attention_state", "attention_from_state"):
        assert f"flatten.{name}.default" in called
    other = inputs(5, 3)
    torch.testing.assert_close(program.module()(*other), Block()(*other))
    plain = program.run_decompositions(flatten_ext.decompositions())
    assert not any("flatten." in str(node.target) for node in plain.graph.nodes)
    torch.testing.assert_close(plain.module()(*other), Block()(*other))


def test_jit_trace():
    given = inputs(2, 3)
    traced = torch.jit.trace(Block(), given)
    other = inputs(2, 3)
    torch.testing.assert_close(traced(*other), Block()(*other))


def test_flop_formulas():
    a = General(feature_map=None, value_dim=6, kernel=(3, 3), taps="image").arguments(torch.float32)
    with FlopCounterMode(display=False) as counter:
        ops.linear_attention(**a)
    taps = 2 * 9 * 2 * 12 * 2 * 6
    assert counter.get_total_flops() == 2 * (2 * 12 * 8 * 6 + 2 * 12 * 8 * 7) + taps
    of_keys, of_queries = state_calls(STATES["elu"], torch.float32)
    with FlopCounterMode(display=False) as counter:
        state = ops.attention_state(**of_keys)
    assert counter.get_total_flops() == 2 * 2 * 12 * 8 * 4
    with FlopCounterMode(display=False) as counter:
        ops.attention_from_state(state=state, **of_queries)
    assert counter.get_total_flops() == 2 * 2 * 12 * 8 * 5


@pytest.mark.parametrize("depth", [1, 2])
def test_nested_functorch_grad(depth):
    a = General(
        feature_map="elu", key_weight="keys", gate="silu", batch=1, normalizer="magnitude"
    ).arguments()

    def along(function):
        def scalar(weight, gate):
            return function(**(a | {"key_weight": weight, "gate": gate})).square().sum()

        for _ in range(depth):
            scalar = (lambda inner: lambda w, g: torch.func.grad(inner)(w, g).square().sum())(scalar)
        return torch.func.grad(scalar, argnums=(0, 1))(a["key_weight"], a["gate"])

    for x, y in zip(along(ops.attention), along(reference.attention), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_meta_tensors():
    a = General(feature_map=None, value_dim=3, gate="silu", key_weight="heads").arguments(torch.float16)
    meta = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in a.items()}
    out = ops.linear_attention(**meta)
    assert (out.shape, out.dtype, out.device.type) == ((2, 12, 6), torch.float16, "meta")
    of_keys, _ = state_calls(STATES["elu"], torch.float16)
    state = ops.attention_state(
        **{n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in of_keys.items()}
    )
    assert (state.shape, state.dtype) == ((2, 2, 5, 5), torch.float32)
