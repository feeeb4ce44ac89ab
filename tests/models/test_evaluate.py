"""Accuracy: counted right, and resumed after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`evaluate` on 12 pictures of two classes in the folder "data", by the checkpoint that `says` names."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from flatten_ext.tools.cli import build_app

    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("flatten_deit_tiny", num_classes=2, img_size=32)

    def command(says: int | None = None, **more: Any) -> Any:
        if says is not None:  # the same class of every picture
            nn.init.zeros_(model.head.weight)
            model.head.bias.data = torch.tensor([0.0, 9.0] if says else [9.0, 0.0])
            torch.save({"model": model.state_dict(), **more}, "best.pt")
        arguments = ["evaluate", "--model", "flatten_deit_tiny", "--data", "data", "--checkpoint", "best.pt"]
        arguments += [
            "--output",
            "out.json",
            "--img-size",
            "32",
            "--workers",
            "0",
            "--batch-size",
            "1",
            "--save-every",
            "2",
        ]
        return CliRunner().invoke(build_app(), arguments)

    return command


def cut_off(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any], says: int) -> None:
    """An evaluation that ends by itself after eight pictures, its counts kept every two."""
    from flatten_ext.tools import evaluate as tools

    calls, cross_entropy = [], tools.F.cross_entropy

    def interrupted(*arguments: Any, **options: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return cross_entropy(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tools.F, "cross_entropy", interrupted)
        assert run(says).exit_code != 0
    assert json.loads(Path("out.json.state").read_text())["counts"]["seen"] == 8


def seen_again(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any], *says: int) -> int:
    """How many pictures the next evaluation reads, which must succeed."""
    from flatten_ext.tools import data

    read: list[Any] = []
    monkeypatch.setattr(data, "open_image", lambda path: read.append(path) or Image.open(path).convert("RGB"))
    result = run(*says)
    assert result.exit_code == 0, result.output
    assert not Path("out.json.state").exists()
    return len(read)


def test_a_cut_off_evaluation_goes_on_with_the_same_weights_alone(run, monkeypatch) -> None:
    cut_off(monkeypatch, run, 0)
    assert seen_again(monkeypatch, run) == 4
    first = json.loads(Path("out.json").read_text())
    assert (first["top1"], first["images"]) == (50.0, 12)
    cut_off(monkeypatch, run, 0)
    assert seen_again(monkeypatch, run, 1) == 12  # another model behind the same path
    cut_off(monkeypatch, run, 0)
    Path("best.pt").rename("moved.pt")
    Path("best.pt").symlink_to("moved.pt")
    assert seen_again(monkeypatch, run) == 4  # the same model elsewhere


def test_a_cut_off_evaluation_begins_anew_with_other_images(run, monkeypatch) -> None:
    cut_off(monkeypatch, run, 0)
    picture = Path("data/a/0.png")
    picture.write_bytes(Path("data/a/1.png").read_bytes())
    assert seen_again(monkeypatch, run) == 12


def test_the_state_stays_until_the_result_is_written(run, monkeypatch) -> None:
    from flatten_ext import output

    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(output, "write_json", full)
        result = run(0)
    assert result.exit_code == 1
    assert "No space left on device: 'out.json'" in result.stderr
    assert not Path("out.json").exists()
    assert seen_again(monkeypatch, run) == 0  # all twelve were counted
    assert json.loads(Path("out.json").read_text())["top1"] == 50.0


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"identity": 1, "counts": {"seen": "x"}}'])
def test_a_broken_state_is_named(run, content: str) -> None:
    Path("out.json.state").write_text(content)
    result = run(0)
    assert result.exit_code == 1
    assert "out.json.state is not the state of an evaluation" in result.stderr


def test_a_checkpoint_of_other_classes_is_refused(run) -> None:
    """Of as many classes: only their names tell that labels would shift."""
    assert run(0, classes=["a", "b"]).exit_code == 0
    result = run(0, classes=["a", "c"])
    assert result.exit_code == 1
    assert "best.pt is of the classes a, c, data data has a, b" in result.stderr
