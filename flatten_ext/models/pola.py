"""PolaFormer (ICLR 2025, arXiv 2501.15061) in Swin and PVT, at ZacharyMeng/PolaFormer 44cdd39."""

from __future__ import annotations

from . import pvt, swin
from ._build import Variants, register
from .pvt import FlattenPyramidTransformer
from .swin import FlattenSwinTransformer

__all__: list[str] = []

_SWIN = {**swin.TINY, "attention": "pola"}
_WIDE = {**swin.BASE, "attention": "pola", "drop_path_rate": 0.5}
_PVT = {"attention": "pola", "resampling": "bilinear", "unused_norm": True}

register(
    __name__,
    "ZacharyMeng/PolaFormer",
    Variants(
        FlattenSwinTransformer,
        swin.checkpoint_filter_fn,
        {
            "pola_swin_tiny": {**_SWIN, "drop_path_rate": 0.2},
            "pola_swin_small": {**_SWIN, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3},
            "pola_swin_base": _WIDE,
            "pola_swin_base_384": {**_WIDE, "img_size": 384, "softmax_window": 12},
        },
        {"classifier": "head.fc"},
    ),
    Variants(
        FlattenPyramidTransformer,
        pvt.checkpoint_filter_fn,
        {
            "pola_pvt_tiny": {**_PVT, "drop_path_rate": 0.1},
            "pola_pvt_small": {**_PVT, "depths": (3, 4, 6, 3), "drop_path_rate": 0.1},
            "pola_pvt_medium": {**_PVT, "depths": (3, 4, 18, 3), "drop_path_rate": 0.3},
            "pola_pvt_large": {**_PVT, "depths": (3, 8, 27, 3), "drop_path_rate": 0.3},
        },
    ),
)
