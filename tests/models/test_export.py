"""torch.compile without graph breaks, torch.export; both for any size, but in Swin."""

from __future__ import annotations

import pytest
import torch
from families import SMALL, small
from torch._dynamo.utils import counters

# Where torch itself makes a graph of its own, both sizes are on the same side: at 1/16 the maps have several
# of CSWin's stripes each way, as images above 112 pixels do (sizes of 1 are special), and the stem's map has
# more than 20,480 elements (a smaller convolution takes another backend). One side is no multiple of stripes.
SIZES = ((128, 224), (224, 160))

DYNAMIC = [*(family for family in SMALL if family != "swin"), "mila", "ravlt", "inline_deit"]


@pytest.mark.parametrize("family", DYNAMIC)
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


def test_compile_swin() -> None:
    """One graph for a size: timm's masks of shifted windows are too hard for symbolic sizes."""
    torch._dynamo.reset()
    model = small("swin").eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    x = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


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


@pytest.mark.parametrize("family", DYNAMIC)
def test_export(family: str) -> None:
    model = small(family).eval()
    height, width = (torch.export.Dim(name, min=4, max=32) for name in ("height", "width"))
    program = torch.export.export(
        model, (torch.randn(2, 3, *SIZES[0]),), dynamic_shapes=({2: 32 * height, 3: 32 * width},)
    )
    for size in ((224, 224), (128, 320)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x))


def test_export_swin() -> None:
    """With the batch dynamic; sizes are fixed, as above."""
    model = small("swin").eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 96, 160),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 96, 160)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))
