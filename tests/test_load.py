"""Loading: one copy in a process; another says where the first is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from setup_py import load_setup_py

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


# ------------------------------------------------- ROCm's builds of torch, whose tensors call themselves cuda
def test_a_build_against_rocm_asks_no_nvcc(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    setup_py = load_setup_py()
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(setup_py, "run", lambda *command: pytest.fail(f"{command} was run"))
    monkeypatch.setenv("FLATTEN_WITH_CUDA", "")
    assert setup_py.cuda_or_none() is None
    assert (
        "building without CUDA: the torch to build against is a build for ROCm 7.1" in capsys.readouterr().err
    )
    monkeypatch.setenv("FLATTEN_WITH_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FLATTEN_WITH_CUDA=1, but .* a build for ROCm 7\.1"):
        setup_py.cuda_or_none()


def test_rocm_tensors_take_the_formula(copied):
    """No kernel of ours is registered for their key, so they go where those of any other device go; `info`
    says so. (The same of a device that torch can make here is tested in deploy/test_devices.py.)"""
    library = copied / "lib" / "libflatten_cuda.so"
    if not library.exists():
        library.touch()  # one from a wheel for CUDA: not even opened
    done = run(
        f"sys.path.insert(0, {str(copied.parent)!r})",
        "torch.version.cuda, torch.version.hip = None, '7.1'",
        "from flatten_ext import info",
        "print(info.installation()['CUDA kernels'], '|', info.installation()['other devices'])",
        "for name in ('attention_forward', 'attention_backward', 'depthwise_conv', 'attention_state'):",
        "    table = torch._C._dispatch_dump_table('flatten::' + name)",
        "    rows = dict(row.split(': ', 1) for row in table.splitlines() if ': ' in row)",
        "    assert rows['CUDA'] == rows['PrivateUse1'] != rows['CPU'], rows",
    )
    assert done.returncode == 0, done.stderr
    expected = f"not loaded: torch {torch.__version__} is a build for ROCm 7.1 | plain-torch reference\n"
    assert done.stdout == expected
