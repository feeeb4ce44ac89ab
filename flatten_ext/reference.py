"""The operators in plain torch: the oracle of the tests, and what runs where there are no kernels for a call.

Every function follows its formula term by term, works on any device and dtype, and differentiates any number
of times in any mode. It is written to be read; it allocates freely. The formula is that of focused linear
attention (FLatten Transformer, ICCV 2023, arXiv 2308.00442, section 4), in a form wide enough for the linear
attentions that followed it. Per window and head, with key weights w (1 by default)::

    W = sum_j w_j     S = sum_j w_j Kn_j v_j^T / W     m = sum_j w_j Kd_j / W     u = sum_j w_j v_j / W
    y_i = c Qn_i S    z_i = c Qd_i . m
    divide: y / (z + eps)    none: y    subtract: y + (1 - z) u    magnitude: (1 + 1 / (z + eps)) y - z u
    out = act(gate) * (normalized + dwc(v))

Qn and Kn are the features, rotated where a table of angles is given; Qd and Kd are the features as they are.
The arguments are the operators', which flatten_ext.ops describes. What is refused here are combinations
without a meaning; the operators check shapes and dtypes too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .rotary import rotate

__all__ = [
    "attention",
    "attention_from_state",
    "attention_state",
    "depthwise_conv",
    "elu_plus_one",
    "focus",
    "from_windows",
    "linear_attention",
    "to_windows",
]

_T = TypeVar("_T")


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
    if focusing_factor == 1:
        return y
    # The largest entry only rescales the row and cancels, so its own gradient is nil. A row of zeros
    # (eps = 0) stays zero, with zero gradient; a row with NaN is no such row and stays NaN.
    largest = y.detach().amax(-1, keepdim=True)
    alive = ~(largest <= 0)
    y = torch.where(alive, y / torch.where(alive, largest, 1.0), 1.0)
    power = y**focusing_factor
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


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int]) -> Tensor:
    """Zero-padded depthwise convolution of (B, maps, h*w, C) tokens on maps of h x w."""
    padding = (weight.shape[-2] // 2, weight.shape[-1] // 2)
    if weight.dim() == 5:  # taps of each image's own: the images join the channels
        if weight.shape[0] == 0:
            return x + weight.sum()
        maps = x.permute(1, 0, 3, 2).flatten(1, 2).unflatten(2, (size[0], size[1]))
        taps = weight.flatten(0, 1).to(x.dtype)
        out = F.conv2d(maps, taps, None, padding=padding, groups=taps.shape[0]).flatten(2)
        return out.unflatten(1, (x.shape[0], x.shape[-1])).permute(1, 0, 3, 2)
    repeats = x.shape[-1] // weight.shape[0]  # kernels of (D, ...) are shared by the heads
    weight = weight.repeat(repeats, 1, 1, 1).to(x.dtype)
    bias = None if bias is None else bias.repeat(repeats).to(x.dtype)
    image = x.flatten(0, 1).transpose(1, 2).unflatten(2, (size[0], size[1]))
    out = F.conv2d(image, weight, bias, padding=padding, groups=x.shape[-1]).flatten(2).transpose(1, 2)
    return out.unflatten(0, x.shape[:2])


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    window: Sequence[int] | None = None,
    shift: Sequence[int] | None = None,
) -> Tensor:
    """`torch.ops.flatten.depthwise_conv` in plain torch; same arguments, shapes and result.

    `weight` may also be (B, C, 1, kh, kw), taps of each image's own, the same in all of its windows, without
    `bias`.
    """
    if weight.dim() == 5 and bias is not None:
        raise ValueError("bias must be None with a weight of five dimensions (taps of each image's own)")
    dtype, x = x.dtype, _widen(x)
    prefix = x.shape[1] - size[0] * size[1]
    if window is None:
        out = _convolve(x[:, None, prefix:], weight, bias, size).squeeze(1)
        return F.pad(out, (0, 0, prefix, 0)).to(dtype)
    out = _convolve(to_windows(x, size, window, shift), weight, bias, window)
    return from_windows(out, size, window, shift).to(dtype)


def _widen(x: Tensor) -> Tensor:
    """Half-precision inputs are computed in float32, as the kernels do."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, where exp(x) of a very negative x is not rounded against 1. Its slope at 0 is 1."""
    negative = x < 0
    return torch.where(negative, torch.where(negative, x, 0.0).exp(), x + 1)


def features(x: Tensor, feature_map: str, scale: Tensor | None, focusing_factor: float, eps: float) -> Tensor:
    mapped = choose("feature_map", feature_map, FEATURE_MAPS)
    if mapped is focus:
        return focus(x, scale, focusing_factor, eps)
    if scale is not None or focusing_factor != 3:
        name = "focusing_factor" if scale is None else "scale"
        raise ValueError(f"{name} belongs to feature_map 'focused' and is not read by {feature_map!r}")
    return mapped(x)


def weights(key_weight: Tensor | None, like: Tensor) -> Tensor | None:
    """(B, M) or (B, M, heads) -> (B, M, 1 or heads), in the dtype of the sums."""
    if key_weight is None:
        return None
    if key_weight.dtype == torch.bool:
        raise ValueError("key_weight must be floating point: pass mask.to(q.dtype), True where a key counts")
    return (key_weight if key_weight.dim() == 3 else key_weight.unsqueeze(-1)).to(like.dtype)


def _drop(x: Tensor, weight: Tensor | None, mixes_heads: bool = False) -> Tensor:
    """Where a key's weight is 0: zeros in place of what makes 0 * x, or its gradient, other than 0.

    That is NaN, infinity, and numbers so large that products with them overflow. Others stay: the derivative
    by a weight of 0 reads them.
    """
    if weight is None:
        return x
    dropped = weight == 0
    if mixes_heads:
        dropped = dropped.all(-1, keepdim=True)
    harmful = ~(x.abs() < torch.finfo(x.dtype).max ** 0.25)
    return torch.where(dropped.repeat_interleave(x.shape[-1] // dropped.shape[-1], -1) & harmful, 0.0, x)


class _Means(NamedTuple):
    """All that queries read of their keys: S, m, u, and where no key is left."""

    s: Tensor  # (..., heads, D_k, D_v)
    m: Tensor  # (..., heads, 1, D_k)
    u: Tensor | None  # (..., heads, 1, D_v); None where no normalizer reads it
    empty: Tensor | None  # (..., heads or 1, 1, 1); None without weights


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(..., tokens, heads * D) -> (..., heads, tokens, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-2, -3)


def by_head(x: Tensor, given: Tensor | None, table: Tensor | None, num_heads: int) -> tuple[Tensor, Tensor]:
    """The features of S, rotated, and those of the normalizer: the given ones, or x."""
    xn = _heads(rotate(x, table, num_heads), num_heads)
    if given is None and table is None:
        return xn, xn
    return xn, _heads(x if given is None else given, num_heads)


def _sums(kn: Tensor, kd: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w Kn v^T, w Kd, w v and w, summed over (..., heads, tokens, D)."""
    w = weight.transpose(-2, -1).unsqueeze(-1)
    s = (w * kn).transpose(-2, -1) @ v
    return s, (w * kd).sum(-2, keepdim=True), (w * v).sum(-2, keepdim=True), w.sum(-2, keepdim=True)


def _divided(s: Tensor, m: Tensor, u: Tensor, w: Tensor) -> _Means:
    empty = w == 0
    w = torch.where(empty, 1.0, w)
    return _Means(s / w, m / w, u / w, empty)


def _attend(qn: Tensor, qd: Tensor, means: _Means, normalizer: str, scale: float, eps: float) -> Tensor:
    """Queries of (..., heads, tokens, D_k) -> (..., tokens, heads * D_v)."""
    s, m, u, empty = means
    if empty is not None:  # where no key is left the term is 0, and so are all its gradients
        qn, qd = torch.where(empty, 0.0, qn), torch.where(empty, 0.0, qd)
    y, z = qn @ s, (qd * m).sum(-1, keepdim=True)
    if scale != 1:
        y, z = scale * y, scale * z
    if empty is not None:
        z = z + empty  # 1 for 0, so that nothing is divided by 0
    out = choose("normalizer", normalizer, NORMALIZERS)(y, z, y if u is None else u, eps)
    if empty is not None:
        out = torch.where(empty, 0.0, out)
    return out.transpose(-2, -3).flatten(-2)


def _gated(out: Tensor, gate: Tensor | None, gate_activation: str) -> Tensor:
    activation = choose("gate_activation", gate_activation, ACTIVATIONS)
    if gate is None and gate_activation != "none":
        raise ValueError(f"gate_activation is {gate_activation!r}, but there is no gate")
    return out if gate is None else activation(_widen(gate)) * out


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "focused": focus,
    "elu": elu_plus_one,
    "relu": torch.relu,
    "none": lambda x: x,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda gate: gate,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}
NORMALIZERS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "divide": lambda y, z, u, eps: y / (z + eps),
    "none": lambda y, z, u, eps: y,
    "subtract": lambda y, z, u, eps: y + (1 - z) * u,
    "magnitude": lambda y, z, u, eps: (1 + 1 / (z + eps)) * y - z * u,
}
_READ_U = ("subtract", "magnitude")


def choose(argument: str, name: str, choices: Mapping[str, _T]) -> _T:
    if name not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, choices))}, but it is {name!r}")
    return choices[name]


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
    *,
    normalizer_q: Tensor | None = None,
    normalizer_k: Tensor | None = None,
    rotary: Tensor | None = None,
    key_weight: Tensor | None = None,
    normalizer: str = "divide",
    similarity_scale: float = 1.0,
    gate: Tensor | None = None,
    gate_activation: str = "none",
) -> Tensor:
    """`torch.ops.flatten.linear_attention` in plain torch; same arguments, shapes and result."""
    dtype = q.dtype
    q, k, v = _widen(q), _widen(k), _widen(v)
    weight = weights(key_weight, v)

    def place(x: Tensor) -> Tensor:
        return x if window is None or size is None else to_windows(x, size, window, shift)

    qd = None if normalizer_q is None else place(_widen(normalizer_q))
    kd = None if normalizer_k is None else place(_drop(_widen(normalizer_k), weight))
    queries = by_head(place(q), qd, rotary, num_heads)
    keys = by_head(place(_drop(k, weight)), kd, rotary, num_heads)
    values = _heads(place(_drop(v, weight)), num_heads)
    if weight is None:
        u = values.mean(-2, keepdim=True) if normalizer in _READ_U else None
        s = keys[0].transpose(-2, -1) @ values / values.shape[-2]
        means = _Means(s, keys[1].mean(-2, keepdim=True), u, None)
    else:
        means = _divided(*_sums(*keys, values, place(weight)))
    out = _attend(*queries, means, normalizer, similarity_scale, eps)
    if window is not None and size is not None:
        out = from_windows(out, size, window, shift)
    if dwc_weight is not None and size is not None:
        out = out + depthwise_conv(v, dwc_weight, dwc_bias, size, window, shift)
    return _gated(out, gate, gate_activation).to(dtype)


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
    *,
    feature_map: str = "focused",
    key_weight: Tensor | None = None,
    **general: Any,
) -> Tensor:
    """`torch.ops.flatten.attention` in plain torch: features, then `linear_attention` of them."""
    dtype = q.dtype
    q, k, v = _widen(q), _widen(k), _widen(v)
    k = _drop(k, weights(key_weight, v), mixes_heads=feature_map == "focused")
    if key_bias is not None:
        if window is not None and size is not None:
            tiles = to_windows(k, size, window, shift) + key_bias
            k = from_windows(tiles, size, window, shift)
        else:
            k = k + key_bias
    q, k = (features(x, feature_map, scale, focusing_factor, eps) for x in (q, k))
    return linear_attention(
        q, k, v, num_heads, dwc_weight, dwc_bias, size, window, shift, eps, key_weight=key_weight, **general
    ).to(dtype)


def attention_state(
    k: Tensor,
    v: Tensor,
    num_heads: int,
    scale: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    focusing_factor: float = 3.0,
    eps: float = 1e-6,
    feature_map: str = "focused",
    rotary: Tensor | None = None,
    key_weight: Tensor | None = None,
    normalizer_k: Tensor | None = None,
) -> Tensor:
    """`torch.ops.flatten.attention_state` in plain torch: `sum_j w_j [Kn_j; 1] [v_j; 1]^T`.

    Kd is in the last column.
    """
    k, v = _widen(k), _widen(v)
    weight = weights(key_weight, v)
    weight = k.new_ones(1, k.shape[1], 1) if weight is None else weight
    k = _drop(k, weight, mixes_heads=feature_map == "focused")
    k = features(k if key_bias is None else k + key_bias, feature_map, scale, focusing_factor, eps)
    kd = _normalizer_features("normalizer_k", normalizer_k, feature_map)
    kd = None if kd is None else _drop(kd, weight)
    kn, kd = by_head(_drop(k, weight), kd, rotary, num_heads)
    s, m, u, w = _sums(kn, kd, _heads(_drop(v, weight), num_heads), weight)
    return torch.cat((torch.cat((s, m.mT), -1), torch.cat((u, w.expand(*u.shape[:-1], 1)), -1)), -2)


def attention_from_state(
    q: Tensor,
    state: Tensor,
    num_heads: int,
    scale: Tensor | None = None,
    *,
    focusing_factor: float = 3.0,
    eps: float = 1e-6,
    feature_map: str = "focused",
    rotary: Tensor | None = None,
    normalizer_q: Tensor | None = None,
    normalizer: str = "divide",
    similarity_scale: float = 1.0,
    gate: Tensor | None = None,
    gate_activation: str = "none",
) -> Tensor:
    """`torch.ops.flatten.attention_from_state` in plain torch; same arguments, shapes and result."""
    if state.dim() != 4 or state.shape[1] != num_heads or q.shape[-1] != num_heads * (state.shape[2] - 1):
        raise ValueError(
            f"state must be (B, num_heads = {num_heads}, D_k + 1, D_v + 1) with num_heads * D_k = "
            f"{q.shape[-1]}, the channels of q, but it is {tuple(state.shape)}"
        )
    dtype, q = q.dtype, features(_widen(q), feature_map, scale, focusing_factor, eps)
    qd = _normalizer_features("normalizer_q", normalizer_q, feature_map)
    queries = by_head(q, qd, rotary, num_heads)
    rows, last = state.to(q.dtype).split((state.shape[2] - 1, 1), 2)
    means = _divided(rows[..., :-1], rows[..., -1:].mT, last[..., :-1], last[..., -1:])
    out = _attend(*queries, means, normalizer, similarity_scale, eps)
    return _gated(out, gate, gate_activation).to(dtype)


def _normalizer_features(name: str, given: Tensor | None, feature_map: str) -> Tensor | None:
    if given is not None and feature_map != "none":
        raise ValueError(f"{name} goes with feature_map 'none', features mapped already, not {feature_map!r}")
    return None if given is None else _widen(given)
