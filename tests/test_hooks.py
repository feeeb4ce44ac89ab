"""What torch asks of an operator, hook by hook: each of these fails silently in many extensions."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.autograd.forward_ad as fwd
from cases import (
    CASES,
    TENSORS,
    Case,
    gradients,
    positional,
    relative_error,
    replace,
    with_gradients,
)
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import flatten_ext
from flatten_ext import reference
from flatten_ext._torch.families import count_windows
from flatten_ext._torch.hooks import FALLBACK

ops = torch.ops.flatten
SMALL = Case(size=(2, 4), heads=2, head_dim=2, batch=2, window=(2, 2), shift=(1, 1), kernel=(3, 3))


def tensors_of(arguments: dict) -> list[str]:
    return [k for k, a in arguments.items() if isinstance(a, torch.Tensor)]


def as_function(operator, arguments: dict):
    """operator as a function of its tensors alone, and those."""
    names = tensors_of(arguments)
    return (
        lambda *tensors: operator(**{**arguments, **dict(zip(names, tensors, strict=True))}),
        [arguments[k] for k in names],
    )


@pytest.mark.parametrize("name", ["plain", "taps", "prefix", "cross", "shifted"])
def test_opcheck_attention(name):
    arguments = with_gradients(CASES[name].arguments(torch.float32))
    torch.library.opcheck(ops.attention.default, positional(arguments))


def test_opcheck_the_other_operators():
    arguments = CASES["shifted"].arguments(torch.float32)
    linear = with_gradients(replace(CASES["shifted"], p=None).arguments())
    torch.library.opcheck(ops.linear_attention.default, (), linear)
    geometry = {k: arguments[k] for k in ("size", "window", "shift")}
    x, weight = arguments["v"].requires_grad_(), arguments["dwc_weight"].requires_grad_()
    torch.library.opcheck(ops.depthwise_conv.default, (x, weight, None), geometry)

    q, k, v, *rest = positional(CASES["shifted"].arguments(torch.float32))
    windows = count_windows(q, geometry["window"])
    for saved in (0, 3, windows):
        torch.library.opcheck(ops.attention_forward.default, (q, k, v, *rest, saved))
    _, state = ops.attention_forward(q, k, v, *rest, 3)
    mask = [True, False, True, False, True, True, False]
    torch.library.opcheck(ops.attention_backward.default, (torch.randn_like(q), q, k, v, *rest, state, mask))
    conv = (torch.randn_like(x), x.detach(), weight.detach(), None, *geometry.values(), [True, True, False])
    torch.library.opcheck(ops.depthwise_conv_backward.default, conv)


# ------------------------------------------------------------------------------------------ differentiation
def test_gradgradcheck():
    function, tensors = as_function(ops.attention, with_gradients(SMALL.arguments(torch.float64)))
    assert torch.autograd.gradgradcheck(function, tensors)


def test_gradgradcheck_conv():
    x, weight = (torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, 1, 3, 1, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *t: ops.depthwise_conv(*t, [3, 2]).square(), (x, weight, bias))


def test_double_backward_where_q_k_and_v_are_one_tensor():
    x = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.attention(x, x, x, 2), x)
    assert torch.autograd.gradgradcheck(lambda x: ops.attention(x, x, x, 2), x)


def test_forward_mode():
    function, tensors = as_function(ops.attention, with_gradients(SMALL.arguments(torch.float64)))
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_backward_ad=False)


def test_forward_mode_without_grad_mode():
    arguments = SMALL.arguments(torch.float64)
    tangent = torch.randn_like(arguments["v"])
    with torch.no_grad(), fwd.dual_level():
        dual = ops.attention(**{**arguments, "v": fwd.make_dual(arguments["v"], tangent)})
        found = fwd.unpack_dual(dual).tangent
    without_bias = {k: a for k, a in arguments.items() if k != "dwc_bias"}
    assert relative_error(found, ops.attention(**{**without_bias, "v": tangent})) < 1e-12  # linear in v


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_nested_functorch_grad(depth):
    arguments = SMALL.arguments(torch.float64)

    def nested(operator):
        def function(q):
            return operator(**{**arguments, "q": q})

        for _ in range(depth):
            function = (lambda inner: torch.func.grad(lambda q: inner(q).pow(3).sum()))(function)
        return function(arguments["q"])

    assert relative_error(nested(ops.attention), nested(reference.attention)) < 1e-11


def test_functorch_hessian_and_jacobians():
    arguments = Case(size=(2, 2), heads=1, head_dim=2, batch=1, kernel=None).arguments(torch.float64)

    def loss(operator):
        return lambda q: operator(**{**arguments, "q": q}).pow(3).sum()

    for transform in (torch.func.hessian, torch.func.jacrev, torch.func.jacfwd):
        found, expected = (transform(loss(f))(arguments["q"]) for f in (ops.attention, reference.attention))
        assert relative_error(found, expected) < 1e-11


@pytest.mark.parametrize("mapped", [("q",), ("q", "k", "v"), ("k", "scale"), ("dwc_weight",), TENSORS])
def test_vmap(mapped):
    arguments = SMALL.arguments(torch.float64)
    samples = [SMALL.arguments(torch.float64, seed=s) for s in range(3)]
    stacked = [torch.stack([s[name] for s in samples], 1) for name in mapped]

    def call(*tensors):
        return ops.attention(**{**arguments, **dict(zip(mapped, tensors, strict=True))})

    found = torch.func.vmap(call, in_dims=1)(*stacked)
    for i, sample in enumerate(samples):
        assert torch.allclose(found[i], call(*(sample[name] for name in mapped)), rtol=1e-12, atol=1e-12)


def test_batched_cotangents():
    """torch.autograd.grad(is_grads_batched=True) maps over the backward with torch's older vmap."""
    arguments = with_gradients(CASES["taps"].arguments(torch.float64))
    tensors = [arguments[name] for name in tensors_of(arguments)]
    out = ops.attention(**arguments)
    cotangents = torch.randn(3, *out.shape, dtype=torch.float64)
    found = torch.autograd.grad(out, tensors, cotangents, is_grads_batched=True)
    for i, cotangent in enumerate(cotangents):
        expected = torch.autograd.grad(ops.attention(**arguments), tensors, cotangent)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-12, atol=1e-12)


def test_vmap_of_conv():
    x, weight = torch.randn(3, 2, 6, 4, dtype=torch.float64), torch.randn(3, 2, 1, 3, 3, dtype=torch.float64)
    found = torch.func.vmap(lambda x, w: ops.depthwise_conv(x, w, None, [2, 3]))(x, weight)
    expected = torch.stack([ops.depthwise_conv(x[i], weight[i], None, [2, 3]) for i in range(3)])
    assert torch.equal(found, expected)


def test_per_sample_gradients():
    arguments = SMALL.arguments(torch.float64)
    q = torch.randn(4, *arguments["q"].shape, dtype=torch.float64)

    def loss(q, scale, weight):
        return ops.attention(**{**arguments, "q": q, "scale": scale, "dwc_weight": weight}).square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    parameters = arguments["scale"], arguments["dwc_weight"]
    found = torch.func.vmap(gradient, in_dims=(0, None, None))(q, *parameters)
    expected = [torch.stack(g) for g in zip(*(gradient(q_, *parameters) for q_ in q), strict=True)]
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-12


def test_an_undefined_gradient_stays_undefined():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    arguments = with_gradients(CASES["taps"].arguments(torch.float32))
    tensors = [arguments[k] for k in tensors_of(arguments)]
    stopped = Stop.apply(ops.attention(**arguments)).sum()
    assert torch.autograd.grad(stopped, tensors, allow_unused=True) == (None,) * len(tensors)


def test_activation_checkpointing_recomputes():
    arguments = with_gradients(CASES["shifted"].arguments(torch.float64))
    function, tensors = as_function(ops.attention, arguments)
    expected = torch.autograd.grad(function(*tensors).square().sum(), tensors)
    calls = []

    def counted(*tensors):
        calls.append(1)
        return function(*tensors)

    found = torch.autograd.grad(checkpoint(counted, *tensors, use_reentrant=False).square().sum(), tensors)
    assert len(calls) == 2
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_saved_for_backward_is_at_most_five_percent_more_than_q_k_v():
    for case in (CASES["large-map"], CASES["windows-7x7"], CASES["head-dim-64"]):
        arguments = with_gradients(case.arguments(torch.float32))
        storages = {}

        def pack(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ops.attention(**arguments)
        tokens = sum(arguments[n].untyped_storage().nbytes() for n in ("q", "k", "v"))
        parameters = sum(
            arguments[n].untyped_storage().nbytes()
            for n in ("scale", "key_bias", "dwc_weight", "dwc_bias")
            if n in arguments
        )
        assert sum(storages.values()) <= 1.05 * tokens + parameters


# --------------------------------------------------------------------------------------- compile and export
@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(32)
        self.attention = flatten_ext.FocusedLinearAttention(32, 4)

    def forward(self, x, size: list[int]):
        return x + self.attention(self.norm(x), size)


def test_compile_without_break_or_recompile(fresh_compiler):
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for h, w in ((14, 14), (7, 9), (20, 12)):
            x = torch.randn(2, h * w, 32)
            assert relative_error(compiled(x, [h, w]), block(x, [h, w])) < 1e-5


def test_compile_training(fresh_compiler):
    block = Block()
    x = torch.randn(2, 35, 32)
    block(x, [5, 7]).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in block.named_parameters()}
    block.zero_grad()
    torch.compile(block, fullgraph=True)(x, [5, 7]).square().sum().backward()
    for name, p in block.named_parameters():
        assert relative_error(p.grad, expected[name]) < 1e-5, name


def test_export_keeps_the_operator_and_any_batch():
    block = Block().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    x = torch.randn(3, 24, 32)
    program = torch.export.export(block, (x, [4, 6]), dynamic_shapes={"x": {0: batch}, "size": [None, None]})
    assert any(node.target is ops.attention.default for node in program.graph.nodes)
    x = torch.randn(5, 24, 32)
    assert torch.allclose(program.module()(x, [4, 6]), block(x, [4, 6]), atol=1e-6)


def test_aot_inductor_package(tmp_path, fresh_compiler):
    block = Block().eval()
    x = torch.randn(2, 24, 32)
    with torch.no_grad():
        program = torch.export.export(block, (x, [4, 6]))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        assert relative_error(loaded(x, [4, 6]), block(x, [4, 6])) < 1e-5


# ------------------------------------------------------------------------------- autocast, FLOPs, devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_tokens_and_leaves_parameters(dtype):
    arguments = with_gradients(CASES["shifted"].arguments(torch.float32))
    with torch.autocast("cpu", dtype):
        out = ops.attention(**arguments)
        conv = ops.depthwise_conv(arguments["v"], arguments["dwc_weight"], None, arguments["size"])
        linear = ops.linear_attention(arguments["q"], arguments["k"], arguments["v"], 2)
    assert out.dtype == conv.dtype == linear.dtype == dtype
    cast = {k: a.to(dtype) if k in ("q", "k", "v") else a for k, a in arguments.items()}
    assert torch.equal(out, ops.attention(**cast))
    out.sum().backward()
    for name in tensors_of(arguments):
        assert arguments[name].grad.dtype == torch.float32


def test_autocast_leaves_float64():
    arguments = CASES["taps"].arguments(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.attention(**arguments).dtype == torch.float64


@pytest.mark.parametrize("name", ["plain", "taps", "prefix", "cross", "shifted", "per-channel"])
def test_flop_counter(name):
    case = CASES[name]
    arguments = with_gradients(case.arguments(torch.float32))
    b, n, c = arguments["q"].shape
    m, d = arguments["k"].shape[1], case.head_dim
    expected = 2 * b * (n + m) * c * d + 2 * b * n * c  # S and Q S, and Q m
    if case.kernel:
        expected += 2 * b * case.size[0] * case.size[1] * c * case.kernel[0] * case.kernel[1]
    with torch.no_grad(), FlopCounterMode(display=False) as inference:
        ops.attention(**arguments)
    assert inference.get_total_flops() == expected
    with FlopCounterMode(display=False) as training:
        ops.attention(**arguments).sum().backward()
    assert training.get_total_flops() == 3 * expected


def test_flop_counter_of_the_other_operators():
    arguments = CASES["taps"].arguments(torch.float32)
    x, weight = arguments["v"].requires_grad_(), arguments["dwc_weight"]
    conv = 2 * x.numel() * 25
    with FlopCounterMode(display=False) as counter:
        ops.depthwise_conv(x, weight, None, arguments["size"]).sum().backward()
    assert counter.get_total_flops() == 3 * conv
    with FlopCounterMode(display=False) as counter:
        ops.linear_attention(x.detach(), x.detach(), x.detach(), 2)
    assert counter.get_total_flops() == x.numel() * (4 * 16 + 2)


def test_meta_tensors():
    arguments = CASES["shifted"].arguments(torch.float16, device="meta")
    out = ops.attention(**arguments)
    assert out.device.type == "meta"
    assert out.shape == arguments["q"].shape
    assert out.dtype == torch.float16


def test_reference_runs_where_there_is_no_kernel():
    """The fallback of mps, xpu and of a CUDA torch without our CUDA library."""
    arguments = CASES["shifted"].arguments(torch.float32)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("flatten::attention", "CompositeExplicitAutograd")
    for key in ("MPS", "XPU", "HPU"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("flatten::attention", key)
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("flatten::attention_backward", key)
    found = FALLBACK["attention"](*positional(arguments))
    assert relative_error(found, ops.attention(**arguments)) < 1e-6
    rest = positional(arguments)
    grad_out = torch.randn_like(arguments["q"])
    state = FALLBACK["attention_forward"](*rest, 5)[1]
    mask = [True] * 7
    expected = ops.attention_backward(grad_out, *rest, torch.empty(0), mask)
    for a, b in zip(FALLBACK["attention_backward"](grad_out, *rest, state, mask), expected, strict=True):
        assert relative_error(a, b) < 1e-5
    with pytest.raises(RuntimeError, match="num_heads is 5"):
        FALLBACK["attention"](*rest[:3], 5, *rest[4:])


# ------------------------------------------------------------------------------------------------- modules
def test_module_deepcopy_pickle_and_state_dict():
    module = flatten_ext.FocusedLinearAttention(32, 4, positional_encoding=(4, 6), window=None)
    torch.nn.init.normal_(module.positional_encoding)
    x = torch.randn(2, 24, 32)
    expected = module(x, (4, 6))
    assert torch.equal(copy.deepcopy(module)(x, (4, 6)), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x, (4, 6)), expected)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = flatten_ext.FocusedLinearAttention(32, 4, positional_encoding=(4, 6))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x, (4, 6)), expected)


def test_gradients_agree_between_grad_modes_and_calls():
    arguments = CASES["large-map"].arguments(torch.float32)
    grad_out = torch.randn_like(arguments["q"])
    saved = gradients(ops.attention, arguments, grad_out)  # S and m from the forward
    rest = positional(arguments)
    recomputed = ops.attention_backward(grad_out, *rest, torch.empty(0), [True] * 7)
    for name, value in zip(TENSORS, recomputed, strict=True):
        assert relative_error(value, saved[name]) < 1e-6, name
