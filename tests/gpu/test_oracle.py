"""The operators against the float64 oracle: shapes, options, strides and dtypes, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import cases
import pytest
import torch
from cases import (
    TENSOR_CORE_TOLERANCE,
    TOLERANCE,
    Case,
    assert_all_close,
    assert_close,
    half,
    make,
    on_map,
)

from flatten_ext import _load, reference

BF16, FP16 = torch.bfloat16, torch.float16

# Beyond tests/cases.py: the borders of the general kernels' tiles, chunks and column blocks.
GENERAL = [
    on_map(1, 17, keys=130, heads=3, key_bias=True),
    on_map(20, 18, batch=1, head_dim=24, kernel=(7, 7), p=4.0),
    on_map(
        20, 18, batch=1, prefix=3, heads=1, head_dim=33, kernel=(5, 5), p=2.5, per_channel=True, key_bias=True
    ),
    on_map(10, 10, batch=1, heads=1, head_dim=64, kernel=(5, 5), p=None),
    on_map(15, 20, batch=1, heads=1, head_dim=130, kernel=(3, 3), p=1.0),
    on_map(15, 20, batch=1, heads=1, head_dim=40, kernel=(9, 9)),
    on_map(1, 70, batch=1, kernel=(1, 3)),
    on_map(3, 3, batch=70, heads=1, head_dim=8, kernel=(7, 7), bias=False),
    on_map(8, 8, eps=0.0),
]

FLOAT64 = [
    on_map(5, 7, heads=3, head_dim=5, kernel=(5, 5), key_bias=True, dtype=torch.float64),
    on_map(15, 20, batch=1, head_dim=40, kernel=(7, 7), dtype=torch.float64),
    on_map(8, 8, window=(4, 4), shift=(1, 3), head_dim=16, kernel=(3, 3), p=2.5, dtype=torch.float64),
]

# What the tensor-core kernels take, and its borders: every head size, kernel and power, windows, prefixes.
HALF = [
    half(on_map(7, 7, kernel=(5, 5))),
    half(on_map(7, 7, kernel=(5, 5)), FP16),
    half(on_map(14, 14, heads=3, kernel=(5, 5), window=(7, 7))),
    half(on_map(14, 14, heads=3, kernel=(5, 5), window=(7, 7), shift=(3, 3), key_bias=True), FP16),
    half(on_map(14, 14, heads=12, batch=1, kernel=(5, 5), window=(7, 7))),
    half(on_map(14, 7, heads=12, batch=1, kernel=(5, 5), window=(7, 7)), FP16),
    half(on_map(14, 14, heads=3, head_dim=64, batch=1, kernel=(5, 5))),
    half(on_map(28, 28, heads=3, batch=1, kernel=(5, 5))),
    half(on_map(28, 28, heads=3, batch=1, kernel=(5, 5), tap_size=0.0)),
    half(on_map(28, 28, heads=1, head_dim=64, batch=1, kernel=(5, 5), tap_size=0.0), FP16),
    half(on_map(28, 28, heads=2, head_dim=64, batch=1, kernel=(3, 3), p=2.0)),
    half(on_map(20, 24, heads=1, head_dim=128, batch=1, kernel=(5, 5))),
    half(on_map(20, 24, heads=1, head_dim=128, batch=1, kernel=(3, 3), p=2.0, key_bias=True), FP16),
    half(on_map(9, 20, window=(9, 10), shift=(4, 3), heads=2, head_dim=128, batch=1, tap_size=0.0)),
    half(on_map(1, 300, keys=70, heads=1, head_dim=128, p=2.5), FP16),
    half(on_map(20, 24, heads=4, head_dim=16, batch=1, kernel=(7, 7), p=4.0), FP16),
    half(on_map(20, 24, heads=2, batch=1, kernel=(7, 7), p=1.0, key_bias=True)),
    half(on_map(20, 24, heads=2, batch=1, kernel=(5, 5), per_channel=True, p=3.3)),
    half(on_map(19, 23, heads=2, batch=1, kernel=(5, 5), bias=False, scale=False)),
    half(on_map(16, 17, heads=2, batch=1, prefix=1, kernel=(3, 3))),
    half(on_map(28, 28, heads=2, batch=1, window=(14, 14), shift=(7, 7), kernel=(5, 5))),
    half(on_map(20, 20, heads=2, batch=1, head_dim=24, kernel=(5, 5))),
    half(on_map(1, 300, keys=49, heads=2), FP16),
    half(on_map(1, 49, keys=300, heads=1, head_dim=64, key_bias=True)),
    half(on_map(12, 12, heads=2, p=None, kernel=(5, 5))),
    half(on_map(28, 28, heads=2, head_dim=64, batch=1, kernel=(5, 5))),
    half(
        on_map(13, 30, heads=1, head_dim=64, batch=1, kernel=(7, 7), per_channel=True, p=1.5, key_bias=True)
    ),
    half(on_map(20, 24, heads=6, head_dim=16, batch=1, kernel=(5, 5), key_bias=True)),
    half(on_map(1, 300, keys=280, heads=3, key_bias=True, p=4.0)),
    # Small windows in one launch.
    half(on_map(14, 14, heads=2, batch=32, kernel=(5, 5))),
    half(on_map(14, 14, heads=1, head_dim=64, batch=32, kernel=(5, 5), tap_size=0.0)),
    half(on_map(14, 14, heads=3, head_dim=64, batch=32, kernel=(5, 5))),
    half(
        on_map(14, 7, heads=12, batch=1, window=(7, 7), shift=(3, 0), kernel=(5, 5), per_channel=True, p=2.5)
    ),
    half(on_map(14, 7, heads=12, batch=1, window=(7, 7), kernel=(3, 3), key_bias=True)),
    half(on_map(9, 20, window=(9, 10), shift=(4, 3), heads=3, batch=1, kernel=(5, 5), per_channel=True)),
    half(on_map(1, 49, keys=60, heads=12, batch=3)),
    half(on_map(8, 8, batch=1, head_dim=64, kernel=(5, 5), tap_size=0.0)),
    half(on_map(7, 7, heads=4, head_dim=16, kernel=(5, 5), p=2.5)),
    half(on_map(7, 7, heads=4, head_dim=16, p=4.0, key_bias=True), FP16),
    half(
        on_map(5, 12, batch=1, window=(5, 6), shift=(2, 1), head_dim=64, kernel=(3, 3), p=1.0, key_bias=True)
    ),
    half(on_map(9, 5, batch=1, kernel=(3, 3), per_channel=True), FP16),
    half(
        on_map(7, 14, batch=1, window=(7, 7), shift=(2, 3), head_dim=64, kernel=(5, 5), key_bias=True), FP16
    ),
    half(on_map(8, 7, batch=1, head_dim=64, p=2.0, tap_size=0.0), FP16),
    half(on_map(12, 20, batch=1, eps=0.3, kernel=(5, 5), tap_size=0.0)),
    on_map(12, 12, heads=2, kernel=(5, 5), dtype=BF16, key_bias=True),
    on_map(12, 12, heads=2, kernel=(5, 5), dtype=FP16),
]

# What only the tensor-core kernels with a head to a block take: tokens before the map, other head sizes, any
# number of channels, taps of any size, and gradients of mapped features.
HEADS = [
    half(on_map(14, 14, prefix=1, heads=3, head_dim=64, batch=1, kernel=(5, 5), key_bias=True)),
    half(on_map(6, 7, prefix=5, heads=2, kernel=(3, 3), key_bias=True), FP16),
    half(on_map(6, 7, prefix=40, heads=1, head_dim=64, kernel=(5, 5), p=2.0)),
    half(on_map(5, 5, prefix=1, heads=2, head_dim=64, p=2.5, key_bias=True), FP16),
    half(on_map(14, 14, heads=5, head_dim=64, batch=1, kernel=(5, 5), key_bias=True)),
    half(on_map(7, 7, heads=8, head_dim=64, kernel=(5, 5), tap_size=0.0), FP16),
    half(on_map(7, 9, heads=24, head_dim=64, batch=1, kernel=(3, 3))),
    half(on_map(14, 7, heads=16, batch=1, window=(7, 7), shift=(3, 2), kernel=(5, 5), key_bias=True)),
    half(on_map(1, 150, keys=37, heads=5, head_dim=64, batch=1, key_bias=True)),
    half(on_map(1, 40, keys=200, heads=8, head_dim=64, batch=1), FP16),
    half(on_map(10, 20, heads=5, head_dim=24, batch=1, kernel=(5, 5), key_bias=True)),
    half(on_map(7, 40, heads=3, head_dim=24, batch=1, kernel=(7, 7), per_channel=True, p=2.5), FP16),
    half(on_map(7, 7, heads=3, head_dim=8, kernel=(5, 5), p=1.0)),
    half(on_map(9, 9, heads=2, head_dim=48, batch=1, window=(3, 9), shift=(1, 0), kernel=(3, 5))),
    half(
        on_map(9, 9, heads=1, head_dim=40, batch=1, window=(9, 9), shift=(4, 7), kernel=(5, 3), key_bias=True)
    ),
    half(on_map(12, 6, heads=2, head_dim=96, batch=1, kernel=(5, 5), p=4.0)),
    half(on_map(12, 6, heads=1, head_dim=128, batch=1, kernel=(9, 9), bias=False), FP16),
    half(on_map(20, 18, heads=1, head_dim=64, batch=1, kernel=(7, 7), per_channel=True, key_bias=True)),
    half(on_map(6, 6, heads=3, head_dim=128, batch=1, p=None, kernel=(5, 5)), FP16),
    half(on_map(6, 6, heads=2, batch=1, p=None, prefix=1)),
    half(on_map(40, 36, heads=1, head_dim=40, batch=1, prefix=3, kernel=(5, 5), key_bias=True)),
    half(on_map(6, 6, heads=2, head_dim=24, magnitude=1e-3, value_magnitude=10.0, scale=False), FP16),
    half(on_map(6, 6, heads=2, head_dim=24, magnitude=30.0, p=8.0, eps=0.0, key_bias=True)),
    on_map(6, 6, prefix=2, heads=2, head_dim=48, kernel=(5, 5), dtype=BF16, key_bias=True),
]


def check(case: Case, gradients: bool = True) -> None:
    """Outputs and gradients of a case against the oracle."""
    call = make(case)
    oracle = call.oracle()
    tolerance = TOLERANCE[case.dtype]
    assert_close(call.run(), oracle.run(reference), tolerance.out, "out")
    if not gradients:
        return
    want = oracle.gradients(reference)
    for name, gradient in call.gradients().items():
        assert gradient.dtype == call.arguments[name].dtype, name
        assert_close(gradient, want[name], tolerance.gradient, f"gradient of {name}")


def test_the_cuda_library_is_loaded():
    """Otherwise everything here would test the plain-torch fallback."""
    assert _load.cuda_unavailable_reason is None


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("name", cases.CASES)
def test_the_cases_of_the_cpu(name, dtype):
    arguments = cases.CASES[name].arguments(dtype, device="cuda")
    grad_out = torch.randn_like(arguments["q"])
    found = cases.gradients(torch.ops.flatten.attention, arguments, grad_out)
    expected = cases.oracle_gradients(arguments, grad_out)
    # With one token the weights are 1 whatever q and k are: their gradients are rounding and eps.
    floor = 1.0 if name == "one-token" else 0.0
    assert_all_close(found, expected, TENSOR_CORE_TOLERANCE[dtype], floor)


@pytest.mark.parametrize("case", GENERAL + FLOAT64, ids=str)
def test_matches_the_oracle(case):
    check(case)


@pytest.mark.parametrize("case", HALF + HEADS, ids=str)
def test_half_precision_matches_the_oracle(case):
    check(case)


def test_many_larger_windows():
    """Enough of them that each is one block's."""
    check(half(on_map(14, 14, batch=32, heads=1, head_dim=64, kernel=(5, 5))))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("layout", [*cases.LAYOUTS, "expanded"])
def test_strided_inputs(layout, dtype):
    check(on_map(18, 18, heads=2, kernel=(5, 5), dtype=dtype, layout=layout))
    check(on_map(14, 14, heads=2, window=(7, 7), kernel=(3, 3), dtype=dtype, layout=layout), gradients=False)


@pytest.mark.parametrize("p", [3.0, 4.0, 8.0, 50.0])
def test_dead_rows_and_large_powers(p):
    """Tokens whose channels are all negative, where the paper's code gives NaN."""
    call = make(on_map(8, 8, p=p, kernel=(3, 3)))
    with torch.no_grad():
        call.tensors[0][:, 3:9] = -1.0
        call.tensors[1][:, :5] = -1.0
    oracle = call.oracle()
    assert_close(call.run(), oracle.run(reference), 1e-5, "out")
    want = oracle.gradients(reference)
    for name, gradient in call.gradients().items():
        assert_close(gradient, want[name], 1e-4, f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, FP16, BF16])
@pytest.mark.parametrize("amplitude", [1e-3, 1e2])
def test_inputs_of_any_size(amplitude, dtype):
    case = on_map(16, 18, batch=1, dtype=dtype, magnitude=amplitude, value_magnitude=amplitude)
    call = make(case)
    assert_close(call.run(), call.oracle().run(reference), 2 * TOLERANCE[case.dtype].out, "out")
    for name, gradient in call.gradients().items():
        assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("power", [3.0, 8.0])
@pytest.mark.parametrize(
    ("inputs", "grad_out"), [(1e-3, 1.0), (1.0, 1e-2), (1.0, 1e3), (1e3, 1.0), (3e4, 1.0)]
)
@pytest.mark.parametrize(
    ("shape", "heads", "head_dim"), [((7, 7), 3, 32), ((20, 18), 1, 64), ((17, 18), 1, 128)]
)
def test_gradients_in_the_range_of_float16(shape, heads, head_dim, inputs, grad_out, power):
    """Powers, S and its gradient go beyond it where inputs and gradients do not. The first tile has none."""
    case = on_map(
        *shape,
        batch=1,
        heads=heads,
        head_dim=head_dim,
        kernel=(5, 5),
        p=power,
        magnitude=inputs,
        value_magnitude=inputs,
    )
    call = make(half(case, FP16))
    with torch.no_grad():
        for x in call.tensors[:3]:
            x.clamp_(-6e4, 6e4)
        call.tensors[2].div_(max(inputs, 1.0) ** 0.5)
        call.grad_out.mul_(grad_out)
        call.grad_out[:, :40] = 0.0
    want = call.oracle().gradients(reference)
    for name, gradient in call.gradients().items():
        assert_close(gradient, want[name], TOLERANCE[FP16].gradient, f"gradient of {name}")


@pytest.mark.parametrize("shape", [(20, 18), (7, 7)])
@pytest.mark.parametrize("amplitude", [1e-9, 1e8])
def test_norms_beyond_float32(amplitude, shape):
    """Sums of y^6 that overflow, or vanish, on large maps and in small windows."""
    check(
        half(on_map(*shape, batch=1, magnitude=amplitude, value_magnitude=amplitude, eps=1e-20)),
        gradients=False,
    )


@pytest.mark.parametrize("mask", range(1, 128, 9))
def test_only_requested_gradients(mask):
    """Every gradient is the same whoever else is asked for."""
    call = make(on_map(18, 16, batch=1, heads=1, kernel=(5, 5), key_bias=True), requires_grad=False)
    wanted = [bool(mask >> i & 1) for i in range(7)]
    op = torch.ops.flatten

    def backward(asked):
        empty = torch.empty(0, device="cuda")
        return op.attention_backward(call.grad_out, *call.positional(), empty, asked)

    everything = backward([True] * 7)
    some = backward(wanted)
    assert len(some) == sum(wanted)
    for got, want in zip(some, (g for g, w in zip(everything, wanted, strict=True) if w), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("window", [None, (7, 7)])
@pytest.mark.parametrize(
    "mask", ["1111111", "1110000", "1110010", "1111001", "1110100", "0110010", "1000001"]
)
def test_only_requested_gradients_in_half_precision(mask, window):
    """Where the gradients of q, k and v are asked for, those of the parameters come from the same kernels."""
    case = half(on_map(14, 21, batch=1, heads=2, kernel=(5, 5), window=window, key_bias=True))
    call = make(case, requires_grad=False)
    want = list(make(case).oracle().gradients(reference).values())
    asked, empty = [bit == "1" for bit in mask], torch.empty(0, device="cuda")
    got = torch.ops.flatten.attention_backward(call.grad_out, *call.positional(), empty, asked)
    assert len(got) == sum(asked)
    for gradient, expected in zip(got, (w for w, a in zip(want, asked, strict=True) if a), strict=True):
        assert_close(gradient, expected, TOLERANCE[BF16].gradient, mask)


def test_saved_state_gives_the_same_gradients():
    call = make(on_map(18, 20, batch=1, kernel=(5, 5)), requires_grad=False)
    op = torch.ops.flatten
    arguments = call.positional()
    out, state = op.attention_forward(*arguments, 1)
    assert torch.equal(out, call.run())
    mask = [t is not None for t in call.tensors]
    saved = op.attention_backward(call.grad_out, *arguments, state, mask)
    again = op.attention_backward(call.grad_out, *arguments, state.new_empty(0), mask)
    for a, b in zip(saved, again, strict=True):
        assert torch.equal(a, b)


CONVOLUTIONS = [
    on_map(14, 14, heads=3, kernel=(5, 5), window=(7, 7), shift=(1, 2)),
    on_map(17, 12, heads=1, head_dim=70, kernel=(3, 3), per_channel=True),
    on_map(9, 11, prefix=5, heads=2, head_dim=16, kernel=(7, 7)),
    on_map(9, 11, heads=2, head_dim=12, kernel=(1, 11), bias=False),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, FP16, BF16])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_depthwise_conv(case, dtype):
    call = make(replace(case, dtype=dtype))
    _, _, v, _, _, weight, bias = call.tensors
    oracle = call.oracle()
    _, _, v64, _, _, weight64, bias64 = oracle.tensors
    arguments = (case.size, case.window, case.shift)
    out = torch.ops.flatten.depthwise_conv(v, weight, bias, *arguments)
    want = reference.depthwise_conv(v64, weight64, bias64, *arguments)
    assert_close(out, want, TOLERANCE[dtype].out, "out")
    inputs = [t for t in (v, weight, bias) if t is not None]
    inputs64 = [t for t in (v64, weight64, bias64) if t is not None]
    got = torch.autograd.grad(out, inputs, call.grad_out)
    for g, w in zip(got, torch.autograd.grad(want, inputs64, oracle.grad_out), strict=True):
        assert_close(g, w, TOLERANCE[dtype].gradient, "gradient")


@pytest.mark.parametrize(("batch", "queries"), [(0, 49), (2, 0)])
def test_empty_calls(batch, queries):
    call = make(on_map(1, queries, batch=batch, keys=49))
    assert call.run().shape == (batch, queries, 64)
    for name, gradient in call.gradients().items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name
