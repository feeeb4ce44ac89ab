"""The five families at the smallest size that still has every kind of block."""

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


def small(family: str, **kwargs: Any) -> nn.Module:
    """A small model of `family`, 10 classes."""
    name, config = SMALL[family]
    return timm.create_model(name, **{"num_classes": 10, **config, **kwargs})
