"""The attentions by name, in the two places that the hosts have for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..reference import from_windows, to_windows
from ._attention import FocusedAttention, Packed, PackedAttention, Pyramid, PyramidAttention, Size
from ._cores import (
    InlineAttention,
    MalaAttention,
    MilaAttention,
    PolarAttention,
    RalaAttention,
    RotarySoftmaxAttention,
)

__all__ = ["ATTENTIONS", "ROTATED", "choose"]


class PackedMila(Packed, MilaAttention):
    """MILA's attention between packed projections."""


class PackedRala(Packed, RalaAttention):
    """RALA's attention between packed projections."""


class PackedMala(Packed, MalaAttention):
    """MALA's attention between packed projections."""


class PackedRotarySoftmax(Packed, RotarySoftmaxAttention):
    """The softmax attention of RAVLT and MAViT between packed projections."""


class PackedInline(Packed, InlineAttention):
    """InLine's attention between packed projections; each window makes its own taps."""

    def forward(self, x: Tensor, size: Size, window: Size | None = None, shift: Size | None = None) -> Any:
        """(B, N, C) tokens in raster order, prefix tokens first -> (B, N, C)."""
        if window is None:
            return super().forward(x, size)
        tiles = to_windows(x, size, window, shift)
        out = super().forward(tiles.flatten(0, 1), window)
        return from_windows(out.unflatten(0, (x.shape[0], -1)), size, window, shift)


class PackedPolar(Packed, PolarAttention):
    """PolaFormer's attention between packed projections."""


class PyramidMila(Pyramid, MilaAttention):
    """MILA's attention between PVT's projections."""


class PyramidRala(Pyramid, RalaAttention):
    """RALA's attention between PVT's projections."""


class PyramidMala(Pyramid, MalaAttention):
    """MALA's attention between PVT's projections."""


class PyramidInline(Pyramid, InlineAttention):
    """InLine's attention between PVT's projections."""


class PyramidPolar(Pyramid, PolarAttention):
    """PolaFormer's attention between PVT's projections."""


class StripeAttention(FocusedAttention):
    """Focused linear attention in windows, plus the same convolution of v per channel."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, size: Size, window: Size | None = None, source: Any = None
    ) -> Tensor:
        """(B, N, C) tokens of the map `size`, which `window` divides -> (B, N, C)."""
        return self.attend(q, k, v, size, window)


class InlineStripeAttention(InlineAttention):
    """InLine's attention in windows, plus the same convolution of v per channel; all windows have the taps
    that the mean of `source`, the block's input, makes."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, size: Size, window: Size | None = None, source: Any = None
    ) -> Tensor:
        """(B, N, C) tokens of the map `size`, which `window` divides -> (B, N, C)."""
        return self.attend(q, k, v, size, window, source=source)


class _Places(NamedTuple):
    packed: Callable[..., nn.Module]
    pyramid: Callable[..., nn.Module]
    stripe: Callable[..., nn.Module] | None
    options: tuple[str, ...]  # of the hosts' arguments, those that the attention reads


ATTENTIONS = {
    "flatten": _Places(
        PackedAttention, PyramidAttention, StripeAttention, ("focusing_factor", "kernel_size")
    ),
    "mila": _Places(PackedMila, PyramidMila, None, ()),
    "rala": _Places(PackedRala, PyramidRala, None, ()),
    "mala": _Places(PackedMala, PyramidMala, None, ()),
    "inline": _Places(PackedInline, PyramidInline, InlineStripeAttention, ("kernel_func",)),
    "pola": _Places(PackedPolar, PyramidPolar, None, ("kernel_size", "alpha")),
}
ROTATED = ("mila", "rala", "mala")  # they need the keys on the queries' map
_DEFAULTS = {"focusing_factor": 3.0, "kernel_size": 5, "kernel_func": "identity", "alpha": 4.0}


def choose(attention: str, place: str, **options: Any) -> Callable[..., nn.Module]:
    """What makes the attention named `attention` in a `place`: "packed" or "pyramid" from a softmax attention
    and the map it is built for, "stripe" from channels, heads and that map.

    Raises:
        ValueError: of another name, or for an option that this attention does not read.
    """
    names = [name for name, places in ATTENTIONS.items() if getattr(places, place) is not None]
    if attention not in names:
        raise ValueError(f"attention is {attention!r}, expected one of {', '.join(map(repr, names))}")
    chosen = ATTENTIONS[attention]
    for name, value in options.items():
        if name not in chosen.options and value != _DEFAULTS[name]:
            raise ValueError(f"{name} is {value!r}, but the attention {attention!r} reads no {name}")
    read = {name: value for name, value in options.items() if name in chosen.options}
    return partial(getattr(chosen, place), **read)
