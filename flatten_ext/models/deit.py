"""FLatten-DeiT: a vision transformer with focused linear attention in every block (ICCV 2023, table 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import checkpoint_filter_fn as _timm_filter
from torch import Tensor, nn

from .._grids import KeepsGrid
from ._attention import PackedAttention, Size, to_map
from ._build import build
from ._checkpoint import unwrap
from ._choice import choose
from ._fx import TraceablePositions
from ._mlp import tile_mlps
from ._positions import Positions, metadata_of, module_positions, resample_positions
from ._timm import (
    check_attention_dropout,
    default_cfg,
    is_empty,
    of_none,
    of_this_size,
    reset_modules,
    undecayed,
)

__all__ = ["FlattenBlock", "FlattenVisionTransformer", "FlattenVisionTransformerDistilled"]


@torch.fx.wrap
def _refuse_masks(attn_mask: Any, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("focused linear attention takes no mask")


class FlattenBlock(nn.Module):
    """Takes the place of a ViT block, keeping its norms, projections, layer scales and MLP."""

    def __init__(
        self, block: Block, grid: Size, attention: Callable[..., nn.Module] = PackedAttention, **options: Any
    ):
        super().__init__()
        if not isinstance(getattr(block.attn, "q_norm", None), nn.Identity):
            raise ValueError("focused attention normalises q and k itself: qk_norm has no counterpart")
        self.norm1, self.ls1, self.drop_path1 = block.norm1, block.ls1, block.drop_path1
        self.norm2, self.ls2, self.drop_path2 = block.norm2, block.ls2, block.drop_path2
        self.mlp = block.mlp
        self.attn: Any = attention(block.attn, grid, **options)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """(B, prefix + H * W, C) tokens, `size` = (H, W) -> the same."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), size)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class FocusedTokens(KeepsGrid, TraceablePositions):
    """Passes the map that the patches tile to the blocks of a vision transformer."""

    blocks: nn.Sequential
    positions_name = "pos_embed"
    has_public_code = False  # there is none of FLatten-DeiT

    def positions_grid(self) -> Size | None:
        return None if self.pos_embed is None else self.patch_embed.grid_size

    def positions(self) -> Iterator[Positions]:
        """The learned positions, for loading a checkpoint of another size."""
        if self.pos_embed is not None:
            yield Positions(self.positions_name, self, lambda stem: [stem])
        yield from module_positions(self.blocks, "blocks", 0)

    def focus(self, types: str, attention: Callable[..., nn.Module]) -> None:
        """Replaces block i where types[i] is "L"."""
        if len(self.blocks) != len(types) or set(types) - {"L", "S"}:
            raise ValueError(f"expected {len(self.blocks)} letters, each L or S, got {types!r}")
        if not isinstance(self.patch_drop, nn.Identity):
            raise ValueError("patch_drop_rate leaves tokens that tile no map")
        grid, prefix = self.patch_embed.grid_size, self.num_prefix_tokens
        self.blocks = nn.Sequential(
            *(
                FlattenBlock(block, grid, attention, num_prefix_tokens=prefix) if kind == "L" else block
                for block, kind in zip(self.blocks, types, strict=True)
            )
        )
        tile_mlps(self)

    def init_weights(self, mode: str = "", **kwargs: Any) -> None:
        """As timm's, after every `reset_parameters`: not all releases of timm call them."""
        if kwargs.get("needs_reset", True):
            reset_modules(self)
        super().init_weights(mode, **kwargs)

    def reset_parameters(self) -> None:
        """timm's initialisation of the parameters that lie in no layer: positions and leading tokens."""
        for parameter, std in (
            (self.pos_embed, 0.02),
            (self.cls_token, 1e-6),
            (self.reg_token, 1e-6),
            (getattr(self, "dist_token", None), 0.02),
        ):
            if parameter is not None:
                trunc_normal_(parameter, std=std)

    def _embed(self, x: Tensor) -> tuple[Tensor, Size]:
        size = self.patch_embed.dynamic_feat_size(x.shape[2:])
        return self.norm_pre(self._pos_embed(self.patch_embed(x))), size

    def _run(self, block: nn.Module, x: Tensor, size: Size) -> Tensor:
        args = (x, size) if isinstance(block, FlattenBlock) else (x,)
        return checkpoint(block, *args) if self.grad_checkpointing else block(*args)

    def forward_features(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """(B, in_chans, H, W) -> (B, prefix + patches, C), normed. Linear attention has no mask."""
        _refuse_masks(attn_mask, is_causal)
        if is_empty(x):
            return of_none(self.forward_features, x)
        image = x
        x, size = self._embed(image)
        for block in self.blocks:
            x = self._run(block, x, size)
        return of_this_size(self.norm(x), image)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As timm's vision transformer, for blocks that are told their map."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        x, size = self._embed(x)
        outputs = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run(block, x, size)
            if i in take:
                outputs.append(self.norm(x) if norm else x)
        prefix = [y[:, : self.num_prefix_tokens] for y in outputs]
        intermediates: list[Any] = [y[:, self.num_prefix_tokens :] for y in outputs]
        if output_fmt == "NCHW":
            intermediates = [to_map(y, size) for y in intermediates]
        if return_prefix_tokens:
            intermediates = list(zip(intermediates, prefix, strict=True))
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """As timm's; resamples the positional encodings of the attention too."""
        super().set_input_size(img_size, patch_size)
        for block in self.blocks:
            if isinstance(block, FlattenBlock):
                block.attn.set_grid(self.patch_embed.grid_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | undecayed(self)


class FlattenVisionTransformer(FocusedTokens):
    """Vision transformer with focused, or another, linear attention in every block.

    The class token attends like any other token and is left out of the depthwise branch. The public code
    has no DeiT; the paper gives 6.1 M parameters and 1.1 G FLOPs (multiply-adds) for FLatten-DeiT-T at
    224 px. Counted here: 6.19 M and 1.14 G; S 22.98 M and 4.38 G; B 88.41 M and 17.13 G.

    Args:
        attn_type: "L" (linear) or "S" (softmax) for each block; None is "L" throughout.
        attention: the linear attention: "flatten", "inline", "pola", "mila", "rala" or "mala".
        focusing_factor: p of phi_p.
        kernel_size: odd size of the depthwise kernel.
        dynamic_img_size: accept any input size; on by default.
        dynamic_img_pad: pad inputs that the patches do not divide; on by default. (timm's check without it
            formats the size into a message, which makes torch.compile specialise on it.)
        kwargs: timm's VisionTransformer arguments.
    """

    def __init__(
        self,
        attn_type: str | None = None,
        attention: str = "flatten",
        focusing_factor: float = 3.0,
        kernel_size: int = 5,
        dynamic_img_size: bool = True,
        dynamic_img_pad: bool = True,
        **kwargs: Any,
    ):
        super().__init__(dynamic_img_size=dynamic_img_size, dynamic_img_pad=dynamic_img_pad, **kwargs)
        self.has_public_code = attention == "inline"
        types = attn_type or "L" * len(self.blocks)
        check_attention_dropout(types, kwargs.get("attn_drop_rate", 0.0))
        self.focus(
            types, choose(attention, "packed", focusing_factor=focusing_factor, kernel_size=kernel_size)
        )


class FlattenVisionTransformerDistilled(FocusedTokens, VisionTransformerDistilled):
    """What `flatten_ext.convert` makes of timm's distilled DeiT, whose two tokens are both prefixes."""


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any, **origin: Any) -> dict[str, Any]:
    """Public or own checkpoint -> state_dict of `model`; `resample_positions` tells of `origin`."""
    state_dict = unwrap(state_dict)
    # The public code has square maps, and the names that ours have. Where nothing says what map it was it is
    # taken for theirs, but not where it may be that of this model, a rectangle of as many patches.
    height, width = model.patch_embed.grid_size
    tokens = getattr(state_dict.get("pos_embed"), "shape", (0, 0))[1] - model.num_prefix_tokens
    published = model.has_public_code and (height == width or height * width != tokens)
    # timm takes the embedding for that of a square map.
    embedding = {key: state_dict[key] for key in ("pos_embed",) if key in state_dict}
    rest = {key: value for key, value in state_dict.items() if key not in embedding}
    return resample_positions(
        {**_timm_filter(rest, model), **embedding},
        model,
        metadata_of(state_dict),
        published=published,
        **origin,
    )


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> FlattenVisionTransformer:
    return build(FlattenVisionTransformer, variant, pretrained, checkpoint_filter_fn, kwargs, out_indices=3)


default_cfgs = generate_default_cfgs(
    {f"flatten_deit_{size}.untrained": default_cfg(pool_size=None) for size in ("tiny", "small", "base")}
)


@register_model
def flatten_deit_tiny(pretrained: bool = False, **kwargs: Any) -> FlattenVisionTransformer:
    """FLatten-DeiT-T at 224 px, 16 x 16 patches."""
    args = {"embed_dim": 192, "num_heads": 3, "drop_path_rate": 0.1}
    return _create("flatten_deit_tiny", pretrained, {**args, **kwargs})


@register_model
def flatten_deit_small(pretrained: bool = False, **kwargs: Any) -> FlattenVisionTransformer:
    """FLatten-DeiT-S at 224 px, 16 x 16 patches."""
    args = {"embed_dim": 384, "num_heads": 6, "drop_path_rate": 0.1}
    return _create("flatten_deit_small", pretrained, {**args, **kwargs})


@register_model
def flatten_deit_base(pretrained: bool = False, **kwargs: Any) -> FlattenVisionTransformer:
    """FLatten-DeiT-B at 224 px, 16 x 16 patches."""
    args = {"embed_dim": 768, "num_heads": 12, "drop_path_rate": 0.1}
    return _create("flatten_deit_base", pretrained, {**args, **kwargs})
