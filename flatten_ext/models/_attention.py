"""Focused linear attention as a part of the five families: one implementation, around one operator.

Parameters are named as in the public code, so its checkpoints load by their own names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import resize_positional_encoding
from ..ops import attention, depthwise_conv

Size = Sequence[int]  # height, width

__all__ = ["FocusedAttention", "PackedAttention", "PyramidAttention", "device_and_dtype"]


def device_and_dtype(module: nn.Module) -> dict[str, Any]:
    """The `device=` and `dtype=` that `module` was built with."""
    parameter = next(module.parameters())
    return {"device": parameter.device, "dtype": parameter.dtype}


def _sum_of_kernels(first: Tensor, second: Tensor) -> Tensor:
    """Depthwise kernels of odd sizes, added around their centres."""
    if first.shape[-1] > second.shape[-1]:
        first, second = second, first
    return F.pad(first, ((second.shape[-1] - first.shape[-1]) // 2,) * 4) + second


class FocusedAttention(nn.Module):
    """The attention between the projections, with the parameters that it adds to a softmax attention.

    Args:
        dim: channels C.
        num_heads: heads; C must be a multiple.
        grid: height and width of the map of keys (of one window, with windows), for which
            `positional_encoding` (1, num_prefix_tokens + height * width, C) is learned; other maps get it
            resampled.
        num_prefix_tokens: leading tokens that lie outside the map (class token, registers).
        focusing_factor: p of phi_p, at least 1.
        kernel_size: odd size of the depthwise kernel that the heads share.
        lepe: adds CSWin's locally enhanced positional encoding, a 3x3 depthwise kernel for each channel.
            Both kernels are linear in v, so the operator is given their sum.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Size,
        *,
        num_prefix_tokens: int = 0,
        focusing_factor: float = 3.0,
        kernel_size: int = 5,
        lepe: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim ({dim}) is not a multiple of num_heads ({num_heads})")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.num_prefix_tokens = dim, num_heads, num_prefix_tokens
        self.focusing_factor = focusing_factor
        self.grid = (grid[0], grid[1])
        tokens = num_prefix_tokens + grid[0] * grid[1]
        self.scale = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.positional_encoding = nn.Parameter(torch.empty(1, tokens, dim, **dd))
        self.get_v: Any = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if lepe else None
        head_dim = dim // num_heads
        self.dwc: Any = nn.Conv2d(
            head_dim, head_dim, kernel_size, padding=kernel_size // 2, groups=head_dim, **dd
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initialisation of the parameters that lie in no layer: zero."""
        nn.init.zeros_(self.scale)
        nn.init.zeros_(self.positional_encoding)

    def set_grid(self, grid: Size) -> None:
        """Resamples the learned positional encoding to another map of keys."""
        encoding = self.encoding(grid).detach()
        self.positional_encoding = nn.Parameter(encoding, self.positional_encoding.requires_grad)
        self.grid = (grid[0], grid[1])

    def encoding(self, grid: Size) -> Tensor:
        """The positional encoding (1, prefix + H * W, C) on the map `grid`."""
        return resize_positional_encoding(self.positional_encoding, self.grid, grid, self.num_prefix_tokens)

    def kernel(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the depthwise branch: the heads' shared ones, or with LePE one per channel."""
        if self.get_v is None:
            return self.dwc.weight, self.dwc.bias
        weight = _sum_of_kernels(self.get_v.weight, self.dwc.weight.repeat(self.num_heads, 1, 1, 1))
        return weight, self.get_v.bias + self.dwc.bias.repeat(self.num_heads)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        size: Size,
        window: Size | None = None,
        shift: Size | None = None,
        key_size: Size | None = None,
    ) -> Tensor:
        """(B, N, C) queries, (B, M, C) keys and values -> (B, N, C).

        Args:
            size: the map the queries tile, after the prefix tokens.
            window: attend inside windows of this size; None is the whole map.
            shift: cyclic shift of the windows.
            key_size: the map the keys tile, where it is not `size`. The depthwise branch then convolves v
                resampled linearly along the flattened tokens, as PVT's public code does.
        """
        key_grid = key_size if key_size is not None else window if window is not None else size
        focus: dict[str, Any] = {
            "scale": F.softplus(self.scale).flatten(),
            "key_bias": self.encoding(key_grid)[0],
            "focusing_factor": self.focusing_factor,
        }
        weight, bias = self.kernel()
        if key_size is None:
            focus |= {"size": list(size), "window": window, "shift": shift}
            return attention(q, k, v, self.num_heads, dwc_weight=weight, dwc_bias=bias, **focus)
        out = attention(q, k, v, self.num_heads, **focus)
        v = F.interpolate(v.transpose(1, 2), q.shape[1], mode="linear").transpose(1, 2)
        return out + depthwise_conv(v, weight, bias, list(size))


class PackedAttention(FocusedAttention):
    """Focused attention that takes the place of `softmax`, keeping its packed `qkv` and its `proj`."""

    def __init__(self, softmax: Any, grid: Size, **focus: Any):
        dim = softmax.qkv.in_features
        super().__init__(dim, softmax.num_heads, grid, **focus, **device_and_dtype(softmax))
        if softmax.qkv.out_features != 3 * dim:
            raise ValueError(
                f"focused attention needs num_heads * head_dim == dim: qkv projects {dim} channels to "
                f"{softmax.qkv.out_features}, not {3 * dim}"
            )
        self.qkv, self.proj, self.proj_drop = softmax.qkv, softmax.proj, softmax.proj_drop

    def forward(self, x: Tensor, size: Size, window: Size | None = None, shift: Size | None = None) -> Tensor:
        """(B, N, C) tokens in raster order, prefix tokens first -> (B, N, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.dim)).unbind(-2)
        return self.proj_drop(self.proj(self.attend(q, k, v, size, window, shift)))


class PyramidAttention(FocusedAttention):
    """Focused attention that takes the place of a PVT `softmax`, keeping its projections and reduction.

    Keys and values come from the map reduced by `sr` (sr_ratio > 1), from its 7 x 7 pooling (PVTv2 linear),
    or from the map itself.

    Args:
        softmax: a `timm.models.pvt_v2.Attention`.
        size: the map the attention is built for.
    """

    def __init__(self, softmax: Any, size: Size, **focus: Any):
        pool, sr = softmax.pool, softmax.sr
        ratio = 1 if sr is None else sr.stride[0]
        grid = (7, 7) if pool is not None else (size[0] // ratio, size[1] // ratio)
        super().__init__(softmax.dim, softmax.num_heads, grid, **focus, **device_and_dtype(softmax))
        self.q, self.kv, self.proj, self.proj_drop = softmax.q, softmax.kv, softmax.proj, softmax.proj_drop
        self.pool, self.sr, self.norm, self.act = pool, sr, softmax.norm, softmax.act

    def set_feat_size(self, feat_size: Size) -> None:
        """Resamples the positional encoding for another map; that of pooled keys stays 7 x 7."""
        if self.pool is None:
            ratio = 1 if self.sr is None else self.sr.stride[0]
            self.set_grid((feat_size[0] // ratio, feat_size[1] // ratio))

    def forward(self, x: Tensor, feat_size: Size) -> Tensor:
        """(B, H * W, C) tokens of the map `feat_size` -> (B, H * W, C)."""
        q, key_size, keys = self.q(x), None, x
        if self.sr is not None:
            image = x.transpose(1, 2).unflatten(2, (feat_size[0], feat_size[1]))
            image = self.sr(image if self.pool is None else self.pool(image))
            key_size = image.shape[2:]
            keys = self.norm(image.flatten(2).transpose(1, 2))
            keys = keys if self.act is None else self.act(keys)
        k, v = self.kv(keys).unflatten(-1, (2, self.dim)).unbind(-2)
        return self.proj_drop(self.proj(self.attend(q, k, v, feat_size, key_size=key_size)))
