"""The five families of the paper on `torch.ops.flatten.attention`, registered with timm when imported.

`timm.create_model("flatten_swin_tiny")` and its like build the paper's configurations; `load_official` loads
the published checkpoints into them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from . import cswin, deit, pvt, pvt_v2, swin
from ._attention import FocusedAttention
from ._checkpoint import load_official
from .cswin import FlattenCSWinTransformer
from .deit import FlattenVisionTransformer, FlattenVisionTransformerDistilled
from .pvt import FlattenPyramidTransformer
from .pvt_v2 import FlattenPyramidTransformerV2
from .swin import FlattenSwinTransformer

__all__ = [
    "FAMILIES",
    "FlattenCSWinTransformer",
    "FlattenPyramidTransformer",
    "FlattenPyramidTransformerV2",
    "FlattenSwinTransformer",
    "FlattenVisionTransformer",
    "FlattenVisionTransformerDistilled",
    "FocusedAttention",
    "checkpoint_filter",
    "load_official",
]

_FILTERS: dict[type[nn.Module], Callable[..., Any]] = {
    FlattenCSWinTransformer: cswin.checkpoint_filter_fn,
    FlattenPyramidTransformer: pvt.checkpoint_filter_fn,
    FlattenPyramidTransformerV2: pvt_v2.checkpoint_filter_fn,
    FlattenSwinTransformer: swin.checkpoint_filter_fn,
    FlattenVisionTransformer: deit.checkpoint_filter_fn,
    FlattenVisionTransformerDistilled: deit.checkpoint_filter_fn,
}


FAMILIES = tuple(_FILTERS)


def checkpoint_filter(model: nn.Module) -> Callable[..., dict[str, Any]]:
    """The function (state_dict, model, grid=None) that renames and resamples a checkpoint for `model`.

    `grid`, the map of patches (height, width) that the checkpoint was trained for, is needed where neither
    its metadata nor its names say it: see `load_official`.

    Raises:
        TypeError: `model` is of none of the five families.
    """
    for family, filter_fn in _FILTERS.items():
        if isinstance(model, family):
            return partial(filter_fn, own=False)
    raise TypeError(f"{type(model).__name__} is not a model of flatten_ext.models")
