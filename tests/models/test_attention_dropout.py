"""Dropout of attention weights: softmax stages use it, linear ones have none to drop and say so."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from families import SMALL, small

import flatten_ext

TYPES = {"deit": ("LL", "LS"), **{f: ("LLLL", "LLSS") for f in ("swin", "pvt", "pvt_v2", "cswin")}}
SOFTMAX = {"deit": "deit_tiny_patch16_224", "swin": "swin_tiny_patch4_window7_224", "pvt_v2": "pvt_v2_b0"}


@pytest.mark.parametrize("family", SMALL)
def test_without_softmax_it_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match=r"attn_drop_rate is 0\.9, expected 0"):
        small(family, img_size=64, attn_type=TYPES[family][0], attn_drop_rate=0.9)


@pytest.mark.parametrize("family", SMALL)
def test_softmax_uses_it_and_a_warning_names_the_others(family: str) -> None:
    mixed = TYPES[family][1]
    places = "0, 1 of" if len(mixed) == 4 else "0 of"
    with pytest.warns(UserWarning, match=rf"attn_drop_rate=0\.9 has no effect in {places} attn_type"):
        model = small(family, img_size=64, attn_type=mixed, attn_drop_rate=0.9, drop_path_rate=0.0)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        kept = model.eval()(x)
        assert not torch.equal(model.train()(x), kept)


@pytest.mark.parametrize("family", SMALL)
def test_nothing_is_said_without_it(family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        small(family, img_size=64)
        small(family, img_size=64, attn_type="S" * len(TYPES[family][0]), attn_drop_rate=0.1)


@pytest.mark.parametrize("family", SOFTMAX)
def test_conversion(family: str) -> None:
    def original() -> torch.nn.Module:
        return timm.create_model(SOFTMAX[family], **SMALL[family][1], attn_drop_rate=0.2)

    model = original()
    kind, keys = type(model), set(model.state_dict())
    with pytest.raises(ValueError, match=r"attn_drop_rate is 0\.2, expected 0"):
        flatten_ext.convert(model, TYPES[family][0])
    assert type(model) is kind, "a refused model stays what it was"
    assert set(model.state_dict()) == keys
    with pytest.warns(UserWarning, match=r"attn_drop_rate=0\.2 has no effect"):
        flatten_ext.convert(original(), TYPES[family][1])
