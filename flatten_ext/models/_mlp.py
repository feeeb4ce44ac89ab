"""The MLPs of the families' blocks, in CPU inference a cache's worth of tokens at a time.

The hidden activations of a batch are the largest buffers of these models: 51 MB at PVT's first stage, batch
8 and 224 px. glibc maps a buffer of more than 32 MB anew for every call, and faulting its pages in takes
longer than the products; what is smaller still goes out to memory and comes back. Tokens are independent
(images are, where the MLP has a convolution), so they are taken through both layers in tiles: on one
AVX-512 core the MLP of PVT's first stage then takes 55 ms instead of 121. Training keeps the hidden
activations anyway. torch.compile is given as few parts as make buffers that glibc keeps, where it knows the
sizes, and torch.export the whole MLP.
"""

from __future__ import annotations

import torch
from timm.layers import Mlp
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ._attention import Size

__all__ = ["tile_mlps"]

# Hidden activations in a tile of tokens, for each thread: about a core's second-level cache.
_TOKENS_TILE = 1 << 20
# And in a tile of images. A convolution's call is dear, so only the buffer's own cost is saved here.
_IMAGES_TILE = 16 << 20
# A larger buffer is mapped anew for every call.
_KEPT = 32 << 20


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
            split = tokens.chunk(_parts_to_compile(tokens.shape[0] * token_bytes))
        else:
            tile = max(1, _TOKENS_TILE * torch.get_num_threads() // token_bytes)
            split = tokens.split(tile) if tokens.shape[0] >= 4 * tile else (tokens,)
        if len(split) == 1:
            return super().forward(x)
        parts = [super(_TiledMlp, self).forward(part) for part in split]
        return torch.cat(parts).view(*x.shape[:-1], -1)


class _TiledConvMlp(MlpWithDepthwiseConv):
    """PVTv2's MLP, whose convolution sees the whole map, by tiles of images."""

    def forward(self, x: Tensor, feat_size: Size) -> Tensor:
        if not _may_tile(self, x):
            return super().forward(x, feat_size)
        image_bytes = x.shape[1] * self.fc1.out_features * x.element_size()
        if torch.compiler.is_compiling():
            split = x.chunk(_parts_to_compile(x.shape[0] * image_bytes))
        else:
            split = x.split(max(1, _IMAGES_TILE // image_bytes))
        if len(split) == 1:
            return super().forward(x, feat_size)
        return torch.cat([super(_TiledConvMlp, self).forward(part, feat_size) for part in split])


_TILED: dict[type[nn.Module], type[nn.Module]] = {Mlp: _TiledMlp, MlpWithDepthwiseConv: _TiledConvMlp}


def _may_tile(mlp: nn.Module, x: Tensor) -> bool:
    return not (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or torch.is_grad_enabled()
        or mlp.training
        or x.device.type != "cpu"
    )


def _parts_to_compile(hidden_bytes: int) -> int:
    """Into how many parts to cut hidden activations; 1 for sizes that the compiler knows only as symbols."""
    for parts in (1, 2, 4, 8, 16, 32):
        if statically_known_true(hidden_bytes <= parts * _KEPT):
            return parts
    return 1
