"""FLatten-PVTv2: Pyramid Vision Transformer v2 with focused linear attention (ICCV 2023, table 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.pvt_v2 import checkpoint_filter_fn as _timm_filter
from torch import nn

from ._build import build
from ._checkpoint import unwrap
from ._choice import choose
from ._mlp import tile_mlps
from ._positions import metadata_of, resample_positions
from ._pyramid import Pyramid, stage_sizes
from ._timm import attention_types, check_attention_dropout, default_cfg

__all__ = ["FlattenPyramidTransformerV2"]


class FlattenPyramidTransformerV2(Pyramid):
    """PVTv2 whose stages of type "L" attend by focused, or another, linear attention.

    Args:
        img_size: the input for which positional encodings are learned; any other resamples them.
        attn_type: "L" (linear) or "S" (softmax) for each stage.
        attention: the linear attention: "flatten", "inline", "pola", "mila", "rala" or "mala".
        sr_ratios: spatial reduction of keys and values in stages of type "S".
        la_sr_ratios: the same in stages of type "L"; the published models reduce nothing.
        focusing_factor: p of phi_p.
        kernel_size: odd size of the depthwise kernel.
        kwargs: timm's PyramidVisionTransformerV2 arguments (`linear=True`: keys and values pooled to 7 x 7).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        attn_type: str = "LLLL",
        attention: str = "flatten",
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        la_sr_ratios: Sequence[int] = (1, 1, 1, 1),
        focusing_factor: float = 3.0,
        kernel_size: int = 5,
        **kwargs: Any,
    ):
        types = attention_types(attn_type, len(sr_ratios))
        make = choose(attention, "pyramid", focusing_factor=focusing_factor, kernel_size=kernel_size)
        check_attention_dropout(types, kwargs.get("attn_drop_rate", 0.0))
        ratios = [
            la if kind == "L" else s for kind, s, la in zip(types, sr_ratios, la_sr_ratios, strict=True)
        ]
        super().__init__(sr_ratios=tuple(ratios), **kwargs)
        self.focus(types, img_size, make)

    def focus(self, types: str, img_size: int | tuple[int, int], attention: Callable[..., nn.Module]) -> None:
        """Replaces the attention of the stages of type "L"."""
        self.img_size = to_2tuple(img_size)
        for stage, kind, size in zip(self.stages, types, stage_sizes(img_size), strict=True):
            blocks: Any = stage.blocks if kind == "L" else ()
            for block in blocks:
                block.attn = attention(block.attn, size)
                # As every convolution of the family: normal, of variance 2 / fan-out.
                for name in ("dwc", "lepe"):
                    getattr(block.attn, name, nn.Identity()).apply(self._init_weights)
        tile_mlps(self)

    def _init_weights(self, m: nn.Module) -> None:
        PyramidVisionTransformerV2._init_weights(self, m)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module, **origin: Any) -> dict[str, Any]:
    """Public or own checkpoint -> state_dict of `model`; `resample_positions` tells of `origin`."""
    state_dict = unwrap(state_dict)
    published = "patch_embed1.proj.weight" in state_dict
    out = _timm_filter(state_dict, model)
    return resample_positions(out, model, metadata_of(state_dict), published=published, **origin)


default_cfgs = generate_default_cfgs(
    {
        "flatten_pvt_v2_b0.in1k": default_cfg(published="5d1f01532b104da28e7b"),
        **{f"flatten_pvt_v2_b{i}.in1k": default_cfg() for i in range(1, 6)},
    }
)

_B0 = {
    "depths": (2, 2, 2, 2),
    "embed_dims": (32, 64, 160, 256),
    "num_heads": (1, 2, 5, 8),
    "mlp_ratios": (8, 8, 4, 4),
    "drop_path_rate": 0.1,
}
_B1 = {**_B0, "embed_dims": (64, 128, 320, 512)}


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> FlattenPyramidTransformerV2:
    return build(FlattenPyramidTransformerV2, variant, pretrained, checkpoint_filter_fn, kwargs)


@register_model
def flatten_pvt_v2_b0(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformerV2:
    """FLatten-PVTv2-B0."""
    return _create("flatten_pvt_v2_b0", pretrained, {**_B0, **kwargs})


@register_model
def flatten_pvt_v2_b1(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformerV2:
    """FLatten-PVTv2-B1."""
    return _create("flatten_pvt_v2_b1", pretrained, {**_B1, **kwargs})


@register_model
def flatten_pvt_v2_b2(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformerV2:
    """FLatten-PVTv2-B2."""
    return _create("flatten_pvt_v2_b2", pretrained, {**_B1, "depths": (3, 4, 6, 3), **kwargs})


@register_model
def flatten_pvt_v2_b3(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformerV2:
    """FLatten-PVTv2-B3."""
    args = {**_B1, "depths": (3, 4, 18, 3), "drop_path_rate": 0.3}
    return _create("flatten_pvt_v2_b3", pretrained, {**args, **kwargs})


@register_model
def flatten_pvt_v2_b4(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformerV2:
    """FLatten-PVTv2-B4."""
    args = {**_B1, "depths": (3, 8, 27, 3), "drop_path_rate": 0.3}
    return _create("flatten_pvt_v2_b4", pretrained, {**args, **kwargs})


@register_model
def flatten_pvt_v2_b5(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformerV2:
    """FLatten-PVTv2-B5; the public code has the model but no training configuration for it."""
    args = {**_B1, "depths": (3, 6, 40, 3), "mlp_ratios": (4, 4, 4, 4), "drop_path_rate": 0.3}
    return _create("flatten_pvt_v2_b5", pretrained, {**args, **kwargs})
