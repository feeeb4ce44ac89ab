"""PolaFormer (ICLR 2025, arXiv 2501.15061) in Swin and PVT, at ZacharyMeng/PolaFormer 44cdd39."""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model

from . import pvt, swin
from ._build import build
from ._timm import default_cfg
from ._windows import default_windows
from .pvt import FlattenPyramidTransformer
from .swin import FlattenSwinTransformer

__all__: list[str] = []


def _cfg(size: int = 224, **kwargs: Any) -> dict[str, Any]:
    return default_cfg(size, origin_url="https://github.com/ZacharyMeng/PolaFormer", license=None, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        **{f"pola_swin_{size}.in1k": _cfg(classifier="head.fc") for size in ("tiny", "small", "base")},
        "pola_swin_base_384.in1k": _cfg(384, classifier="head.fc"),
        **{f"pola_pvt_{size}.in1k": _cfg() for size in ("tiny", "small", "medium", "large")},
    }
)


def _swin(variant: str, pretrained: bool, kwargs: dict[str, Any], **args: Any) -> FlattenSwinTransformer:
    args = {**args, "attention": "pola", **kwargs}
    return build(FlattenSwinTransformer, variant, pretrained, swin.checkpoint_filter_fn, args)


@register_model
def pola_swin_tiny(pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    """PolaFormer-Swin-T at 224 px."""
    return _swin("pola_swin_tiny", pretrained, kwargs, **swin.TINY, drop_path_rate=0.2)


@register_model
def pola_swin_small(pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    """PolaFormer-Swin-S at 224 px."""
    args = {**swin.TINY, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
    return _swin("pola_swin_small", pretrained, kwargs, **args)


@register_model
def pola_swin_base(pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    """PolaFormer-Swin-B at 224 px."""
    return _swin("pola_swin_base", pretrained, kwargs, **swin.BASE, drop_path_rate=0.5)


@register_model
def pola_swin_base_384(pretrained: bool = False, **kwargs: Any) -> FlattenSwinTransformer:
    """PolaFormer-Swin-B at 384 px."""
    windows = default_windows(kwargs.get("attn_type", "LLSS"), softmax=12)
    args = {**swin.BASE, "img_size": 384, "window_size": windows, "drop_path_rate": 0.5}
    return _swin("pola_swin_base_384", pretrained, kwargs, **args)


def _pvt(variant: str, pretrained: bool, kwargs: dict[str, Any], **args: Any) -> FlattenPyramidTransformer:
    args = {**args, "attention": "pola", "resampling": "bilinear", "unused_norm": True, **kwargs}
    return build(FlattenPyramidTransformer, variant, pretrained, pvt.checkpoint_filter_fn, args)


@register_model
def pola_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformer:
    """PolaFormer-PVT-T."""
    return _pvt("pola_pvt_tiny", pretrained, kwargs, drop_path_rate=0.1)


@register_model
def pola_pvt_small(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformer:
    """PolaFormer-PVT-S."""
    return _pvt("pola_pvt_small", pretrained, kwargs, depths=(3, 4, 6, 3), drop_path_rate=0.1)


@register_model
def pola_pvt_medium(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformer:
    """PolaFormer-PVT-M."""
    return _pvt("pola_pvt_medium", pretrained, kwargs, depths=(3, 4, 18, 3), drop_path_rate=0.3)


@register_model
def pola_pvt_large(pretrained: bool = False, **kwargs: Any) -> FlattenPyramidTransformer:
    """PolaFormer-PVT-L."""
    return _pvt("pola_pvt_large", pretrained, kwargs, depths=(3, 8, 27, 3), drop_path_rate=0.3)
