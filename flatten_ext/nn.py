"""FocusedLinearAttention, a drop-in for the self-attention of a vision transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import attention

__all__ = ["FocusedLinearAttention", "resize_positional_encoding"]


class FocusedLinearAttention(nn.Module):
    """Multi-head self-attention in linear time over (B, N, C) tokens: project, attend, project.

    The parameters bear the names of the published code (`qkv`, `proj`, `dwc`, `scale`,
    `positional_encoding`), so its attention weights load as they are.

    Args:
        dim: C, the channels of a token.
        num_heads: heads; must divide `dim`.
        qkv_bias: whether the input projection has a bias.
        focusing_factor: p of phi_p; 1 gives plain ReLU linear attention, the paper uses 3.
        kernel_size: of the depthwise convolution of the values, odd, shared by the heads; None for none.
        window: (wh, ww) to attend and convolve inside windows of the map; None for the whole map.
        shift: (sh, sw) cyclic shift of the window grid.
        num_prefix_tokens: leading tokens outside the map (class token, registers); they attend only.
        positional_encoding: (H, W) of the map (or of the window) to learn an encoding of the keys for,
            interpolated to any other size that comes; None for none.
        proj_drop: dropout after the output projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        focusing_factor: float = 3,
        kernel_size: int | None = 5,
        window: Sequence[int] | None = None,
        shift: Sequence[int] | None = None,
        num_prefix_tokens: int = 0,
        positional_encoding: Sequence[int] | None = None,
        proj_drop: float = 0.0,
        eps: float = 1e-6,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads is {num_heads}, expected a positive number")
        if dim < 1 or dim % num_heads:
            raise ValueError(f"dim is {dim}, expected a multiple of num_heads, {num_heads}")
        if kernel_size is not None and kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}, expected an odd number")
        pairs = {"window": window, "shift": shift, "positional_encoding": positional_encoding}
        for name, pair in pairs.items():
            if pair is not None and not (isinstance(pair, Sequence) and len(pair) == 2):
                raise ValueError(f"{name} is {pair}, expected two numbers (height, width)")
        if window is not None and num_prefix_tokens:
            raise ValueError(f"num_prefix_tokens is {num_prefix_tokens}, expected 0 with a window")
        if shift is not None and window is None:
            raise ValueError(f"shift {tuple(shift)} was given without window")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.focusing_factor, self.eps = float(focusing_factor), eps
        self.window = None if window is None else list(window)
        self.shift = None if shift is None else list(shift)
        self.num_prefix_tokens = num_prefix_tokens
        self.positional_encoding_size = (
            window if window is not None and positional_encoding else positional_encoding
        )

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.dwc = (
            None
            if kernel_size is None
            else nn.Conv2d(
                self.head_dim,
                self.head_dim,
                kernel_size,
                padding=kernel_size // 2,
                groups=self.head_dim,
                **factory,
            )
        )
        self.scale = nn.Parameter(torch.empty(1, 1, dim, **factory))
        self.positional_encoding: nn.Parameter | None = None
        if self.positional_encoding_size is not None:
            positions = num_prefix_tokens + math.prod(self.positional_encoding_size)
            self.positional_encoding = nn.Parameter(torch.empty(1, positions, dim, **factory))
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initialisation: torch's for the layers, zero for scale and positional encoding."""
        for layer in (self.qkv, self.dwc, self.proj):
            if layer is not None:
                layer.reset_parameters()
        nn.init.zeros_(self.scale)
        if self.positional_encoding is not None:
            nn.init.zeros_(self.positional_encoding)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """(B, num_prefix_tokens + H*W, C) -> the same.

        Args:
            size: (H, W) of the map; may be left out for a square one.
        """
        if size is None:
            size = self._square(x.shape[1])
        q, k, v = self.qkv(x).unflatten(-1, (3, self.dim)).unbind(2)
        out = attention(
            q,
            k,
            v,
            self.num_heads,
            F.softplus(self.scale).flatten(),
            self._key_bias(size),
            None if self.dwc is None else self.dwc.weight,
            None if self.dwc is None else self.dwc.bias,
            size,
            self.window,
            self.shift,
            self.focusing_factor,
            self.eps,
        )
        return self.proj_drop(self.proj(out))

    def _square(self, tokens: int) -> list[int]:
        side = math.isqrt(tokens - self.num_prefix_tokens)
        if side * side != tokens - self.num_prefix_tokens:
            raise ValueError(
                f"x has {tokens} tokens, {self.num_prefix_tokens} of them prefix, which are no square map: "
                "pass size=(H, W)"
            )
        return [side, side]

    def _key_bias(self, size: Sequence[int]) -> Tensor | None:
        if self.positional_encoding is None:
            return None
        assert self.positional_encoding_size is not None
        target = size if self.window is None else self.window
        return resize_positional_encoding(
            self.positional_encoding, self.positional_encoding_size, target, self.num_prefix_tokens
        )[0]

    def extra_repr(self) -> str:
        text = f"dim={self.dim}, num_heads={self.num_heads}, focusing_factor={self.focusing_factor:g}"
        for name in ("window", "shift", "num_prefix_tokens", "positional_encoding_size"):
            value = getattr(self, name)
            text += f", {name}={tuple(value) if isinstance(value, Sequence) else value}" if value else ""
        return text


def resize_positional_encoding(
    encoding: Tensor, old: Sequence[int], new: Sequence[int], num_prefix_tokens: int = 0
) -> Tensor:
    """(1, P + h*w, C) of an (h, w) map -> (1, P + H*W, C) of an (H, W) map, bicubic; the prefix rows stay."""
    # An exported graph serves every size: it must not depend on whether the example's was the learned one.
    if not torch.compiler.is_exporting() and tuple(old) == tuple(new):
        return encoding
    prefix, grid = encoding[:, :num_prefix_tokens], encoding[:, num_prefix_tokens:]
    image = grid.transpose(1, 2).unflatten(2, (old[0], old[1]))
    image = F.interpolate(image.float(), size=(new[0], new[1]), mode="bicubic", antialias=False)
    return torch.cat((prefix, image.to(encoding.dtype).flatten(2).transpose(1, 2)), 1)
