"""Training: it learns, distils, and ends in the same weights however often it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from flatten_ext.tools.data import open_dataset
from flatten_ext.tools.evaluate import write_atomically
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


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file: object) -> None:
        os.write(file.fileno(), b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_text() == "old"
