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


def python(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, as the set is chosen once."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parent,
        env={**os.environ, "FLATTEN_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("isa", OTHERS)
def test_matches_the_formula_and_the_golden_data(isa: str) -> None:
    asked = python(isa, "-c", "from flatten_ext import _load; print(_load.cpu_isa())")
    assert asked.stdout.split() == [isa], asked.stderr
    files = [str(HERE / f"test_{name}.py") for name in ("attention", "golden", "fuzz")]
    done = python(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.parametrize("isa", ["abacus", "AVX2"])
def test_a_set_that_is_not_here_is_an_error_that_lists_those_that_are(isa: str) -> None:
    call = "import torch, flatten_ext; flatten_ext.attention(*torch.ones(3, 1, 4, 4), 1)"
    done = python(isa, "-c", call)
    assert done.returncode != 0
    assert f'FLATTEN_CPU_ISA is "{isa}"' in done.stderr
    assert all(known in done.stderr for known in _load.cpu_isas())
