"""torchao and PT2E quantise the linear layers of our models, eager and compiled, as benchmarks/int8.py does
it, which makes the table of docs/deploy.md."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
import torch
from building import ROOT, install_beside
from families import SMALL, small
from torch import Tensor, nn

from flatten_ext import FocusedLinearAttention

pytestmark = pytest.mark.filterwarnings("ignore")

# Of what 8 bits leave of the logits' norm, twice what was measured (largest 0.02).
TOLERANCE = 0.04


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    install_beside(tmp_path_factory.mktemp("torchao"), "torchao")
    return runpy.run_path(str(ROOT / "benchmarks" / "int8.py"))["WAYS"]


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def layers_in_8_bits(model: nn.Module) -> int:
    """Of torchao's those whose weight is quantised; of PT2E's the weights that the graph holds as int8."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum("Int8" in type(x).__name__ or x.dtype == torch.int8 for x in tensors)


WAYS = ("torchao, weights", "torchao, weights and activations", "PT2E, weights and activations")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", SMALL)
@torch.no_grad()
def test_families(family: str, way: str, ways: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, images = small(family, img_size=64).eval(), torch.randn(4, 3, 64, 64)
    quantized = ways[way](model, images)
    linear = sum(type(m) is nn.Linear for m in model.modules())
    assert layers_in_8_bits(quantized) == linear > 0
    assert 0 < error(quantized(images), model(images)) < TOLERANCE


class OnMap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = FocusedLinearAttention(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, (8, 8))


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_compiled(way: str, ways: dict[str, Any]) -> None:
    """One attention, whose compilation is short; the table has whole models."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = OnMap().eval(), torch.randn(4, 64, 48)
    expected = model(x)
    quantized = ways[way](model, x)
    compiled = torch.compile(quantized, fullgraph=True)
    assert error(compiled(x), quantized(x)) < 2e-3
    assert 0 < error(compiled(x), expected) < TOLERANCE
