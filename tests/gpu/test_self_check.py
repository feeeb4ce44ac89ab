"""flatten_ext.self_check on CUDA."""

from __future__ import annotations

import os

import flatten_ext


def test_right_kernels_pass():
    report = flatten_ext.self_check("cuda")
    # The CUDA emulator has no CUDA graphs.
    known = {"CUDA graph"} if os.environ.get("CUDAEMU") == "1" else set()
    failed = {result.name for result in report.results if not result.passed}
    assert failed == known, str(report)
    assert {"two threads", "another stream", "bfloat16, heads of 128"} < {r.name for r in report.results}
