"""FLatten-CSWin: CSWin Transformer with focused linear attention in its first stages (ICCV 2023, table 1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, Mlp, to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models.pvt_v2 import OverlapPatchEmbed
from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ._attention import Size
from ._build import build
from ._checkpoint import unwrap
from ._choice import choose
from ._positions import Grid, metadata_of, resample_positions
from ._pyramid import NormedPyramid, PyramidStage, stage_sizes
from ._timm import attention_types, check_attention_dropout, default_cfg

__all__ = ["CSWinBlock", "FlattenCSWinTransformer"]


class Stem(nn.Module):
    """7 x 7 patches of stride 4, padded by 2."""

    def __init__(self, in_chans: int, dim: int, **dd: Any):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 7, stride=4, padding=2, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), H and W multiples of 4 -> (B, H / 4, W / 4, dim)."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class LePEAttention(nn.Module):
    """Softmax attention in windows, plus a 3x3 depthwise convolution of v per channel (CSWin, equation 9)."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, **dd: Any):
        super().__init__()
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, size: Size, window: Size | None = None, source: Any = None
    ) -> Tensor:
        """(B, N, C) tokens of the map `size`, which `window` divides -> (B, N, C)."""
        wh, ww = window or size
        rows, columns = size[0] // wh, size[1] // ww

        def windows(x: Tensor) -> Tensor:  # -> (B * windows, heads, wh * ww, head_dim)
            x = x.unflatten(1, (rows, wh, columns, ww)).unflatten(-1, (self.num_heads, -1))
            return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)

        q, k, v = windows(q), windows(k), windows(v)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        image = v.transpose(2, 3).flatten(1, 2).unflatten(2, (wh, ww))
        out = out.transpose(1, 2).flatten(2) + self.get_v(image).flatten(2).transpose(1, 2)
        out = out.unflatten(0, (-1, rows, columns)).unflatten(3, (wh, ww))
        return out.transpose(2, 3).flatten(1, 4)


def _divides(stripe: int, size: Size) -> bool:
    """Whether stripes tile the map. Of a size that a graph leaves open: whether they tile every such map; to
    ask of the one at hand would tie the graph to the answer."""
    sides = (size[0], size[1])
    if isinstance(sides[0], Proxy):
        return False
    known = statically_known_true if torch.compiler.is_compiling() else bool
    return all(known(side % stripe == 0) for side in sides)


class CSWinBlock(nn.Module):
    """Pre-norm block that attends in cross-shaped windows: stripes both ways, on half the channels each.

    Where one stripe covers the map, a single branch of all channels attends globally. The operator reads
    the stripes, and the halves of the packed projection, in place.

    Args:
        kind: "L" for linear attention, "S" for softmax.
        grid: the map the block is built for.
        split_size: width of the stripes, or None for global attention.
        attention: makes a branch of type "L" from its channels, heads and window.
    """

    def __init__(
        self,
        kind: str,
        dim: int,
        num_heads: int,
        grid: Size,
        split_size: int | None,
        *,
        attention: Callable[..., nn.Module],
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Any = nn.LayerNorm,
        **dd: Any,
    ):
        super().__init__()
        self.dim, self.split_size = dim, split_size
        branches = 1 if split_size is None else 2
        self.norm1 = norm_layer(dim, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.attns: Any = nn.ModuleList(
            attention(dim // branches, num_heads // branches, window, lepe=True, **dd)
            if kind == "L"
            else LePEAttention(dim // branches, num_heads // branches, attn_drop, **dd)
            for window in self._windows(grid)
        )
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def _windows(self, size: Size) -> list[Size]:
        if self.split_size is None:
            return [size]
        return [(size[0], self.split_size), (self.split_size, size[1])]

    def position_grids(self, size: Grid) -> dict[str, list[Grid]]:
        """The maps for which the branches' encodings are learned where the tokens tile `size`."""
        return {
            f"attns.{i}.{attention.positions_name}": [(window[0], window[1])]
            for i, (attention, window) in enumerate(zip(self.attns, self._windows(size), strict=True))
            if not isinstance(attention, LePEAttention)
        }

    def set_feat_size(self, feat_size: Size) -> None:
        """Resamples the positional encodings for another map."""
        for attention, window in zip(self.attns, self._windows(feat_size), strict=True):
            if not isinstance(attention, LePEAttention):
                attention.set_grid(window)

    def _attend(self, x: Tensor, size: Size, source: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C): stripes side by side, each branch on its share of the channels. `source` is
        what the block was given."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.dim)).unbind(-2)
        if self.split_size is None:
            return self.proj(self.attns[0](q, k, v, size, source=source))
        halves = [x.chunk(2, -1) for x in (q, k, v, source)]
        # Only the results are copied: the operator reads its stripes and halves of q, k and v in place.
        outs = [
            attention(*(half[i] for half in halves[:3]), size, window, halves[3][i])
            for i, (attention, window) in enumerate(zip(self.attns, self._windows(size), strict=True))
        ]
        return self.proj(torch.cat(outs, -1))

    def forward(self, x: Tensor, feat_size: Size) -> Tensor:
        """(B, H * W, C) -> (B, H * W, C); maps that the stripes do not divide are padded at their end."""
        y, (height, width) = self.norm1(x), feat_size
        if self.split_size is not None and not _divides(self.split_size, feat_size):
            y = y.unflatten(1, (height, width))
            y = F.pad(y, (0, 0, 0, -width % self.split_size, 0, -height % self.split_size))
            padded = y.shape[1:3]
            y = self._attend(y.flatten(1, 2), padded, x).unflatten(1, padded)
            # Cropped by padding: whether a slice can be flattened in place depends on the size.
            y = F.pad(y, (0, 0, 0, width - padded[1], 0, height - padded[0])).flatten(1, 2)
        else:
            y = self._attend(y, feat_size, x)
        x = x + self.drop_path1(self.proj_drop(y))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class FlattenCSWinTransformer(NormedPyramid):
    """CSWin Transformer whose stages of type "L" attend by focused linear attention, or by InLine's.

    Args:
        img_size: the input for which positional encodings are learned; any other resamples them.
        split_sizes: stripe width of the stages of type "S"; the last stage attends globally.
        la_split_sizes: stripe width of the stages of type "L"; None (as published) attends globally.
        attn_type: "L" (linear) or "S" (softmax) for each stage.
        attention: the linear attention: "flatten" or "inline".
        focusing_factor: p of phi_p.
        kernel_size: odd size of the depthwise kernel.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        split_sizes: Sequence[int] = (1, 2, 7, 7),
        la_split_sizes: Sequence[int | None] = (None, None, None, None),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attn_type: str = "LLSS",
        attention: str = "flatten",
        focusing_factor: float = 3.0,
        kernel_size: int = 5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Any = nn.LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ):
        nn.Module.__init__(self)
        dd = {"device": device, "dtype": dtype}
        types = attention_types(attn_type, len(depths))
        check_attention_dropout(types, attn_drop_rate)
        self.img_size, self.in_chans = to_2tuple(img_size), in_chans
        sizes, dims = stage_sizes(img_size), tuple(embed_dim << i for i in range(len(depths)))
        options = {"focusing_factor": focusing_factor, "kernel_size": kernel_size}
        attend = choose(attention, "stripe", **options)

        def stage(i: int, rates: list[float]) -> nn.Module:
            split = la_split_sizes[i] if types[i] == "L" else split_sizes[i]
            split = None if i == len(depths) - 1 else split
            blocks: list[nn.Module] = [
                CSWinBlock(
                    types[i],
                    dims[i],
                    num_heads[i],
                    sizes[i],
                    split,
                    attention=attend,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=rate,
                    norm_layer=norm_layer,
                    **dd,
                )
                for rate in rates
            ]
            embed = OverlapPatchEmbed(3, 2, dims[i - 1], dims[i], **dd) if i else None
            return PyramidStage(embed, blocks)

        self.build(
            Stem(in_chans, dims[0], **dd),
            stage,
            dims,
            tuple(depths),
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )
        self.norm = LayerNorm2d(dims[-1], eps=1e-5, **dd)
        self.init_weights(needs_reset=False)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module, **origin: Any) -> dict[str, Any]:
    """Public or own checkpoint -> state_dict of `model`; `resample_positions` tells of `origin`."""
    state_dict, out = unwrap(state_dict), {}
    published = "stage1_conv_embed.0.weight" in state_dict
    for key, value in state_dict.items():
        key = key.replace("stage1_conv_embed.0.", "patch_embed.proj.")
        key = key.replace("stage1_conv_embed.2.", "patch_embed.norm.")
        key = re.sub(r"^stage(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", key)
        key = re.sub(r"^merge(\d)\.conv", r"stages.\1.downsample.proj", key)
        key = re.sub(r"^merge(\d)\.norm", r"stages.\1.downsample.norm", key)
        out[key] = value
    return resample_positions(out, model, metadata_of(state_dict), published=published, **origin)


default_cfgs = generate_default_cfgs(
    {
        "flatten_cswin_tiny.in1k": default_cfg(published="48ba765ba8b0451d9d5a"),
        "flatten_cswin_small.in1k": default_cfg(),
        "flatten_cswin_base.in1k": default_cfg(),
        "flatten_cswin_base_384.in1k": default_cfg(384),
    }
)

BASE = {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)}


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> FlattenCSWinTransformer:
    return build(FlattenCSWinTransformer, variant, pretrained, checkpoint_filter_fn, kwargs)


@register_model
def flatten_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> FlattenCSWinTransformer:
    """FLatten-CSWin-T at 224 px."""
    return _create("flatten_cswin_tiny", pretrained, {"drop_path_rate": 0.2, **kwargs})


@register_model
def flatten_cswin_small(pretrained: bool = False, **kwargs: Any) -> FlattenCSWinTransformer:
    """FLatten-CSWin-S at 224 px."""
    args = {"depths": (2, 4, 32, 2), "drop_path_rate": 0.4}
    return _create("flatten_cswin_small", pretrained, {**args, **kwargs})


@register_model
def flatten_cswin_base(pretrained: bool = False, **kwargs: Any) -> FlattenCSWinTransformer:
    """FLatten-CSWin-B at 224 px."""
    return _create("flatten_cswin_base", pretrained, {**BASE, "drop_path_rate": 0.5, **kwargs})


@register_model
def flatten_cswin_base_384(pretrained: bool = False, **kwargs: Any) -> FlattenCSWinTransformer:
    """FLatten-CSWin-B at 384 px."""
    args = {**BASE, "img_size": 384, "split_sizes": (1, 2, 12, 12), "drop_path_rate": 0.7}
    return _create("flatten_cswin_base_384", pretrained, {**args, **kwargs})
