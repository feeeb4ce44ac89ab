"""Training and fine-tuning on timm's recipes, with exact resumption.

Everything random in a step (augmentation, mixing, dropout) is seeded by (seed, epoch, step) alone, so a
checkpoint needs no generator states, and a run that was killed at any moment ends in the same weights as one
that was not.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flatten_ext import models
from flatten_ext.models._checkpoint import load_weights
from flatten_ext.models.convert import convert

from .data import Replayable, open_dataset, seed_everything
from .evaluate import autocast, evaluate, write_atomically

__all__ = ["TrainConfig", "Trainer", "distillation_loss"]


@dataclass
class TrainConfig:
    """One run. Every field is a setting of timm's recipes or says what it is."""

    model: str  # a timm model name
    data: str  # a folder, "digits" or "mnist": see flatten_ext.tools.data.open_dataset
    output: str  # folder of last.pt, best.pt and history.json
    model_args: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None  # weights to start from; a classifier of other classes is not loaded
    convert: str | None = None  # stages for flatten_ext.convert, applied after loading
    teacher: str | None = None  # timm model name to distil from; "self" is the model before `convert`
    teacher_checkpoint: str | None = None
    distillation: float = 0.5  # weight of the teacher's loss
    temperature: float = 2.0
    img_size: int = 224
    epochs: int = 300
    batch_size: int = 128
    opt: str = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.05
    clip_grad: float | None = 5.0
    sched: str = "cosine"
    warmup_epochs: int = 5
    min_lr: float = 1e-5
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    # mmax9: at magnitude 10 timm posterises to 0 bits, which Pillow refuses.
    auto_augment: str | None = "rand-m9-mstd0.5-mmax9-inc1"
    reprob: float = 0.25
    hflip: float = 0.5
    crop_scale: float = 0.08  # smallest share of the picture that a random crop shows
    ema_decay: float | None = 0.9999
    amp: str | None = None  # "bfloat16" or "float16"
    workers: int = 4
    device: str = "cpu"
    seed: int = 0
    save_every: int = 100  # steps between checkpoints; one more ends every epoch


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Soft distillation: KL divergence at `temperature`, scaled by its square (Hinton et al., 2015)."""
    student, teacher = (F.log_softmax(x.float() / temperature, -1) for x in (student, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class Trainer:
    """Builds what `config` names and trains it; goes on from `output`/last.pt where there is one.

    Raises:
        ValueError: last.pt is of a run with another configuration.
    """

    def __init__(self, config: TrainConfig):
        self.config, self.device = config, torch.device(config.device)
        self.output = Path(config.output)
        self.output.mkdir(parents=True, exist_ok=True)
        seed_everything(config.seed)
        train_set, self.val_set = open_dataset(config.data, True), open_dataset(config.data, False)
        self.classes = list(train_set.classes)
        model = timm.create_model(config.model, num_classes=len(self.classes), **config.model_args)
        self._set_transforms(model, train_set)
        self.train_set = Replayable(train_set, config.seed)
        if config.checkpoint:
            ours = isinstance(model, models.FAMILIES)
            filter_fn = models.checkpoint_filter(model) if ours else lambda state_dict, _model: state_dict
            load_weights(model, config.checkpoint, filter_fn, new_classifier=True)
        self.teacher = self._make_teacher(model)
        if config.convert:
            convert(model, config.convert, img_size=config.img_size)
        self.model = model.to(self.device)
        self.steps_per_epoch = max(len(self.train_set) // config.batch_size, 1)
        self._make_optimizer()
        self.epoch = self.step = 0  # step counts within the epoch
        self.history: list[dict[str, Any]] = []
        self.best = -1.0
        if (self.output / "last.pt").exists():
            self._resume()

    def _set_transforms(self, model: nn.Module, train_set: Any) -> None:
        config = self.config
        stats = resolve_model_data_config(model)
        shared = {key: stats[key] for key in ("interpolation", "mean", "std")}
        size = (3, config.img_size, config.img_size)
        train_set.transform = create_transform(
            size,
            is_training=True,
            auto_augment=config.auto_augment,
            re_prob=config.reprob,
            hflip=config.hflip,
            scale=(config.crop_scale, 1.0),
            **shared,
        )
        self.val_set.transform = create_transform(
            size, crop_pct=stats["crop_pct"], crop_mode=stats["crop_mode"], **shared
        )

    def _make_teacher(self, model: nn.Module) -> nn.Module | None:
        config = self.config
        if config.teacher is None:
            return None
        if config.teacher == "self":
            teacher = copy.deepcopy(model)
        else:
            teacher = timm.create_model(
                config.teacher,
                num_classes=len(self.classes),
                pretrained=config.teacher_checkpoint is None,
                checkpoint_path=config.teacher_checkpoint or "",
            )
        return teacher.to(self.device).eval().requires_grad_(False)

    def _make_optimizer(self) -> None:
        config = self.config
        self.optimizer = create_optimizer_v2(
            self.model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay
        )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=config.sched,
            num_epochs=config.epochs,
            warmup_epochs=min(config.warmup_epochs, config.epochs - 1),
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "float16")
        self.ema = None if config.ema_decay is None else ModelEmaV3(self.model, decay=config.ema_decay)
        self.mixup = None
        if config.mixup > 0 or config.cutmix > 0:
            self.mixup = Mixup(
                config.mixup,
                config.cutmix,
                label_smoothing=config.smoothing,
                num_classes=len(self.classes),
            )

    def fit(self, progress: Callable[[int, int, float], None] | None = None) -> list[dict[str, Any]]:
        """Trains to the last epoch.

        Args:
            progress: called with (steps done, steps in all, loss) after every step.

        Returns:
            The history: epoch, loss, lr, and top1, top5 of the held-out images for every epoch.
        """
        total = self.config.epochs * self.steps_per_epoch
        while self.epoch < self.config.epochs:
            self.model.train()
            for images, labels in self._batches():
                loss = self._train_step(images, labels)
                self.step += 1
                if progress is not None:
                    progress(self.epoch * self.steps_per_epoch + self.step, total, loss)
                if self.step % self.config.save_every == 0 and self.step < self.steps_per_epoch:
                    self._save()
            self._end_epoch(loss)
        return self.history

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of this epoch's batches: a permutation of the images, cut into whole batches."""
        config, epoch = self.config, self.epoch
        self.train_set.epoch = epoch
        order = torch.randperm(
            len(self.train_set), generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        ).tolist()
        size = min(config.batch_size, len(order))
        batches = [order[i * size : (i + 1) * size] for i in range(self.steps_per_epoch)]
        yield from DataLoader(
            self.train_set,
            batch_sampler=batches[self.step :],
            num_workers=config.workers,
            pin_memory=self.device.type == "cuda",
        )

    def _train_step(self, images: Tensor, labels: Tensor) -> float:
        config = self.config
        seed_everything(config.seed, self.epoch, len(self.train_set) + self.step)
        images = images.to(self.device, non_blocking=True)
        targets: Tensor = labels.to(self.device, non_blocking=True)
        smoothing = config.smoothing
        if self.mixup is not None and len(images) % 2 == 0:
            images, targets = self.mixup(images, targets)
            smoothing = 0.0  # the mixed targets are smoothed already
        with autocast(self.device, config.amp):
            logits = self.model(images)
            loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher(images)
                imitation = distillation_loss(logits, taught, config.temperature)
                loss = (1 - config.distillation) * loss + config.distillation * imitation
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        updates = self.epoch * self.steps_per_epoch + self.step + 1
        if self.ema is not None:
            self.ema.update(self.model, step=updates)
        self.scheduler.step_update(updates)
        value = float(loss.detach())
        if value != value:
            raise FloatingPointError(f"the loss is NaN at epoch {self.epoch}, step {self.step}")
        return value

    def _end_epoch(self, loss: float) -> None:
        config = self.config
        model = self.model if self.ema is None else self.ema.module
        result = evaluate(
            model,
            self.val_set,
            batch_size=config.batch_size,
            workers=config.workers,
            device=self.device,
            amp=config.amp,
        )
        rate = self.optimizer.param_groups[0]["lr"]
        self.history.append(
            {"epoch": self.epoch, "train_loss": loss, "lr": rate}
            | {key: result[key] for key in ("loss", "top1", "top5")}
        )
        self.epoch, self.step = self.epoch + 1, 0
        if result["top1"] > self.best:
            self.best = result["top1"]
            weights = {"state_dict": model.state_dict(), "config": asdict(config), "classes": self.classes}
            write_atomically(self.output / "best.pt", lambda file: torch.save(weights, file))
        self._save()
        history = json.dumps(self.history, indent=1).encode()
        write_atomically(self.output / "history.json", lambda file: file.write(history))

    def _state(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "history": self.history,
            "classes": self.classes,
            "state_dict": self.model.state_dict(),
            "state_dict_ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def _save(self) -> None:
        write_atomically(self.output / "last.pt", lambda file: torch.save(self._state(), file))

    def _resume(self) -> None:
        path = self.output / "last.pt"
        saved = torch.load(path, map_location=self.device, weights_only=True)
        ours, theirs = asdict(self.config), saved["config"]
        free = ("output", "workers", "device", "save_every")  # may change between the parts of a run
        different = [key for key in ours if key not in free and ours[key] != theirs.get(key)]
        if different:
            changes = ", ".join(f"{key}: {theirs.get(key)} there, {ours[key]} here" for key in different)
            raise ValueError(f"{path} is of a run with another configuration ({changes})")
        self.model.load_state_dict(saved["state_dict"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["state_dict_ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.epoch, self.step = saved["epoch"], saved["step"]
        self.best, self.history = saved["best"], saved["history"]
        self.scheduler.step_update(self.epoch * self.steps_per_epoch + self.step)
