"""The operators on CUDA inside torch: streams, devices, graphs, autocast, compile, checks, determinism."""

from __future__ import annotations

import pytest
import torch
from cases import EMULATED, TENSORS, Call, assert_close, half, make, on_map

SMALL = on_map(14, 14, heads=2, window=(7, 7), shift=(2, 3), kernel=(5, 5), key_bias=True)
LARGE = on_map(18, 20, batch=1, heads=2, kernel=(5, 5), key_bias=True)
CALLS = [SMALL, LARGE, half(SMALL), half(LARGE)]


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_opcheck(case):
    torch.library.opcheck(torch.ops.flatten.attention.default, tuple(make(case).positional()))


def test_opcheck_of_the_other_operators():
    call = make(on_map(8, 8, prefix=1, kernel=(3, 3), p=None, heads=1, head_dim=16))
    q, k, v, _, _, weight, bias = call.tensors
    torch.library.opcheck(torch.ops.flatten.linear_attention.default, (q, k, v, 1, weight, bias, (8, 8)))
    torch.library.opcheck(torch.ops.flatten.depthwise_conv.default, (v, weight, bias, (8, 8)))


@pytest.mark.parametrize(
    "case",
    [
        on_map(2, 3, batch=1, prefix=1, head_dim=3, kernel=(3, 3), key_bias=True, dtype=torch.float64),
        on_map(
            2, 4, batch=1, window=(1, 4), shift=(0, 1), kernel=(1, 3), p=2.5, head_dim=2, dtype=torch.float64
        ),
        on_map(1, 3, keys=5, head_dim=2, p=None, dtype=torch.float64),
    ],
    ids=str,
)
def test_gradcheck(case):
    call = make(case)
    names = [name for name in TENSORS if name in call.arguments]
    inputs = [call.arguments[name] for name in names]

    def function(*tensors):
        return Call(case, call.arguments | dict(zip(names, tensors, strict=True)), call.grad_out).run()

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_results_are_deterministic(case):
    first, second = make(case), make(case)
    assert torch.equal(first.run(), second.run())
    gradients = second.gradients()
    for name, gradient in first.gradients().items():
        assert torch.equal(gradient, gradients[name]), name


def test_runs_on_the_current_stream():
    call = make(LARGE)
    want, gradients = call.run(), call.gradients()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if not EMULATED:
            torch.cuda._sleep(10_000_000)  # whatever runs on another stream now runs too early
        with torch.no_grad():
            call.tensors[0].neg_()
            call.tensors[0].neg_()
        got = call.run()
        again = torch.autograd.grad(got, [t for t in call.tensors if t is not None], call.grad_out)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, want)
    for a, b in zip(again, gradients.values(), strict=True):
        assert torch.equal(a, b)


def test_runs_on_the_tensors_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    call, there = make(LARGE), make(LARGE, "cuda:1")
    with torch.cuda.device(0):
        out, gradients = there.run(), there.gradients()
    assert out.device == torch.device("cuda:1")
    assert torch.equal(out.cpu(), call.run().cpu())
    for name, gradient in call.gradients().items():
        assert torch.equal(gradients[name].cpu(), gradient.cpu()), name


@pytest.mark.parametrize("case", CALLS, ids=str)
@pytest.mark.usefixtures("real_gpu")
def test_cuda_graph(case):
    torch.use_deterministic_algorithms(False)  # its filling of fresh memory is no part of the graph
    call = make(case)
    inputs = [t for t in call.tensors if t is not None]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(call.run(), inputs, call.grad_out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call.run()
        gradients = torch.autograd.grad(out, inputs, call.grad_out)
    other = make(case, seed=1)
    with torch.no_grad():
        for t, new in zip(call.tensors, other.tensors, strict=True):
            if t is not None:
                t.copy_(new)
        call.grad_out.copy_(other.grad_out)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, other.run())
    for got, want in zip(gradients, other.gradients().values(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    call = make(LARGE)
    with torch.autocast("cuda", dtype):
        out = call.run()
    assert out.dtype == dtype
    cast = make(half(LARGE, dtype))
    assert torch.equal(out, cast.run())
    for name, gradient in zip(
        TENSORS, torch.autograd.grad(out, call.tensors, call.grad_out.to(dtype)), strict=True
    ):
        assert gradient.dtype == torch.float32, name
        assert_close(gradient, cast.gradients()[name].cpu().double(), 1e-5, name)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, dynamic, request):
    if backend == "inductor":
        request.getfixturevalue("real_gpu")
    call = make(on_map(12, 12, batch=2, heads=1, head_dim=16, kernel=(3, 3)))

    def function(q, k, v, scale, weight, bias):
        return torch.ops.flatten.attention(q * 1, k, v, 1, scale, None, weight, bias, (12, 12)).sin()

    inputs = [t for t in call.tensors if t is not None]
    want = function(*inputs)
    got = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    assert_close(got, want.detach().cpu().double(), 1e-6, "out")
    expected = torch.autograd.grad(want, inputs, call.grad_out)
    for a, b in zip(torch.autograd.grad(got, inputs, call.grad_out), expected, strict=True):
        assert_close(a, b.cpu().double(), 1e-5, "gradient")


def q_k_v(**changed) -> dict:
    tensors = {name: torch.ones(2, 64, 32, device="cuda") for name in "qkv"}
    return {**tensors, "num_heads": 2, **changed}


ERRORS = {
    "k on another device": (lambda: q_k_v(k=torch.ones(2, 64, 32)), "k is on cpu, expected q's device cuda"),
    "scale on another device": (lambda: q_k_v(scale=torch.ones(32)), "scale is on cpu"),
    "k in another dtype": (
        lambda: q_k_v(k=torch.ones(2, 64, 32, device="cuda", dtype=torch.float16)),
        "k has dtype float16",
    ),
    "window that does not divide": (lambda: q_k_v(size=(8, 8), window=(3, 4)), "window .* does not divide"),
    "heads that do not divide": (lambda: q_k_v(num_heads=5), "num_heads is 5"),
    "map larger than the tokens": (lambda: q_k_v(size=(9, 8)), "size"),
    "integers": (lambda: q_k_v(q=torch.ones(2, 64, 32, device="cuda", dtype=torch.int32)), "dtype"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    make_arguments, message = ERRORS[name]
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.flatten.attention(**make_arguments())


def test_more_than_two_billion_elements():
    """Offsets beyond 2^31: the last tokens alone give the same."""
    tokens, channels = 2**16, 2**16
    needed = 4 * 2 * tokens * channels
    if EMULATED or torch.cuda.get_device_properties(0).total_memory < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory")
    q = torch.randn(1, tokens, channels, device="cuda", dtype=torch.bfloat16)
    out = torch.ops.flatten.attention(q, q, q, channels // 32)
    last = torch.ops.flatten.attention(q[:, -64:], q, q, channels // 32)
    assert_close(out[:, -64:], last.cpu().double(), 5e-3, "out")
