"""InLine attention (NeurIPS 2024, arXiv 2412.06590) in Swin, PVT, DeiT and CSwin.

As LeapLabTHU/InLine has them at commit e463a6f.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model

from . import cswin, deit, pvt, swin
from ._build import build
from ._timm import default_cfg
from ._windows import default_windows
from .cswin import FlattenCSWinTransformer
from .deit import FlattenVisionTransformer
from .pvt import FlattenPyramidTransformer
from .swin import FlattenSwinTransformer

__all__: list[str] = []


def _cfg(size: int = 224, published: bool = True, **kwargs: Any) -> dict[str, Any]:
    origin = "https://github.com/LeapLabTHU/InLine" if published else None
    return default_cfg(size, origin_url=origin, license=None, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        **{f"inline_swin_{size}.in1k": _cfg(classifier="head.fc") for size in ("tiny", "small", "base")},
        "inline_swin_base_384.in1k": _cfg(384, published=False, classifier="head.fc"),
        **{f"inline_pvt_{size}.in1k": _cfg() for size in ("tiny", "small", "medium", "large")},
        "inline_deit_tiny.in1k": _cfg(pool_size=None),
        "inline_deit_small.in1k": _cfg(288, pool_size=None),
        "inline_deit_base.in1k": _cfg(448, pool_size=None),
        **{f"inline_cswin_{size}.in1k": _cfg() for size in ("tiny", "small", "base")},
        "inline_cswin_base_384.in1k": _cfg(384, published=False),
    }
)


def _swin(variant: str, pretrained: bool, kwargs: dict[str, Any], **args: Any) -> FlattenSwinTransformer:
    args = {**args, "attention": "inline", **kwargs}
    return build(FlattenSwinTransformer, variant, pretrained, swin.checkpoint_filter_fn, args)


@register_model
def inline_swin_tiny(pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    """InLine-Swin-T at 224 px."""
    args = {**swin.TINY, "attn_type": "LLLS", "drop_path_rate": 0.2}
    return _swin("inline_swin_tiny", pretrained, kwargs, **args)


@register_model
def inline_swin_small(pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    """InLine-Swin-S at 224 px."""
    args = {**swin.TINY, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
    return _swin("inline_swin_small", pretrained, kwargs, **args)


@register_model
def inline_swin_base(pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    """InLine-Swin-B at 224 px."""
    args = {**swin.BASE, "attn_type": "LLMS", "drop_path_rate": 0.5}
    return _swin("inline_swin_base", pretrained, kwargs, **args)


@register_model
def inline_swin_base_384(pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    """InLine-Swin-B at 384 px."""
    windows = default_windows(kwargs.get("attn_type", "LLMS"), softmax=12)
    args = {**swin.BASE, "attn_type": "LLMS", "img_size": 384, "window_size": windows, "drop_path_rate": 0.5}
    return _swin("inline_swin_base_384", pretrained, kwargs, **args)


def _pvt(variant: str, pretrained: bool, kwargs: dict[str, Any], **args: Any) -> FlattenPyramidTransformer:
    args = {**args, "num_heads": (2, 4, 10, 16), "attention": "inline", "resampling": "bilinear", **kwargs}
    return build(FlattenPyramidTransformer, variant, pretrained, pvt.checkpoint_filter_fn, args)


@register_model
def inline_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformer:
    """InLine-PVT-T."""
    return _pvt("inline_pvt_tiny", pretrained, kwargs, drop_path_rate=0.1)


@register_model
def inline_pvt_small(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformer:
    """InLine-PVT-S."""
    return _pvt("inline_pvt_small", pretrained, kwargs, depths=(3, 4, 6, 3), drop_path_rate=0.1)


@register_model
def inline_pvt_medium(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformer:
    """InLine-PVT-M."""
    return _pvt("inline_pvt_medium", pretrained, kwargs, depths=(3, 4, 18, 3), drop_path_rate=0.3)


@register_model
def inline_pvt_large(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformer:
    """InLine-PVT-L."""
    return _pvt("inline_pvt_large", pretrained, kwargs, depths=(3, 8, 27, 3), drop_path_rate=0.3)


def _deit(variant: str, pretrained: bool, kwargs: dict[str, Any], **args: Any) -> FlattenVisionTransformer:
    args = {**args, "attention": "inline", **kwargs}
    return build(
        FlattenVisionTransformer, variant, pretrained, deit.checkpoint_filter_fn, args, out_indices=3
    )


@register_model
def inline_deit_tiny(pretrained: bool = False, **kwargs: Any) -> FlattenVisionTransformer:
    """InLine-DeiT-T at 224 px, 16 x 16 patches."""
    return _deit("inline_deit_tiny", pretrained, kwargs, embed_dim=192, num_heads=6, drop_path_rate=0.1)


@register_model
def inline_deit_small(pretrained: bool = False, **kwargs: Any) -> FlattenVisionTransformer:
    """InLine-DeiT-S at 288 px, 16 x 16 patches."""
    args = {"img_size": 288, "embed_dim": 320, "num_heads": 10, "drop_path_rate": 0.1}
    return _deit("inline_deit_small", pretrained, kwargs, **args)


@register_model
def inline_deit_base(pretrained: bool = False, **kwargs: Any) -> FlattenVisionTransformer:
    """InLine-DeiT-B at 448 px, 16 x 16 patches."""
    args = {"img_size": 448, "embed_dim": 384, "num_heads": 12, "drop_path_rate": 0.1}
    return _deit("inline_deit_base", pretrained, kwargs, **args)


def _cswin(variant: str, pretrained: bool, kwargs: dict[str, Any], **args: Any) -> FlattenCSWinTransformer:
    args = {**args, "attention": "inline", **kwargs}
    return build(FlattenCSWinTransformer, variant, pretrained, cswin.checkpoint_filter_fn, args)


@register_model
def inline_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> FlattenCSWinTransformer:
    """InLine-CSwin-T at 224 px."""
    return _cswin("inline_cswin_tiny", pretrained, kwargs, drop_path_rate=0.2)


@register_model
def inline_cswin_small(pretrained: bool = False, **kwargs: Any) -> FlattenCSWinTransformer:
    """InLine-CSwin-S at 224 px."""
    return _cswin("inline_cswin_small", pretrained, kwargs, depths=(3, 6, 29, 2), drop_path_rate=0.4)


@register_model
def inline_cswin_base(pretrained: bool = False, **kwargs: Any) -> FlattenCSWinTransformer:
    """InLine-CSwin-B at 224 px."""
    return _cswin("inline_cswin_base", pretrained, kwargs, **cswin.BASE, drop_path_rate=0.5)


@register_model
def inline_cswin_base_384(pretrained: bool = False, **kwargs: Any) -> FlattenCSWinTransformer:
    """InLine-CSwin-B at 384 px."""
    args = {**cswin.BASE, "img_size": 384, "split_sizes": (1, 2, 12, 12), "drop_path_rate": 0.7}
    return _cswin("inline_cswin_base_384", pretrained, kwargs, **args)
