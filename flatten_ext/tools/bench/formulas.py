"""Focused linear attention as one writes it in eager torch, and the inputs that all contenders share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flatten_ext.tools.bench.shapes import Shape

__all__ = ["Inputs", "eager_attention", "eager_formula", "make_inputs"]


@dataclass(frozen=True)
class Inputs:
    """q, k, v after their projection, (B, N, C), the attention's parameters, and a gradient to send back."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: Tensor  # (C,)
    key_bias: Tensor  # (N, C)
    dwc_weight: Tensor  # (D, 1, k, k)
    dwc_bias: Tensor  # (D,)
    grad_out: Tensor

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a training step differentiates by."""
        return (*self.qkv, self.scale, self.key_bias, self.dwc_weight, self.dwc_bias)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype, as new leaves."""
        cast = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in (*self.tensors, self.grad_out)]
        return Inputs(*cast)


def make_inputs(shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """Float32 inputs of a shape: unit normals, and parameters as they are after some training."""
    generator = torch.Generator().manual_seed(seed)
    d, k = shape.head_dim, shape.kernel_size

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    tokens = (shape.batch, shape.tokens, shape.channels)
    leaves = [
        normal(*tokens),
        normal(*tokens),
        normal(*tokens),
        F.softplus(normal(shape.channels)),
        0.1 * normal(shape.tokens, shape.channels),
        normal(d, 1, k, k) / k,
        0.1 * normal(d),
    ]
    tensors = [t.to(device).requires_grad_() for t in leaves]
    tensors.append(normal(*tokens).to(device))
    return Inputs(*tensors)


def eager_formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    scale: Tensor,
    key_bias: Tensor | None,
    focusing_factor: float = 3.0,
    eps: float = 1e-6,
) -> Tensor:
    """The attention of the public code (its paper's equations 4-6) as eager model code runs it, without DWC.

    Equal to `flatten_ext.reference.attention` on ordinary inputs. That one guards every row against overflow
    and is slower; timing against it would flatter the kernels.
    """
    batch, keys, channels = k.shape
    if key_bias is not None:
        k = k + key_bias
    q = (F.relu(q) + eps) / scale
    k = (F.relu(k) + eps) / scale
    q_norm = q.norm(dim=-1, keepdim=True)
    k_norm = k.norm(dim=-1, keepdim=True)
    q, k = q**focusing_factor, k**focusing_factor
    q = q / q.norm(dim=-1, keepdim=True) * q_norm
    k = k / k.norm(dim=-1, keepdim=True) * k_norm
    q, k, v = (x.reshape(batch, -1, num_heads, channels // num_heads).transpose(1, 2) for x in (q, k, v))
    z = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + eps)
    root = 1 / math.sqrt(keys)
    kv = (k.transpose(-2, -1) * root) @ (v * root)
    return (q @ kv * z).transpose(1, 2).reshape(batch, -1, channels)


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    scale: Tensor,
    key_bias: Tensor | None,
    dwc_weight: Tensor,
    dwc_bias: Tensor,
    size: tuple[int, int],
    focusing_factor: float = 3.0,
    eps: float = 1e-6,
) -> Tensor:
    """`eager_formula` and the depthwise branch, as in the published modules: the baseline."""
    batch, tokens, channels = q.shape
    head_dim = channels // num_heads
    out = eager_formula(q, k, v, num_heads, scale, key_bias, focusing_factor, eps)
    # The heads' maps as one batch of (head_dim, H, W), as in the published modules.
    maps = v.reshape(batch, tokens, num_heads, head_dim).permute(0, 2, 3, 1).reshape(-1, head_dim, *size)
    local = F.conv2d(maps, dwc_weight, dwc_bias, padding=dwc_weight.shape[-1] // 2, groups=head_dim)
    return out + local.reshape(batch, channels, tokens).transpose(1, 2)
