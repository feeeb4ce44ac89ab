"""NaN and infinity are handed on, forward and backward, by the tensor-core kernels and the general ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, gradients

from flatten_ext import reference

# Tensor cores take 16-bit calls in heads of 32; a window of 64 tokens in one launch, the map in several.
WINDOW = Case(size=(8, 8), kernel=(3, 3), head_dim=32, batch=2)
MAP = Case(size=(20, 20), kernel=(3, 3), head_dim=32, batch=2)
CALLS = [
    *((WINDOW, dtype) for dtype in (torch.bfloat16, torch.float16)),
    (MAP, torch.bfloat16),
    *((case, torch.float32) for case in (WINDOW, MAP)),  # a warp a head, at p = 3
    (replace(WINDOW, head_dim=12), torch.float64),
]
# Which tensor has the value, and whether there is a key_bias: bfloat16 has two ways to compute p = 3.
INPUTS = [("q", True), ("q", False), ("k", True), ("k", False), ("v", True), ("key_bias", True)]


@pytest.mark.parametrize(("value", "p"), [(float("nan"), 3.0), (float("inf"), 3.0), (float("inf"), 2.5)])
@pytest.mark.parametrize(("name", "key_bias"), INPUTS)
@pytest.mark.parametrize(("case", "dtype"), CALLS)
def test_is_not_lost(case, dtype, name, key_bias, value, p):
    """No entry is finite that the formula has not, and other images are as they were."""
    arguments = replace(case, p=p, key_bias=key_bias).arguments(dtype, "cuda")
    grad_out = torch.randn_like(arguments["q"])
    row = arguments[name][5] if name == "key_bias" else arguments[name][1, 5]
    row[2] = value
    found = gradients(torch.ops.flatten.attention, arguments, grad_out)
    wide = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    expected = gradients(reference.attention, wide, grad_out.double())
    for which in ("out", "q", "k", "v"):
        lost = found[which].isfinite() & ~expected[which].isfinite()
        assert not lost.any(), f"{which}: {int(lost.sum())} entries"
        if name != "key_bias":
            assert found[which][0].isfinite().all(), which
