"""torch.compile without graph breaks or recompilation by size, and torch.export with a dynamic size."""

from __future__ import annotations

import pytest
import torch
from families import SMALL, small
from torch._dynamo.utils import counters

SIZES = ((96, 160), (160, 128))


@pytest.mark.parametrize("family", SMALL)
def test_compile(family: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = small(family).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for size in SIZES:
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
    assert counters["stats"]["unique_graphs"] == 1


def test_compile_training() -> None:
    """Forward and backward through AOTAutograd, in one graph."""
    torch._dynamo.reset()
    model = small("swin", drop_path_rate=0.0)
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", SMALL)
def test_export(family: str) -> None:
    model = small(family).eval()
    height, width = (torch.export.Dim(name, min=3, max=32) for name in ("height", "width"))
    program = torch.export.export(
        model, (torch.randn(2, 3, *SIZES[0]),), dynamic_shapes=({2: 32 * height, 3: 32 * width},)
    )
    for size in ((224, 224), (128, 320)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x))
