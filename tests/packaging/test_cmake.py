"""The CMake build: its own tests, an installation, and programs that find it there."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from building import CPU_ONLY, ROOT, run

import flatten_ext.models  # noqa: F401  registers them

TORCH = f"-DTorchStable_ROOT={torch.__path__[0]}"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cmake")
    options = [TORCH, "-DFLATTEN_WITH_CUDA=OFF", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]  # compiled in half the time
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options, cwd=folder)
    run("cmake", "--build", folder, cwd=folder)
    return folder


def test_ctest(build: Path) -> None:
    assert "100% tests passed" in run("ctest", "--output-on-failure", cwd=build)


def units_of_libflatten(compile_commands: str) -> dict[Path, list[str]]:
    """Standard and instruction set of every unit of csrc/."""
    return {
        Path(c["file"]): re.findall(r" (-std=\S+|-m[a-z]\S*)", c["command"])
        for c in json.loads(compile_commands)
        if Path(c["file"]).is_relative_to(ROOT / "csrc")
    }


def test_setup_py_compiles_the_same_units_with_the_same_flags(build: Path, tmp_path: Path) -> None:
    pretends = tmp_path / "ninja"
    pretends.write_text("#!/bin/sh\n")
    pretends.chmod(0o755)
    run(
        sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path / "lib",
        cwd=ROOT, env={**CPU_ONLY, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    database = run("ninja", "-C", tmp_path / "flatten_ext.lib.libflatten", "-t", "compdb", cwd=tmp_path)
    database = database[database.index("[\n") :]  # behind what ninja says of the folder
    cmake_database = (build / "compile_commands.json").read_text()
    by_cmake = units_of_libflatten(cmake_database)
    assert by_cmake == units_of_libflatten(database)
    versions = [set(re.findall(r"-DTORCH_TARGET_VERSION=(\w+)", d)) for d in (database, cmake_database)]
    assert versions[0] == versions[1]
    assert len(versions[0]) == 1
    isa = ROOT / "csrc" / "cpu" / "isa"
    assert by_cmake[isa / "baseline.cpp"] == by_cmake[isa.parent / "dispatch.cpp"]
    if platform.machine() == "x86_64":
        assert "-mavx512f" in by_cmake[isa / "avx512.cpp"]
        assert "-mavx512f" not in by_cmake[isa / "avx2.cpp"]


def test_isa_units_share_no_code(build: Path) -> None:
    """An inline function that two units emit is kept once, so an AVX copy could end up in the baseline."""
    objects = sorted(build.rglob("cpu/isa/*.o"))
    assert objects
    for unit in objects:
        namespace = unit.name.partition(".")[0]
        # Mangled: nm gives up demangling the longest.
        listing = subprocess.run(["nm", "--defined-only", unit], capture_output=True, text=True, check=True)
        weak = re.findall(r"^\w+ [VWu] (.*)$", listing.stdout, re.M)
        own = f"7flatten3cpu{len(namespace)}{namespace}"
        assert [symbol for symbol in weak if own not in symbol] == []


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


# ----------------------------------------------------------- models that AOTInductor compiled, without Python
@pytest.fixture(scope="module")
def program(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/cpp, built against the installed package."""
    folder = tmp_path_factory.mktemp("program")
    run("cmake", "--install", build, "--prefix", folder / "prefix", cwd=folder)
    options = [f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}", TORCH, "-DCMAKE_CXX_FLAGS_RELEASE=-O0"]
    run("cmake", "-S", ROOT / "examples" / "cpp", "-B", folder / "build", "-G", "Ninja", *options, cwd=folder)
    run("cmake", "--build", folder / "build", cwd=folder)
    return folder / "build" / "run_package"


def compare(program: Path, folder: Path, model: torch.nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        exported = torch.export.export(model.eval(), (images,))
        assert any("flatten.attention" in str(node.target) for node in exported.graph.nodes)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / "model.pt2"))
        expected = model(images).numpy()
    images.numpy().tofile(folder / "images.f32")
    sizes = [str(images.shape[i]) for i in (0, 2, 3)]
    files = [folder / name for name in ("model.pt2", "images.f32", "logits.f32")]
    run(program, *files, *sizes, cwd=folder, env={"PYTHONHOME": "/nowhere"})
    logits = np.fromfile(folder / "logits.f32", np.float32).reshape(expected.shape)
    # Of two compilers: rounded differently, and no more.
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_there_is_no_python_in_it(program: Path, tmp_path: Path) -> None:
    linked = run("ldd", program, cwd=tmp_path)
    assert "libflatten" in linked
    assert "libpython" not in linked


def test_a_file_of_another_size_is_an_error(program: Path, tmp_path: Path) -> None:
    torch.zeros(5).numpy().tofile(tmp_path / "images.f32")
    with pytest.raises(AssertionError, match=r"images.f32 does not have 192 numbers of float32"):
        run(program, "model.pt2", "images.f32", "out.f32", "1", "8", "8", cwd=tmp_path)


def test_flatten_swin_t(program: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    compare(program, tmp_path, timm.create_model("flatten_swin_tiny"), torch.randn(1, 3, 224, 224))
