"""Loading the published checkpoints."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..nn import resize_positional_encoding
from ._attention import FocusedAttention
from ._reading import read_state_dict

__all__ = ["load_official", "load_weights", "resample_encodings", "resample_square", "unwrap"]

# Buffers of the public models that every model here rebuilds.
_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")


def unwrap(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The state_dict inside a checkpoint, without the buffers that are rebuilt."""
    for key in ("model", "state_dict"):
        checkpoint = checkpoint.get(key, checkpoint)
    return {key: value for key, value in checkpoint.items() if not key.endswith(_BUFFERS)}


def resample_square(encoding: Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0) -> Tensor:
    """(1, prefix + S*S, C), learned on a square map, -> the same on the map `grid`, bicubically."""
    side = math.isqrt(encoding.shape[1] - num_prefix_tokens)
    if side * side != encoding.shape[1] - num_prefix_tokens:
        raise ValueError(f"a positional encoding of {encoding.shape[1]} tokens does not tile a square map")
    return resize_positional_encoding(encoding, (side, side), grid, num_prefix_tokens)


def resample_encodings(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Brings the positional encodings of focused attention to the model's size."""
    out = dict(state_dict)
    for name, module in model.named_modules():
        key = f"{name}.positional_encoding"
        if not isinstance(module, FocusedAttention) or key not in out:
            continue
        if out[key].shape != module.positional_encoding.shape:
            out[key] = resample_square(out[key], module.grid, module.num_prefix_tokens)
    return out


def load_official(model: nn.Module, path: str | os.PathLike[str], new_classifier: bool = False) -> nn.Module:
    """Loads a published .pth file (`{"model": state_dict, ...}`, or a bare state_dict) into `model`, whole.

    Positional encodings and relative position tables are interpolated to the model's resolution; buffers
    that the model rebuilds are ignored.

    Args:
        model: a model of `flatten_ext.models`.
        path: the checkpoint. It is unpickled with weights_only, so it cannot run code; if it holds
            averaged (EMA) weights too, those are taken.
        new_classifier: for fine-tuning: leave the model's classifier as it is if it has another number of
            classes.

    Returns:
        `model`.

    Raises:
        TypeError: a model of none of the five families.
        FileNotFoundError: there is no file at `path`.
        ValueError: `path` is empty, damaged or holds no state_dict; or naming every parameter that is
            missing, unexpected, or of another shape. The model is then unchanged.
    """
    from . import checkpoint_filter

    return load_weights(model, path, checkpoint_filter(model), new_classifier)


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
    new_classifier: bool = False,
) -> nn.Module:
    """`load_official` for any model: `filter_fn` (state_dict, model) renames and resamples."""
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
