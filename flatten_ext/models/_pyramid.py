"""What the pyramids PVT, PVTv2 and CSWin share: four stages on maps of stride 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import Tensor, nn

from ._attention import Size, to_map
from ._mlp import tile_mlps
from ._positions import Positions, module_positions
from ._timm import is_empty, of_none, of_this_size, reset_modules, undecayed

__all__ = ["NormedPyramid", "Pyramid", "PyramidStage", "init_linear", "on_map", "stage_sizes"]


def stage_sizes(img_size: int | tuple[int, int], stages: int = 4) -> list[tuple[int, int]]:
    """The maps of strides 4, 8, 16, 32 of an image, rounded up."""
    height, width = to_2tuple(img_size)
    return [(-(-height // stride), -(-width // stride)) for stride in (4 << i for i in range(stages))]


def init_linear(module: nn.Module) -> None:
    """The initialisation of PVT and CSWin: truncated normal of 0.02; convolutions keep torch's."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def on_map(conv: nn.Module, x: Tensor, size: Size) -> Tensor:
    """A convolution that keeps the map, of (B, H * W, C) tokens -> (B, H * W, C)."""
    return conv(to_map(x, size)).flatten(2).transpose(1, 2)


class PyramidStage(nn.Module):
    """Embedding of (B, C, H, W) images as (B, H, W, C') patches, then blocks of (B, H * W, C') tokens.

    Args:
        embed: downsampling to (B, H', W', C'), or None where the tokens come embedded.
        blocks: modules called as block(tokens, size).
    """

    def __init__(self, embed: nn.Module | None, blocks: list[nn.Module]):
        super().__init__()
        self.downsample = embed
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def add_positions(self, x: Tensor) -> Tensor:
        """A hook for absolute position embeddings: (B, H, W, C) -> the same."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), or (B, H, W, C) without `embed` -> (B, C', H', W')."""
        if self.downsample is not None:
            x = self.downsample(x)
        x = self.add_positions(x)
        size = x.shape[1:3]
        x = x.flatten(1, 2)
        for block in self.blocks:
            x = checkpoint(block, x, size) if self.grad_checkpointing else block(x, size)
        return to_map(x, size)


class Pyramid(PyramidVisionTransformerV2):
    """timm's PVTv2 contract (features, classifier, checkpointing) for any pyramid of focused attention.

    A subclass that is not PVTv2 itself calls `build` instead of timm's constructor.
    """

    def build(
        self,
        stem: nn.Module,
        stage: Callable[[int, list[float]], nn.Module],
        embed_dims: tuple[int, ...],
        depths: tuple[int, ...],
        *,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        drop_path_rate: float,
        device: Any,
        dtype: Any,
    ) -> None:
        """Assembles the model from its stem and `stage(index, drop_path_rates)`."""
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")
        self.num_classes, self.global_pool, self.depths = num_classes, global_pool, depths
        self.patch_embed = stem
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        self.stages = nn.Sequential(*(stage(i, rate) for i, rate in enumerate(rates)))
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 << i, "module": f"stages.{i}"} for i, dim in enumerate(embed_dims)
        ]
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(embed_dims[-1], num_classes, device=device, dtype=dtype)
        tile_mlps(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H / 32, W / 32)."""
        if is_empty(x):
            return of_none(self.forward_features, x)
        return of_this_size(super().forward_features(x), x)

    def positions(self) -> Iterator[Positions]:
        """The learned positions, for loading a checkpoint of another size."""
        for index, stage in enumerate(self.stages):
            yield from module_positions(stage, f"stages.{index}", index)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialises the model anew, for instance after `to_empty` of a model built on the meta device.

        Args:
            needs_reset: call every module's `reset_parameters` first, as timm's models do.
        """
        if needs_reset:
            reset_modules(self)
        self.apply(self._init_weights)

    def _init_weights(self, m: nn.Module) -> None:
        init_linear(m)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resamples every positional encoding for images of another size."""
        self.img_size = to_2tuple(img_size)
        for stage, size in zip(self.stages, stage_sizes(img_size), strict=False):
            for module in stage.modules():
                resize: Any = getattr(module, "set_feat_size", None)
                if resize is not None:
                    resize(size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return undecayed(self)


class NormedPyramid(Pyramid):
    """A pyramid whose last features go through `norm`."""

    norm: nn.Module

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H / 32, W / 32), normed."""
        if is_empty(x):
            return of_none(self.forward_features, x)
        return self.norm(super().forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As timm's pyramids; the final features, and with `norm` the last stage's, are normed."""
        take, last = feature_take_indices(len(self.stages), indices)
        x, intermediates = super().forward_intermediates(
            x, indices, stop_early=stop_early, output_fmt=output_fmt
        )
        if norm and len(self.stages) - 1 in take:
            intermediates[-1] = self.norm(intermediates[-1])
        if intermediates_only:
            return intermediates
        return x if stop_early and last < len(self.stages) - 1 else self.norm(x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's pyramids; the norm, sized for the last stage, goes with it."""
        stages = len(self.stages)
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm or len(self.stages) < stages:
            self.norm = nn.Identity()
        return take
