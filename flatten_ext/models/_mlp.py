"""The MLPs of the families' blocks, in CPU inference a cache's worth of tokens at a time.

The hidden activations of a batch are the largest buffers of these models: 51 MB at PVT's first stage, batch
8 and 224 px. glibc maps a buffer of more than 32 MB anew for every call, and faulting its pages in takes
longer than the products; what is smaller still goes out to memory and comes back. Tokens are independent
(images are, where the MLP has a convolution), so they are taken through both layers in tiles: on one
AVX-512 core the MLP of PVT's first stage then takes 55 ms instead of 121. Training keeps the hidden
activations anyway, and a compiler is given the whole MLP.
"""

from __future__ import annotations

import torch
from timm.layers import Mlp
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn

from ._attention import Size

__all__ = ["tile_mlps"]

# Hidden activations in a tile of tokens, for each thread: about a core's second-level cache.
_TOKENS_TILE = 1 << 20
# And in a tile of images. A convolution's call is dear, so only the buffer's own cost is saved here.
_IMAGES_TILE = 16 << 20


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
        budget = _TOKENS_TILE * torch.get_num_threads()
        tile = max(1, budget // (self.fc1.out_features * x.element_size()))
        if tokens.shape[0] < 4 * tile:
            return super().forward(x)
        parts = [super(_TiledMlp, self).forward(part) for part in tokens.split(tile)]
        return torch.cat(parts).view(*x.shape[:-1], -1)


class _TiledConvMlp(MlpWithDepthwiseConv):
    """PVTv2's MLP, whose convolution sees the whole map, by tiles of images."""

    def forward(self, x: Tensor, feat_size: Size) -> Tensor:
        if not _may_tile(self, x):
            return super().forward(x, feat_size)
        tile = max(1, _IMAGES_TILE // (x.shape[1] * self.fc1.out_features * x.element_size()))
        if x.shape[0] <= tile:
            return super().forward(x, feat_size)
        return torch.cat([super(_TiledConvMlp, self).forward(part, feat_size) for part in x.split(tile)])


_TILED: dict[type[nn.Module], type[nn.Module]] = {Mlp: _TiledMlp, MlpWithDepthwiseConv: _TiledConvMlp}


def _may_tile(mlp: nn.Module, x: Tensor) -> bool:
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_grad_enabled()
        or mlp.training
        or x.device.type != "cpu"
    )
