"""`visualize`: what each kind of attention looks at, over a picture, and the ranks of the attentions."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flatten_ext.extras import require


class Suffix(str, enum.Enum):
    """What a figure is written as."""

    pdf = "pdf"
    svg = "svg"
    png = "png"


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command("visualize")
    def command(
        model: Annotated[str, typer.Option(help="One of flatten_ext.models.")],
        image: Annotated[Path, typer.Option(help="The picture.")],
        output: Annotated[Path, typer.Option(help="Folder of maps and ranks.")] = Path("flatten-visualize"),
        checkpoint: Annotated[
            Path | None, typer.Option(help="Weights; without them the model is untrained.")
        ] = None,
        grid: Annotated[
            str | None,
            typer.Option(
                help="Map that the checkpoint's positions were learned on, where it does not say it."
            ),
        ] = None,
        query: Annotated[
            list[str] | None, typer.Option(help="y,x in [0, 1) of a query token; may be given again.")
        ] = None,
        layer: Annotated[
            int, typer.Option(help="Which of the model's focused attentions on a whole map.")
        ] = -1,
        img_size: Annotated[int, typer.Option(min=1, help="Pixels a side.")] = 224,
        suffix: Annotated[Suffix, typer.Option(help="Format of the figures.")] = Suffix.pdf,
    ) -> None:
        """Draw softmax, linear, focused and focused + DWC attention of the same queries and keys.

        Writes maps (one row for each query token) and ranks (singular values; linear attention's rank
        is at most head_dim, which the depthwise branch lifts).
        """
        for package in ("timm", "matplotlib"):
            require(package, "bench", "the figures")
        import torch
        from timm.data import create_transform, resolve_model_data_config

        from flatten_ext.analysis import record_attention, sharpness
        from flatten_ext.errors import InputError
        from flatten_ext.output import try_folder
        from flatten_ext.tools import figures, networks
        from flatten_ext.tools.data import open_image

        queries = [_point(text) for text in query or ("0.3,0.3", "0.5,0.5", "0.7,0.6")]
        paths = [output / f"{name}.{suffix.value}" for name in ("maps", "ranks")]
        try_folder(output, *(path.name for path in paths))
        original = open_image(image)
        net = networks.build(model, img_size=img_size).eval()
        if checkpoint is not None:
            networks.load(net, checkpoint, new_classifier=True, grid=grid)
        size = (3, img_size, img_size)
        networks.try_forward(net, size, f"img_size {img_size}: model {model}")
        stats = resolve_model_data_config(net)
        transform = create_transform(**{**stats, "input_size": size, "crop_pct": 1.0}, normalize=False)
        pixels = transform(original).float() / 255
        mean, std = (torch.tensor(stats[key]).reshape(3, 1, 1) for key in ("mean", "std"))
        with torch.inference_mode(), record_attention(net) as recorded:
            net(((pixels - mean) / std)[None])
        console = Console()
        names = list(recorded)
        if not names:
            raise InputError(f"model {model} has no focused attention over a whole map")
        if not -len(names) <= layer < len(names):
            few = f"{layer} is none of the {len(names)} such attentions of {model}"
            raise typer.BadParameter(few, param_hint="--layer")
        inputs = recorded[names[layer]]
        if not all(inputs[key].isfinite().all() for key in ("q", "k")):
            raise InputError(f"model {model} gives NaN or infinity in {names[layer]}: nothing to draw")
        maps = figures.four_maps(inputs)
        picture = pixels.permute(1, 2, 0).numpy()
        head_dim = inputs["q"].shape[-1] // inputs["num_heads"]
        figures.save(figures.draw_maps(picture, maps, queries, inputs["size"]), paths[0])
        figures.save(figures.draw_ranks(maps, head_dim), paths[1])

        table = Table(title=f"{names[layer]}: {maps['softmax'].shape[-1]} tokens, head_dim {head_dim}")
        for column in ("attention", "rank", "sharpness"):
            table.add_column(column, justify="left" if column == "attention" else "right")
        for title, matrix in maps.items():
            rank = torch.linalg.matrix_rank(matrix).double().mean()
            table.add_row(title, f"{rank:.0f}", f"{sharpness(matrix).mean():.3f}")
        console.print(table)
        for path in paths:
            console.print(str(path), highlight=False)


def _point(text: str) -> tuple[float, float]:
    """ "0.3,0.5" -> (0.3, 0.5)."""
    try:
        y, x = (float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not y,x", param_hint="--query") from None
    if not (0 <= y < 1 and 0 <= x < 1):
        raise typer.BadParameter(f"{text!r} is outside [0, 1)", param_hint="--query")
    return y, x
