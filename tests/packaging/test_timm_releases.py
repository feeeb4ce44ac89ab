"""The models on the oldest release of timm that the package allows, and on the newest there is."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from building import ROOT, run

# What builds on timm's models: their contract, windows, weights, conversion, and initialisation.
FILES = (
    "test_checkpoint.py",
    "test_contract.py",
    "test_convert.py",
    "test_meta_device.py",
    "test_mlp.py",
    "test_model_attention.py",
    "test_positions.py",
    "test_public.py",
    "test_reading.py",
    "test_swin.py",
    "test_wrapped_layers.py",
)


def requirement(release: str) -> str:
    if release == "newest":
        return "timm"
    lowest = re.search(r'"timm>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert lowest is not None
    return f"timm=={lowest[1]}"


@pytest.mark.parametrize("release", ["lowest", "newest"])
def test_models(release: str, tmp_path: Path) -> None:
    """That release in a folder before this environment's, whose torch and torchvision are used."""
    wanted, folder = requirement(release), tmp_path / "packages"
    run(
        *(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wanted),
        cwd=tmp_path,
    )
    env = {"PYTHONPATH": f"{folder}:{ROOT}"}
    found = run(
        sys.executable, "-c", "import timm; print(timm.__version__, timm.__file__)", cwd=ROOT, env=env
    )
    version, file = found.split()[-2:]
    assert Path(file).is_relative_to(folder)
    assert release == "newest" or wanted == f"timm=={version}"
    tests = [ROOT / "tests" / "models" / name for name in FILES]
    run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not packaging", *tests),
        cwd=ROOT,
        env=env,
    )
