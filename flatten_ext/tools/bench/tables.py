"""The tables made from a record, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table as RichTable

from flatten_ext.tools.bench.charts import crossover
from flatten_ext.tools.bench.results import Results
from flatten_ext.tools.bench.shapes import QUICK_STAGES, STAGES
from flatten_ext.tools.bench.stages import MODES, geometric_mean

__all__ = [
    "Table",
    "alternatives_tables",
    "end_to_end_tables",
    "families_table",
    "machine_line",
    "memory_table",
    "models_table",
    "roofline_table",
    "stages_table",
    "tokens_table",
]

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


def machine_line(record: Mapping[str, Any]) -> str:
    """Processor, instruction set and torch of a record's machine."""
    machine = record["machine"]
    return f"{machine['cpu']}, {machine['cpu_isa']}, torch {machine['torch']}"


def _gpu_times(gpu: Results | None, suite: str, shape: str, name: str, modes: Sequence[str]) -> str:
    """The cell of a contender's milliseconds on a GPU."""
    if gpu is None:
        return NOT_MEASURED
    count = min(gpu.thread_counts(suite))
    return _pair([gpu.median(suite, shape, name, mode, count) for mode in modes], ".2f")


def stages_table(
    results: Results, threads: int, labels: Mapping[str, str], gpu: Results | None = None
) -> Table:
    """Milliseconds of the op, its share of torch.mm's rate, and how many times faster it is than others."""
    others = [name for name in results.contenders("stages") if name != "flatten"]
    table = Table(
        f"Forward / forward+backward, float32, {_threads(results, threads)}",
        ["shape", "flatten ms", "% of torch.mm", *(f"x {labels[name]}" for name in others), "GPU ms"],
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
        table.rows.append([*row, _gpu_times(gpu, "stages", shape, "flatten", MODES)])
    means = [_pair([geometric_mean(store) for store in ratios[name]], ".2f") for name in others]
    table.rows.append(["geometric mean", "", "", *means, ""])
    table.note = (
        f"torch.mm(2048) reached {rate:.0f} GFLOP/s here. x: how many times faster flatten is. "
        f"{machine_line(results.record)}."
    )
    return table


def alternatives_tables(
    results: Results,
    threads: int,
    labels: Mapping[str, str],
    missing: Mapping[str, str],
    gpu: Results | None = None,
) -> list[Table]:
    """Milliseconds of every alternative at every stage shape: forward, and forward+backward."""
    shapes = results.shapes("alternatives")
    made = []
    for mode in MODES:
        table = Table(
            f"Milliseconds, {mode}, float32, {_threads(results, threads)}",
            ["attention", *(results.shape_label("alternatives", shape) for shape in shapes), "GPU"],
        )
        for name in results.contenders("alternatives"):
            times = [results.median("alternatives", shape, name, mode, threads) for shape in shapes]
            cells = ["-" if ms is None else _three_digits(ms) for ms in times]
            on_gpu = _gpu_times(gpu, "alternatives", shapes[0], name, [mode])
            table.rows.append([labels[name], *cells, on_gpu])
        for name in missing:
            on_gpu = _gpu_times(gpu, "alternatives", shapes[0], name, [mode])
            table.rows.append([labels[name], *([NOT_MEASURED] * len(shapes)), on_gpu])
        made.append(table)
    reasons = "".join(f" {labels[name]}: {reason}." for name, reason in missing.items())
    made[-1].note = f"GPU: at the first shape.{reasons} {machine_line(results.record)}."
    return made


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def tokens_table(
    results: Results, threads: int, labels: Mapping[str, str], gpu: Results | None = None
) -> Table:
    """Milliseconds against tokens, and where the op overtakes each contender."""
    shapes = results.shapes("tokens")
    sizes = [results.tokens("tokens", shape) for shape in shapes]
    table = Table(
        f"Forward+backward against tokens, milliseconds, {_threads(results, threads)}",
        ["attention", *(f"{size:,}" for size in sizes), "flatten faster from", f"GPU, {sizes[-1]:,}"],
        note=f"B=1, C=64, 2 heads, float32. {machine_line(results.record)}. A dash is a size that was left "
        "out because the one before took over a second.",
    )
    for name in results.contenders("tokens"):
        times = [results.median("tokens", shape, name, MODES[1], threads) for shape in shapes]
        cells = ["-" if ms is None else _three_digits(ms) for ms in times]
        overtakes = "" if name == "flatten" else _overtakes(results, name, threads)
        on_gpu = _gpu_times(gpu, "tokens", shapes[-1], name, MODES[1:])
        table.rows.append([labels[name], *cells, overtakes, on_gpu])
    return table


def memory_table(results: Results, threads: int, labels: Mapping[str, str]) -> Table:
    """MiB at the peak of a training step against tokens."""
    sizes = [results.tokens("tokens", shape) for shape in results.shapes("tokens")]
    table = Table(
        "MiB at the peak of a training step, against tokens",
        ["attention", *(f"{size:,}" for size in sizes)],
        note="Counted by torch's allocator at B=1, C=64, 2 heads, float32. A dash as above.",
    )
    for name in results.contenders("tokens"):
        held = dict(results.line("tokens", name, MODES[1], threads, "peak_bytes"))
        cells = [f"{held[size] / 2**20:.2f}" if size in held else "-" for size in sizes]
        table.rows.append([labels[name], *cells])
    return table


def roofline_table(record: Mapping[str, Any]) -> Table:
    """The dots of the roofline chart in figures."""
    threads = record["threads"]
    rate, bandwidth = record["mm_gflops"][str(threads)], record["copy_gb_per_s"]
    table = Table(
        f"The forward under the roofs, float32, {'one thread' if threads == 1 else f'{threads} threads'}",
        ["shape", "flops per byte", "GFLOP/s", "% of the roof", "bound by"],
        note=f"Roofs: torch.mm(2048) {rate:.0f} GFLOP/s, a large copy {bandwidth:.1f} GB/s. "
        f"{machine_line(record)}.",
    )
    for point in record["roofline"]:
        roof = min(rate, point["intensity"] * bandwidth)
        cells = [f"{point['intensity']:.1f}", f"{point['gflops']:.1f}", f"{100 * point['gflops'] / roof:.0f}"]
        table.rows.append([point["label"], *cells, "arithmetic" if roof == rate else "memory"])
    return table


def models_table(results: Results, rows: Sequence[Mapping[str, Any]], gpu: Results | None = None) -> Table:
    """Images per second of the models, end to end."""
    speeds = {row["model"]: row["images_per_second"] for row in rows}
    on_gpu = (
        {} if gpu is None else {r["model"]: f"{r['images_per_second']:.1f}" for r in gpu.record["models"]}
    )
    first = rows[0]
    table = Table(
        f"Inference at 224 px, float32, batch {first['batch']}, {_threads(results, first['threads'])}",
        ["model", "parameters, M", "GFLOP", "images/s", "x its softmax original", "GPU images/s"],
        note="GFLOP: of one image, a multiplication and an addition counted as two. Random weights. "
        f"{machine_line(results.record)}.",
    )
    for row in rows:
        other = row["compared_with"]
        ratio = "" if row["softmax_original"] else "none in timm"
        if other and not row["softmax_original"]:
            ratio = f"{row['images_per_second'] / speeds[other]:.2f}"
        cells = [row["parameters"] / 1e6, row["flops"] / 1e9, row["images_per_second"]]
        gpu_cell = on_gpu.get(row["model"], NOT_MEASURED)
        table.rows.append([row["model"], *(f"{cell:.2f}" for cell in cells), ratio, gpu_cell])
    return table


def end_to_end_tables(record: Mapping[str, Any]) -> list[Table]:
    """Images per second with the op and with the eager formula in its place, of the suite end-to-end."""
    made = []
    threads = record["machine"]["threads"]
    count = "one thread" if threads == 1 else f"{threads} threads"
    clock = ", processor time" if record["clock"] == "cpu" else ""
    for mode in dict.fromkeys(row["mode"] for row in record["results"]):
        table = Table(
            f"{'torch.compile on every side' if mode == 'compiled' else 'Eager mode'}, images/s at batch "
            f"{record['batch']}, {record['size']} px, float32, {count}{clock}",
            [
                "model",
                "operator",
                "eager formula",
                "speed-up",
                "ceiling",
                "timm's original",
                "speed-up over it",
            ],
            note=f"Medians of {record['rounds']} interleaved rounds. Ceiling: the speed-up if attention only "
            f"copied q. {machine_line(record)}.",
        )
        for row in record["results"]:
            if row["mode"] == mode:
                rates, gains = row["images_per_second"], row["speedup"]
                cells = [rates["operator"], rates["eager"]]
                original = "timm original" in rates
                table.rows.append(
                    [
                        row["model"],
                        *(f"{cell:.1f}" for cell in cells),
                        f"{gains['eager']:.2f}",
                        f"{row['ceiling']:.2f}",
                        f"{rates['timm original']:.1f}" if original else "",
                        f"{gains['timm original']:.2f}" if original else "",
                    ]
                )
        made.append(table)
    return made


def families_table(record: Mapping[str, Any]) -> Table:
    """Milliseconds a batch of every family's model with the op, and how much longer its public form takes."""
    threads, results = record["machine"]["threads"], record["results"]
    count = "one thread" if threads == 1 else f"{threads} threads"
    clock = ", processor time" if record["clock"] == "cpu" else ""
    batches = sorted({row["batch"] for row in results})
    table = Table(
        f"The operator against the attention's public form, {record['size']} px, float32, {count}{clock}",
        ["model", *(cell for batch in batches for cell in (f"ms at batch {batch}", "speed-up", "quartiles"))],
        note=f"Medians of {record['rounds']} interleaved rounds. {machine_line(record)}.",
    )
    for model in dict.fromkeys(row["model"] for row in results):
        cells = [model]
        for batch in batches:
            row = next(row for row in results if (row["model"], row["batch"]) == (model, batch))
            low, high = row["speedup_quartiles"]["eager"]
            ms = 1e3 * batch / row["images_per_second"]["operator"]
            cells += [f"{ms:.0f}", f"{row['speedup']['eager']:.2f}", f"{low:.2f}-{high:.2f}"]
        table.rows.append(cells)
    return table


def _overtakes(results: Results, name: str, threads: int) -> str:
    ratios = [results.ratio("tokens", shape, name, MODES[1], threads) for shape in results.shapes("tokens")]
    measured = [ratio for ratio in ratios if ratio is not None]
    if not measured:
        return "-"
    if all(ratio >= 1 for ratio in measured):
        return "every size"
    meeting = crossover(results, "tokens", name, MODES[1], threads)
    return "no size" if meeting is None else f"{meeting:,.0f} tokens"
