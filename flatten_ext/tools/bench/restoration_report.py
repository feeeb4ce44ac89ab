"""The tables and the charts of the restoration suite, made from its summary."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatten_ext.extras import require
from flatten_ext.tools.bench.seeds_chart import Runs, draw_seeds
from flatten_ext.tools.bench.tables import Table, machine_line
from flatten_ext.tools.style import INK, PAPER, color_of, save

__all__ = ["draw", "draw_examples", "paired", "tables_of"]

AGAINST = ("DWC alone", "FLatten")  # what the others are subtracted from, seed by seed
_COLORS = {
    "FLatten": color_of("flatten"),
    "softmax": color_of("softmax"),
    "softmax + DWC": color_of("softmax"),
}


def _psnr(row: Mapping[str, Any], crops: str = "trained") -> list[float]:
    return [run["psnr"][crops] for run in row["runs"]]


def _spread(values: Sequence[float], form: str) -> str:
    mean = format(statistics.mean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def paired(row: Mapping[str, Any], other: Mapping[str, Any], crops: str = "trained") -> list[float]:
    """By how many decibels a row is above another, for each seed that both have."""
    theirs = {run["seed"]: run["psnr"][crops] for run in other["runs"]}
    return [run["psnr"][crops] - theirs[run["seed"]] for run in row["runs"] if run["seed"] in theirs]


def _difference(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    differences = [] if other is None or other is row else paired(row, other)
    return _spread(differences, "+.2f") if differences else "-"


def tables_of(summary: Mapping[str, Any]) -> list[Table]:
    """One table for each problem: decibels over the seeds, and differences within seeds."""
    budget, made = summary["budget"], []
    side = budget["crop"]
    for problem, inputs in summary["inputs"].items():
        rows = {row["variant"]: row for row in summary["variants"] if row["model"] == problem}
        table = Table(
            f"PSNR of {problem} on held-out photographs, dB, after {budget['steps']} steps",
            [
                "attention",
                f"{side} px crops",
                *(f"minus {name}" for name in AGAINST),
                f"{2 * side} px crops",
                "seeds",
                "parameters",
            ],
            note=f"Mean ± standard deviation over the seeds; differences are those within a seed. "
            f"The networks were trained on crops of {side} px. {machine_line(summary)}.",
        )
        given = inputs["psnr"]
        name = "the noisy input" if problem == "denoising" else "bicubic enlargement"
        table.rows.append([name, f"{given['trained']:.2f}", "-", "-", f"{given['larger']:.2f}", "-", "-"])
        for variant, row in rows.items():
            table.rows.append(
                [
                    variant,
                    _spread(_psnr(row), ".2f"),
                    *(_difference(row, rows.get(other)) for other in AGAINST),
                    _spread(_psnr(row, "larger"), ".2f"),
                    str(len(row["runs"])),
                    f"{row['parameters']:,}",
                ]
            )
        made.append(table)
    return made


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Dots: every run's PSNR, a bar at the mean; one panel for each problem."""
    panels: dict[str, dict[str, Runs]] = {problem: {} for problem in summary["inputs"]}
    for row in summary["variants"]:
        runs, color = _psnr(row), _COLORS.get(row["variant"], "#d9822b")
        mean = statistics.mean(runs)
        panels[row["model"]][row["variant"]] = Runs(runs, mean, f"{mean:.2f}", color)
    draw_seeds(
        panels,
        list(dict.fromkeys(row["variant"] for row in summary["variants"])),
        path,
        title="Restoration at equal parameters, a small fixed budget (dots: seeds, bars: means)",
        label="PSNR on held-out photographs, dB",
        width=11,
        margin=0.14,
    )


def draw_examples(summary: Mapping[str, Any], path: Path) -> None:
    """One held-out crop: clean, degraded, and restored by every network of the first seed."""
    image = require("PIL.Image", "bench", "the examples")
    numpy = require("numpy", "bench", "the examples")

    def pixels(png: str) -> Any:
        return numpy.asarray(image.open(io.BytesIO(base64.b64decode(png))))

    clean = pixels(summary["clean"])

    def decibels(picture: Any) -> float:
        error = ((picture.astype(float) - clean) / 255) ** 2
        return float(-10 * numpy.log10(error.mean()))

    shown = []
    for problem, inputs in summary["inputs"].items():
        given = "noisy" if problem == "denoising" else "bicubic"
        rows = [(given, inputs["example"])]
        rows += [(row["variant"], row["example"]) for row in summary["variants"] if row["model"] == problem]
        shown.append((problem, [(name, pixels(png)) for name, png in rows if png is not None]))
    columns = 6
    lines = sum(-(-(len(rows) + 1) // columns) for _, rows in shown)
    module = require("matplotlib.figure", "bench", "the examples")
    made = module.Figure(figsize=(2 * columns, 2.3 * lines + 0.4), facecolor=PAPER, layout="constrained")
    grid = made.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    line = 0
    for problem, rows in shown:
        cells = [(f"{problem}: clean", clean)]
        cells += [(f"{name}  {decibels(picture):.2f} dB", picture) for name, picture in rows]
        for i, (title, picture) in enumerate(cells):
            axes = grid[line + i // columns][i % columns]
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="none")
            axes.set_title(title, fontsize=8, color=INK)
        line += -(-len(cells) // columns)
    save(made, path)
