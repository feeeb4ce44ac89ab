"""Focused linear attention between projections: the one module core, around one operator.

`flatten_ext.FocusedLinearAttention` and the attentions of `flatten_ext.models` are built on it. Parameters
are named as in the public code, so its checkpoints load by their own names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._grids import KeepsGrid
from ._layers import is_plain_conv
from ._local import Size, along_tokens, call_layer, device_of, local_layer
from .ops import attention, depthwise_conv
from .reference import FEATURE_MAPS, NORMALIZERS, choose

# torch.fx records its calls whole: it looks into sizes, which have no values while torch.fx traces.
torch.fx.wrap("resize_positional_encoding")

__all__ = ["FocusedAttention", "LearnedKeys", "Size", "resize_positional_encoding"]


class LearnedKeys(KeepsGrid, nn.Module):
    """The parameters that focused linear attention, and PolaFormer's, add to a softmax attention.

    Args:
        dim: channels C.
        num_heads: heads; C must be a multiple.
        grid: height and width of the map of keys (of one window, with windows), for which
            `positional_encoding` (1, num_prefix_tokens + height * width, C) is learned; other maps get it
            resampled. None for no positional encoding.
        num_prefix_tokens: leading tokens that lie outside the map (class token, registers).
        kernel_size: size of the depthwise kernel that the heads share: an odd number, or an odd
            (height, width); None for none.
        lepe: adds CSWin's locally enhanced positional encoding, a 3x3 depthwise kernel for each channel.
        has_scale: whether there is a parameter `scale`; else it is None.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    positions_name = "positional_encoding"
    gate_letter = ""  # in the name of the projection that makes a gate beside the queries; none here
    reads_input = False  # whether `attend` is given the tokens before the projections too

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Size | None,
        *,
        num_prefix_tokens: int = 0,
        kernel_size: int | Size | None = 5,
        lepe: bool = False,
        has_scale: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads is {num_heads}, expected a positive number")
        if dim < 1 or dim % num_heads:
            raise ValueError(f"dim is {dim}, expected a multiple of num_heads, {num_heads}")
        if num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens is {num_prefix_tokens}, expected 0 or more")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.grid: Any = None if grid is None else (grid[0], grid[1])
        self.scale: Any = nn.Parameter(torch.empty(1, 1, dim, **dd)) if has_scale else None
        self.positional_encoding: Any = None
        if self.grid is not None:
            tokens = num_prefix_tokens + self.grid[0] * self.grid[1]
            self.positional_encoding = nn.Parameter(torch.empty(1, tokens, dim, **dd))
        self.get_v: Any = local_layer(dim, (3, 3), **dd) if lepe else None
        kernel = None if kernel_size is None else _odd_pair(kernel_size)
        self.dwc: Any = None if kernel is None else local_layer(self.head_dim, kernel, **dd)
        LearnedKeys.reset_parameters(self)

    def reset_parameters(self) -> None:
        """The published initialisation of the parameters that lie in no layer: zero."""
        if self.scale is not None:
            nn.init.zeros_(self.scale)
        if self.positional_encoding is not None:
            nn.init.zeros_(self.positional_encoding)

    def positions_grid(self) -> Size | None:
        return self.grid

    def position_grids(self, size: tuple[int, int]) -> dict[str, list[tuple[int, int]]]:
        """The maps of keys for which an encoding may be learned where the tokens tile the map `size`."""
        return {self.positions_name: [size]}

    def set_grid(self, grid: Size) -> None:
        """Resamples the learned positional encoding to another map of keys."""
        if self.positional_encoding is not None:
            encoding = self.encoding(grid).detach()
            self.positional_encoding = nn.Parameter(encoding, self.positional_encoding.requires_grad)
            self.grid = (grid[0], grid[1])

    def encoding(self, grid: Size) -> Any:
        """The positional encoding (1, prefix + H * W, C) on the map `grid`; None where there is none."""
        if self.positional_encoding is None:
            return None
        return resize_positional_encoding(self.positional_encoding, self.grid, grid, self.num_prefix_tokens)


class FocusedAttention(LearnedKeys):
    """The attention between the projections, with the parameters that it adds to a softmax attention.

    Args:
        focusing_factor: p of phi_p, at least 1.
        eps: added to the features and to the normaliser.
        feature_map, normalizer, similarity_scale: as of `flatten_ext.attention`. `scale` is a parameter of
            the feature map "focused" alone; another has None there, and takes the default focusing_factor.
        arguments: of `LearnedKeys`.
    """

    def __init__(
        self,
        *args: Any,
        focusing_factor: float = 3.0,
        eps: float = 1e-6,
        feature_map: str = "focused",
        normalizer: str = "divide",
        similarity_scale: float = 1.0,
        **arguments: Any,
    ):
        choose("feature_map", feature_map, FEATURE_MAPS)
        choose("normalizer", normalizer, NORMALIZERS)
        if feature_map != "focused" and focusing_factor != 3:
            raise ValueError(
                f"focusing_factor is {focusing_factor}, expected its default 3: feature_map {feature_map!r} "
                "does not read it"
            )
        super().__init__(*args, has_scale=feature_map == "focused", **arguments)
        self.focusing_factor, self.eps = float(focusing_factor), eps
        self.feature_map, self.normalizer, self.similarity_scale = feature_map, normalizer, similarity_scale

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        size: Size,
        window: Size | None = None,
        shift: Size | None = None,
        key_size: Size | None = None,
        **general: Any,
    ) -> Tensor:
        """(B, N, C) queries, (B, M, C) keys and values -> (B, N, C).

        Args:
            size: the map the queries tile, after the prefix tokens.
            window: attend inside windows of this size; None is the whole map.
            shift: cyclic shift of the windows.
            key_size: the map the keys tile, where it is not `size`. The depthwise branch then convolves v
                resampled linearly along the flattened tokens, as PVT's public code does.
            general: rotary, key_weight, gate and gate_activation of `flatten_ext.attention`.
        """
        key_grid = key_size if key_size is not None else window if window is not None else size
        encoding = self.encoding(key_grid)
        focus = self.form() | {"key_bias": None if encoding is None else encoding[0]} | general
        weight, bias, called = self._depthwise_branch(device_of(v))
        if key_size is None:
            focus |= {"size": (size[0], size[1]), "window": window, "shift": shift}
            out = attention(q, k, v, self.num_heads, dwc_weight=weight, dwc_bias=bias, **focus)
        else:
            out = attention(q, k, v, self.num_heads, **focus)
            v = along_tokens(v, q.shape[1])
            if weight is not None:
                out = out + depthwise_conv(v, weight, bias, (size[0], size[1]))
        for layer, channels in called:
            out = out + call_layer(layer, channels, v, size, window, shift).to(out.dtype)
        return out

    def form(self) -> dict[str, Any]:
        """What the operator is told beside tokens, map and taps; nothing that is its default."""
        form: dict[str, Any] = {"focusing_factor": self.focusing_factor, "eps": self.eps}
        if self.scale is not None:
            form["scale"] = F.softplus(self.scale).flatten()
        else:
            form["feature_map"] = self.feature_map
        if self.normalizer != "divide":
            form["normalizer"] = self.normalizer
        if self.similarity_scale != 1:
            form["similarity_scale"] = self.similarity_scale
        return form

    def _depthwise_branch(self, device: torch.device | None) -> tuple[Any, Any, list[tuple[nn.Module, int]]]:
        """Weight and bias of the depthwise kernel that the operator is given, and the layers that are called
        beside it, each with the channels of its maps.

        Of a plain layer the weight is read: the operator convolves v while it attends. With LePE it is given
        the sum of both kernels, one for each channel, since both are linear in v.
        """
        dwc, get_v, called = self.dwc, self.get_v, []
        if dwc is not None and not is_plain_conv(dwc, self.head_dim, device):
            called.append((dwc, self.head_dim))
            dwc = None
        if get_v is not None and not is_plain_conv(get_v, self.dim, device):
            called.append((get_v, self.dim))
            get_v = None
        if dwc is None or get_v is None:
            layer = dwc if get_v is None else get_v
            return (None, None, called) if layer is None else (layer.weight, layer.bias, called)
        weight = _sum_of_kernels(get_v.weight, dwc.weight.repeat(self.num_heads, 1, 1, 1))
        biases = [
            bias
            for bias in (get_v.bias, None if dwc.bias is None else dwc.bias.repeat(self.num_heads))
            if bias is not None
        ]
        return weight, sum(biases) if biases else None, called


def _odd_pair(kernel_size: Any) -> tuple[int, int]:
    pair = tuple(kernel_size) if isinstance(kernel_size, Sequence) else (kernel_size, kernel_size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 and side % 2 for side in pair):
        raise ValueError(
            f"kernel_size is {kernel_size}, expected a positive odd number, or two: (height, width)"
        )
    return pair[0], pair[1]


@torch.fx.wrap
def _sum_of_kernels(first: Tensor, second: Tensor) -> Tensor:
    """Depthwise kernels of odd sizes, added around their centres."""
    height, width = (max(a, b) for a, b in zip(first.shape[2:], second.shape[2:], strict=True))

    def padded(kernel: Tensor) -> Tensor:
        rows, columns = (height - kernel.shape[2]) // 2, (width - kernel.shape[3]) // 2
        return F.pad(kernel, (columns, columns, rows, rows)) if rows or columns else kernel

    return padded(first) + padded(second)


def resize_positional_encoding(
    encoding: Tensor, old: Size, new: Size, num_prefix_tokens: int = 0, mode: str = "bicubic"
) -> Tensor:
    """(1, P + h*w, C) of an (h, w) map -> (1, P + H*W, C) of an (H, W) map; the prefix rows stay."""
    # An exported graph serves every size: it must not depend on whether the example's was the learned one.
    if not torch.compiler.is_exporting() and tuple(old) == tuple(new):
        return encoding
    prefix, grid = encoding[:, :num_prefix_tokens], encoding[:, num_prefix_tokens:]
    image = grid.transpose(1, 2).unflatten(2, (old[0], old[1]))
    image = F.interpolate(image.float(), size=(new[0], new[1]), mode=mode, antialias=False)
    return torch.cat((prefix, image.to(encoding.dtype).flatten(2).transpose(1, 2)), 1)
