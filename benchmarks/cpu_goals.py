"""Measures what the CPU kernels aim for on this machine: every goal with its figure, its target, met or not.

    python benchmarks/cpu_goals.py                 # long; the machine should be idle
    python benchmarks/cpu_goals.py --only 6 7 8    # some of the goals
    python benchmarks/cpu_goals.py --cpu-time      # by processor time, where other work takes the processor
    python benchmarks/cpu_goals.py --quick         # small shapes, few rounds: shows only that it runs

What is compared takes turns in one process and is compared by medians; torch.mm(2048), the yardstick of
arithmetic, takes its turn too. A turn is a visit of many calls, the first of them untimed: they bring back
what the others drove out of the caches (see flatten_ext/tools/bench/timing.py). The record (--output) can be
read by compare.py; the table lies beside it, in Markdown.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from long_maps import forward_memory, time_ladder
from own_process import KEPT, in_process
from rich.console import Console
from torch import Tensor
from two_threads import time_threads

from flatten_ext import attention, reference
from flatten_ext.output import write_json, write_text
from flatten_ext.tools.bench import stages, tables, timing
from flatten_ext.tools.bench.check import CheckFailed, check_focused, relative_error
from flatten_ext.tools.bench.formulas import Inputs, eager_attention, make_inputs
from flatten_ext.tools.bench.shapes import QUICK_STAGES, STAGES, Shape, token_ladder
from flatten_ext.tools.bench.stages import MODES, Measurement, call_of, modes_of

CPU = torch.device("cpu")
FORWARD, TRAINING = MODES
HALVES = {"flatten bf16": torch.bfloat16, "flatten fp16": torch.float16}
# Rounding of the inputs' dtype, a few times over; the tests hold the kernels to tighter bounds.
HALF_BOUND = 2e-2
SMALL = Shape("small call", 1, (7, 7), 512, 8)


@dataclass(frozen=True)
class Goal:
    """A figure and what it should be: at least (">=") or at most ("<=") `target`."""

    number: int
    what: str
    figure: float | None  # None: could not be measured here
    sense: str
    target: float
    unit: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.figure is None:
            return None
        return self.figure >= self.target if self.sense == ">=" else self.figure <= self.target

    def row(self) -> list[str]:
        def show(x: float, digits: int) -> str:
            return f"{x:.2f}{self.unit}" if self.unit == " MiB" else f"{x:.{digits}g}{self.unit}"

        digits, value = 3, self.figure  # more digits where it would look like the target that it misses
        while self.met is False and digits < 6 and show(value, digits) == show(self.target, digits):
            digits += 1
        figure = "-" if value is None else show(value, digits)
        verdict = {True: "met", False: "NOT MET", None: "not measured"}[self.met]
        target = f"{self.sense} {show(self.target, 3)}"
        return [f"{self.number} {self.what}", figure, target, verdict, self.note]


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    stages: tuple[Shape, ...]
    long_map: Shape
    ladder: tuple[int, int, int]  # of token_ladder: first, last, step
    seconds: float
    compiled: bool
    clock: str
    mm_size: int

    @classmethod
    def make(cls, quick: bool, seconds: float, compiled: bool, clock: str) -> Plan:
        if quick:
            return cls(QUICK_STAGES, token_ladder(8, 8)[0], (6, 8, 1), 0.01, False, clock, 256)
        return cls(STAGES, token_ladder(16, 16)[0], (10, 20, 2), seconds, compiled, clock, 2048)


def on_one_thread(
    calls: Mapping[str, Callable[[], object]], plan: Plan, at_least: int = 5
) -> dict[str, timing.Timing]:
    with timing.threads(1):
        return timing.in_turn(calls, CPU, plan.seconds, at_least=at_least)


def in_half(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """As autocast has them: q, k, v in half precision, the parameters in float32."""
    tokens = [t.detach().to(dtype).requires_grad_() for t in inputs.qkv]
    return Inputs(*tokens, *inputs.tensors[3:], inputs.grad_out.to(dtype))


def check_half(name: str, inputs: Inputs, shape: Shape) -> None:
    """Raises CheckFailed unless output and gradients agree with the formula on the same rounded inputs."""

    def results(op: Callable[..., Tensor], given: Inputs) -> Sequence[Tensor]:
        out = call_of(op, given, shape)()
        return out, *torch.autograd.grad(out, given.tensors, given.grad_out)

    expected = results(reference.attention, inputs.to(torch.float64))
    for got, wanted in zip(results(attention, inputs), expected, strict=True):
        if not relative_error(got, wanted) <= HALF_BOUND:
            raise CheckFailed(f"{name}: error {relative_error(got, wanted):.1e} at {shape.label}")


# ---------------------------------------------------------------------------- goals 1 to 4: stage shapes
@dataclass
class Row:
    """The times of one shape by contender, for both modes; "mm" among them."""

    shape: Shape
    times: dict[str, dict[str, timing.Timing]]

    def ratio(self, mode: str, slow: str, fast: str = "flatten") -> float:
        return self.times[mode][slow].median / self.times[mode][fast].median

    def share(self, plan: Plan, mode: str) -> float:
        """Per cent of torch.mm's rate; a training step counts as three forwards."""
        flops = self.shape.flops * (1 if mode == FORWARD else 3)
        return 100 * flops / (2 * plan.mm_size**3) * self.ratio(mode, "mm")

    def measurements(self) -> list[Measurement]:
        return [
            Measurement("stages", self.shape.name, self.shape.tokens, name, mode, 1, ms)
            for mode, times in self.times.items()
            for name, ms in times.items()
        ]


def time_row(shape: Shape, plan: Plan, others: Iterable[str]) -> Row:
    """Checks and times the op in three dtypes, the named others and torch.mm, with one thread."""
    inputs = make_inputs(shape, CPU)
    calls = {"mm": dict.fromkeys(MODES, timing.mm_call(CPU, plan.mm_size))}
    # check_focused's bound is for gradients of parameters that sum no more tokens than this.
    checked = shape if shape.batch * shape.tokens <= 2**15 else replace(shape, size=(64, 64))
    sample = make_inputs(checked, CPU)
    check_focused("flatten", attention, sample, checked)
    calls["flatten"] = modes_of(call_of(attention, inputs, shape), inputs.tensors, inputs.grad_out)
    calls |= stages.contenders(shape, CPU, list(others), attention)
    for name, dtype in HALVES.items():
        check_half(name, in_half(sample, dtype), checked)
        half = in_half(inputs, dtype)
        calls[name] = modes_of(call_of(attention, half, shape), half.tensors, half.grad_out)
    by_mode = {mode: {name: modes[mode] for name, modes in calls.items()} for mode in MODES}
    return Row(shape, {mode: on_one_thread(by_mode[mode], plan) for mode in MODES})


def least_share(mode: str, tokens: int) -> int:
    if mode == FORWARD:
        return 60 if tokens >= 784 else 50 if tokens >= 196 else 40
    return 50 if tokens >= 196 else 35


def stage_goals(rows: Sequence[Row], plan: Plan) -> list[Goal]:
    found = []
    for number, mode in enumerate(MODES, 1):
        for row in rows:
            target = least_share(mode, row.shape.tokens)
            what = f"{mode}, {row.shape.label}"
            found.append(Goal(number, what, row.share(plan, mode), ">=", target, " %", "of torch.mm's rate"))
    stage_rows = [row for row in rows if "softmax" in row.times[FORWARD]]
    for name, targets in {"eager": (3.5, 5), "compile": (3, 4.5)}.items():
        for mode, target in zip(MODES, targets, strict=True):
            ratios = [row.ratio(mode, name) for row in stage_rows if name in row.times[mode]]
            mean = stages.geometric_mean(ratios) if ratios else None
            label = stages.LABELS[name]
            found.append(Goal(3, f"{mode}, against {label}", mean, ">=", target, " x", "geometric mean"))
    for mode in MODES:
        worst = min(stage_rows, key=lambda row: row.ratio(mode, "softmax"))
        figure = worst.ratio(mode, "softmax")
        found.append(Goal(3, f"{mode}, against softmax SDPA", figure, ">=", 1, " x", worst.shape.label))
    for name in HALVES:
        for mode in MODES:
            worst = max(rows, key=lambda row: row.ratio(mode, name))
            figure = worst.ratio(mode, name)
            found.append(Goal(4, f"{mode}, {name[-4:]} to fp32", figure, "<=", 1.3, " x", worst.shape.label))
    return found


# ---------------------------------------------------------------------------- goal 5: two threads
def thread_goals(plan: Plan) -> tuple[list[Goal], list[Measurement]]:
    """One thread to two, beside what a second thread is worth to torch.mm meanwhile."""
    shapes = [*plan.stages, plan.long_map]
    shapes += [replace(s, name=f"{s.name}, B=1", batch=1) for s in plan.stages if s.tokens >= 784]
    job = ([asdict(shape) for shape in shapes], plan.seconds, plan.clock, plan.mm_size)
    times = {
        name: [timing.Timing(**ms) for ms in pair]
        for name, pair in in_process(time_threads, *job, environment=KEPT).items()
    }
    ratios: dict[tuple[str, int], list[tuple[float, str]]] = {}
    found = []
    for shape in shapes:
        for mode in MODES:
            one, two = times[f"{shape.name}, {mode}"]
            for count, ms in enumerate((one, two), 1):
                found.append(Measurement("threads", shape.name, shape.tokens, "flatten", mode, count, ms))
            pair = (one.median / two.median, shape.label)
            ratios.setdefault((mode, min(shape.batch, 2)), []).append(pair)
    # Processor time adds the threads up.
    several = (os.cpu_count() or 1) > 1 and plan.clock == "wall"
    yardstick = times["mm"][0].median / times["mm"][1].median
    goals = []
    for (mode, batch), pairs in ratios.items():
        worst, label = min(pairs)
        what = f"{mode}, two threads to one, " + ("B = 1" if batch == 1 else "several images")
        figure = worst if several else None
        note = f"{label}; torch.mm {yardstick:.2f} x"
        goals.append(Goal(5, what, figure, ">=", 1.7 if batch == 1 else 1.8, " x", note))
    return goals, found


# ---------------------------------------------------------------------------- goal 6: small calls
NOTHING = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <optional>
#include <vector>
using torch::stable::Tensor;
using Parameter = std::optional<Tensor>;
using Pair = std::optional<std::vector<int64_t>>;
Tensor nothing(Tensor q, Tensor, Tensor, int64_t, Parameter, Parameter, Parameter, Parameter, Pair, Pair,
               Pair, double, double) { return q; }
STABLE_TORCH_LIBRARY(flatten_goals, m) { m.def("nothing%s"); }
STABLE_TORCH_LIBRARY_IMPL(flatten_goals, CPU, m) { m.impl("nothing", TORCH_BOX(&nothing)); }
"""


def nothing() -> Callable[..., Tensor] | None:
    """An operator of attention's schema that returns q, compiled here; None without a C++ compiler."""
    if not hasattr(torch.ops.flatten_goals, "nothing"):
        schema = str(torch.ops.flatten.attention.default._schema).removeprefix("flatten::attention")
        root = Path(torch.__path__[0])
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "nothing.cpp"), Path(folder, "nothing.so")
            source.write_text(NOTHING % schema)
            command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-fPIC", "-shared"]
            command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(root / "include")]
            command += [str(source), "-o", str(library), "-L", str(root / "lib"), "-ltorch_cpu"]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"no operator that does nothing: {getattr(error, 'stderr', error)}", file=sys.stderr)
                return None
            torch.ops.load_library(str(library))
    return torch.ops.flatten_goals.nothing.default


def small_goals(plan: Plan) -> tuple[list[Goal], list[Measurement]]:
    """A small call against its floor, and the op on one token against an op that does nothing."""

    def times_of(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Microseconds of one call."""
        return {name: 1e3 * ms.median for name, ms in on_one_thread(calls, plan, at_least=20).items()}

    inputs = make_inputs(SMALL, CPU)
    check_focused("flatten", attention, inputs, SMALL)
    with torch.no_grad():
        us = times_of({"flatten": call_of(attention, inputs, SMALL), "mm": timing.mm_call(CPU, plan.mm_size)})
    floor = us["mm"] * SMALL.flops / (2 * plan.mm_size**3)
    note = f"2 x the floor of {floor:.0f} us + 15 us"
    goals = [Goal(6, f"no grad, B=1 {SMALL.label}", us["flatten"], "<=", 2 * floor + 15, " us", note)]

    token = Shape("one token", 1, (1, 1), 8, 1)
    given = make_inputs(token, CPU)
    plain = Inputs(*(t.detach() for t in (*given.tensors, given.grad_out)))
    empty = nothing()
    calls: dict[str, Callable[[], object]] = {"grad": call_of(attention, given, token)}
    no_grad = {"no grad": call_of(torch.ops.flatten.attention.default, plain, token)}
    if empty is not None:
        no_grad["nothing"] = call_of(empty, plain, token)
    calls |= {name: torch.no_grad()(call) for name, call in no_grad.items()}
    us = times_of(calls)
    for name, most in {"no grad": 10, "grad": 25}.items():
        figure = us[name] - us["nothing"] if "nothing" in us else None
        what = f"overhead, {name}, one token of 8 channels"
        note = f"{us[name]:.1f} us less {us['nothing']:.1f} us" if figure else "no C++ compiler"
        goals.append(Goal(6, what, figure, "<=", most, " us", note))
    return goals, []


# ---------------------------------------------------------------------------- goals 7 and 8: maps and memory
def map_goals(plan: Plan) -> tuple[list[Goal], list[Measurement]]:
    """Time per token over the ladder, of the operator and with what the system adds (see long_maps.py)."""
    goals, found = [], []
    shapes = token_ladder(*plan.ladder)
    for kept in (True, False):
        job = (*plan.ladder, plan.seconds, plan.clock)
        ladder = in_process(time_ladder, *job, environment=KEPT if kept else {})
        for mode, part in ladder.items():
            times = {s: timing.Timing(**part["times"][s.name]) for s in shapes}
            suite = "long maps, memory kept" if kept else "long maps"
            found += [Measurement(suite, s.name, s.tokens, "flatten", mode, 1, ms) for s, ms in times.items()]
            per_token = {s.name: 1e6 * ms.median / s.tokens for s, ms in times.items()}
            spread = max(per_token.values()) / min(per_token.values())
            if kept:
                what = f"{mode}, slowest token to fastest"
                note = f"memory kept by malloc, {part['faults']} page faults at {shapes[-1].name}"
            else:
                what = f"{mode}, the same with pages fresh from the system"
                note = f"zeroing them takes {part['zeroing']:.0f} ns a token"
            note += "; ns a token: " + ", ".join(f"{name} {ns:.0f}" for name, ns in per_token.items())
            goals.append(Goal(7, what, spread, "<=", 1.2, " x", note))
    extra = in_process(forward_memory, *plan.ladder)
    goals.append(Goal(7, "memory beside inputs and output", extra / 2**20, "<=", 1, " MiB", "resident"))
    return goals, found


def saved_bytes(op: Callable[..., Tensor], inputs: Inputs, shape: Shape) -> int:
    """Bytes that a forward keeps for its backward beside its own arguments."""
    own = {t.untyped_storage().data_ptr() for t in inputs.tensors}
    kept: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call_of(op, inputs, shape)()
    del out
    return sum(storage.nbytes() for storage in kept.values())


def saved_goals(plan: Plan) -> tuple[list[Goal], list[Measurement]]:
    goals = []
    for shape in [*plan.stages, plan.long_map]:
        inputs = make_inputs(shape, CPU)
        tensor = inputs.q.nbytes
        extra = saved_bytes(attention, inputs, shape) / (3 * tensor)
        eager = saved_bytes(eager_attention, inputs, shape) / tensor
        note = f"the eager formula saves {eager:.0f} times q"
        goals.append(Goal(8, f"saved beside q, k, v, {shape.label}", 100 * extra, "<=", 5, " %", note))
    return goals, []


def measure(plan: Plan, wanted: set[int], console: Console) -> tuple[list[Goal], list[Measurement]]:
    goals: list[Goal] = []
    found: list[Measurement] = []
    if wanted & {1, 2, 3, 4}:
        rows = []
        others = ["eager", "compile", "softmax"] if plan.compiled else ["eager", "softmax"]
        for shape in [*plan.stages, plan.long_map]:
            # At 2^16 tokens softmax would take minutes.
            rows.append(time_row(shape, plan, [] if shape is plan.long_map else others))
            found += rows[-1].measurements()
            console.print(f"timed {shape.label}", highlight=False)
        goals += [goal for goal in stage_goals(rows, plan) if goal.number in wanted]
    for number, part in {5: thread_goals, 6: small_goals, 7: map_goals, 8: saved_goals}.items():
        if number in wanted:
            more, timed = part(plan)
            goals, found = goals + more, found + timed
            console.print(f"measured goal {number}", highlight=False)
    return goals, found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: a smoke test")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds to spend on each timing")
    parser.add_argument("--only", type=int, nargs="+", choices=range(1, 9), help="numbers of goals")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of wall time")
    parser.add_argument("--output", type=Path, help="file for the record, JSON")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    clock = "cpu" if options.cpu_time else "wall"
    plan = Plan.make(options.quick, options.seconds, not options.no_compile, clock)
    timing.use_clock(clock)
    try:
        goals, found = measure(plan, set(options.only or range(1, 9)), console)
    except CheckFailed as error:
        raise SystemExit(f"cpu_goals: {error}") from error
    with timing.threads(1):
        rate = timing.mm_rate(CPU, plan.mm_size)
    table = tables.Table("Goals of the CPU kernels", ["goal", "figure", "target", "", "note"])
    table.rows = [goal.row() for goal in goals]
    met, known = sum(goal.met is True for goal in goals), sum(goal.met is not None for goal in goals)
    record = stages.record(found, {1: rate}, CPU, clock)
    record["goals"] = [asdict(goal) | {"met": goal.met} for goal in goals]
    table.note = (
        f"{met} of {known} met; torch.mm({plan.mm_size}) reached {rate:.0f} GFLOP/s on one thread. "
        f"{tables.machine_line(record)}."
    )
    console.print(table.rich())
    if options.output:
        write_json(options.output, record)
        write_text(options.output.with_suffix(".md"), table.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
