"""The charts made from a record: speed-up bars, time against tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatten_ext.bench.results import Results
from flatten_ext.bench.stages import MODES
from flatten_ext.bench.style import FAINT, INK, color_of, figure, save

__all__ = ["crossover", "draw_against_tokens", "draw_models", "draw_roofline", "draw_speedups"]


def draw_speedups(results: Results, path: Path, labels: Mapping[str, str]) -> None:
    """Bars: how many times faster the op is than each contender, forward and forward+backward, one thread."""
    threads = min(results.thread_counts("stages"))
    shapes = results.shapes("stages")
    others = [name for name in results.contenders("stages") if name != "flatten"]
    made, panels = figure(11, 0.62 * len(shapes) + 1.6, 2, sharey=True)
    height = 0.8 / len(others)
    for axes, mode in zip(panels, MODES, strict=True):
        for i, other in enumerate(others):
            for row, shape in enumerate(shapes):
                ratio = results.ratio("stages", shape, other, mode, threads)
                if ratio is None:
                    continue
                y = row + (i - (len(others) - 1) / 2) * height
                label = labels[other] if row == 0 and axes is panels[0] else None
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
        axes.set_title(mode, loc="left", fontsize=11, color=INK)
    panels[0].set_yticks(
        range(len(shapes)), [results.shape_label("stages", shape) for shape in shapes], color=INK
    )
    panels[0].invert_yaxis()
    made.legend(loc="outside lower center", ncols=len(others), frameon=False)
    thread = "one thread" if threads == 1 else f"{threads} threads"
    made.suptitle(
        f"How many times faster than ... (float32, {thread}, {results.machine['cpu']})",
        x=0.01,
        ha="left",
        fontsize=13,
        fontweight="bold",
        color=INK,
    )
    save(made, path)


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
                axes.plot(
                    meeting, own, "o", markersize=9, markerfacecolor="none", color=color_of(name), zorder=4
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens", color=FAINT)
        axes.set_title(mode, loc="left", fontsize=11, color=INK)
    handles = [_handle(panels[0], name, labels[name]) for name in results.contenders(suite)]
    made.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    axis = {"ms": "Milliseconds", "peak_bytes": "MiB at the peak"}[quantity]
    note = "; rings: where the op overtakes" if quantity == "ms" else ""
    made.suptitle(
        f"{axis} against tokens (B=1, C=64, 2 heads, float32, {threads} thread{'s' * (threads > 1)}{note})",
        x=0.01,
        ha="left",
        fontsize=12,
        fontweight="bold",
        color=INK,
    )
    save(made, path)


def _handle(axes: Any, name: str, label: str) -> Any:
    return axes.plot(
        [], [], "o-", color=color_of(name), linewidth=3 if name == "flatten" else 1.6, label=label
    )[0]


def draw_roofline(
    points: Sequence[Mapping[str, Any]], gflops: float, bandwidth: float, title: str, path: Path
) -> None:
    """The op's forward at each stage as a dot under the machine's two roofs.

    Args:
        points: each with "label", "intensity" (flops per compulsory byte) and "gflops".
        gflops: torch.mm's rate; bandwidth: a large copy's, in GB/s.
    """
    made, (axes,) = figure(8, 5)
    ridge, end = gflops / bandwidth, 4 * max(gflops / bandwidth, *(point["intensity"] for point in points))
    axes.plot([ridge / 8, ridge, end], [gflops / 8, gflops, gflops], color=INK, linewidth=2)
    beside = {"textcoords": "offset points", "color": INK}
    axes.annotate(f"torch.mm  {gflops:.0f} GFLOP/s", (end, gflops), (0, 6), ha="right", **beside)
    axes.annotate(f"copy  {bandwidth:.0f} GB/s", (ridge / 4, gflops / 4), (12, -4), **beside)
    for point in points:
        axes.plot(point["intensity"], point["gflops"], "o", color=color_of("flatten"), markersize=8)
        axes.annotate(
            point["label"],
            (point["intensity"], point["gflops"]),
            (7, -3),
            textcoords="offset points",
            fontsize=8,
            color=FAINT,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("flops per byte that must move", color=FAINT)
    axes.set_ylabel("GFLOP/s", color=FAINT)
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
        rise = -18  # originals are labelled below their ring, ours above their dot and above each other
        if not row["softmax_original"]:
            close = [1 for a, b in labelled if max(a / x, x / a, b / y, y / b) < 1.3]
            rise = 9 + 13 * len(close)
            labelled.append((x, y))
        place = {"textcoords": "offset points", "ha": "center", "fontsize": 8.5, "color": color}
        axes.annotate(row["model"], (x, y), (0, rise), **place)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.2, y=0.15)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter("{x:g}")
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("GFLOP per image", color=FAINT)
    title = "Images per second (dots: ours, rings: timm's softmax originals)"
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    save(made, path)
