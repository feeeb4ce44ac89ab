"""Turning timm's softmax models into linear ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from . import (
    FlattenPyramidTransformerV2,
    FlattenSwinTransformer,
    FlattenVisionTransformer,
    FlattenVisionTransformerDistilled,
)
from ._attention import Packed, Pyramid
from ._choice import ROTATED, choose
from ._timm import attention_types, check_attention_dropout

__all__ = ["Conversion", "convert"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """What `convert` did to the parameters of a model, by name."""

    kept: tuple[str, ...]  # carried over unchanged
    new: tuple[str, ...]  # freshly initialised, or widened by a gate: scale, positional_encoding, dwc, ...
    dropped: tuple[str, ...]  # without a counterpart: relative position bias tables, spatial reduction


def convert(
    model: Any,
    stages: str | None = None,
    *,
    to: str = "flatten",
    img_size: int | tuple[int, int] = 224,
    window_size: int | tuple[int, int] | None = None,
    keep_reduction: bool = False,
    focusing_factor: float = 3.0,
    kernel_size: int = 5,
) -> nn.Module:
    """Replaces the softmax attention of a timm model by focused, or another, linear attention, in place.

    Every weight that has a counterpart is kept, projections included; but softmax and linear attention are
    different functions, and the new parameters (`scale`, `positional_encoding`, `dwc` of focused attention)
    know nothing yet: **the converted model needs fine-tuning**, for instance by `python -m flatten_ext train
    --convert`, distilling from the original. Where an attention has a gate, the projection of the queries
    is a new, wider parameter: its first rows are the old ones, and the gate starts as 1.

    Args:
        model: a timm VisionTransformer (DeiT, ViT), distilled DeiT, SwinTransformer or PVTv2.
        to: the attention: "flatten", "mila", "rala", "mala", "inline" or "pola".
        stages: "L" (convert) or "S" (leave) for each stage of a Swin or PVTv2, whose default is the paper's,
            LLSS and LLLL. For a vision transformer the letters divide the blocks evenly, and the default
            converts all.
        img_size: PVTv2 only, which does not know its input size: where positional encodings are learned.
        window_size: Swin only: window of the converted stages; None is the whole map, as published.
        keep_reduction: PVTv2 only: keep the spatial reduction of keys and values (`sr`, `norm`), which the
            published models drop, since linear attention affords all keys.
        focusing_factor: p of phi_p.
        kernel_size: odd size of the depthwise kernel.

    Returns:
        `model`, now of the class of `flatten_ext.models` that it became. Its attribute `conversion` lists
        the parameters that were kept, are new, or were dropped; the new ones are logged too.

    Raises:
        TypeError: a model of another family.
        ValueError: `stages` of the wrong length, attention with no counterpart (qk_norm), attention
            dropout where no softmax stays to use it, an option that `to` does not read, or reduced keys
            where it rotates them.
    """
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    options = {"focusing_factor": focusing_factor, "kernel_size": kernel_size}
    if type(model) in _TRANSFORMERS:
        _convert_transformer(model, stages, choose(to, "packed", **options))
    elif type(model) is SwinTransformer:
        _convert_swin(model, stages or "LLSS", window_size, choose(to, "packed", **options))
    elif type(model) is PyramidVisionTransformerV2:
        attention = choose(to, "pyramid", **options)
        if to in ROTATED and (keep_reduction or any(block.attn.pool is not None for block in _blocks(model))):
            raise ValueError(
                f"to={to!r} rotates keys by their places on the map of the queries: it takes no reduced keys "
                "(keep_reduction, PVTv2 linear)"
            )
        _convert_pyramid(model, stages or "LLLL", img_size, keep_reduction, attention)
    else:
        raise TypeError(
            f"convert takes timm's VisionTransformer, VisionTransformerDistilled, SwinTransformer or "
            f"PyramidVisionTransformerV2, not {type(model).__name__}"
        )
    for module in model.modules():
        if isinstance(module, Packed | Pyramid):
            module.open_gate()
    model.train(model.training)  # the new modules too
    after = {name: id(parameter) for name, parameter in model.named_parameters()}
    conversion = Conversion(
        kept=tuple(name for name in after if before.get(name) == after[name]),
        new=tuple(name for name in after if before.get(name) != after[name]),
        dropped=tuple(name for name in before if name not in after),
    )
    _logger.info("new parameters, to be fine-tuned: %s", ", ".join(conversion.new))
    setattr(model, "conversion", conversion)  # noqa: B010 - nn.Module declares no such attribute
    return model


_TRANSFORMERS = {
    VisionTransformer: FlattenVisionTransformer,
    VisionTransformerDistilled: FlattenVisionTransformerDistilled,
}


def _convert_transformer(model: Any, stages: str | None, attention: Callable[..., nn.Module]) -> None:
    depth, letters = len(model.blocks), stages or "L"
    if depth % len(letters):
        raise ValueError(f"stages ({letters!r}) does not divide {depth} blocks evenly")
    types = "".join(letter * (depth // len(letters)) for letter in letters)
    check_attention_dropout(types, _attention_dropout(model))
    family = _TRANSFORMERS[type(model)]
    family.focus(model, types, attention)
    model.__class__ = family


def _convert_swin(model: Any, stages: str, window_size: Any, attention: Callable[..., nn.Module]) -> None:
    types = attention_types(stages, len(model.layers))
    check_attention_dropout(types, _attention_dropout(model))
    target = None if window_size is None else _pair(window_size)
    windows = [
        target if kind == "L" else stage.blocks[0].window_size
        for kind, stage in zip(types, model.layers, strict=True)
    ]
    model.__class__ = FlattenSwinTransformer
    model.focus(types, windows, attention)


def _convert_pyramid(
    model: Any, stages: str, img_size: Any, keep_reduction: bool, attention: Callable[..., nn.Module]
) -> None:
    types = attention_types(stages, len(model.stages))
    check_attention_dropout(types, _attention_dropout(model))
    for stage, kind in zip(model.stages, types, strict=True):
        for block in stage.blocks:
            if kind == "L" and not keep_reduction and block.attn.pool is None:
                block.attn.sr = block.attn.norm = None
    model.__class__ = FlattenPyramidTransformerV2
    model.focus(types, img_size, attention)


def _blocks(model: Any) -> Iterator[Any]:
    for stage in model.stages:
        yield from stage.blocks


def _attention_dropout(model: nn.Module) -> float:
    """The largest rate at which the attentions of `model` drop weights."""
    rates = [getattr(getattr(module, "attn_drop", None), "p", 0.0) for module in model.modules()]
    return max(rates)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
