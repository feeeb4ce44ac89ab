"""FLatten-PVT: Pyramid Vision Transformer with focused linear attention (ICCV 2023, table 1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, Mlp, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models.pvt_v2 import Attention
from torch import Tensor, nn

from .._grids import KeepsGrid
from ..nn import resize_positional_encoding
from ._attention import Size
from ._build import build
from ._checkpoint import unwrap
from ._choice import choose
from ._positions import Grid, metadata_of, resample_positions
from ._pyramid import Pyramid, PyramidStage, stage_sizes
from ._timm import attention_types, check_attention_dropout, default_cfg

torch.fx.wrap("resize_positional_encoding")  # which looks into sizes

__all__ = ["FlattenPyramidTransformer"]


class PatchEmbed(nn.Module):
    """Patches without overlap; a map that they do not divide is padded at its end."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, **dd: Any):
        super().__init__()
        self.patch_size = patch_size  # a number: whoever wraps `proj` need not have its kernel size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, ceil(H / patch), ceil(W / patch), dim)."""
        x = F.pad(x, (0, -x.shape[3] % self.patch_size, 0, -x.shape[2] % self.patch_size))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Block(nn.Module):
    """Pre-norm transformer block whose attention is told the map its tokens tile."""

    def __init__(
        self,
        attn: nn.Module,
        dim: int,
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        norm_layer: Any,
        **dd: Any,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, feat_size: Size) -> Tensor:
        """(B, H * W, C) -> (B, H * W, C)."""
        x = x + self.drop_path1(self.attn(self.norm1(x), feat_size))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stage(KeepsGrid, PyramidStage):
    """A stage of PVT, with an absolute position embedding (1, H * W, C) learned on the map `grid`.

    `resampling` is how other maps get it.
    """

    positions_name = "pos_embed"

    def __init__(
        self,
        embed: nn.Module | None,
        blocks: list[nn.Module],
        grid: Size,
        dim: int,
        drop: float,
        resampling: str = "bicubic",
        **dd: Any,
    ):
        super().__init__(embed, blocks)
        self.grid, self.resampling = tuple(grid), resampling
        self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim, **dd))
        self.pos_drop = nn.Dropout(drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initialisation of the embedding: truncated normal of 0.02."""
        trunc_normal_(self.pos_embed, std=0.02)

    def positions_grid(self) -> Size:
        return self.grid

    def position_grids(self, size: Grid) -> dict[str, list[Grid]]:
        """The map for which the embedding is learned where the tokens tile `size`."""
        return {self.positions_name: [size]}

    def _positions(self, size: Size) -> Tensor:
        return resize_positional_encoding(self.pos_embed, self.grid, size, mode=self.resampling)

    def set_feat_size(self, feat_size: Size) -> None:
        """Resamples the embedding for another map."""
        self.pos_embed = nn.Parameter(self._positions(feat_size).detach(), self.pos_embed.requires_grad)
        self.grid = tuple(feat_size)

    def add_positions(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        return self.pos_drop(x + self._positions(size).unflatten(1, size))


class FlattenPyramidTransformer(Pyramid):
    """PVT without class token whose stages of type "L" attend by focused, or another, linear attention.

    FLatten's public model owns a last LayerNorm that its forward never applies; its checkpoints have it, and
    loading drops it. So there are 2 * embed_dims[-1] parameters less than in the public model, all trained.

    Args:
        img_size: the input for which position embeddings are learned; any other resamples them.
        attn_type: "L" (linear) or "S" (softmax) for each stage.
        attention: the linear attention: "flatten", "inline", "pola", "mila", "rala" or "mala".
        resampling: how other sizes get the position embeddings, "bicubic" or "bilinear".
        unused_norm: own the LayerNorm of public models that no forward applies, so that every entry of their
            checkpoints has its place. It is not trained.
        sr_ratios: spatial reduction of keys and values in stages of type "S".
        la_sr_ratios: the same in stages of type "L"; the published models reduce nothing.
        focusing_factor: p of phi_p.
        kernel_size: odd size of the depthwise kernel.
        alpha: of the attention "pola": its powers lie between 1 and 1 + alpha.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 2, 2),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        qkv_bias: bool = True,
        attn_type: str = "LLLL",
        attention: str = "flatten",
        resampling: str = "bicubic",
        unused_norm: bool = False,
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        la_sr_ratios: Sequence[int] = (1, 1, 1, 1),
        focusing_factor: float = 3.0,
        kernel_size: int = 5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        alpha: float = 4.0,
        norm_layer: Any = LayerNorm,  # eps 1e-6
        device: Any = None,
        dtype: Any = None,
    ):
        nn.Module.__init__(self)
        dd = {"device": device, "dtype": dtype}
        types = attention_types(attn_type, len(depths))
        check_attention_dropout(types, attn_drop_rate)
        self.img_size, self.in_chans = to_2tuple(img_size), in_chans
        sizes = stage_sizes(img_size)
        options = {"focusing_factor": focusing_factor, "kernel_size": kernel_size, "alpha": alpha}
        linear = choose(attention, "pyramid", **options)

        def attend(i: int) -> nn.Module:
            softmax = Attention(
                embed_dims[i],
                num_heads[i],
                sr_ratio=(la_sr_ratios if types[i] == "L" else sr_ratios)[i],
                qkv_bias=qkv_bias,
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
                **dd,
            )
            return linear(softmax, sizes[i]) if types[i] == "L" else softmax

        def stage(i: int, rates: list[float]) -> nn.Module:
            dim = embed_dims[i]
            embed = PatchEmbed(embed_dims[i - 1], dim, 2, **dd) if i else None
            blocks: list[nn.Module] = [
                Block(attend(i), dim, mlp_ratios[i], proj_drop_rate, rate, norm_layer, **dd) for rate in rates
            ]
            return Stage(embed, blocks, sizes[i], dim, drop_rate, resampling, **dd)

        self.build(
            PatchEmbed(in_chans, embed_dims[0], 4, **dd),
            stage,
            tuple(embed_dims),
            tuple(depths),
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )
        if unused_norm:
            self.norm = norm_layer(embed_dims[-1], **dd).requires_grad_(False)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        positions = {name for name, _ in self.named_parameters() if name.endswith("pos_embed")}
        return super().no_weight_decay() | positions


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module, **origin: Any) -> dict[str, Any]:
    """Public or own checkpoint -> state_dict of `model`; `resample_positions` tells of `origin`."""
    state_dict, out = unwrap(state_dict), {}
    published = "patch_embed1.proj.weight" in state_dict
    for key, value in state_dict.items():
        if key in ("norm.weight", "norm.bias") and not hasattr(model, "norm"):  # which no forward applies
            continue
        key = key.replace("patch_embed1.", "patch_embed.")
        key = re.sub(r"^patch_embed(\d)", lambda m: f"stages.{int(m[1]) - 1}.downsample", key)
        key = re.sub(r"^pos_embed(\d)", lambda m: f"stages.{int(m[1]) - 1}.pos_embed", key)
        key = re.sub(r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)
        out[key] = value
    return resample_positions(out, model, metadata_of(state_dict), published=published, **origin)


default_cfgs = generate_default_cfgs(
    {
        "flatten_pvt_tiny.in1k": default_cfg(published="3ab1d773f19d45648690"),
        **{f"flatten_pvt_{size}.in1k": default_cfg() for size in ("small", "medium", "large")},
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> FlattenPyramidTransformer:
    return build(FlattenPyramidTransformer, variant, pretrained, checkpoint_filter_fn, kwargs)


@register_model
def flatten_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformer:
    """FLatten-PVT-T."""
    return _create("flatten_pvt_tiny", pretrained, {"drop_path_rate": 0.1, **kwargs})


@register_model
def flatten_pvt_small(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformer:
    """FLatten-PVT-S."""
    args = {"depths": (3, 4, 6, 3), "drop_path_rate": 0.1}
    return _create("flatten_pvt_small", pretrained, {**args, **kwargs})


@register_model
def flatten_pvt_medium(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformer:
    """FLatten-PVT-M."""
    args = {"depths": (3, 4, 18, 3), "drop_path_rate": 0.3}
    return _create("flatten_pvt_medium", pretrained, {**args, **kwargs})


@register_model
def flatten_pvt_large(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformer:
    """FLatten-PVT-L."""
    args = {"depths": (3, 8, 27, 3), "drop_path_rate": 0.3}
    return _create("flatten_pvt_large", pretrained, {**args, **kwargs})
