"""The alternatives to focused linear attention, each a module on projected (B, N, C) queries, keys, values.

Where a maintained package has one, the package's own code runs (timm, performer-pytorch, linformer). Every
mixer also has `exact`: its formula written out with the N x N matrix, which the benchmark checks it against.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatten_ext import attention, depthwise_conv, reference
from flatten_ext.extras import require
from flatten_ext.tools.bench.formulas import eager_attention

__all__ = [
    "ConvolutionOnly",
    "EagerFocused",
    "EfficientAttention",
    "Focused",
    "Hydra",
    "Linformer",
    "LiteMLA",
    "Mixer",
    "Performer",
    "Softmax",
    "SoftmaxDWC",
    "WindowSoftmax",
]


class Mixer(nn.Module):
    """Mixes tokens: forward(q, k, v, size) -> (B, N, C) of (B, N, C) each.

    Args:
        dim, num_heads: channels and heads.
        size: (H, W) of the map.
    """

    label: str
    has_gate = False  # whether what goes out is multiplied by a projection of what came in
    reads_input = False  # whether `forward` takes the tokens before the projections too, as `source`

    def __init__(self, dim: int, num_heads: int, size: Sequence[int]) -> None:
        super().__init__()
        self.dim, self.num_heads, self.size = dim, num_heads, (size[0], size[1])

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def split(self, *tokens: Tensor) -> list[Tensor]:
        """(B, N, C) -> (B, heads, N, D)."""
        return [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in tokens]

    @staticmethod
    def merge(x: Tensor) -> Tensor:
        """(B, heads, N, D) -> (B, N, C)."""
        return x.transpose(1, 2).flatten(2)

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same by its quadratic formula, for any float dtype."""
        raise NotImplementedError

    def alone(self) -> Mixer | None:
        """The attention without the convolution beside it; None where there is no attention."""
        if getattr(self, "dwc", None) is None:
            return self
        mixer = copy.copy(self)
        mixer._modules = {**self._modules, "dwc": None}
        return mixer


class Softmax(Mixer):
    """Scaled dot-product attention (Vaswani et al. 2017) through torch's fused kernel."""

    label = "softmax"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.split(q, k, v)
        return self.merge(F.scaled_dot_product_attention(q, k, v))

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.split(q, k, v)
        return self.merge((q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)).softmax(-1) @ v)


class SoftmaxDWC(Softmax):
    """Softmax attention plus the depthwise branch of FLatten, by torch's convolution."""

    label = "softmax + DWC"

    def __init__(self, dim: int, num_heads: int, size: Sequence[int], kernel_size: int = 5) -> None:
        super().__init__(dim, num_heads, size)
        d = self.head_dim
        self.dwc: nn.Conv2d | None = nn.Conv2d(d, d, kernel_size, padding=kernel_size // 2, groups=d)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().forward(q, k, v)
        if self.dwc is None:
            return out
        maps = v.transpose(1, 2).reshape(-1, self.head_dim, *self.size)
        return out + self.dwc(maps).view(v.transpose(1, 2).shape).transpose(1, 2)

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().exact(q, k, v)
        if self.dwc is None:
            return out
        return out + reference.depthwise_conv(v, self.dwc.weight, self.dwc.bias, self.size)


class WindowSoftmax(Mixer):
    """Swin's window attention with relative position bias: timm's module between cutting and pasting."""

    label = "window softmax (timm)"

    def __init__(self, dim: int, num_heads: int, size: Sequence[int], window: int = 7) -> None:
        super().__init__(dim, num_heads, size)
        swin = require("timm.models.swin_transformer", "bench", "window attention")
        self.window = (window, window)
        self.attention = swin.WindowAttention(dim, num_heads, window_size=self.window)
        # Projected already, as for every mixer; the module sees q, k and v side by side, as after its own.
        self.attention.qkv, self.attention.proj = nn.Identity(), nn.Identity()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (h, w), (wh, ww) = self.size, self.window
        cut = (-1, h // wh, wh, w // ww, ww, self.dim)
        # One copy puts windows together and q, k, v side by side, as the module's own projection would.
        tiles = torch.stack([x.reshape(cut).transpose(2, 3) for x in (q, k, v)], dim=-2)
        out = self.attention(tiles.view(-1, wh * ww, 3 * self.dim))
        return reference.from_windows(
            out.view(q.shape[0], -1, wh * ww, self.dim), self.size, self.window, None
        )

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (h, w), (wh, ww) = self.size, self.window
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        y, x = y.flatten(), x.flatten()
        same = (y // wh == (y // wh)[:, None]) & (x // ww == (x // ww)[:, None])
        dy, dx = (y[:, None] - y).clamp(1 - wh, wh - 1), (x[:, None] - x).clamp(1 - ww, ww - 1)
        rows = (dy + wh - 1) * (2 * ww - 1) + dx + ww - 1
        bias = self.attention.relative_position_bias_table[rows].permute(2, 0, 1)
        q, k, v = self.split(q, k, v)
        logits = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim) + bias
        return self.merge(logits.masked_fill(~same.to(q.device), -math.inf).softmax(-1) @ v)


class LiteMLA(Mixer):
    """ReLU linear attention in the form of timm's LiteMLA (EfficientViT): v padded with ones, one product."""

    label = "ReLU linear (LiteMLA)"
    eps = 1e-5

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.split(q.relu(), k.relu(), v)
        out = q @ (k.transpose(-2, -1) @ F.pad(v, (0, 1), value=1.0))
        return self.merge(out[..., :-1] / (out[..., -1:] + self.eps))

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.split(q.relu(), k.relu(), v)
        weights = q @ k.transpose(-2, -1)
        return self.merge(weights / (weights.sum(-1, keepdim=True) + self.eps) @ v)


class EfficientAttention(Mixer):
    """Efficient attention (Shen et al. 2021): q normalised by softmax over channels, k over tokens."""

    label = "efficient attention"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.split(q, k, v)
        return self.merge(q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v))

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.split(q, k, v)
        return self.merge((q.softmax(-1) @ k.softmax(-2).transpose(-2, -1)) @ v)


class Hydra(Mixer):
    """Hydra attention (Bolya et al. 2022): as many heads as channels, cosine-similarity kernel."""

    label = "Hydra attention"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.normalize(q, dim=-1) * (F.normalize(k, dim=-1) * v).sum(1, keepdim=True)

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bic,bjc->bijc", F.normalize(q, dim=-1), F.normalize(k, dim=-1))
        return torch.einsum("bijc,bjc->bic", weights, v)


class Performer(Mixer):
    """FAVOR+ (Choromanski et al. 2021): performer-pytorch's FastAttention, its default number of features."""

    label = "Performer"

    def __init__(self, dim: int, num_heads: int, size: Sequence[int]) -> None:
        super().__init__(dim, num_heads, size)
        self._package = require("performer_pytorch.performer_pytorch", "bench", "Performer")
        self.attention = self._package.FastAttention(self.head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.merge(self.attention(*self.split(q, k, v)))

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.split(q, k, v)
        features = self.attention.projection_matrix
        phi_q = self._package.softmax_kernel(q, projection_matrix=features, is_query=True)
        phi_k = self._package.softmax_kernel(k, projection_matrix=features, is_query=False)
        weights = phi_q @ phi_k.transpose(-2, -1)
        return self.merge(weights / weights.sum(-1, keepdim=True) @ v)


class _Given(nn.Module):
    """Returns what was last set, whatever it is called with."""

    value: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.value


class Linformer(Mixer):
    """Linformer (Wang et al. 2020): the package's module; keys and values projected from N to 256 tokens."""

    label = "Linformer"

    def __init__(self, dim: int, num_heads: int, size: Sequence[int], projected: int = 256) -> None:
        super().__init__(dim, num_heads, size)
        package = require("linformer", "bench", "Linformer")
        tokens = size[0] * size[1]
        self.attention = package.LinformerSelfAttention(
            dim, tokens, k=min(projected, tokens), heads=num_heads
        )
        # Projected already, as for every mixer: the module takes keys from its context and values as given.
        self.attention.to_q, self.attention.to_k, self.attention.to_out = (nn.Identity() for _ in range(3))
        self.attention.to_v = _Given()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.attention.to_v.value = v
        return self.attention(q, context=k)

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.split(q, k, v)
        k, v = self.attention.proj_k.T @ k, self.attention.proj_v.T @ v
        return self.merge((q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)).softmax(-1) @ v)


class Focused(Mixer):
    """The op of this package: phi_p, linear attention and, with a kernel size, the depthwise branch."""

    label = "focused linear + DWC"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        size: Sequence[int],
        focusing_factor: float = 3.0,
        kernel_size: int | None = 5,
    ) -> None:
        super().__init__(dim, num_heads, size)
        d = self.head_dim
        self.focusing_factor = focusing_factor
        self.scale = nn.Parameter(torch.zeros(dim))
        self.dwc: nn.Conv2d | None = None
        if kernel_size is not None:
            self.dwc = nn.Conv2d(d, d, kernel_size, padding=kernel_size // 2, groups=d)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._by(attention, q, k, v)

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._by(reference.attention, q, k, v)

    def _by(self, op: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return op(
            q,
            k,
            v,
            self.num_heads,
            scale=F.softplus(self.scale),
            key_bias=None,
            dwc_weight=None if self.dwc is None else self.dwc.weight,
            dwc_bias=None if self.dwc is None else self.dwc.bias,
            size=self.size,
            focusing_factor=self.focusing_factor,
        )


class EagerFocused(Focused):
    """The same by the eager formula."""

    label = "eager formula"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._by(eager_attention, q, k, v)


class ConvolutionOnly(Mixer):
    """The depthwise branch with no attention beside it."""

    label = "DWC alone"

    def __init__(self, dim: int, num_heads: int, size: Sequence[int], kernel_size: int = 5) -> None:
        super().__init__(dim, num_heads, size)
        d = self.head_dim
        self.dwc = nn.Conv2d(d, d, kernel_size, padding=kernel_size // 2, groups=d)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return depthwise_conv(v, self.dwc.weight, self.dwc.bias, self.size)

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.depthwise_conv(v, self.dwc.weight, self.dwc.bias, self.size)

    def alone(self) -> Mixer | None:
        return None


class Neighborhood(Mixer):
    """Neighborhood attention (Hassani et al. 2023) by NATTEN, 7 x 7; GPUs only."""

    label = "neighborhood attention (NATTEN)"
    kernel = 7

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        natten = require("natten", "bench", "neighborhood attention")
        maps = (x.unflatten(-1, (self.num_heads, -1)).unflatten(1, self.size) for x in (q, k, v))
        return natten.na2d(*maps, kernel_size=(self.kernel, self.kernel)).flatten(3).flatten(1, 2)

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (h, w), reach = self.size, self.kernel
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        inside = torch.ones(h * w, h * w, dtype=torch.bool)
        for at, length in ((y.flatten(), h), (x.flatten(), w)):
            start = (at - reach // 2).clamp(0, max(0, length - reach))[:, None]
            inside &= (at >= start) & (at < start + reach)
        q, k, v = self.split(q, k, v)
        logits = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        return self.merge(logits.masked_fill(~inside.to(q.device), -math.inf).softmax(-1) @ v)


class CausalLinear(Mixer):
    """Causal linear attention by flash-linear-attention, on features q and k as they come; GPUs only."""

    label = "causal linear attention (fla)"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fla = require("fla.ops.linear_attn", "bench", "flash-linear-attention")
        heads = (x.unflatten(-1, (self.num_heads, -1)) for x in (q, k, v))
        return fla.chunk_linear_attn(*heads, scale=1.0, normalize=False)[0].flatten(2)

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.split(q, k, v)
        return self.merge((q @ k.transpose(-2, -1)).tril() @ v)
