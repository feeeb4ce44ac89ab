"""The calls that the CUDA benchmarks count, predict and time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flatten_ext import reference

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}

# Streams of B * N * C elements that no implementation avoids: q, k, v, out; and q, k, v, g, dq, dk, dv.
COMPULSORY = {"forward": 4, "backward": 7}


@dataclass(frozen=True)
class Shape:
    """One call of the operator: `batch` images of a map, in `heads` heads."""

    name: str
    batch: int
    height: int
    width: int
    channels: int
    heads: int
    window: tuple[int, int] | None = None
    prefix: int = 0
    dtype: str = "bfloat16"

    @property
    def tokens(self) -> int:
        return self.prefix + self.height * self.width

    @property
    def head_dim(self) -> int:
        return self.channels // self.heads

    @property
    def windows(self) -> int:
        """Windows of the whole batch."""
        if self.window is None:
            return self.batch
        return self.batch * (self.height // self.window[0]) * (self.width // self.window[1])

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def compulsory_bytes(self, direction: str) -> int:
        return COMPULSORY[direction] * self.batch * self.tokens * self.channels * self.element_bytes


# What cuda_counters.py counts: every kernel family of the models' calls, in batches that fill a GPU.
COUNTED = [
    Shape("56x56 C=96 h=3", 16, 56, 56, 96, 3),
    Shape("28x28 C=192 h=6", 64, 28, 28, 192, 6),
    Shape("28x28 C=128 h=2", 64, 28, 28, 128, 2),
    Shape("14x14 C=192 h=3", 64, 14, 14, 192, 3),
    Shape("7x7 windows, 14x14 C=384 h=12", 16, 14, 14, 384, 12, (7, 7)),
    Shape("7x7 windows, 28x28 C=96 h=3", 16, 28, 28, 96, 3, (7, 7)),
]

# The calls of the published models whose time on a GPU is predicted, and timed where there is one.
MODEL_CALLS = [
    Shape("56x56 C=96 h=3", 128, 56, 56, 96, 3),
    Shape("28x28 C=192 h=6", 128, 28, 28, 192, 6),
    Shape("14x14 C=192 h=3", 128, 14, 14, 192, 3),
    Shape("7x7 windows, 14x14 C=384 h=12", 128, 14, 14, 384, 12, (7, 7)),
    Shape("PVT 1: 56x56 C=64 h=1", 32, 56, 56, 64, 1),
    Shape("PVT 2: 28x28 C=128 h=2", 32, 28, 28, 128, 2),
    Shape("PVT 3: 14x14 C=320 h=5", 128, 14, 14, 320, 5),
    Shape("PVT 4: 7x7 C=512 h=8", 128, 7, 7, 512, 8),
    Shape("DeiT-T: 197 tokens C=192 h=3", 128, 14, 14, 192, 3, prefix=1),
    Shape("56x56 C=96 h=3 float32", 32, 56, 56, 96, 3, dtype="float32"),
    Shape("56x56 C=96 h=3, one image", 1, 56, 56, 96, 3),
]


def random_tokens(shape: Shape, device: str) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    size = (shape.batch, shape.tokens, shape.channels)
    dtype = getattr(torch, shape.dtype)
    return [torch.randn(size, device=device, dtype=dtype) for _ in range(4)]


def random_parameters(shape: Shape, device: str) -> list[Tensor]:
    """scale, key_bias, taps and their bias, in float32 as under autocast."""
    window = shape.window
    keys = shape.tokens if window is None else window[0] * window[1]
    return [
        torch.rand(shape.channels, device=device) + 0.5,
        torch.randn(keys, shape.channels, device=device) * 0.02,
        torch.randn(shape.head_dim, 1, 5, 5, device=device) * 0.2,
        torch.randn(shape.head_dim, device=device),
    ]


def positional(shape: Shape, qkv: Sequence[Tensor], parameters: Sequence[Tensor]) -> list:
    """The operator's arguments in order."""
    return [*qkv, shape.heads, *parameters, (shape.height, shape.width), shape.window, None, 3.0, 1e-6]


def verify(shape: Shape, tokens: Sequence[Tensor], parameters: Sequence[Tensor]) -> float:
    """The worst error of the first image's output and gradients against float64 on the CPU.

    Raises:
        ArithmeticError: it is beyond the bound.
    """

    def run(function, cast) -> list[Tensor]:
        *qkv, grad_out = (cast(t[:1]) for t in tokens)
        inputs = [cast(t).detach().requires_grad_() for t in (*qkv, *parameters)]
        out = function(*positional(shape, inputs[:3], inputs[3:]))
        return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]

    got = run(torch.ops.flatten.attention, lambda t: t)
    want = run(reference.attention, lambda t: t.cpu().double())
    errors = [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
    if not max(errors) < TOLERANCE[tokens[0].dtype]:
        raise ArithmeticError(f"{shape.name}: relative errors {errors} against float64")
    return max(errors)
