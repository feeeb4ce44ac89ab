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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatten_ext.extras import require
from flatten_ext.models._attention import FocusedAttention
from flatten_ext.reference import from_windows, to_windows
from flatten_ext.tools.bench import timing
from flatten_ext.tools.bench.check import CheckFailed
from flatten_ext.tools.bench.formulas import eager_formula
from flatten_ext.tools.bench.models import PAIRS

__all__ = ["MODELS", "attending", "eager_attend", "in_process", "measure"]

MODELS = ("flatten_swin_tiny", "flatten_cswin_tiny", "flatten_pvt_tiny", "flatten_pvt_v2_b0")


def eager_attend(
    self: FocusedAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Any,
    window: Any = None,
    shift: Any = None,
    key_size: Any = None,
) -> Tensor:
    """FocusedAttention.attend as the public code computes it, on partitioned copies and with convolutions."""
    batch, tokens, channels = q.shape
    tile, heads, head_dim = window or size, self.num_heads, channels // self.num_heads
    if key_size is None:  # without copies where one window covers the map, as in the public Swin
        q, k, v = (to_windows(x, size, tile, shift).flatten(0, 1) for x in (q, k, v))
    image = v.transpose(1, 2)
    if self.get_v is not None:  # the public CSWin goes through (B, C, H, W) and back for each
        q, k, image = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, image))
    encoding = self.encoding(key_size if key_size is not None else tile)
    out = eager_formula(q, k, v, heads, F.softplus(self.scale), encoding, self.focusing_factor)
    if key_size is not None:
        image = F.interpolate(image, size=tokens, mode="linear")
    values = v if key_size is None else image.transpose(1, 2)
    maps = values.unflatten(-1, (heads, head_dim)).permute(0, 2, 1, 3)
    local = self.dwc(maps.reshape(-1, tile[0], tile[1], head_dim).permute(0, 3, 1, 2))
    out = out + local.reshape(out.shape[0], channels, -1).permute(0, 2, 1)
    if self.get_v is not None:
        lepe = self.get_v(image.reshape(-1, channels, tile[0], tile[1]))
        out = out + lepe.reshape(out.shape[0], channels, -1).permute(0, 2, 1).contiguous()
    return out if key_size is not None else from_windows(out.unflatten(0, (batch, -1)), size, tile, shift)


@torch.library.custom_op("flatten_benchmark::copy_queries", mutates_args=())
def copy_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.clone(memory_format=torch.contiguous_format)


@copy_queries.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def least_attend(
    self: FocusedAttention, q: Tensor, k: Tensor, v: Tensor, *sizes: Any, **more_sizes: Any
) -> Tensor:
    """Copies q. To a compiler it needs k and v all the same."""
    return torch.ops.flatten_benchmark.copy_queries(q, k, v)


def attending(model: nn.Module, attend: Callable[..., Tensor]) -> nn.Module:
    """A copy of the model, with its parameters, that attends as said."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, FocusedAttention):
            setattr(module, "attend", types.MethodType(attend, module))  # noqa: B010 - it shadows the method
    return model


def variants(name: str) -> dict[str, nn.Module]:
    """The models to time against each other, with parameters that use every term of the formula."""
    timm = require("timm", "models", "the models")
    require("flatten_ext.models", "models", "the models")  # registers ours with timm
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for key, parameter in model.named_parameters():
        if key.endswith((".scale", ".positional_encoding")):
            nn.init.normal_(parameter, std=0.5)
    made = {
        "operator": model,
        "eager": attending(model, eager_attend),
        "ceiling": attending(model, least_attend),
    }
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
    name: str, compiled: bool, batch: int, size: int, rounds: int, threads: int, clock: str
) -> dict[str, Any]:
    """Times every variant of one model; JSON-ready.

    Args:
        name: one of ours.
        compiled: torch.compile on every side.
        batch, size: images, and pixels a side.
        rounds: at least 2.
        threads: of torch.
        clock: see timing.CLOCKS.

    Raises:
        CheckFailed: operator and eager formula differ.
    """
    torch.set_num_threads(threads)
    timing.use_clock(clock)
    image = torch.randn(batch, 3, size, size)
    models = variants(name)
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
        "ceiling": statistics.median(_ratios(times["eager"], times["ceiling"])),
    }
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
