"""The operators against what the public implementation computed in float64."""

from __future__ import annotations

from types import ModuleType

import golden_data
import pytest
import torch
import torch.nn.functional as F
from golden_data import Golden
from torch import Tensor

import flatten_ext
from flatten_ext import reference

OPERATORS = [pytest.param(reference, id="reference"), pytest.param(flatten_ext, id="op")]
# Worst difference over the largest entry: of outputs, of gradients. Gradients sum over up to 16384 tokens.
TOLERANCES = {torch.float64: (1e-13, 1e-12), torch.float32: (2e-6, 2e-5)}

MAPPED = ("grad.q", "grad.k", "grad.scale", "grad.positional_encoding")  # through phi


def worst(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The largest difference, relative to the largest expected magnitude or `floor`."""
    difference = (actual.detach().double() - expected).abs().max()
    return float(difference / expected.abs().max().clamp_min(floor))


def run(operators: ModuleType, golden: Golden, inputs: dict[str, Tensor]) -> Tensor:
    """The attention between the projections, as the public family computes it, through our operators."""
    meta = golden.meta
    heads, size = meta["heads"], [meta["H"], meta["W"]]
    weight, bias = inputs["dwc.weight"], inputs["dwc.bias"]
    if "get_v.weight" in inputs:  # LePE is a 3x3 kernel per channel: it joins the one the heads share
        border = (meta["kernel"] - 3) // 2
        weight = F.pad(inputs["get_v.weight"], (border,) * 4) + weight.repeat(heads, 1, 1, 1)
        bias = inputs["get_v.bias"] + bias.repeat(heads)
    key_bias = inputs["positional_encoding"][0]
    common = {
        "scale": F.softplus(inputs["scale"]).flatten(),
        "key_bias": key_bias,
        "focusing_factor": meta["p"],
    }
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if meta["sr_ratio"] == 1:
        return operators.attention(q, k, v, heads, dwc_weight=weight, dwc_bias=bias, size=size, **common)
    out = operators.attention(q, k, v, heads, **common)
    v = F.interpolate(v.transpose(1, 2), size=q.shape[1], mode="linear").transpose(1, 2)
    return out + operators.depthwise_conv(v, weight, bias, size)


def check(golden: Golden, key: str, actual: Tensor, tolerance: float) -> None:
    """Compares with `key`, whole or sampled: every stride-th entry, and sums over all of them."""
    if not golden.meta["sampled"]:
        # With one key, or one channel alive, the gradients through phi cancel to almost nothing: what is left
        # carries the rounding of terms as large as the gradient that came in, over the size of a row of q.
        rows = golden["in.q"].amax(-1)
        floor = float(golden["in.dy"].abs().max() / rows[rows > 0].min()) if key in MAPPED else 0.0
        assert worst(actual, golden[key], floor) <= tolerance, key
        return
    flat = actual.double().flatten()
    assert worst(flat[:: int(golden[f"{key}.stride"])], golden[f"{key}.sample"]) <= tolerance, key
    stats = torch.stack([flat.sum(), flat.abs().sum(), flat.square().sum(), flat.min(), flat.max()])
    expected = golden[f"{key}.stats"]
    magnitude = torch.stack([expected[1], expected[1], expected[2], expected[4], expected[4]])
    assert ((stats - expected).abs() <= 2 * tolerance * magnitude.abs()).all(), key


def test_recipe() -> None:
    expected = torch.tensor([-1.393198128778801, 0.5277920056434262, -1.026675633675375, -0.7813466076475137])
    assert torch.allclose(golden_data.unit("input", (4,)).float(), expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("operators", OPERATORS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", golden_data.names("op_"))
def test_operator(name: str, dtype: torch.dtype, operators: ModuleType) -> None:
    golden = Golden(name)
    inputs = {
        key: value.to(dtype).requires_grad_() for key, value in golden_data.operator_inputs(golden).items()
    }
    out = run(operators, golden, inputs)
    outputs, gradients = TOLERANCES[dtype]
    check(golden, "out.y", out, outputs)
    out.backward(inputs["dy"].detach())
    for key, value in inputs.items():
        if key != "dy":
            check(golden, f"grad.{key}", value.grad, gradients)


@pytest.mark.parametrize("operators", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", [name for name in golden_data.names("op_") if "big" not in name])
def test_half_precision(name: str, dtype: torch.dtype, operators: ModuleType) -> None:
    """The stored inputs are exact in half precision, so only the result is rounded."""
    golden = Golden(name)
    inputs = golden_data.operator_inputs(golden)
    inputs = {key: value.to(dtype if key in "qkv" else torch.float32) for key, value in inputs.items()}
    out = run(operators, golden, inputs)
    assert out.dtype == dtype
    # Twice the rounding of the largest entry: with sr_ratio, v and both terms are rounded too.
    assert worst(out, golden["out.y"]) <= 2 * torch.finfo(dtype).eps
