"""One training run on a fixed budget; the same recipe for every model.

The demo and the ablation do not train by `tools.train.Trainer`: they need torch alone, without timm, report
every step's time and the accuracy several times an epoch, and leave no files. What is in
benchmarks/results came of this recipe's own random draws.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from flatten_ext.tools.evaluate import evaluate
from flatten_ext.tools.micro.descent import descend, learning_rate
from flatten_ext.tools.micro.images import Images

__all__ = ["Budget", "Progress", "total_steps", "train"]


@dataclass(frozen=True)
class Budget:
    """How long to train, and how: AdamW, linear warm-up, cosine decay, label smoothing, random shifts."""

    epochs: int = 6
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.2  # of all steps
    label_smoothing: float = 0.1
    clip_norm: float = 5.0
    roll: int = 2  # pixels, each way
    evaluations: int = 12
    train_images: int | None = None  # None: all
    test_images: int | None = None


@dataclass(frozen=True)
class Progress:
    """What a run reports after a step; `accuracy` (on the test images, 0..1) at the evaluations only."""

    step: int
    steps: int
    loss: float
    step_ms: float
    accuracy: float | None


def total_steps(images: Images, budget: Budget) -> int:
    """Steps of a run: whole batches only."""
    return budget.epochs * (len(images.train[: budget.train_images]) // budget.batch_size)


def _shifted(batch: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Every image rolled by up to `reach` pixels each way (the borders are empty)."""
    dy, dx = torch.randint(-reach, reach + 1, (2, len(batch)), generator=generator)
    h, w = batch.shape[-2:]
    rows = (torch.arange(h) - dy[:, None]) % h
    columns = (torch.arange(w) - dx[:, None]) % w
    return batch[torch.arange(len(batch))[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices and kernels decay; biases, norms, positions and scales do not."""
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


def train(model: nn.Module, images: Images, budget: Budget, seed: int) -> Iterator[Progress]:
    """Trains `model` in place and yields after each step; `seed` fixes the order and shifts of the images."""
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = images.train[: budget.train_images], images.train_labels[: budget.train_images]
    held_out = TensorDataset(images.test[: budget.test_images], images.test_labels[: budget.test_images])
    steps = total_steps(images, budget)
    marks = {round(steps * (i + 1) / budget.evaluations) for i in range(budget.evaluations)} - {0}
    groups = _parameter_groups(model, budget.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=budget.learning_rate, fused=True)
    model.train()
    step = 0
    for _ in range(budget.epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for batch in order.split(budget.batch_size):
            if len(batch) < budget.batch_size:
                continue
            started = time.perf_counter()
            logits = model(_shifted(inputs[batch], budget.roll, generator))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=budget.label_smoothing)
            rate = learning_rate(step, steps, budget.learning_rate, budget.warmup)
            descend(model, loss, optimizer, rate, budget.clip_norm)
            step_ms = 1e3 * (time.perf_counter() - started)
            step += 1
            reached = None
            if step in marks:
                reached = evaluate(model, held_out, batch_size=500, workers=0, refuse_nan=False)["top1"] / 100
                model.train()
            yield Progress(step, steps, float(loss.detach()), step_ms, reached)
