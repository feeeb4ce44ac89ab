"""Rotation of features by their tokens' places: the tables of published models, and the rotation itself.

A table holds the cosines and sines by which the channel pairs (2i, 2i + 1) of each token are rotated
(RoFormer, arXiv 2104.09864), on a map with a row and a column, or with a frame before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ["rotary_table", "rotate"]


def rotary_table(
    size: Sequence[int],
    channels: int,
    heads: int | None = None,
    base: float = 10000.0,
    closed: bool | None = None,
    *,
    num_prefix_tokens: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The cosines and sines by which published linear attentions rotate their queries and keys.

    The pairs of channels are shared out among the axes of the map: the first half of them turns with the row,
    the second with the column, both counted from 0. Pair i of the n of an axis turns by position * theta_i::

        closed=False    theta_i = base ** (-i / n)          the smallest angle is above 1 / base
        closed=True     theta_i = base ** (-i / (n - 1))    from 1 down to 1 / base; a single pair has theta 1

    ============================================  ==================================================
    MLLA (arXiv 2405.16605), commit 66b6d29       ``rotary_table(size, channels)``
    RALA (arXiv 2411.07635), commit a86314f;      ``rotary_table(size, channels, heads)``
    MALA (arXiv 2507.00698), commit 7114e63
    NaLaFormer (arXiv 2506.21137)                 as RALA; twice side by side: its heads are twice as wide
    SANA-Video (arXiv 2509.24695)                 ``rotary_table((T, H, W), channels, heads, closed=False)``
    ============================================  ==================================================

    Args:
        size: (H, W) of the map, or of a window where attention is in windows: tokens lie in raster order. Or
            (T, H, W) of a video, frame after frame: the row and the column then turn a third of the pairs
            each, rounded down, and the frame, which comes first, the rest.
        channels: C, of all heads.
        heads: None for an angle of its own for each pair of all C channels, so that the first heads see rows
            alone and the last ones columns (MLLA). A number for the same angles in each of so many heads.
        base: the largest ratio of two angles, greater than 0.
        closed: whether 1 / base is one of the angles. None follows the published tables of images: closed
            with `heads`, open without.
        num_prefix_tokens: rows in front, for class tokens and registers, that rotate by nothing.
        dtype: torch.float32 or torch.float64. Angles of half precision put sines of a 56 x 56 map off by
            up to 0.15; tokens of half precision take a float32 table.
        device: where the table lies.

    Returns:
        (num_prefix_tokens + H*W, R, 2): cosines and sines, R = C / 2, or C / (2 * heads) with `heads`. They
        are computed in float64 and rounded once.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Example::

        table = flatten_ext.rotary_table((56, 56), channels=64)              # MLLA-T, stage 1: (3136, 32, 2)
        table = flatten_ext.rotary_table((40, 72), channels=128, heads=2)    # RALA, any H x W: (2880, 32, 2)
    """
    if len(size) not in (2, 3) or not all(n >= 1 for n in size):
        raise ValueError(f"size must be (H, W) or (T, H, W), all at least 1, but it is {tuple(size)}")
    if heads is not None and (heads < 1 or channels % heads):
        raise ValueError(f"heads must divide channels = {channels}, but it is {heads}")
    if not base > 0:
        raise ValueError(f"base must be greater than 0, but it is {base}")
    if num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens must be at least 0, but it is {num_prefix_tokens}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64 (less is too coarse), not {dtype}")
    width = channels if heads is None else channels // heads
    spatial = width // (2 * len(size))  # pairs of an axis; those of frames take what is left
    if spatial < 1 or (width % 4 if len(size) == 2 else width % 2):
        of = "channels" if heads is None else "channels / heads"
        expected = "a multiple of 4" if len(size) == 2 else "even and at least 6"
        raise ValueError(f"{of} must be {expected} for a table of {len(size)} axes, but it is {width}")
    pairs = [width // 2 - spatial * (len(size) - 1)] + [spatial] * (len(size) - 1)
    closed = heads is not None if closed is None else closed

    angles = []
    for axis, (length, n) in enumerate(zip(size, pairs, strict=True)):
        step = torch.arange(n, dtype=torch.float64, device=device) / max(n - 1 if closed else n, 1)
        position = torch.arange(length, dtype=torch.float64, device=device)
        angle = position[:, None] * base**-step
        shape = [length if a == axis else 1 for a in range(len(size))]
        angles.append(angle.reshape(*shape, n).expand(*size, n))
    angle = torch.cat(angles, -1).flatten(0, -2)
    angle = torch.cat((angle.new_zeros(num_prefix_tokens, width // 2), angle))
    return torch.stack((angle.cos(), angle.sin()), -1).to(dtype)


@lru_cache(maxsize=64)
def _kept(*arguments: Any) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode could not serve a backward
        return _new(*arguments)


def _new(
    size: tuple[int, int], channels: int, heads: int | None, prefix: int, dtype: torch.dtype, device: Any
) -> Tensor:
    return rotary_table(size, channels, heads, num_prefix_tokens=prefix, dtype=dtype, device=device)


@torch.fx.wrap
def kept_table(
    x: Tensor, size: Sequence[int], channels: int, heads: int | None = None, prefix: int = 0
) -> Tensor:
    """The rotations of the tokens x of a map, float64 for float64 tokens. Those of the latest sizes are kept,
    but not what belongs to a graph that is being traced."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    traced = (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None
    )
    make = _new if traced or x.is_meta else _kept
    height, width = size
    sides = (height, width) if torch.compiler.is_compiling() else (int(height), int(width))
    return make(sides, channels, heads, prefix, dtype, x.device)


def rotate(x: Tensor, table: Tensor | None, heads: int = 1) -> Tensor:
    """Rotates the channel pairs (2i, 2i+1) of each token by the angles of a table.

    Args:
        x: (..., n, C), the channels of the heads side by side.
        table: (n, R, 2) cosines and sines: with R = C/2 every pair of channels has its own angle, with
            R = C/(2 * heads) the heads share them. None leaves x as it is.
        heads: dividing C into even numbers of channels.
    """
    if table is None:
        return x
    if table.requires_grad:
        raise ValueError("rotary is a table and has no gradient, but it requires one: pass rotary.detach()")
    n, channels = x.shape[-2:]
    width = channels // heads
    if width % 2 or table.shape not in ((n, width // 2, 2), (n, channels // 2, 2)):
        raise ValueError(
            f"rotary must be ({n}, R, 2), R half of a head's {width} channels, which must be even, or of all "
            f"{channels}, but it is {tuple(table.shape)}"
        )
    a, b = x.unflatten(-1, (-1, table.shape[-2], 2)).unbind(-1)
    cos, sin = table.to(x.dtype)[:, None].unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-3)
