"""Building a registered model, and what is said of weights that nobody can download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from ._checkpoint import for_pretrained

__all__ = ["build"]


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
