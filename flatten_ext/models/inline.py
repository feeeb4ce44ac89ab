"""InLine attention (NeurIPS 2024, arXiv 2412.06590) in Swin, PVT, DeiT and CSwin.

As LeapLabTHU/InLine has them at commit e463a6f.
"""

from __future__ import annotations

from . import cswin, deit, pvt, swin
from ._build import Variants, register
from .cswin import FlattenCSWinTransformer
from .deit import FlattenVisionTransformer
from .pvt import FlattenPyramidTransformer
from .swin import FlattenSwinTransformer

__all__: list[str] = []

_INLINE = {"attention": "inline"}
_SWIN = {**swin.TINY, **_INLINE}
_WIDE = {**swin.BASE, **_INLINE, "attn_type": "LLMS", "drop_path_rate": 0.5}
_PVT = {**_INLINE, "num_heads": (2, 4, 10, 16), "resampling": "bilinear"}
_DEIT = {**_INLINE, "drop_path_rate": 0.1}
_CSWIN = {**cswin.BASE, **_INLINE}

register(
    __name__,
    "LeapLabTHU/InLine",
    Variants(
        FlattenSwinTransformer,
        swin.checkpoint_filter_fn,
        {
            "inline_swin_tiny": {**_SWIN, "attn_type": "LLLS", "drop_path_rate": 0.2},
            "inline_swin_small": {**_SWIN, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3},
            "inline_swin_base": _WIDE,
            "inline_swin_base_384": {**_WIDE, "img_size": 384, "softmax_window": 12},
        },
        {"classifier": "head.fc"},
    ),
    Variants(
        FlattenPyramidTransformer,
        pvt.checkpoint_filter_fn,
        {
            "inline_pvt_tiny": {**_PVT, "drop_path_rate": 0.1},
            "inline_pvt_small": {**_PVT, "depths": (3, 4, 6, 3), "drop_path_rate": 0.1},
            "inline_pvt_medium": {**_PVT, "depths": (3, 4, 18, 3), "drop_path_rate": 0.3},
            "inline_pvt_large": {**_PVT, "depths": (3, 8, 27, 3), "drop_path_rate": 0.3},
        },
    ),
    Variants(
        FlattenVisionTransformer,
        deit.checkpoint_filter_fn,
        {
            "inline_deit_tiny": {**_DEIT, "embed_dim": 192, "num_heads": 6},
            "inline_deit_small": {**_DEIT, "img_size": 288, "embed_dim": 320, "num_heads": 10},
            "inline_deit_base": {**_DEIT, "img_size": 448, "embed_dim": 384, "num_heads": 12},
        },
        {"pool_size": None},
        out_indices=3,
    ),
    Variants(
        FlattenCSWinTransformer,
        cswin.checkpoint_filter_fn,
        {
            "inline_cswin_tiny": {**_INLINE, "drop_path_rate": 0.2},
            "inline_cswin_small": {**_INLINE, "depths": (3, 6, 29, 2), "drop_path_rate": 0.4},
            "inline_cswin_base": {**_CSWIN, "drop_path_rate": 0.5},
            "inline_cswin_base_384": {
                **_CSWIN,
                "img_size": 384,
                "split_sizes": (1, 2, 12, 12),
                "drop_path_rate": 0.7,
            },
        },
    ),
    unpublished=("inline_swin_base_384", "inline_cswin_base_384"),
)
