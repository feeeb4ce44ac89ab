"""The charts made from a record: speed-up bars, time and memory against tokens, roofline, whole models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatten_ext.tools.bench.results import Results
from flatten_ext.tools.bench.stages import MODES
from flatten_ext.tools.style import FAINT, INK, color_of, figure, save

__all__ = [
    "crossover",
    "draw_against_tokens",
    "draw_headline",
    "draw_models",
    "draw_roofline",
    "draw_speedups",
]


def _bars(
    axes: Any, results: Results, mode: str, threads: int, labels: Mapping[str, str], legend: bool
) -> None:
    """How many times faster the op is than each contender at each stage."""
    shapes = results.shapes("stages")
    others = [name for name in results.contenders("stages") if name != "flatten"]
    height = 0.8 / len(others)
    for i, other in enumerate(others):
        for row, shape in enumerate(shapes):
            ratio = results.ratio("stages", shape, other, mode, threads)
            if ratio is None:
                continue
            y = row + (i - (len(others) - 1) / 2) * height
            label = labels[other] if row == 0 and legend else None
            bar = {"color": color_of(other), "label": label}
            axes.barh(y, ratio - 1, height * 0.9, left=1, **bar)
            place = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": INK}
            axes.annotate(f"{ratio:.1f}", (max(1, ratio), y), (3, 0), **place)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", visible=False)
    _heading(axes, mode)
    axes.set_yticks(range(len(shapes)), [results.shape_label("stages", shape) for shape in shapes], color=INK)


def _title(made: Any, text: str, size: int = 13) -> None:
    made.suptitle(text, x=0.01, ha="left", fontsize=size, fontweight="bold", color=INK)


def _count(threads: int) -> str:
    return "one thread" if threads == 1 else f"{threads} threads"


def draw_speedups(results: Results, path: Path, labels: Mapping[str, str]) -> None:
    """Bars: how many times faster the op is than each contender, forward and forward+backward, one thread."""
    threads = min(results.thread_counts("stages"))
    made, panels = figure(11, 0.62 * len(results.shapes("stages")) + 1.6, 2, sharey=True)
    for axes, mode in zip(panels, MODES, strict=True):
        _bars(axes, results, mode, threads, labels, legend=axes is panels[0])
    panels[0].invert_yaxis()
    made.legend(loc="outside lower center", ncols=len(labels) - 1, frameon=False)
    machine = results.machine["cpu"]
    _title(made, f"How many times faster than ... (float32, {_count(threads)}, {machine})")
    save(made, path)


def draw_headline(results: Results, path: Path, labels: Mapping[str, str]) -> None:
    """Both at a glance: speed-ups of a training step at the stages, and its time against tokens, if timed."""
    threads, mode = min(results.thread_counts("stages")), MODES[1]
    timed = results.contenders("tokens")
    made, panels = figure(11, 0.5 * len(results.shapes("stages")) + 1.5, 2 if timed else 1)
    _bars(panels[0], results, mode, threads, labels, legend=True)
    panels[0].invert_yaxis()
    _heading(panels[0], "times faster, at the stages of the models, batch 8")
    if timed:
        _lines(panels[1], results, "tokens", mode, threads, "ms")
        _heading(panels[1], "milliseconds against tokens (B=1, C=64, 2 heads)")
        handles = [_handle(panels[1], name, labels[name]) for name in timed]
        panels[1].legend(handles=handles, loc="lower right", frameon=False)
    bars = panels[0].get_legend_handles_labels()
    made.legend(*bars, loc="outside lower left", ncols=len(labels) - 1, frameon=False)
    machine = results.machine["cpu"]
    _title(made, f"flatten against the alternatives, {mode} (float32, {_count(threads)}, {machine})", 12)
    save(made, path)


def _heading(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, color=INK)


def crossover(results: Results, suite: str, contender: str, mode: str, threads: int) -> float | None:
    """The number of tokens from which the op is faster than `contender`, on a line between measured sizes.

    None when one of the two is ahead at every size that both were measured at.
    """
    ahead: float | None = None
    behind: tuple[int, float] | None = None
    for shape in results.shapes(suite):
        ratio = results.ratio(suite, shape, contender, mode, threads)
        if ratio is None:
            continue
        tokens = results.tokens(suite, shape)
        if ratio < 1:
            behind, ahead = (tokens, ratio), None
        elif behind is not None and ahead is None:
            before, low = behind
            ahead = before * (tokens / before) ** ((1 - low) / (ratio - low))
    return ahead


def draw_against_tokens(
    results: Results, suite: str, path: Path, labels: Mapping[str, str], quantity: str = "ms"
) -> None:
    """Lines on double logarithmic axes: time, or peak memory, against tokens, crossovers with the op marked.

    Args:
        quantity: "ms" or "peak_bytes".
    """
    threads = min(results.thread_counts(suite))
    modes = [mode for mode in MODES if any(m.get(quantity) for m in results.select(suite, mode=mode))]
    made, panels = figure(5.6 * len(modes) + 1.8, 4.9, len(modes), sharey=True)
    for axes, mode in zip(panels, modes, strict=True):
        _lines(axes, results, suite, mode, threads, quantity)
        _heading(axes, mode)
    handles = [_handle(panels[0], name, labels[name]) for name in results.contenders(suite)]
    made.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    axis = {"ms": "Milliseconds", "peak_bytes": "MiB at the peak"}[quantity]
    note = "; rings: where the op overtakes" if quantity == "ms" else ""
    _title(made, f"{axis} against tokens (B=1, C=64, 2 heads, float32, {_count(threads)}{note})", 12)
    save(made, path)


def _lines(axes: Any, results: Results, suite: str, mode: str, threads: int, quantity: str) -> None:
    """Every contender's line against tokens, with rings where the op overtakes it."""
    for name in results.contenders(suite):
        points = results.line(suite, name, mode, threads, quantity)
        if not points:
            continue
        unit = 2**20 if quantity == "peak_bytes" else 1
        tokens, values = [n for n, _ in points], [value / unit for _, value in points]
        style = {"linewidth": 3, "zorder": 3} if name == "flatten" else {"linewidth": 1.6}
        axes.plot(tokens, values, "o-", color=color_of(name), markersize=3.5, **style)
        meeting = crossover(results, suite, name, mode, threads) if quantity == "ms" else None
        if meeting is not None:
            own = results.interpolate(suite, "flatten", mode, threads, meeting)
            ring = {"markersize": 9, "markerfacecolor": "none", "color": color_of(name), "zorder": 4}
            axes.plot(meeting, own, "o", **ring)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens", color=FAINT)


def _handle(axes: Any, name: str, label: str) -> Any:
    return axes.plot(
        [], [], "o-", color=color_of(name), linewidth=3 if name == "flatten" else 1.6, label=label
    )[0]


def draw_roofline(record: Mapping[str, Any], path: Path) -> None:
    """The op's forward at each stage as a dot under the machine's two roofs.

    Args:
        record: of the suite `roofline`: points of "label", "intensity" (flops per compulsory byte) and
            "gflops", torch.mm's rate and the bandwidth of a large copy.
    """
    points, threads = record["roofline"], record["threads"]
    gflops, bandwidth = record["mm_gflops"][str(threads)], record["copy_gb_per_s"]
    made, (axes,) = figure(8, 5)
    intensities = [point["intensity"] for point in points]
    ridge = gflops / bandwidth
    first, last = min(ridge, *intensities) / 4, max(ridge, *intensities) * 3
    axes.plot([first, ridge, last], [first * bandwidth, gflops, gflops], color=INK, linewidth=2)
    beside = {"textcoords": "offset points", "color": INK}
    axes.annotate(f"torch.mm  {gflops:.0f} GFLOP/s", (last, gflops), (0, 6), ha="right", **beside)
    middle = (first * ridge) ** 0.5
    axes.annotate(f"copy  {bandwidth:.0f} GB/s", (middle, middle * bandwidth), (-8, 4), ha="right", **beside)
    labels: dict[float, float] = {}  # the lowest label so far, by intensity: equal ones stand in a column
    for point in sorted(points, key=lambda point: -point["gflops"]):
        x, y = point["intensity"], point["gflops"]
        height = labels[x] = min(y, labels.get(x, math.inf) / 1.12)
        axes.plot(x, y, "o", color=color_of("flatten"), markersize=7)
        aside = 1 / 1.12 if x < max(intensities) else 1.12  # away from the column of larger intensity
        axes.plot([x, aside * x], [y, height], color=FAINT, linewidth=0.6)
        label = f"{point['label']}  {100 * y / min(gflops, x * bandwidth):.0f} %"
        place = {"ha": "right" if aside < 1 else "left", "va": "center", "fontsize": 8, "color": INK}
        axes.annotate(label, (aside * x, height), **place)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    highest = max(gflops, *(point["gflops"] for point in points))
    axes.set_ylim(min(first * bandwidth, *labels.values()) / 1.5, 1.5 * highest)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("flops per byte that must move", color=FAINT)
    axes.set_ylabel("GFLOP/s", color=FAINT)
    title = f"The forward under this machine's roofs (float32, {_count(threads)}; %: of the roof)"
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    save(made, path)


def draw_models(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Images per second against FLOPs: ours as filled dots, timm's softmax originals as rings."""
    made, (axes,) = figure(8, 5)
    labelled: list[tuple[float, float]] = []
    for row in rows:
        x, y = row["flops"] / 1e9, row["images_per_second"]
        color = color_of("softmax" if row["softmax_original"] else "flatten")
        axes.plot(
            x, y, "o", color=color, markersize=9, fillstyle="none" if row["softmax_original"] else "full"
        )
        place = {"xytext": (0, -18), "ha": "center"}  # originals are labelled below their ring
        if not row["softmax_original"]:  # ours above their dot, or beside it where one is labelled so already
            close = any(max(a / x, x / a, b / y, y / b) < 1.3 for a, b in labelled)
            place = {"xytext": (-9, -3), "ha": "right"} if close else {"xytext": (0, 9), "ha": "center"}
            labelled.append((x, y))
        look = {"textcoords": "offset points", "fontsize": 8.5, "color": color}
        axes.annotate(row["model"], (x, y), **place, **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.2, y=0.15)
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        steps = [step * 10.0**power for power in range(-2, 5) for step in (1, 2, 3, 5)]
        axis.set_ticks([step for step in steps if low <= step <= high], minor=False)
        axis.set_ticks([], minor=True)
        axis.set_major_formatter("{x:g}")
    axes.set_ylabel("images per second", color=FAINT)
    axes.set_xlabel("GFLOP per image", color=FAINT)
    title = "Images per second (dots: ours, rings: timm's softmax originals)"
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    save(made, path)
