"""A session of the `bench` command: runs suites with a progress bar and writes what they found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from flatten_ext.bench import (
    alternatives,
    charts,
    models,
    quality,
    quality_report,
    stages,
    tables,
    timing,
)
from flatten_ext.bench.results import Results
from flatten_ext.bench.shapes import QUICK_STAGES, STAGES, Shape, token_ladder
from flatten_ext.output import write_json, write_text

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """The command's options, as given."""

    output: Path
    quick: bool = False
    compiled: bool = True
    seconds: float = 1.0
    threads: list[int] | None = None
    device: str = "cpu"
    seeds: int = 5
    jobs: int = 2
    clock: str = "wall"

    @property
    def thread_counts(self) -> list[int]:
        if self.clock == "cpu":  # processor time adds the threads up, so it compares only runs of one
            return [1]
        if self.device != "cpu":
            return [torch.get_num_threads()]
        return self.threads or sorted({1, torch.get_num_threads()})

    @property
    def pace(self) -> float:
        """Seconds to spend on each timing."""
        return min(self.seconds, 0.02) if self.quick else self.seconds

    @property
    def stage_shapes(self) -> tuple[Shape, ...]:
        return QUICK_STAGES if self.quick else STAGES


def _collect(
    title: str,
    console: Console,
    steps: int,
    batches: Iterable[list[stages.Measurement]],
) -> list[stages.Measurement]:
    found = []
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=steps)
        for batch in batches:
            found += batch
            bar.update(task, advance=1, description=f"{title}: {batch[0].shape}")
            if not console.is_terminal:  # a log shows no bar
                console.print(f"{title}: {batch[0].shape} done", highlight=False)
    return found


def _run_stages(options: Options, console: Console) -> None:
    device, found, rates = torch.device(options.device), [], {}
    for count in options.thread_counts:
        with timing.threads(count):
            rates[count] = timing.mm_rate(device)
            batches = stages.run_stages(options.stage_shapes, device, options.compiled, options.pace)
            found += _collect(f"stages, {count} threads", console, len(options.stage_shapes), batches)
            rates[count] = max(rates[count], timing.mm_rate(device))
    ladder = token_ladder(6, 8) if options.quick else token_ladder(6, 16, 2)
    with timing.threads(min(options.thread_counts)):
        names, _ = alternatives.runnable(device, stages.AGAINST_TOKENS)
        batches = alternatives.time_ladder(ladder, names, device, options.pace / 2)
        found += _collect("tokens", console, len(ladder), batches)
    results = Results(stages.record(found, rates, device, options.clock))
    made = [tables.stages_table(results, count, stages.LABELS) for count in options.thread_counts]
    _publish("stages", results, made, options, console)
    charts.draw_speedups(results, options.output / "stages.svg", stages.LABELS)
    charts.draw_against_tokens(results, "tokens", options.output / "stages-tokens.svg", stages.LABELS)


def _run_alternatives(options: Options, console: Console) -> None:
    device = torch.device(options.device)
    names, missing = alternatives.runnable(device)
    found: list[stages.Measurement] = []
    count = min(options.thread_counts)
    with timing.threads(count):
        batches = alternatives.time_at(options.stage_shapes, names, device, options.pace)
        found += _collect("alternatives", console, len(options.stage_shapes), batches)
    results = Results(stages.record(found, {}, device, options.clock) | {"not_measured": missing})
    made = [tables.alternatives_table(results, count, alternatives.LABELS, missing)]
    _publish("alternatives", results, made, options, console)


def _run_tokens(options: Options, console: Console) -> None:
    device = torch.device(options.device)
    names, missing = alternatives.runnable(device)
    shapes = token_ladder(6, 8) if options.quick else token_ladder(6, 18, 2)
    count = min(options.thread_counts)
    with timing.threads(count):
        batches = alternatives.time_ladder(shapes, names, device, options.pace / 2)
        found = _collect("tokens", console, len(shapes), batches)
    results = Results(stages.record(found, {}, device, options.clock) | {"not_measured": missing})
    _publish("tokens", results, [tables.tokens_table(results, count, alternatives.LABELS)], options, console)
    charts.draw_against_tokens(results, "tokens", options.output / "tokens.svg", alternatives.LABELS)
    charts.draw_against_tokens(
        results, "tokens", options.output / "memory.svg", alternatives.LABELS, "peak_bytes"
    )


def _run_roofline(options: Options, console: Console) -> None:
    device, count = torch.device(options.device), min(options.thread_counts)
    with timing.threads(count):
        rate, bandwidth = timing.mm_rate(device), timing.copy_bandwidth(device)
        batches = alternatives.time_at(options.stage_shapes, ["flatten"], device, options.pace)
        found = _collect("roofline", console, len(options.stage_shapes), batches)
    results = Results(
        stages.record(found, {count: rate}, device, options.clock) | {"copy_gb_per_s": bandwidth}
    )
    points = []
    for shape in options.stage_shapes:
        ms = results.median("alternatives", shape.name, "flatten", stages.MODES[0], count)
        assert ms is not None
        points.append(
            {
                "label": shape.name,
                "intensity": shape.flops / shape.compulsory_bytes,
                "gflops": shape.flops / ms / 1e6,
            }
        )
    results.record["roofline"] = points
    write_json(options.output / "roofline.json", results.record)
    threads = "one thread" if count == 1 else f"{count} threads"
    title = f"The forward under the roofs of this machine (float32, {threads})"
    charts.draw_roofline(points, rate, bandwidth, title, options.output / "roofline.svg")
    console.print(f"{options.output / 'roofline.svg'}", highlight=False)


def _run_models(options: Options, console: Console) -> None:
    device, count, rows = torch.device(options.device), min(options.thread_counts), []
    pairs = models.PAIRS[:1] if options.quick else models.PAIRS
    with timing.threads(count), Progress(console=console, transient=True) as bar:
        task = bar.add_task("models", total=len(pairs))
        for found in models.time_models(device, options.pace, pairs=pairs):
            rows += found
            bar.update(task, advance=1, description=f"models: {found[0]['model']}")
    record = stages.record([], {}, device, options.clock) | {"models": rows}
    write_json(options.output / "models.json", record)
    table = tables.models_table(Results(record), rows)
    write_text(options.output / "models.md", table.markdown())
    charts.draw_models(rows, options.output / "models.svg")
    console.print(table.rich())


def _run_quality(options: Options, console: Console) -> None:
    from flatten_ext.demo.training import Budget

    budget = Budget(epochs=1, train_images=64, evaluations=1) if options.quick else quality.BUDGET
    folder = options.output / "quality-runs"
    todo = quality.tasks(1 if options.quick else options.seeds)
    missing = quality.pending(todo, folder, budget)
    with Progress(console=console) as bar:
        task = bar.add_task("quality", total=len(todo), completed=len(todo) - len(missing))

        def report(result: dict) -> None:
            name = f"{result['model']}, {result['variant']}, seed {result['seed']}"
            bar.update(task, advance=1, description=f"{name}: {100 * result['accuracy']:.1f} %")

        quality.train_all(missing, folder, budget, options.jobs, report)
    summary = quality.summarise(quality.collect(todo, folder, budget), budget)
    write_json(options.output / "quality.json", summary)
    made = quality_report.tables_of(summary)
    write_text(options.output / "quality.md", "\n".join(table.markdown() for table in made))
    quality_report.draw(summary, options.output / "quality.svg")
    for table in made:
        console.print(table.rich())


def _publish(
    name: str, results: Results, made: list[tables.Table], options: Options, console: Console
) -> None:
    write_json(options.output / f"{name}.json", results.record)
    write_text(options.output / f"{name}.md", "\n".join(table.markdown() for table in made))
    for table in made:
        console.print(table.rich())
    console.print(f"written to {options.output / name}.json, .md", highlight=False)


SUITES: dict[str, Callable[[Options, Console], None]] = {
    "stages": _run_stages,
    "alternatives": _run_alternatives,
    "tokens": _run_tokens,
    "roofline": _run_roofline,
    "models": _run_models,
    "quality": _run_quality,
}


def run(suite: str, options: Options, console: Console) -> None:
    """Runs one suite, or all but `quality`.

    Raises:
        CheckFailed: the op, or a contender that must agree with it, is wrong; nothing was written for it.
    """
    timing.use_clock(options.clock)
    chosen = [name for name in SUITES if name != "quality"] if suite == "all" else [suite]
    for name in chosen:
        SUITES[name](options, console)
