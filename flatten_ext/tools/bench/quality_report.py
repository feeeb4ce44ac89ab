"""The ablation's tables and chart, made from its summary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatten_ext.tools.bench.seeds_chart import Runs, draw_seeds
from flatten_ext.tools.bench.tables import Table, machine_line
from flatten_ext.tools.style import FAINT

__all__ = ["draw", "tables_of"]

NOTE = (
    "Accuracy: mean ± standard deviation over the seeds, 1,000 test images. Rank: singular values above "
    "0.1 % of the largest, of the matrix that the layer applies to the values. Entropy: of the attention's "
    "rows, over log N (1: uniform). Both are means over blocks, images and channels."
)

FAMILIES = {
    "softmax": "#5b6b7f",
    "focused": "#0b7a75",
    "ReLU": "#d9822b",
    "DWC alone": "#b0488c",
}


def _family_color(variant: str) -> str:
    return next((color for prefix, color in FAMILIES.items() if variant.startswith(prefix)), FAINT)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _elsewhere(summary: Mapping[str, Any]) -> str:
    """Which variants were trained on another machine than the rest, whose rounding is not the same."""
    others = {row["variant"]: row for row in summary["variants"] if "machine" in row}
    if not others:
        return ""
    there = machine_line(next(iter(others.values())))
    return f" {', '.join(others)}: {there}; the rest: {machine_line(summary)}."


def tables_of(summary: Mapping[str, Any]) -> list[Table]:
    """One table for each model: accuracy over the seeds, rank and entropy of the trained matrices."""
    budget = summary["budget"]
    made = []
    for model in dict.fromkeys(row["model"] for row in summary["variants"]):
        table = Table(
            f"{model}: test accuracy after {budget['epochs']} epochs of 4,000 images",
            ["attention", "accuracy %", "seeds", "parameters", "rank", "rank without DWC", "entropy"],
            note=NOTE + _elsewhere(summary),
        )
        for row in summary["variants"]:
            if row["model"] != model:
                continue
            spread = row["accuracy_deviation"]
            table.rows.append(
                [
                    row["variant"],
                    f"{100 * row['accuracy_mean']:.1f}"
                    + ("" if spread is None else f" ± {100 * spread:.1f}"),
                    str(len(row["runs"])),
                    f"{row['parameters']:,}",
                    _number(row["rank"], ".1f"),
                    _number(row["attention_rank"], ".1f"),
                    _number(row["entropy"], ".2f"),
                ]
            )
        made.append(table)
    return made


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Dots: every run's accuracy, a bar at the mean; one panel for each model."""
    panels: dict[str, dict[str, Runs]] = {}
    for row in summary["variants"]:
        runs, mean = [100 * run["accuracy"] for run in row["runs"]], 100 * row["accuracy_mean"]
        made = Runs(runs, mean, f"{mean:.1f}", _family_color(row["variant"]))
        panels.setdefault(row["model"], {})[row["variant"]] = made
    draw_seeds(
        panels,
        list(dict.fromkeys(row["variant"] for row in summary["variants"])),
        path,
        title="A small, fixed budget: who learns fastest (dots: seeds, bars: means)",
        label="test accuracy, %",
        width=max(8, 5.2 * len(panels) + 1.5),
        margin=0.12,
    )
