"""flatten_ext.self_check on CUDA."""

from __future__ import annotations

import os

import pytest
import torch

import flatten_ext
from flatten_ext import _cuda_kernels, check


def test_right_kernels_pass():
    report = flatten_ext.self_check("cuda")
    # The CUDA emulator has no CUDA graphs.
    known = {"CUDA graph"} if os.environ.get("CUDAEMU") == "1" else set()
    failed = {result.name for result in report.results if not result.passed}
    assert failed == known, str(report)
    assert {"two threads", "another stream", "bfloat16, heads of 128"} < {r.name for r in report.results}


@pytest.mark.parametrize("right_from", ["general", "reference"])
def test_the_way_out_is_named(right_from, monkeypatch):
    run, level = check._run, _cuda_kernels._set_level()
    highest = _cuda_kernels.LEVELS.index(right_from)

    def wrong(arguments):
        results = run(arguments)
        is_wrong = arguments["q"].is_cuda and arguments["q"].dtype == torch.float16
        return results | {"out": results["out"] * 2} if is_wrong and level(-1) > highest else results

    monkeypatch.setattr(check, "_run", wrong)
    report = flatten_ext.self_check("cuda")
    failed = {r.name: r for r in report.results if not r.passed and r.name != "CUDA graph"}
    assert failed
    assert all(name.startswith("float16") for name in failed)
    assert {r.way_out for r in failed.values()} == {f"FLATTEN_CUDA={right_from}"}
    assert all(r.detail.endswith(f"; right with FLATTEN_CUDA={right_from}") for r in failed.values())
