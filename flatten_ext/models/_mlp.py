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
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .._layers import is_plain, is_plain_conv
from ._attention import Size, to_map

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
        if not _may_tile(self, x):
            return super().forward(x)
        tokens = x.reshape(-1, x.shape[-1])
        token_bytes = self.fc1.out_features * _dtype(x).itemsize
        # A graph does not know how many threads will run it.
        threads = 1 if torch.compiler.is_compiling() else torch.get_num_threads()
        few = tokens.shape[0] < _LEAST_TILES * _tokens_in_tile(token_bytes, threads)
        if statically_known_true(few) or not _is_plain(self, x.device):
            return super().forward(x)
        return _in_tiles(self, tokens).view(*x.shape[:-1], -1)


class _TiledConvMlp(MlpWithDepthwiseConv):
    """PVTv2's MLP, whose convolution sees the whole map, by tiles of images."""

    def forward(self, x: Tensor, feat_size: Size) -> Tensor:
        if not _may_tile(self, x):
            return self._whole(x, feat_size)
        image_bytes = x.shape[1] * self.fc1.out_features * _dtype(x).itemsize
        one_tile = x.shape[0] * image_bytes <= _IMAGES_TILE
        if statically_known_true(one_tile) or not _is_plain(self, x.device):
            return self._whole(x, feat_size)
        relu = not isinstance(self.relu, nn.Identity)
        return _in_tiles(self, x, self.dwconv.weight, self.dwconv.bias, relu, feat_size)

    def _whole(self, x: Tensor, feat_size: Size) -> Tensor:
        """timm's forward, on a map that stays channels_last where the batch is one image."""
        x = self.dwconv(self.relu(to_map(self.fc1(x), feat_size)))
        x = self.drop(self.act(x.flatten(2).transpose(1, 2)))
        return self.drop(self.fc2(x))


_TILED: dict[type[nn.Module], type[nn.Module]] = {Mlp: _TiledMlp, MlpWithDepthwiseConv: _TiledConvMlp}


def _may_tile(mlp: Any, x: Tensor) -> bool:
    return not (
        isinstance(x, Proxy)
        or torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or torch.is_grad_enabled()
        or mlp.training
        or x.device.type != "cpu"
        or type(mlp.fc1) is not nn.Linear
    )


def _is_plain(mlp: Any, device: torch.device) -> bool:
    """Whether the layers compute no more than the tiles: no adapter, hook, dropout, other activation, or
    weight that is no plain tensor."""
    for name, layer in mlp.named_children():
        if type(layer) not in _PLAIN.get(name, ()) or layer.training or not is_plain(layer, device):
            return False
        if name == "dwconv" and not is_plain_conv(layer, mlp.fc1.out_features, device):
            return False
    return True


# The layers, by their names in timm, whose classes and settings say all that they compute in inference.
_PLAIN: dict[str, tuple[type[nn.Module], ...]] = {
    "fc1": (nn.Linear,),
    "relu": (nn.Identity, nn.ReLU),
    "dwconv": (nn.Conv2d,),
    "act": (nn.GELU,),
    "drop": (nn.Dropout,),
    "drop1": (nn.Dropout,),
    "norm": (nn.Identity,),
    "fc2": (nn.Linear,),
    "drop2": (nn.Dropout,),
}


def _dtype(x: Tensor) -> torch.dtype:
    """What the layers compute in: autocast's dtype where that is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _tokens_in_tile(token_bytes: int, threads: int) -> int:
    return max(_LEAST_TOKENS, _TOKENS_TILE * threads // token_bytes)


def _images_in_tile(image_bytes: int) -> int:
    """As many for each thread: a depthwise convolution is spread over images."""
    threads = torch.get_num_threads()
    return threads * max(1, _IMAGES_TILE // (threads * image_bytes))


def _in_tiles(
    mlp: Mlp | MlpWithDepthwiseConv,
    x: Tensor,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    relu: bool = False,
    size: Size | None = None,
) -> Tensor:
    """The MLP by tiles, in autocast's dtype where that is on: to torch.compile one node of its graph."""
    dtype = _dtype(x)
    tensors = [x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, conv_weight, conv_bias]
    tensors = [None if t is None else t.to(dtype) for t in tensors]
    run: Any = mlp_in_tiles if torch.compiler.is_compiling() else _by_tiles
    return run(*tensors, relu, size, mlp.act.approximate)


def _by_tiles(
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

    def through(part: Tensor) -> Tensor:
        hidden = F.linear(part, weight1, bias1)
        if conv_weight is not None and size is not None:
            maps = to_map(hidden, size)
            maps = F.conv2d(
                maps.relu() if relu else maps, conv_weight, conv_bias, padding=1, groups=maps.shape[1]
            )
            hidden = maps.flatten(2).transpose(1, 2)
        return F.linear(F.gelu(hidden, approximate=approximate), weight2, bias2)

    return torch.cat([through(part) for part in x.split(tile)])


mlp_in_tiles = torch.library.custom_op(
    "flatten::mlp_in_tiles", _by_tiles, mutates_args=(), device_types="cpu"
)


@mlp_in_tiles.register_fake
def _(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, *others: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight2.shape[0])
