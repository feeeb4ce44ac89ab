"""Measures what docs/evidence.md, docs/models.md and README.md show, and writes it into them.

    python benchmarks/evidence.py                     # everything but the trainings: measure, then render
    python benchmarks/evidence.py --only stages       # one suite
    python benchmarks/evidence.py --render            # pages and charts from the records, nothing is measured
    python benchmarks/evidence.py --check             # exit status 1 if a page does not show its record

A suite's record is benchmarks/results/SUITE.json; SUITE-cuda.json, of `flatten-ext bench --device cuda`,
fills the GPU columns. A page shows a record's charts and tables between `<!-- SUITE -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from flatten_ext.output import write_text
from flatten_ext.tools.bench import report

ROOT = Path(__file__).resolve().parent.parent
RECORDS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
PAGES = (ROOT / "docs" / "evidence.md", ROOT / "docs" / "models.md")
# Of `flatten-ext bench`.
SUITES = ("stages", "alternatives", "tokens", "roofline", "models", "end-to-end", "families")
SHOWN = re.compile(r"(<!-- ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
CAPTIONS = {
    "stages": "Speed-ups at the stage shapes",
    "stages-tokens": "Time against tokens",
    "tokens": "Time against tokens, crossovers ringed",
    "memory": "Peak memory against tokens",
    "roofline": "The forward under the machine's roofs",
    "models": "Images per second against FLOPs",
    "quality": "Accuracy of every seed",
    "restoration": "Decibels of every seed",
    "restoration-examples": "A held-out photograph, degraded and restored",
}


def measure(suite: str, seconds: float, rounds: int, cpu_time: bool) -> None:
    """Runs a suite in a process of its own and keeps its record."""
    clock = ["--cpu-time"] if cpu_time else []
    with tempfile.TemporaryDirectory() as folder:
        options = ["--suite", suite, "--seconds", str(seconds), "--rounds", str(rounds), "--output", folder]
        command = [sys.executable, "-m", "flatten_ext", "bench", *options, *clock]
        subprocess.run(command, check=True, cwd=ROOT)
        shutil.copy(Path(folder) / f"{suite}.json", RECORDS / f"{suite}.json")


def read(name: str) -> dict[str, Any] | None:
    """A record, or None where there is none."""
    path = RECORDS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def rendered(page: str) -> str:
    """The page with the charts and tables of today's records."""

    def shown(match: re.Match[str]) -> str:
        suite, record = match[2], read(match[2])
        if record is None:
            return f"{match[1]}\n*Not measured.*\n\n{match[4]}"
        charts = [name for name in report.REPORTS[suite].charts(record) if name in CAPTIONS]
        parts = [f"![{CAPTIONS[name]}](images/{name}.svg)\n" for name in charts]
        parts += [table.markdown() for table in report.tables_of(suite, record, read(f"{suite}-cuda"))]
        return f"{match[1]}\n" + "\n".join(parts) + f"\n{match[4]}"

    return SHOWN.sub(shown, page)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each timing (default: 0.3)")
    parser.add_argument("--rounds", type=int, default=9, help="of the models end to end (default: 9)")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, by processor time")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--check", action="store_true", help="write nothing, compare the pages")
    options = parser.parse_args(arguments)
    if options.check:
        stale = [page for page in PAGES if rendered(text := page.read_text(encoding="utf-8")) != text]
        for page in stale:
            print(f"{page} does not show the records: python benchmarks/evidence.py --render")
        return 1 if stale else 0
    if not options.render:
        for suite in options.only:
            measure(suite, options.seconds, options.rounds, options.cpu_time)
    for page in PAGES:
        write_text(page, rendered(page.read_text(encoding="utf-8")))
    for suite in report.REPORTS:
        record = read(suite)
        if record is not None:
            report.draw(suite, record, IMAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
