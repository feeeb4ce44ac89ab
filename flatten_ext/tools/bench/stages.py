"""The headline comparison at real stage shapes: the op, the eager formula, its compilation, softmax SDPA."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flatten_ext import attention, info
from flatten_ext.tools.bench import timing
from flatten_ext.tools.bench.check import check_focused
from flatten_ext.tools.bench.formulas import Inputs, eager_attention, make_inputs
from flatten_ext.tools.bench.shapes import Shape

__all__ = [
    "AGAINST_TOKENS",
    "LABELS",
    "MODES",
    "Measurement",
    "call_of",
    "contenders",
    "geometric_mean",
    "modes_of",
    "record",
    "run_stages",
]

MODES = ("forward", "forward+backward")
LABELS = {
    "flatten": "flatten",
    "eager": "eager formula",
    "compile": "torch.compile",
    "softmax": "softmax SDPA",
}

# Whose time against the number of tokens the headline shows too.
AGAINST_TOKENS = ("flatten", "eager", "softmax")


@dataclass(frozen=True)
class Measurement:
    """One timed call, or its peak memory; the fields before `ms` identify it across runs."""

    suite: str
    shape: str
    tokens: int
    contender: str
    mode: str
    threads: int
    ms: timing.Timing | None = None
    peak_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def call_of(attend: Callable[..., Tensor], inputs: Inputs, shape: Shape) -> Callable[[], Tensor]:
    """A forward of focused attention, or of what has its signature."""
    q, k, v, scale, key_bias, weight, bias = inputs.tensors
    return lambda: attend(q, k, v, shape.heads, scale, key_bias, weight, bias, shape.size)


def _softmax(inputs: Inputs, shape: Shape) -> Callable[[], Tensor]:
    def call() -> Tensor:
        q, k, v = (x.unflatten(-1, (shape.heads, -1)).transpose(1, 2) for x in inputs.qkv)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return call


def modes_of(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], grad_out: Tensor
) -> dict[str, Callable[[], object]]:
    """What is timed of a contender: inference, and the forward and backward of a training step."""

    def inference() -> Tensor:
        with torch.no_grad():
            return forward()

    def training() -> Sequence[Tensor]:
        return torch.autograd.grad(forward(), leaves, grad_out)

    return dict(zip(MODES, (inference, training), strict=True))


def measure(
    suite: str,
    shape: Shape,
    calls: Mapping[str, Mapping[str, Callable[[], object]]],
    device: torch.device,
    seconds: float,
) -> list[Measurement]:
    """Times the contenders' calls, by name and mode, in turn."""
    results = []
    for mode in MODES:
        times = timing.in_turn({name: modes[mode] for name, modes in calls.items()}, device, seconds)
        results += [
            Measurement(suite, shape.name, shape.tokens, name, mode, torch.get_num_threads(), ms)
            for name, ms in times.items()
        ]
    return results


def contenders(
    shape: Shape, device: torch.device, names: Iterable[str], op: Callable[..., Tensor]
) -> dict[str, dict[str, Callable[[], object]]]:
    """The calls of the named contenders, checked."""
    inputs = make_inputs(shape, device)
    focused: dict[str, Callable[..., Tensor]] = {"flatten": op, "eager": eager_attention}
    if "compile" in names:
        torch._dynamo.reset()  # each shape is compiled for itself, as a model of fixed size would be
        focused["compile"] = torch.compile(eager_attention, dynamic=False, fullgraph=True)
    calls = {}
    for name in names:
        if name == "softmax":
            calls[name] = modes_of(_softmax(inputs, shape), inputs.qkv, inputs.grad_out)
            continue
        check_focused(LABELS[name], focused[name], inputs, shape)
        calls[name] = modes_of(call_of(focused[name], inputs, shape), inputs.tensors, inputs.grad_out)
    return calls


def run_stages(
    shapes: Iterable[Shape],
    device: torch.device,
    compiled: bool = True,
    seconds: float = 1.0,
    op: Callable[..., Tensor] = attention,
) -> Iterator[list[Measurement]]:
    """Checks and times every contender at every shape with the current number of threads.

    Raises:
        CheckFailed: a contender computes something else.
    """
    names = [name for name in LABELS if compiled or name != "compile"]
    for shape in shapes:
        yield measure("stages", shape, contenders(shape, device, names, op), device, seconds)


def geometric_mean(ratios: Sequence[float]) -> float:
    """exp of the mean of logarithms."""
    return float(torch.tensor(ratios, dtype=torch.float64).log().mean().exp())


def record(
    measurements: Sequence[Measurement], rates: Mapping[int, float], device: torch.device, clock: str
) -> dict[str, Any]:
    """A run as JSON-ready data, for `benchmarks/compare.py` and the plots.

    Args:
        measurements: everything that was timed.
        rates: torch.mm's GFLOP/s by number of threads.
        device: where it ran.
        clock: "wall" or "cpu" (see timing.CLOCKS).
    """
    return {
        "what": "flatten_ext bench",
        "clock": clock,
        "device": str(device),
        "machine": info.machine(),
        "mm_gflops": {str(count): rate for count, rate in rates.items()},
        "measurements": [m.as_dict() for m in measurements],
    }
