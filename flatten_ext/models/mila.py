"""MILA (MLLA in its code): linear attention in a block like Mamba's (NeurIPS 2024, arXiv 2405.16605).

As LeapLabTHU/MLLA has it at commit 66b6d29. Its tables of rotations are not learned: here they are made for
whatever map comes, so that the models run at any size and their checkpoints load at any size.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, Mlp, to_2tuple
from torch import Tensor, nn

from ._attention import Size
from ._build import Variants, register
from ._checkpoint import unwrap
from ._cores import MilaAttention
from ._pyramid import NormedPyramid, PyramidStage, on_map

__all__ = ["MilaBlock", "MilaTransformer"]


def _conv(
    in_chans: int,
    dim: int,
    kernel: int,
    stride: int = 1,
    act: bool = False,
    norm: bool = True,
    **options: Any,
) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    dd = {key: value for key, value in options.items() if key in ("device", "dtype")}
    layers["conv"] = nn.Conv2d(in_chans, dim, kernel, stride, kernel // 2, **{"bias": not norm, **options})
    if norm:
        layers["norm"] = nn.BatchNorm2d(dim, **dd)
    if act:
        layers["act"] = nn.ReLU()
    return nn.Sequential(layers)


class Stem(nn.Module):
    """Convolutions of stride 4 in all, with one residual."""

    def __init__(self, in_chans: int, dim: int, **dd: Any):
        super().__init__()
        half = dim // 2
        self.conv1 = _conv(in_chans, half, 3, 2, act=True, **dd)
        self.conv2 = nn.Sequential(_conv(half, half, 3, act=True, **dd), _conv(half, half, 3, **dd))
        self.conv3 = nn.Sequential(_conv(half, 4 * dim, 3, 2, act=True, **dd), _conv(4 * dim, dim, 1, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H / 4, W / 4, dim), rounded up."""
        x = self.conv1(x)
        return self.conv3(x + self.conv2(x)).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """An inverted bottleneck that halves the map, rounding up."""

    def __init__(self, in_chans: int, dim: int, **dd: Any):
        super().__init__()
        wide = 4 * dim
        self.conv = nn.Sequential(
            _conv(in_chans, wide, 1, act=True, norm=False, **dd),
            _conv(wide, wide, 3, 2, act=True, norm=False, groups=wide, **dd),
            _conv(wide, dim, 1, bias=True, **dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H / 2, W / 2, dim)."""
        return self.conv(x).permute(0, 2, 3, 1)


class Attention(MilaAttention):
    """MILA's attention with its projection of queries and keys; its values are the tokens themselves."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, **dd: Any):
        super().__init__(dim, num_heads, **dd)
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)

    def forward(self, x: Tensor, size: Size, gate: Tensor | None = None) -> Tensor:
        """(B, H * W, C) tokens, and a gate that goes through SiLU -> (B, H * W, C)."""
        q, k = self.qk(x).unflatten(-1, (2, self.dim)).unbind(-2)
        return self.attend(q, k, x, size, gate=gate, gate_activation="none" if gate is None else "silu")


class MilaBlock(nn.Module):
    """Convolutional positions, gated linear attention, convolutional positions, MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Any = nn.LayerNorm,
        **dd: Any,
    ):
        super().__init__()
        self.cpe1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.in_proj = nn.Linear(dim, dim, **dd)
        self.act_proj = nn.Linear(dim, dim, **dd)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.attn = Attention(dim, num_heads, qkv_bias, **dd)
        self.out_proj = nn.Linear(dim, dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.cpe2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, feat_size: Size) -> Tensor:
        """(B, H * W, C) -> (B, H * W, C)."""
        x = x + on_map(self.cpe1, x, feat_size)
        y = self.norm1(x)
        inside = F.silu(on_map(self.dwc, self.in_proj(y), feat_size))
        x = x + self.drop_path1(self.out_proj(self.attn(inside, feat_size, self.act_proj(y))))
        x = x + on_map(self.cpe2, x, feat_size)
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class MilaTransformer(NormedPyramid):
    """MILA.

    Args:
        img_size: of no meaning but to timm: nothing is learned for a size.
        norm_layer: of the blocks.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 8, 4),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Any = nn.LayerNorm,  # eps 1e-5
        device: Any = None,
        dtype: Any = None,
    ):
        nn.Module.__init__(self)
        dd = {"device": device, "dtype": dtype}
        self.img_size, self.in_chans = to_2tuple(img_size), in_chans
        dims = tuple(embed_dim << i for i in range(len(depths)))

        def stage(i: int, rates: list[float]) -> nn.Module:
            blocks: list[nn.Module] = [
                MilaBlock(dims[i], num_heads[i], mlp_ratio, qkv_bias, proj_drop_rate, rate, norm_layer, **dd)
                for rate in rates
            ]
            return PyramidStage(Downsample(dims[i - 1], dims[i], **dd) if i else None, blocks)

        self.build(
            Stem(in_chans, embed_dim, **dd),
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
    """Public or own checkpoint -> state_dict of `model`; there are no positions whose origin counts."""
    out = {}
    for key, value in unwrap(state_dict).items():
        key = re.sub(r"^layers\.(\d)\.blocks", r"stages.\1.blocks", key)
        key = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", key)
        out[key] = value
    return out


_LONG = {"depths": (3, 6, 21, 6)}
register(
    __name__,
    "LeapLabTHU/MLLA",
    Variants(
        MilaTransformer,
        checkpoint_filter_fn,
        {
            "mila_tiny": {"drop_path_rate": 0.2},
            "mila_small": {**_LONG, "drop_path_rate": 0.3},
            "mila_base": {**_LONG, "embed_dim": 96, "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.5},
        },
        {"first_conv": "patch_embed.conv1.conv"},
    ),
)
