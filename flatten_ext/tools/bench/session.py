"""A session of the `bench` command: runs suites with a progress bar and writes what they found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from flatten_ext import info
from flatten_ext.output import write_json, write_text
from flatten_ext.tools.bench import alternatives, models, report, stages, timing, trainings
from flatten_ext.tools.bench.results import Results
from flatten_ext.tools.bench.shapes import QUICK_STAGES, STAGES, Shape, token_ladder

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
    rounds: int = 9

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
    _publish("stages", stages.record(found, rates, device, options.clock), options, console)


def _run_alternatives(options: Options, console: Console) -> None:
    device = torch.device(options.device)
    names, missing = alternatives.runnable(device)
    with timing.threads(min(options.thread_counts)):
        batches = alternatives.time_at(options.stage_shapes, names, device, options.pace)
        found = _collect("alternatives", console, len(options.stage_shapes), batches)
    record = stages.record(found, {}, device, options.clock) | {"not_measured": missing}
    _publish("alternatives", record, options, console)


def _run_tokens(options: Options, console: Console) -> None:
    device = torch.device(options.device)
    names, missing = alternatives.runnable(device)
    shapes = token_ladder(6, 8) if options.quick else token_ladder(6, 18, 2)
    with timing.threads(min(options.thread_counts)):
        batches = alternatives.time_ladder(shapes, names, device, options.pace / 2)
        found = _collect("tokens", console, len(shapes), batches)
    record = stages.record(found, {}, device, options.clock) | {"not_measured": missing}
    _publish("tokens", record, options, console)


def _run_roofline(options: Options, console: Console) -> None:
    device, count = torch.device(options.device), min(options.thread_counts)
    with timing.threads(count):
        rate, bandwidth = timing.mm_rate(device), timing.copy_bandwidth(device)
        batches = alternatives.time_at(options.stage_shapes, ["flatten"], device, options.pace)
        found = _collect("roofline", console, len(options.stage_shapes), batches)
        rate = max(rate, timing.mm_rate(device))
    record = stages.record(found, {count: rate}, device, options.clock) | {"copy_gb_per_s": bandwidth}
    results = Results(record)
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
    _publish("roofline", record | {"threads": count, "roofline": points}, options, console)


def _run_models(options: Options, console: Console) -> None:
    device, count, rows = torch.device(options.device), min(options.thread_counts), []
    pairs = models.PAIRS[:1] if options.quick else models.PAIRS
    with timing.threads(count), Progress(console=console, transient=True) as bar:
        task = bar.add_task("models", total=len(pairs))
        for found in models.time_models(device, options.pace, pairs=pairs):
            rows += found
            bar.update(task, advance=1, description=f"models: {found[0]['model']}")
    _publish("models", stages.record([], {}, device, options.clock) | {"models": rows}, options, console)


def _run_end_to_end(options: Options, console: Console) -> None:
    from flatten_ext.tools.bench import end_to_end  # needs the models

    batch, size, rounds = (1, 64, 2) if options.quick else (8, 224, options.rounds)
    names = end_to_end.MODELS[-1:] if options.quick else end_to_end.MODELS
    modes = (False, True) if options.compiled else (False,)
    threads, found = max(options.thread_counts), []
    with timing.threads(threads):
        machine = info.machine()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("end to end", total=len(names) * len(modes))
        for compiled in modes:
            for name in names:
                found.append(
                    end_to_end.in_process(name, compiled, batch, size, rounds, threads, options.clock)
                )
                bar.update(task, advance=1, description=f"end to end: {name}, {found[-1]['mode']}")
    setup = {"machine": machine, "clock": options.clock, "batch": batch, "size": size, "rounds": rounds}
    _publish("end-to-end", setup | {"results": found}, options, console)


def _run_families(options: Options, console: Console) -> None:
    from flatten_ext.tools.bench import end_to_end  # needs the models

    batches, size, rounds = ((1,), 64, 2) if options.quick else ((1, 8), 224, options.rounds)
    names = end_to_end.FAMILIES[-1:] if options.quick else end_to_end.FAMILIES
    threads, found = min(options.thread_counts), []
    with timing.threads(threads):
        machine = info.machine()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("families", total=len(names) * len(batches))
        for name in names:
            for batch in batches:
                arguments = (name, False, batch, size, rounds, threads, options.clock, False)
                found.append({"batch": batch, **end_to_end.in_process(*arguments)})
                bar.update(task, advance=1, description=f"families: {name}")
                if not console.is_terminal:  # a log shows no bar
                    console.print(f"{name}, batch {batch} done", highlight=False)
    setup = {"machine": machine, "clock": options.clock, "size": size, "rounds": rounds}
    _publish("families", setup | {"results": found}, options, console)


def _train(
    title: str,
    run: trainings.Run,
    todo: list[trainings.Task],
    budget: Any,
    options: Options,
    console: Console,
    found: Callable[[dict[str, Any]], str],
) -> list[dict[str, Any]]:
    """Trains what has no result in the output folder yet; `found` words a result. Returns all results."""
    folder = options.output / f"{title}-runs"
    missing = trainings.pending(todo, folder, budget)
    with Progress(console=console) as bar:
        task = bar.add_task(title, total=len(todo), completed=len(todo) - len(missing))

        def report_run(result: dict[str, Any]) -> None:
            name = f"{result['model']}, {result['variant']}, seed {result['seed']}"
            bar.update(task, advance=1, description=f"{name}: {found(result)}")

        trainings.train_all(run, missing, folder, budget, options.jobs, report_run)
    return trainings.collect(todo, folder, budget)


def _run_quality(options: Options, console: Console) -> None:
    from flatten_ext.tools.bench import quality  # needs the models
    from flatten_ext.tools.micro.training import Budget

    budget = Budget(epochs=1, train_images=64, evaluations=1) if options.quick else quality.BUDGET
    todo = quality.tasks(1 if options.quick else options.seeds)
    results = _train(
        "quality",
        quality.run_task,
        todo,
        budget,
        options,
        console,
        lambda result: f"{100 * result['accuracy']:.1f} %",
    )
    _publish("quality", quality.summarise(results, budget), options, console)


def _run_restoration(options: Options, console: Console) -> None:
    from flatten_ext.tools.bench import restoration  # needs the models

    budget = restoration.QUICK if options.quick else restoration.BUDGET
    todo = restoration.tasks(1 if options.quick else options.seeds)
    results = _train(
        "restoration",
        restoration.run_task,
        todo,
        budget,
        options,
        console,
        lambda result: f"{result['psnr']['trained']:.2f} dB",
    )
    _publish("restoration", restoration.summarise(results, budget), options, console)


def _publish(suite: str, record: dict[str, Any], options: Options, console: Console) -> None:
    """Writes a suite's record, its tables and its charts, and shows the tables."""
    made = report.tables_of(suite, record)
    write_json(options.output / f"{suite}.json", record)
    write_text(options.output / f"{suite}.md", "\n".join(table.markdown() for table in made))
    report.draw(suite, record, options.output)
    for table in made:
        console.print(table.rich())
    console.print(f"written to {options.output / suite}.json, .md", highlight=False)


SUITES: dict[str, Callable[[Options, Console], None]] = {
    "stages": _run_stages,
    "alternatives": _run_alternatives,
    "tokens": _run_tokens,
    "roofline": _run_roofline,
    "models": _run_models,
    "end-to-end": _run_end_to_end,
    "families": _run_families,
    "quality": _run_quality,
    "restoration": _run_restoration,
}
TRAININGS = ("quality", "restoration")


def run(suite: str, options: Options, console: Console) -> None:
    """Runs one suite, or all but the trainings.

    Raises:
        CheckFailed: the op, or a contender that must agree with it, is wrong; nothing was written for it.
    """
    timing.use_clock(options.clock)
    chosen = [name for name in SUITES if name not in TRAININGS] if suite == "all" else [suite]
    for name in chosen:
        SUITES[name](options, console)
