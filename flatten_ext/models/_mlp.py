"""The MLPs of the families' blocks, in CPU inference a cache's worth of tokens at a time.

The hidden activations of a batch are the largest buffers of these models: 51 MB at PVT's first stage, batch
8 and 224 px. glibc maps a buffer of more than 32 MB anew for every call, and faulting its pages in takes
longer than the products; what is smaller still goes out to memory and comes back. Tokens are independent
(images are, where the MLP has a convolution), so they are taken through both layers in tiles. On two
AVX-512 cores the MLP of PVT's first stage then takes 22 ms instead of 56 (torch.compile's: 42), that of
PVTv2-B0's first 10 instead of 27. Training keeps the hidden activations anyway. To torch.compile an MLP
worth tiling is one operator, which it need not see through; torch.export is given the whole MLP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ._attention import Size

__all__ = ["tile_mlps"]

# Bytes of hidden activations in a tile of tokens, for each thread: about a core's second-level cache.
_TOKENS_TILE = 1 << 20
# Tokens in a tile at the least: matrix products pack the weights anew for every tile.
_LEAST_TOKENS = 1 << 10
# Bytes in a tile of images: a few such buffers fit the third-level cache.
_IMAGES_TILE = 8 << 20
# Fewer tiles of tokens are not worth their calls.
_LEAST_TILES = 4


def tile_mlps(model: nn.Module) -> None:
    """Makes the MLPs of `model` work in tiles. Parameters and results stay as they are."""
    for module in model.modules():
        tiled = _TILED.get(type(module))
        if tiled is not None:
            module.__class__ = tiled


class _TiledMlp(Mlp):
    """timm's MLP, by tiles of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.fc1, nn.Linear) or not _may_tile(self, x):
            return super().forward(x)
        tokens = x.reshape(-1, x.shape[-1])
        token_bytes = self.fc1.out_features * x.element_size()
        if torch.compiler.is_compiling():
            few = tokens.shape[0] < _LEAST_TILES * _tokens_in_tile(token_bytes, threads=1)
            if statically_known_true(few) or not _is_plain(self):
                return super().forward(x)
            return _as_operator(self, tokens).view(*x.shape[:-1], -1)
        tile = _tokens_in_tile(token_bytes, torch.get_num_threads())
        if tokens.shape[0] < _LEAST_TILES * tile:
            return super().forward(x)
        parts = [super(_TiledMlp, self).forward(part) for part in tokens.split(tile)]
        return torch.cat(parts).view(*x.shape[:-1], -1)


class _TiledConvMlp(MlpWithDepthwiseConv):
    """PVTv2's MLP, whose convolution sees the whole map, by tiles of images."""

    def forward(self, x: Tensor, feat_size: Size) -> Tensor:
        if not _may_tile(self, x):
            return super().forward(x, feat_size)
        image_bytes = x.shape[1] * self.fc1.out_features * x.element_size()
        if torch.compiler.is_compiling():
            one_tile = x.shape[0] * image_bytes <= _IMAGES_TILE
            if statically_known_true(one_tile) or not _is_plain(self):
                return super().forward(x, feat_size)
            relu = not isinstance(self.relu, nn.Identity)
            return _as_operator(self, x, self.dwconv.weight, self.dwconv.bias, relu, feat_size)
        split = x.split(_images_in_tile(image_bytes))
        if len(split) == 1:
            return super().forward(x, feat_size)
        return torch.cat([super(_TiledConvMlp, self).forward(part, feat_size) for part in split])


_TILED: dict[type[nn.Module], type[nn.Module]] = {Mlp: _TiledMlp, MlpWithDepthwiseConv: _TiledConvMlp}
# The layers whose classes and settings say all that they compute in inference.
_PLAIN = (nn.Linear, nn.Conv2d, nn.GELU, nn.ReLU, nn.Identity, nn.Dropout)


def _may_tile(mlp: nn.Module, x: Tensor) -> bool:
    return not (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or torch.is_grad_enabled()
        or mlp.training
        or x.device.type != "cpu"
    )


def _is_plain(mlp: nn.Module) -> bool:
    """Whether the layers compute no more than the operator: no adapter, hook, dropout or other activation."""

    def plain(layer: nn.Module) -> bool:
        does_more = layer.training or layer._forward_hooks or layer._forward_pre_hooks
        return type(layer) in _PLAIN and not does_more

    return type(mlp.act) is nn.GELU and all(plain(layer) for layer in mlp.children())


def _tokens_in_tile(token_bytes: int, threads: int) -> int:
    return max(_LEAST_TOKENS, _TOKENS_TILE * threads // token_bytes)


def _images_in_tile(image_bytes: int) -> int:
    """As many for each thread: a depthwise convolution is spread over images."""
    threads = torch.get_num_threads()
    return threads * max(1, _IMAGES_TILE // (threads * image_bytes))


def _as_operator(
    mlp: Mlp | MlpWithDepthwiseConv,
    x: Tensor,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    relu: bool = False,
    size: Size | None = None,
) -> Tensor:
    """The MLP as one node of torch.compile's graph, in autocast's dtype where that is on."""
    tensors = [x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, conv_weight, conv_bias]
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        tensors = [None if t is None else t.to(dtype) for t in tensors]
    return mlp_in_tiles(*tensors, relu, size, mlp.act.approximate)


@torch.library.custom_op("flatten::mlp_in_tiles", mutates_args=(), device_types="cpu")
def mlp_in_tiles(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    relu: bool,
    size: Sequence[int] | None,
    approximate: str,
) -> Tensor:
    """A linear layer, GELU and a linear layer, by tiles of the first dimension.

    Args:
        x: tokens (N, C), or with a convolution images (B, H * W, C).
        weight1, bias1, weight2, bias2: of the linear layers.
        conv_weight, conv_bias: of a depthwise 3 x 3 convolution before GELU; None for none.
        relu: whether a ReLU goes before the convolution.
        size: H and W, with a convolution.
        approximate: GELU's argument.

    Returns:
        The shape of x with the channels of the second layer.
    """
    row_bytes = math.prod(x.shape[1:-1]) * weight1.shape[0] * x.element_size()
    if conv_weight is None:
        tile = _tokens_in_tile(row_bytes, torch.get_num_threads())
    else:
        tile = _images_in_tile(row_bytes)
    out = x.new_empty(*x.shape[:-1], weight2.shape[0])
    for part, to in zip(x.split(tile), out.split(tile), strict=True):
        hidden = F.linear(part, weight1, bias1)
        if conv_weight is not None and size is not None:
            maps = hidden.transpose(1, 2).unflatten(-1, size)
            maps = F.conv2d(
                maps.relu() if relu else maps, conv_weight, conv_bias, padding=1, groups=maps.shape[1]
            )
            hidden = maps.flatten(2).transpose(1, 2)
        to.copy_(F.linear(F.gelu(hidden, approximate=approximate), weight2, bias2))
    return out


@mlp_in_tiles.register_fake
def _(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, *others: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight2.shape[0])
