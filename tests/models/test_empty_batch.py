"""A batch of no images has no logits, and leaves gradients of zero."""

from __future__ import annotations

import pytest
import torch
from families import ALL, small


@pytest.mark.parametrize("family", ALL)
def test_an_empty_batch(family: str) -> None:
    model = small(family, img_size=64).eval()
    out = model(torch.randn(0, 3, 64, 96))
    assert out.shape == (0, 10)
    assert model.forward_features(torch.randn(0, 3, 64, 64)).shape[0] == 0
    out.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name
