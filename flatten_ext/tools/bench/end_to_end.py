"""End-to-end images/s of the models: with the operator, with the eager formula, and timm's originals.

"eager" is the same model with the formula of the public code in place of the operator, with its rolls, window
partitions and copies, and LePE as a convolution of its own. Equality of the logits is checked before anything
is timed. "ceiling" is the model with an attention that only copies q: no operator can do less. A speed-up is
the median of the ratios within rounds, so that drift favours no side. Every model has a process of its own:
glibc's malloc keeps more memory once a large buffer has been freed, so that a later model no longer pays
for its page faults.
"""

from __future__ import annotations

import copy
import multiprocessing
import statistics
import types
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from flatten_ext.extras import require
from flatten_ext.tools.bench import timing
from flatten_ext.tools.bench.check import CheckFailed
from flatten_ext.tools.bench.eager import EAGER
from flatten_ext.tools.bench.models import PAIRS

__all__ = ["FAMILIES", "MODELS", "attending", "in_process", "measure"]

MODELS = ("flatten_swin_tiny", "flatten_cswin_tiny", "flatten_pvt_tiny", "flatten_pvt_v2_b0")
# One of each family and host.
FAMILIES = (
    *("flatten_pvt_v2_b0", "mila_tiny", "ravlt_tiny", "mavit_tiny", "inline_deit_tiny", "inline_pvt_tiny"),
    *("inline_swin_tiny", "inline_cswin_tiny", "pola_pvt_tiny", "pola_swin_tiny"),
)


@torch.library.custom_op("flatten_benchmark::copy_queries", mutates_args=())
def copy_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.clone(memory_format=torch.contiguous_format)


@copy_queries.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def least_attend(self: Any, q: Tensor, k: Tensor, v: Tensor, *sizes: Any, **more_sizes: Any) -> Tensor:
    """Copies q. To a compiler it needs k and v all the same."""
    return torch.ops.flatten_benchmark.copy_queries(q, k, v)


def attending(model: nn.Module, attends: Mapping[type[nn.Module], Callable[..., Tensor]]) -> nn.Module:
    """A copy of the model, with its parameters, whose cores attend as said of their classes."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for core, attend in attends.items():
            if isinstance(module, core):
                setattr(module, "attend", types.MethodType(attend, module))  # noqa: B010 - it shadows the method
    return model


def variants(name: str, whole: bool = True) -> dict[str, nn.Module]:
    """The models to time against each other, with parameters that use every term of the formula."""
    timm = require("timm", "models", "the models")
    require("flatten_ext.models", "models", "the models")  # registers ours with timm
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for key, parameter in model.named_parameters():
        if key.endswith((".scale", ".positional_encoding", ".power")):
            nn.init.normal_(parameter, std=0.5)
    made = {"operator": model, "eager": attending(model, EAGER)}
    if not whole:
        return made
    made["ceiling"] = attending(model, dict.fromkeys(EAGER, least_attend))
    if (original := dict(PAIRS).get(name)) is not None:
        made["timm original"] = timm.create_model(original).eval()
    return made


def check(models: dict[str, nn.Module], image: Tensor) -> float:
    """The largest difference of the eager logits from the operator's, relative to the largest logit.

    Raises:
        CheckFailed: it is more than rounding.
    """
    with torch.inference_mode():
        ours, theirs = models["operator"](image), models["eager"](image)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference < 1e-4:
        raise CheckFailed(f"operator and eager formula differ by {difference:.1e}: nothing is timed")
    return difference


def measure(
    name: str,
    compiled: bool,
    batch: int,
    size: int,
    rounds: int,
    threads: int,
    clock: str,
    whole: bool = True,
) -> dict[str, Any]:
    """Times every variant of one model; JSON-ready.

    Args:
        name: one of ours.
        compiled: torch.compile on every side.
        batch, size: images, and pixels a side.
        rounds: at least 2.
        threads: of torch.
        clock: see timing.CLOCKS.
        whole: time the ceiling and timm's original too.

    Raises:
        CheckFailed: operator and eager formula differ.
    """
    torch.set_num_threads(threads)
    timing.use_clock(clock)
    image = torch.randn(batch, 3, size, size)
    models = variants(name, whole)
    difference = check(models, image)
    if compiled:
        for model in models.values():
            model.compile(dynamic=False)

    def forward(model: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode():
                return model(image)

        return run

    runs = {key: forward(model) for key, model in models.items()}
    cpu = torch.device("cpu")
    times = timing.visits(runs, cpu, 0, rounds=rounds, at_least=rounds, give_up_ms=float("inf"))
    result: dict[str, Any] = {
        "model": name,
        "mode": "compiled" if compiled else "eager",
        "difference": difference,
        "images_per_second": {key: 1e3 * batch / statistics.median(ms) for key, ms in times.items()},
        "speedup": {},
        "speedup_quartiles": {},
    }
    if whole:
        result["ceiling"] = statistics.median(_ratios(times["eager"], times["ceiling"]))
    for key in ("eager", "timm original"):
        if key in times:
            low, median, high = statistics.quantiles(_ratios(times[key], times["operator"]), n=4)
            result["speedup"][key], result["speedup_quartiles"][key] = median, [low, high]
    return result


def _ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(theirs, ours, strict=True)]


def in_process(*arguments: Any) -> dict[str, Any]:
    """`measure` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()
