"""Focused linear attention in the place of timm's attentions, around their own projections."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._focused import FocusedAttention, Size

__all__ = ["FocusedAttention", "PackedAttention", "PyramidAttention", "Size", "device_and_dtype", "to_map"]


def device_and_dtype(module: nn.Module) -> dict[str, Any]:
    """The `device=` and `dtype=` that `module` was built with."""
    parameter = next(module.parameters())
    return {"device": parameter.device, "dtype": parameter.dtype}


def to_map(tokens: Tensor, size: Size) -> Tensor:
    """(B, H * W, C) tokens -> their map (B, C, H, W), channels_last, without a copy.

    The tokens are viewed as (B, H, W, C) first. Split after a transposition, the batch axis of a single image
    gets a stride by which convolutions take the map for a contiguous one: they copy it, and are slower.
    """
    return tokens.unflatten(1, (size[0], size[1])).permute(0, 3, 1, 2)


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
        self.sr_ratio = ratio  # a number: whoever wraps `sr` need not have its stride

    def position_grids(self, size: tuple[int, int]) -> dict[str, list[tuple[int, int]]]:
        keys = (7, 7) if self.pool is not None else (size[0] // self.sr_ratio, size[1] // self.sr_ratio)
        return {self.positions_name: [keys]}

    def set_feat_size(self, feat_size: Size) -> None:
        """Resamples the positional encoding for another map; that of pooled keys stays 7 x 7."""
        self.set_grid(self.position_grids((feat_size[0], feat_size[1]))[self.positions_name][0])

    def forward(self, x: Tensor, feat_size: Size) -> Tensor:
        """(B, H * W, C) tokens of the map `feat_size` -> (B, H * W, C)."""
        q, key_size, keys = self.q(x), None, x
        if self.sr is not None:
            image = to_map(x, feat_size)
            image = self.sr(image if self.pool is None else self.pool(image))
            key_size = image.shape[2:]
            keys = self.norm(image.flatten(2).transpose(1, 2))
            keys = keys if self.act is None else self.act(keys)
        k, v = self.kv(keys).unflatten(-1, (2, self.dim)).unbind(-2)
        return self.proj_drop(self.proj(self.attend(q, k, v, feat_size, key_size=key_size)))
