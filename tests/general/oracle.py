"""The general form once more, written independently: one pair of a query and a key at a time, in float64.

No S, no m, no shared helper: weights over keys are formed explicitly, windows are lists of places, the
convolution is a sum over taps. Slow, and differentiable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def focused(x: Tensor, scale: Tensor | None, p: float, eps: float) -> Tensor:
    y = (x.clamp(min=0) + eps) / (1 if scale is None else scale)
    return y**p * (y.pow(2).sum() / (y**p).pow(2).sum()) ** 0.5


def mapped(x: Tensor, feature_map: str | None, scale: Tensor | None, p: float, eps: float) -> Tensor:
    if feature_map == "focused":
        return focused(x, scale, p, eps)
    if feature_map == "elu":
        return torch.where(x > 0, x + 1, torch.where(x > 0, 0.0, x).exp())
    return x.clamp(min=0) if feature_map == "relu" else x


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """The pairs of one token's channels of one head times e^(i angle), as complex numbers."""
    z = torch.view_as_complex(x.unflatten(0, (-1, 2)).contiguous()) * torch.view_as_complex(
        angles.contiguous()
    )
    return torch.view_as_real(z).flatten()


def places(size, window, shift) -> list[list[int]]:
    """The tokens of each window, in the window's raster order."""
    (h, w), (wh, ww), (sh, sw) = size, window, shift or (0, 0)
    return [
        [((top + i + sh) % h) * w + (left + j + sw) % w for i in range(wh) for j in range(ww)]
        for top in range(0, h, wh)
        for left in range(0, w, ww)
    ]


def attention(
    q, k, v, num_heads, scale=None, key_bias=None, dwc_weight=None, dwc_bias=None, size=None, window=None,
    shift=None, focusing_factor=3.0, eps=1e-6, feature_map=None, rotary=None, key_weight=None,
    normalizer="divide", similarity_scale=1.0, gate=None, gate_activation="none", normalizer_q=None,
    normalizer_k=None,
) -> Tensor:  # fmt: skip
    """Both operators: `feature_map=None` leaves q and k as they are."""
    batch, n, channels = q.shape
    m, width, wide = k.shape[1], v.shape[2] // num_heads, channels // num_heads
    in_windows = places(size, window, shift) if window is not None else None
    rows: dict[tuple[int, int, int], Tensor] = {}
    for b in range(batch):
        for queries, keys in (
            [(t, t) for t in in_windows] if in_windows else [(list(range(n)), list(range(m)))]
        ):
            fq = {i: mapped(q[b, i], feature_map, scale, focusing_factor, eps) for i in queries}
            fk = {}
            for place, j in enumerate(keys):
                biased = k[b, j] if key_bias is None else k[b, j] + key_bias[place if in_windows else j]
                fk[j] = mapped(biased, feature_map, scale, focusing_factor, eps)
            for h in range(num_heads):
                one = slice(h * wide, (h + 1) * wide)

                def numerator(x, place, one=one, h=h):
                    if rotary is None:
                        return x[one]
                    own = rotary.shape[1] != wide // 2  # angles of all channels
                    pairs = slice(h * (wide // 2), (h + 1) * (wide // 2)) if own else slice(None)
                    return turned(x[one], rotary[place, pairs])

                kn = torch.stack([numerator(fk[j], place) for place, j in enumerate(keys)])
                kd = torch.stack([(fk[j] if normalizer_k is None else normalizer_k[b, j])[one] for j in keys])
                values = torch.stack([v[b, j, h * width : (h + 1) * width] for j in keys])
                if key_weight is None:
                    weights = values.new_ones(len(keys))
                else:
                    weights = torch.stack(
                        [key_weight[b, j, h] if key_weight.dim() == 3 else key_weight[b, j] for j in keys]
                    )
                weights = weights / weights.sum()
                for place, i in enumerate(queries):
                    qd = (fq[i] if normalizer_q is None else normalizer_q[b, i])[one]
                    pairwise = similarity_scale * (kn * numerator(fq[i], place)).sum(1) * weights
                    z = similarity_scale * ((kd * qd).sum(1) * weights).sum()
                    y = (pairwise[:, None] * values).sum(0)
                    u = (weights[:, None] * values).sum(0)
                    rows[b, i, h] = {
                        "divide": lambda y, z, u: y / (z + eps),
                        "none": lambda y, z, u: y,
                        "subtract": lambda y, z, u: y + (1 - z) * u,
                        "magnitude": lambda y, z, u: (1 + 1 / (z + eps)) * y - z * u,
                    }[normalizer](y, z, u)
    out = torch.stack(
        [
            torch.stack([torch.cat([rows[b, i, h] for h in range(num_heads)]) for i in range(n)])
            for b in range(batch)
        ]
    )
    if dwc_weight is not None:
        out = out + convolution(v, dwc_weight, dwc_bias, size, window, shift)
    if gate is not None:
        out = {"none": gate, "silu": gate / (1 + (-gate).exp()), "sigmoid": 1 / (1 + (-gate).exp())}[
            gate_activation
        ] * out
    return out


def convolution(v, weight, bias, size, window, shift) -> Tensor:
    batch, m, channels = v.shape
    prefix = m - math.prod(size)
    maps = places(size, window or size, shift)
    h, w = window or size
    kh, kw = weight.shape[-2:]
    images = []
    for b in range(batch):
        taps = weight[b] if weight.dim() == 5 else weight.repeat(channels // weight.shape[0], 1, 1, 1)
        rows = [v.new_zeros(channels) for _ in range(m)]
        for tokens in maps:
            for place, t in enumerate(tokens):
                total = v.new_zeros(channels)
                if bias is not None:
                    total = total + bias.repeat(channels // bias.shape[0])
                for i in range(kh):
                    for j in range(kw):
                        y, x = place // w + i - kh // 2, place % w + j - kw // 2
                        if 0 <= y < h and 0 <= x < w:
                            total = total + taps[:, 0, i, j] * v[b, prefix + tokens[y * w + x]]
                rows[prefix + t] = total
        images.append(torch.stack(rows))
    return torch.stack(images)
