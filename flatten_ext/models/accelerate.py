"""Serving timm's linear attentions by the operator, with the same parameters and results."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from timm.models._features_fx import register_notrace_module
from timm.models.efficientvit_mit import LiteMLA
from torch import Tensor, nn

from .._layers import is_plain, is_plain_conv
from ..ops import depthwise_conv, linear_attention

__all__ = ["accelerate"]

_Model = TypeVar("_Model", bound=nn.Module)


class OperatorLiteMLA(LiteMLA):
    """EfficientViT's multi-scale attention on the operators.

    Queries, keys and values of a head lie side by side in timm's channels. Here the weights are put in the
    order queries, keys, values for each call, and all is computed on tokens: nothing of the size of the map
    but the heads' results is rearranged. Layers that are more than their weights are called.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        height, width = x.shape[2:]
        if self._is_plain(x.device):
            outs = self._on_tokens(x.flatten(2).transpose(1, 2), (height, width))
        else:
            qkv = self.qkv(x)
            # Of each scale (B, H * W, heads, 3, dim).
            scales = [
                part.permute(0, 2, 3, 1).flatten(1, 2).unflatten(-1, (-1, 3, self.dim))
                for part in (qkv, *(branch(qkv) for branch in self.aggreg))
            ]
            outs = [self._attend(*(part[..., i, :].flatten(2) for i in range(3))) for part in scales]
        # Contiguous, as timm's: in another layout the blocks that follow are slower.
        return self.proj(torch.cat(outs, 2).mT.contiguous().unflatten(2, (height, width)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int | None = None) -> Tensor:
        heads = q.shape[2] // self.dim if heads is None else heads
        q, k = self.kernel_func(q), self.kernel_func(k)
        # timm's eps belongs to sums over the keys, the operator's to means.
        return linear_attention(q, k, v, heads, eps=self.eps / q.shape[1])

    def _is_plain(self, device: torch.device) -> bool:
        conv = self.qkv.conv
        if not is_plain_pointwise(conv, 1, device) or is_called(self.qkv):
            return False
        if not all(isinstance(layer, nn.Identity) for layer in (self.qkv.norm, self.qkv.act)):
            return False
        groups = conv.out_channels // self.dim
        return all(
            not is_called(branch)
            and is_plain_conv(branch[0], conv.out_channels, device)
            and is_plain_pointwise(branch[1], groups, device)
            for branch in self.aggreg
        )

    def _by_kind(self, weight: Tensor) -> Tensor:
        """Rows (heads, 3, dim) of a weight or bias -> (3, heads, dim)."""
        return weight.unflatten(0, (-1, 3, self.dim)).transpose(0, 1).flatten(0, 2)

    def _on_tokens(self, x: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """(B, H * W, C) -> for each scale (B, H * W, heads * dim)."""
        batch, tokens, _ = x.shape
        conv = self.qkv.conv
        bias = None if conv.bias is None else self._by_kind(conv.bias)
        qkv = F.linear(x, self._by_kind(conv.weight).flatten(1), bias)
        q, k, v = qkv.chunk(3, -1)
        outs = [self._attend(q, k, v)]
        for depthwise, pointwise in self.aggreg:
            bias = None if depthwise.bias is None else self._by_kind(depthwise.bias)
            local = depthwise_conv(qkv, self._by_kind(depthwise.weight), bias, size)
            # One product for each head's queries, keys and values; heads join the batch.
            local = local.unflatten(-1, (-1, self.dim)).flatten(0, 1).transpose(0, 1)
            weight = self._by_kind(pointwise.weight).flatten(1).unflatten(0, (-1, self.dim))
            parts = local @ weight.mT
            if pointwise.bias is not None:
                parts = parts + self._by_kind(pointwise.bias).unflatten(0, (-1, 1, self.dim))
            q, k, v = parts.unflatten(1, (batch, tokens)).unflatten(0, (3, -1)).flatten(1, 2).unbind(0)
            out = self._attend(q, k, v, 1).unflatten(0, (-1, batch))
            outs.append(out.permute(1, 2, 0, 3).flatten(2))
        return outs


def is_called(module: nn.Module) -> bool:
    """Whether something hangs on the call of a container."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_plain_pointwise(layer: nn.Module, groups: int, device: torch.device) -> bool:
    """Whether `layer` is a plain 1 x 1 convolution of so many groups."""
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == layer.stride == (1, 1)
        and layer.padding == (0, 0)
        and layer.groups == groups
        and is_plain(layer, device)
    )


register_notrace_module(OperatorLiteMLA)


def accelerate(model: _Model) -> _Model:
    """Lets the operator compute the linear attentions of a timm EfficientViT (B and L series), in place.

    Parameters, state_dict and results stay what they are, up to rounding; training works as before.

    Args:
        model: has modules `timm.models.efficientvit_mit.LiteMLA`, such as `efficientvit_b1.r224_in1k`.

    Returns:
        `model`.

    Raises:
        ValueError: it has none.

    Example:
        >>> import timm
        >>> import flatten_ext
        >>> model = flatten_ext.accelerate(timm.create_model("efficientvit_b0"))
    """
    found = [module for module in model.modules() if type(module) is LiteMLA]
    if not found and not any(isinstance(module, OperatorLiteMLA) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no attention to accelerate, expected timm's LiteMLA of EfficientViT"
        )
    for module in found:
        module.__class__ = OperatorLiteMLA
    return model
