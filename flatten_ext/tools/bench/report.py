"""What a suite's record is turned into: its Markdown tables and its charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatten_ext.tools.bench import charts, quality_report, restoration_report, tables
from flatten_ext.tools.bench.alternatives import LABELS as ALTERNATIVES
from flatten_ext.tools.bench.results import Results
from flatten_ext.tools.bench.stages import LABELS as STAGES

__all__ = ["REPORTS", "draw", "tables_of"]

Record = Mapping[str, Any]
Draw = Callable[[Path], None]


@dataclass(frozen=True)
class Report:
    """How to show the record of one suite.

    `tables` takes the record and that of the same suite on a GPU, if there is one; `charts` gives a drawing
    function for each picture's name.
    """

    tables: Callable[[Record, Record | None], list[tables.Table]]
    charts: Callable[[Record], dict[str, Draw]]


def _gpu(record: Record | None) -> Results | None:
    return None if record is None else Results(dict(record))


def _stages_tables(record: Record, gpu: Record | None) -> list[tables.Table]:
    results = Results(dict(record))
    return [
        tables.stages_table(results, count, STAGES, _gpu(gpu)) for count in results.thread_counts("stages")
    ]


def _stages_charts(record: Record) -> dict[str, Draw]:
    results = Results(dict(record))
    made: dict[str, Draw] = {
        "headline": lambda path: charts.draw_headline(results, path, STAGES),
        "stages": lambda path: charts.draw_speedups(results, path, STAGES),
    }
    if results.shapes("tokens"):
        made["stages-tokens"] = lambda path: charts.draw_against_tokens(results, "tokens", path, STAGES)
    return made


def _alternatives_tables(record: Record, gpu: Record | None) -> list[tables.Table]:
    results = Results(dict(record))
    count = min(results.thread_counts("alternatives"))
    return tables.alternatives_tables(results, count, ALTERNATIVES, record["not_measured"], _gpu(gpu))


def _tokens_tables(record: Record, gpu: Record | None) -> list[tables.Table]:
    results = Results(dict(record))
    count = min(results.thread_counts("tokens"))
    memory = tables.memory_table(results, count, ALTERNATIVES)
    if not any("ms" in row for row in results.select("tokens")):
        return [memory]
    return [tables.tokens_table(results, count, ALTERNATIVES, _gpu(gpu)), memory]


def _tokens_charts(record: Record) -> dict[str, Draw]:
    results = Results(dict(record))

    def chart(quantity: str) -> Draw:
        return lambda path: charts.draw_against_tokens(results, "tokens", path, ALTERNATIVES, quantity)

    timed = any("ms" in row for row in results.select("tokens"))
    return ({"tokens": chart("ms")} if timed else {}) | {"memory": chart("peak_bytes")}


def _roofline_charts(record: Record) -> dict[str, Draw]:
    return {"roofline": lambda path: charts.draw_roofline(record, path)}


REPORTS: dict[str, Report] = {
    "stages": Report(_stages_tables, _stages_charts),
    "alternatives": Report(_alternatives_tables, lambda record: {}),
    "tokens": Report(_tokens_tables, _tokens_charts),
    "roofline": Report(lambda record, gpu: [tables.roofline_table(record)], _roofline_charts),
    "models": Report(
        lambda record, gpu: [tables.models_table(Results(dict(record)), record["models"], _gpu(gpu))],
        lambda record: {"models": lambda path: charts.draw_models(record["models"], path)},
    ),
    "end-to-end": Report(lambda record, gpu: tables.end_to_end_tables(record), lambda record: {}),
    "families": Report(lambda record, gpu: [tables.families_table(record)], lambda record: {}),
    "quality": Report(
        lambda record, gpu: quality_report.tables_of(record),
        lambda record: {"quality": lambda path: quality_report.draw(record, path)},
    ),
    "restoration": Report(
        lambda record, gpu: restoration_report.tables_of(record),
        lambda record: {
            "restoration-examples": lambda path: restoration_report.draw_examples(record, path),
            "restoration": lambda path: restoration_report.draw(record, path),
        },
    ),
}


def tables_of(suite: str, record: Record, gpu: Record | None = None) -> list[tables.Table]:
    """The tables of a suite's record; columns of GPU times say "not measured" without a record of one."""
    return REPORTS[suite].tables(record, gpu)


def draw(suite: str, record: Record, folder: Path, suffix: str = ".svg") -> list[Path]:
    """Draws the charts of a suite's record into `folder`; charts of what was not timed are left out."""
    paths = []
    for name, chart in REPORTS[suite].charts(record).items():
        path = folder / f"{name}{suffix}"
        chart(path)
        paths.append(path)
    return paths
