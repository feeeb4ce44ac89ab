"""Half precision of the other families: tables and sums stay wide, and nothing overflows that fits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import small
from torch import nn

from flatten_ext.models import _cores

SIZE = (12, 20)
CORES: dict[str, Any] = {
    "mila": _cores.MilaAttention,
    "rala": _cores.RalaAttention,
    "mala": _cores.MalaAttention,
    "inline": _cores.InlineAttention,
    "pola": _cores.PolarAttention,
    "softmax": _cores.RotarySoftmaxAttention,
}


def run(core: nn.Module, name: str, tokens: torch.Tensor) -> torch.Tensor:
    q, k, v, gate = tokens
    more = {"source": v / v.abs().max()} if name == "inline" else {}
    if name in ("rala", "mala", "pola", "softmax"):
        more["gate"] = gate
    return core.attend(q, k, v, SIZE, **more)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gain", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("name", CORES)
def test_finite_and_right(name: str, gain: float, dtype: torch.dtype) -> None:
    """q and k of deviation `gain`: where float64's result fits, half precision has it to its own rounding."""
    torch.manual_seed(0)
    core = CORES[name](32, 2, SIZE)
    tokens = torch.randn(4, 2, SIZE[0] * SIZE[1], 32)
    tokens[:2] *= gain
    core, tokens = core.to(dtype), tokens.to(dtype)
    expected = run(copy.deepcopy(core).double(), name, tokens.double())
    assert expected.abs().max() < torch.finfo(dtype).max
    actual = run(core, name, tokens)
    assert actual.dtype == dtype
    assert actual.isfinite().all()
    if name == "softmax" and gain > 1:
        return  # its exponentials magnify the rounding of the rotated queries and keys
    step = torch.finfo(dtype).eps
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error < 4 * step, error / step


@pytest.mark.parametrize("name", ["mila", "mala"])
def test_angles_stay_wide(name: str) -> None:
    """On a long side: angles of half precision would be off by whole turns."""
    torch.manual_seed(0)
    core, size = CORES[name](32, 2, (1, 1)).half(), (2, 512)
    q, k, v = torch.randn(3, 1, 1024, 32).half()
    more = {"gate": torch.ones_like(v)} if name == "mala" else {}
    wide = {key: value.double() for key, value in more.items()}
    expected = copy.deepcopy(core).double().attend(q.double(), k.double(), v.double(), size, **wide)
    error = (core.attend(q, k, v, size, **more).double() - expected).abs().max()
    assert error < 4e-3 * expected.abs().max()


@pytest.mark.parametrize("family", ["mila", "ravlt", "mavit", "inline_swin", "pola_swin", "pola_pvt"])
def test_autocast(family: str) -> None:
    """Whole models under autocast, forward and backward, near their float32 results."""
    torch.manual_seed(0)
    model = small(family, img_size=64, drop_path_rate=0.0).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert (out.float() - expected).abs().max() < 0.1 * expected.abs().max()
