"""Figures of attention over a picture, to print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from flatten_ext.analysis import attention_map, softmax_map
from flatten_ext.output import replacing
from flatten_ext.tools.style import FAINT, INK, quiet

__all__ = ["draw_maps", "draw_ranks", "four_maps", "save"]

_COLORS = ("#5b6b7f", "#d9822b", "#0b7a75", "#b0488c")
_RING = {"markerfacecolor": "none", "markeredgecolor": "cyan", "markeredgewidth": 1.4}


def four_maps(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The (heads, N, N) matrices of the first image: softmax, linear, focused, focused + DWC.

    Of another feature map than "focused", linear is that map alone; in place of focused comes the attention
    as it was called: rotated, weighted, normalized.

    Args:
        inputs: arguments of `attention_map`, as `record_attention` leaves them.
    """
    own = attention_map(**inputs)
    feature_map = inputs.get("feature_map", "focused")
    if feature_map == "focused":
        linear = attention_map(**{**inputs, "focusing_factor": 1.0, "dwc_weight": None})
        name, titles = "focused", ["linear (p = 1)", f"focused (p = {inputs['focusing_factor']:g})"]
    else:
        plain: Any = {key: inputs.get(key) for key in ("q", "k", "num_heads", "key_bias", "key_weight")}
        linear = attention_map(**plain, feature_map=feature_map)
        name, titles = "general", [f"linear ({feature_map})", "general"]
    softmax = softmax_map(inputs["q"], inputs["k"], inputs["num_heads"])
    maps = (softmax, linear.attention, own.attention, own.with_dwc)
    titles = ["softmax", *titles, f"{name} + DWC"]
    return {title: m[0] for title, m in zip(titles, maps, strict=True) if m is not None}


def draw_maps(
    image: np.ndarray, maps: dict[str, Tensor], queries: Sequence[tuple[float, float]], size: Sequence[int]
) -> Figure:
    """One row for each query token, one column for each attention, drawn over the picture.

    Args:
        image: (H, W, 3) in [0, 1].
        maps: (heads, N, N) matrices by title; the heads are averaged. Leading tokens outside the map are
            not drawn.
        queries: (y, x) in [0, 1): where in the picture the query token lies.
        size: the map that the tokens tile.
    """
    height, width = size
    figure = _figure(2.1 * (len(maps) + 1), 2.25 * len(queries) + 0.3)
    axes = figure.subplots(len(queries), len(maps) + 1, squeeze=False)
    extent = (0, image.shape[1], image.shape[0], 0)
    for row, (y, x) in zip(axes, queries, strict=True):
        token = int(y * height) * width + int(x * width)
        row[0].imshow(image, extent=extent)
        for axis, matrix in zip(row[1:], maps.values(), strict=True):
            prefix = matrix.shape[-1] - height * width
            # Only the DWC has negative weights.
            weights = matrix.mean(0)[prefix + token, prefix:].reshape(height, width).clamp_min(0)
            axis.imshow(0.55 * image.mean(-1), cmap="gray", extent=extent, vmin=0, vmax=1)
            # Each map has its own scale, for the shapes to be compared; the text tells how high it goes.
            share = (weights / weights.max().clamp_min(1e-30)).cpu().numpy()
            heat = matplotlib.colormaps["inferno"](0.3 + 0.7 * share)
            heat[..., 3] = 0.85 * share
            axis.imshow(heat, extent=extent, interpolation="nearest")
            peak = float(weights.max()) * matrix.shape[-1]
            axis.set_xlabel(f"peak: {peak:.1f} x uniform", fontsize=8, color=FAINT, labelpad=3)
        for axis in row:
            axis.plot(x * image.shape[1], y * image.shape[0], "o", markersize=7, **_RING)
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
    for axis, title in zip(axes[0], ("query token", *maps), strict=True):
        axis.set_title(title, color=INK)
    return figure


def draw_ranks(maps: dict[str, Tensor], head_dim: int) -> Figure:
    """Singular values of each attention (mean over heads), and the rank linear attention cannot pass."""
    figure = _figure(5.2, 4.0)
    axis = figure.subplots()
    quiet(axis)
    for (title, matrix), color in zip(maps.items(), _COLORS, strict=False):
        values = torch.linalg.svdvals(matrix)
        rank = torch.linalg.matrix_rank(matrix).double().mean()
        values = (values / values[:, :1]).mean(0).clamp_min(1e-17)
        look = {"color": color, "linewidth": 2, "label": f"{title}: rank {rank:.0f}"}
        axis.semilogy(np.arange(1, len(values) + 1), values.cpu(), **look)
    axis.axvline(head_dim, color=FAINT, linestyle=":", label=f"head_dim = {head_dim}")
    axis.set(xlim=(1, matrix.shape[-1]))
    axis.set_xlabel("index of the singular value", color=FAINT)
    axis.set_ylabel("singular value / largest", color=FAINT)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes `figure`, whole or not at all; the suffix chooses the format (pdf, svg, png)."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=300, bbox_inches="tight")


def _figure(width: float, height: float) -> Figure:
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9}):
        return Figure(figsize=(width, height), layout="constrained")
