"""RetinaNet, Mask R-CNN and semantic segmentation learn to find shapes in pictures made here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import SMALL
from torch import Tensor

from flatten_ext.models.detection import FeaturePyramid, mask_rcnn, retinanet
from flatten_ext.models.segmentation import SegmentationFPN

SIZE = 64
BACKGROUND, DISC, BOX = range(3)


def pictures(count: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Shaded discs and boxes on textured ground: images (3, S, S) in [0, 1] and torchvision targets."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    made = []
    for _ in range(count):
        image = 0.2 * torch.rand(3, SIZE, SIZE, generator=generator) + 0.2 * (y + x) / (2 * SIZE)
        masks, labels = [], []
        for label, left in ((DISC, 2), (BOX, 34)):
            radius = int(torch.randint(9, 14, (1,), generator=generator))
            centre_y = int(torch.randint(radius, SIZE - radius, (1,), generator=generator))
            centre_x = left + 14
            dy, dx = y - centre_y, x - centre_x
            inside = (
                dy**2 + dx**2 <= radius**2 if label == DISC else (dy.abs() <= radius) & (dx.abs() <= radius)
            )
            colour = 0.5 + 0.5 * torch.rand(3, 1, generator=generator)
            image[:, inside] = colour * (0.8 + 0.2 * dy[inside] / radius)
            masks.append(inside)
            labels.append(label)
        boxes = [
            [float(x[m].min()), float(y[m].min()), float(x[m].max() + 1), float(y[m].max() + 1)]
            for m in masks
        ]
        target = {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}
        made.append((image.clamp(0, 1), target | {"masks": torch.stack(masks).to(torch.uint8)}))
    return made


def halves(model: torch.nn.Module, loss: Callable[[], Tensor], steps: int, lr: float = 2e-3) -> None:
    """Trains until the loss has dropped by half, or fails."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    first = None
    for _ in range(steps):
        value = loss()
        first = float(value.detach()) if first is None else first
        if float(value.detach()) < first / 2:
            return
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    pytest.fail(f"the loss went from {first:.3f} to {float(value.detach()):.3f} in {steps} steps")


def backbone(family: str) -> tuple[str, dict[str, Any]]:
    name, config = SMALL[family]
    config = {**config, "img_size": SIZE}
    return name, {**config, "depth": 4} if family == "deit" else config


def detector(build: Callable[..., Any], family: str, **kwargs: Any) -> tuple[Any, Callable[[], Tensor]]:
    torch.manual_seed(0)
    name, config = backbone(family)
    args = {"out_channels": 32, **config}
    model = build(name, 3, args, min_size=SIZE, max_size=SIZE, **kwargs).train()
    images, targets = zip(*pictures(2), strict=True)
    return model, lambda: sum(model(list(images), list(targets)).values())


@pytest.mark.parametrize("family", SMALL)
def test_retinanet(family: str) -> None:
    model, loss = detector(retinanet, family)
    halves(model, loss, steps=30)
    found = model.eval()([pictures(1)[0][0]])[0]
    assert found["boxes"].shape[1:] == (4,)


@pytest.mark.parametrize("family", ["swin", "pvt_v2"])
def test_mask_rcnn(family: str) -> None:
    few = {"rpn_post_nms_top_n_train": 64, "box_batch_size_per_image": 32}  # proposals, for speed
    model, loss = detector(mask_rcnn, family, **few)
    halves(model, loss, steps=30)
    assert model.eval()([pictures(1)[0][0]])[0]["masks"].shape[1:] == (1, SIZE, SIZE)


@pytest.mark.parametrize("family", SMALL)
def test_segmentation(family: str) -> None:
    torch.manual_seed(0)
    name, config = backbone(family)
    model = SegmentationFPN(name, 3, channels=32, head_channels=32, **config).train()
    images = torch.stack([image for image, _ in pictures(2)])
    labels = torch.stack([(t["masks"] * t["labels"][:, None, None]).amax(0).long() for _, t in pictures(2)])
    halves(model, lambda: torch.nn.functional.cross_entropy(model(images), labels), steps=40)
    assert model.eval()(torch.randn(1, 3, 50, 90)).shape == (1, 3, 50, 90)


def test_levels_of_a_transformer() -> None:
    name, config = backbone("deit")
    levels = FeaturePyramid(name, 16, **config)(torch.randn(1, 3, 64, 96))
    assert [tuple(level.shape[2:]) for level in levels.values()] == [(16, 24), (8, 12), (4, 6), (2, 3)]
