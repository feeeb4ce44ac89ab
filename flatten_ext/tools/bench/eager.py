"""The attentions of the models as their public code computes them, to be timed against the operator.

Each takes the place of a core's `attend`, with its arguments. What the public code keeps from call to call,
its tables of rotations, is kept here too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatten_ext.models import _cores
from flatten_ext.models._attention import FocusedAttention
from flatten_ext.reference import from_windows, to_windows
from flatten_ext.rotary import kept_table
from flatten_ext.tools.bench.formulas import eager_formula

__all__ = ["EAGER", "focused"]


def focused(
    self: FocusedAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Any,
    window: Any = None,
    shift: Any = None,
    key_size: Any = None,
) -> Tensor:
    """FLatten's, on partitioned copies and with convolutions."""
    batch, tokens, channels = q.shape
    tile, heads, head_dim = window or size, self.num_heads, channels // self.num_heads
    if key_size is None:  # without copies where one window covers the map, as in the public Swin
        q, k, v = (to_windows(x, size, tile, shift).flatten(0, 1) for x in (q, k, v))
    image = v.transpose(1, 2)
    if self.get_v is not None:  # the public CSWin goes through (B, C, H, W) and back for each
        q, k, image = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, image))
    encoding = self.encoding(key_size if key_size is not None else tile)
    out = eager_formula(q, k, v, heads, F.softplus(self.scale), encoding, self.focusing_factor)
    if key_size is not None:
        image = F.interpolate(image, size=tokens, mode="linear")
    values = v if key_size is None else image.transpose(1, 2)
    maps = values.unflatten(-1, (heads, head_dim)).permute(0, 2, 1, 3)
    local = self.dwc(maps.reshape(-1, tile[0], tile[1], head_dim).permute(0, 3, 1, 2))
    out = out + local.reshape(out.shape[0], channels, -1).permute(0, 2, 1)
    if self.get_v is not None:
        lepe = self.get_v(image.reshape(-1, channels, tile[0], tile[1]))
        out = out + lepe.reshape(out.shape[0], channels, -1).permute(0, 2, 1).contiguous()
    return out if key_size is not None else from_windows(out.unflatten(0, (batch, -1)), size, tile, shift)


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _local(layer: nn.Module, v: Tensor, size: Any) -> Tensor:
    """A convolution of each channel of (B, N, C)."""
    maps = v.transpose(1, 2).reshape(v.shape[0], -1, size[0], size[1])
    return layer(maps).flatten(2).transpose(1, 2)


def _plain(self: Any, window: Any, key_size: Any = None) -> None:
    if window is not None or key_size is not None:
        raise NotImplementedError(f"{type(self).__name__} in windows, or with reduced keys")


def mila(
    self: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Any,
    window: Any = None,
    shift: Any = None,
    key_size: Any = None,
    gate: Tensor | None = None,
    gate_activation: str = "none",
) -> Tensor:
    """MILA's: all channels are rotated as complex numbers."""
    _plain(self, window, key_size)
    table = torch.view_as_complex(kept_table(q, size, self.dim, None, 0))
    q, k = F.elu(q) + 1.0, F.elu(k) + 1.0

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table).flatten(-2)

    q, k, q_turned, k_turned, values = (_split(x, self.num_heads) for x in (q, k, turned(q), turned(k), v))
    z = 1 / (q @ k.mean(-2, keepdim=True).mT + 1e-6)
    shrink = q.shape[-2] ** -0.5
    out = _merge(q_turned @ ((k_turned.mT * shrink) @ (values * shrink)) * z) + _local(self.lepe, v, size)
    return out if gate is None else out * F.silu(gate)


def _turned(x: Tensor, table: Tensor) -> Tensor:
    """Each head by x cos + (its pairs turned by a quarter) sin."""
    cosine, sine = (part.repeat_interleave(2, -1) for part in table.unbind(-1))
    quarter = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cosine + quarter * sine


def rala(self: Any, q: Tensor, k: Tensor, v: Tensor, size: Any, *places: Any, gate: Any = None) -> Tensor:
    """RALA's: the keys are weighted before the products."""
    _plain(self, *places[:1])
    table = kept_table(q, size, self.dim, self.num_heads, 0)
    q, k, values = (_split(x, self.num_heads) for x in (q, k, v))
    q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
    tokens = k.shape[-2]
    weight = (q.mean(-2, keepdim=True) * self.head_dim**-0.5 @ k.mT).softmax(-1)
    k = k * weight.mT * tokens
    z = 1 / (q @ k.mean(-2, keepdim=True).mT + 1e-6)
    q, k, shrink = _turned(q, table), _turned(k, table), tokens**-0.5
    out = q @ ((k.mT * shrink) @ (values * shrink)) * z
    return (_merge(out) + _local(self.lepe, v, size)) * gate


def mala(self: Any, q: Tensor, k: Tensor, v: Tensor, size: Any, *places: Any, gate: Any = None) -> Tensor:
    """MALA's: a difference of two terms."""
    _plain(self, *places[:1])
    table = kept_table(q, size, self.dim, self.num_heads, 0)
    q, k, values = (_split(x, self.num_heads) for x in (q, k, v))
    q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
    scale = self.head_dim**-0.5
    z = q @ k.mean(-2, keepdim=True).mT * scale
    q, k, shrink = _turned(q, table), _turned(k, table), (scale / k.shape[-2]) ** 0.5
    products = q @ ((k.mT * shrink) @ (values * shrink))
    out = products * (1 + 1 / (z + 1e-6)) - z * values.mean(-2, keepdim=True)
    return (_merge(out) + _local(self.lepe, v, size)) * gate


def rotary_softmax(
    self: Any, q: Tensor, k: Tensor, v: Tensor, size: Any, *places: Any, gate: Any = None
) -> Tensor:
    """The softmax attention beside RALA and MALA."""
    table = kept_table(q, size, self.dim, self.num_heads, 0)
    q, k, values = (_split(x, self.num_heads) for x in (q, k, v))
    weights = (self.head_dim**-0.5 * _turned(q, table) @ _turned(k, table).mT).softmax(-1)
    return (_merge(weights @ values) + _local(self.lepe, v, size)) * gate


def inline(
    self: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Any,
    window: Any = None,
    shift: Any = None,
    key_size: Any = None,
    source: Any = None,
) -> Tensor:
    """InLine's: each image's channels are convolved as groups of one map."""
    _plain(self, window, key_size)
    batch, prefix = v.shape[0], v.shape[1] - size[0] * size[1]
    taps = self.residual(source.mean(1).unsqueeze(-1)).reshape(-1, 1, 3, 3)
    image = v[:, prefix:].transpose(1, 2).reshape(1, -1, size[0], size[1])
    local = F.conv2d(image, taps, padding=1, groups=len(taps)).reshape(batch, self.dim, -1).transpose(1, 2)
    tokens, (q, k, values) = v.shape[1], (_split(x, self.num_heads) for x in (q, k, v))
    scale = self.head_dim**-0.5
    shrink = (scale / tokens) ** 0.5
    out = q @ ((k.mT * shrink) @ (values * shrink))
    rest = 1 - q @ k.mean(-2, keepdim=True).mT * scale
    out = _merge(out + rest * values.mean(-2, keepdim=True))
    out = out + (F.pad(local, (0, 0, prefix, 0)) if prefix else local)
    return out if self.get_v is None else out + _local(self.get_v, v, size)


def polar(
    self: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Any,
    window: Any = None,
    shift: Any = None,
    key_size: Any = None,
    gate: Any = None,
) -> Tensor:
    """PolaFormer's: powers of the positive and of the negative parts, side by side."""
    _plain(self, window, key_size)
    scale = F.softplus(self.scale)
    power = 1 + self.alpha * self.power.sigmoid()
    q, k = (_split(x / scale, self.num_heads) for x in (q, k + self.encoding(size)))
    (qa, qb), (ka, kb) = ((x.relu() ** power, (-x).relu() ** power) for x in (q, k))
    keys, shrink = torch.cat((ka, kb), -1), v.shape[1] ** -0.5
    outs = [
        queries @ ((keys.mT * shrink) @ (half * shrink)) / (queries @ keys.mean(-2, keepdim=True).mT + 1e-6)
        for queries, half in zip(
            (torch.cat((qa, qb), -1), torch.cat((qb, qa), -1)),
            _split(v, self.num_heads).chunk(2, -1),
            strict=True,
        )
    ]
    maps = _split(v, self.num_heads).transpose(-1, -2).reshape(-1, self.head_dim, size[0], size[1])
    local = self.dwc(maps).reshape(v.shape[0], self.dim, -1).transpose(1, 2)
    return (_merge(torch.cat(outs, -1)) + local) * gate


EAGER: dict[type[nn.Module], Any] = {
    FocusedAttention: focused,
    _cores.MilaAttention: mila,
    _cores.RalaAttention: rala,
    _cores.MalaAttention: mala,
    _cores.RotarySoftmaxAttention: rotary_softmax,
    _cores.InlineAttention: inline,
    _cores.PolarAttention: polar,
}
