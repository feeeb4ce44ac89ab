"""The local term beside an attention: a depthwise layer over the values, convolved or called.

A plain layer's weight is read, and `flatten_ext.depthwise_conv` convolves the tokens as they lie. Any other
layer (see `_layers`) is called, on maps made of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ._layers import is_plain_conv
from .ops import depthwise_conv
from .reference import from_windows, to_windows

Size = Sequence[int]  # height, width

# torch.fx records their calls whole: they look into sizes, which have no values while it traces.
torch.fx.wrap("from_windows")
torch.fx.wrap("to_windows")

__all__ = ["Size", "along_tokens", "call_layer", "device_of", "local_layer", "local_term"]


def local_layer(channels: int, kernel_size: Size, **dd: Any) -> nn.Conv2d:
    """A depthwise layer that keeps the map's size."""
    padding = (kernel_size[0] // 2, kernel_size[1] // 2)
    return nn.Conv2d(
        channels, channels, (kernel_size[0], kernel_size[1]), padding=padding, groups=channels, **dd
    )


def device_of(x: Any) -> torch.device | None:
    """The device of x; None, for any, while torch.fx traces."""
    return None if isinstance(x, Proxy) else x.device


def along_tokens(v: Tensor, count: Any) -> Tensor:
    """(B, M, C) tokens of a reduced map -> (B, count, C), linear along the tokens as in PVT's code."""
    return F.interpolate(v.transpose(1, 2), count, mode="linear").transpose(1, 2)


def local_term(
    layer: nn.Module,
    channels: int,
    v: Tensor,
    size: Size,
    window: Size | None = None,
    shift: Size | None = None,
) -> Tensor:
    """What `layer`, over maps of `channels` channels, adds to the tokens v, in their dtype.

    Prefix tokens get 0.
    """
    if is_plain_conv(layer, channels, device_of(v)):
        weight: Any = layer.weight
        bias: Any = layer.bias
        return depthwise_conv(v, weight, bias, (size[0], size[1]), window, shift)
    return call_layer(layer, channels, v, size, window, shift).to(v.dtype)


def call_layer(
    layer: nn.Module, channels: int, v: Tensor, size: Size, window: Size | None, shift: Size | None
) -> Tensor:
    """What `layer`, called once on all maps (or windows) of `channels` channels, adds to the tokens.

    Channel c of v is channel c % channels of a map; prefix tokens get 0.
    """
    height, width = size if window is None else window
    prefix = v.shape[1] - size[0] * size[1]
    tokens = v[:, prefix:].unsqueeze(1) if window is None else to_windows(v, size, window, shift)
    batch, windows = tokens.shape[:2]
    heads = v.shape[2] // channels
    maps = tokens.unflatten(-1, (heads, channels)).permute(0, 1, 3, 4, 2)
    maps = layer(maps.flatten(0, 2).unflatten(-1, (height, width)))
    tokens = maps.flatten(2).unflatten(0, (batch, windows, heads)).permute(0, 1, 4, 2, 3).flatten(3)
    if window is None:
        return F.pad(tokens.squeeze(1), (0, 0, prefix, 0))
    return from_windows(tokens, size, window, shift)
