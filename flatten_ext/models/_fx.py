"""What of timm's code torch.fx has to record whole: it looks into sizes, which have no values in a trace.

A class here overrides the method of timm's that does. While torch.fx traces, the method runs inside a
function of this file that torch.fx records as one call, on an empty object of timm's class with what the
method reads.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.fx import Proxy

__all__ = ["TraceablePositions", "TraceableSwinBlock"]

_TOKENS = ("pos_embed", "cls_token", "reg_token", "dist_token")
_SETTINGS = ("dynamic_img_size", "no_embed_class", "num_prefix_tokens")


class TraceablePositions(VisionTransformer):
    """A vision transformer whose positions for maps of any size torch.fx can record."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        if not isinstance(x, Proxy):
            return super()._pos_embed(x)
        learned = {name: getattr(self, name, None) for name in _TOKENS}
        settings = {name: getattr(self, name) for name in _SETTINGS}
        grid, distilled = tuple(self.patch_embed.grid_size), isinstance(self, VisionTransformerDistilled)
        return self.pos_drop(_with_positions(x, learned, settings, grid, distilled))


@torch.fx.wrap
def _with_positions(
    x: Tensor, learned: dict[str, Any], settings: dict[str, Any], grid: tuple[int, int], distilled: bool
) -> Tensor:
    model = _empty(VisionTransformerDistilled if distilled else VisionTransformer)
    vars(model).update(learned | settings)
    model.patch_embed, model.pos_drop = SimpleNamespace(grid_size=grid), nn.Identity()
    return model._pos_embed(x)


class TraceableSwinBlock(SwinTransformerBlock):
    """timm's Swin block, whose mask for maps of any size torch.fx can record."""

    def get_attn_mask(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Proxy):
            return super().get_attn_mask(x, *args, **kwargs)
        return _mask(x, tuple(self.window_size), tuple(self.shift_size)) if any(self.shift_size) else None


@torch.fx.wrap
def _mask(x: Any, window_size: tuple[int, int], shift_size: tuple[int, int]) -> Tensor:
    block = _empty(SwinTransformerBlock)
    block.window_size, block.shift_size = window_size, shift_size
    block.window_area = window_size[0] * window_size[1]
    return block.get_attn_mask(x)


def _empty(kind: type[nn.Module]) -> Any:
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module
