"""How contenders are timed: whose turn it is, what a visit is, what memory is kept between calls."""

from __future__ import annotations

import itertools
import platform
import subprocess
import sys

import pytest
import torch

from flatten_ext.tools.bench import timing

CPU = torch.device("cpu")


class FakeClock:
    """Time that passes only in the calls made here, and what they and `prepare` were."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(timing, "_clock", lambda: self.now)

    def call(self, name, *ms):
        """A call of the given milliseconds, the last of them from then on."""
        durations = [*ms[:0:-1]]

        def run():
            self.log.append(name)
            self.now += (durations.pop() if durations else ms[0]) / 1e3

        return run

    def visits(self):
        """How often each contender was called in a row: [(name, count), ...]."""
        return [(name, len(list(group))) for name, group in itertools.groupby(self.log)]


def test_turns_rotate_and_slow_calls_run_once(monkeypatch):
    clock = FakeClock(monkeypatch)
    calls = {name: clock.call(name, 1) for name in "abc"}
    times = timing.in_turn(calls, CPU, seconds=0, at_least=3)
    # The first run and the one timed after it; then visits of an untimed and a timed call.
    assert "".join(clock.log) == "aabbcc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert {t.rounds for t in times.values()} == {3}
    clock.log.clear()
    times = timing.in_turn(calls, CPU, give_up_ms=0.5)
    assert "".join(clock.log) == "aabbcc"
    assert {t.rounds for t in times.values()} == {1}


def test_a_visit_lasts_as_long_whatever_a_call_takes(monkeypatch):
    clock = FakeClock(monkeypatch)
    calls = {"fast": clock.call("fast", 1), "slow": clock.call("slow", 101)}
    calls["other"] = clock.call("other", 60)
    timing.in_turn(calls, CPU, seconds=1, rounds=2)
    per_visit = {"fast": 10 + 30, "slow": 1, "other": 1 + 1}
    order = ["fast", "slow", "other", "slow", "other", "fast"]
    expected = [("fast", 2), ("slow", 2), ("other", 2), *((name, per_visit[name]) for name in order)]
    assert clock.visits() == expected
    clock.log.clear()
    timing.in_turn(calls, CPU, seconds=0.08, rounds=1, at_least=1)  # 8 ms a visit
    assert clock.visits()[3:] == [("fast", 2 + 6), ("slow", 1), ("other", 2)]


def test_a_sample_is_the_mean_of_the_timed_calls(monkeypatch):
    clock = FakeClock(monkeypatch)
    # 10 ms before and when first timed: 1 + 3 calls; the untimed one takes 50 ms, the timed ones 10, 4 and 7.
    call = clock.call("a", 7, 10, 10, 50, 10, 4)
    (ms,) = timing.in_turn({"a": call}, CPU, rounds=1).values()
    assert (ms.median, ms.rounds) == (pytest.approx(7), 1)
    assert len(clock.log) == 6
    # The visits that follow count by the shortest time seen: 7 ms.
    clock.log.clear()
    timing.in_turn({"a": clock.call("a", 7, 7, 10)}, CPU, rounds=2)
    assert len(clock.log) == 2 + (1 + 3) + (1 + 4)


def test_prepare_comes_before_each_visit_and_is_not_timed(monkeypatch):
    clock = FakeClock(monkeypatch)
    prepared = []

    def prepare(name):
        prepared.append((name, len(clock.log)))
        clock.now += 1

    calls = {name: clock.call(name, 10) for name in "ab"}
    times = timing.in_turn(calls, CPU, rounds=2, at_least=2, prepare=prepare)
    assert prepared == [("a", 0), ("b", 2), ("a", 4), ("b", 8), ("b", 12), ("a", 16)]
    assert times["a"].median == pytest.approx(10)


FAULTS = """
import resource, torch
from flatten_ext.tools.bench import timing

def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(megabytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
timing.settle_allocator()
faults(16)
print(faults(12) * resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_a_settled_allocator_keeps_large_blocks():
    done = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 1 << 20  # 12 MiB where the first block was mapped


def test_peak_memory_is_the_peak():
    def call():
        a = torch.ones(1 << 20)  # 4 MiB
        b = a + 1
        del a
        return b + 1  # two alive at any time

    assert 8 << 20 <= timing.peak_memory(call, CPU) < 9 << 20
