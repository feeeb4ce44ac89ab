"""torchvision's RetinaNet and Mask R-CNN on any of our backbones."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import timm
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

__all__ = ["FeaturePyramid", "mask_rcnn", "retinanet"]


class FeaturePyramid(nn.Module):
    """A backbone's four feature maps, brought to strides 4, 8, 16 and 32, and a feature pyramid over them.

    Pyramids (PVT, PVTv2, Swin, CSWin) have these strides; the last blocks of a DeiT, all of stride 16, are
    interpolated to them.

    Args:
        name: a timm model name, ours or timm's.
        out_channels: channels of every level.
        extra_blocks: further, coarser levels.
        kwargs: arguments of `timm.create_model`.
    """

    def __init__(
        self, name: str, out_channels: int = 256, extra_blocks: ExtraFPNBlock | None = None, **kwargs: Any
    ):
        super().__init__()
        depth = 4 if "deit" in name or "vit" in name else (0, 1, 2, 3)
        self.body = timm.create_model(name, features_only=True, out_indices=depth, **kwargs)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels, extra_blocks)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W), H and W multiples of 32 -> levels "0" (stride 4) to "3" (stride 32), and extra."""
        height, width = x.shape[2:]
        levels: OrderedDict[str, Tensor] = OrderedDict()
        for i, feature in enumerate(self.body(x)):
            size = (height // (4 << i), width // (4 << i))
            if feature.shape[2:] != size:
                feature = F.interpolate(feature, size, mode="bilinear")
            levels[str(i)] = feature
        return self.fpn(levels)


def retinanet(
    name: str, num_classes: int, backbone: dict[str, Any] | None = None, **kwargs: Any
) -> RetinaNet:
    """RetinaNet on the model `name`.

    Args:
        name: as of FeaturePyramid.
        num_classes: classes, background included.
        backbone: arguments of FeaturePyramid.
        kwargs: arguments of torchvision's RetinaNet. Without an anchor_generator, anchors of 16 to 1024
            pixels (at the size that images are resized to) match the strides 4 to 128.
    """
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    backbone = backbone or {}
    channels = backbone.get("out_channels", 256)
    features = FeaturePyramid(name, extra_blocks=LastLevelP6P7(channels, channels), **backbone)
    if "anchor_generator" not in kwargs:
        sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (16, 32, 64, 128, 256, 512))
        kwargs["anchor_generator"] = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return RetinaNet(features, num_classes, **kwargs)


def mask_rcnn(name: str, num_classes: int, backbone: dict[str, Any] | None = None, **kwargs: Any) -> MaskRCNN:
    """Mask R-CNN on the model `name`; arguments as of `retinanet`, of torchvision's MaskRCNN."""
    features = FeaturePyramid(name, extra_blocks=LastLevelMaxPool(), **(backbone or {}))
    return MaskRCNN(features, num_classes, **kwargs)
