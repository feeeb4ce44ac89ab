"""Compares two records of `flatten-ext bench` and flags what became slower by more than noise.

    python benchmarks/compare.py before.json after.json

A pair is flagged when the medians differ by more than --threshold and the quartiles of the two runs do not
overlap. Exit status: 0 without slow-downs, 1 with, 2 when the records cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IDENTITY = ("suite", "shape", "contender", "mode", "threads")
# What must agree for times to be comparable at all.
CONDITIONS = ("cpu", "gpu", "cores")


@dataclass(frozen=True)
class Change:
    """One measurement in both records."""

    name: str
    before: dict[str, float]
    after: dict[str, float]

    @property
    def ratio(self) -> float:
        """Above 1: slower than before."""
        return self.after["median"] / self.before["median"]

    def verdict(self, threshold: float) -> str:
        """ "slower", "faster", or "" where the difference is within the threshold or the noise."""
        if self.ratio > 1 + threshold and self.after["low"] > self.before["high"]:
            return "slower"
        if self.ratio < 1 / (1 + threshold) and self.after["high"] < self.before["low"]:
            return "faster"
        return ""


def read(path: Path) -> dict[str, Any]:
    """A record; exits with status 2 on a file that is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["measurements"], record["machine"], record["clock"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{path} is not a record of `flatten-ext bench`: {error!r}", file=sys.stderr)
        sys.exit(2)
    return record


def conflicts(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Why the two cannot be compared: another machine, another clock."""
    pairs = [(name, before["machine"].get(name), after["machine"].get(name)) for name in CONDITIONS]
    pairs.append(("clock", before["clock"], after["clock"]))
    return [f"{name}: {a} before, {b} after" for name, a, b in pairs if a != b]


def changes(before: dict[str, Any], after: dict[str, Any], contender: str | None) -> list[Change]:
    """The timings that both records have; of one contender, or of all."""

    def timings(record: dict[str, Any]) -> dict[str, dict[str, float]]:
        return {
            "  ".join(str(m[key]) for key in IDENTITY): m["ms"]
            for m in record["measurements"]
            if "ms" in m and contender in (None, m["contender"])
        }

    old, new = timings(before), timings(after)
    return [Change(name, old[name], new[name]) for name in old if name in new]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=0.1, help="relative slow-down that counts (default: 0.1)"
    )
    parser.add_argument(
        "--contender", default="flatten", help="whose times to compare (default: flatten; or all)"
    )
    parser.add_argument(
        "--force", action="store_true", help="compare records of different machines or clocks"
    )
    options = parser.parse_args(arguments)
    before, after = read(options.before), read(options.after)
    if (reasons := conflicts(before, after)) and not options.force:
        print("not comparable (--force to compare all the same): " + "; ".join(reasons), file=sys.stderr)
        return 2
    found = changes(before, after, None if options.contender == "all" else options.contender)
    if not found:
        print("the two records have no timing in common", file=sys.stderr)
        return 2
    width = max(len(change.name) for change in found)
    print(f"{'':{width}}  {'before ms':>10}  {'after ms':>10}  {'ratio':>6}")
    for change in found:
        line = f"{change.name:{width}}  {change.before['median']:10.3f}  {change.after['median']:10.3f}"
        print(f"{line}  {change.ratio:6.2f}  {change.verdict(options.threshold)}".rstrip())
    slower = sum(change.verdict(options.threshold) == "slower" for change in found)
    print(f"{slower} of {len(found)} slower by more than {options.threshold:.0%} and beyond the quartiles")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
