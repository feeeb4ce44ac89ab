"""A device without kernels: everything runs by the formula in plain torch, compiled too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.packaging
def test_device_without_kernels(tmp_path: Path) -> None:
    """In a process of its own, since a device can be added once; see host_device.py."""
    program = Path(__file__).with_name("host_device.py")
    result = subprocess.run(
        [sys.executable, program, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    lines = result.stdout.splitlines()
    assert sum(line.startswith("operator") for line in lines) == 4
    assert sum(line.startswith("module") for line in lines) == 8
