"""Training and fine-tuning on timm's recipes, with exact resumption.

Everything random in a step (augmentation, mixing, dropout) is seeded by (seed, epoch, step) alone, so a
checkpoint needs no generator states, and a run that was killed at any moment ends in the same weights as one
that was not. The processes that torchrun starts train one model together (DistributedDataParallel): the
images of every step are divided into equal parts, `accumulate` for each process, which are augmented, mixed
and seeded by themselves. So the weights depend on the number of parts, and not on who computes them.
"""

from __future__ import annotations

import copy
import itertools
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from flatten_ext.errors import InputError, blamed_on, one_line
from flatten_ext.models.convert import convert
from flatten_ext.output import remove_unfinished, try_folder, write_text, write_torch
from flatten_ext.tools import fingerprint, networks
from flatten_ext.tools.data import Replayable, open_dataset, seed_everything
from flatten_ext.tools.devices import find_device
from flatten_ext.tools.evaluate import autocast, evaluate
from flatten_ext.tools.lock import FolderLock
from flatten_ext.tools.processes import Processes
from flatten_ext.tools.recipe import TrainConfig

__all__ = ["TrainConfig", "Trainer", "distillation_loss"]

_FILES = ("last.pt", "best.pt", "history.json")


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Soft distillation: KL divergence at `temperature`, scaled by its square (Hinton et al., 2015)."""
    student, teacher = (F.log_softmax(x.float() / temperature, -1) for x in (student, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class Trainer:
    """Builds what `config` names and trains it; goes on from `output`/last.pt where there is one.

    The folder is its own until `fit` returns, or `close` is called.

    Raises:
        InputError: something that `config` names cannot be used; last.pt is of a run with another
            configuration or other images; or another process trains in this folder. It names which.
    """

    def __init__(self, config: TrainConfig):
        self.config, self.processes = config, Processes(config.device)
        self.device = find_device(self.processes.own_device(config.device))
        self.output = Path(config.output)
        self._lock: FolderLock | None = None
        try:
            if self.processes.first:
                try_folder(self.output, *_FILES)
                self._lock = FolderLock(self.output)
                remove_unfinished(*(self.output / name for name in _FILES))
            self._build()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets another run have the folder."""
        if self._lock is not None:
            self._lock.release()
        self.processes.leave()

    def _build(self) -> None:
        config = self.config
        self.parts = self.processes.count * config.accumulate
        seed_everything(config.seed)
        train_set, self.val_set = open_dataset(config.data, True), open_dataset(config.data, False)
        self.classes = list(train_set.classes)
        parts = {"train": train_set, "held out": self.val_set}
        self.images = {part: fingerprint.of_images(images) for part, images in parts.items()}
        model = networks.build(config.model, num_classes=len(self.classes), **config.model_args)
        self._set_transforms(model, train_set)
        self.train_set = Replayable(train_set, config.seed)
        if config.checkpoint:
            networks.load(model, config.checkpoint, new_classifier=True, grid=config.grid)
        self.teacher = self._make_teacher(model)
        if config.convert:
            with blamed_on(f"convert {config.convert!r} of {config.model}", ValueError, TypeError):
                convert(model, config.convert, img_size=config.img_size)
        self.model = model.to(self.device)
        self._divide()
        self._make_optimizer()
        self.epoch = self.step = 0  # step counts within the epoch
        self.history: list[dict[str, Any]] = []
        self.best = -1.0
        size = (3, config.img_size, config.img_size)
        networks.try_forward(self.model, size, f"img_size {config.img_size}: model {config.model}")
        if self.teacher is not None:
            networks.try_forward(self.teacher, size, f"img_size {config.img_size}: teacher {config.teacher}")
        if (self.output / "last.pt").exists():
            self._resume()
        places = self.processes.all_of((self.epoch, self.step))
        if len(set(places)) > 1:
            raise InputError(
                f"output {self.output} is not the same folder for all processes: by its last.pt they stand "
                f"at (epoch, step) {', '.join(map(str, places))}"
            )
        self.parallel = self.processes.parallel(self.model, self.device)

    def _divide(self) -> None:
        """How many steps an epoch has, and how many images one part of a step."""
        images, size = len(self.train_set), self.config.batch_size
        self.part = min(size, images) // self.parts
        if self.part == 0 or size % self.parts:
            raise InputError(
                f"batch_size is {size} (of {images} images), expected a multiple of {self.parts}: "
                f"{self.processes.count} processes take {self.config.accumulate} parts each"
            )
        self.steps_per_epoch = max(images // size, 1)

    def _set_transforms(self, model: nn.Module, train_set: Any) -> None:
        config = self.config
        stats = resolve_model_data_config(model)
        shared = {key: stats[key] for key in ("interpolation", "mean", "std")}
        size = (3, config.img_size, config.img_size)
        with blamed_on(f"auto_augment {config.auto_augment!r} is no policy of timm's"):
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
            pretrained = config.teacher_checkpoint is None
            teacher = networks.build(
                config.teacher, "teacher", num_classes=len(self.classes), pretrained=pretrained
            )
            if config.teacher_checkpoint is not None:
                networks.load(teacher, config.teacher_checkpoint)
        return teacher.to(self.device).eval().requires_grad_(False)

    def _make_optimizer(self) -> None:
        config = self.config
        with blamed_on(f"opt {config.opt!r}"):
            self.optimizer = create_optimizer_v2(
                self.model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay
            )
        with blamed_on(f"sched {config.sched!r}"):
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
        """Trains to the last epoch, and lets another run have the folder.

        Args:
            progress: called with (steps done, steps in all, loss) after every step.

        Returns:
            The history: epoch, loss, lr, and top1, top5 of the held-out images for every epoch.
        """
        try:
            total = self.config.epochs * self.steps_per_epoch
            while self.epoch < self.config.epochs:
                self.model.train()
                for parts in self._steps():
                    loss = self._train_step(parts)
                    self.step += 1
                    if progress is not None:
                        progress(self.epoch * self.steps_per_epoch + self.step, total, loss)
                    if self.step % self.config.save_every == 0 and self.step < self.steps_per_epoch:
                        self._save()
                self._end_epoch(loss)
        finally:
            self.close()
        return self.history

    def _steps(self) -> Iterator[Iterable[tuple[Tensor, Tensor]]]:
        """The rest of this epoch's steps, of each the parts that are this process's. The epoch is a
        permutation of the images, cut into whole steps."""
        config, epoch = self.config, self.epoch
        self.train_set.epoch = epoch
        order = torch.randperm(
            len(self.train_set), generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        ).tolist()
        first = self.processes.rank * config.accumulate
        parts = [
            order[(step * self.parts + part) * self.part :][: self.part]
            for step in range(self.step, self.steps_per_epoch)
            for part in range(first, first + config.accumulate)
        ]
        loader = iter(
            DataLoader(
                self.train_set,
                batch_sampler=parts,
                num_workers=config.workers,
                pin_memory=self.device.type == "cuda",
            )
        )
        for _ in range(self.step, self.steps_per_epoch):
            yield itertools.islice(loader, config.accumulate)

    def _train_step(self, parts: Iterable[tuple[Tensor, Tensor]]) -> float:
        config, losses = self.config, 0.0
        self.optimizer.zero_grad()
        for number, (images, labels) in enumerate(parts, 1):
            with self.processes.apart(self.parallel, number < config.accumulate):
                part = self.processes.rank * config.accumulate + number - 1
                loss = self._loss(images, labels, part) / config.accumulate
                self.scaler.scale(loss).backward()
            losses += float(loss.detach())
        if config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        updates = self.epoch * self.steps_per_epoch + self.step + 1
        if self.ema is not None:
            self.ema.update(self.model, step=updates)
        self.scheduler.step_update(updates)
        if losses != losses:
            raise FloatingPointError(f"the loss is NaN at epoch {self.epoch}, step {self.step}")
        return losses

    def _loss(self, images: Tensor, labels: Tensor, part: int) -> Tensor:
        config = self.config
        key = (config.seed, self.epoch, len(self.train_set) + self.step)
        seed_everything(*key, *((part,) if self.parts > 1 else ()))
        images = images.to(self.device, non_blocking=True)
        targets: Tensor = labels.to(self.device, non_blocking=True)
        smoothing = config.smoothing
        if self.mixup is not None and len(images) % 2 == 0:
            images, targets = self.mixup(images, targets)
            smoothing = 0.0  # the mixed targets are smoothed already
        with autocast(self.device, config.amp):
            logits = self.parallel(images)
            loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher(images)
                imitation = distillation_loss(logits, taught, config.temperature)
                loss = (1 - config.distillation) * loss + config.distillation * imitation
        return loss

    def _end_epoch(self, loss: float) -> None:
        config = self.config
        model = self.model if self.ema is None else self.ema.module
        (loss,) = self.processes.sums((loss / self.processes.count,), self.device)
        result = self._evaluate(model)
        rate = self.optimizer.param_groups[0]["lr"]
        self.history.append({"epoch": self.epoch, "train_loss": loss, "lr": rate} | result)
        self.epoch, self.step = self.epoch + 1, 0
        if result["top1"] > self.best:
            self.best = result["top1"]
            weights = {"state_dict": model.state_dict(), "config": asdict(config), "classes": self.classes}
            if self.processes.first:
                write_torch(self.output / "best.pt", weights)
        self._save()
        if self.processes.first:
            self._write_history()

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss, top1 and top5 of the held-out images, of which each process takes its share."""
        config, processes = self.config, self.processes
        own = range(processes.rank, len(self.val_set), processes.count)
        keys, result = ("loss", "top1", "top5"), {}
        if len(own):
            result = evaluate(
                model,
                self.val_set if processes.count == 1 else Subset(self.val_set, own),
                batch_size=config.batch_size,
                workers=config.workers,
                device=self.device,
                amp=config.amp,
            )
        if processes.count == 1:
            return {key: result[key] for key in keys}
        sums = processes.sums([result.get(key, 0.0) * len(own) for key in keys], self.device)
        means = dict(zip(keys, (total / len(self.val_set) for total in sums), strict=True))
        # Percentages of a whole number of images, free of the rounding of their parts.
        for key in ("top1", "top5"):
            means[key] = 100 * round(means[key] * len(self.val_set) / 100) / len(self.val_set)
        return means

    def _write_history(self) -> None:
        write_text(self.output / "history.json", json.dumps(self.history, indent=1) + "\n")

    def _state(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "history": self.history,
            "classes": self.classes,
            "images": self.images,
            "parts": self.parts,
            "state_dict": self.model.state_dict(),
            "state_dict_ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def _save(self) -> None:
        if self.processes.first:
            write_torch(self.output / "last.pt", self._state())

    def _read(self, path: Path) -> dict[str, Any]:
        """last.pt, whole and undamaged."""
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not check the sums
                damaged = archive.testzip()
            saved = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # whatever a damaged or foreign file makes unpickling raise
            raise InputError(
                f"{path} is damaged, or no checkpoint of this program ({type(error).__name__}): move it away "
                "to begin anew"
            ) from error
        if damaged is not None:
            raise InputError(f"{path} is damaged (in {damaged}): move it away to begin anew")
        expected = set(self._state()) - {"images", "parts"}  # which version 0.1 did not keep
        missing = sorted(key for key in expected if not isinstance(saved, dict) or key not in saved)
        if missing:
            raise InputError(f"{path} is no checkpoint of this program: it has no {', '.join(missing)}")
        return saved

    def _resume(self) -> None:
        path = self.output / "last.pt"
        saved = self._read(path)
        ours, theirs = asdict(self.config), saved["config"]
        # May change between the parts of a run; who computes a step's parts, but not how many they are.
        free = ("output", "workers", "device", "save_every", "accumulate")
        different = [key for key in ours if key not in free and ours[key] != theirs.get(key)]
        if different:
            changes = ", ".join(f"{key}: {theirs.get(key)} there, {ours[key]} here" for key in different)
            raise InputError(f"{path} is of a run with another configuration ({changes})")
        if (parts := saved.get("parts", 1)) != self.parts:
            raise InputError(
                f"{path} is of a run whose steps have {parts} parts, here {self.parts}: processes * "
                "accumulate has to stay"
            )
        if saved["classes"] != self.classes:
            before, now = saved["classes"], self.classes
            named = [f"{a} there, {b} here" for a, b in zip(before, now, strict=False) if a != b]
            counts = [f"{len(before)} classes there, {len(now)} here"] * (len(before) != len(now))
            raise InputError(f"{path} is of a run with other classes ({', '.join(counts + named[:5])})")
        for part, images in self.images.items():
            if changes := fingerprint.differing_classes(saved.get("images", self.images)[part], images):
                raise InputError(f"{path} is of a run with other images ({part}: {changes})")
        try:
            self.model.load_state_dict(saved["state_dict"])
            if self.ema is not None:
                self.ema.module.load_state_dict(saved["state_dict_ema"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} does not fit the model of this run: {one_line(error)}") from error
        self.epoch, self.step = saved["epoch"], saved["step"]
        self.best, self.history = saved["best"], saved["history"]
        self.scheduler.step_update(self.epoch * self.steps_per_epoch + self.step)
        history = self.output / "history.json"
        # A run that was killed between its two files has one epoch more in last.pt.
        written = None
        with suppress(OSError, ValueError):
            written = json.loads(history.read_text(encoding="utf-8"))
        if self.processes.first and self.history and written != self.history:
            self._write_history()
