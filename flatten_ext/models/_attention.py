"""Linear attention in the place of timm's attentions, around their own projections.

`Packed` and `Pyramid` come before the class of an attention core among the bases of a module. A core is made
as core(dim, num_heads, grid, **options) and has a method `attend`; see `FocusedAttention` and `_cores`.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .._focused import FocusedAttention, Size

__all__ = [
    "FocusedAttention",
    "Packed",
    "PackedAttention",
    "Pyramid",
    "PyramidAttention",
    "Size",
    "device_and_dtype",
    "to_map",
]


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


class _Projected:
    """What the two kinds of projections share.

    `gate_letter`, of the core, stands in the name of the projection that makes a gate beside the queries, as
    in the published code; a core without a gate has none. `reads_input` is whether its `attend` takes the
    tokens before the projections, as `source`.
    """

    def _take_projection(self: Any, name: str, layer: nn.Linear) -> None:
        """Keeps `layer`, or widens it by the rows of a gate, with the published initialisation."""
        if self.gate_letter:
            narrow, name = layer, name + self.gate_letter
            rows, dim = narrow.weight.shape
            bias = narrow.bias is not None
            layer = nn.Linear(dim, rows + dim, bias=bias, **device_and_dtype(narrow))
            with torch.no_grad():
                layer.weight[:rows] = narrow.weight
                trunc_normal_(layer.weight[rows:], std=0.02)
                if bias:
                    layer.bias[:rows] = narrow.bias
                    layer.bias[rows:] = 0
        self.projection_name = name
        setattr(self, name, layer)

    @torch.no_grad()
    def open_gate(self: Any) -> None:
        """Makes the gate 1 everywhere, where a model that was trained without one gets it."""
        if self.gate_letter and getattr(self, self.projection_name).bias is not None:
            layer = getattr(self, self.projection_name)
            layer.weight[-self.dim :] = 0
            layer.bias[-self.dim :] = 1

    def _project(self: Any, x: Tensor, count: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The `count` parts of the projection of `x` before the gate, and what else the core is given."""
        count += len(self.gate_letter)
        packed = getattr(self, self.projection_name)(x).unflatten(-1, (count, self.dim)).unbind(-2)
        parts = [packed[i] for i in range(count)]  # torch.fx does not iterate
        more = {"gate": parts.pop()} if self.gate_letter else {}
        return parts, (more | {"source": x} if self.reads_input else more)


class Packed(_Projected):
    """Takes the place of `softmax`, keeping its packed `qkv` and its `proj`."""

    def __init__(self: Any, softmax: Any, grid: Size, **core: Any):
        dim = softmax.qkv.in_features
        super().__init__(dim, softmax.num_heads, grid, **core, **device_and_dtype(softmax))  # type: ignore[call-arg]
        if softmax.qkv.out_features != 3 * dim:
            raise ValueError(
                f"focused attention needs num_heads * head_dim == dim: qkv projects {dim} channels to "
                f"{softmax.qkv.out_features}, not {3 * dim}"
            )
        self._take_projection("qkv", softmax.qkv)
        self.proj, self.proj_drop = softmax.proj, softmax.proj_drop

    def forward(
        self: Any, x: Tensor, size: Size, window: Size | None = None, shift: Size | None = None
    ) -> Any:
        """(B, N, C) tokens in raster order, prefix tokens first -> (B, N, C)."""
        (q, k, v), more = self._project(x, 3)
        return self.proj_drop(self.proj(self.attend(q, k, v, size, window, shift, **more)))


class Pyramid(_Projected):
    """Takes the place of a PVT `softmax`, keeping its projections and reduction.

    Keys and values come from the map reduced by `sr` (sr_ratio > 1), from its 7 x 7 pooling (PVTv2 linear),
    or from the map itself.

    Args:
        softmax: a `timm.models.pvt_v2.Attention`.
        size: the map the attention is built for.
    """

    def __init__(self: Any, softmax: Any, size: Size, **core: Any):
        pool, sr = softmax.pool, softmax.sr
        ratio = 1 if sr is None else sr.stride[0]
        grid = (7, 7) if pool is not None else (size[0] // ratio, size[1] // ratio)
        super().__init__(softmax.dim, softmax.num_heads, grid, **core, **device_and_dtype(softmax))  # type: ignore[call-arg]
        self._take_projection("q", softmax.q)
        self.kv, self.proj, self.proj_drop = softmax.kv, softmax.proj, softmax.proj_drop
        self.pool, self.sr, self.norm, self.act = pool, sr, softmax.norm, softmax.act
        self.sr_ratio = ratio  # a number: whoever wraps `sr` need not have its stride

    def position_grids(self: Any, size: tuple[int, int]) -> dict[str, list[tuple[int, int]]]:
        keys = (7, 7) if self.pool is not None else (size[0] // self.sr_ratio, size[1] // self.sr_ratio)
        return {self.positions_name: [keys]}

    def set_feat_size(self: Any, feat_size: Size) -> None:
        """Resamples the positional encoding for another map; that of pooled keys stays 7 x 7."""
        self.set_grid(self.position_grids((feat_size[0], feat_size[1]))[self.positions_name][0])

    def forward(self: Any, x: Tensor, feat_size: Size) -> Any:
        """(B, H * W, C) tokens of the map `feat_size` -> (B, H * W, C)."""
        ((q,), more), key_size, keys = self._project(x, 1), None, x
        if self.sr is not None:
            image = to_map(x, feat_size)
            image = self.sr(image if self.pool is None else self.pool(image))
            key_size = image.shape[2:]
            keys = self.norm(image.flatten(2).transpose(1, 2))
            keys = keys if self.act is None else self.act(keys)
        k, v = self.kv(keys).unflatten(-1, (2, self.dim)).unbind(-2)
        return self.proj_drop(self.proj(self.attend(q, k, v, feat_size, key_size=key_size, **more)))


class PackedAttention(Packed, FocusedAttention):
    """Focused attention that takes the place of `softmax`, keeping its packed `qkv` and its `proj`."""


class PyramidAttention(Pyramid, FocusedAttention):
    """Focused attention that takes the place of a PVT `softmax`, keeping its projections and reduction."""
