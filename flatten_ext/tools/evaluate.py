"""Top-1 and top-5 accuracy with timm's data pipeline, resumable."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from flatten_ext.errors import InputError
from flatten_ext.output import write_atomically as write_atomically  # flatten_ext.evaluate had it
from flatten_ext.output import write_text
from flatten_ext.tools import fingerprint
from flatten_ext.tools.recipe import Amp

__all__ = ["autocast", "evaluate"]

_COUNTS = ("seen", "top1", "top5", "loss")


def autocast(device: torch.device, amp: str | None) -> Any:
    """The autocast context of `amp`: "bfloat16", "float16", or None (or "none") for full precision."""
    dtype = Amp.of(amp).dtype
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


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
    finish: Callable[[dict[str, Any]], None] | None = None,
    refuse_nan: bool = True,
) -> dict[str, Any]:
    """Classifies every image of `dataset`, in order.

    Args:
        model: (B, 3, H, W) -> (B, classes).
        dataset: transformed images and labels.
        amp: "bfloat16" or "float16" to compute under autocast.
        state: where to keep the running counts, every `save_every` batches and at the end; an evaluation that
            was cut off goes on from there, if the model's weights, the data set's length and `identity` are
            the same. Removed when `finish` has returned.
        identity: any JSON value that tells one evaluation from another.
        progress: called with (images done, images in all) after every batch.
        finish: called with the result, to keep it, before the state goes.
        refuse_nan: NaN among the model's outputs, whose order means nothing, is an error.

    Returns:
        images, top1 and top5 (percent), loss (mean cross entropy).

    Raises:
        ValueError: the data set is empty, `state` is a file of something else, or the model gives NaN.
    """
    device = torch.device(device)
    Amp.of(amp)
    total = len(dataset)  # type: ignore[arg-type]
    if total == 0:
        raise InputError("the data set is empty")
    counts: dict[str, Any] = dict.fromkeys(_COUNTS, 0)
    if state is not None:
        identity = fingerprint.of_json([identity, total, fingerprint.of_model(model)])
        counts = _read_state(state, identity) or counts
    model = model.to(device).eval()

    def save() -> None:
        if state is not None:
            write_text(state, json.dumps({"identity": identity, "counts": counts}))

    rest = Subset(dataset, range(counts["seen"], total))
    loader = DataLoader(rest, batch_size, num_workers=workers, pin_memory=device.type == "cuda")
    for batch, (images, labels) in enumerate(loader, 1):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast(device, amp):
            logits = model(images)
        logits = logits.float()
        if refuse_nan and logits.isnan().any():
            first, last = counts["seen"], counts["seen"] + len(labels) - 1
            raise InputError(f"the model gives NaN for some of the images {first} to {last}")
        top = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        counts["seen"] += len(labels)
        counts["top1"] += int(top[:, 0].sum())
        counts["top5"] += int(top.sum())
        counts["loss"] += float(F.cross_entropy(logits, labels, reduction="sum"))
        if batch % save_every == 0:
            save()
        if progress is not None:
            progress(counts["seen"], total)
    result = {
        "images": total,
        "top1": 100 * counts["top1"] / total,
        "top5": 100 * counts["top5"] / total,
        "loss": counts["loss"] / total,
    }
    if finish is not None:
        save()
        finish(result)
    if state is not None:
        state.unlink(missing_ok=True)
    return result


def _read_state(path: Path, identity: Any) -> dict[str, Any] | None:
    """The counts of an evaluation that was cut off; None where there is none, or one of something else."""
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        counts = {key: saved["counts"][key] + 0 for key in _COUNTS}
        return counts if saved["identity"] == identity else None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the state of an evaluation; remove it to begin anew") from error
