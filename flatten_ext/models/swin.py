"""FLatten-Swin: Swin Transformer with focused linear attention in its first stages (ICCV 2023, table 1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import resample_patch_embed, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    get_relative_position_index,
)
from torch import Tensor, nn

from .._grids import KeepsGrid
from ._attention import PackedAttention, Size
from ._build import build
from ._checkpoint import unwrap
from ._choice import choose
from ._fx import TraceableSwinBlock
from ._mlp import tile_mlps
from ._positions import Grid, Positions, metadata_of, module_positions, resample_positions, resize_table
from ._timm import (
    attention_types,
    check_attention_dropout,
    default_cfg,
    is_empty,
    of_none,
    of_this_size,
    record_input_size,
    reset_modules,
    undecayed,
)
from ._windows import StageWindow, default_windows, stage_maps, stage_windows, windows_at

__all__ = ["FlattenSwinBlock", "FlattenSwinTransformer"]


class TableAttention(KeepsGrid, WindowAttention):
    """timm's softmax attention in windows, whose table of relative positions remembers its window."""

    positions_name = "relative_position_bias_table"
    window_size: Grid
    relative_position_bias_table: nn.Parameter

    def positions_grid(self) -> Size:
        return self.window_size

    def set_window_size(self, window_size: Grid) -> None:
        """As timm's, which in older releases takes every table for that of a square window."""
        old, new = self.window_size, (window_size[0], window_size[1])
        if new == old:
            return
        self.window_size, self.window_area = new, new[0] * new[1]
        table = self.relative_position_bias_table
        self.relative_position_bias_table = nn.Parameter(
            resize_table(table.detach(), old, new), table.requires_grad
        )
        index = get_relative_position_index(*new, device=table.device)
        self.register_buffer("relative_position_index", index, persistent=False)


class FlattenSwinBlock(nn.Module):
    """Takes the place of a Swin block, keeping its norms, projections and MLP.

    A window that covers the map it is built for keeps covering it at every size. A smaller one keeps its
    size, on a map padded to a multiple, and odd blocks shift it; like the public code, tokens of a shifted
    window attend across the border. The operator reads the windows in place: no roll, no partition.

    `input_resolution`, `window_size` and `shift_size` are what they are in timm's block: the map that the
    block is built for, its windows and their shift on that map.

    Args:
        block: the block to replace.
        window_size: (height, width) of the windows, clipped to the map; None is the whole map.
        shifted: whether windows smaller than the map are shifted by half their size.
        attention: makes the attention from a softmax attention, the map of a window and `options`.
        whole: whether the window is always the whole map, whatever is asked for.
    """

    attn_mask = None  # timm's blocks have one where windows are shifted

    def __init__(
        self,
        block: SwinTransformerBlock,
        window_size: StageWindow,
        shifted: bool,
        attention: Callable[..., Any] = PackedAttention,
        whole: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.norm1, self.drop_path1 = block.norm1, block.drop_path1
        self.norm2, self.mlp, self.drop_path2 = block.norm2, block.mlp, block.drop_path2
        self.shifted, self.whole = shifted, whole
        self._set_window(block.input_resolution, window_size)
        self.attn = attention(block.attn, self.window_size, **options)

    def _set_window(self, size: Size, window_size: StageWindow) -> None:
        height, width = size
        self.input_resolution = (height, width)
        if window_size is None or self.whole:
            window_size = self.input_resolution
        self.window_size = (min(height, window_size[0]), min(width, window_size[1]))
        self.window = None if self.window_size == self.input_resolution else self.window_size
        # An axis that the window covers has nothing to shift over.
        shift = tuple(
            window // 2 if self.shifted and window < side else 0
            for window, side in zip(self.window_size, size, strict=True)
        )
        self.shift_size = shift
        self.shift = shift if any(shift) else None

    def position_grids(self, size: Grid) -> dict[str, list[Grid]]:
        """The maps for which an encoding may be learned where the tokens tile `size`: windows scaled with it
        or of fixed size, or all of it."""
        clipped = (min(size[0], self.window_size[0]), min(size[1], self.window_size[1]))
        height, width = self.input_resolution
        scaled = (self.window_size[0] * size[0] // height, self.window_size[1] * size[1] // width)
        windows = [] if self.window is None else [scaled, clipped]
        return {f"attn.{self.attn.positions_name}": [*windows, size]}

    def set_input_size(
        self, feat_size: Size, window_size: StageWindow, always_partition: bool | None = None
    ) -> None:
        """Resamples the positional encoding for the windows of another map.

        Args:
            feat_size: the map.
            window_size: as of the class.
            always_partition: of no meaning here: a window that covers the map is the map.
        """
        self._set_window(feat_size, window_size)
        self.attn.set_grid(self.window_size)

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
    """Swin Transformer whose stages of type "L" attend by focused, or another, linear attention.

    Args:
        window_size: windows of the stages, as timm's: an int or (height, width) for all, or one for each.
            None in the place of a stage of type "L" is its whole map, whatever the size of the input. By
            default, as published, stages of type "L" have their whole map, and the others `softmax_window`.
        softmax_window: side of the softmax windows where `window_size` does not say it: 7, in the published
            models of 384 px 12.
        attn_type: "L" (linear), "S" (softmax) or "M" (mixed) for each stage.
        mixed_blocks: how many blocks of a stage of type "M", its first ones, attend linearly over the whole
            map. The others are softmax; the stage's windows are theirs.
        attention: the linear attention: "flatten", "inline", "pola", "mila", "rala" or "mala".
        focusing_factor: p of phi_p.
        kernel_size: odd size of the depthwise kernel.
        kernel_func: of the attention "inline": "identity", "relu", "leakyrelu" or "exp".
        alpha: of the attention "pola": its powers lie between 1 and 1 + alpha.
        dynamic_img_size: accept any input size, padded to whole patches; on by default.
        kwargs: timm's SwinTransformer arguments.

    Raises:
        ValueError: `attn_type` is not a letter L, S or M for each stage, or a stage with softmax attention
            has no window.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        window_size: Any = None,
        attn_type: str = "LLSS",
        mixed_blocks: int = 2,
        attention: str = "flatten",
        focusing_factor: float = 3.0,
        kernel_size: int = 5,
        dynamic_img_size: bool = True,
        kernel_func: str = "identity",
        alpha: float = 4.0,
        softmax_window: int = 7,
        **kwargs: Any,
    ):
        types = attention_types(attn_type, len(depths), "LSM")
        options = {
            "focusing_factor": focusing_factor,
            "kernel_size": kernel_size,
            "kernel_func": kernel_func,
            "alpha": alpha,
        }
        make = choose(attention, "packed", **options)
        check_attention_dropout(types, kwargs.get("attn_drop_rate", 0.0))
        if window_size is None:
            window_size = default_windows(types, softmax_window)
        windows = stage_windows(window_size, len(depths))
        _check_softmax_windows(types, windows)
        # Blocks that are replaced at once need no table of relative positions.
        placeholders = [
            (1, 1) if kind == "L" else window for kind, window in zip(types, windows, strict=True)
        ]
        kwargs["strict_img_size"] = kwargs.get("strict_img_size", True) and not dynamic_img_size
        super().__init__(depths=tuple(depths), window_size=placeholders, **kwargs)
        self.patch_embed.dynamic_img_pad = dynamic_img_size
        self.focus(types, windows, make, mixed_blocks)

    def focus(
        self, types: str, windows: Sequence[StageWindow], attention: Callable[..., Any], mixed_blocks: int = 0
    ) -> None:
        """Replaces the blocks of the stages of type "L", and the first ones of type "M"; `windows` gives one
        target for each stage."""
        self._ref_window_sizes = tuple(windows)
        self._ref_grid_size = tuple(self.patch_embed.grid_size)
        maps = stage_maps(self._ref_grid_size, len(self.layers))
        for stage, kind, window, size in zip(self.layers, types, windows, maps, strict=True):
            blocks = list(stage.blocks)
            for i, block in enumerate(blocks[: {"L": None, "M": mixed_blocks, "S": 0}[kind]]):
                block.input_resolution = size
                blocks[i] = FlattenSwinBlock(block, window, i % 2 == 1, attention, whole=kind == "M")
            stage.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if type(module) is WindowAttention:
                module.__class__ = TableAttention
            elif type(module) is SwinTransformerBlock:
                module.__class__ = TraceableSwinBlock
        tile_mlps(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, H / 32, W / 32, C), normed."""
        if is_empty(x):
            return of_none(self.forward_features, x)
        return of_this_size(super().forward_features(x), x)

    def positions(self) -> Iterator[Positions]:
        """The learned positions, for loading a checkpoint of another size."""
        for index, stage in enumerate(self.layers):
            yield from module_positions(stage, f"layers.{index}", index)
            for name, module in stage.named_modules(prefix=f"layers.{index}"):
                if isinstance(module, TableAttention):
                    yield Positions(f"{name}.{module.positions_name}", module, self._softmax_windows(index))

    def _softmax_windows(self, index: int) -> Callable[[Grid], list[Grid]]:
        """The windows of a stage where the patches tile a map: scaled with it or fixed, and clipped."""
        fixed = self._ref_window_sizes[index]

        def windows(stem: Grid) -> list[Grid]:
            size = stage_maps(stem, index + 1)[index]
            (scaled,) = windows_at(stem, [fixed], self._ref_grid_size)
            return [(min(w[0], size[0]), min(w[1], size[1])) for w in (scaled, fixed) if w is not None]

        return windows

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
        window_size: Any = None,
        window_ratio: int | Sequence[int] | None = None,
        always_partition: bool | None = None,
    ) -> None:
        """Resamples the encodings and tables of positions for another input size, and resizes the windows.

        Without `window_size` and `window_ratio` a stage that attends over its whole map goes on doing so, and
        other windows keep their ratio to the patch grid.

        Args:
            img_size: (height, width) of the input; None is the present one.
            patch_size: (height, width) of the patches; None is the present one.
            window_size: windows from now on, as of the class.
            window_ratio: or: the patch grid divided by this number, or by one for each stage.
            always_partition: of stages of type "S": shift windows that cover the map too.
        """
        stages = len(self.layers)
        references = [
            None if _covers_map(stage) else window
            for stage, window in zip(self.layers, self._ref_window_sizes[:stages], strict=True)
        ]
        # Windows are checked before any part of the model changes.
        explicit = window_size is not None or window_ratio is not None
        _check_softmax_windows(
            ["L" if _is_linear(stage) else "S" for stage in self.layers],
            windows_at((1, 1), references, (1, 1), window_size, window_ratio),
        )
        if img_size is not None or patch_size is not None:
            self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        if patch_size is not None:
            for index, info in enumerate(self.feature_info):
                info["reduction"] = max(self.patch_embed.patch_size) << index
        grid = tuple(self.patch_embed.grid_size)
        windows = windows_at(grid, references, self._ref_grid_size, window_size, window_ratio)
        if explicit:
            self._ref_window_sizes, self._ref_grid_size = windows, grid
        before = grid
        for stage, size, window in zip(self.layers, stage_maps(grid, stages), windows, strict=True):
            stage.input_resolution, stage.output_resolution = before, size
            for block in stage.blocks:
                block.set_input_size(size, window, always_partition)
            before = size
        record_input_size(
            self,
            self.patch_embed.img_size,
            patch_size=patch_size,
            window_size=windows,
            always_partition=always_partition,
        )

    def init_weights(self, mode: str = "", **kwargs: Any) -> None:
        """As timm's, after every `reset_parameters`: not all releases of timm call them."""
        if kwargs.get("needs_reset", True):
            reset_modules(self)
        super().init_weights(mode, **kwargs)

    def reset_parameters(self) -> None:
        """Fills the tables, indices and masks of softmax windows, as older releases of timm do not."""
        for block in self.modules():
            if not isinstance(block, SwinTransformerBlock) or hasattr(block, "reset_parameters"):
                continue
            attn = block.attn
            trunc_normal_(attn.relative_position_bias_table, std=0.02)
            index = attn.relative_position_index
            index.copy_(get_relative_position_index(*attn.window_size, device=index.device))
            if block.attn_mask is not None:
                mask = block.attn_mask
                mask.copy_(block.get_attn_mask(device=mask.device, dtype=mask.dtype))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's; the norm and the classifier, sized for the last stage, go with it."""
        stages = len(self.layers)
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if len(self.layers) < stages:  # older releases of timm leave both
            self.norm = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[len(self.layers) - 1]["num_chs"]
            self.reset_classifier(0, "")
        return take

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | undecayed(self)


def _is_linear(stage: Any) -> bool:
    return all(isinstance(block, FlattenSwinBlock) for block in stage.blocks)


def _covers_map(stage: Any) -> bool:
    return all(isinstance(block, FlattenSwinBlock) and block.window is None for block in stage.blocks)


def _check_softmax_windows(types: Sequence[str], windows: Sequence[StageWindow]) -> None:
    for index, (kind, window) in enumerate(zip(types, windows, strict=True)):
        if kind != "L" and window is None:
            raise ValueError(
                f"window_size of stage {index} is None, the whole map, which only stages of type L can have; "
                f"this one is of type {kind}"
            )


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any, **origin: Any) -> dict[str, Any]:
    """Public or own checkpoint -> state_dict of `model`; `resample_positions` tells of `origin`."""
    state_dict, out = unwrap(state_dict), {}
    # The public code downsamples at the end of a stage, timm at the start of the next.
    published = "layers.0.downsample.reduction.weight" in state_dict
    for key, value in state_dict.items():
        if published:
            key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)
            key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        if key == "patch_embed.proj.weight" and value.shape[2:] != model.patch_embed.proj.weight.shape[2:]:
            value = resample_patch_embed(value, list(model.patch_embed.proj.weight.shape[2:]))
        out[key] = value
    return resample_positions(out, model, metadata_of(state_dict), published=published, **origin)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    return build(FlattenSwinTransformer, variant, pretrained, checkpoint_filter_fn, kwargs)


default_cfgs = generate_default_cfgs(
    {
        "flatten_swin_tiny.in1k": default_cfg(published="e1518e76703e4e57a7f2", classifier="head.fc"),
        "flatten_swin_small.in1k": default_cfg(published="94188e52af354bf4a88b", classifier="head.fc"),
        "flatten_swin_base.in1k": default_cfg(published="7a9e5186bad04e7fb3a9", classifier="head.fc"),
        "flatten_swin_base_384.in1k": default_cfg(384, "0d0330cf2e5249f1abb6", classifier="head.fc"),
    }
)

TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}


@register_model
def flatten_swin_tiny(pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    """FLatten-Swin-T at 224 px."""
    args = {**TINY, "drop_path_rate": 0.2}
    return _create("flatten_swin_tiny", pretrained, **{**args, **kwargs})


@register_model
def flatten_swin_small(pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    """FLatten-Swin-S at 224 px."""
    args = {**TINY, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
    return _create("flatten_swin_small", pretrained, **{**args, **kwargs})


@register_model
def flatten_swin_base(pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    """FLatten-Swin-B at 224 px."""
    args = {**BASE, "drop_path_rate": 0.5}
    return _create("flatten_swin_base", pretrained, **{**args, **kwargs})


@register_model
def flatten_swin_base_384(pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    """FLatten-Swin-B at 384 px."""
    args = {**BASE, "img_size": 384, "softmax_window": 12, "drop_path_rate": 0.5}
    return _create("flatten_swin_base_384", pretrained, **{**args, **kwargs})
