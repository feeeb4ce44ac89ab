"""`train`: fine-tunes or trains a model; a run that was cut off goes on exactly where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flatten_ext.tools.extras import require


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command("train")
    def command(
        model: Annotated[str, typer.Option(help="A timm model name, ours or timm's.")],
        data: Annotated[str, typer.Option(help='A folder with train/ and val/, or "digits" or "mnist".')],
        output: Annotated[Path, typer.Option(file_okay=False, help="Folder of the run; resumed if begun.")],
        checkpoint: Annotated[Path | None, typer.Option(help="Weights to start from.")] = None,
        convert: Annotated[
            str | None, typer.Option(help="Stages to make focused-linear after loading, such as LLSS.")
        ] = None,
        teacher: Annotated[
            str | None,
            typer.Option(help='Model to distil from; "self" is the softmax model before --convert.'),
        ] = None,
        teacher_checkpoint: Annotated[Path | None, typer.Option(help="The teacher's weights.")] = None,
        distillation: Annotated[
            float, typer.Option(min=0, max=1, help="Weight of the teacher's loss.")
        ] = 0.5,
        img_size: Annotated[int, typer.Option(help="Pixels a side.")] = 224,
        epochs: Annotated[int, typer.Option(min=1)] = 300,
        batch_size: Annotated[int, typer.Option(min=1)] = 128,
        opt: Annotated[str, typer.Option(help="timm's optimizer.")] = "adamw",
        lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
        weight_decay: Annotated[float, typer.Option()] = 0.05,
        warmup_epochs: Annotated[int, typer.Option()] = 5,
        smoothing: Annotated[float, typer.Option(help="Label smoothing.")] = 0.1,
        mixup: Annotated[float, typer.Option(help="mixup's alpha; 0 for none.")] = 0.8,
        cutmix: Annotated[float, typer.Option(help="CutMix's alpha; 0 for none.")] = 1.0,
        auto_augment: Annotated[
            str, typer.Option(help='timm\'s policy; "none" for none.')
        ] = "rand-m9-mstd0.5-mmax9-inc1",
        reprob: Annotated[float, typer.Option(help="Probability of random erasing.")] = 0.25,
        hflip: Annotated[float, typer.Option(help="Probability of a horizontal flip.")] = 0.5,
        crop_scale: Annotated[
            float, typer.Option(help="Smallest share of the picture that a random crop shows.")
        ] = 0.08,
        ema_decay: Annotated[float, typer.Option(help="Decay of the averaged weights; 0 for none.")] = 0.9999,
        amp: Annotated[str, typer.Option(help="bfloat16, float16 or none.")] = "none",
        workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 4,
        device: Annotated[str, typer.Option()] = "cpu",
        seed: Annotated[int, typer.Option()] = 0,
        save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    ) -> None:
        """Train a model, or fine-tune a converted one.

        Writes last.pt, best.pt and history.json into the folder. Run the same command again after an
        interruption of any kind: the result is the one that an undisturbed run gives.
        """
        require("timm", "models", "training")
        from flatten_ext.tools.train import TrainConfig, Trainer

        config = TrainConfig(
            model=model,
            data=data,
            output=str(output),
            checkpoint=None if checkpoint is None else str(checkpoint),
            convert=convert,
            teacher=teacher,
            teacher_checkpoint=None if teacher_checkpoint is None else str(teacher_checkpoint),
            distillation=distillation,
            img_size=img_size,
            epochs=epochs,
            batch_size=batch_size,
            opt=opt,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            smoothing=smoothing,
            mixup=mixup,
            cutmix=cutmix,
            auto_augment=None if auto_augment == "none" else auto_augment,
            reprob=reprob,
            hflip=hflip,
            crop_scale=crop_scale,
            ema_decay=ema_decay or None,
            amp=None if amp == "none" else amp,
            workers=workers,
            device=device,
            seed=seed,
            save_every=save_every,
        )
        trainer = Trainer(config)
        console = Console()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(model, total=None, loss=float("nan"))

            def report(done: int, total: int, loss: float) -> None:
                bar.update(task, completed=done, total=total, loss=loss)

            history = trainer.fit(report)
        last = history[-1]
        console.print(f"top-1 {last['top1']:.2f} %, top-5 {last['top5']:.2f} %, best {trainer.best:.2f} %")
        console.print(str(output / "best.pt"), highlight=False)
