"""Top-1 and top-5 accuracy with timm's data pipeline, resumable."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

__all__ = ["autocast", "evaluate", "write_atomically"]


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Writes a file that is, at every moment, either the old one or the new one, whole.

    Args:
        path: the file.
        write: is given the binary file to write to.
    """
    unfinished = path.with_name(f"{path.name}.partial")
    with open(unfinished, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must survive a power cut too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def autocast(device: torch.device, amp: str | None) -> Any:
    """The autocast context of `amp`: "bfloat16", "float16" or None."""
    if amp is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, amp))


def _write(content: bytes, file: Any) -> None:
    file.write(content)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int = 64,
    workers: int = 4,
    device: torch.device | str = "cpu",
    amp: str | None = None,
    state: Path | None = None,
    identity: Any = None,
    progress: Callable[[int, int], None] | None = None,
    save_every: int = 20,
) -> dict[str, Any]:
    """Classifies every image of `dataset`, in order.

    Args:
        model: (B, 3, H, W) -> (B, classes).
        dataset: transformed images and labels.
        amp: "bfloat16" or "float16" to compute under autocast.
        state: where to keep the running counts, every `save_every` batches; an evaluation that was cut off
            goes on from there, if its `identity` (any JSON value) and the data set's length are the same.
            Removed at the end.
        progress: called with (images done, images in all) after every batch.

    Returns:
        images, top1 and top5 (percent), loss (mean cross entropy).
    """
    device = torch.device(device)
    model = model.to(device).eval()
    total = len(dataset)  # type: ignore[arg-type]
    counts: dict[str, Any] = {"seen": 0, "top1": 0, "top5": 0, "loss": 0.0}
    identity = json.loads(json.dumps([identity, total]))
    if state is not None and state.exists():
        saved = json.loads(state.read_text())
        if saved["identity"] == identity:
            counts = saved["counts"]
    if total == 0:
        raise ValueError("the data set is empty")
    rest = Subset(dataset, range(counts["seen"], total))
    loader = DataLoader(rest, batch_size, num_workers=workers, pin_memory=device.type == "cuda")
    for batch, (images, labels) in enumerate(loader, 1):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast(device, amp):
            logits = model(images)
        logits = logits.float()
        top = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        counts["seen"] += len(labels)
        counts["top1"] += int(top[:, 0].sum())
        counts["top5"] += int(top.sum())
        counts["loss"] += float(F.cross_entropy(logits, labels, reduction="sum"))
        if state is not None and batch % save_every == 0:
            content = json.dumps({"identity": identity, "counts": counts}).encode()
            write_atomically(state, partial(_write, content))
        if progress is not None:
            progress(counts["seen"], total)
    if state is not None:
        state.unlink(missing_ok=True)
    return {
        "images": total,
        "top1": 100 * counts["top1"] / total,
        "top5": 100 * counts["top5"] / total,
        "loss": counts["loss"] / total,
    }
