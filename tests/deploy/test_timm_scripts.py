"""timm's own scripts with our models, under `flatten-ext run`, one after the other on the same images.

timm's packages do not have the scripts: TIMM_SCRIPTS names a checkout of its repository, at the release that
is installed.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import flatten_ext.models  # noqa: F401  registers them

SCRIPTS = Path(os.environ.get("TIMM_SCRIPTS", ""))
pytestmark = pytest.mark.skipif(
    "TIMM_SCRIPTS" not in os.environ, reason="TIMM_SCRIPTS names no checkout of timm, with its train.py"
)

MODEL = ["--model", "flatten_pvt_v2_b0", "--img-size", "64"]
DATA = ["--data-dir", "data", "--num-classes", "2", "--batch-size", "4", "--workers", "0", "--device", "cpu"]
SMALL = ["--model-kwargs", "depths=(1, 1, 1, 1)"]


def run(script: str, *arguments: str | Path, cwd: Path, before: tuple[str, ...] = ()) -> str:
    command = [sys.executable, "-m", "flatten_ext", "run", *before, SCRIPTS / script, *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, and what train.py makes of them."""
    folder, random = tmp_path_factory.mktemp("timm"), np.random.default_rng(0)
    for part in ("train", "validation"):
        for label, shade in enumerate((60, 180)):
            place = folder / "data" / part / f"class{label}"
            place.mkdir(parents=True)
            for i in range(4):
                pixels = (shade + random.integers(0, 40, (72, 72, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    brief = ["--epochs", "1", "--output", "output", "--experiment", "run"]
    run("train.py", *MODEL, *SMALL, *DATA, *brief, cwd=folder)
    return folder


def test_train(folder: Path) -> None:
    with open(folder / "output" / "run" / "summary.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["train_loss"]) > 0
    assert 0 <= float(row["eval_top1"]) <= 100


def small() -> torch.nn.Module:
    return timm.create_model("flatten_pvt_v2_b0", num_classes=2, depths=(1, 1, 1, 1))


def checkpoint(folder: Path) -> Path:
    return folder / "output" / "run" / "last.pth.tar"


def test_validate(folder: Path) -> None:
    """Its accuracy is that of the weights."""
    printed = run("validate.py", *MODEL, *SMALL, *DATA, "--checkpoint", checkpoint(folder), cwd=folder)
    result = json.loads(printed.partition("--result\n")[2].partition("\n}")[0] + "}")
    assert result["model"] == "flatten_pvt_v2_b0"
    assert result["top1"] in {100 * right / 8 for right in range(9)}
    assert result["param_count"] == round(sum(p.numel() for p in small().parameters()) / 1e6, 2)


def test_benchmark(tmp_path: Path) -> None:
    brief = "--bench both --batch-size 2 --device cpu --num-warm-iter 1 --num-bench-iter 5"
    printed = run("benchmark.py", *MODEL, *SMALL, *brief.split(), cwd=tmp_path)
    result = json.loads(printed.partition("--result\n")[2])
    assert result["infer_samples_per_sec"] > 0
    assert result["train_samples_per_sec"] > 0


def test_onnx_export(tmp_path: Path) -> None:
    """onnxruntime gives what torch gives for the file's weights. The script makes full models only."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = timm.create_model("flatten_pvt_v2_b0", num_classes=2).eval()
    torch.save(model.state_dict(), tmp_path / "pvt.pth")
    options = ["--dynamo", "--num-classes", "2", "--checkpoint", "pvt.pth"]
    run("onnx_export.py", "pvt.onnx", *MODEL, *options, cwd=tmp_path, before=("--onnx",))
    session = onnxruntime.InferenceSession(str(tmp_path / "pvt.onnx"))
    image = torch.randn(1, 3, 64, 64)
    (logits,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(image).numpy(), atol=1e-4)
