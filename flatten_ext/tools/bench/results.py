"""A benchmark's record, as it was written to JSON, and the questions that tables and charts ask of it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Results"]


class Results:
    """Measurements by suite, shape, contender, mode and threads.

    Args:
        record: what `record()` made, or JSON of it.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record
        self.machine: dict[str, Any] = record["machine"]
        self.measurements: list[dict[str, Any]] = record["measurements"]

    @classmethod
    def read(cls, path: Path) -> Results:
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def select(self, suite: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """The measurements of a suite whose fields have the given values, in the order they were taken."""
        for m in self.measurements:
            if m["suite"] == suite and all(m[key] == value for key, value in fields.items()):
                yield m

    def _distinct(self, suite: str, field: str) -> list[Any]:
        return list(dict.fromkeys(m[field] for m in self.select(suite)))

    def shapes(self, suite: str) -> list[str]:
        return self._distinct(suite, "shape")

    def contenders(self, suite: str) -> list[str]:
        return self._distinct(suite, "contender")

    def thread_counts(self, suite: str) -> list[int]:
        return self._distinct(suite, "threads")

    def tokens(self, suite: str, shape: str) -> int:
        return next(self.select(suite, shape=shape))["tokens"]

    def shape_label(self, suite: str, shape: str) -> str:
        return f"{shape}  N={self.tokens(suite, shape)}"

    def median(self, suite: str, shape: str, contender: str, mode: str, threads: int) -> float | None:
        """Milliseconds, or None where it was not measured."""
        found = self.select(suite, shape=shape, contender=contender, mode=mode, threads=threads)
        return next((m["ms"]["median"] for m in found if "ms" in m), None)

    def ratio(self, suite: str, shape: str, contender: str, mode: str, threads: int) -> float | None:
        """How many times faster the op is than a contender."""
        own = self.median(suite, shape, "flatten", mode, threads)
        other = self.median(suite, shape, contender, mode, threads)
        return None if own is None or other is None else other / own

    def line(
        self, suite: str, contender: str, mode: str, threads: int, quantity: str
    ) -> list[tuple[int, float]]:
        """(tokens, value) pairs; quantity is "ms" or "peak_bytes"."""
        found = self.select(suite, contender=contender, mode=mode, threads=threads)
        values = ((m["tokens"], m.get(quantity)) for m in found)
        return [(n, value["median"] if quantity == "ms" else value) for n, value in values if value]

    def interpolate(self, suite: str, contender: str, mode: str, threads: int, tokens: float) -> float:
        """Milliseconds at a number of tokens between measured ones, on the log-log line between them."""
        points = self.line(suite, contender, mode, threads, "ms")
        for (n0, t0), (n1, t1) in itertools.pairwise(points):
            if n0 <= tokens <= n1:
                return t0 * (tokens / n0) ** (math.log(t1 / t0) / math.log(n1 / n0))
        raise ValueError(f"{contender} was not measured around {tokens:.0f} tokens")
