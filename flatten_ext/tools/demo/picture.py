"""The demo's picture: learning curves, and what one token attends to in each trained model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatten_ext import FocusedLinearAttention
from flatten_ext.extras import require
from flatten_ext.output import replacing
from flatten_ext.tools.demo.attentions import SoftmaxAttention, influence
from flatten_ext.tools.demo.run import CAVEAT, Outcome
from flatten_ext.tools.micro.images import Images
from flatten_ext.tools.micro.models import Block, MicroViT

__all__ = ["COLORS", "draw"]

COLORS = {"softmax": "#5b6b7f", "linear": "#d9822b", "focused": "#0b7a75"}
DIGITS = (2, 4, 5, 8)
LABEL_GAP = 11.0  # percent points between the labels of lines that end close together
INK, FAINT, PAPER = "#1d2733", "#8a94a0", "#fdfdfb"


def _query_token(image: Tensor, size: tuple[int, int]) -> int:
    """The token with the most ink: a place on the stroke."""
    h, w = size
    ink = image[0].unflatten(0, (h, -1)).unflatten(2, (w, -1)).mean((1, 3))
    return int(ink.argmax())


@torch.no_grad()
def _map_of(model: MicroViT, image: Tensor, query: int) -> Tensor:
    """The first block's influence map, (H, W), of one (1, 28, 28) image."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    assert isinstance(block.attention, SoftmaxAttention | FocusedLinearAttention)
    return influence(block.attention, block.norm1(model.patch_embed(image[None])), block.size, query)


def _draw_curves(axes: Any, outcomes: Sequence[Outcome]) -> None:
    # Labels at the line ends, pushed apart where lines end close together.
    ends = sorted(outcomes, key=lambda outcome: -outcome.accuracy)
    place = 100.0 + LABEL_GAP
    for outcome in ends:
        color = COLORS[outcome.variant.name]
        curves = [[100 * accuracy for _, accuracy in run.curve] for run in outcome.runs]
        steps = [step for step, _ in outcome.runs[0].curve]
        mean = [statistics.mean(at) for at in zip(*curves, strict=True)]
        if len(curves) > 1:
            low = [min(at) for at in zip(*curves, strict=True)]
            high = [max(at) for at in zip(*curves, strict=True)]
            axes.fill_between(steps, low, high, color=color, alpha=0.14, linewidth=0)
        axes.plot(steps, mean, color=color, linewidth=2.4, solid_capstyle="round")
        axes.plot(steps[-1], mean[-1], "o", color=color, markersize=6, clip_on=False, zorder=3)
        place = min(mean[-1], place - LABEL_GAP)
        axes.annotate(
            f"{outcome.variant.label}\n{mean[-1]:.1f} %",
            (steps[-1], mean[-1]),
            (steps[-1] * 1.03, place),
            color=color,
            va="center",
            fontsize=10.5,
            fontweight="bold",
            linespacing=1.15,
            annotation_clip=False,
        )
    axes.set_xlim(0, steps[-1])
    axes.set_ylim(0, 100)
    axes.set_xlabel("training steps (batches of 64 images)", color=FAINT)
    axes.set_title("Test accuracy, %", loc="left", fontsize=12, color=INK, pad=10)
    axes.grid(axis="y", color="#e6e6e0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c8ccd0")


def _draw_maps(grid: Any, figure: Any, outcomes: Sequence[Outcome], images: Images) -> None:
    patches = require("matplotlib.patches", "demo", "the picture")
    labels = images.test_labels.tolist()
    for row, digit in enumerate(DIGITS):
        image = images.test[labels.index(digit)]
        size = outcomes[0].model.patch_embed.size
        query = _query_token(image, size)
        patch = image.shape[-1] // size[1]
        corner = (query % size[1] * patch - 0.5, query // size[1] * patch - 0.5)
        for column in range(len(outcomes) + 1):
            axes = figure.add_subplot(grid[row, column])
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if column == 0:
                axes.imshow(image[0].numpy(), cmap="gray_r")
            else:
                weights = _map_of(outcomes[column - 1].model, image, query)
                extent = (-0.5, image.shape[-1] - 0.5, image.shape[-2] - 0.5, -0.5)
                axes.imshow((weights / weights.max()).numpy(), cmap="magma", vmin=0, vmax=1, extent=extent)
                axes.contour(image[0].numpy(), levels=[0.9], colors="white", linewidths=0.9, alpha=0.85)
            axes.add_patch(
                patches.Rectangle(corner, patch, patch, fill=False, edgecolor="#23c4b8", linewidth=2)
            )
            if row == 0:
                outcome = outcomes[column - 1] if column else None
                axes.set_title(
                    outcome.variant.label.replace(" + ", "\n+ ") if outcome else "image\nand query",
                    fontsize=10.5,
                    color=COLORS[outcome.variant.name] if outcome else INK,
                    fontweight="bold",
                    pad=7,
                )


def draw(outcomes: Sequence[Outcome], images: Images, path: Path) -> None:
    """Writes the picture (PNG, SVG or PDF by the suffix of `path`).

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    matplotlib = require("matplotlib.figure", "demo", "the picture")
    figure = matplotlib.Figure(figsize=(13, 6.6), facecolor=PAPER)
    columns = len(outcomes) + 1
    left = figure.add_gridspec(1, 1, left=0.045, right=0.43, top=0.77, bottom=0.15)
    right = figure.add_gridspec(
        len(DIGITS), columns, left=0.6, right=0.985, top=0.77, bottom=0.085, wspace=0.07, hspace=0.07
    )
    axes = figure.add_subplot(left[0, 0], facecolor=PAPER)
    _draw_curves(axes, outcomes)
    _draw_maps(right, figure, outcomes, images)
    seeds = len(outcomes[0].runs)
    figure.text(
        0.045,
        0.93,
        "The same micro vision transformer, three attentions",
        fontsize=17,
        fontweight="bold",
        color=INK,
    )
    figure.text(
        0.045,
        0.885,
        f"Learning 5,000 MNIST images, {seeds} seed{'s: mean and range' if seeds > 1 else ''}",
        fontsize=10.5,
        color=FAINT,
    )
    figure.text(
        0.6,
        0.885,
        "How strongly each token acts on the framed one, first block",
        fontsize=10.5,
        color=FAINT,
    )
    figure.text(0.045, 0.03, CAVEAT, fontsize=9, color=FAINT, style="italic")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160, facecolor=PAPER)
