"""flatten_ext.self_check: it passes where the kernels are right, and tells which one is wrong elsewhere."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

import flatten_ext
from flatten_ext import check
from flatten_ext.tools.cli import build_app


def test_right_kernels_pass():
    seen = []
    report = flatten_ext.self_check(progress=lambda done, total, name: seen.append((done, total, name)))
    assert report.passed, str(report)
    assert len(report.results) == len(seen) == seen[0][1]
    assert [result.name for result in report.results] == [name for _, _, name in seen]
    assert {"two threads", "repeated calls"} < {result.name for result in report.results}
    assert str(report).endswith(f"{len(seen)} passed, 0 failed")


def broken(argument: str, factor: float):
    """The operator, whose result for `argument` is off by a factor for one kind of call only."""
    run = check._run

    def wrong(arguments):
        results = run(arguments)
        if arguments["q"].dtype == torch.float16 and arguments["window"] is None:
            results[argument] = results[argument] * factor
        return results

    return wrong


@pytest.mark.parametrize(("argument", "factor"), [("out", 1.01), ("dwc_bias", 0.99), ("q", float("nan"))])
def test_a_wrong_kernel_is_named(argument, factor, monkeypatch):
    monkeypatch.setattr(check, "_run", broken(argument, factor))
    report = flatten_ext.self_check()
    assert not report.passed
    failed = {result.name: result.detail for result in report.results if not result.passed}
    assert set(failed) == {name for name in failed if name.startswith("float16")}
    assert len(failed) == 2  # both float16 calls, and nothing else
    expected = "out: " if argument == "out" else f"gradient of {argument}: "
    assert all(detail.startswith(expected) for detail in failed.values())
    assert "FLATTEN_CPU_ISA=baseline" in str(report)


def test_a_call_that_raises_is_a_finding(monkeypatch):
    def fail(arguments):
        raise RuntimeError("no kernel image is available\nand a second line")

    monkeypatch.setattr(check, "_run", fail)
    report = flatten_ext.self_check()
    assert {result.detail for result in report.results} == {"RuntimeError: no kernel image is available"}


def test_threads_that_disturb_each_other_are_found(monkeypatch):
    import threading

    run = check._run

    def disturbed(arguments):
        results = run(arguments)
        if threading.current_thread() is not threading.main_thread():
            results["v"] = results["v"] + 1
        return results

    monkeypatch.setattr(check, "_run", disturbed)
    failed = [result for result in flatten_ext.self_check().results if not result.passed]
    assert [(result.name, result.detail) for result in failed] == [
        ("two threads", "gradient of v differs in a thread")
    ]


def test_command(monkeypatch):
    runner = CliRunner()
    result = runner.invoke(build_app(), ["check"])
    assert result.exit_code == 0
    assert "0 failed" in result.output
    monkeypatch.setattr(check, "_run", broken("out", 2.0))
    result = runner.invoke(build_app(), ["check"])
    assert result.exit_code == 1
    assert "2 failed" in result.output


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_is_not_there(device):
    result = CliRunner().invoke(build_app(), ["check", "--device", device])
    assert result.exit_code == 2
    with pytest.raises((ValueError, RuntimeError), match=device.partition(":")[0]):
        flatten_ext.self_check(device)
