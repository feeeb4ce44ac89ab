"""The attentions that followed FLatten, between their projections: each is a call of the general operator.

=====================  ====================================================  ==============================
MILA (MLLA)            arXiv 2405.16605, LeapLabTHU/MLLA 66b6d29             `MilaAttention`
RALA                   arXiv 2411.07635, qhfan/RALA a86314f                  `RalaAttention`
MALA                   arXiv 2507.00698, qhfan/MALA 7114e63                  `MalaAttention`
InLine                 arXiv 2412.06590, LeapLabTHU/InLine e463a6f           `InlineAttention`
PolaFormer             arXiv 2501.15061, ZacharyMeng/PolaFormer 44cdd39      `PolarAttention`
=====================  ====================================================  ==============================

Angles are those of float32 or float64 tables whatever the dtype of the tokens, and sums those of the
operator, so that half precision overflows where its inputs or results do and nowhere else.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from .._focused import LearnedKeys
from .._layers import is_plain_conv
from .._local import Size, along_tokens, device_of, local_layer, local_term
from ..ops import attention, depthwise_conv, linear_attention
from ..reference import elu_plus_one, from_windows, to_windows
from ..rotary import kept_table, rotate

# torch.fx records their calls whole: they look into sizes and dtypes, which have no values while it traces.
torch.fx.wrap("_widened")
torch.fx.wrap("from_windows")
torch.fx.wrap("kept_table")
torch.fx.wrap("to_windows")

__all__ = [
    "InlineAttention",
    "MalaAttention",
    "MilaAttention",
    "PolarAttention",
    "RalaAttention",
    "RotarySoftmaxAttention",
]


class _Placeless(nn.Module):
    """A core without learned positions."""

    positions_name = "positional_encoding"  # of the cores that have one
    gate_letter = ""
    reads_input = False

    def __init__(self, dim: int, num_heads: int, num_prefix_tokens: int = 0):
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"dim is {dim}, expected a multiple of num_heads, {num_heads}")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.num_prefix_tokens = num_prefix_tokens

    def position_grids(self, size: tuple[int, int]) -> dict[str, list[tuple[int, int]]]:
        return {}

    def set_grid(self, grid: Size) -> None:
        """Nothing is learned for a map."""

    set_feat_size = set_grid


def _widened(x: Tensor) -> Tensor:
    """In float32, or float64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()


def _in_its_dtype(x: Any) -> Any:
    """A context without autocast, which would narrow what was widened."""
    device = "meta" if isinstance(x, Proxy) else x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


@torch.fx.wrap
def _rotated(x: Tensor, table: Tensor, heads: int) -> Tensor:
    """In float32 where x is of half precision."""
    return rotate(_widened(x), table, heads).to(x.dtype)


class _RotaryAttention(_Placeless):
    """Features elu(x) + 1, rotated in the numerator alone, and LePE, a depthwise convolution of v."""

    kernel_size = 5
    normalizer = "divide"
    shared_angles = True  # the same for all heads

    def __init__(
        self, dim: int, num_heads: int, grid: Size | None = None, num_prefix_tokens: int = 0, **dd: Any
    ):
        super().__init__(dim, num_heads, num_prefix_tokens)
        divisor = 4 * num_heads if self.shared_angles else 4
        if dim % divisor:
            raise ValueError(f"dim is {dim}, expected a multiple of {divisor}: rows and columns turn pairs")
        self.lepe = local_layer(dim, (self.kernel_size, self.kernel_size), **dd)

    def key_weight(self, q: Tensor, k: Tensor, size: Size, window: Size | None, shift: Size | None) -> Any:
        """Weights (B, N, heads) of the keys, or None for 1."""
        return None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        size: Size,
        window: Size | None = None,
        shift: Size | None = None,
        key_size: Size | None = None,
        gate: Tensor | None = None,
        gate_activation: str = "none",
    ) -> Tensor:
        """(B, N, C) queries, keys, values and, if any, gate -> (B, N, C).

        Args:
            size: the map the tokens tile, after the prefix tokens.
            window: attend inside windows of this size; None is the whole map.
            shift: cyclic shift of the windows.
            key_size: must be None: keys are rotated by their places on the map of the queries.
        """
        if key_size is not None:
            raise ValueError(f"{type(self).__name__} needs the keys on the queries' map, got reduced keys")
        heads = self.num_heads if self.shared_angles else None
        lepe, plain = self.lepe, is_plain_conv(self.lepe, self.dim, device_of(v))
        scale = self.head_dim**-0.5 if self.normalizer == "magnitude" else 1.0
        out = attention(
            q,
            k,
            v,
            self.num_heads,
            dwc_weight=lepe.weight if plain else None,
            dwc_bias=lepe.bias if plain else None,
            size=(size[0], size[1]),
            window=window,
            shift=shift,
            feature_map="elu",
            rotary=kept_table(q, window or size, self.dim, heads, self.num_prefix_tokens),
            key_weight=self.key_weight(q, k, size, window, shift),
            normalizer=self.normalizer,
            similarity_scale=scale,
            gate=gate if plain else None,
            gate_activation=gate_activation if plain else "none",
        )
        if plain:
            return out
        out = out + local_term(lepe, self.dim, v, size, window, shift)
        if gate is None:
            return out
        return out * (F.silu(gate) if gate_activation == "silu" else gate)


class MilaAttention(_RotaryAttention):
    """MILA's: the rotation runs over all channels, so that the first heads see rows and the last columns."""

    kernel_size = 3
    shared_angles = False


class RalaAttention(_RotaryAttention):
    """RALA's: keys weigh what a softmax of their products with the mean query gives them; a linear gate."""

    gate_letter = "o"

    def key_weight(self, q: Tensor, k: Tensor, size: Size, window: Size | None, shift: Size | None) -> Any:
        q, k = elu_plus_one(_widened(q)), elu_plus_one(_widened(k))
        if window is not None:
            q, k = (to_windows(x, size, window, shift) for x in (q, k))
        q, k = (
            x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-2, -3)
            for x in (q.mean(-2, keepdim=True) * self.head_dim**-0.5, k)
        )
        with _in_its_dtype(q):
            weight = (q @ k.mT).softmax(-1).squeeze(-2).mT
        return weight if window is None else from_windows(weight, size, window, shift)


class MalaAttention(_RotaryAttention):
    """MALA's: weights grow with the magnitude of the query; a linear gate."""

    gate_letter = "o"
    normalizer = "magnitude"


class RotarySoftmaxAttention(_RotaryAttention):
    """The softmax attention beside RALA and MALA: rotated queries and keys, LePE, a linear gate."""

    gate_letter = "o"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, size: Size, *places: Any, gate: Any = None) -> Tensor:
        """(B, N, C) queries, keys, values and gate of the map `size` -> (B, N, C)."""
        table = kept_table(q, size, self.dim, self.num_heads, self.num_prefix_tokens)
        q, k = (_rotated(x, table, self.num_heads) for x in (q, k))
        q, k, values = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, values).transpose(1, 2).flatten(2)
        return (out + local_term(self.lepe, self.dim, v, size)) * gate


_KERNELS: dict[str, Any] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leakyrelu": F.leaky_relu,
    "exp": lambda x: (0.2 * x).exp(),
}


class InlineAttention(_Placeless):
    """InLine's: signed features, weights that sum to 1 by a subtraction, and a local term whose 3x3 taps each
    image makes from the mean of its tokens.

    Args:
        kernel_func: what queries and keys go through: "identity", as in every published model, "relu",
            "leakyrelu" (0.01) or "exp", exp(x / 5).
    """

    reads_input = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Size | None = None,
        num_prefix_tokens: int = 0,
        lepe: bool = False,
        kernel_func: str = "identity",
        **dd: Any,
    ):
        super().__init__(dim, num_heads, num_prefix_tokens)
        if kernel_func not in _KERNELS:
            expected = ", ".join(map(repr, _KERNELS))
            raise ValueError(f"kernel_func is {kernel_func!r}, expected one of {expected}")
        self.kernel_func = kernel_func
        self.get_v: Any = local_layer(dim, (3, 3), **dd) if lepe else None
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=num_heads, **dd),
            nn.GELU(),
            nn.Conv1d(dim, 9 * dim, 1, groups=num_heads, **dd),
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        size: Size,
        window: Size | None = None,
        shift: Size | None = None,
        key_size: Size | None = None,
        source: Any = None,
    ) -> Tensor:
        """(B, N, C) queries, (B, M, C) keys and values -> (B, N, C); as `FocusedAttention.attend`.

        Args:
            source: (B, T, C), whose mean makes the taps of an image, in all of its windows.
        """
        taps = self.residual(source.mean(1).unsqueeze(-1)).unflatten(1, (self.dim, 1, 3, 3)).squeeze(-1)
        taps = taps.to(v.dtype)
        q, k = (_KERNELS[self.kernel_func](x) for x in (q, k))
        common: dict[str, Any] = {
            "feature_map": "none",
            "normalizer": "subtract",
            "similarity_scale": self.head_dim**-0.5,
        }
        if key_size is None:
            common |= {"size": (size[0], size[1]), "window": window, "shift": shift}
            out = attention(q, k, v, self.num_heads, dwc_weight=taps, **common)
        else:
            out = attention(q, k, v, self.num_heads, **common)
            v = along_tokens(v, q.shape[1])
            out = out + depthwise_conv(v, taps, None, (size[0], size[1]))
        if self.get_v is None:
            return out
        return out + local_term(self.get_v, self.dim, v, size, window, shift)


class PolarAttention(LearnedKeys):
    """PolaFormer's: positive and negative parts of queries and keys are raised to learned powers, one for
    each channel; half of a head's values see pairs of like signs, half those of unlike ones. A linear gate.

    Args:
        alpha: powers lie between 1 and 1 + alpha.
        arguments: of `LearnedKeys`.
    """

    gate_letter = "g"

    def __init__(self, dim: int, num_heads: int, grid: Size | None, *, alpha: float = 4.0, **arguments: Any):
        super().__init__(dim, num_heads, grid, **arguments)
        self.alpha = alpha
        self.power = nn.Parameter(self.scale.new_zeros(1, num_heads, 1, self.head_dim))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.power)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        size: Size,
        window: Size | None = None,
        shift: Size | None = None,
        key_size: Size | None = None,
        gate: Any = None,
    ) -> Tensor:
        """(B, N, C) queries, (B, M, C) keys and values -> (B, N, C); as `FocusedAttention.attend`.

        Args:
            gate: (B, N, C), a factor of the result.
        """
        encoding = self.encoding(key_size if key_size is not None else window if window is not None else size)
        if encoding is not None and window is not None:
            k = from_windows(to_windows(k, size, window, shift) + encoding, size, window, shift)
        elif encoding is not None:
            k = k + encoding
        with _in_its_dtype(v):
            out = self._products(q, k, v, size, window, shift)
        if self.dwc is not None:
            values = v if key_size is None else along_tokens(v, q.shape[1])
            out = out + local_term(self.dwc, self.head_dim, values, size, window, shift)
        return (out if gate is None else out * gate).to(v.dtype)

    def _products(self, q: Tensor, k: Tensor, v: Tensor, size: Size, window: Any, shift: Any) -> Tensor:
        """The attention in float32 or float64: powers leave half precision at once."""
        q, k, v = (_widened(x) for x in (q, k, v))
        scale = F.softplus(self.scale.to(q.dtype))
        power = 1 + self.alpha * self.power.to(q.dtype).sigmoid().flatten()
        (qa, qb), (ka, kb) = (self._parts(x / scale, power) for x in (q, k))
        same, unlike, keys = (self._joined(*pair) for pair in ((qa, qb), (qb, qa), (ka, kb)))
        places: dict[str, Any] = {}
        if window is not None:
            places = {"size": (size[0], size[1]), "window": window, "shift": shift}
        first = (self.head_dim + 1) // 2
        values = v.unflatten(-1, (self.num_heads, self.head_dim)).split((first, self.head_dim - first), -1)
        outs = [
            linear_attention(queries, keys, values[i].flatten(2), self.num_heads, **places)
            for i, queries in enumerate((same, unlike))
            if i == 0 or self.head_dim > 1
        ]
        return torch.cat([part.unflatten(-1, (self.num_heads, -1)) for part in outs], -1).flatten(2)

    @staticmethod
    def _parts(x: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        """The powers of the positive part and of the negative one."""
        raised = x.abs() ** power
        return torch.where(x <= 0, 0.0, raised), torch.where(x >= 0, 0.0, raised)

    def _joined(self, first: Tensor, second: Tensor) -> Tensor:
        """Two (B, N, C), side by side in each head -> (B, N, 2 * C)."""
        shape = (self.num_heads, self.head_dim)
        return torch.cat((first.unflatten(-1, shape), second.unflatten(-1, shape)), -1).flatten(2)
