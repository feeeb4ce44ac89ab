"""RAVLT (RALA, CVPR 2025, arXiv 2411.07635) and MAViT (MALA, arXiv 2507.00698): one pyramid, two attentions.

As qhfan/RALA has it at commit a86314f, qhfan/MALA at 7114e63. Both attend linearly in the first two stages
and by softmax in the others, with rotated queries and keys throughout. The 1 x 1 convolutions of the public
code are linear layers of tokens here.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerScale, to_2tuple, trunc_normal_
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from ._attention import Size
from ._build import Variants, register
from ._checkpoint import unwrap
from ._choice import PackedMala, PackedRala, PackedRotarySoftmax
from ._pyramid import NormedPyramid, PyramidStage, on_map
from ._timm import attention_types

__all__ = ["RavltBlock", "RavltTransformer"]

_LINEAR = {"rala": PackedRala, "mala": PackedMala}


class Stem(nn.Module):
    """Four 3 x 3 convolutions, of stride 4 in all."""

    def __init__(self, in_chans: int, dim: int, **dd: Any):
        super().__init__()
        half, layers = dim // 2, []
        for before, after, stride in ((in_chans, half, 2), (half, half, 1), (half, half, 1), (half, dim, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, **dd), nn.BatchNorm2d(after, **dd), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H / 4, W / 4, dim), rounded up."""
        return self.proj(x).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """A 3 x 3 convolution that halves the map, rounding up."""

    def __init__(self, in_chans: int, dim: int, **dd: Any):
        super().__init__()
        self.reduction = nn.Conv2d(in_chans, dim, 3, 2, 1, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H / 2, W / 2, dim)."""
        return self.norm(self.reduction(x)).permute(0, 2, 3, 1)


class FeedForward(nn.Module):
    """An MLP with a depthwise convolution beside its activations."""

    def __init__(self, dim: int, hidden: int, **dd: Any):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """(B, H * W, C) -> (B, H * W, C)."""
        x = F.gelu(self.fc1(x))
        return self.fc2(x + on_map(self.dwconv, x, size))


class RavltBlock(nn.Module):
    """Convolutional positions, attention, feed-forward, the last two scaled channel by channel."""

    def __init__(
        self,
        attn: nn.Module,
        dim: int,
        mlp_ratio: float = 3.5,
        layer_scale: float = 1.0,
        drop_path: float = 0.0,
        norm_layer: Any = LayerNorm,
        **dd: Any,
    ):
        super().__init__()
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.ls1 = LayerScale(dim, init_values=layer_scale, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.ffn = FeedForward(dim, int(dim * mlp_ratio), **dd)
        self.ls2 = LayerScale(dim, init_values=layer_scale, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, feat_size: Size) -> Tensor:
        """(B, H * W, C) -> (B, H * W, C)."""
        x = x + on_map(self.pos, x, feat_size)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), feat_size)))
        return x + self.drop_path2(self.ls2(self.ffn(self.norm2(x), feat_size)))


class RavltTransformer(NormedPyramid):
    """RAVLT and MAViT.

    Args:
        img_size: of no meaning but to timm: nothing is learned for a size.
        attn_type: "L" (linear) or "S" (softmax) for each stage.
        attention: the linear attention, "rala" or "mala".
        layer_scales: initial scale of the branches, for each stage.
        projection: channels of the features behind the last stage.
        norm_layer: of the blocks.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratio: float = 3.5,
        attn_type: str = "LLSS",
        attention: str = "rala",
        layer_scales: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        projection: int = 1024,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Any = LayerNorm,  # eps 1e-6
        device: Any = None,
        dtype: Any = None,
    ):
        nn.Module.__init__(self)
        dd = {"device": device, "dtype": dtype}
        types = attention_types(attn_type, len(depths))
        if attention not in _LINEAR:
            raise ValueError(f"attention is {attention!r}, expected {' or '.join(map(repr, _LINEAR))}")
        self.img_size, self.in_chans = to_2tuple(img_size), in_chans
        dims = tuple(embed_dims)

        def attend(i: int) -> nn.Module:
            projections = Attention(dims[i], num_heads[i], qkv_bias=True, proj_drop=proj_drop_rate, **dd)
            packed: Any = _LINEAR[attention] if types[i] == "L" else PackedRotarySoftmax
            return packed(projections, None)

        def stage(i: int, rates: list[float]) -> nn.Module:
            blocks: list[nn.Module] = [
                RavltBlock(attend(i), dims[i], mlp_ratio, layer_scales[i], rate, norm_layer, **dd)
                for rate in rates
            ]
            return PyramidStage(Downsample(dims[i - 1], dims[i], **dd) if i else None, blocks)

        self.build(
            Stem(in_chans, dims[0], **dd),
            stage,
            dims,
            tuple(depths),
            num_classes=0,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )
        self.norm = nn.Sequential(
            OrderedDict(
                proj=nn.Conv2d(dims[-1], projection, 1, **dd),
                norm=nn.BatchNorm2d(projection, **dd),
                act=nn.SiLU(),
            )
        )
        self.num_features = self.head_hidden_size = projection
        self.num_classes = num_classes
        if num_classes > 0:
            self.head = nn.Linear(projection, num_classes, **dd)
        self.init_weights(needs_reset=False)

    def _init_weights(self, m: nn.Module) -> None:
        if isinstance(m, nn.Linear | nn.Conv2d):
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module, **origin: Any) -> dict[str, Any]:
    """Public or own checkpoint -> state_dict of `model`; there are no positions whose origin counts."""
    state_dict, out = unwrap(state_dict), {}
    if not any(key.startswith("layers.") for key in state_dict):
        return state_dict
    for key, value in state_dict.items():
        key = re.sub(r"^(proj|norm)\.", r"norm.\1.", key)
        key = re.sub(r"^layers\.(\d)\.blocks", r"stages.\1.blocks", key)
        key = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", key)
        key = re.sub(r"\.norm(\d)\.norm\.", r".norm\1.", key)
        if re.search(r"(qkvo|attn\.proj|fc\d|^head)\.weight$", key):
            value = value.flatten(1)
        if match := re.search(r"(.*)\.gamma_(\d)$", key):
            key, value = f"{match[1]}.ls{match[2]}.gamma", value.flatten()
        out[key] = value
    return out


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"drop_path_rate": 0.1},
    "small": {
        "embed_dims": (64, 128, 320, 512),
        "depths": (3, 5, 9, 3),
        "num_heads": (1, 2, 5, 8),
        "drop_path_rate": 0.15,
    },
    "base": {
        "embed_dims": (96, 192, 384, 512),
        "depths": (4, 6, 12, 6),
        "num_heads": (1, 2, 6, 8),
        "layer_scales": (1.0, 1.0, 1e-6, 1e-6),
        "drop_path_rate": 0.4,
    },
    "large": {
        "embed_dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (1, 2, 7, 10),
        "layer_scales": (1e-6,) * 4,
        "drop_path_rate": 0.55,
    },
}
for _name, _origin, _arguments in (
    ("ravlt", "qhfan/RALA", {}),
    ("mavit", "qhfan/MALA", {"attention": "mala", "projection": 2048}),
):
    _variants = {f"{_name}_{size}": {**_SIZES[size], **_arguments} for size in _SIZES}
    _variants.get("mavit_large", {}).update(projection=2560)
    _cfg = {"first_conv": "patch_embed.proj.0"}
    register(__name__, _origin, Variants(RavltTransformer, checkpoint_filter_fn, _variants, _cfg))
