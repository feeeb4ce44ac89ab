"""Accuracy: counted right, and resumed after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import flatten_ext.models  # noqa: F401
from flatten_ext.tools.evaluate import evaluate


class Answers(nn.Module):
    """Ranks the classes of image i as its pixels say."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.stop_at: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return x.flatten(1)


def dataset() -> TensorDataset:
    """Ten images of ten classes: the right class is first in 4, among the first five in 7."""
    images = torch.stack([torch.arange(10.0).flip(0).roll(i) for i in range(10)])
    offsets = torch.tensor([0, 0, 0, 0, 2, 3, 4, 5, 6, 9])
    labels = (torch.arange(10) + offsets) % 10
    return TensorDataset(images[:, :, None, None], labels)


def test_counts() -> None:
    result = evaluate(Answers(), dataset(), batch_size=3, workers=0)
    assert (result["images"], result["top1"], result["top5"]) == (10, 40.0, 70.0)
    images, labels = dataset().tensors
    loss = torch.nn.functional.cross_entropy(images.flatten(1), labels)
    assert result["loss"] == pytest.approx(float(loss), rel=1e-6)


def test_resumed(tmp_path: Path) -> None:
    state, model = tmp_path / "state", Answers()
    model.stop_at = 4
    args = {"batch_size": 2, "workers": 0, "state": state, "identity": {"model": "a"}, "save_every": 1}
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, dataset(), **args)
    assert json.loads(state.read_text())["counts"]["seen"] == 6
    other = Answers()
    seen: list[int] = []
    result = evaluate(other, dataset(), **args, progress=lambda done, total: seen.append(done))
    assert (other.calls, seen) == (2, [8, 10])
    assert (result["top1"], result["top5"]) == (40.0, 70.0)
    assert not state.exists()
    model.calls, model.stop_at = 0, 4
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, dataset(), **args)
    fresh = Answers()
    evaluate(fresh, dataset(), **{**args, "identity": {"model": "b"}})  # another model starts anew
    assert fresh.calls == 5


def test_empty() -> None:
    with pytest.raises(ValueError, match="empty"):
        evaluate(Answers(), TensorDataset(torch.zeros(0, 1), torch.zeros(0)))


def test_command(tmp_path: Path) -> None:
    """`evaluate --data FOLDER`: the pipeline of timm, workers, AMP and a checkpoint."""
    typer = pytest.importorskip("typer")
    from typer.testing import CliRunner

    from flatten_ext.tools.commands import evaluate as command

    torch.manual_seed(0)
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "val" / name / f"{i}.png")
    model = timm.create_model("flatten_deit_tiny", num_classes=2, img_size=64)
    nn.init.constant_(model.head.bias[:1], 100.0)  # always says "a"
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    arguments = ["evaluate", "--model", "flatten_deit_tiny", "--data", str(tmp_path / "val")]
    arguments += ["--checkpoint", str(tmp_path / "model.pth"), "--output", str(tmp_path / "out.json")]
    arguments += ["--img-size", "64", "--workers", "1", "--amp", "bfloat16", "--batch-size", "4"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["images"], written["top1"], written["top5"]) == (6, 50.0, 100.0)
    assert written["input_size"] == [3, 64, 64]
