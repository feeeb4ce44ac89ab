"""GPU tests: ordinary pytest tests that anyone with a CUDA device runs unchanged (`pytest -m gpu`).

They are skipped without a device. The CUDA emulator counts as one, except where a test says otherwise.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import EMULATED

HERE = Path(__file__).parent


# Before tests/conftest.py, which skips what is marked when there is no device.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def real_gpu():
    if EMULATED:
        pytest.skip("the CUDA emulator has no CUDA graphs and no Triton")
