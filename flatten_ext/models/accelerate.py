"""Serving timm's linear attentions by the operator, with the same parameters and results."""

from __future__ import annotations

from typing import TypeVar

import torch
from timm.models._features_fx import register_notrace_module
from timm.models.efficientvit_mit import LiteMLA
from torch import Tensor, nn

from ..ops import linear_attention

__all__ = ["accelerate"]

_Model = TypeVar("_Model", bound=nn.Module)


class OperatorLiteMLA(LiteMLA):
    """EfficientViT's multi-scale attention on the operator."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        height, width = x.shape[2:]
        qkv = self.qkv(x)
        # Of each scale (B, H * W, heads, 3, dim): queries, keys and values of a head are adjacent.
        scales = [
            part.permute(0, 2, 3, 1).flatten(1, 2).unflatten(-1, (-1, 3, self.dim))
            for part in (qkv, *(branch(qkv) for branch in self.aggreg))
        ]
        q, k, v = (torch.cat([part[..., i, :] for part in scales], 2) for i in range(3))
        heads = q.shape[2]
        q, k = self.kernel_func(q).flatten(2), self.kernel_func(k).flatten(2)
        # timm's eps belongs to sums over the keys, the operator's to means.
        out = linear_attention(q, k, v.flatten(2), heads, eps=self.eps / (height * width))
        return self.proj(out.transpose(1, 2).unflatten(2, (height, width)))


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
