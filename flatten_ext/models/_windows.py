"""Attention windows of Swin's stages: one (height, width) for each stage, or None for the whole map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import to_2tuple

__all__ = ["StageWindow", "default_windows", "stage_maps", "stage_windows", "windows_at"]

StageWindow = tuple[int, int] | None


def default_windows(attn_type: str, softmax: int) -> tuple[StageWindow, ...]:
    """The published windows: the whole map in stages of type L, squares of side `softmax` in others."""
    return tuple(None if kind == "L" else (softmax, softmax) for kind in attn_type)


def stage_windows(window_size: Any, stages: int) -> tuple[StageWindow, ...]:
    """Expands what timm accepts: an int or (height, width) for all stages, or one of them for each stage.

    None in the place of a stage's window is the whole map. Two ints are always one (height, width).

    Raises:
        AssertionError: as timm's models raise it, for another number of stages or a window of no area.
    """
    is_sequence = isinstance(window_size, Sequence)
    if not is_sequence or (len(window_size) == 2 and all(isinstance(side, int) for side in window_size)):
        window_size = (window_size,) * stages
    assert len(window_size) == stages, f"window_size must be one window or {stages}, got {window_size}"
    windows = tuple(None if window is None else to_2tuple(window) for window in window_size)
    for window in windows:
        assert window is None or (len(window) == 2 and min(window) > 0), (
            f"a window of window_size must be positive (height, width), got {window}"
        )
    return windows


def windows_at(
    grid: tuple[int, int],
    old: Sequence[StageWindow],
    old_grid: tuple[int, int],
    window_size: Any = None,
    window_ratio: int | Sequence[int] | None = None,
) -> tuple[StageWindow, ...]:
    """The windows of a model whose patches now tile `grid`.

    Args:
        old: the windows on `old_grid`. They keep their ratio to the grid; the whole map stays the whole map.
        window_size: windows to use instead, as `stage_windows` takes them.
        window_ratio: or: the grid divided by this number, or by one for each stage.
    """
    if window_size is not None:
        return stage_windows(window_size, len(old))
    if window_ratio is not None:
        ratios = window_ratio if isinstance(window_ratio, Sequence) else (window_ratio,) * len(old)
        assert len(ratios) == len(old) and min(ratios) > 0, (  # noqa: PT018 - as timm raises it
            f"window_ratio must be one positive number or {len(old)}, got {window_ratio}"
        )
        return tuple((max(1, grid[0] // ratio), max(1, grid[1] // ratio)) for ratio in ratios)
    return tuple(
        window and (max(1, window[0] * grid[0] // old_grid[0]), max(1, window[1] * grid[1] // old_grid[1]))
        for window in old
    )


def stage_maps(grid: tuple[int, int], stages: int) -> list[tuple[int, int]]:
    """The stages' maps where the patches tile `grid`: every later stage halves it, rounded up."""
    height, width = grid
    return [(-(-height // (1 << i)), -(-width // (1 << i))) for i in range(stages)]
