"""Bad calls of the command line: each ends in one line that names what is wrong, before any work."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")
pytest.importorskip("timm")

import timm
from PIL import Image
from typer.testing import CliRunner

import flatten_ext.models  # noqa: F401
from flatten_ext.tools.cli import build_app


def picture(path: Path, size: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def image_folder(folder: Path, **parts: str) -> None:
    """Three pictures in each class folder; the classes of a part are letters."""
    for part, classes in parts.items():
        for name in classes:
            for i in range(3):
                picture(folder / part / name / f"{i}.png", 32)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Good and bad inputs of every kind."""
    place = tmp_path_factory.mktemp("place")
    image_folder(place / "good", train="ab", val="ab")
    image_folder(place / "tested", train="ab", test="ab")
    image_folder(place / "untrained", val="ab")
    image_folder(place / "fewer", train="abc", val="ab")
    image_folder(place / "more", train="ab", val="abc")
    image_folder(place / "renamed", train=("cat", "dog"), val=("cat", "hound"))
    image_folder(place / "torn", train="ab", val="ab")
    cut = picture(place / "whole.jpg").read_bytes()
    for path in ("cut.jpg", "torn/val/b/cut.jpg", "torn/train/b/cut.jpg"):
        (place / path).write_bytes(cut[: len(cut) // 2])
    (place / "text.jpg").write_text("no picture")
    Image.new("1", (20_000, 10_000)).save(place / "bomb.png")  # past Pillow's limit
    (place / "void").mkdir()
    (place / "hollow" / "a").mkdir(parents=True)
    picture(place / "flat" / "0.png")
    (place / "empty.pth").write_bytes(b"")
    (place / "garbage.pth").write_bytes(bytes(range(256)) * 3)
    torch.save([1], place / "list.pth")
    torch.save(torch.zeros(3), place / "tensor.pth")
    torch.save({"model": {"head.weight": "text"}}, place / "odd.pth")
    torch.save({"model": {"head.weight": torch.zeros(1)}}, place / "other.pth")
    model = timm.create_model("flatten_deit_tiny", img_size=32, num_classes=2)
    torch.nn.init.constant_(model.blocks[0].norm1.weight, float("nan"))
    torch.save(model.state_dict(), place / "nan.pth")
    (place / "file").write_text("a file")
    return place


TRAIN = "train --epochs 1 --batch-size 4 --workers 0 --img-size 32 --output run "
DEIT = "--model flatten_deit_tiny "
GOOD = "--data good "
EVALUATE = "evaluate --workers 0 --img-size 32 "
VISUALIZE = "visualize --img-size 32 --output out --suffix png "

# A command line, and what its message must hold.
CALLS = [
    ("nothing", "nothing"),
    ("info --xml", "--xml"),
    ("demo --epochs 0", "--epochs"),
    ("demo --seeds few", "--seeds"),
    ("demo --train-images 5", "--train-images"),
    ("demo --output file", "file cannot be written"),
    ("demo --output file/out", "file/out"),
    ("demo --output /proc/nowhere", "/proc/nowhere"),
    ("bench --suite speed", "speed"),
    ("bench --threads 0", "--threads"),
    ("bench --seconds nan", "seconds"),
    ("bench --seconds inf", "seconds"),
    ("bench --jobs 0", "--jobs"),
    ("bench --device abacus", "abacus"),
    ("bench --device cuda:77", "cuda:77"),
    ("bench --device meta", "meta"),
    ("bench --output file", "file cannot be written"),
    (EVALUATE + GOOD, "--model"),
    (EVALUATE + GOOD + "--model flatten_dait_tiny", "flatten_dait_tiny"),
    (EVALUATE + GOOD + "--model resnet18", "resnet18"),
    (EVALUATE + DEIT + "--data nowhere", "nowhere"),
    (EVALUATE + DEIT + "--data void", "void has no class folders"),
    (EVALUATE + DEIT + "--data flat", "flat has no class folders"),
    (EVALUATE + DEIT + "--data hollow", "hollow"),
    (EVALUATE + DEIT + "--data tested", "tested has train/ but no val/ (beside it: test)"),
    (EVALUATE + DEIT + "--data fewer", "fewer/val/ lacks c"),
    (EVALUATE + DEIT + "--data more", "more/train/ lacks c"),
    (EVALUATE + DEIT + "--data torn", "torn/val/b/cut.jpg"),
    (EVALUATE + DEIT + "--data torn --workers 1", "torn/val/b/cut.jpg"),
    *(
        (f"{EVALUATE}{DEIT}{GOOD}--checkpoint {name}", f"checkpoint {name}")
        for name in ("missing.pth", "void", "empty.pth", "garbage.pth", "list.pth", "tensor.pth", "odd.pth")
    ),
    (EVALUATE + DEIT + GOOD + "--checkpoint other.pth", "other.pth does not fit"),
    (EVALUATE + DEIT + GOOD + "--checkpoint nan.pth --output result.json", "NaN"),
    (TRAIN + DEIT + GOOD + "--checkpoint nan.pth", "NaN"),
    (VISUALIZE + DEIT + "--image whole.jpg --checkpoint nan.pth", "NaN"),
    (EVALUATE + DEIT + GOOD + "--checkpoint other.pth --grid wide", "wide"),
    (EVALUATE + DEIT + GOOD + "--checkpoint other.pth --grid 1,2,3", "1,2,3"),
    (EVALUATE + DEIT + GOOD + "--checkpoint other.pth --grid 0", "grid"),
    (EVALUATE + DEIT + GOOD + "--amp float8", "float8"),
    (EVALUATE + DEIT + GOOD + "--amp nn", "nn"),
    (EVALUATE + DEIT + GOOD + "--device abacus", "abacus"),
    (EVALUATE + DEIT + GOOD + "--img-size 0", "--img-size"),
    (EVALUATE + DEIT + GOOD + "--img-size 8", "8"),
    (EVALUATE + "--model swin_tiny_patch4_window7_224 --img-size 3 " + GOOD, "3"),
    (EVALUATE + DEIT + GOOD + "--batch-size 0", "--batch-size"),
    (EVALUATE + DEIT + GOOD + "--workers -1", "--workers"),
    (EVALUATE + DEIT + GOOD + "--output void", "void cannot be written: it is a folder"),
    (EVALUATE + DEIT + GOOD + "--output file/result.json", "file/result.json"),
    (TRAIN + GOOD + "--model nowhere_tiny", "nowhere_tiny"),
    (TRAIN + DEIT + "--data nowhere", "nowhere"),
    (TRAIN + DEIT + "--data tested", "tested has train/ but no val/"),
    (TRAIN + DEIT + "--data untrained", "untrained has val/ but no train/"),
    (TRAIN + DEIT + "--data fewer", "fewer/val/ lacks c"),
    (TRAIN + DEIT + "--data more", "more/train/ lacks c"),
    (TRAIN + DEIT + "--data renamed", "renamed/val/ lacks dog; renamed/train/ lacks hound"),
    (TRAIN + DEIT + "--data torn --batch-size 7", "cut.jpg"),
    (TRAIN + DEIT + GOOD + "--checkpoint missing.pth", "missing.pth"),
    (TRAIN + DEIT + GOOD + "--checkpoint empty.pth", "empty.pth"),
    (TRAIN + DEIT + GOOD + "--teacher nobody", "nobody"),
    (TRAIN + DEIT + GOOD + "--teacher flatten_deit_tiny --teacher-checkpoint missing.pth", "missing.pth"),
    (TRAIN + DEIT + GOOD + "--teacher flatten_deit_tiny --teacher-checkpoint list.pth", "list.pth"),
    (TRAIN + DEIT + GOOD + "--convert LLSS", "LLSS"),
    (TRAIN + "--model deit_tiny_patch16_224 --convert LX " + GOOD, "LX"),
    (TRAIN + "--model resnet18 --convert L " + GOOD, "resnet18"),
    (TRAIN + "--model deit_tiny_patch16_224 " + GOOD, "img_size 32"),  # of 224 pixels alone
    (TRAIN + DEIT + GOOD + "--opt downhill", "downhill"),
    (TRAIN + DEIT + GOOD + "--auto-augment more", "more"),
    (TRAIN + DEIT + GOOD + "--auto-augment rand-x9", "rand-x9"),
    (TRAIN + DEIT + GOOD + "--device abacus", "abacus"),
    (TRAIN + DEIT + GOOD + "--amp float8", "float8"),
    *(
        (f"{TRAIN}{DEIT}{GOOD}--{option} {value}", f"--{option}")
        for option, value in (
            ("lr", "-1"), ("lr", "nan"), ("lr", "high"), ("weight-decay", "-1"), ("warmup-epochs", "-1"),
            ("smoothing", "2"), ("mixup", "-1"), ("cutmix", "-1"), ("reprob", "1.5"), ("hflip", "-1"),
            ("crop-scale", "0"), ("crop-scale", "2"), ("ema-decay", "2"), ("distillation", "2"),
            ("seed", "-1"), ("save-every", "0"), ("epochs", "0"), ("batch-size", "-4"), ("img-size", "0"),
            ("workers", "-2"),
        )
    ),
    (f"{TRAIN}{DEIT}{GOOD}--lr inf", "lr"),
    (f"{TRAIN}{DEIT}{GOOD}--output file", "file cannot be written"),
    (VISUALIZE + DEIT + "--image missing.png", "missing.png"),
    (VISUALIZE + DEIT + "--image void", "void"),
    (VISUALIZE + DEIT + "--image cut.jpg", "cut.jpg"),
    (VISUALIZE + DEIT + "--image text.jpg", "text.jpg"),
    (VISUALIZE + DEIT + "--image bomb.png", "bomb.png"),
    (VISUALIZE + "--model nobody --image whole.jpg", "nobody"),
    (VISUALIZE + "--model resnet18 --image whole.jpg", "resnet18"),
    (VISUALIZE + "--model deit_tiny_patch16_224 --image whole.jpg", "deit_tiny_patch16_224"),
    (VISUALIZE + DEIT + "--image whole.jpg --layer 99", "--layer"),
    (VISUALIZE + DEIT + "--image whole.jpg --query 2,2", "2,2"),
    (VISUALIZE + DEIT + "--image whole.jpg --query here", "here"),
    (VISUALIZE + DEIT + "--image whole.jpg --suffix doc", "doc"),
    (VISUALIZE + DEIT + "--image whole.jpg --img-size 8", "8"),
    (VISUALIZE + DEIT + "--image whole.jpg --checkpoint list.pth", "list.pth"),
    (VISUALIZE + DEIT + "--image whole.jpg --output file", "file cannot be written"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "named"), CALLS, ids=[f"{i}-{named}" for i, (_, named) in enumerate(CALLS)]
)
def test_a_bad_call_ends_in_one_line_that_names_it(place, tmp_path, monkeypatch, arguments, named):
    for source in place.iterdir():
        (tmp_path / source.name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(build_app(), arguments.split())
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2)
    command = arguments.split()[0]
    *before, line = result.stderr.splitlines()
    assert named in line
    assert line.startswith("flatten-ext: " if command == "nothing" else f"flatten-ext {command}: ")
    assert not before
    assert not [path for path in tmp_path.rglob("*unfinished*")]
    made = {path.name for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()}
    assert made <= {".lock", "last.pt"}  # an empty picture, a half result


def test_one_bad_number_is_named_outside_the_command_line_too():
    from flatten_ext.tools.recipe import TrainConfig

    for option, value in (
        ("lr", -1.0),
        ("lr", float("nan")),
        ("epochs", 0),
        ("smoothing", 2.0),
        ("amp", "float8"),
    ):
        with pytest.raises(ValueError, match=f"{option} is .*{value}"):
            TrainConfig(model="flatten_deit_tiny", data="digits", output="run", **{option: value})


def limited(size: int) -> Callable[[], None]:
    """Files of this process end at `size` bytes: what a full disk is to a program."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("arguments", "size", "named"),
    [
        (TRAIN + DEIT + GOOD, 1 << 20, "run/best.pt cannot be written: File too large"),
        (TRAIN + DEIT + GOOD, 1000, "run/last.pt cannot be written: File too large"),  # before the work
        (EVALUATE + DEIT + GOOD + "--output result.json", 100, "result.json cannot be written"),
        (VISUALIZE + DEIT + "--image whole.jpg", 70_000, "out/maps.png cannot be written"),
        ("demo --epochs 1 --train-images 64 --output out", 100, "out/demo.json cannot be written"),
    ],
)
def test_a_full_disk_is_named_and_nothing_half_stays(place, tmp_path, arguments, size, named):
    for source in place.iterdir():
        (tmp_path / source.name).symlink_to(source)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "flatten_ext", *arguments.split()],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, preexec_fn=limited(size),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert named in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    made = {path.name for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()}
    assert made <= {".lock"}


def test_an_output_is_tried_before_the_work(place, tmp_path, monkeypatch):
    """Of all five commands: nothing is trained, read or drawn for an output that cannot be written."""
    from flatten_ext.tools.bench import session
    from flatten_ext.tools.demo import run

    def work(*arguments, **options):
        raise AssertionError("work was begun")

    for module, name in ((session, "run"), (run, "compare"), (torch.nn.Module, "__call__")):
        monkeypatch.setattr(module, name, work)
    shutil.copytree(place, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    for arguments in (
        "demo --output file/out",
        "bench --output file/out",
        EVALUATE + DEIT + GOOD + "--output file/out.json",
        TRAIN.replace("--output run", "--output file/out") + DEIT + GOOD,
        VISUALIZE.replace("--output out", "--output file/out") + DEIT + "--image whole.jpg",
    ):
        result = CliRunner().invoke(build_app(), arguments.split())
        assert result.exit_code == 1, result.output
        assert "file/out" in result.stderr
        assert "cannot be written" in result.stderr
