"""The operators in plain torch: the oracle of the tests, and what runs on a device without kernels.

Every function follows the formula of focused linear attention (FLatten Transformer, ICCV 2023,
arXiv 2308.00442, section 4) term by term, works on any device and dtype, and differentiates any number of
times in any mode. It is written to be read; it allocates freely.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention", "depthwise_conv", "focus", "from_windows", "linear_attention", "to_windows"]


def focus(x: Tensor, scale: Tensor | None = None, focusing_factor: float = 3.0, eps: float = 1e-6) -> Tensor:
    """phi_p of equation 5: keeps each token's norm and sharpens its direction.

    phi(x) = y^p |y| / |y^p| with y = (relu(x) + eps) / scale; norms over all channels of a token. A row is
    divided by its largest entry first, so that no power overflows and none vanishes.

    Args:
        x: (..., C).
        scale: (C,), positive, or None for 1.
        focusing_factor: p >= 1; 1 gives plain ReLU features.
    """
    y = x.relu() + eps
    if scale is not None:
        y = y / scale
    # The largest entry only rescales the row and cancels, so its own gradient is nil. A row of zeros
    # (eps = 0) stays zero, with zero gradient.
    largest = y.detach().amax(-1, keepdim=True)
    alive = largest > 0
    y = torch.where(alive, y / torch.where(alive, largest, 1.0), 1.0)
    power = y if focusing_factor == 1 else y**focusing_factor
    phi = power * (y.square().sum(-1, keepdim=True).sqrt() / power.square().sum(-1, keepdim=True).sqrt())
    return torch.where(alive, phi * largest, 0.0)


def to_windows(x: Tensor, size: Sequence[int], window: Sequence[int], shift: Sequence[int] | None) -> Tensor:
    """(B, H*W, C) tokens in raster order -> (B, windows, wh*ww, C) of the map rolled by (-sh, -sw)."""
    (h, w), (wh, ww) = size, window
    x = x.reshape(x.shape[0], h, w, x.shape[-1])
    if shift is not None:
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    x = x.reshape(x.shape[0], h // wh, wh, w // ww, ww, x.shape[-1]).transpose(2, 3)
    return x.reshape(x.shape[0], (h // wh) * (w // ww), wh * ww, x.shape[-1])


def from_windows(
    x: Tensor, size: Sequence[int], window: Sequence[int], shift: Sequence[int] | None
) -> Tensor:
    """The inverse of `to_windows`: (B, windows, wh*ww, C) -> (B, H*W, C)."""
    (h, w), (wh, ww) = size, window
    x = x.reshape(x.shape[0], h // wh, w // ww, wh, ww, x.shape[-1]).transpose(2, 3)
    x = x.reshape(x.shape[0], h, w, x.shape[-1])
    if shift is not None:
        x = x.roll((shift[0], shift[1]), (1, 2))
    return x.reshape(x.shape[0], h * w, x.shape[-1])


def _attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, eps: float) -> Tensor:
    """o_h = (Q_h S_h) / (Q_h . m_h + eps) over (..., tokens, C), with S_h = K_h^T V_h / M, m_h = mean K_h."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(-2, -3) for x in (q, k, v))
    s = k.transpose(-2, -1) @ v / k.shape[-2]
    out = (q @ s) / ((q * k.mean(-2, keepdim=True)).sum(-1, keepdim=True) + eps)
    return out.transpose(-2, -3).flatten(-2)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int]) -> Tensor:
    """Zero-padded depthwise convolution of (images, h*w, C) tokens on an h x w map."""
    repeats = x.shape[-1] // weight.shape[0]  # kernels of (D, ...) are shared by the heads
    weight = weight.repeat(repeats, 1, 1, 1).to(x.dtype)
    bias = None if bias is None else bias.repeat(repeats).to(x.dtype)
    image = x.transpose(1, 2).unflatten(2, (size[0], size[1]))
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(image, weight, bias, padding=padding, groups=x.shape[-1]).flatten(2).transpose(1, 2)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    window: Sequence[int] | None = None,
    shift: Sequence[int] | None = None,
) -> Tensor:
    """`torch.ops.flatten.depthwise_conv` in plain torch; same arguments, shapes and result."""
    dtype, x = x.dtype, _widen(x)
    prefix = x.shape[1] - size[0] * size[1]
    if window is None:
        out = _convolve(x[:, prefix:], weight, bias, size)
        return F.pad(out, (0, 0, prefix, 0)).to(dtype)
    tiles = to_windows(x, size, window, shift)
    out = _convolve(tiles.flatten(0, 1), weight, bias, window).unflatten(0, tiles.shape[:2])
    return from_windows(out, size, window, shift).to(dtype)


def _widen(x: Tensor) -> Tensor:
    """Half-precision inputs are computed in float32, as the kernels do."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    dwc_weight: Tensor | None = None,
    dwc_bias: Tensor | None = None,
    size: Sequence[int] | None = None,
    window: Sequence[int] | None = None,
    shift: Sequence[int] | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`torch.ops.flatten.linear_attention` in plain torch; same arguments, shapes and result."""
    dtype = q.dtype
    q, k, v = _widen(q), _widen(k), _widen(v)
    if window is None or size is None:
        out = _attend(q, k, v, num_heads, eps)
    else:
        tiles = [to_windows(x, size, window, shift) for x in (q, k, v)]
        out = from_windows(_attend(tiles[0], tiles[1], tiles[2], num_heads, eps), size, window, shift)
    if dwc_weight is not None and size is not None:
        out = out + depthwise_conv(v, dwc_weight, dwc_bias, size, window, shift)
    return out.to(dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    scale: Tensor | None = None,
    key_bias: Tensor | None = None,
    dwc_weight: Tensor | None = None,
    dwc_bias: Tensor | None = None,
    size: Sequence[int] | None = None,
    window: Sequence[int] | None = None,
    shift: Sequence[int] | None = None,
    focusing_factor: float = 3.0,
    eps: float = 1e-6,
) -> Tensor:
    """`torch.ops.flatten.attention` in plain torch; same arguments, shapes and result."""
    dtype = q.dtype
    q, k, v = _widen(q), _widen(k), _widen(v)
    if key_bias is not None:
        if window is not None and size is not None:
            tiles = to_windows(k, size, window, shift) + key_bias
            k = from_windows(tiles, size, window, shift)
        else:
            k = k + key_bias
    q, k = (focus(x, scale, focusing_factor, eps) for x in (q, k))
    return linear_attention(q, k, v, num_heads, dwc_weight, dwc_bias, size, window, shift, eps).to(dtype)
