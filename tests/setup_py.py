"""setup.py as a module: what it would build, with nothing built."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock


def load_setup_py() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "setup.py"
    spec = importlib.util.spec_from_file_location("flatten_setup", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"), mock.patch.dict(sys.modules, {spec.name: module}):
        spec.loader.exec_module(module)
    return module
