"""`evaluate`: top-1 and top-5 accuracy of a model on a folder of images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flatten_ext.extras import require
from flatten_ext.tools.recipe import Amp


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command("evaluate")
    def command(
        model: Annotated[str, typer.Option(help="A timm model name, ours or timm's.")],
        data: Annotated[
            str,
            typer.Option(
                help="A folder of class folders (ImageNet's val), taken whole, or one with val/ in it; or "
                '"digits" or "mnist".'
            ),
        ],
        checkpoint: Annotated[
            Path | None, typer.Option(help="A published .pth file, or best.pt of `train`.")
        ] = None,
        grid: Annotated[
            str | None,
            typer.Option(
                help="Map that the checkpoint's positions were learned on, where it does not say it."
            ),
        ] = None,
        output: Annotated[Path | None, typer.Option(help="Write the result as JSON here.")] = None,
        img_size: Annotated[
            int | None, typer.Option(min=1, help="Pixels a side; default: the model's.")
        ] = None,
        batch_size: Annotated[int, typer.Option(min=1)] = 64,
        workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 4,
        amp: Annotated[Amp, typer.Option(help="Precision of autocast.")] = Amp.none,
        device: Annotated[str, typer.Option()] = "cpu",
        save_every: Annotated[int, typer.Option(min=1, help="Batches after which counts are kept.")] = 20,
    ) -> None:
        """Compute top-1 and top-5 accuracy with timm's data pipeline.

        With --output an evaluation that was cut off goes on where it was when it is started again with the
        same weights and images.
        """
        require("timm", "models", "evaluation")
        from timm.data import create_transform, resolve_model_data_config

        from flatten_ext.errors import InputError
        from flatten_ext.output import try_file, write_json
        from flatten_ext.tools import fingerprint, networks
        from flatten_ext.tools.data import open_whole
        from flatten_ext.tools.devices import find_device
        from flatten_ext.tools.evaluate import evaluate

        state = None
        if output is not None:
            state = output.with_name(f"{output.name}.state")
            try_file(output)
            try_file(state)
        found = find_device(device)
        dataset = open_whole(data)
        size: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
        net = networks.build(model, num_classes=len(dataset.classes), **size)
        if checkpoint is not None:
            networks.load(net, checkpoint, grid=grid)
            classes = networks.checkpoint_classes(checkpoint)
            if classes is not None and classes != list(dataset.classes):
                here, there = (", ".join(names[:5]) for names in (dataset.classes, classes))
                raise InputError(f"checkpoint {checkpoint} is of the classes {there}, data {data} has {here}")
        stats = resolve_model_data_config(net)
        if img_size is not None:
            stats["input_size"] = (3, img_size, img_size)
        dataset.transform = create_transform(**stats)
        what = f"model {model}" if img_size is None else f"img_size {img_size}: model {model}"
        networks.try_forward(net.to(found), stats["input_size"], what)
        settings = {"model": model, "input_size": list(stats["input_size"]), "amp": amp.value}
        facts: dict[str, Any] = settings | {
            "checkpoint": None if checkpoint is None else str(checkpoint.resolve()),
            "data": str(Path(data).resolve()),
        }
        # What the two files hold counts, not where they lie; `evaluate` itself looks at the weights.
        identity = settings | {"images": None if state is None else fingerprint.of_images(dataset)}
        console = Console()
        columns = (
            TextColumn(model),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )

        def finish(result: dict[str, Any]) -> None:
            if output is not None:
                # JSON has no infinity, which a logit of -inf for the right class gives.
                loss = result["loss"] if math.isfinite(result["loss"]) else None
                write_json(output, facts | result | {"loss": loss})

        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=len(dataset))
            result = evaluate(
                net,
                dataset,
                batch_size=batch_size,
                workers=workers,
                device=found,
                amp=amp.value,
                state=state,
                identity=identity,
                progress=lambda done, _total: bar.update(task, completed=done),
                finish=finish,
                save_every=save_every,
            )
        console.print(
            f"top-1 {result['top1']:.3f} %, top-5 {result['top5']:.3f} %, {result['images']} images"
        )
