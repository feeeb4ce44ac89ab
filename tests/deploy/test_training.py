"""Training on several processes, equal to one: `train` under torchrun, FSDP2, distributed checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from processes import process, run_processes
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import Tensor, nn

import flatten_ext.models  # noqa: F401  registers them
from flatten_ext.errors import InputError
from flatten_ext.tools.train import TrainConfig, Trainer

SMALL = {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": 8, "img_size": 32, "drop_rate": 0.1}


def config(output: Path, **changes: object) -> TrainConfig:
    """Everything that is drawn at random in a step."""
    base = TrainConfig(
        model="flatten_deit_tiny", data="digits", output=str(output), model_args=SMALL, img_size=32, epochs=2,
        batch_size=240, warmup_epochs=0, lr=5e-3, ema_decay=0.9, workers=0, save_every=2,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def saved(folder: Path) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)


class Killed(Exception):
    pass


def stop_after(steps: int):
    def progress(done: int, total: int, loss: float) -> None:
        if done == steps:
            raise Killed

    return progress


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Also where a run of two is cut off in its second epoch, and goes on in one that takes both parts."""
    Trainer(config(tmp_path / "one", accumulate=2)).fit()
    run_processes(__file__, 2, tmp_path, "train", str(tmp_path / "two"), "0")
    (tmp_path / "more").mkdir()
    run_processes(__file__, 2, tmp_path / "more", "train", str(tmp_path / "cut"), "8")
    assert saved(tmp_path / "cut")["epoch"] == 1
    with pytest.raises(InputError, match=r"steps have 2 parts, here 1: processes \* accumulate"):
        Trainer(config(tmp_path / "cut"))
    Trainer(config(tmp_path / "cut", accumulate=2)).fit()
    one = saved(tmp_path / "one")
    for other in ("two", "cut"):
        state = saved(tmp_path / other)
        for key in ("state_dict", "state_dict_ema"):
            for name, weight in one[key].items():
                torch.testing.assert_close(state[key][name], weight, rtol=1e-5, atol=1e-6)
        for before, now in zip(one["history"], state["history"], strict=True):
            assert now == pytest.approx(before, rel=1e-5)
        assert json.loads((tmp_path / other / "history.json").read_text()) == state["history"]


def test_a_step_has_whole_parts(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"batch_size is 240 .* a multiple of 7: 1 processes take 7 parts each"
    ):
        Trainer(config(tmp_path, accumulate=7))


def test_torchrun_starts_the_command(tmp_path: Path) -> None:
    """As docs/tour.md has it, in fewer steps: one process writes and prints."""
    tour = (Path(__file__).parents[2] / "docs" / "tour.md").read_text()
    command = re.search(r"^torchrun (.*?[^\\])$", tour, re.M | re.S)[1].replace("\\\n", " ").split()
    assert command[-2:] == ["--output", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command, "--batch-size", "700"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=tmp_path, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1") == 1
    assert saved(tmp_path / "run")["parts"] == 2


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("block", "flatten_swin_tiny"),
        ("layer", "flatten_deit_tiny"),
        pytest.param("block", "flatten_deit_tiny,flatten_pvt_v2_b0", marks=pytest.mark.slow),
        pytest.param("layer", "flatten_pvt_v2_b0,flatten_swin_tiny", marks=pytest.mark.slow),
    ],
)
def test_sharded_training(by: str, names: str, tmp_path: Path) -> None:
    """FSDP2 from the meta device: gradients, the next step and its checkpoint are one process's."""
    outputs = run_processes(__file__, 2, tmp_path, "shard", by, str(tmp_path / "checkpoint"), names)
    assert all(output.count("equal") == len(names.split(",")) for output in outputs)


# ------------------------------------------------------------------------------------------ in two processes
FAMILIES = {
    "flatten_deit_tiny": {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8},
    "flatten_pvt_v2_b0": {"embed_dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1)},
    "flatten_swin_tiny": {"embed_dim": 24, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
}


def train(output: str, steps: str) -> None:
    trainer = Trainer(config(Path(output)))
    try:
        trainer.fit(stop_after(int(steps)))
    except Killed:
        assert steps != "0"


def build(name: str, device: str = "cpu") -> nn.Module:
    with torch.device(device):
        return timm.create_model(
            name, img_size=32, num_classes=5, drop_path_rate=0.0, **FAMILIES[name]
        ).double()


def is_sharded_alone(module: nn.Module, by: str) -> bool:
    """Blocks as torch's tutorials choose them, or every layer with parameters of its own."""
    return (by == "block" and "Block" in type(module).__name__) or (
        by == "layer" and isinstance(module, (nn.Linear, nn.LayerNorm, nn.Conv2d))
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard(by: str, folder: str, names: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_model_state_dict,
        set_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    def sharded(name: str) -> nn.Module:
        model = build(name, "meta")
        for module in reversed(list(model.modules())):
            if is_sharded_alone(module, by):
                fully_shard(module)
        fully_shard(model)
        model.to_empty(device="cpu")
        reinit_non_persistent_buffers(model)  # which no checkpoint has
        return model

    rank = dist.get_rank()
    for name in names.split(","):
        torch.manual_seed(0)
        alone = build(name)
        images, labels = torch.randn(8, 3, 32, 32).double(), torch.randint(5, (8,))
        model = sharded(name)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, alone.state_dict(), options=options)
        for _ in range(2):
            optimizers = [torch.optim.AdamW(m.parameters(), 1e-3) for m in (alone, model)]
            step(alone, optimizers[0], images, labels)
            step(model, optimizers[1], images.chunk(2)[rank], labels.chunk(2)[rank])
            parameters = dict(model.named_parameters())
            for key, parameter in alone.named_parameters():
                gradient = whole(parameters[key].grad)
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)
        # The checkpoint, read into a model of other numbers.
        weights, moments = get_state_dict(model, optimizers[1])
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/{name}")
        again = sharded(name)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.fill_(0.5)
        optimizer = torch.optim.AdamW(again.parameters(), 1e-3)
        weights, moments = get_state_dict(again, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/{name}")
        set_state_dict(again, optimizer, model_state_dict=weights, optim_state_dict=moments)
        for a, b in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(whole(a), whole(b))
        for m, o in ((model, optimizers[1]), (again, optimizer)):
            step(m, o, images.chunk(2)[rank], labels.chunk(2)[rank])
        for a, b in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(whole(a), whole(b))
        print("equal:", name)


def main(rank: int, count: int, what: str, *arguments: str) -> None:
    {"train": train, "shard": shard}[what](*arguments)


if __name__ == "__main__":
    process(main)
