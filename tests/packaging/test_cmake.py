"""The CMake build: its own tests, an installation, and a program that finds it there."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from building import ROOT, run

TORCH = f"-DTorchStable_ROOT={torch.__path__[0]}"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cmake")
    options = [TORCH, "-DFLATTEN_WITH_CUDA=OFF", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]  # compiled in half the time
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options, cwd=folder)
    run("cmake", "--build", folder, cwd=folder)
    return folder


def setup_constant(name: str):
    """A constant of setup.py, which cannot be imported."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == name:
            return ast.literal_eval(statement.value)
    raise LookupError(name)


def test_ctest(build: Path) -> None:
    assert "100% tests passed" in run("ctest", "--output-on-failure", cwd=build)


def test_same_flags_as_setup_py(build: Path) -> None:
    commands = {
        Path(c["file"]): c["command"] for c in json.loads((build / "compile_commands.json").read_text())
    }
    by_name = {path.stem: command for path, command in commands.items()}
    for stem, flags in setup_constant("ISA_FLAGS").items():
        if stem in by_name:
            assert re.findall(r" (-m\S+)", by_name[stem]) == flags.split()
    assert not re.search(" -m", by_name["baseline"])
    major, minor = setup_constant("MINIMUM_TORCH")
    assert f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000" in by_name["library"]
    assert by_name.keys() >= {p.stem for p in (ROOT / "csrc").glob("*.cpp")} - {"bindings"}


def test_isa_units_share_no_code(build: Path) -> None:
    """An inline function that two units emit is kept once, so an AVX copy could end up in the baseline."""
    objects = sorted(build.rglob("cpu/isa/*.o"))
    assert objects
    for unit in objects:
        namespace = unit.name.partition(".")[0]
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", unit], capture_output=True, text=True, check=True
        )
        weak = re.findall(r"^\w+ [VWu] (.*)$", listing.stdout, re.M)
        assert [symbol for symbol in weak if f"flatten::cpu::{namespace}::" not in symbol] == []


def test_find_package(build: Path, tmp_path: Path) -> None:
    prefix, consumer = tmp_path / "prefix", tmp_path / "consumer"
    run("cmake", "--install", build, "--prefix", prefix, cwd=tmp_path)
    run(
        "cmake", "-S", ROOT / "tests" / "cpp", "-B", consumer, "-G", "Ninja", TORCH,
        f"-DCMAKE_PREFIX_PATH={prefix}", cwd=tmp_path,
    )  # fmt: skip
    run("cmake", "--build", consumer, cwd=tmp_path)
    passed = run("ctest", "--output-on-failure", cwd=consumer)
    assert re.search(r"100% tests passed.* out of 1$", passed, re.M)  # releases of CMake word it differently
    library = next(prefix.rglob("libflatten.so"))
    assert "libpython" not in run("ldd", library, cwd=tmp_path)
