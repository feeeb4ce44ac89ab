"""`evaluate`: top-1 and top-5 accuracy of a model on a folder of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flatten_ext.tools.extras import require


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command("evaluate")
    def command(
        model: Annotated[str, typer.Option(help="A timm model name, ours or timm's.")],
        data: Annotated[str, typer.Option(help="A folder of class folders (ImageNet's val).")],
        checkpoint: Annotated[
            Path | None, typer.Option(exists=True, help="A published .pth file, or best.pt of `train`.")
        ] = None,
        output: Annotated[Path | None, typer.Option(help="Write the result as JSON here.")] = None,
        img_size: Annotated[int | None, typer.Option(help="Pixels a side; default: the model's.")] = None,
        batch_size: Annotated[int, typer.Option(min=1)] = 64,
        workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 4,
        amp: Annotated[str, typer.Option(help="bfloat16, float16 or none.")] = "none",
        device: Annotated[str, typer.Option()] = "cpu",
    ) -> None:
        """Compute top-1 and top-5 accuracy with timm's data pipeline.

        With --output an evaluation that was cut off goes on where it was when it is started again.
        """
        require("timm", "models", "evaluation")
        import timm
        from timm.data import create_transform, resolve_model_data_config

        from flatten_ext.models import load_official
        from flatten_ext.tools.data import open_dataset
        from flatten_ext.tools.evaluate import evaluate, write_atomically

        dataset = open_dataset(data, train=False)
        size = {} if img_size is None else {"img_size": img_size}
        net = timm.create_model(model, num_classes=len(dataset.classes), **size)
        if checkpoint is not None:
            load_official(net, checkpoint)
        stats = resolve_model_data_config(net)
        if img_size is not None:
            stats["input_size"] = (3, img_size, img_size)
        dataset.transform = create_transform(**stats)
        identity = {
            "model": model,
            "checkpoint": None if checkpoint is None else str(checkpoint.resolve()),
            "data": str(Path(data).resolve()),
            "input_size": list(stats["input_size"]),
            "amp": amp,
        }
        console = Console()
        columns = (
            TextColumn(model),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=len(dataset))
            result = evaluate(
                net,
                dataset,
                batch_size=batch_size,
                workers=workers,
                device=device,
                amp=None if amp == "none" else amp,
                state=None if output is None else output.with_name(f"{output.name}.state"),
                identity=identity,
                progress=lambda done, _total: bar.update(task, completed=done),
            )
        console.print(
            f"top-1 {result['top1']:.3f} %, top-5 {result['top5']:.3f} %, {result['images']} images"
        )
        if output is not None:
            content = json.dumps(identity | result, indent=1).encode()
            write_atomically(output, lambda file: file.write(content))
