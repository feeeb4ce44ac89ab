"""The tables made from a record, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table as RichTable

from flatten_ext.bench.charts import crossover
from flatten_ext.bench.results import Results
from flatten_ext.bench.shapes import QUICK_STAGES, STAGES
from flatten_ext.bench.stages import MODES, geometric_mean

__all__ = ["Table", "alternatives_table", "models_table", "stages_table", "tokens_table"]

FLOPS = {shape.name: shape.flops for shape in (*STAGES, *QUICK_STAGES)}
NOT_MEASURED = "not measured"


@dataclass
class Table:
    """A titled grid of text; the first column is left-aligned, the others are numbers."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""

    def rich(self) -> RichTable:
        table = RichTable(
            title=self.title, title_justify="left", title_style="bold", caption=self.note or None
        )
        table.caption_justify = "left"
        for i, name in enumerate(self.header):
            table.add_column(name, justify="right" if i else "left", overflow="fold", no_wrap=i == 0)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.header) + " |"]
        lines.append("|" + "|".join(["---"] + ["---:"] * (len(self.header) - 1)) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        if self.note:
            lines += ["", self.note]
        return "\n".join(lines) + "\n"


def _pair(values: Sequence[float | None], form: str) -> str:
    """Forward and forward+backward in one cell."""
    return " / ".join("-" if value is None else format(value, form) for value in values)


def _threads(results: Results, count: int) -> str:
    clock = ", processor time" if results.record["clock"] == "cpu" else ""
    return ("one thread" if count == 1 else f"{count} threads") + clock


def stages_table(results: Results, threads: int, labels: Mapping[str, str]) -> Table:
    """Milliseconds of the op, its share of torch.mm's rate, and how many times faster it is than others."""
    others = [name for name in results.contenders("stages") if name != "flatten"]
    table = Table(
        f"Forward / forward+backward, float32, {_threads(results, threads)}",
        ["shape", "flatten ms", "% of torch.mm", *(f"x {labels[name]}" for name in others)],
    )
    ratios: dict[str, list[list[float]]] = {name: [[], []] for name in others}
    rate = results.record["mm_gflops"][str(threads)]
    for shape in results.shapes("stages"):
        times = [results.median("stages", shape, "flatten", mode, threads) for mode in MODES]
        # Forward and backward count as three forwards: two gradients to each product.
        shares = [
            None if ms is None else 100 * times_forward * FLOPS[shape] / (ms * 1e6) / rate
            for ms, times_forward in zip(times, (1, 3), strict=True)
        ]
        row = [results.shape_label("stages", shape), _pair(times, ".2f"), _pair(shares, ".0f")]
        for name in others:
            both = [results.ratio("stages", shape, name, mode, threads) for mode in MODES]
            for store, ratio in zip(ratios[name], both, strict=True):
                store += [] if ratio is None else [ratio]
            row.append(_pair(both, ".2f"))
        table.rows.append(row)
    means = [_pair([geometric_mean(store) for store in ratios[name]], ".2f") for name in others]
    table.rows.append(["geometric mean", "", "", *means])
    table.note = f"torch.mm(2048) reached {rate:.0f} GFLOP/s here. x: how many times faster flatten is."
    return table


def alternatives_table(
    results: Results, threads: int, labels: Mapping[str, str], missing: Mapping[str, str]
) -> Table:
    """Milliseconds of every alternative at every stage shape."""
    shapes = results.shapes("alternatives")
    table = Table(
        f"Milliseconds, forward / forward+backward, float32, {_threads(results, threads)}",
        ["attention", *(results.shape_label("alternatives", shape) for shape in shapes)],
    )
    for name in results.contenders("alternatives"):
        cells = [
            _pair([results.median("alternatives", shape, name, mode, threads) for mode in MODES], ".2f")
            for shape in shapes
        ]
        table.rows.append([labels[name], *cells])
    for name in missing:
        table.rows.append([labels[name], *([NOT_MEASURED] * len(shapes))])
    table.note = "; ".join(f"{labels[name]} {reason}" for name, reason in missing.items())
    return table


def tokens_table(results: Results, threads: int, labels: Mapping[str, str]) -> Table:
    """Milliseconds and peak memory against tokens, and where the op overtakes each contender."""
    shapes = results.shapes("tokens")
    sizes = [results.tokens("tokens", shape) for shape in shapes]
    table = Table(
        f"Forward+backward against tokens, milliseconds (MiB at the peak), {_threads(results, threads)}",
        ["attention", *(f"{size:,}" for size in sizes), "flatten faster from"],
    )
    for name in results.contenders("tokens"):
        row = [labels[name]]
        for shape in shapes:
            found = list(
                results.select("tokens", shape=shape, contender=name, mode=MODES[1], threads=threads)
            )
            cell = "-"
            if found:
                cell = f"{found[0]['ms']['median']:.1f} ({found[0]['peak_bytes'] / 2**20:.1f})"
            row.append(cell)
        row.append("" if name == "flatten" else _overtakes(results, name, threads))
        table.rows.append(row)
    return table


def models_table(results: Results, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Images per second of the models, end to end."""
    speeds = {row["model"]: row["images_per_second"] for row in rows}
    first = rows[0]
    table = Table(
        f"Inference at 224 px, float32, batch {first['batch']}, {_threads(results, first['threads'])}",
        ["model", "parameters, M", "GFLOP", "images/s", "x its softmax original"],
        note="GFLOP: of one image, a multiplication and an addition counted as two. Random weights.",
    )
    for row in rows:
        other = row["compared_with"]
        ratio = "" if row["softmax_original"] else "none in timm"
        if other and not row["softmax_original"]:
            ratio = f"{row['images_per_second'] / speeds[other]:.2f}"
        cells = [row["parameters"] / 1e6, row["flops"] / 1e9, row["images_per_second"]]
        table.rows.append([row["model"], *(f"{cell:.2f}" for cell in cells), ratio])
    return table


def _overtakes(results: Results, name: str, threads: int) -> str:
    ratios = [results.ratio("tokens", shape, name, MODES[1], threads) for shape in results.shapes("tokens")]
    measured = [ratio for ratio in ratios if ratio is not None]
    if all(ratio >= 1 for ratio in measured):
        return "every size"
    meeting = crossover(results, "tokens", name, MODES[1], threads)
    return "no size" if meeting is None else f"{meeting:,.0f} tokens"
