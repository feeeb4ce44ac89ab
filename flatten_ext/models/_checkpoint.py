"""What every family does with a checkpoint: out of its wrappers, and into a model whole."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from timm.layers import to_2tuple
from torch import Tensor, nn

from ._positions import metadata_of
from ._reading import read_state_dict
from ._timm import stem_grid

__all__ = ["for_pretrained", "grid_pair", "load_weights", "unwrap"]

# Buffers of the public models that every model here rebuilds.
_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask", "rope.rotations", "RoPE.angle")


def unwrap(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The state_dict inside a checkpoint with its metadata, without the buffers that are rebuilt."""
    for key in ("model", "state_dict"):
        checkpoint = checkpoint.get(key, checkpoint)
    kept = OrderedDict((key, value) for key, value in checkpoint.items() if not key.endswith(_BUFFERS))
    kept._metadata = metadata_of(checkpoint)  # type: ignore[attr-defined]
    return kept


def for_pretrained(filter_fn: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """A family's filter as timm calls it: the weights' image size is that of their configuration.

    Only where the configuration came with weights: ours on their own describe the published ones.
    """

    def load(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
        cfg = model.pretrained_cfg
        if not any(cfg.get(source) for source in ("url", "file", "hf_hub_id", "state_dict")):
            return filter_fn(state_dict, model, own=False)
        args = getattr(model, "pretrained_model_args", None) or {}
        size = args.get("img_size") or cfg["input_size"][1:]
        return filter_fn(state_dict, model, hint=stem_grid(model, to_2tuple(size)), own=False)

    return load


def grid_pair(grid: Any) -> tuple[int, int] | None:
    """`load_official`'s grid as height and width."""
    if grid is None:
        return None
    pair = to_2tuple(grid)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"grid is {grid!r}, expected a positive number or two of them (height, width)")
    return pair


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
    new_classifier: bool = False,
) -> nn.Module:
    """The whole of a checkpoint into any model: `filter_fn` (state_dict, model) renames and resamples."""
    state_dict = filter_fn(unwrap(read_state_dict(path)), model)
    expected = model.state_dict()
    if new_classifier:
        for key in _other_classifier(model, state_dict, expected):
            state_dict[key] = expected[key]
    differences = [f"missing: {key}" for key in expected if key not in state_dict]
    differences += [f"unexpected: {key}" for key in state_dict if key not in expected]
    differences += [
        f"shape: {key} is {tuple(value.shape)}, the model has {tuple(expected[key].shape)}"
        for key, value in state_dict.items()
        if key in expected and value.shape != expected[key].shape
    ]
    if differences:
        raise ValueError(
            f"{os.fspath(path)} does not fit {type(model).__name__}:\n  " + "\n  ".join(differences)
        )
    model.load_state_dict(state_dict)
    return model


def _other_classifier(model: Any, state_dict: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The classifier's parameters, if the checkpoint's have another shape."""
    names = model.pretrained_cfg["classifier"]
    prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    keys = [key for key in expected if key.startswith(prefixes) and key in state_dict]
    return keys if any(state_dict[key].shape != expected[key].shape for key in keys) else []
