"""Whether the kernels compute what they should on this machine: values, gradients, threads, streams, graphs.

Every family of kernels runs once, against the formula in float64 on the CPU. Imports torch alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from . import _load, reference
from ._cuda_kernels import cuda_kernels

__all__ = ["CheckReport", "CheckResult", "self_check"]

# Largest relative errors (Frobenius norm) of the output and of a gradient, by dtype. They are the bounds of
# the tests; tests/cases.py says where they come from.
_TOLERANCE = {
    torch.float64: (1e-13, 1e-13),
    torch.float32: (1e-6, 3e-6),
    torch.float16: (1e-3, 2e-3),
    torch.bfloat16: (5e-3, 8e-3),
}


@dataclass(frozen=True)
class CheckResult:
    """One line of the report."""

    name: str
    passed: bool
    detail: str  # the worst error, or what went wrong
    seconds: float
    way_out: str | None = (
        None  # of a call that is wrong on CUDA: the environment variable with which it is right
    )


@dataclass
class CheckReport:
    """What `self_check` found. `print(report)` shows it as a table."""

    device: str
    results: list[CheckResult] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    def __str__(self) -> str:
        width = max((len(result.name) for result in self.results), default=0)
        lines = [f"flatten_ext on {self.device}"]
        for result in self.results:
            verdict = "ok  " if result.passed else "FAIL"
            lines.append(f"  {verdict}  {result.name:<{width}}  {result.detail}  ({result.seconds:.2f} s)")
        failed = sum(not result.passed for result in self.results)
        lines.append(f"{len(self.results) - failed} passed, {failed} failed")
        if failed:
            lines.append(self._way_out())
        return "\n".join(lines)

    def _way_out(self) -> str:
        if not self.device.startswith("cuda"):
            return "FLATTEN_CPU_ISA=baseline leaves out the kernels for the wider instruction sets."
        found = {result.way_out for result in self.results if not result.passed}
        # The variable that leaves out more is right wherever the other is.
        variable = max((v for v in found if v), key=_WAYS_OUT.index, default=None)
        if variable is None or None in found:
            return "FLATTEN_CUDA=general leaves out tensor-core kernels, FLATTEN_CUDA=reference all on CUDA."
        names = ", ".join(result.name for result in self.results if not result.passed)
        return f"{variable} leaves out the kernels that are wrong here: {names}."


# From the one that leaves out the least; flatten_ext.cuda_kernels has the same levels.
_LEVELS: tuple[Literal["general", "reference"], ...] = ("general", "reference")
_WAYS_OUT = tuple(f"FLATTEN_CUDA={level}" for level in _LEVELS)


def _find_way_out(check: Callable[[], str]) -> str | None:
    """The variable with which a check that failed on CUDA passes, or None."""
    for level, variable in zip(_LEVELS, _WAYS_OUT, strict=True):
        try:
            with cuda_kernels(level):
                check()
        except Exception:  # wrong there too, or the device is lost
            continue
        return variable
    return None


@dataclass(frozen=True)
class _Call:
    """One call of an operator. Each is chosen to reach a family of kernels; see `_calls`."""

    size: tuple[int, int]
    heads: int
    head_dim: int
    dtype: torch.dtype
    batch: int = 2
    kernel: int | None = 5
    per_channel: bool = False
    window: tuple[int, int] | None = None
    shift: tuple[int, int] | None = None
    prefix: int = 0
    focusing_factor: float = 3.0
    general: bool = False  # elu + 1, rotated, with weights of keys and a gate

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of `attention`, on the CPU."""
        rng = torch.Generator().manual_seed(seed)
        channels = self.heads * self.head_dim
        tokens = self.prefix + self.size[0] * self.size[1]

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        # Mixed precision calls the operator with float32 parameters beside tokens of half precision.
        parameters = torch.float64 if self.dtype == torch.float64 else torch.float32
        keys = tokens if self.window is None else self.window[0] * self.window[1]
        arguments: dict[str, Any] = {
            "q": normal(self.batch, tokens, channels).to(self.dtype),
            "k": normal(self.batch, tokens, channels).to(self.dtype),
            "v": normal(self.batch, tokens, channels).to(self.dtype),
            "num_heads": self.heads,
            "scale": (normal(channels).abs() + 0.5).to(parameters),
            "key_bias": (0.3 * normal(keys, channels)).to(parameters),
            "size": list(self.size),
            "window": None if self.window is None else list(self.window),
            "shift": None if self.shift is None else list(self.shift),
            "focusing_factor": self.focusing_factor,
        }
        if self.kernel is not None:
            filters = channels if self.per_channel else self.head_dim
            arguments["dwc_weight"] = (0.2 * normal(filters, 1, self.kernel, self.kernel)).to(parameters)
            arguments["dwc_bias"] = normal(filters).to(parameters)
        if self.general:
            del arguments["scale"]
            angle = normal(keys, self.head_dim // 2)
            arguments |= {
                "feature_map": "elu",
                "rotary": torch.stack((angle.cos(), angle.sin()), -1).to(parameters),
                "key_weight": (normal(self.batch, tokens, self.heads).abs() + 0.1).to(parameters),
                "gate": normal(self.batch, tokens, channels).to(self.dtype),
                "gate_activation": "silu",
            }
        return arguments


def _calls(device: torch.device) -> dict[str, _Call]:
    """A call for each family of kernels that the device has."""
    half = torch.bfloat16
    calls = {
        "float32, whole map": _Call((14, 15), 3, 32, torch.float32),
        "float32, shifted windows": _Call((14, 14), 3, 32, torch.float32, window=(7, 7), shift=(3, 3)),
        "float32, small map of wide heads": _Call((7, 7), 2, 64, torch.float32),
        "float32, class token and any head width": _Call((9, 8), 3, 20, torch.float32, prefix=1),
        "float64, taps of 7 x 7": _Call((9, 8), 2, 16, torch.float64, kernel=7),
        "float32, any power, taps of each channel": _Call(
            (9, 8), 2, 24, torch.float32, kernel=3, per_channel=True, focusing_factor=2.5
        ),
        "bfloat16, whole map": _Call((20, 18), 3, 32, half),
        "float16, whole map": _Call((20, 18), 3, 32, torch.float16),
        "bfloat16, shifted windows": _Call((14, 14), 12, 32, half, window=(7, 7), shift=(3, 3)),
        "float16, small map": _Call((7, 7), 3, 32, torch.float16),
        "bfloat16, heads of 64": _Call((20, 18), 2, 64, half),
        "bfloat16, class token": _Call((14, 14), 3, 64, half, prefix=1),
        "float32, general form": _Call((9, 8), 2, 32, torch.float32, kernel=3, general=True),
        "float64, general form, shifted windows": _Call(
            (14, 14), 3, 16, torch.float64, window=(7, 7), shift=(3, 3), per_channel=True, general=True
        ),
    }
    if device.type == "cuda":
        calls |= {
            "bfloat16, heads of 16": _Call((20, 18), 4, 16, half, kernel=3),
            "bfloat16, heads of 128": _Call((20, 18), 1, 128, half),
            "float16, any power, taps of each channel": _Call(
                (20, 18), 2, 32, torch.float16, per_channel=True, focusing_factor=2.5
            ),
            "bfloat16, windows of 64-wide heads": _Call((14, 14), 2, 64, half, window=(7, 7)),
            "float16, taps of 7 x 7": _Call((20, 18), 2, 32, torch.float16, kernel=7),
            "bfloat16, many channels": _Call((14, 14), 5, 64, half),
        }
    return calls


class _Failure(Exception):
    """A result that is not what it should be, with the words that say so."""


def _place(
    arguments: dict[str, Any], device: torch.device | str, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Tensors on the device, each a leaf that asks for its gradient; the table of angles has none."""
    return {
        name: value.to(device, dtype).detach().requires_grad_(name != "rotary")
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }


def _gradient_like(q: Tensor) -> Tensor:
    """The gradient of the output that every call is given: the same numbers on every device."""
    rng = torch.Generator().manual_seed(1)
    return torch.randn(q.shape, generator=rng, dtype=torch.float64).to(q.dtype).to(q.device)


def _results(
    function: Callable[..., Tensor], arguments: dict[str, Any], grad_out: Tensor
) -> dict[str, Tensor]:
    """The output and the gradient of every tensor."""
    out = function(**arguments)
    tensors = {n: t for n, t in arguments.items() if isinstance(t, Tensor) and t.requires_grad}
    gradients = torch.autograd.grad(out, list(tensors.values()), grad_out)
    return {"out": out.detach(), **dict(zip(tensors, gradients, strict=True))}


def _run(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return _results(torch.ops.flatten.attention, arguments, _gradient_like(arguments["q"]))


def _check_values(call: _Call, device: torch.device) -> str:
    """Values and gradients against the formula in float64, on the same rounded inputs."""
    arguments = call.arguments()
    found = _run(_place(arguments, device))
    exact = _place(arguments, "cpu", torch.float64)
    expected = _results(reference.attention, exact, _gradient_like(arguments["q"]).double())
    worst, where = 0.0, "out"
    for name, value in expected.items():
        error = ((found[name].double().cpu() - value).norm() / value.norm()).item()
        bound = _TOLERANCE[call.dtype][0 if name == "out" else 1]
        what = name if name == "out" else f"gradient of {name}"
        if not error <= bound:  # NaN is beyond any bound
            raise _Failure(f"{what}: relative error {error:.1e}, expected at most {bound:.0e}")
        if error >= worst:
            worst, where = error, what
    return f"worst relative error {worst:.1e} ({where})"


def _expect_equal(found: dict[str, Tensor], expected: dict[str, Tensor], who: str) -> None:
    for name, value in expected.items():
        if not torch.equal(found[name], value):
            what = name if name == "out" else f"gradient of {name}"
            raise _Failure(f"{what} differs {who}")


_SHARED = (
    _Call((14, 14), 3, 32, torch.float32),
    _Call((14, 14), 12, 32, torch.bfloat16, window=(7, 7)),
    _Call((20, 18), 3, 32, torch.bfloat16),
)


def _check_repeats(device: torch.device) -> str:
    """The same call gives the same bits."""
    for call in _SHARED:
        expected = _run(_place(call.arguments(), device))
        for _ in range(3):
            _expect_equal(_run(_place(call.arguments(), device)), expected, "from run to run")
    return f"{len(_SHARED)} calls give the same bits each time"


def _check_threads(device: torch.device) -> str:
    """Calls of different sizes from two threads at once give what they give alone."""
    expected = [_run(_place(call.arguments(), device)) for call in _SHARED]
    failures: list[BaseException] = []

    def work(order: list[int]) -> None:
        try:
            for _ in range(5):
                for i in order:
                    _expect_equal(_run(_place(_SHARED[i].arguments(), device)), expected[i], "in a thread")
        except BaseException as error:  # handed to the caller's thread
            failures.append(error)

    orders = [list(range(len(_SHARED))), list(reversed(range(len(_SHARED))))]
    threads = [threading.Thread(target=work, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return f"{len(threads)} threads at once give what one gives"


def _check_stream(device: torch.device) -> str:
    """A stream other than the default one is waited for and used."""
    for call in _SHARED:
        expected = _run(_place(call.arguments(), device))
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            found = _run(_place(call.arguments(), device))
        stream.synchronize()
        _expect_equal(found, expected, "on another stream")
    return "another stream gives what the default one gives"


def _check_graph(device: torch.device) -> str:
    """A captured CUDA graph, replayed with other inputs, gives what a call gives."""
    call = _SHARED[-1]
    arguments = _place(call.arguments(), device)
    warm_up = torch.cuda.Stream(device)
    warm_up.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            _run(arguments)
    torch.cuda.current_stream(device).wait_stream(warm_up)
    grad_out = _gradient_like(arguments["q"])  # made outside: random numbers are no part of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _results(torch.ops.flatten.attention, arguments, grad_out)
    other = _place(call.arguments(seed=2), device)
    with torch.no_grad():
        for name, value in other.items():
            if isinstance(value, Tensor):
                arguments[name].copy_(value)
    graph.replay()
    torch.cuda.synchronize(device)
    _expect_equal(found, _run(other), "in a CUDA graph")
    return "a CUDA graph replayed gives what a call gives"


def _checks(device: torch.device) -> dict[str, Callable[[], str]]:
    """Every check by name; each returns what it found, or raises."""
    checks: dict[str, Callable[[], str]] = {
        name: partial(_check_values, call, device) for name, call in _calls(device).items()
    }
    checks["repeated calls"] = partial(_check_repeats, device)
    checks["two threads"] = partial(_check_threads, device)
    if device.type == "cuda":
        checks["another stream"] = partial(_check_stream, device)
        checks["CUDA graph"] = partial(_check_graph, device)
    return checks


def self_check(
    device: torch.device | str = "cpu", progress: Callable[[int, int, str], None] | None = None
) -> CheckReport:
    """Runs every family of kernels once and compares values and gradients with the formula in float64.

    It also repeats calls, makes them from two threads at once and, on CUDA, on a second stream and in a CUDA
    graph. A failed check does not end the others. Takes a few seconds.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        progress: called before each check as progress(done, total, name).

    Returns:
        The report; `report.passed` tells whether all is well, `print(report)` shows a table.

    Raises:
        ValueError: the device is not there, or this build has no kernels for it.

    Example:
        >>> report = flatten_ext.self_check()
        >>> report.passed
        True
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {str(device)!r}, expected cpu or cuda: others have no kernels to check")
    name = f"cpu ({_load.cpu_isa()} kernels)"
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device is {str(device)!r}, but torch finds {torch.cuda.device_count()} CUDA devices"
            )
        if _load.cuda_unavailable_reason is not None:
            raise ValueError(f"device is {str(device)!r}, but {_load.cuda_unavailable_reason}")
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{device} ({torch.cuda.get_device_name(device)}, compute capability {major}.{minor})"
    report = CheckReport(name)
    checks = _checks(device)
    for done, (what, check) in enumerate(checks.items()):
        if progress is not None:
            progress(done, len(checks), what)
        start = time.perf_counter()
        try:
            detail, passed = check(), True
        except Exception as error:  # a failed launch is a finding, not the end of the check
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
            detail = first_line if isinstance(error, _Failure) else f"{type(error).__name__}: {first_line}"
            passed = False
        way_out = None
        if not passed and device.type == "cuda":
            way_out = _find_way_out(check)
            detail += f"; right with {way_out}" if way_out else ""
        report.results.append(CheckResult(what, passed, detail, time.perf_counter() - start, way_out))
    return report
