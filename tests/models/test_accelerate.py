"""timm's EfficientViT on the operator gives timm's results."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import flatten_ext


def small(name: str = "efficientvit_b0") -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    with torch.no_grad():  # running statistics as of a trained model: the initial ones change nothing
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.mul_(0.9).add_(0.05)
    return model.eval()


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (128, 32)])
def test_results_and_gradients(size: tuple[int, int], called: bool) -> None:
    """Where the layers' weights are read, and where a hook wants the layers to be called."""
    model = small().double()
    fast = flatten_ext.accelerate(copy.deepcopy(model))
    seen: list[nn.Module] = []
    layers = [m for m in fast.modules() if type(m).__name__ == "OperatorLiteMLA"] if called else []
    for layer in layers:
        layer.aggreg[0][1].register_forward_hook(lambda module, *_: seen.append(module))
    assert fast.state_dict().keys() == model.state_dict().keys()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    gradients = []
    for network in (model, fast):
        x = image.clone().requires_grad_()
        out = network(x)
        out.square().sum().backward()
        gradients.append((out.detach(), x.grad, *(p.grad for p in network.parameters())))
    for expected, actual in zip(*gradients, strict=True):
        scale = float(expected.abs().max()) + 1e-12
        assert float((actual - expected).abs().max()) < 1e-6 * scale  # timm computes in float32
    assert len(seen) == len(layers)
    image = image.float()
    with torch.inference_mode():
        expected, actual = model.float()(image), fast.float()(image)
    assert float((actual - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_every_attention_is_served() -> None:
    """B and L series; a second call changes nothing; other models are refused."""
    for name in ("efficientvit_b0", "efficientvit_l1"):
        with torch.device("meta"):
            model = timm.create_model(name)
        kinds = {type(m).__name__ for m in flatten_ext.accelerate(flatten_ext.accelerate(model)).modules()}
        assert "OperatorLiteMLA" in kinds
        assert "LiteMLA" not in kinds
    with pytest.raises(ValueError, match="has no attention to accelerate"):
        flatten_ext.accelerate(nn.Linear(2, 2))


def test_half_precision() -> None:
    model = small().half()
    image = torch.randn(1, 3, 64, 64).half()
    with torch.inference_mode():
        expected, actual = model(image), flatten_ext.accelerate(copy.deepcopy(model))(image)
    assert float((actual - expected).abs().max()) < 2e-2 * float(expected.abs().max())
