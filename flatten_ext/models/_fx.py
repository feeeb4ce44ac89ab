"""What of timm torch.fx has to record whole: it looks into sizes, which have no values while it traces."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from timm.models import vision_transformer
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.fx import Proxy

__all__ = ["TraceableSwinBlock"]


def _record_whole(module: ModuleType, function: str) -> None:
    """torch.fx.wrap, which belongs at the top of a module's file, for a module of somebody else's."""
    exec(f"import torch.fx; torch.fx.wrap({function!r})", module.__dict__)


_record_whole(vision_transformer, "resample_abs_pos_embed")


class TraceableSwinBlock(SwinTransformerBlock):
    """timm's Swin block, whose mask for maps of any size torch.fx can record."""

    def get_attn_mask(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Proxy):
            return super().get_attn_mask(x, *args, **kwargs)
        return _mask(x, tuple(self.window_size), tuple(self.shift_size)) if any(self.shift_size) else None


@torch.fx.wrap
def _mask(x: Any, window_size: tuple[int, int], shift_size: tuple[int, int]) -> Tensor:
    block: Any = SwinTransformerBlock.__new__(SwinTransformerBlock)
    nn.Module.__init__(block)
    block.window_size, block.shift_size = window_size, shift_size
    block.window_area = window_size[0] * window_size[1]
    return block.get_attn_mask(x)
