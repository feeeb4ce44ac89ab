"""torch.ops.flatten on the CPU against the float64 formula: values and gradients, every option and dtype."""

from __future__ import annotations

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    LAYOUTS,
    TENSORS,
    TOLERANCE,
    Case,
    assert_all_close,
    gradients,
    lay_out,
    oracle,
    oracle_gradients,
    positional,
    relative_error,
    replace,
    use_threads,
    widened,
    with_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flatten_ext import reference

attention = torch.ops.flatten.attention
CONV_CASES = [
    "taps",
    "no-bias",
    "taps-3x7",
    "taps-7x3",
    "taps-larger-than-map",
    "per-channel",
    "prefix",
    "shifted",
]
HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_formula(name, dtype):
    arguments = CASES[name].arguments(dtype)
    grad_out = torch.randn_like(arguments["q"])
    found = gradients(attention, arguments, grad_out)
    assert found["out"].dtype == dtype
    # With one token the weights are 1 whatever q and k are, so their gradients are rounding and eps.
    floor = 1.0 if name == "one-token" else 0.0
    assert_all_close(found, oracle_gradients(arguments, grad_out), TOLERANCE[dtype], floor)
    with torch.no_grad():
        assert torch.equal(attention(**arguments), found["out"])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["taps", "shifted", "prefix", "per-channel"])
def test_float32_parameters_beside_half_precision_tokens(name, dtype):
    arguments = CASES[name].arguments(dtype, param_dtype=torch.float32)
    grad_out = torch.randn_like(arguments["q"])
    found = gradients(attention, arguments, grad_out)
    assert_all_close(found, oracle_gradients(arguments, grad_out), TOLERANCE[dtype])
    for parameter in ("scale", "key_bias", "dwc_weight", "dwc_bias"):
        assert found[parameter].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["plain", "taps", "prefix", "cross", "shifted", "small-windows", "head-dim-20", "head-dim-64"]
)
def test_linear_attention(name, dtype):
    arguments = replace(CASES[name], p=None).arguments(dtype)
    grad_out = torch.randn_like(arguments["q"])
    expected = gradients(reference.linear_attention, widened(arguments), grad_out.double())
    assert_all_close(
        gradients(torch.ops.flatten.linear_attention, arguments, grad_out), expected, TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONV_CASES)
def test_depthwise_conv(name, dtype):
    case = CASES[name].arguments(dtype)
    arguments = {"x": case["v"], "weight": case["dwc_weight"], "bias": case.get("dwc_bias")}
    arguments |= {k: case.get(k) for k in ("size", "window", "shift")}
    grad_out = torch.randn_like(case["v"])
    expected = conv_gradients(reference.depthwise_conv, widened(arguments), grad_out.double())
    assert_all_close(
        conv_gradients(torch.ops.flatten.depthwise_conv, arguments, grad_out), expected, TOLERANCE[dtype]
    )


def conv_gradients(function, arguments: dict, grad_out: torch.Tensor) -> dict[str, torch.Tensor]:
    arguments = with_gradients(arguments, ("x", "weight", "bias"))
    out = function(**arguments)
    wanted = {k: a for k, a in arguments.items() if isinstance(a, torch.Tensor)}
    found = torch.autograd.grad(out, list(wanted.values()), grad_out)
    return {"out": out.detach(), **dict(zip(wanted, found, strict=True))}


@pytest.mark.parametrize("name", ["p1", "p2.5", "prefix", "shifted", "per-channel", "small-windows"])
def test_gradcheck_of_every_argument(name):
    case = CASES[name]
    small = Case(
        size=(2, 4) if case.window else (2, 3),
        heads=2,
        head_dim=5 if name == "small-windows" else 2,
        batch=2,
        prefix=min(case.prefix, 1),
        window=(2, 2) if case.window else None,
        shift=(1, 1) if case.shift else None,
        kernel=(3, 3),
        per_channel=case.per_channel,
        p=case.p,
    )
    arguments = with_gradients(small.arguments(torch.float64))
    names = [k for k, a in arguments.items() if isinstance(a, torch.Tensor)]

    def function(*tensors):
        return attention(**{**arguments, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(function, [arguments[k] for k in names])


@pytest.mark.parametrize("wanted", ["q", "k", "v", "scale", "key_bias", "dwc_weight", "dwc_bias"])
@pytest.mark.parametrize("name", ["shifted", "small-windows"])
def test_only_the_gradient_asked_for(name, wanted):
    arguments = CASES[name].arguments(torch.float64)
    expected = oracle_gradients(arguments, torch.ones_like(arguments["q"]))[wanted]
    arguments = with_gradients(arguments, (wanted,))
    (found,) = torch.autograd.grad(attention(**arguments).sum(), arguments[wanted])
    assert relative_error(found, expected) < 1e-11


@st.composite
def random_cases(draw) -> Case:
    windowed = draw(st.booleans())
    window = draw(st.tuples(st.integers(1, 5), st.integers(1, 5))) if windowed else None
    grid = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    size = (
        (window[0] * grid[0], window[1] * grid[1])
        if window
        else draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    )
    shift = None
    if window and draw(st.booleans()):
        shift = (draw(st.integers(0, window[0] - 1)), draw(st.integers(0, window[1] - 1)))
    odd = st.sampled_from([1, 3, 5, 7])
    cross = not windowed and draw(st.booleans())
    return Case(
        size=size,
        heads=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([1, 2, 3, 7, 8, 16, 17, 24, 32, 33, 48])),
        batch=draw(st.integers(1, 3)),
        prefix=0 if windowed else draw(st.integers(0, 3)),
        keys=draw(st.integers(1, 40)) if cross else None,
        window=window,
        shift=shift,
        kernel=None if cross else draw(st.none() | st.tuples(odd, odd)),
        per_channel=draw(st.booleans()),
        bias=draw(st.booleans()),
        scale=draw(st.booleans()),
        key_bias=draw(st.booleans()),
        p=draw(st.sampled_from([1.0, 1.7, 2.0, 3.0, 4.0, 5.0])),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=random_cases(), seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_random_options(case, seed, dtype):
    arguments = case.arguments(dtype, seed=seed)
    grad_out = torch.randn_like(arguments["q"])
    found, expected = gradients(attention, arguments, grad_out), oracle_gradients(arguments, grad_out)
    scale = max(torch.linalg.vector_norm(v).item() for k, v in expected.items() if k != "out")
    for name, value in expected.items():
        # A gradient may cancel to nothing (one token, one channel): then measure it by the largest of them.
        norm = torch.linalg.vector_norm(value).item() if name == "out" else scale
        difference = torch.linalg.vector_norm(found[name].double() - value).item()
        bound = TOLERANCE[dtype].out if name == "out" else TOLERANCE[dtype].gradient
        assert difference <= 4 * bound * max(norm, 1e-300), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype):
    arguments = CASES["shifted"].arguments(dtype)
    grad_out = torch.randn_like(arguments["q"])
    expected = gradients(attention, arguments, grad_out)
    strided = with_gradients(arguments)
    for name in ("q", "k", "v"):
        strided[name] = lay_out(arguments[name], layout).detach().requires_grad_()
    out = attention(**strided)
    assert torch.equal(out, expected["out"])
    found = torch.autograd.grad(out, [strided[n] for n in ("q", "k", "v")], lay_out(grad_out, layout))
    for name, value in zip(("q", "k", "v"), found, strict=True):
        assert torch.equal(value, expected[name])


def test_expanded_batch_and_gradient():
    arguments = CASES["taps"].arguments(torch.float64)
    arguments["k"] = arguments["k"][:1].expand(2, -1, -1)
    arguments["v"] = arguments["v"][:1].expand(2, -1, -1)
    expected = oracle_gradients(arguments, torch.ones(1, dtype=torch.float64).expand_as(arguments["q"]))
    assert relative_error(attention(**arguments), expected["out"]) < 1e-12
    strided = with_gradients(arguments, ("q",))
    strided["k"] = arguments["k"][:1].clone().requires_grad_()
    out = attention(**{**strided, "k": strided["k"].expand(2, -1, -1)})
    out.sum().backward()
    assert relative_error(strided["k"].grad, expected["k"].sum(0, keepdim=True)) < 1e-12


def test_offsets_beyond_32_bits():
    # The second image begins 2^31 elements after the first; the gap is never touched.
    stride = 2**31 + 2**20
    case = Case(size=(3, 4), heads=2, head_dim=8)
    arguments = case.arguments(torch.float16)
    torch.utils.deterministic.fill_uninitialized_memory = False
    memory = torch.empty(stride + 10_000, dtype=torch.float16)
    far = memory.as_strided(arguments["q"].shape, (stride, 16, 1))
    far.copy_(arguments["q"])
    assert torch.equal(attention(**{**arguments, "q": far}), attention(**arguments))


@pytest.mark.parametrize("kernel", [None, (5, 5)])
def test_sums_over_a_long_map_keep_their_precision(kernel):
    """In one chain 2^16 float32 terms are off by 1e-5. Also without taps, which hide that in the output."""
    arguments = Case(size=(256, 256), heads=1, batch=1, kernel=kernel).arguments()
    grad_out = torch.randn(arguments["q"].shape, generator=torch.Generator().manual_seed(1))
    expected = oracle_gradients(arguments, grad_out)
    found = gradients(attention, arguments, grad_out)
    for name, value in found.items():
        assert relative_error(value, expected[name]) <= TOLERANCE[torch.float32].gradient, name


def test_sums_of_a_long_convolution_keep_their_precision():
    arguments = Case(size=(256, 256), heads=1, batch=1).arguments()
    grad_out = torch.randn(arguments["v"].shape, generator=torch.Generator().manual_seed(1))
    call: dict = {"x": arguments["v"], "weight": arguments["dwc_weight"], "bias": arguments["dwc_bias"]}
    call["size"] = arguments["size"]
    expected = conv_gradients(reference.depthwise_conv, widened(call), grad_out.double())
    found = conv_gradients(torch.ops.flatten.depthwise_conv, call, grad_out)
    for name, value in found.items():
        assert relative_error(value, expected[name]) <= TOLERANCE[torch.float32].gradient, name


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["large-map", "shifted", "batch-1-many-blocks"])
def test_bitwise_deterministic(name, threads):
    arguments = CASES[name].arguments(torch.float32)
    grad_out = torch.randn_like(arguments["q"])
    with use_threads(threads):
        runs = [gradients(attention, arguments, grad_out) for _ in range(3)]
    for run in runs[1:]:
        for key, value in run.items():
            assert torch.equal(value, runs[0][key]), key
    assert_all_close(runs[0], oracle_gradients(arguments, grad_out), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 4.0, 8.0])
@pytest.mark.parametrize("magnitude", [1.0, 10.0, 100.0, 1e4])
@pytest.mark.parametrize("head_dim", [8, 32])  # less and more than the 20 tokens
def test_finite_for_every_magnitude(head_dim, magnitude, p, dtype):
    """Dead tokens and heads included; the public code gives NaN from p = 4 or, in fp16, from magnitude 10."""
    case = Case(size=(5, 4), heads=2, head_dim=head_dim, kernel=None, key_bias=False, p=p)
    arguments = case.arguments(dtype)
    for name in ("q", "k"):
        arguments[name] *= magnitude
        arguments[name][0, 3] = -arguments[name][0, 3].abs()  # a dead token
        arguments[name][1, :, head_dim:] = -1.0  # a dead head
        arguments[name][1, 2] = 0.0
    grad_out = torch.randn_like(arguments["q"])
    expected = oracle_gradients(arguments, grad_out)
    found = gradients(attention, arguments, grad_out)
    largest = torch.finfo(dtype).max
    for name, value in expected.items():
        if value.abs().max() < largest:
            assert torch.isfinite(found[name]).all(), name
    assert relative_error(found["out"], expected["out"]) <= TOLERANCE[dtype].out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1e-4, 3.0, 30.0, 1e4])
@pytest.mark.parametrize("name", ["taps", "small-7x7", "p8"])
def test_any_scale(name, factor, dtype):
    """Large ones make y^2p of a channel that is not positive a subnormal number, or 0."""
    arguments = CASES[name].arguments(dtype)
    arguments["scale"] *= factor
    grad_out = torch.randn_like(arguments["q"])
    found = gradients(attention, arguments, grad_out)
    assert_all_close(found, oracle_gradients(arguments, grad_out), TOLERANCE[dtype])


def test_all_keys_dead_with_high_power():
    arguments = Case(size=(3, 3), p=8.0, kernel=None, key_bias=False).arguments(torch.float32)
    arguments["k"] = -arguments["k"].abs()
    assert relative_error(attention(**arguments), oracle(arguments)) < 3e-6


@pytest.mark.parametrize("head_dim", [8, 16])  # less and more than the 9 tokens
def test_zero_eps_and_dead_rows_give_zero_features(head_dim):
    arguments = Case(size=(3, 3), head_dim=head_dim, kernel=None, key_bias=False).arguments(torch.float64)
    arguments["eps"] = 0.0
    arguments["k"][:, 2] = -1.0
    grad_out = torch.randn_like(arguments["q"])
    found, expected = gradients(attention, arguments, grad_out), oracle_gradients(arguments, grad_out)
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 9])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_key_bias_gradient_wherever_it_is_summed(threads, batch, head_dim, dtype):
    """In its own memory or beside it, stored or added, and zero for keys that are dead."""
    arguments = Case(batch=batch, size=(16, 16), heads=2, head_dim=head_dim).arguments(dtype)
    arguments["eps"] = 0.0
    arguments["k"][:, 5] = -10.0
    arguments["key_bias"] = arguments["key_bias"].to(dtype)
    grad_out = torch.randn_like(arguments["q"])
    with use_threads(threads):
        found = gradients(attention, arguments, grad_out)["key_bias"]
    expected = oracle_gradients(arguments, grad_out)["key_bias"]
    assert torch.equal(found[5], torch.zeros_like(found[5]))
    assert relative_error(found, expected) <= TOLERANCE[dtype].gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["taps", "shifted", "head-dim-20", "small-windows", "batch-1-many-blocks"])
@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_windows_may_be_saved(threads, name, dtype):
    """The others' sums are computed again; the gradients are the same to the last bit."""
    arguments = CASES[name].arguments(dtype)
    rest = positional(arguments)
    windows = CASES[name].windows
    grad_out = torch.randn_like(arguments["q"])
    mask = [isinstance(arguments.get(tensor), torch.Tensor) for tensor in TENSORS]
    with use_threads(threads):
        states = [torch.ops.flatten.attention_forward(*rest, n)[1] for n in range(windows + 1)]
        found = [torch.ops.flatten.attention_backward(grad_out, *rest, state, mask) for state in states]
    each = (CASES[name].head_dim + 1) * rest[0].shape[2]
    assert [state.numel() for state in states] == [n * each for n in range(windows + 1)]
    for gradient in zip(*found, strict=True):
        assert all(torch.equal(g, gradient[0]) for g in gradient)


def test_a_saved_state_is_used():
    arguments = positional(CASES["taps"].arguments(torch.float32))
    mask = [True] * 7
    grad_out = torch.randn_like(arguments[0])
    state = torch.ops.flatten.attention_forward(*arguments, 1)[1]
    with_state, with_other = (
        torch.ops.flatten.attention_backward(grad_out, *arguments, s, mask)[0] for s in (state, 2 * state)
    )
    differs = (with_state != with_other).flatten(1).any(1)
    assert differs.sum() == 1  # the saved window's image


@pytest.mark.parametrize(
    ("case", "dtype", "saved"),
    [
        (Case(size=(28, 28), batch=3, heads=1, head_dim=32), torch.float32, 3),
        (Case(size=(14, 14), batch=8, heads=1, head_dim=32), torch.float32, 7),  # S and m: 5.6 % of q, k, v
        (Case(size=(14, 14), batch=8, heads=1, head_dim=32), torch.bfloat16, 3),
        (Case(size=(14, 14), window=(7, 7), batch=8, heads=1, head_dim=32), torch.float32, 7),
        (Case(size=(7, 7), batch=64, heads=1, head_dim=64), torch.float32, 0),  # S is larger than k
    ],
    ids=str,
)
def test_a_twentieth_of_the_tokens_memory_is_saved(case, dtype, saved):
    arguments = case.arguments(dtype, param_dtype=torch.float32)
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        attention(**with_gradients(arguments))
    each = (case.head_dim + 1) * case.heads * case.head_dim
    (state,) = [t for t in kept if t.dim() == 1 and t.numel() == saved * each]
    tokens = sum(arguments[name].nbytes for name in ("q", "k", "v"))
    assert state.nbytes <= tokens / 20 < state.nbytes + each * state.element_size() or saved in (
        0,
        case.batch,
    )


@pytest.mark.parametrize(("batch", "tokens"), [(0, 12), (2, 0)])
def test_empty(batch, tokens):
    q = torch.randn(batch, tokens, 8, requires_grad=True)
    k = torch.randn(batch, 12, 8, requires_grad=True)
    scale = torch.ones(8, requires_grad=True)
    out = attention(q, k, k, 2, scale)
    assert out.shape == (batch, tokens, 8)
    out.sum().backward()
    assert q.grad.shape == q.shape
    assert torch.equal(k.grad, torch.zeros_like(k))
    assert torch.equal(scale.grad, torch.zeros(8))
