"""What goal 7 of cpu_goals.py measures: the time per token of ever longer maps, and their calls' memory.

What malloc has kept from earlier calls decides both, so each is measured in a process of its own, and the
times twice: with memory that malloc keeps and with what the system gives (see own_process.py).
"""

from __future__ import annotations

import mmap
import resource
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from flatten_ext import attention
from flatten_ext.tools.bench import timing
from flatten_ext.tools.bench.formulas import Inputs, make_inputs
from flatten_ext.tools.bench.shapes import token_ladder
from flatten_ext.tools.bench.stages import MODES, call_of, modes_of

__all__ = ["forward_memory", "time_ladder"]

CPU = torch.device("cpu")


def time_ladder(first: int, last: int, step: int, seconds: float, clock: str) -> dict[str, Any]:
    """Times the maps of token_ladder(first, last, step) on one thread, all sizes in turn.

    They are the leading tokens of one set of inputs.

    Returns:
        By mode: "times" by the shape's name, the page "faults" of a call of the longest map, and "zeroing",
        the nanoseconds a token that the system takes to zero what the call returns.
    """
    timing.use_clock(clock)
    ladder = token_ladder(first, last, step)
    largest = make_inputs(ladder[-1], CPU)
    calls: dict[str, dict[str, Callable[[], object]]] = {mode: {} for mode in MODES}
    for shape in ladder:
        n = shape.tokens
        q, k, v, scale, key_bias, weight, bias = (t.detach() for t in largest.tensors)
        tokens = [q[:, :n], k[:, :n], v[:, :n], scale, key_bias[:n], weight, bias]
        given = Inputs(*(t.requires_grad_() for t in tokens), largest.grad_out[:, :n])
        modes = modes_of(call_of(attention, given, shape), given.tensors, given.grad_out)
        for mode in MODES:
            calls[mode][shape.name] = modes[mode]
    # The output; with a backward the gradients of q, k, v and key_bias beside it.
    width = largest.q.element_size() * largest.q.shape[-1]
    returned = dict(zip(MODES, (width, 5 * width), strict=True))
    found = {}
    with timing.threads(1):
        # A heap that is kept still grows now and then, where no hole is quite as large as an aligned block
        # and its header: room for three results at once makes that rare.
        longest = calls[MODES[1]][ladder[-1].name]
        held = [longest() for _ in range(3)]
        del held
        for mode in MODES:
            times = timing.in_turn(calls[mode], CPU, seconds)
            found[mode] = {
                "times": {name: ms.as_dict() for name, ms in times.items()},
                "faults": _faults(calls[mode][ladder[-1].name]),
                "zeroing": _zeroing(min(1 << 18, ladder[-1].tokens), returned[mode], clock),
            }
    return found


def _faults(call: Callable[[], object], repeats: int = 5) -> int:
    """Page faults of one call, the median of several."""
    found = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return statistics.median_low(found)


def _zeroing(tokens: int, width: int, clock: str, repeats: int = 5) -> float:
    """What the pages of a new block of `width` bytes a token cost when first touched, nanoseconds a token."""
    now = timing.CLOCKS[clock]
    extra = []
    for _ in range(repeats):
        pages = mmap.mmap(-1, tokens * width, flags=mmap.MAP_PRIVATE)
        with suppress(AttributeError, OSError):  # where there are such pages, the operator asks for them too
            pages.madvise(mmap.MADV_HUGEPAGE)
        # One element a page: a fill of all would find just zeroed lines in the caches, and seem to cost less.
        touched = torch.frombuffer(pages, dtype=torch.float32)[:: mmap.PAGESIZE // 4]
        started = now()
        touched.fill_(1)
        between = now()
        touched.fill_(2)
        extra.append((between - started) - (now() - between))
    return 1e9 * statistics.median(extra) / tokens


def forward_memory(first: int, last: int, step: int) -> int:
    """The most bytes by which this process grows in a forward call beyond its output; for a new process."""

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    torch.set_num_threads(1)
    weight, scale, most = torch.ones(32, 1, 5, 5), torch.ones(64), 0
    ladder = token_ladder(first, last, step)
    for shape in ladder:
        tokens = [torch.ones(1, shape.tokens, 64) for _ in range(3)]
        arguments = (*tokens, 2, scale, None, weight, None, shape.size)
        if shape is ladder[0]:  # what the first call of a process sets up
            attention(*arguments)
        before = peak()
        out = attention(*arguments)
        most = max(most, peak() - before - out.nbytes)
        del tokens, arguments, out
    return most
