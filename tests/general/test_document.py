"""docs/general.md: its table tells the errors that are measured here, and its examples run."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import test_restated
import torch
from published import CORES, errors

import flatten_ext

DOCUMENT = (Path(__file__).parents[2] / "docs" / "general.md").read_text()
NUMBER = r"(\d\.\de-\d\d)"
ROWS = {
    row["method"]: row
    for row in re.finditer(
        rf"^\| (?P<method>[\w -]+) \| .* \| (?P<with>recorded, (?P<cases>\d) cases?|restated) "
        rf"\| (?P<out>{NUMBER}) \| (?P<grad>{NUMBER}) \| (?P<speed>\d+\.\d / \d+\.\d|-) \|$",
        DOCUMENT,
        re.MULTILINE,
    )
}


def test_the_table_has_every_method():
    assert list(ROWS) == [*CORES, *test_restated.METHODS]
    for method, core in CORES.items():
        assert int(ROWS[method]["cases"]) == len(core.cases)


def test_every_method_has_its_speed(monkeypatch, capsys):
    """Of those that have two rows one has it. The script that measures it runs, and checks what it times."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    script = importlib.import_module("published_methods")
    monkeypatch.setattr(sys, "argv", ["published_methods.py", "--quick", "--cpu-time"])
    try:
        script.main()
    finally:
        script.timing.use_clock("wall")
    timed = {line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()}
    assert timed == {*script.OF_CORES, *script.OTHERS}
    without = [method for method, row in ROWS.items() if row["speed"] == "-"]
    assert without == ["MLLA", "InLine CSwin block"]


@pytest.mark.parametrize("method", [*CORES, *test_restated.METHODS])
def test_the_errors_are_those_measured(method):
    """Rounding differs between machines: within ten times what is written."""
    if method in CORES:
        measured = [errors(flatten_ext, method, case) for case in CORES[method].cases]
        out = max(of_case.pop("result") for of_case in measured)
        gradients = max(max(of_case.values()) for of_case in measured)
    else:
        out, gradients = test_restated.errors(flatten_ext, method)
    assert out <= 10 * float(ROWS[method]["out"])
    assert gradients <= 10 * float(ROWS[method]["grad"])


def test_the_examples_run():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL):
        exec(block, names)
    q, k, v = (names[name] for name in "qkv")
    torch.testing.assert_close(names["out"], flatten_ext.attention(q, k, v, 2, feature_map="elu"))
    assert names["inside"].unflatten(0, (8, 8)).sum(1).tolist() == [6] * 5 + [0] * 3
