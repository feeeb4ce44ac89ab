"""FocusedLinearAttention, a drop-in for the self-attention of a vision transformer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ._focused import FocusedAttention, Size, resize_positional_encoding
from ._layers import is_plain
from .ops import attention
from .reference import ACTIVATIONS, choose
from .rotary import kept_table

torch.fx.wrap("kept_table")  # it looks into sizes

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
        feature_map, normalizer, similarity_scale: as of `flatten_ext.attention`. Only "focused" has the
            parameter `scale` and reads `focusing_factor`.
        rotary: rotates queries and keys by their places on the map, or in the window, in the attention's
            numerator: "heads" by the same angles in every head (RALA's table), "channels" by angles of their
            own (MLLA's); True is "heads". See `flatten_ext.rotary_table`; prefix tokens are not rotated.
        gate: multiplies what is attended to by a projection of the tokens, the layer `gate`: "none" as it is
            (True is the same), "silu" or "sigmoid" through that function; None or False for no gate.
        process_group: a torch.distributed.ProcessGroup (or the name of one) whose processes each call the
            module with a strip of rows of one map: see `flatten_ext.distributed.attention`, also for what
            becomes of the parameters' gradients. None for whole maps.
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
        *,
        feature_map: str = "focused",
        rotary: bool | str | None = None,
        gate: bool | str | None = None,
        normalizer: str = "divide",
        similarity_scale: float = 1.0,
        process_group: Any = None,
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
        if process_group is not None and num_prefix_tokens:
            raise ValueError(f"num_prefix_tokens is {num_prefix_tokens}, expected 0 with a process_group")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            dim,
            num_heads,
            positional_encoding,
            num_prefix_tokens=num_prefix_tokens,
            focusing_factor=focusing_factor,
            kernel_size=kernel_size,
            eps=eps,
            feature_map=feature_map,
            normalizer=normalizer,
            similarity_scale=similarity_scale,
            **factory,
        )
        self.rotary = _rotary(rotary, dim, num_heads)
        self.gate_activation = _activation(gate)
        self.gate: Any = None if self.gate_activation is None else nn.Linear(dim, dim, **factory)
        self.window, self.shift = window, shift
        # By its name, so that the module can be copied and pickled.
        self.process_group: str | None = getattr(process_group, "group_name", process_group)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initialisation: torch's for the layers, zero for scale and positional encoding."""
        for layer in (self.qkv, self.dwc, self.gate, self.proj):
            if layer is not None:
                layer.reset_parameters()
        super().reset_parameters()

    def forward(
        self,
        x: Tensor,
        size: Sequence[int] | None = None,
        key_padding_mask: Tensor | None = None,
        context: Tensor | None = None,
        *,
        strip: Sequence[int] | None = None,
    ) -> Tensor:
        """(B, num_prefix_tokens + H*W, C) -> the same.

        Args:
            size: (H, W) of the map; may be left out for a square one. With `process_group` that of the strip.
            key_padding_mask: (B, M) bool as torch.nn.MultiheadAttention takes it: **True where a token is
                padding**, which nothing attends to and no tap sees, as if the map ended there. (The opposite
                of scaled_dot_product_attention's mask and of the operator's `key_weight`.) M = N, or the
                tokens of `context`. What comes out at padding itself means nothing.
            context: (B, M, C) tokens to attend to in place of `x` (cross-attention). Both may be of any
                number, and `size` is not read. A module without convolution, window, rotation and positional
                encoding can take it, as these are about one map.
            strip: (first row, rows of the whole map), where this process's strip lies. Needed where
                `process_group` meets a positional encoding or rotation of the whole map, and taken with the
                former alone.

        Raises:
            ValueError: `x` is not (B, N, dim), or its tokens tile no square map and `size` was left out;
                `key_padding_mask` or `context` are not as above; a plan of tensor parallelism shares out
                what `qkv` gives.
            RuntimeError: of the operator: `size` does not fit the tokens, or `window` the size.
        """
        if not isinstance(x, Proxy) and (x.ndim != 3 or x.shape[2] != self.dim):
            raise ValueError(f"x is {tuple(x.shape)}, expected (batch, tokens, {self.dim})")
        if isinstance(context, Proxy):
            _refuse_context(context)
            context = None
        if self.process_group is None and not isinstance(strip, Proxy) and strip is not None:
            raise ValueError(f"strip is {strip}, expected None without a process_group")
        if self.process_group is not None and context is not None:
            raise ValueError("context was given to a module with process_group, expected one without it")
        general: dict[str, Any] = {}
        if self.gate is not None:
            general = {"gate": self.gate(x), "gate_activation": self.gate_activation}
        if context is None:
            size = _map(x.shape[1], size, self.num_prefix_tokens)
            q, k, v = _three(self.qkv(x), self.dim)
            if self.rotary is not None and self.process_group is None:
                general["rotary"] = self.rotary_table(size, x)
        else:
            q, k, v = self._cross(x, context)
        if key_padding_mask is not None:
            v, general["key_weight"] = _without_padding(v, key_padding_mask)
        if self.process_group is not None:
            out = self._attend_in_group(q, k, v, size, strip, general)  # type: ignore[arg-type]
        elif context is None:
            out = self.attend(q, k, v, size, self.window, self.shift, **general)  # type: ignore[arg-type]
        else:
            out = attention(q, k, v, self.num_heads, **self.form(), **general)
        return self.proj_drop(self.proj(out))

    def _attend_in_group(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        size: Size,
        strip: Sequence[int] | None,
        general: dict[str, Any],
    ) -> Tensor:
        from . import distributed  # torch's distributed modules, which few need

        def rows(of_map: Callable[[Size], Any], dim: int) -> Any:
            """What belongs to the strip's tokens, of a table for those of the whole map or of a window."""
            if self.window is not None:
                return of_map(self.window)
            if strip is None or not 0 <= strip[0] <= strip[1] - size[0]:
                raise ValueError(
                    f"strip is {strip}, expected (first row, rows of the whole map) of this process's "
                    f"{size[0]} rows, to find their positions"
                )
            return of_map((strip[1], size[1])).narrow(dim, strip[0] * size[1], size[0] * size[1])

        if self.positional_encoding is not None:
            general["key_bias"] = rows(self.encoding, 1)[0]
        if self.rotary is not None:
            general["rotary"] = rows(lambda whole: self.rotary_table(whole, q), 0)
        weight, bias, called = self._depthwise_branch(v.device)
        if called:
            raise ValueError("dwc is no plain nn.Conv2d, or has hooks: expected one with a process_group")
        return distributed.attention(
            q, k, v, self.num_heads, dwc_weight=weight, dwc_bias=bias, size=size, group=self.process_group,
            window=self.window, shift=self.shift, **self.form(), **general,
        )  # fmt: skip

    def rotary_table(self, size: Sequence[int], like: Tensor) -> Tensor:
        """The table that `rotary` rotates by on a map of `size`, on the device of `like`."""
        heads = self.num_heads if self.rotary == "heads" else None
        size = size if self.window is None else self.window
        return kept_table(like, size, self.dim, heads, self.num_prefix_tokens)

    def _cross(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, keys and values of the context."""
        bound = {
            "kernel_size": self.dwc, "window": self.window, "rotary": self.rotary,
            "positional_encoding": self.positional_encoding,
        }  # fmt: skip
        for name, value in bound.items():
            if value is not None:
                raise ValueError(f"context was given to a module with {name}, expected a module without it")
        if context.ndim != 3 or context.shape[0] != x.shape[0] or context.shape[2] != self.dim:
            raise ValueError(
                f"context is {tuple(context.shape)}, expected ({x.shape[0]}, tokens, {self.dim})"
            )
        if type(self.qkv) is not nn.Linear or not is_plain(self.qkv, x.device):
            q, k, v = _three(self.qkv(torch.cat((x, context), 1)), self.dim)
            return q[:, : x.shape[1]], k[:, x.shape[1] :], v[:, x.shape[1] :]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x, weight[: self.dim], None if bias is None else bias[: self.dim])
        both = F.linear(context, weight[self.dim :], None if bias is None else bias[self.dim :])
        k, v = both.chunk(2, -1)
        return q, k, v

    @property
    def positional_encoding_size(self) -> tuple[int, int] | None:
        """(height, width) that the positional encoding is learned for."""
        return self.grid

    def extra_repr(self) -> str:
        text = f"dim={self.dim}, num_heads={self.num_heads}, focusing_factor={self.focusing_factor:g}"
        for name in ("window", "shift", "num_prefix_tokens", "positional_encoding_size", "rotary"):
            value = getattr(self, name)
            text += f", {name}={value}" if value else ""
        for name, default in (("feature_map", "focused"), ("normalizer", "divide"), ("similarity_scale", 1)):
            value = getattr(self, name)
            text += f", {name}={value}" if value != default else ""
        if self.gate_activation is not None:
            text += f", gate={self.gate_activation}"
        return text


def _three(packed: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of what the layer `qkv` gave."""
    if not isinstance(packed, Proxy) and packed.shape[-1] != 3 * dim:
        raise ValueError(
            f"qkv gives {packed.shape[-1]} channels, expected {3 * dim}, those of q, k and v whole: in a "
            "plan of torch.distributed.tensor.parallel give qkv ColwiseParallel(output_layouts=Replicate()), "
            "and proj RowwiseParallel(input_layouts=Replicate())"
        )
    q, k, v = packed.unflatten(-1, (3, dim)).unbind(-2)
    return q, k, v


def _rotary(rotary: Any, dim: int, num_heads: int) -> str | None:
    kind = {True: "heads", False: None}.get(rotary, rotary) if isinstance(rotary, bool) else rotary
    if kind not in (None, "heads", "channels"):
        raise ValueError(f"rotary is {rotary!r}, expected None, 'heads' or 'channels'")
    width = dim // num_heads if kind == "heads" else dim
    if kind is not None and (width % 4 or (dim // num_heads) % 2):
        raise ValueError(
            f"rotary is {kind!r} with {width} channels to rotate, expected a multiple of 4 (a half turns "
            "with the row, a half with the column), and an even number in each head"
        )
    return kind


def _activation(gate: Any) -> str | None:
    if isinstance(gate, bool):
        return "none" if gate else None
    if gate is not None:
        choose("gate", gate, ACTIVATIONS)
    return gate


@torch.fx.wrap
def _refuse_context(context: Tensor | None) -> None:
    if context is not None:
        raise ValueError("context was given to a module that torch.fx traced without it")


@torch.fx.wrap
def _without_padding(v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Values that are 0 where tokens are padding, for the taps, and the keys' weights."""
    if mask is None:
        return v, None
    if mask.dtype != torch.bool or mask.shape != v.shape[:2]:
        raise ValueError(
            f"key_padding_mask is {str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}, expected "
            f"bool {tuple(v.shape[:2])}, True where a token is padding"
        )
    weight = (~mask).to(torch.float64 if v.dtype == torch.float64 else torch.float32)
    return v.masked_fill(mask[..., None], 0), weight


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
