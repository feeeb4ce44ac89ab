"""The attentions that followed FLatten, as mixers: the cores of `flatten_ext.models`, which the tests hold to
golden data of the published code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from flatten_ext.models._cores import (
    InlineAttention,
    MalaAttention,
    MilaAttention,
    PolarAttention,
    RalaAttention,
)
from flatten_ext.tools.bench.mixers import Mixer

__all__ = ["FAMILIES", "FamilyMixer"]


def _polar(dim: int, num_heads: int, grid: Sequence[int]) -> PolarAttention:
    return PolarAttention(dim, num_heads, None)  # the encoding of the keys lies outside the mixers


FAMILIES: dict[str, Callable[[int, int, Sequence[int]], Any]] = {
    "MILA": MilaAttention,
    "RALA": RalaAttention,
    "MALA": MalaAttention,
    "InLine": InlineAttention,
    "PolaFormer": _polar,
}


class FamilyMixer(Mixer):
    """One of them with its local term; the gate, of those that have one, lies outside the mixer.

    Args:
        dim, num_heads, size: as of `Mixer`.
        family: of `FAMILIES`.
    """

    def __init__(self, dim: int, num_heads: int, size: Sequence[int], family: str) -> None:
        super().__init__(dim, num_heads, size)
        self.core = FAMILIES[family](dim, num_heads, self.size)
        self.has_gate = bool(self.core.gate_letter)
        self.reads_input = self.core.reads_input

    def forward(self, q: Tensor, k: Tensor, v: Tensor, source: Tensor | None = None) -> Tensor:
        more = {} if source is None else {"source": source.expand(len(q), -1, -1)}
        return self.core.attend(q, k, v, self.size, **more)

    def alone(self) -> Mixer:
        mixer = copy.deepcopy(self)
        for name in ("lepe", "dwc", "residual"):
            for layer in getattr(mixer.core, name, nn.Identity()).modules():
                for parameter in layer.parameters(recurse=False):
                    nn.init.zeros_(parameter)
        return mixer
