"""End-to-end images/s of the models: with the operator, with the eager formula, and timm's originals.

    python benchmarks/models.py                       # batch 8, 224 px, fp32, eager mode
    python benchmarks/models.py --mode compiled       # torch.compile on every side
    python benchmarks/models.py --mode both --output benchmarks/results/end-to-end.json

"eager" is the same model with the formula of the public code in place of the operator, with its rolls, window
partitions and copies, and LePE as a convolution of its own. Equality of the logits is checked before anything
is timed. "ceiling" is the model with an attention that only copies q: no operator can do less. Variants are
interleaved within one process; the figure is the median over rounds, and a speed-up the median of the ratios
within rounds, so that drift favours no side. Every model has a process of its own: glibc's malloc keeps more
memory once a large buffer has been freed, so that a model after another no longer pays for its page faults.
With --cpu-time, one thread and its processor time, other programs of a busy machine disturb the least.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import time
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatten_ext import info
from flatten_ext.models._attention import FocusedAttention
from flatten_ext.reference import from_windows, to_windows
from flatten_ext.tools.output import write_json

ORIGINALS = {
    "flatten_swin_tiny": "swin_tiny_patch4_window7_224",
    "flatten_pvt_v2_b0": "pvt_v2_b0",
    "flatten_deit_tiny": "deit_tiny_patch16_224",
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DEFAULT = ("flatten_swin_tiny", "flatten_cswin_tiny", "flatten_pvt_tiny", "flatten_pvt_v2_b0")


def eager_formula(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: Tensor, key_bias: Tensor, p: float, eps: float = 1e-6
) -> Tensor:
    """The attention of the public code (its paper's equations 4-6), operation by operation."""
    q, k = F.relu(q) + eps, F.relu(k + key_bias) + eps
    q, k = q / scale, k / scale
    q_norm, k_norm = q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True)
    q, k = q**p, k**p
    q = q / q.norm(dim=-1, keepdim=True) * q_norm
    k = k / k.norm(dim=-1, keepdim=True) * k_norm
    batch, keys, channels = k.shape
    q, k, v = (x.reshape(batch, -1, heads, channels // heads).permute(0, 2, 1, 3) for x in (q, k, v))
    z = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + eps)
    kv = (k.transpose(-2, -1) * keys**-0.5) @ (v * keys**-0.5)
    return (q @ kv * z).transpose(1, 2).reshape(batch, -1, channels)


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
            module.attend = types.MethodType(attend, module)
    return model


def variants(name: str, original: bool) -> dict[str, nn.Module]:
    """The models to time against each other, with parameters that use every term of the formula."""
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
    if original and name in ORIGINALS:
        made["timm original"] = timm.create_model(ORIGINALS[name]).eval()
    return made


def check(models: dict[str, nn.Module], image: Tensor) -> float:
    """The largest difference of the eager logits from the operator's, relative to the largest logit."""
    with torch.inference_mode():
        ours, theirs = models["operator"](image), models["eager"](image)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference < 1e-4:
        raise SystemExit(f"operator and eager formula differ by {difference:.1e}: nothing is timed")
    return difference


def interleaved(
    runs: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each run in each round; the order rotates."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for run in runs.values():
        run()  # compiles, packs weights, faults pages in
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = clock()
            runs[name]()
            times[name].append(clock() - start)
    return times


def ratios(theirs: list[float], ours: list[float]) -> list[float]:
    return [a / b for a, b in zip(theirs, ours, strict=True)]


def measure(name: str, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Times every variant of one model in one mode: "eager" or "compiled"."""
    torch.set_num_threads(args.threads)
    image = torch.randn(args.batch, 3, args.size, args.size)
    models = variants(name, original=not args.no_original)
    difference = check(models, image)
    if mode == "compiled":
        models = {key: torch.compile(model, dynamic=False) for key, model in models.items()}

    def forward(model: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode():
                return model(image)

        return run

    runs = {key: forward(model) for key, model in models.items()}
    times = interleaved(runs, args.rounds, CLOCKS[args.clock])
    result: dict[str, Any] = {"model": name, "mode": mode, "difference": difference}
    result["images_per_second"] = {k: args.batch / statistics.median(seconds) for k, seconds in times.items()}
    result["speedup"], result["speedup_quartiles"] = {}, {}
    for key, seconds in times.items():
        if key in ("eager", "timm original"):
            gains = ratios(seconds, times["operator"])
            low, median, high = statistics.quantiles(gains, n=4)
            result["speedup"][key], result["speedup_quartiles"][key] = median, [low, high]
    result["ceiling"] = statistics.median(ratios(times["eager"], times["ceiling"]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=DEFAULT)
    parser.add_argument("--mode", choices=("eager", "compiled", "both"), default="eager")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7, help="at least 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="one thread, by processor time")
    parser.add_argument("--no-original", action="store_true", help="leave out timm's softmax originals")
    parser.add_argument("--output", type=Path, help="write JSON here")
    args = parser.parse_args()
    args.clock = "cpu" if args.cpu_time else "wall"
    args.threads = 1 if args.cpu_time else args.threads
    torch.set_num_threads(args.threads)  # as every model's process does: the record says how many
    setup = {"machine": info.machine(), "clock": args.clock, "batch": args.batch, "size": args.size}
    print(json.dumps(setup | {"rounds": args.rounds}), flush=True)
    results = []
    for mode in ("eager", "compiled") if args.mode == "both" else (args.mode,):
        for name in args.models:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                result = process.submit(measure, name, mode, args).result()
            results.append(result)
            rates = ", ".join(f"{key} {rate:.1f}" for key, rate in result["images_per_second"].items())
            gains = ", ".join(f"{gain:.2f}x {key}" for key, gain in result["speedup"].items())
            gains += f" (at most {result['ceiling']:.2f}x eager)"
            print(f"{name}, {mode}: images/s {rates}; operator is {gains}", flush=True)
    if args.output:
        write_json(args.output, setup | {"rounds": args.rounds, "results": results})


if __name__ == "__main__":
    main()
