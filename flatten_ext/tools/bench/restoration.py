"""Restoration: how well the attentions denoise and enlarge photographs, at equal numbers of parameters."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from flatten_ext import depthwise_conv, info
from flatten_ext.extras import require
from flatten_ext.models._choice import choose
from flatten_ext.tools.bench import trainings
from flatten_ext.tools.micro import restorer
from flatten_ext.tools.micro.photographs import read_photograph
from flatten_ext.tools.micro.restorer import PROBLEMS, Budget, HeldOut, MicroRestorer

__all__ = ["BUDGET", "QUICK", "VARIANTS", "Baseline", "build", "run_task", "summarise", "tasks"]

BUDGET = Budget(steps=200, batch_size=4)
QUICK = Budget(steps=2, batch_size=2, crop=16, test_crops=1)
PARAMETERS = 40_000  # of every network, as nearly as the width of its MLPs allows
EXAMPLE = ("astronaut.png", 60, 180, 96)  # photograph, first row, first column, side: shown as seed 0 has it


class Baseline(nn.Module):
    """Softmax attention, a depthwise 5 x 5 convolution of each channel of the values, or both.

    Args:
        dim, num_heads: channels and heads.
        softmax: whether it attends; else there are no queries and keys.
        convolution: whether it convolves.
    """

    def __init__(self, dim: int, num_heads: int, softmax: bool, convolution: bool) -> None:
        super().__init__()
        self.num_heads, self.softmax = num_heads, softmax
        self.qkv = nn.Linear(dim, 3 * dim if softmax else dim)
        self.dwc = nn.Conv2d(dim, dim, 5, padding=2, groups=dim) if convolution else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        parts = self.qkv(x)
        out, v = torch.zeros_like(x), parts
        if self.softmax:
            q, k, v = parts.chunk(3, -1)
            heads = [y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v)]
            out = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        if self.dwc is not None:
            out = out + depthwise_conv(v, self.dwc.weight, self.dwc.bias, size)
        return self.proj(out)


def _baseline(softmax: bool, convolution: bool) -> Callable[[int, int], nn.Module]:
    return lambda dim, heads: Baseline(dim, heads, softmax, convolution)


def _linear(name: str) -> Callable[[int, int], nn.Module]:
    """The attention that the models of a family have, with its own local term and gate, without a learned
    encoding of the keys: that would be learned for one size."""

    def made(dim: int, heads: int) -> nn.Module:
        return choose(name, "packed")(Attention(dim, heads, qkv_bias=True), None)

    return made


VARIANTS: dict[str, Callable[[int, int], nn.Module]] = {
    "DWC alone": _baseline(False, True),
    "softmax": _baseline(True, False),
    "softmax + DWC": _baseline(True, True),
    "FLatten": _linear("flatten"),
    "MILA": _linear("mila"),
    "RALA": _linear("rala"),
    "MALA": _linear("mala"),
    "InLine": _linear("inline"),
    "PolaFormer": _linear("pola"),
}


def tasks(seeds: int) -> list[trainings.Task]:
    """All trainings."""
    return trainings.tasks(seeds, PROBLEMS, VARIANTS)


def _size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def build(problem: str, variant: str) -> MicroRestorer:
    """The network whose MLPs are as wide as brings it nearest to `PARAMETERS`."""
    one, two = (_size(MicroRestorer(problem, VARIANTS[variant], hidden)) for hidden in (1, 2))
    hidden = 1 + round((PARAMETERS - one) / (two - one))
    return MicroRestorer(problem, VARIANTS[variant], hidden)


def _restored_by(net: MicroRestorer) -> Callable[[Tensor], Tensor]:
    def restore(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([net(part) for part in images.split(8)])

    return restore


def _unrestored(problem: str) -> Callable[[Tensor], Tensor]:
    """The input itself, or its bicubic enlargement."""
    if problem == PROBLEMS[0]:
        return lambda images: images
    return lambda images: F.interpolate(images, scale_factor=2, mode="bicubic")


def _example() -> Tensor:
    name, row, column, side = EXAMPLE
    return read_photograph(name)[None, None, row : row + side, column : column + side]


def _as_png(image: Tensor) -> str:
    """A (1, 1, H, W) picture as a PNG file, in base64."""
    pixels = (image[0, 0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    require("PIL.Image", "bench", "the example").fromarray(pixels).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _examples(problem: str, budget: Budget, restore: Callable[[Tensor], Tensor]) -> str:
    inputs = restorer.degraded(_example(), problem, budget, torch.Generator().manual_seed(1))
    return _as_png(restore(inputs))


def _measured(pictures: HeldOut, restore: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """PSNR in crops of the trained size, and in crops of twice that side; means over the photographs."""
    trained, larger = pictures.psnr(restore, 2), pictures.psnr(restore)
    return {
        "trained": statistics.mean(trained.values()),
        "larger": statistics.mean(larger.values()),
        "photographs": trained,
    }


def run_task(task: trainings.Task, budget: Budget) -> dict[str, Any]:
    """Trains one network from one seed and measures it; JSON-ready."""
    torch.manual_seed(task.seed)
    net = build(task.model, task.variant)
    loss = restorer.train(net, task.model, budget, task.seed)
    restore = _restored_by(net.eval())
    return {
        **asdict(task),
        "budget": asdict(budget),
        "parameters": _size(net),
        "last_loss": loss,
        "psnr": _measured(restorer.held_out(task.model, budget), restore),
        "example": _examples(task.model, budget, restore) if task.seed == 0 else None,
    }


def summarise(results: Sequence[dict[str, Any]], budget: Budget) -> dict[str, Any]:
    """The runs of every problem and attention, what there was to restore, and the examples; JSON-ready."""
    rows = []
    for problem in PROBLEMS:
        for variant in VARIANTS:
            runs = [r for r in results if r["model"] == problem and r["variant"] == variant]
            if runs:
                kept = [{key: run[key] for key in ("seed", "last_loss", "psnr")} for run in runs]
                examples = [run["example"] for run in runs if run["example"] is not None]
                rows.append(
                    {
                        "model": problem,
                        "variant": variant,
                        "parameters": runs[0]["parameters"],
                        "example": examples[0] if examples else None,
                        "runs": kept,
                    }
                )
    inputs = {
        problem: {
            "psnr": _measured(restorer.held_out(problem, budget), _unrestored(problem)),
            "example": _examples(problem, budget, _unrestored(problem)),
        }
        for problem in PROBLEMS
    }
    return {
        "what": "restoration: small networks on photographs of scikit-image and scikit-learn",
        "machine": info.machine(),
        "budget": asdict(budget),
        "clean": _as_png(_example()),
        "inputs": inputs,
        "variants": rows,
    }
