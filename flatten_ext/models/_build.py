"""Building a registered model, and what is said of weights that nobody can download."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from ._checkpoint import for_pretrained
from ._timm import default_cfg

__all__ = ["Variants", "build", "register"]


class Variants(NamedTuple):
    """Published models of one class: its arguments for each name, and what timm is to know of them."""

    cls: type[nn.Module]
    filter_fn: Callable[..., Any]
    arguments: Mapping[str, Mapping[str, Any]]
    cfg: Mapping[str, Any] = {}
    out_indices: int | Sequence[int] = (0, 1, 2, 3)


def register(module: str, origin: str, *groups: Variants, unpublished: Sequence[str] = ()) -> None:
    """Registers a function for each variant with timm, and gives it to the module.

    Args:
        module: the name of the module that the functions belong to.
        origin: the repository, after github.com, that lists the checkpoints.
        groups: the variants.
        unpublished: names of those without a checkpoint.
    """
    namespace: Any = sys.modules[module]
    cfgs = getattr(namespace, "default_cfgs", {})
    for cls, filter_fn, variants, cfg, out_indices in groups:
        for name, arguments in variants.items():
            url = None if name in unpublished else f"https://github.com/{origin}"
            known = {"origin_url": url, "license": None, **cfg}
            made = {f"{name}.in1k": default_cfg(arguments.get("img_size", 224), **known)}
            namespace.default_cfgs = cfgs = {**cfgs, **generate_default_cfgs(made)}
            entry = _entry(name, cls, filter_fn, arguments, out_indices)
            entry.__module__ = module
            setattr(namespace, name, register_model(entry))


def _entry(name: str, cls: type[nn.Module], filter_fn: Any, arguments: Any, out_indices: Any) -> Any:
    def entry(pretrained: bool = False, **kwargs: Any) -> Any:
        return build(cls, name, pretrained, filter_fn, {**arguments, **kwargs}, out_indices)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"The published {name}."
    return entry


def build(
    cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[..., Any],
    kwargs: dict[str, Any],
    out_indices: int | Sequence[int] = (0, 1, 2, 3),
) -> Any:
    """Builds a registered model the way timm builds its own.

    Args:
        out_indices: the features that features_only gives unless asked for others.

    Raises:
        RuntimeError: pretrained weights without a place to take them from; the message says where they are.
    """
    if pretrained:
        _expect_weights(variant, kwargs)
    out_indices = kwargs.pop("out_indices", out_indices)
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=for_pretrained(filter_fn),
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


def _expect_weights(variant: str, kwargs: dict[str, Any]) -> None:
    cfg = resolve_pretrained_cfg(
        variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
    ).to_dict()
    if any(cfg.get(place) for place in ("state_dict", "file", "url", "hf_hub_id")):
        return
    if cfg.get("origin_url"):
        raise RuntimeError(
            f"pretrained is True, but nothing is downloaded: get the file linked for {variant} in "
            f"docs/models.md, {cfg['origin_url']}, and call flatten_ext.load_official(model, FILE)"
        )
    raise RuntimeError(
        f"pretrained is True, but weights of {variant} are not published; those of your own are taken from "
        "pretrained_cfg_overlay={'file': FILE}"
    )
