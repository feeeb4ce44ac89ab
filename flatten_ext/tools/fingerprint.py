"""What tells whether a resumed run sees the images and the weights that it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["differing_classes", "of_images", "of_json", "of_model"]

# Larger sets are known by their files' names and sizes alone: to read them takes longer than a start may.
_READ_BYTES = 1 << 28


def of_images(dataset: Any) -> dict[str, list[Any]]:
    """Number and digest of the images of each class, JSON-ready; the same wherever the set lies.

    Args:
        dataset: an ImageFolder, or data.ArrayImages.
    """
    if not hasattr(dataset, "samples"):
        return {
            name: [int(chosen.sum()), hashlib.sha256(dataset.images[chosen].tobytes()).hexdigest()]
            for label, name in enumerate(dataset.classes)
            for chosen in (np.asarray(dataset.labels) == label,)
        }
    root = Path(dataset.root)
    files = [(Path(path), label) for path, label in dataset.samples]
    sizes = [path.stat().st_size for path, _ in files]
    read = sum(sizes) <= _READ_BYTES
    hashes = [hashlib.sha256() for _ in dataset.classes]
    counts = [0] * len(dataset.classes)
    for (path, label), size in zip(files, sizes, strict=True):
        counts[label] += 1
        hashes[label].update(f"{path.relative_to(root)}\0{size}\0".encode())
        if read:
            hashes[label].update(path.read_bytes())
    return {
        name: [count, digest.hexdigest()]
        for name, count, digest in zip(dataset.classes, counts, hashes, strict=True)
    }


def differing_classes(there: Mapping[str, Any], here: Mapping[str, Any], most: int = 5) -> str:
    """What differs between two `of_images`, in words; "" where nothing does."""
    words = [f"class {name} is there alone" for name in there if name not in here]
    words += [f"class {name} is here alone" for name in here if name not in there]
    for name in here:
        if name in there and list(there[name]) != list(here[name]):
            (before, _), (now, _) = there[name], here[name]
            words.append(
                f"class {name} has {now} images here, {before} there"
                if before != now
                else f"class {name} has other images here"
            )
    if not words and list(there) != list(here):
        words = ["the classes have another order"]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def of_json(value: Any) -> str:
    """A digest of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def of_model(model: nn.Module) -> str:
    """A digest of everything in the model's state_dict."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name}\0{tuple(value.shape)}\0{value.dtype}\0".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
