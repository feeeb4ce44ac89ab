"""Micro vision transformers in which only the attention varies: one like DeiT, one like Swin."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["AttentionFactory", "Block", "MicroSwin", "MicroViT"]

# (dim, num_heads, size, window, shift) -> a module called as attention(x: (B, N, C), size=(H, W))
Size = tuple[int, int]
AttentionFactory = Callable[[int, int, Size, "Size | None", "Size | None"], nn.Module]


class Block(nn.Module):
    """A pre-norm transformer block on (B, N, C) tokens."""

    def __init__(self, dim: int, attention: nn.Module, size: Size, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.size = size
        self.norm1 = nn.LayerNorm(dim)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), size=self.size)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """(B, 1, H, W) images -> (B, N, dim) tokens, plus a learned position."""

    def __init__(self, image_size: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.size = (image_size // patch_size, image_size // patch_size)
        self.proj = nn.Conv2d(1, dim, patch_size, stride=patch_size)
        # 0.02, the usual deviation, leaves softmax attention blind to position for most of so short a run.
        self.position = nn.Parameter(torch.randn(1, self.size[0] * self.size[1], dim) * 0.2)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2) + self.position


class MicroViT(nn.Module):
    """A DeiT in small: one resolution, global attention, the mean of the tokens classified.

    Args:
        attention: makes the attention of each block; everything else is the same for every variant.
        image_size, patch_size: pixels; the map has (image_size / patch_size)^2 tokens.
        dim, num_heads, depth: width, heads and blocks.
        num_classes: of the classifier.
    """

    def __init__(
        self,
        attention: AttentionFactory,
        image_size: int = 28,
        patch_size: int = 4,
        dim: int = 48,
        num_heads: int = 3,
        depth: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(image_size, patch_size, dim)
        size = self.patch_embed.size
        self.blocks = nn.Sequential(
            *(Block(dim, attention(dim, num_heads, size, None, None), size) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patch_embed(images))).mean(1))


class PatchMerging(nn.Module):
    """Four neighbouring tokens become one of twice the width."""

    def __init__(self, dim: int, size: Size) -> None:
        super().__init__()
        self.size = size
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (self.size[0] // 2, 2, self.size[1] // 2, 2))
        x = x.transpose(2, 3).flatten(3).flatten(1, 2)
        return self.reduction(self.norm(x))


class MicroSwin(nn.Module):
    """A Swin in small: two stages, windows that shift in every second block of the first.

    The second stage's map is a single window. Arguments as MicroViT's; `dim` and `num_heads` are the first
    stage's and double in the second. Larger images are cropped to the central `image_size` pixels (MNIST's
    outer 4 are empty), which 3-pixel patches cut into a map of 8 x 8.
    """

    def __init__(
        self,
        attention: AttentionFactory,
        image_size: int = 24,
        patch_size: int = 3,
        dim: int = 32,
        num_heads: int = 2,
        num_classes: int = 10,
        window: int = 4,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_embed = PatchEmbed(image_size, patch_size, dim)
        size = self.patch_embed.size
        square, shift = (window, window), (window // 2, window // 2)
        layers: list[nn.Module] = [
            Block(dim, attention(dim, num_heads, size, square, None), size),
            Block(dim, attention(dim, num_heads, size, square, shift), size),
            PatchMerging(dim, size),
        ]
        size, dim, num_heads = (size[0] // 2, size[1] // 2), 2 * dim, 2 * num_heads
        layers += [Block(dim, attention(dim, num_heads, size, None, None), size) for _ in range(2)]
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        border = (images.shape[-1] - self.image_size) // 2
        images = images[..., border : border + self.image_size, border : border + self.image_size]
        return self.head(self.norm(self.blocks(self.patch_embed(images))).mean(1))
