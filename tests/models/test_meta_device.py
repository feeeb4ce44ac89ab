"""Models built on the meta device and given memory by to_empty hold initial values, not what memory held."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from families import ALL, small
from torch import Tensor, nn

import flatten_ext

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ALL},
    "deit, registers": ("deit", {"reg_tokens": 2, "init_values": 0.1, "class_token": True}),
    "swin, static masks": ("swin", {"dynamic_img_size": False, "depths": (1, 2, 2, 2), "attn_type": "LSSS"}),
    "swin, windows": ("swin", {"window_size": (14, 7, 7, 7)}),
    "pvt, softmax": ("pvt", {"attn_type": "LLSS", "la_sr_ratios": (8, 4, 2, 1)}),
    "pvt_v2, pooled": ("pvt_v2", {"linear": True, "attn_type": "LLSS"}),
    "cswin, stripes": ("cswin", {"la_split_sizes": (None, 7, None, None)}),
}


def by_modules(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def by_timm(model: nn.Module) -> None:
    model.init_weights()


def poisoned(model: nn.Module) -> nn.Module:
    """The model with memory that held something else."""
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in tensors(model).values():
            tensor.fill_(math.nan if tensor.is_floating_point() else -(1 << 40))
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check(model: nn.Module, fresh: nn.Module, *, exact_layers: bool) -> None:
    expected, actual = tensors(fresh), tensors(model)
    assert actual.keys() == expected.keys()
    buffers = dict(fresh.named_buffers())
    for name, value in expected.items():
        now = actual[name].detach().double()
        value = value.detach().double()
        assert now.isfinite().all(), name
        constant = bool((value == value.flatten()[0]).all()) and "dwc" not in name
        embedding = name.endswith(("pos_embed", "relative_position_bias_table", "_token"))
        if name in buffers or name.endswith((".scale", ".positional_encoding")):
            torch.testing.assert_close(now, value, rtol=0, atol=0, msg=name)
        elif (embedding or exact_layers) and value.numel() > 2000:
            assert 0.9 < now.std() / value.std() < 1.1, name
        elif exact_layers and constant:
            torch.testing.assert_close(now, value, rtol=0, atol=0, msg=name)
        if name.endswith((".scale", ".positional_encoding")):
            assert not now.any(), name


@pytest.mark.parametrize("reset", [by_modules, by_timm])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", ["context", "argument"])
def test_initial_values(variant: str, reset: Callable[[nn.Module], None], way: str) -> None:
    torch.manual_seed(0)
    family, config = VARIANTS[variant]
    if way == "context":
        with torch.device("meta"):
            model = small(family, **config)
    else:
        model = small(family, **config, device="meta")
    assert all(tensor.is_meta for tensor in tensors(model).values())
    model = poisoned(model)
    reset(model)
    check(model, small(family, **config), exact_layers=reset is by_timm)
    assert model.eval()(torch.randn(1, 3, 224, 224)).isfinite().all()


@pytest.mark.parametrize("reset", [by_modules, by_timm])
@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("deit_tiny_patch16_224", "deit"),
        ("deit_tiny_distilled_patch16_224", "deit"),
        ("swin_tiny_patch4_window7_224", "swin"),
        ("pvt_v2_b0", "pvt_v2"),
    ],
)
def test_converted_models(name: str, family: str, reset: Callable[[nn.Module], None]) -> None:
    def converted(**kwargs: Any) -> nn.Module:
        return flatten_ext.convert(timm.create_model(name, **ALL[family][1], **kwargs))

    torch.manual_seed(0)
    model = poisoned(converted(device="meta"))
    reset(model)
    check(model, converted(), exact_layers=False)


@pytest.mark.parametrize("family", ALL)
def test_a_new_size_first(family: str) -> None:
    """set_input_size on the meta device, then memory. (timm's older releases resize no tables there.)"""
    linear = {"attn_type": "LLLL"} if family.endswith("swin") else {}
    model = small(family, device="meta", **linear)
    model.set_input_size((64, 96))
    model = poisoned(model)
    by_timm(model)
    assert model.eval()(torch.randn(1, 3, 64, 96)).isfinite().all()
