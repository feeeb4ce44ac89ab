"""Layers in wrappers that call them and lack their attributes, as adapters do: every layer is called."""

from __future__ import annotations

import pytest
import torch
from families import SMALL, small
from torch import Tensor, nn

VARIANTS = {
    **{family: (family, {}) for family in SMALL},
    "pvt, reduced keys": ("pvt", {"la_sr_ratios": (8, 4, 2, 1), "attn_type": "LLSS"}),
    "pvt_v2, pooled keys": ("pvt_v2", {"linear": True}),
    "cswin, stripes": ("cswin", {"la_split_sizes": (8, 4, None, None)}),
    "swin, windows": ("swin", {"window_size": (14, 7, 7, 7)}),
}


class Wrapper(nn.Module):
    """Calls the layer, and has none of its attributes."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * 1.0


def wrap(model: nn.Module) -> list[Wrapper]:
    wrappers = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in (nn.Linear, nn.Conv2d):
                wrappers.append(Wrapper(child))
                setattr(module, name, wrappers[-1])
    return wrappers


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grad", [False, True])
def test_every_layer_may_be_wrapped(variant: str, grad: bool) -> None:
    torch.manual_seed(0)
    family, config = VARIANTS[variant]
    model = small(family, **config).eval()
    images = [torch.randn(2, 3, *size) for size in ((224, 224), (200, 136))]
    with torch.set_grad_enabled(grad):
        expected = [model(x) for x in images]
        wrappers = wrap(model)
        actual = [model(x) for x in images]
    assert wrappers
    assert all(wrapper.calls for wrapper in wrappers)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.set_input_size((192, 256))
        assert model(torch.randn(1, 3, 192, 256)).isfinite().all()
    assert model.state_dict()
