"""Photographs that ship inside scikit-image and scikit-learn, as luminance; nothing is downloaded.

==========  ============  ==================================================================================
astronaut   scikit-image  NASA: released into the public domain
brick       scikit-image  CC0, from CC0Textures
camera      scikit-image  CC0, Lav Varshney
chelsea     scikit-image  CC0, Stefan van der Walt
coffee      scikit-image  CC0, Rachel Michetti
coins       scikit-image  Brooklyn Museum: no known copyright restrictions
grass       scikit-image  CC0, linolafett on DeviantArt
gravel      scikit-image  CC0, from CC0Textures
rocket      scikit-image  SpaceX: released into the public domain
china       scikit-learn  CC BY 2.0, danielbuechele
flower      scikit-learn  CC BY 2.0, vultilion
==========  ============  ==================================================================================

So the packages themselves say (`skimage/data/_fetchers.py`, `sklearn/datasets/images/README.txt`). Pictures
of stars, of tissue and of documents, and photographs whose licence is not stated, are left out.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from flatten_ext.errors import InputError
from flatten_ext.extras import MissingExtra, require

__all__ = ["HELD_OUT", "TRAIN", "read_photograph"]

TRAIN = ("brick.png", "camera.png", "coffee.png", "coins.png", "gravel.png", "rocket.jpg", "flower.jpg")
HELD_OUT = ("astronaut.png", "chelsea.png", "china.jpg", "grass.png")
_OF_SKLEARN = ("china.jpg", "flower.jpg")


def read_photograph(name: str) -> Tensor:
    """The luminance (H, W) of one photograph, float32 in [0, 1].

    Args:
        name: one of `TRAIN` or `HELD_OUT`.

    Raises:
        MissingExtra: the package that has it is not installed.
        InputError: the installed release of the package does not have it.
    """
    image = require("PIL.Image", "bench", "reading photographs").open(_file(name)).convert("L")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.unflatten(0, (image.height, image.width)).float() / 255


def _file(name: str) -> Path:
    package, folder = ("sklearn", "datasets/images") if name in _OF_SKLEARN else ("skimage", "data")
    # The file is read as it lies there: importing these packages takes seconds.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra({"sklearn": "scikit-learn", "skimage": "scikit-image"}[package], "bench", name)
    path = Path(spec.submodule_search_locations[0], folder, name)
    if not path.is_file():
        raise InputError(f"{path} is not there: this release of the package has no photograph {name}")
    return path
