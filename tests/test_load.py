"""Loading: one copy in a process; another says where the first is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flatten_ext

PACKAGE = Path(flatten_ext.__file__).parent
FORGET = "for name in [n for n in sys.modules if n.partition('.')[0] == 'flatten_ext']: del sys.modules[name]"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Another copy of the package."""
    ignored = shutil.ignore_patterns("__pycache__", "models", "tools")
    return Path(shutil.copytree(PACKAGE, tmp_path / "other" / "flatten_ext", ignore=ignored))


def run(*lines: str) -> subprocess.CompletedProcess[str]:
    script = "\n".join(("import importlib, sys, torch", *lines))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)


def error_of(*lines: str) -> str:
    done = run(*lines)
    assert done.returncode == 1, done.stdout
    return done.stderr.splitlines()[-1]


def test_a_second_copy_says_where_the_first_is(copied):
    error = error_of(
        "import flatten_ext", FORGET, f"sys.path.insert(0, {str(copied.parent)!r})", "import flatten_ext"
    )
    assert error.startswith(f"ImportError: flatten_ext in {copied} cannot be loaded")
    assert f"already, from {PACKAGE}. " in error


def test_imported_anew():
    error = error_of("import flatten_ext", FORGET, "import flatten_ext")
    assert error.startswith(f"ImportError: flatten_ext in {PACKAGE} cannot be loaded")
    assert f"already, from {PACKAGE}. " in error


def test_a_library_of_another_place(copied):
    library = next(copied.glob("lib/libflatten.*"))
    error = error_of(f"torch.ops.load_library({str(library)!r})", "import flatten_ext")
    assert error.startswith(f"ImportError: flatten_ext in {PACKAGE} cannot be loaded")
    assert str(library) in error


def test_what_works():
    """The package's own library first, and importlib.reload."""
    library = next(PACKAGE.glob("lib/libflatten.*"))
    done = run(
        f"torch.ops.load_library({str(library)!r})",
        "import flatten_ext",
        "importlib.reload(flatten_ext)",
        "flatten_ext.attention(*torch.ones(3, 1, 4, 16, requires_grad=True), 1).sum().backward()",
    )
    assert done.returncode == 0, done.stderr
