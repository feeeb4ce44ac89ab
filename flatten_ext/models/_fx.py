"""What of timm's code torch.fx has to record whole: it looks into sizes, which have no values in a trace.

A class here overrides the method of timm's that does. While torch.fx traces, what it computes runs inside a
function of this file that torch.fx records as one call; for positions that is timm's method, on an empty
object of timm's class with what the method reads.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    kind = VisionTransformerDistilled if distilled else VisionTransformer
    model: Any = kind.__new__(kind)
    nn.Module.__init__(model)
    vars(model).update(learned | settings)
    model.patch_embed, model.pos_drop = SimpleNamespace(grid_size=grid), nn.Identity()
    return model._pos_embed(x)


class TraceableSwinBlock(SwinTransformerBlock):
    """timm's Swin block, with its mask of shifted windows in few operations that compilers and torch.fx take.

    timm's assigns nine regions of a map one after the other. In a graph each is a choice around those before:
    torch.compile, AOTInductor and exports at unknown sizes multiply them out and take minutes a block.
    """

    def get_attn_mask(
        self, x: Any = None, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        if not any(self.shift_size):
            return None
        window, shift = tuple(self.window_size), tuple(self.shift_size)
        if x is not None:
            return _mask_of(x, window, shift)
        size = [-(-side // w) * w for side, w in zip(self.input_resolution, window, strict=True)]
        return _mask(size, window, shift, device, dtype)


@torch.fx.wrap
def _mask_of(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """The mask for the padded map (B, H, W, C)."""
    return _mask(x.shape[1:3], window, shift, x.device, x.dtype)


def _mask(
    size: Sequence[int],
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """(windows, tokens, tokens): -100 between tokens of a window that were no neighbours before the map was
    rolled, else 0. `size` is a multiple of `window`."""
    regions = []  # along each axis: (windows, tokens of a window)
    for side, length, by in zip(size, window, shift, strict=True):
        place = torch.arange(side, device=device)
        # What rolls in from the other end; the rest of its window; all before. Without a shift all is one.
        region = (place >= side - length).int() + (place >= side - by).int()
        regions.append((region if by else region * 0).unflatten(0, (-1, length)))
    rows, columns = regions
    # (windows down, windows across, height, width) of a window, three regions an axis.
    region = 3 * rows[:, None, :, None] + columns[None, :, None, :]
    region = region.flatten(2).flatten(0, 1)
    differ = region.unsqueeze(1) != region.unsqueeze(2)
    return torch.where(differ, -100.0, 0.0).to(dtype or torch.get_default_dtype())
