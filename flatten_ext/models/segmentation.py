"""Semantic segmentation by a feature pyramid head (Panoptic FPN, arXiv 1901.02446) on our backbones."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .detection import FeaturePyramid

__all__ = ["SegmentationFPN"]


class SegmentationFPN(nn.Module):
    """Sums the four levels of a feature pyramid at stride 4, classifies each position, and upsamples.

    Args:
        name: a timm model name, ours or timm's.
        num_classes: classes.
        channels: channels of the pyramid's levels.
        head_channels: channels of the head, a multiple of 32 for its group normalisation.
        kwargs: arguments of `timm.create_model`.
    """

    def __init__(
        self, name: str, num_classes: int, channels: int = 256, head_channels: int = 128, **kwargs: Any
    ):
        super().__init__()
        self.backbone = FeaturePyramid(name, channels, **kwargs)
        self.branches = nn.ModuleList(_branch(level, channels, head_channels) for level in range(4))
        self.classifier = nn.Conv2d(head_channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes, H, W) logits; sides that 32 does not divide are padded."""
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % 32, 0, -height % 32))
        levels = self.backbone(x).values()
        total = sum(branch(level) for branch, level in zip(self.branches, levels, strict=True))
        logits = F.interpolate(self.classifier(total), scale_factor=4, mode="bilinear")
        return logits[:, :, :height, :width]


def _branch(level: int, channels: int, out_channels: int) -> nn.Sequential:
    """From stride 4 << level to stride 4: one convolution and doubling at a time."""
    layers: list[nn.Module] = []
    for i in range(max(level, 1)):
        layers += [
            nn.Conv2d(channels if i == 0 else out_channels, out_channels, 3, padding=1, bias=False),
            nn.GroupNorm(32, out_channels),
            nn.ReLU(),
        ]
        if level:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
    return nn.Sequential(*layers)
