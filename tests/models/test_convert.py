"""convert: timm's softmax models become the focused ones, keeping every weight that carries over."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from families import SMALL

import flatten_ext
from flatten_ext import models

SOFTMAX = {
    "deit": ("deit_tiny_patch16_224", "flatten_deit_tiny", None),
    "swin": ("swin_tiny_patch4_window7_224", "flatten_swin_tiny", "LLSS"),
    "pvt_v2": ("pvt_v2_b0", "flatten_pvt_v2_b0", "LLLL"),
}


@pytest.mark.parametrize("family", SOFTMAX)
def test_conversion(family: str) -> None:
    softmax, focused, stages = SOFTMAX[family]
    config = {"num_classes": 10, **SMALL[family][1]}
    if family != "pvt_v2":
        config["img_size"] = 64
    model = timm.create_model(softmax, **config)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    converted = flatten_ext.convert(model.eval(), stages, img_size=64)
    assert converted is model
    assert not any(m.training for m in model.modules())

    counterpart = timm.create_model(focused, **{**config, "img_size": 64}).eval()
    assert type(model) is type(counterpart)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in counterpart.state_dict().items()
    }
    report = model.conversion
    assert {name.rpartition("attn.")[2] for name in report.new} == {
        "scale",
        "positional_encoding",
        "dwc.weight",
        "dwc.bias",
    }
    parts = {part for name in report.dropped for part in name.split(".attn.")[1].split(".")[:1]}
    assert (
        parts == {"swin": {"relative_position_bias_table"}, "pvt_v2": {"sr", "norm"}, "deit": set()}[family]
    )
    assert set(report.kept) == set(old) - set(report.dropped)
    for name in report.kept:
        torch.testing.assert_close(model.get_parameter(name), old[name], rtol=0, atol=0)

    x = torch.randn(2, 3, 64, 96)
    counterpart.load_state_dict(model.state_dict())
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    if family == "pvt_v2":
        torch.testing.assert_close(model(x), counterpart(x))


def test_reduction_may_stay() -> None:
    model = timm.create_model("pvt_v2_b0", **SMALL["pvt_v2"][1])
    flatten_ext.convert(model, img_size=64, keep_reduction=True)
    assert not model.conversion.dropped
    assert model.stages[0].blocks[0].attn.positional_encoding.shape[1] == 4
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_distilled_deit() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", **SMALL["deit"][1], img_size=64)
    flatten_ext.convert(model)
    assert isinstance(model, models.FlattenVisionTransformerDistilled)
    assert model.blocks[0].attn.positional_encoding.shape[1] == 2 + 16
    model(torch.randn(2, 3, 64, 64)).sum().backward()


def test_stages_divide_the_blocks_of_a_transformer() -> None:
    model = timm.create_model("deit_tiny_patch16_224", embed_dim=24, num_heads=3, depth=4)
    flatten_ext.convert(model, "LS")
    kinds = [hasattr(block.attn, "dwc") for block in model.blocks]
    assert kinds == [True, True, False, False]
    assert model.eval()(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


def test_swin_windows_may_stay() -> None:
    config = {**SMALL["swin"][1], "depths": (1, 2, 1, 1)}
    model = timm.create_model("swin_tiny_patch4_window7_224", **config)
    flatten_ext.convert(model, "SLSS", window_size=7)
    first, second = model.layers[1].blocks
    assert (first.window, first.shift) == ((7, 7), None)
    assert (second.window, second.shift) == ((7, 7), (3, 3))
    assert model.eval()(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("name", "kwargs", "error"),
    [
        ("resnet18", {}, TypeError),
        ("deit_tiny_patch16_224", {"stages": "LLSSL"}, ValueError),
        ("swin_tiny_patch4_window7_224", {"stages": "LL"}, ValueError),
        ("vit_little_patch16_reg4_gap_256", {}, None),
    ],
)
def test_errors(name: str, kwargs: dict[str, str], error: type[Exception] | None) -> None:
    model = timm.create_model(name)
    if error is None:  # registers are prefix tokens like any other
        flatten_ext.convert(model, **kwargs)
        return
    with pytest.raises(error):
        flatten_ext.convert(model, **kwargs)


def test_qk_norm_is_refused() -> None:
    model = timm.create_model("vit_tiny_patch16_224", qk_norm=True, depth=1)
    with pytest.raises(ValueError, match="qk_norm"):
        flatten_ext.convert(model)


@pytest.mark.parametrize("to", ["mila", "rala", "mala", "inline", "pola"])
@pytest.mark.parametrize("family", SOFTMAX)
def test_other_attentions(family: str, to: str) -> None:
    """Weights stay, gates open, and rectangles of any size run; the linear stages are those asked for."""
    name, host, _ = SOFTMAX[family]
    config = {"num_classes": 10, **SMALL[family][1]}
    any_size = {"deit": "dynamic_img_size", "swin": "dynamic_img_size", "pvt_v2": None}[family]
    if any_size is not None:
        config |= {"img_size": 64, any_size: True}
    if family == "swin":
        config = {"img_size": 64, "strict_img_size": False, **SMALL[family][1]}
    model = timm.create_model(name, **config)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    converted = flatten_ext.convert(model, to=to, img_size=64)
    assert converted is model
    assert type(model) is type(timm.create_model(host))
    for key in model.conversion.kept:
        torch.testing.assert_close(model.get_parameter(key), old[key], rtol=0, atol=0)
    widened = [key for key in model.conversion.new if re.search(r"\.(qkv|q)[og]\.weight$", key)]
    assert bool(widened) == (to in ("rala", "mala", "pola"))
    for key in widened:
        before = old[re.sub(r"[og]\.weight$", ".weight", key)]
        now, layer = model.get_parameter(key), model.get_submodule(key.rpartition(".")[0])
        torch.testing.assert_close(now[: len(before)], before, rtol=0, atol=0)
        assert not now[len(before) :].any()
        assert bool((layer.bias[len(before) :] == 1).all())
    for size in ((64, 64), (96, 64)):
        model(torch.randn(2, 3, *size)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_windows_of_other_attentions() -> None:
    """In windows that do not cover the map, shifted ones too."""
    for to in ("mila", "rala", "mala", "inline", "pola"):
        config = {"img_size": 64, "strict_img_size": False, **SMALL["swin"][1], "depths": (2, 1, 1, 1)}
        model = timm.create_model("swin_tiny_patch4_window7_224", **config)
        model = flatten_ext.convert(model, "LLSS", to=to, window_size=4).eval()
        assert model.layers[0].blocks[1].shift == (2, 2)
        x = torch.randn(2, 3, 64, 96)
        with torch.no_grad():
            torch.testing.assert_close(model(x)[1:], model(x[1:]), rtol=1e-4, atol=1e-5)


def test_other_attentions_refuse() -> None:
    model = timm.create_model("pvt_v2_b0", **SMALL["pvt_v2"][1])
    with pytest.raises(ValueError, match="to='rala' rotates keys"):
        flatten_ext.convert(model, to="rala", keep_reduction=True)
    with pytest.raises(ValueError, match="'inline' reads no focusing_factor"):
        flatten_ext.convert(model, to="inline", focusing_factor=2)
    with pytest.raises(ValueError, match="expected one of 'flatten', 'mila'"):
        flatten_ext.convert(model, to="performer")
    assert type(model) is timm.models.pvt_v2.PyramidVisionTransformerV2
    reduced = flatten_ext.convert(model, to="inline", keep_reduction=True).eval()
    assert reduced(torch.randn(1, 3, 64, 96)).isfinite().all()
