"""The chart of trainings from several seeds: a dot for every run, a bar at the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from flatten_ext.tools.style import FAINT, INK, figure, save

__all__ = ["Runs", "draw_seeds"]


class Runs(NamedTuple):
    """One variant's results of every seed, what is written beside them, and their colour."""

    values: Sequence[float]
    mean: float
    text: str
    color: str


def draw_seeds(
    panels: Mapping[str, Mapping[str, Runs]],
    variants: Sequence[str],
    path: Path,
    *,
    title: str,
    label: str,
    width: float,
    margin: float,
) -> None:
    """Draws a panel for each entry of `panels`, with a line for each of `variants`.

    Args:
        panels: the runs by variant, by the panel's heading; a variant may be missing from a panel.
        variants: from top to bottom.
        title, label: of the whole chart, and of its horizontal axes.
        width: inches.
        margin: share of a panel's width left free at its sides.
    """
    made, all_axes = figure(width, 0.36 * len(variants) + 1.5, len(panels), sharey=True)
    for axes, (heading, rows) in zip(all_axes, panels.items(), strict=True):
        for variant, (values, mean, text, color) in rows.items():
            y = variants.index(variant)
            axes.plot(values, [y] * len(values), "o", color=color, alpha=0.4, markersize=6, markeredgewidth=0)
            axes.plot([mean, mean], [y - 0.3, y + 0.3], color=color, linewidth=2.5)
            look = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "color": color}
            axes.annotate(text, (max(values), y), **look)
        axes.set_title(heading, loc="left", fontsize=11, color=INK)
        axes.set_xlabel(label, color=FAINT)
        axes.grid(axis="y", visible=False)
        axes.margins(x=margin)
    all_axes[0].set_yticks(range(len(variants)), variants, color=INK)
    all_axes[0].invert_yaxis()
    made.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    save(made, path)
