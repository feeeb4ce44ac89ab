"""The three attentions the demo compares, and how much each token weighs in another's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatten_ext import FocusedLinearAttention
from flatten_ext.analysis import read_matrices
from flatten_ext.tools.micro.models import AttentionFactory, Size

__all__ = ["VARIANTS", "SoftmaxAttention", "Variant", "influence"]


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention with FocusedLinearAttention's interface and its encoding of the keys.

    Args:
        dim, num_heads: channels and heads.
        size: (H, W) of the map.
    """

    def __init__(self, dim: int, num_heads: int, size: Size) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.positional_encoding = nn.Parameter(torch.zeros(1, size[0] * size[1], dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, N, C) each -> (B, N, C), before the output projection."""
        k = k + self.positional_encoding
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """(B, N, C) -> (B, N, C); `size` must be the one of the constructor."""
        return self.proj(self.attend(*self.qkv(x).chunk(3, -1)))


def _softmax(dim: int, num_heads: int, size: Size, window: Size | None, shift: Size | None) -> nn.Module:
    return SoftmaxAttention(dim, num_heads, size)


def _linear(dim: int, num_heads: int, size: Size, window: Size | None, shift: Size | None) -> nn.Module:
    return FocusedLinearAttention(
        dim, num_heads, focusing_factor=1, kernel_size=None, positional_encoding=size
    )


def _focused(dim: int, num_heads: int, size: Size, window: Size | None, shift: Size | None) -> nn.Module:
    return FocusedLinearAttention(dim, num_heads, positional_encoding=size)


@dataclass(frozen=True)
class Variant:
    """One contestant: how it is called, and how its attention is made."""

    name: str
    label: str
    attention: AttentionFactory


VARIANTS = (
    Variant("softmax", "softmax", _softmax),
    Variant("linear", "ReLU linear", _linear),
    Variant("focused", "focused linear + DWC", _focused),
)


@torch.no_grad()
def influence(layer: SoftmaxAttention | FocusedLinearAttention, x: Tensor, size: Size, query: int) -> Tensor:
    """How strongly each token's value acts on the output of token `query`, for one image.

    All three attentions are linear in v, so unit values, one token at a time, read off the weights that the
    layer really used, the depthwise branch included: for softmax and ReLU linear attention the mean attention
    map of the heads, for focused + DWC that map plus the convolution's footprint.

    Args:
        layer: what to look into.
        x: (1, N, C), what the layer sees.
        size: (H, W) of the map.
        query: index of a token.

    Returns:
        (H, W): the absolute weight, averaged over the channels.
    """
    q, k, _ = layer.qkv(x).chunk(3, -1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layer.attend(q, k, v) if isinstance(layer, SoftmaxAttention) else layer.attend(q, k, v, size)

    return read_matrices(attend, q, k)[:, query].abs().mean(0).unflatten(0, size)
