"""The paper's ablation in small: which part of focused linear attention helps micro models on real images."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flatten_ext import reference
from flatten_ext.analysis import read_matrices, sharpness
from flatten_ext.tools.bench import mixers
from flatten_ext.tools.bench.families import FAMILIES, FamilyMixer
from flatten_ext.tools.micro.images import Images
from flatten_ext.tools.micro.models import Block, MicroSwin, MicroViT, Size
from flatten_ext.tools.micro.training import Budget, train

__all__ = ["MODELS", "VARIANTS", "MixerAttention", "analyse", "run"]

MixerFactory = Callable[[int, int, Size], mixers.Mixer]


def _focused(focusing_factor: float, kernel_size: int | None) -> MixerFactory:
    return lambda dim, heads, size: mixers.Focused(dim, heads, size, focusing_factor, kernel_size)


VARIANTS: dict[str, MixerFactory] = {
    "softmax": mixers.Softmax,
    "softmax + DWC": mixers.SoftmaxDWC,
    "ReLU linear (p=1)": _focused(1, None),
    "focused p=2": _focused(2, None),
    "focused p=3": _focused(3, None),
    "focused p=4": _focused(4, None),
    "focused p=8": _focused(8, None),
    "ReLU linear + DWC": _focused(1, 5),
    "focused p=3 + DWC": _focused(3, 5),
    "DWC alone": mixers.ConvolutionOnly,
    "Performer": mixers.Performer,
    "Linformer": mixers.Linformer,
    "Hydra": mixers.Hydra,
    "efficient attention": mixers.EfficientAttention,
    **{name: partial(FamilyMixer, family=name) for name in FAMILIES},
}

MODELS: dict[str, Callable[..., MicroViT | MicroSwin]] = {
    "DeiT-like": partial(MicroViT, dim=32, num_heads=2, depth=2),
    "Swin-like": MicroSwin,
}


class MixerAttention(nn.Module):
    """Projections and a learned encoding of the keys around a mixer: the same for every variant, but that
    some have a gate.

    Args:
        dim, num_heads: channels and heads.
        size: (H, W) of the map.
        window, shift: attend inside windows of the map, as Swin does; None for the whole map.
        mixer: makes the mixer.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        size: Size,
        window: Size | None,
        shift: Size | None,
        mixer: MixerFactory,
    ) -> None:
        super().__init__()
        self.size, self.window, self.shift = size, window or size, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.positional_encoding = nn.Parameter(torch.zeros(self.window[0] * self.window[1], dim))
        self.mixer = mixer(dim, num_heads, self.window)
        self.proj = nn.Linear(dim, dim)
        self.gate = nn.Linear(dim, dim) if self.mixer.has_gate else None

    def project(self, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        """(B, N, C) -> q, k, v of every window, (B * windows, wh * ww, C) each; what else the mixer takes."""
        if self.window != self.size:
            x = reference.to_windows(x, self.size, self.window, self.shift).flatten(0, 1)
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q, k + self.positional_encoding, v), {"source": x} if self.mixer.reads_input else {}

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """(B, N, C) -> (B, N, C); `size` must be the one of the constructor."""
        tokens, more = self.project(x)
        out = self.mixer(*tokens, **more)
        if self.window != self.size:
            out = reference.from_windows(out.unflatten(0, (len(x), -1)), self.size, self.window, self.shift)
        return self.proj(out if self.gate is None else out * self.gate(x))


def _rank(matrices: Tensor, tolerance: float = 1e-3) -> float:
    """Mean number of singular values above `tolerance` times the largest."""
    values = torch.linalg.svdvals(matrices.double())
    return float((values > tolerance * values[..., :1]).sum(-1).double().mean())


def _matrices(mixer: mixers.Mixer, parts: Sequence[tuple[Tensor, Tensor, dict[str, Tensor]]]) -> Tensor:
    """Every fifth channel's matrix for each of the queries, keys and what else the mixer takes."""
    channels = slice(0, None, 5)
    return torch.stack([read_matrices(partial(mixer, **more), q, k, channels) for q, k, more in parts])


@torch.no_grad()
def analyse(model: MicroViT | MicroSwin, images: Tensor) -> list[dict[str, float | None]]:
    """Rank and entropy of each block's trained attention matrices, means over images and channels.

    `rank` is of the whole operator, depthwise branch included; `attention_rank` and `entropy` are of the
    attention alone, None where there is none. All are before a gate, where there is one. It looks at every
    fifth channel and each image's first window.

    Args:
        model: built with MixerAttention.
        images: (n, 1, 28, 28).
    """
    model.eval()
    inputs: dict[int, Tensor] = {}
    layers = [block.attention for block in model.blocks if isinstance(block, Block)]

    def keep(layer: nn.Module, arguments: tuple[Tensor]) -> None:
        inputs[layers.index(layer)] = arguments[0]

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    model(images)
    for hook in hooks:
        hook.remove()
    report = []
    for i, layer in enumerate(layers):
        assert isinstance(layer, MixerAttention)
        (q, k, _), more = layer.project(inputs[i])
        every = q.shape[0] // len(images)
        parts = [
            (q[j : j + 1], k[j : j + 1], {key: x[j : j + 1] for key, x in more.items()})
            for j in range(0, len(q), every)
        ]
        whole, attending = _matrices(layer.mixer, parts), layer.mixer.alone()
        facts: dict[str, float | None] = {"rank": _rank(whole), "attention_rank": None, "entropy": None}
        if attending is not None:
            alone = whole if attending is layer.mixer else _matrices(attending, parts)
            facts["attention_rank"] = _rank(alone)
            facts["entropy"] = float(1 - sharpness(alone.double()).mean())
        report.append(facts)
    return report


def run(model: str, variant: str, seed: int, images: Images, budget: Budget) -> dict[str, Any]:
    """Trains one model with one variant from one seed and analyses it; JSON-ready."""
    torch.manual_seed(seed)
    mixer = VARIANTS[variant]
    net = MODELS[model](
        lambda dim, heads, size, window, shift: MixerAttention(dim, heads, size, window, shift, mixer)
    )
    times, curve, losses = [], [], []
    for progress in train(net, images, budget, seed):
        times.append(progress.step_ms)
        losses.append(progress.loss)
        if progress.accuracy is not None:
            curve.append((progress.step, progress.accuracy))
    return {
        "model": model,
        "variant": variant,
        "seed": seed,
        "budget": asdict(budget),
        "parameters": sum(p.numel() for p in net.parameters()),
        "accuracy": curve[-1][1],
        "curve": curve,
        "last_loss": statistics.mean(losses[-20:]),
        "step_ms": statistics.median(times),
        "blocks": analyse(net, images.test[:16]),
    }
