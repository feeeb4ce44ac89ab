"""`bench`: checks, then times; and the suites behind docs/evidence.md."""

from __future__ import annotations

import enum
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flatten_ext.extras import require


class Suite(str, enum.Enum):
    """What to measure."""

    stages = "stages"
    alternatives = "alternatives"
    tokens = "tokens"
    roofline = "roofline"
    models = "models"
    end_to_end = "end-to-end"
    families = "families"
    quality = "quality"
    restoration = "restoration"
    all = "all"


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command("bench")
    def command(
        suite: Annotated[
            Suite,
            typer.Option(
                help="stages: the op, the eager formula, torch.compile and softmax at the published models' "
                "shapes; alternatives: other attentions there; tokens: time and memory against tokens; "
                "roofline; models: images/s and FLOPs of our models and timm's; end-to-end: our models with "
                "the op and with the eager formula; families: one model of each family likewise; quality: "
                "the ablation (hours); restoration: denoising and super-resolution (an hour); all: all but "
                "quality and restoration."
            ),
        ] = Suite.stages,
        output: Annotated[Path, typer.Option(help="Folder for the JSON, Markdown and SVG.")] = Path(
            "flatten-bench"
        ),
        quick: Annotated[
            bool, typer.Option("--quick", help="Small shapes and few rounds: a smoke test.")
        ] = False,
        compiled: Annotated[
            bool, typer.Option("--compile/--no-compile", help="Time torch.compile too.")
        ] = True,
        seconds: Annotated[float, typer.Option(min=0.0, help="Seconds to spend on each timing.")] = 1.0,
        threads: Annotated[
            list[int] | None, typer.Option(min=1, help="Numbers of threads (default: one, and all).")
        ] = None,
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        cpu_time: Annotated[
            bool,
            typer.Option(
                "--cpu-time", help="One thread, by processor time: for a machine busy with other work."
            ),
        ] = False,
        seeds: Annotated[int, typer.Option(min=1, help="quality, restoration: seeds of each variant.")] = 5,
        jobs: Annotated[int, typer.Option(min=1, help="quality, restoration: trainings side by side.")] = 2,
        rounds: Annotated[int, typer.Option(min=2, help="end-to-end, families: rounds of each model.")] = 9,
    ) -> None:
        """Check, then time: focused linear attention beside its alternatives.

        Nothing is timed that does not first agree with the float64 formula. Contenders take turns in one
        process and are compared by medians.
        """
        require("matplotlib", "bench", "the charts")
        from flatten_ext.errors import InputError
        from flatten_ext.output import try_folder
        from flatten_ext.tools.bench import session
        from flatten_ext.tools.bench.check import CheckFailed
        from flatten_ext.tools.devices import find_device

        if not math.isfinite(seconds):
            raise InputError(f"seconds is {seconds}, expected a finite number")
        try_folder(output)
        find_device(device)
        clock = "cpu" if cpu_time else "wall"
        options = session.Options(
            output, quick, compiled and not quick, seconds, threads, device, seeds, jobs, clock, rounds
        )
        try:
            session.run(suite.value, options, Console())
        except CheckFailed as error:
            raise InputError(str(error)) from error
