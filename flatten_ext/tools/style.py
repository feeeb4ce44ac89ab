"""One look for every chart: colours by contender, quiet axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flatten_ext.extras import require
from flatten_ext.output import replacing

__all__ = ["FAINT", "INK", "PAPER", "color_of", "figure", "quiet", "save"]

INK, FAINT, PAPER = "#1d2733", "#7c8794", "#fdfdfb"

COLORS = {
    "flatten": "#0b7a75",
    "eager": "#d9822b",
    "compile": "#b0488c",
    "softmax": "#5b6b7f",
    "softmax + DWC": "#93a1b3",
    "window softmax": "#3d6fb4",
    "LiteMLA": "#c9a227",
    "efficient attention": "#6aa84f",
    "Hydra": "#8e7cc3",
    "Performer": "#cc4125",
    "Linformer": "#45818e",
}


def color_of(contender: str) -> str:
    """A contender's colour, the same in every chart; grey for one without."""
    return COLORS.get(contender, FAINT)


def figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Any, Sequence[Any]]:
    """A matplotlib figure with a row of quiet axes.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    module = require("matplotlib.figure", "bench", "the chart")
    made = module.Figure(figsize=(width, height), facecolor=PAPER, layout="constrained")
    axes = made.subplots(1, columns, squeeze=False, **options)[0]
    for one in axes:
        quiet(one)
    return made, axes


def quiet(axes: Any) -> None:
    """Removes the frame and softens what is left."""
    axes.set_facecolor(PAPER)
    axes.set_axisbelow(True)
    axes.grid(color="#e6e6e0", linewidth=0.7)
    axes.tick_params(colors=FAINT, which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def save(made: Any, path: Path) -> None:
    """Writes the figure; an SVG without dates or random names, so that equal data gives an equal file."""
    matplotlib = require("matplotlib", "bench", "the chart")
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with (
        matplotlib.rc_context({"svg.hashsalt": "flatten"}),
        replacing(path) as temporary,
    ):
        made.savefig(temporary, metadata=metadata, facecolor=PAPER)
