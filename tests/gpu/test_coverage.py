"""No call of the published models, nor of the options that users have, is on the general kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import EMULATED

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "cuda_coverage.py"
# GPUs that differ in a block's shared memory: 163, 99, 227 and 99 KiB.
CAPABILITIES = ["8.0", "8.6", "9.0", "12.0"] if EMULATED else ["this"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_models_calls_are_on_tensor_cores(capability):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if EMULATED:
        env["CUDAEMU_CC"] = capability
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 of them on the general kernels" in done.stdout
