"""What the packaging tests share: the sdist, the wheel built from it, and one virtual environment with an
older torch than the wheel was built against. Each is made once; the whole folder takes minutes.
"""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

import pytest
from building import BRISK, CPU_ONLY, OLDER_TORCH, ROOT, Venv, run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.packaging)


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=ROOT, env=CPU_ONLY)
    return next(folder.glob("flatten_ext-*.tar.gz"))


@pytest.fixture(scope="session")
def source_tree(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, to install from and leave build products in."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return next(folder.iterdir())


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, against the torch that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, sdist,
        cwd=folder, env=BRISK,
    )  # fmt: skip
    return next(folder.glob("flatten_ext-*.whl"))


@pytest.fixture(scope="session")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Venv:
    venv = Venv(tmp_path_factory.mktemp("venv"))
    run(sys.executable, "-m", "venv", venv.folder, cwd=venv.folder)
    build_tools = ["setuptools>=77", "ninja", "pybind11>=2.13"]
    venv.pip_install(f"torch=={OLDER_TORCH}", "numpy", "pytest>=8", *build_tools)
    return venv
