"""`train`: fine-tunes or trains a model; a run that was cut off goes on exactly where it was."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flatten_ext.extras import require
from flatten_ext.tools.recipe import Amp, TrainConfig


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    def command(**options: Any) -> None:
        """Train a model, or fine-tune a converted one.

        Writes last.pt, best.pt and history.json into the folder. Run the same command again after an
        interruption of any kind: the result is the one that an undisturbed run gives.

        On several GPUs or machines: torchrun --nproc-per-node 4 -m flatten_ext train ...
        """
        require("timm", "models", "training")
        from flatten_ext.tools.data import is_divided
        from flatten_ext.tools.train import Trainer

        config = TrainConfig(**options | {"amp": options["amp"].value})
        trainer = Trainer(config)
        console = Console(quiet=not trainer.processes.first)
        if not is_divided(config.data):
            console.print(
                f"{config.data} has no train/ and val/: every fifth image of each class is held out "
                f"({len(trainer.val_set)} of {len(trainer.val_set) + len(trainer.train_set)})"
            )
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(config.model, total=None, loss=float("nan"))

            def report(done: int, total: int, loss: float) -> None:
                bar.update(task, completed=done, total=total, loss=loss)

            history = trainer.fit(report)
        last = history[-1]
        console.print(f"top-1 {last['top1']:.2f} %, top-5 {last['top5']:.2f} %, best {trainer.best:.2f} %")
        console.print(str(Path(config.output) / "best.pt"), highlight=False)

    command.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in _parameters()} | {"return": None}
    app.command("train")(command)


def _parameters() -> list[inspect.Parameter]:
    """TrainConfig's fields as options of the command line."""
    hints, made = get_type_hints(TrainConfig), []
    for option in dataclasses.fields(TrainConfig):
        if not option.metadata.get("cli", True):
            continue
        bounds = {key: value for key in ("min", "max") if (value := option.metadata.get(key)) is not None}
        declared = typer.Option(help=option.metadata["help"], **bounds)
        kind, default = hints[option.name], option.default
        if option.name == "amp":
            kind, default = Amp, Amp.none
        elif default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        made.append(
            inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[kind, declared],
            )
        )
    return made
