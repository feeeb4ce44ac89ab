"""FocusedLinearAttention, a drop-in for the self-attention of a vision transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ._focused import FocusedAttention, Size, resize_positional_encoding

__all__ = ["FocusedLinearAttention", "resize_positional_encoding"]


class FocusedLinearAttention(FocusedAttention):
    """Multi-head self-attention in linear time over (B, N, C) tokens: project, attend, project.

    FLatten Transformer, arXiv 2308.00442. The parameters bear the names of the published code (`qkv`, `proj`,
    `dwc`, `scale`, `positional_encoding`), so its attention weights load as they are. As there, the parameter
    `scale` goes through a softplus, and the ReLU features are **divided** by the result. Arguments behind
    `num_heads` are meant to be given by name.

    Args:
        dim: C, the channels of a token.
        num_heads: heads; must divide `dim`.
        qkv_bias: whether the input projection has a bias.
        focusing_factor: p of phi_p; 1 gives plain ReLU linear attention, the paper uses 3.
        kernel_size: of the depthwise convolution of the values, which the heads share: an odd number, or an
            odd (height, width); None for no convolution.
        window: (wh, ww) to attend and convolve inside windows of the map; None for the whole map.
        shift: (sh, sw) cyclic shift of the window grid.
        num_prefix_tokens: leading tokens outside the map (class token, registers); they attend only.
        positional_encoding: (H, W) of the map to learn an encoding of the keys for, interpolated to any other
            size that comes; with `window`, that of the window; None for none.
        proj_drop: probability of dropout after the output projection.
        eps: added to the features and to the normaliser.
        device, dtype: of the parameters, as of torch's layers.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Example:
        >>> import torch
        >>> from flatten_ext import FocusedLinearAttention
        >>> block = FocusedLinearAttention(dim=96, num_heads=3, positional_encoding=(14, 14))
        >>> tokens = torch.randn(8, 14 * 20, 96)
        >>> block(tokens, size=(14, 20)).shape
        torch.Size([8, 280, 96])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        focusing_factor: float = 3,
        kernel_size: int | Sequence[int] | None = 5,
        window: Sequence[int] | None = None,
        shift: Sequence[int] | None = None,
        num_prefix_tokens: int = 0,
        positional_encoding: Sequence[int] | None = None,
        proj_drop: float = 0.0,
        eps: float = 1e-6,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        window, shift = _pair("window", window, 1), _pair("shift", shift, 0)
        positional_encoding = _pair("positional_encoding", positional_encoding, 1)
        if window is not None and num_prefix_tokens:
            raise ValueError(f"num_prefix_tokens is {num_prefix_tokens}, expected 0 with a window")
        if shift is not None and window is None:
            raise ValueError(f"shift {shift} was given without window")
        if None not in (window, positional_encoding) and positional_encoding != window:
            raise ValueError(
                f"positional_encoding is {positional_encoding}, expected {window}: with a window it is "
                "learned for the places in the window"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            dim,
            num_heads,
            positional_encoding,
            num_prefix_tokens=num_prefix_tokens,
            focusing_factor=focusing_factor,
            kernel_size=kernel_size,
            eps=eps,
            **factory,
        )
        self.window, self.shift = window, shift
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initialisation: torch's for the layers, zero for scale and positional encoding."""
        for layer in (self.qkv, self.dwc, self.proj):
            if layer is not None:
                layer.reset_parameters()
        super().reset_parameters()

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """(B, num_prefix_tokens + H*W, C) -> the same.

        Args:
            size: (H, W) of the map; may be left out for a square one.

        Raises:
            ValueError: `x` is not (B, N, dim), or its tokens tile no square map and `size` was left out.
            RuntimeError: of the operator: `size` does not fit the tokens, or `window` the size.
        """
        if not isinstance(x, Proxy) and (x.ndim != 3 or x.shape[2] != self.dim):
            raise ValueError(f"x is {tuple(x.shape)}, expected (batch, tokens, {self.dim})")
        size = _map(x.shape[1], size, self.num_prefix_tokens)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.dim)).unbind(-2)
        return self.proj_drop(self.proj(self.attend(q, k, v, size, self.window, self.shift)))

    @property
    def positional_encoding_size(self) -> tuple[int, int] | None:
        """(height, width) that the positional encoding is learned for."""
        return self.grid

    def extra_repr(self) -> str:
        text = f"dim={self.dim}, num_heads={self.num_heads}, focusing_factor={self.focusing_factor:g}"
        for name in ("window", "shift", "num_prefix_tokens", "positional_encoding_size"):
            value = getattr(self, name)
            text += f", {name}={value}" if value else ""
        return text


@torch.fx.wrap
def _map(tokens: int, size: Size | None, prefix: int) -> Size:
    """The map that the tokens tile; the square one where `size` is left out."""
    if size is None:
        if tokens <= prefix:
            raise ValueError(f"x has {tokens} tokens, {prefix} of them prefix, which leave none for a map")
        side = math.isqrt(tokens - prefix)
        if side * side != tokens - prefix:
            raise ValueError(
                f"x has {tokens} tokens, {prefix} of them prefix, which are no square map: pass size=(H, W)"
            )
        return side, side
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"size is {size}, expected two numbers (height, width)")
    # Not asked of sizes that a graph leaves open: the graph would be tied to the answer.
    if not torch.compiler.is_compiling() and prefix + size[0] * size[1] != tokens:
        raise ValueError(
            f"x has {tokens} tokens, expected {prefix + size[0] * size[1]}: size is {tuple(size)}, with "
            f"{prefix} prefix tokens before it"
        )
    return size


def _pair(name: str, value: Any, least: int) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(side, int) and side >= least for side in pair):
        raise ValueError(f"{name} is {value}, expected two numbers (height, width) of at least {least}")
    return pair[0], pair[1]
