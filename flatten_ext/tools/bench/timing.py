"""Fair timings: everything in one process, contenders in turn, medians.

Fresh processes differ by more than contenders do (page faults of new buffers alone move an eager baseline by
up to 3x), and a machine's speed drifts; so contenders take turns, in an order that rotates, and are compared
by the medians of those turns.

A turn is a visit: untimed calls, then timed ones, whose mean counts. Behind a large matrix product, a softmax
or a pause, a call of a small shape takes 1.3 to 1.6 times its steady time, the second still 1.1 to 1.3 times,
and only the third to fifth is steady: branch predictors, TLB and second-level cache held what ran before.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = [
    "CLOCKS",
    "Timing",
    "copy_bandwidth",
    "in_turn",
    "mm_call",
    "mm_rate",
    "peak_memory",
    "settle_allocator",
    "synchronize",
    "threads",
    "use_clock",
    "visits",
]


# What a visit takes, in seconds: calls that bring a contender's code and data back, then those that count.
UNTIMED_SECONDS = 0.01
TIMED_SECONDS = 0.03
# A call longer than this, in milliseconds, gets no untimed one: nothing of it would be left in the caches.
LONG_CALL_MS = 100


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median of `rounds` visits and the quartiles around it."""

    median: float
    low: float
    high: float
    rounds: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def synchronize(device: torch.device) -> None:
    """Waits for the device's queued work; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs the block with `count` threads within operators."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Seconds by the wall, or the processor time of this process: with one thread the two differ only by what
# other programs took, so the second is the one to use on a machine that is busy with other work.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}

_clock = CLOCKS["wall"]


def use_clock(name: str) -> None:
    """Selects the clock of all timings: "wall" or "cpu"."""
    global _clock
    _clock = CLOCKS[name]


def _mean(call: Callable[[], object], device: torch.device, count: int) -> float:
    """Milliseconds of one of `count` calls in a row."""
    synchronize(device)
    started = _clock()
    for _ in range(count):
        call()
    synchronize(device)
    return 1e3 * (_clock() - started) / count


def settle_allocator() -> None:
    """Brings glibc's malloc into the state of a process that has handled large tensors.

    glibc maps blocks above a threshold afresh from the system, which zeroes their pages and takes a fault for
    each: 128 KiB at first, then the size of the largest mapped block freed so far, at most 32 MiB. Twice the
    threshold is kept at the end of the heap, what lies free beyond goes back. So the same call takes no page
    faults or 1500 (0.65 us each), by what ran before it in the process. Elsewhere this does nothing.
    """
    just_below = (32 << 20) - (64 << 10)  # with its header, and aligned
    # The heap may have room for one or two of them, which then say nothing; the pages are never touched.
    held = [torch.empty(just_below, dtype=torch.uint8) for _ in range(3)]
    del held


def _calls_in(seconds: float, ms: float) -> int:
    """How many calls of `ms` milliseconds take about `seconds`; at least one."""
    return max(1, round(1e3 * seconds / max(ms, 1e-4)))


def visits(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float = 1.0,
    rounds: int = 40,
    at_least: int = 5,
    give_up_ms: float = 4000,
    prepare: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Times every call in rounds of one visit each (see the module).

    Args:
        calls: what to time, by name.
        device: where they run.
        seconds: time to spend on each call, on average; a visit of short calls takes a tenth of it at most.
        rounds, at_least: bounds on the number of rounds.
        give_up_ms: a call whose first run takes longer is timed on that run alone.
        prepare: called with the name before every visit, and not timed.

    Returns:
        By name the milliseconds of a call in each round.
    """
    if device.type == "cpu":
        settle_allocator()
    first: dict[str, float] = {}
    for name, call in calls.items():
        prepare(name)
        call()  # compiles, packs weights, faults pages in
        first[name] = _mean(call, device, 1)
    racing = [name for name in calls if first[name] <= give_up_ms]
    scale = min(1.0, seconds / 10 / (UNTIMED_SECONDS + TIMED_SECONDS))
    steady = dict(first)  # the shortest time seen so far: the first is rarely that
    samples: dict[str, list[float]] = {name: [] for name in racing}
    started = time.perf_counter()
    for turn in range(rounds):
        if turn >= at_least and time.perf_counter() - started > seconds * max(1, len(racing)):
            break
        for i in range(len(racing)):
            name = racing[(turn + i) % len(racing)]
            prepare(name)
            if steady[name] <= LONG_CALL_MS:
                for _ in range(_calls_in(scale * UNTIMED_SECONDS, steady[name])):
                    calls[name]()
            samples[name].append(_mean(calls[name], device, _calls_in(scale * TIMED_SECONDS, steady[name])))
            steady[name] = min(steady[name], samples[name][-1])
    return {name: samples.get(name) or [first[name]] for name in calls}


def in_turn(
    calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float = 1.0, **options: Any
) -> dict[str, Timing]:
    """The medians of `visits`, whose arguments it takes, and the quartiles around them."""
    timings = {}
    for name, times in visits(calls, device, seconds, **options).items():
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
        timings[name] = Timing(statistics.median(times), low, high, len(times))
    return timings


def mm_call(device: torch.device, n: int = 2048) -> Callable[[], torch.Tensor]:
    """A float32 torch.mm of n x n matrices into memory of its own."""
    a, b = torch.rand(2, n, n, device=device)
    out = torch.empty(n, n, device=device)
    return lambda: torch.mm(a, b, out=out)


def mm_rate(device: torch.device, n: int = 2048, repeats: int = 5) -> float:
    """The best rate, in GFLOP/s, of mm_call: the yardstick for arithmetic."""
    call = mm_call(device, n)
    call()
    best = min(_mean(call, device, 1) for _ in range(repeats))
    return 2 * n**3 / best / 1e6


def copy_bandwidth(device: torch.device, megabytes: int = 256, repeats: int = 7) -> float:
    """The best rate, in GB/s read plus written, of a copy too large for the caches."""
    a = torch.zeros(megabytes << 18, device=device)
    b = torch.ones_like(a)
    best = min(_mean(lambda: b.copy_(a), device, 1) for _ in range(repeats))
    return 2 * a.nbytes / best / 1e6


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that `call` holds at its peak beyond what was held before, as torch's allocator counts them."""
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.autograd import DeviceType

    # Read when the profiler first starts; without it every start and stop is a line on the terminal.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak
