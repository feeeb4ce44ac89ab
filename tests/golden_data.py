"""Recorded outputs and gradients of the public implementation, and the recipe of its parameters.

tests/golden/*.npz hold what the public FLatten-Transformer modules computed in float64: `op_*` the attention
between its projections, `mod_*` whole attention modules and blocks, `model_*` whole models.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).with_name("golden")


class Golden:
    """One recorded case: `golden["in.q"]` is a float64 tensor, `golden.meta` the settings."""

    def __init__(self, name: str):
        self.name = name
        with np.load(FOLDER / f"{name}.npz") as file:
            self._arrays = {key: file[key] for key in file.files}
        self.meta: dict[str, Any] = json.loads(str(self._arrays.pop("meta")))

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(np.asarray(self._arrays[key]))

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Every array whose key starts with `prefix`, by the rest of its key."""
        return {key[len(prefix) :]: self[key] for key in self._arrays if key.startswith(prefix)}

    def strings(self, key: str) -> list[str]:
        return self._arrays[key].tolist()

    def text(self, key: str) -> Any:
        return json.loads(str(self._arrays[key]))


def names(prefix: str) -> list[str]:
    """The cases on disk whose name starts with `prefix`."""
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.npz"))


def unit(name: str, shape: tuple[int, ...]) -> Tensor:
    """float64 numbers of mean 0, variance 1 that any language can replay: SplitMix64 seeded by FNV-1a."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        steps = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
        z = np.uint64(seed) + steps * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    values = (2 * (z >> np.uint64(11)).astype(np.float64) * 2.0**-53 - 1) * math.sqrt(3)
    return torch.from_numpy(values.reshape(shape))


def _rounded(values: Tensor, step: float) -> Tensor:
    return (values / step + 0.5).floor() * step


def operator_inputs(golden: Golden) -> dict[str, Tensor]:
    """q, k, v, dy and the parameters of an `op_*` case: stored, or by the recipe for the large ones."""
    if not golden.meta["sampled"]:
        return golden.under("in.") | golden.under("param.")
    meta, case = golden.meta, golden.name.removeprefix("op_")
    batch, queries, keys, channels = (meta[key] for key in ("B", "N", "n", "C"))
    head_dim, kernel = channels // meta["heads"], meta["kernel"]

    def draw(key: str, *shape: int, gain: float = 1.0, step: float = 1 / 64) -> Tensor:
        return _rounded(gain * unit(f"{case}/{key}", shape), step)

    inputs = {
        "q": draw("q", batch, queries, channels),
        "k": draw("k", batch, keys, channels),
        "v": draw("v", batch, keys, channels),
        "dy": draw("dy", batch, queries, channels),
        "scale": draw("scale", 1, 1, channels, gain=0.75),
        "positional_encoding": draw("positional_encoding", 1, keys, channels, gain=0.25),
        "dwc.weight": draw("dwc.weight", head_dim, 1, kernel, kernel, gain=1 / kernel, step=1 / 256),
        "dwc.bias": draw("dwc.bias", head_dim, gain=0.125),
    }
    if meta["family"] == "cswin":
        inputs["get_v.weight"] = draw("get_v.weight", channels, 1, 3, 3, gain=1 / 3, step=1 / 256)
        inputs["get_v.bias"] = draw("get_v.bias", channels, gain=0.125)
    return inputs


def model_parameter(key: str, shape: tuple[int, ...]) -> Tensor:
    """The number a whole-model case puts into the public state_dict's entry `key`."""
    values, last = unit(key, shape), key.rpartition(".")[2]
    if last in ("positional_encoding", "relative_position_bias_table") or last.startswith("pos_embed"):
        return 0.1 * values
    if last == "scale":
        return 0.5 * values
    if last == "bias":
        return 0.05 * values
    if len(shape) == 1:
        return 1 + 0.1 * values
    return values / math.sqrt(math.prod(shape[1:]))
