"""Training: it learns, distils, and ends in the same weights however often it is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from flatten_ext.output import replacing
from flatten_ext.tools import fingerprint
from flatten_ext.tools.data import is_divided, open_dataset, open_whole
from flatten_ext.tools.train import TrainConfig, Trainer, distillation_loss

SMALL = {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": 8, "img_size": 32}


def config(output: Path, **changes: object) -> TrainConfig:
    base = TrainConfig(
        model="flatten_deit_tiny",
        data="digits",
        output=str(output),
        model_args=SMALL,
        img_size=32,
        epochs=2,
        batch_size=64,
        warmup_epochs=0,
        lr=5e-3,
        mixup=0.0,
        cutmix=0.0,
        auto_augment=None,
        reprob=0.0,
        hflip=0.0,
        crop_scale=0.7,
        ema_decay=None,
        workers=0,
        save_every=5,
    )
    return replace(base, **changes)


def test_it_learns(tmp_path: Path) -> None:
    pyramid = {"embed_dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1), "img_size": 32}
    history = Trainer(config(tmp_path, model="flatten_pvt_v2_b0", model_args=pyramid)).fit()
    assert [entry["epoch"] for entry in history] == [0, 1]
    assert history[-1]["top1"] > 70  # of ten classes
    assert json.loads((tmp_path / "history.json").read_text()) == history
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["classes"] == [str(i) for i in range(10)]


SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
from flatten_ext.tools.train import TrainConfig, Trainer
Trainer(TrainConfig(**json.loads(sys.argv[1]))).fit(lambda done, total, loss: print(done, flush=True))
"""


def start(run: TrainConfig) -> subprocess.Popen:
    arguments = [sys.executable, "-c", SCRIPT, json.dumps(vars(run))]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def test_a_killed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL in mid-epoch and while checkpoints are written, with everything random switched on."""
    everything = {
        "mixup": 0.8,
        "cutmix": 1.0,
        "auto_augment": "rand-m9-mstd0.5-mmax9-inc1",
        "reprob": 0.25,
        "hflip": 0.5,
        "ema_decay": 0.9,
        "model_args": {**SMALL, "drop_path_rate": 0.1, "proj_drop_rate": 0.1},
        "convert": None,
    }
    undisturbed = config(tmp_path / "undisturbed", **everything)
    killed = config(tmp_path / "killed", save_every=1, **everything)
    process = start(undisturbed)
    process.communicate(timeout=300)
    assert process.returncode == 0
    for after in (4, 5):  # steps of each part before it dies; the second part starts from a checkpoint
        process = start(killed)
        assert process.stdout is not None
        for _ in range(after):
            assert process.stdout.readline()
        time.sleep(0.003 * after)  # into the checkpoint that the step writes, or the next step
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    process = start(killed)
    steps, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert int(steps.split()[0]) > 5, "the run began again instead of going on"
    ours, theirs = (
        torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("killed", "undisturbed")
    )
    for key in ("state_dict", "state_dict_ema", "optimizer"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    assert ours["history"] == theirs["history"]


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    Trainer(config(tmp_path, epochs=1)).fit()
    with pytest.raises(ValueError, match=r"lr: 0\.005 there, 0\.5 here"):
        Trainer(config(tmp_path, epochs=1, lr=0.5))


def test_distillation_from_the_softmax_model(tmp_path: Path) -> None:
    trainer = Trainer(
        config(tmp_path, model="deit_tiny_patch16_224", convert="L", teacher="self", epochs=1, amp="bfloat16")
    )
    assert trainer.teacher is not None
    assert type(trainer.teacher).__name__ == "VisionTransformer"
    assert type(trainer.model).__name__ == "FlattenVisionTransformer"
    trainer.fit()
    assert trainer.epoch == 1


def test_fine_tuning_starts_from_a_checkpoint(tmp_path: Path) -> None:
    softmax = timm.create_model("deit_tiny_patch16_224", num_classes=3, **SMALL)
    torch.save({"model": softmax.state_dict()}, tmp_path / "softmax.pth")
    trainer = Trainer(
        config(
            tmp_path / "run",
            model="deit_tiny_patch16_224",
            checkpoint=str(tmp_path / "softmax.pth"),
            convert="L",
        )
    )
    kept = trainer.model.blocks[0].attn.qkv.weight
    torch.testing.assert_close(kept, softmax.blocks[0].attn.qkv.weight, rtol=0, atol=0)
    assert trainer.model.head.out_features == 10


def test_distillation_loss() -> None:
    teacher = torch.randn(4, 10)
    assert abs(distillation_loss(teacher + 3, teacher, 2.0)) < 1e-6
    student = torch.randn(4, 10, requires_grad=True)
    p = (teacher / 2).softmax(-1)
    expected = 4 * (p * (p.log() - (student / 2).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0), expected)


def test_image_folder_and_packaged_sets(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = np.full((40, 50, 3), 60 * i + (name == "dog"), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    assert open_dataset(tmp_path, True).classes == ["cat", "dog"]
    history = Trainer(config(tmp_path / "run", data=str(tmp_path), epochs=1, batch_size=4, workers=1)).fit()
    assert history[0]["epoch"] == 0
    mnist = open_dataset("mnist", False)  # once: reading the text file takes seconds
    images, labels = zip(*(mnist[i] for i in range(1000)), strict=True)
    assert images[0].size == (28, 28)
    assert min(labels.count(digit) for digit in range(10)) > 70
    with pytest.raises(FileNotFoundError, match="digits"):
        open_dataset(tmp_path / "nowhere", True)


def image_folder(folder: Path, classes: str, images: int = 5, shade: int = 0) -> Path:
    """Class folders of plain pictures, all of one file size."""
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for j in range(images):
            pixels = np.full((32, 32, 3), 10 * i + j + shade, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{j:02}.png")
    return folder


def names(dataset: Any) -> list[str]:
    return [str(Path(path).relative_to(dataset.root)) for path, _ in dataset.samples]


def test_an_undivided_folder_holds_out_every_fifth_image_of_a_class(tmp_path: Path) -> None:
    image_folder(tmp_path, "a", 11)
    image_folder(tmp_path, "b", 3)
    image_folder(tmp_path, "c", 1)
    train, held_out, whole = open_dataset(tmp_path, True), open_dataset(tmp_path, False), open_whole(tmp_path)
    assert names(held_out) == ["a/04.png", "a/09.png", "b/02.png"]
    assert sorted(names(train) + names(held_out)) == names(whole)
    assert train.classes == held_out.classes == ["a", "b", "c"]
    assert train.targets == [label for _, label in train.samples]
    assert (is_divided(tmp_path), is_divided("digits")) == (False, True)


def test_classes_of_both_parts_are_compared(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", "abc")
    for part in ("test", "val"):
        expected = r"has train/ but no val/ \(beside it: test\)" if part == "test" else "val/ lacks a"
        image_folder(tmp_path / part, "bc")
        for train in (True, False):
            with pytest.raises(ValueError, match=expected):
                open_dataset(tmp_path, train)
        with pytest.raises(ValueError, match=expected):
            open_whole(tmp_path)
    image_folder(tmp_path / "val", "abcd")
    with pytest.raises(ValueError, match="train/ lacks d"):
        open_dataset(tmp_path, True)
    shutil.rmtree(tmp_path / "val" / "d")
    assert open_dataset(tmp_path, False).class_to_idx == open_dataset(tmp_path, True).class_to_idx
    (tmp_path / "val").rename(tmp_path / "validation")
    assert len(open_dataset(tmp_path, False)) == 15
    shutil.rmtree(tmp_path / "train")
    assert len(open_whole(tmp_path)) == 15  # an evaluation needs no train/
    with pytest.raises(ValueError, match="has validation/ but no train/"):
        open_dataset(tmp_path, True)


def folder_config(folder: Path, **changes: object) -> TrainConfig:
    return config(folder / "run", data=str(folder / "data"), epochs=1, batch_size=4, **changes)


def test_other_images_or_classes_are_refused_on_resume(tmp_path: Path) -> None:
    image_folder(tmp_path / "data", "abc")
    run = folder_config(tmp_path)
    Trainer(run).fit()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Trainer(run)

    (tmp_path / "data" / "a").rename(tmp_path / "data" / "zz")
    refused(r"last.pt is of a run with other classes \(a there, b here, b there, c here, c there, zz here\)")
    (tmp_path / "data" / "zz").rename(tmp_path / "data" / "a")
    image_folder(tmp_path / "data", "b", 7)
    refused(r"other images \(train: class b has 6 images here, 4 there\)")
    image_folder(tmp_path / "data", "d")
    refused("3 classes there, 4 here")
    shutil.rmtree(tmp_path / "data")
    image_folder(tmp_path / "data", "abc")
    Trainer(run).close()  # the same images again, written anew
    image_folder(tmp_path / "data", "a", 1, shade=100)  # the first picture of a, at the same size in bytes
    refused(r"other images \(train: class a has other images here\)")


def test_a_run_killed_between_its_files_writes_its_history_on_resume(tmp_path: Path) -> None:
    run = config(tmp_path, epochs=1)
    history = Trainer(run).fit()
    path = tmp_path / "history.json"
    expected = path.read_text()
    for left in (None, "[]", "[{"):  # as between last.pt and history.json of an epoch
        path.unlink()
        if left is not None:
            path.write_text(left)
        assert Trainer(run).fit() == history
        assert path.read_text() == expected
    before = path.stat().st_mtime_ns
    Trainer(run).close()
    assert path.stat().st_mtime_ns == before


def test_a_damaged_last_checkpoint_is_named(tmp_path: Path) -> None:
    run = config(tmp_path, epochs=1)
    Trainer(run).fit()
    path = tmp_path / "last.pt"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b"", whole[:100], whole[: len(whole) // 2], whole[:-10], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"last\.pt is damaged"):
            Trainer(run)
    for value in ([1], {"config": {}}):
        torch.save(value, path)
        with pytest.raises(ValueError, match=r"last\.pt is no checkpoint of this program"):
            Trainer(run)


def test_one_run_at_a_time_in_a_folder(tmp_path: Path) -> None:
    first = Trainer(config(tmp_path, epochs=1))
    message = rf"{tmp_path} is in use by process {os.getpid()} on "
    with pytest.raises(ValueError, match=message):
        Trainer(config(tmp_path, epochs=1))
    first.fit()
    Trainer(config(tmp_path, epochs=1)).close()  # and then the next


def test_a_killed_run_leaves_its_folder_to_the_next(tmp_path: Path) -> None:
    """Workers outlive a killed parent by seconds, and must not hold its folder."""
    run = config(tmp_path, workers=2, epochs=50)
    process = start(run)
    assert process.stdout is not None
    assert process.stdout.readline()
    with pytest.raises(ValueError, match=f"in use by process {process.pid} "):
        Trainer(run)
    (tmp_path / ".last-unfinished-killed.pt").write_bytes(b"half")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    Trainer(run).close()
    assert not list(tmp_path.glob("*unfinished*"))


def test_images_are_known_by_content_order_and_place(tmp_path: Path) -> None:
    one, two = image_folder(tmp_path / "one", "ab"), image_folder(tmp_path / "two", "ab")
    first, moved = (fingerprint.of_images(open_whole(folder)) for folder in (one, two))
    assert first == moved
    assert first["a"][0] == 5
    assert fingerprint.differing_classes(first, moved) == ""
    digits = fingerprint.of_images(open_dataset("digits", False))
    assert sum(count for count, _ in digits.values()) == 360
    assert fingerprint.differing_classes(digits, first).startswith("class 0 is there alone")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
