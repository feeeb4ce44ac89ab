"""FLatten-Swin: Swin Transformer with focused linear attention in its first stages (ICCV 2023, table 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    resolve_stage_window_sizes,
)
from timm.models.swin_transformer import checkpoint_filter_fn as _timm_filter
from torch import Tensor, nn

from ._attention import PackedAttention, Size
from ._checkpoint import resample_encodings
from ._mlp import tile_mlps
from ._timm import attention_types, default_cfg, undecayed

__all__ = ["FlattenSwinBlock", "FlattenSwinTransformer"]


class FlattenSwinBlock(nn.Module):
    """Takes the place of a Swin block, keeping its norms, projections and MLP.

    A window that covers the map it is built for keeps covering it at every size. A smaller one keeps its
    size, on a map padded to a multiple, and odd blocks shift it; like the public code, tokens of a shifted
    window attend across the border. The operator reads the windows in place: no roll, no partition.

    Args:
        block: the block to replace.
        window_size: target window, clipped to the map.
        shifted: whether windows smaller than the map are shifted by half their size.
    """

    def __init__(self, block: SwinTransformerBlock, window_size: Size, shifted: bool, **focus: Any):
        super().__init__()
        self.norm1, self.drop_path1 = block.norm1, block.drop_path1
        self.norm2, self.mlp, self.drop_path2 = block.norm2, block.mlp, block.drop_path2
        self.shifted = shifted
        self._set_window(block.input_resolution, window_size)
        grid = self.window or block.input_resolution
        self.attn = PackedAttention(block.attn, grid, **focus)

    def _set_window(self, size: Size, window_size: Size) -> None:
        height, width = (min(pair) for pair in zip(size, window_size, strict=True))
        self.window = None if (height, width) == tuple(size) else (height, width)
        # An axis that the window covers has nothing to shift over.
        shift = tuple(w // 2 if w < s else 0 for w, s in zip((height, width), size, strict=True))
        self.shift = shift if self.shifted and self.window and any(shift) else None

    def set_input_size(
        self, feat_size: Size, window_size: Size, always_partition: bool | None = None
    ) -> None:
        """Resamples the positional encoding for the windows of another map."""
        self._set_window(feat_size, window_size)
        self.attn.set_grid(self.window or feat_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        height, width = x.shape[1:3]
        y = self.norm1(x)
        if self.window is not None:
            y = F.pad(y, (0, 0, 0, -width % self.window[1], 0, -height % self.window[0]))
        size = y.shape[1:3]
        y = self.attn(y.flatten(1, 2), size, self.window, self.shift).unflatten(1, size)
        x = x + self.drop_path1(y[:, :height, :width])
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class FlattenSwinTransformer(SwinTransformer):
    """Swin Transformer whose stages of type "L" attend by focused linear attention.

    Args:
        window_size: windows of the stages, as timm's: the published models have the whole map in stages of
            type "L" and 7 x 7 (12 x 12 at 384 px) in those of type "S".
        attn_type: "L" (focused linear) or "S" (softmax) for each stage.
        focusing_factor: p of phi_p.
        kernel_size: odd size of the depthwise kernel.
        dynamic_img_size: accept any input size, padded to whole patches; on by default.
        kwargs: timm's SwinTransformer arguments.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        window_size: Any = (56, 56, 7, 7),
        attn_type: str = "LLSS",
        focusing_factor: float = 3.0,
        kernel_size: int = 5,
        dynamic_img_size: bool = True,
        **kwargs: Any,
    ):
        types = attention_types(attn_type, len(depths))
        windows = resolve_stage_window_sizes(window_size, len(depths))
        # Blocks that are replaced at once need no table of relative positions.
        placeholders = [
            (1, 1) if kind == "L" else window for kind, window in zip(types, windows, strict=True)
        ]
        super().__init__(
            depths=tuple(depths), window_size=placeholders, dynamic_img_size=dynamic_img_size, **kwargs
        )
        self.patch_embed.dynamic_img_pad = dynamic_img_size
        self.focus(types, windows, focusing_factor=focusing_factor, kernel_size=kernel_size)

    def focus(self, types: str, windows: Sequence[Size], **focus: Any) -> None:
        """Replaces the blocks of the stages of type "L"; `windows` gives one target for each stage."""
        self._ref_window_sizes = tuple(windows)
        for stage, kind, window in zip(self.layers, types, windows, strict=True):
            if kind == "L":
                blocks = [
                    FlattenSwinBlock(block, window, shifted=i % 2 == 1, **focus)
                    for i, block in enumerate(stage.blocks)
                ]
                stage.blocks = nn.Sequential(*blocks)
        tile_mlps(self)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | undecayed(self)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Public or timm checkpoint -> state_dict of `model`, tables resampled to its size."""
    return resample_encodings(_timm_filter(state_dict, model), model)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        FlattenSwinTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "flatten_swin_tiny.in1k": default_cfg(classifier="head.fc"),
        "flatten_swin_small.in1k": default_cfg(classifier="head.fc"),
        "flatten_swin_base.in1k": default_cfg(classifier="head.fc"),
        "flatten_swin_base_384.in1k": default_cfg(384, classifier="head.fc"),
    }
)

_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}


@register_model
def flatten_swin_tiny(pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    """FLatten-Swin-T at 224 px."""
    args = {**_TINY, "drop_path_rate": 0.2}
    return _create("flatten_swin_tiny", pretrained, **{**args, **kwargs})


@register_model
def flatten_swin_small(pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    """FLatten-Swin-S at 224 px."""
    args = {**_TINY, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
    return _create("flatten_swin_small", pretrained, **{**args, **kwargs})


@register_model
def flatten_swin_base(pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    """FLatten-Swin-B at 224 px."""
    args = {**_BASE, "drop_path_rate": 0.5}
    return _create("flatten_swin_base", pretrained, **{**args, **kwargs})


@register_model
def flatten_swin_base_384(pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    """FLatten-Swin-B at 384 px."""
    args = {**_BASE, "img_size": 384, "window_size": (96, 96, 12, 12), "drop_path_rate": 0.5}
    return _create("flatten_swin_base_384", pretrained, **{**args, **kwargs})
