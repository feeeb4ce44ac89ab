"""Many short trainings, one file each, so that they can be stopped and resumed."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flatten_ext.errors import InputError
from flatten_ext.output import remove_unfinished, write_json

__all__ = ["Run", "Task", "collect", "pending", "tasks", "train_all"]


@dataclass(frozen=True)
class Task:
    """One training: which model (or problem), which attention, which seed."""

    model: str
    variant: str
    seed: int

    def path(self, folder: Path) -> Path:
        name = f"{self.model} {self.variant} {self.seed}".replace("=", "").replace("+", "and")
        return folder / ("-".join(name.split()) + ".json")


# (task, budget) -> its JSON-ready result, which has the budget as `budget`; a function of a module.
Run = Callable[[Task, Any], dict[str, Any]]


def tasks(seeds: int, models: Iterable[str], variants: Iterable[str]) -> list[Task]:
    """All of them, a whole seed of a model at a time: what is interrupted leaves complete seeds."""
    variants = list(variants)
    return [Task(model, variant, seed) for model in models for seed in range(seeds) for variant in variants]


def _finished(task: Task, folder: Path, budget: Any) -> dict[str, Any] | None:
    path = task.path(folder)
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return result if result["budget"] == json.loads(json.dumps(asdict(budget))) else None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the result of a training; remove it to train anew") from error


def _work(run: Run, task: Task, folder: Path, budget: Any) -> dict[str, Any]:
    torch.set_num_threads(1)  # tasks run side by side; threads of small operators only wait for each other
    result = run(task, budget)
    write_json(task.path(folder), result)
    return result


def pending(todo: Sequence[Task], folder: Path, budget: Any) -> list[Task]:
    """The tasks that have no result with this budget yet."""
    return [task for task in todo if _finished(task, folder, budget) is None]


def train_all(
    run: Run,
    todo: Sequence[Task],
    folder: Path,
    budget: Any,
    jobs: int,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Runs the tasks in `jobs` processes of one thread each; `report` is called with every result."""
    remove_unfinished(*(task.path(folder) for task in todo))
    # Fresh processes: a forked copy of torch's thread pool can hang.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_work, run, task, folder, budget) for task in todo]
        try:
            for future in as_completed(futures):
                report(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def collect(todo: Sequence[Task], folder: Path, budget: Any) -> list[dict[str, Any]]:
    """The results there are."""
    return [result for task in todo if (result := _finished(task, folder, budget)) is not None]
