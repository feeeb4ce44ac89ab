"""A small restoration network in which only the attention varies, its pictures, and its training."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatten_ext.tools.micro.descent import descend, learning_rate
from flatten_ext.tools.micro.photographs import HELD_OUT, TRAIN, read_photograph

__all__ = ["PROBLEMS", "Budget", "HeldOut", "MicroRestorer", "degraded", "held_out", "train"]

Size = tuple[int, int]
PROBLEMS = ("denoising", "x2 super-resolution")


@dataclass(frozen=True)
class Budget:
    """How long to train, and how: AdamW, linear warm-up, cosine decay, L1 loss, random crops, turned and
    mirrored."""

    steps: int
    batch_size: int = 8
    crop: int = 48  # pixels a side of what is to be restored
    noise: float = 25 / 255  # standard deviation, of intensities in [0, 1]
    learning_rate: float = 2e-3
    warmup: float = 0.1  # of all steps
    clip_norm: float = 1.0
    test_crops: int = 12  # of each held-out photograph, of twice `crop` a side


class Block(nn.Module):
    """A pre-norm transformer block on (B, N, C) tokens of a map of any size."""

    def __init__(self, dim: int, attention: nn.Module, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, size: Size) -> Tensor:
        x = x + self.attention(self.norm1(x), size)
        return x + self.mlp(self.norm2(x))


class MicroRestorer(nn.Module):
    """Adds a correction to the noisy picture, or to the bicubic enlargement of a small one.

    A token stands for 2 x 2 pixels of the result. The last convolution starts at zero, so that training
    begins with the input itself.

    Args:
        problem: of `PROBLEMS`.
        attention: (dim, num_heads) -> a module called as attention(tokens, size).
        hidden: width of the MLPs.
        dim, num_heads, depth: width, heads and blocks.
    """

    def __init__(
        self,
        problem: str,
        attention: Callable[[int, int], nn.Module],
        hidden: int,
        dim: int = 32,
        num_heads: int = 2,
        depth: int = 3,
    ) -> None:
        super().__init__()
        self.enlarges = problem == PROBLEMS[1]
        self.stem = nn.Conv2d(1 if self.enlarges else 4, dim, 3, padding=1)
        self.blocks = nn.ModuleList(Block(dim, attention(dim, num_heads), hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Conv2d(dim, 4, 3, padding=1)
        # Some attentions bring an initialisation of their own: here all linear layers have torch's.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, 1, H, W), or (B, 1, 2 * H, 2 * W)."""
        x = self.stem(images if self.enlarges else F.pixel_unshuffle(images, 2))
        height, width = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, (height, width))
        x = self.norm(x).transpose(1, 2).unflatten(2, (height, width))
        if self.enlarges:
            images = F.interpolate(images, scale_factor=2, mode="bicubic")
        return images + F.pixel_shuffle(self.head(x), 2)


def degraded(clean: Tensor, problem: str, budget: Budget, generator: torch.Generator) -> Tensor:
    """(B, 1, H, W) pictures -> with Gaussian noise, or half as large (bicubic, antialiased)."""
    if problem == PROBLEMS[0]:
        return clean + budget.noise * torch.randn(clean.shape, generator=generator)
    return F.interpolate(clean, scale_factor=0.5, mode="bicubic", antialias=True)


def _crops(photograph: Tensor, side: int, count: int, generator: torch.Generator) -> Tensor:
    """(count, 1, side, side) at random places."""
    height, width = photograph.shape
    rows = torch.randint(0, height - side + 1, (count,), generator=generator)
    columns = torch.randint(0, width - side + 1, (count,), generator=generator)
    places = zip(rows.tolist(), columns.tolist(), strict=True)
    return torch.stack([photograph[None, y : y + side, x : x + side] for y, x in places])


def train(net: MicroRestorer, problem: str, budget: Budget, seed: int) -> float:
    """Trains `net` in place; returns the mean loss of the last tenth of the steps.

    Args:
        seed: fixes the crops, and the noise on them.
    """
    photographs = [read_photograph(name) for name in TRAIN]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=budget.learning_rate, weight_decay=0.0, fused=True)
    losses = []
    for step in range(budget.steps):
        chosen = torch.randint(0, len(photographs), (budget.batch_size,), generator=generator).tolist()
        clean = torch.cat([_crops(photographs[i], budget.crop, 1, generator) for i in chosen])
        turns, mirrors = torch.randint(0, 4, (2, budget.batch_size), generator=generator).tolist()
        clean = torch.stack(
            [
                (image.flip(2) if mirror % 2 else image).rot90(turn, (1, 2))
                for image, turn, mirror in zip(clean, turns, mirrors, strict=True)
            ]
        )
        loss = F.l1_loss(net(degraded(clean, problem, budget, generator)), clean)
        rate = learning_rate(step, budget.steps, budget.learning_rate, budget.warmup)
        descend(net, loss, optimizer, rate, budget.clip_norm)
        losses.append(float(loss.detach()))
    return statistics.mean(losses[-max(1, budget.steps // 10) :])


@dataclass(frozen=True)
class HeldOut:
    """Crops (n, 1, side, side) of photographs that nothing was trained on, and what is made of them."""

    clean: dict[str, Tensor]
    degraded: dict[str, Tensor]

    def psnr(self, restore: Callable[[Tensor], Tensor], parts: int = 1) -> dict[str, float]:
        """The peak signal-to-noise ratio in decibels, of each photograph over all its crops.

        Args:
            restore: (B, 1, H, W) degraded -> restored pictures.
            parts: cut each crop in so many parts a side, which are restored each by itself.
        """
        found = {}
        for name, clean in self.clean.items():
            out = restore(_parts(self.degraded[name], parts)).clamp(0, 1)
            error = (out - _parts(clean, parts)).double().square().mean()
            found[name] = float(-10 * error.log10())
        return found


def _parts(images: Tensor, parts: int) -> Tensor:
    """(B, 1, H, W) -> (B * parts * parts, 1, H / parts, W / parts)."""
    height, width = images.shape[2] // parts, images.shape[3] // parts
    tiles = images.unflatten(3, (parts, width)).unflatten(2, (parts, height))
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def held_out(problem: str, budget: Budget) -> HeldOut:
    """The same crops, with the same noise, for every network and seed."""
    generator = torch.Generator().manual_seed(0)
    side, count = 2 * budget.crop, budget.test_crops
    clean = {name: _crops(read_photograph(name), side, count, generator) for name in HELD_OUT}
    return HeldOut(
        clean, {name: degraded(images, problem, budget, generator) for name, images in clean.items()}
    )
