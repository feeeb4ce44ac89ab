"""FLatten's five families, MILA, RAVLT, MAViT, InLine and PolaFormer, registered with timm when imported.

`timm.create_model("flatten_swin_tiny")` and its like build the paper's configurations; `load_official` loads
the published checkpoints into them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from . import cswin, deit, mila, pvt, pvt_v2, ravlt, swin
from . import inline as inline
from . import pola as pola
from ._attention import FocusedAttention
from ._checkpoint import grid_pair, load_weights
from .cswin import FlattenCSWinTransformer
from .deit import FlattenVisionTransformer, FlattenVisionTransformerDistilled
from .mila import MilaTransformer
from .pvt import FlattenPyramidTransformer
from .pvt_v2 import FlattenPyramidTransformerV2
from .ravlt import RavltTransformer
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
    "MilaTransformer",
    "RavltTransformer",
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
    MilaTransformer: mila.checkpoint_filter_fn,
    RavltTransformer: ravlt.checkpoint_filter_fn,
}


FAMILIES = tuple(_FILTERS)


def checkpoint_filter(model: nn.Module) -> Callable[..., dict[str, Any]]:
    """The function (state_dict, model, grid=None) that renames and resamples a checkpoint for `model`.

    `grid`, the map of patches (height, width) that the checkpoint was trained for, is needed where neither
    its metadata nor its names say it: see `load_official`.

    Raises:
        TypeError: `model` is of none of the families.
    """
    for family, filter_fn in _FILTERS.items():
        if isinstance(model, family):
            return partial(filter_fn, own=False)
    raise TypeError(f"{type(model).__name__} is not a model of flatten_ext.models")


def load_official(
    model: nn.Module,
    path: str | os.PathLike[str],
    new_classifier: bool = False,
    grid: int | tuple[int, int] | None = None,
) -> nn.Module:
    """Loads a published .pth file (`{"model": state_dict, ...}`, or a bare state_dict) into `model`, whole.

    Positional encodings and relative position tables are interpolated to the model's resolution; buffers
    that the model rebuilds are ignored.

    From which map they are interpolated: published files have square maps. Files of this package say it where
    torch.save wrote a model's `state_dict()`, whose metadata keeps it. Where the metadata is lost
    (safetensors, distributed checkpoints, a plain dict) `grid` has to say it: 64 x 64 tokens are as many as
    32 x 128, even where the model has the same number.

    Args:
        model: a model of `flatten_ext.models`.
        path: the checkpoint. It is unpickled with weights_only, so it cannot run code; if it holds
            averaged (EMA) weights too, those are taken.
        new_classifier: for fine-tuning: leave the model's classifier as it is if it has another number of
            classes.
        grid: height and width of the map of patches that the checkpoint was trained for; one number is a
            square. Patches have stride 4 (in DeiT the patch size, 16): 56 for 224 x 224 pixels in Swin.

    Returns:
        `model`.

    Raises:
        TypeError: a model of none of the families.
        FileNotFoundError: there is no file at `path`.
        ValueError: `path` is empty, damaged or holds no state_dict; or the map of its encodings is not known,
            or is not that of `grid`; or naming every parameter that is missing, unexpected, or of another
            shape. The model is then unchanged.

    Example:
        >>> model = timm.create_model("flatten_pvt_v2_b0", img_size=(128, 512))
        >>> flatten_ext.load_official(model, "flatten_pvt_v2_b0.pth")                     # published
        >>> flatten_ext.load_official(model, "model.safetensors", grid=(32, 128))         # of the same size
    """
    return load_weights(model, path, partial(checkpoint_filter(model), grid=grid_pair(grid)), new_classifier)
