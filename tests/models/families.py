"""The families at the smallest size that still has every kind of block: SMALL are FLatten's, ALL has the
others too, those on FLatten's hosts under their attention's name and the host's."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

import flatten_ext.models  # noqa: F401  registers them

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("flatten_deit_tiny", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "swin": (
        "flatten_swin_tiny",
        {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)},
    ),
    "pvt": ("flatten_pvt_tiny", {"embed_dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1)}),
    "pvt_v2": ("flatten_pvt_v2_b0", {"embed_dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1)}),
    "cswin": (
        "flatten_cswin_tiny",
        {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 4, 4, 4)},
    ),
}

_PYRAMID = {"embed_dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1)}
_HEADS = {**_PYRAMID, "num_heads": (1, 2, 5, 8)}

ALL: dict[str, tuple[str, dict[str, Any]]] = {
    **SMALL,
    "inline_deit": ("inline_deit_tiny", SMALL["deit"][1]),
    "inline_swin": (
        "inline_swin_base",  # whose third stage has blocks of both kinds
        {"embed_dim": 16, "depths": (1, 1, 3, 1), "num_heads": (1, 2, 4, 8)},
    ),
    "inline_pvt": ("inline_pvt_tiny", _HEADS),
    "inline_cswin": ("inline_cswin_tiny", SMALL["cswin"][1]),
    "pola_swin": ("pola_swin_tiny", SMALL["swin"][1]),
    "pola_pvt": ("pola_pvt_tiny", _HEADS),
    "mila": ("mila_tiny", {"embed_dim": 16, "depths": (1, 1, 1, 1)}),
    "ravlt": ("ravlt_tiny", {**_HEADS, "num_heads": (1, 2, 5, 4)}),
    "mavit": ("mavit_tiny", {**_HEADS, "num_heads": (1, 2, 5, 4), "projection": 48}),
}


def host(family: str) -> str:
    """inline_swin -> swin."""
    return family.rpartition("_")[2] if family not in SMALL else family


def small(family: str, **kwargs: Any) -> nn.Module:
    """A small model of `family`, 10 classes."""
    name, config = ALL[family]
    return timm.create_model(name, **{"num_classes": 10, **config, **kwargs})
