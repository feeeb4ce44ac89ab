"""Kernels of every instruction set that this processor runs are held to the oracle, not only those in use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flatten_ext import _load

HERE = Path(__file__).parent
OTHERS = [isa for isa in _load.cpu_isas() if isa != _load.cpu_isa()]
CALL = "import torch, flatten_ext; flatten_ext.attention(*torch.ones(3, 1, 4, 16), 1)"
streams = pytest.mark.skipif("avx512" not in _load.cpu_isas(), reason="only vectors of 64 bytes fill lines")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, as these variables are read once."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def passes(*tests: str, **environment: str) -> None:
    files = [str(HERE / f"test_{name}.py") for name in tests]
    done = python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, **environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.parametrize("isa", OTHERS)
def test_matches_the_formula_and_the_golden_data(isa: str) -> None:
    asked = python("-c", "from flatten_ext import _load; print(_load.cpu_isa())", FLATTEN_CPU_ISA=isa)
    assert asked.stdout.split() == [isa], asked.stderr
    passes("attention", "golden", "fuzz", FLATTEN_CPU_ISA=isa)


@pytest.mark.parametrize("isa", ["abacus", "AVX2"])
def test_a_set_that_is_not_here_is_an_error_that_lists_those_that_are(isa: str) -> None:
    done = python("-c", CALL, FLATTEN_CPU_ISA=isa)
    assert done.returncode != 0
    assert f'FLATTEN_CPU_ISA is "{isa}"' in done.stderr
    assert all(known in done.stderr for known in _load.cpu_isas())


@streams
def test_results_written_past_the_caches_are_the_same() -> None:
    passes("attention", "golden", "fuzz", FLATTEN_CPU_ISA="avx512", FLATTEN_CPU_STREAM_FROM="0")


@streams
@pytest.mark.parametrize("size", ["16M", "-1", "1e6", " 1", "99999999999999999999"])
def test_a_size_that_is_no_number_of_bytes_is_an_error(size: str) -> None:
    done = python("-c", CALL, FLATTEN_CPU_ISA="avx512", FLATTEN_CPU_STREAM_FROM=size)
    assert done.returncode != 0
    assert f'FLATTEN_CPU_STREAM_FROM is "{size}", expected a number of bytes' in done.stderr
