"""What goal 5 of cpu_goals.py measures: every shape's calls on one thread and on two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flatten_ext import attention
from flatten_ext.tools.bench import timing
from flatten_ext.tools.bench.formulas import make_inputs
from flatten_ext.tools.bench.shapes import Shape
from flatten_ext.tools.bench.stages import MODES, call_of, modes_of

__all__ = ["time_threads"]

CPU = torch.device("cpu")


def time_threads(
    shapes: list[dict[str, Any]], seconds: float, clock: str, mm_size: int
) -> dict[str, list[dict[str, float]]]:
    """Times everything in one round of turns, so that a burst of a neighbour's work is not one shape's.

    Args:
        shapes: the fields of each Shape.
        seconds, clock: see timing.in_turn and use_clock.
        mm_size: of the torch.mm that takes its turns too: what a second thread is worth on this machine just
            now, to code that hardly needs memory.

    Returns:
        For "SHAPE, MODE" and "mm" the timings with one thread and with two.
    """
    timing.use_clock(clock)
    calls: dict[str, Callable[[], object]] = {}
    for fields in shapes:
        shape = Shape(**fields | {"size": tuple(fields["size"])})
        inputs = make_inputs(shape, CPU)
        modes = modes_of(call_of(attention, inputs, shape), inputs.tensors, inputs.grad_out)
        calls |= {f"{shape.name}, {mode}": modes[mode] for mode in MODES}
    calls["mm"] = timing.mm_call(CPU, mm_size)
    threads = {f"{name}, {count}": count for name in calls for count in (1, 2)}
    in_turns = {name: calls[name.rpartition(", ")[0]] for name in threads}
    with timing.threads(1):
        times = timing.in_turn(
            in_turns, CPU, seconds, prepare=lambda name: torch.set_num_threads(threads[name])
        )
    return {name: [times[f"{name}, {count}"].as_dict() for count in (1, 2)] for name in calls}
