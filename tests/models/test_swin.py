"""FLatten-Swin's windows: the whole map in stages of type L at any size, and else what the user says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from families import SMALL, small
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

import flatten_ext
from flatten_ext.models._fx import TraceableSwinBlock

SIZES = [224, 256, 384, 512, (640, 480), (200, 72), 100]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def linear_blocks(model: nn.Module) -> list[Any]:
    return [block for stage in model.layers for block in stage.blocks if hasattr(block.attn, "dwc")]


def reach(block: Any, size: tuple[int, int]) -> torch.Tensor:
    """Which positions of the map `size` the first one attends to."""
    x = torch.randn(1, *size, block.norm1.weight.numel(), requires_grad=True)
    block(x)[0, 0, 0].sum().backward()
    return x.grad[0].abs().amax(-1) > 0


@pytest.mark.parametrize("img_size", SIZES)
@pytest.mark.parametrize("way", ["built", "resized", "fed", "features"])
def test_linear_stages_are_global(img_size: int | tuple[int, int], way: str) -> None:
    name, config = SMALL["swin"]
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if way == "features":
        model = timm.create_model(name, **config, features_only=True, img_size=img_size).model.eval()
    else:
        model = small("swin", **({"img_size": img_size} if way == "built" else {})).eval()
    if way == "resized":
        model.set_input_size((height, width))
    maps = [(-(-height // stride), -(-width // stride)) for stride in (4, 8)]
    blocks = linear_blocks(model)
    assert len(blocks) == 2
    for block, size in zip(blocks, maps, strict=True):
        assert (block.window, block.shift) == (None, None)
        if way != "fed":
            assert block.window_size == block.input_resolution == size
            assert block.attn.positional_encoding.shape[1] == size[0] * size[1]
        assert reach(block, size).all()


@pytest.mark.parametrize("attn_type", ["LLLL", "LLLS", "SLSL"])
def test_linear_stages_are_global_wherever_they_are(attn_type: str) -> None:
    for model in (
        small("swin", img_size=256, attn_type=attn_type),
        timm.create_model("flatten_swin_base_384", **SMALL["swin"][1], img_size=512, attn_type=attn_type),
    ):
        blocks = linear_blocks(model)
        assert blocks
        assert all(block.window is None for block in blocks)


@pytest.mark.parametrize(
    ("name", "softmax", "img_size"),
    [("flatten_swin_tiny", 7, 256), ("flatten_swin_base_384", 12, 384), ("flatten_swin_base_384", 12, 512)],
)
def test_softmax_stages_keep_the_published_windows(name: str, softmax: int, img_size: int) -> None:
    model = timm.create_model(name, **SMALL["swin"][1], img_size=img_size)
    assert model.layers[2].blocks[0].window_size == (softmax, softmax)


def test_given_windows_are_meant() -> None:
    """A window that does not cover the map stays one, through every way to another size."""
    model = small("swin", img_size=256, window_size=(56, None, 7, 7)).eval()
    first, second = (stage.blocks[0] for stage in model.layers[:2])
    assert (first.window, first.shift) == ((56, 56), None)
    assert second.window is None
    assert reach(first, (64, 64)).sum() == 56 * 56
    model.set_input_size((512, 512))
    assert (first.window, second.window) == ((112, 112), None)
    model.set_input_size(window_size=7)
    assert first.window == second.window == (7, 7)
    model.set_input_size(window_size=(None, (8, 16), 7, 7))
    assert (first.window, second.window) == (None, (8, 16))
    model.set_input_size(window_ratio=8)
    assert first.window == second.window == (16, 16)
    model.set_input_size((256, 256))
    assert first.window == second.window == (8, 8)
    assert model(torch.randn(1, 3, 256, 256)).shape == (1, 10)


def test_odd_maps() -> None:
    """A window that covers its map covers it at every size, where the ratio to the grid is rounded too."""
    model = small("swin", window_size=(56, 28, 7, 7)).eval()
    model.set_input_size((228, 228))
    assert [block.window_size for block in linear_blocks(model)] == [(57, 57), (29, 29)]
    assert all(block.window is None for block in linear_blocks(model))


def test_a_shift_over_one_axis() -> None:
    model = small("swin", img_size=(32, 64), window_size=(8, 4, 2, 2), depths=(2, 2, 2, 1))
    block = model.layers[0].blocks[1]
    assert (block.window_size, block.shift_size) == ((8, 8), (0, 4))
    assert block.shift == (0, 4)
    assert block.input_resolution == (8, 16)


def test_converted_stages_are_global() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", **SMALL["swin"][1])
    flatten_ext.convert(model, "LLSS")
    model.set_input_size((256, 320))
    assert [block.window for block in linear_blocks(model)] == [None, None]
    assert [block.window_size for block in linear_blocks(model)] == [(64, 80), (32, 40)]
    assert model.layers[2].blocks[0].window_size == (8, 10)  # timm's rule: 7 of 56 patches


def test_conversion_after_a_resize() -> None:
    """Softmax windows grow from the size that the model has when it is converted."""
    model = timm.create_model("swin_tiny_patch4_window7_224", **SMALL["swin"][1])
    model.set_input_size((448, 448), window_size=14)
    flatten_ext.convert(model, "LLSS")
    model.set_input_size((224, 224))
    assert model.layers[2].blocks[0].window_size == (7, 7)


@pytest.mark.parametrize(
    "window_size", [(None, None, None, 7), (7, 7, 7), 0, (7, 7, 7, 0), ((1, 2, 3), 7, 7, 7)]
)
def test_bad_windows_change_nothing(window_size: Any) -> None:
    with pytest.raises((ValueError, AssertionError), match="window_size"):
        small("swin", window_size=window_size)
    model = small("swin")
    with pytest.raises((ValueError, AssertionError), match="window_size"):
        model.set_input_size((256, 256), window_size=window_size)
    assert model.patch_embed.img_size == (224, 224)
    assert linear_blocks(model)[0].window_size == (56, 56)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [((14, 14), (7, 7), 3), ((14, 21), (7, 7), (3, 0)), ((7, 21), (7, 7), (0, 3)), ((13, 9), (4, 3), (2, 1))],
)
def test_masks_of_shifted_windows_are_timms(size, window, shift, dynamic: bool, dtype: torch.dtype) -> None:
    theirs = SwinTransformerBlock(8, size, 2, window_size=window, shift_size=shift, dynamic_mask=dynamic)
    ours = copy.deepcopy(theirs)
    ours.__class__ = TraceableSwinBlock
    padded = [-(-side // w) * w for side, w in zip(size, window, strict=True)]
    x = torch.zeros(2, *padded, 8, dtype=dtype)
    mask = ours.get_attn_mask(x)
    assert mask.dtype == dtype
    assert torch.equal(mask, theirs.get_attn_mask(x))
    assert torch.equal(ours.get_attn_mask(), theirs.get_attn_mask())
