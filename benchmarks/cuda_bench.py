"""Times the CUDA kernels on a GPU, after checking their results.

    python benchmarks/cuda_bench.py                       # the published models' calls, both directions
    python benchmarks/cuda_bench.py --batches 1 8 64 128  # in other batches than a model's
    python benchmarks/cuda_bench.py --quick               # a few calls, fewer repetitions
    python benchmarks/cuda_bench.py --json bench.json

Each call is compared with float64 first; one that is wrong is not timed. Times are medians between CUDA
events over buffers that rotate through more memory than the GPU's second-level cache. GB/s counts the
compulsory traffic (q, k, v, out forward; q, k, v, g, dq, dk, dv backward); "of copy" is its fraction of the
bandwidth that a large device-to-device copy reaches on the same GPU in the same process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from cuda_shapes import COMPULSORY, MODEL_CALLS, Shape, positional, random_parameters, random_tokens, verify
from torch import Tensor

from flatten_ext import reference

SOFTMAX_WINDOW = 7


class Buffers:
    """Tensors of one call as models make it, in as many copies as outgrow the second-level cache."""

    def __init__(self, shape: Shape):
        self.shape = shape
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.count = max(2, -(-2 * cache * COMPULSORY["forward"] // (3 * shape.compulsory_bytes("forward"))))
        self.tokens = [random_tokens(shape, "cuda") for _ in range(self.count)]
        self.parameters = random_parameters(shape, "cuda")

    def arguments(self, i: int) -> list:
        return positional(self.shape, self.tokens[i % self.count][:3], self.parameters)

    def gradient(self, i: int) -> Tensor:
        return self.tokens[i % self.count][3]


def recorded(function: Callable, buffers: Buffers) -> Callable[[int], object]:
    """The backward pass of `function`, for every gradient; its forward has been run."""
    graphs = []
    for i in range(buffers.count):
        arguments = [
            t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in buffers.arguments(i)
        ]
        inputs = [t for t in arguments if isinstance(t, Tensor)]
        graphs.append((function(*arguments), inputs))

    def backward(i: int):
        out, inputs = graphs[i % buffers.count]
        return torch.autograd.grad(out, inputs, buffers.gradient(i), retain_graph=True)

    return backward


def heads_of(t: Tensor, heads: int) -> Tensor:
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def softmax(q: Tensor, k: Tensor, v: Tensor, num_heads: int, *_: object) -> Tensor:
    """Fused softmax attention over all tokens: what the published models replace."""
    out = F.scaled_dot_product_attention(*(heads_of(t, num_heads) for t in (q, k, v)))
    return out.transpose(1, 2).flatten(2)


def softmax_windows(shape: Shape) -> Callable[..., Tensor]:
    """What a Swin block runs instead: softmax attention in 7 x 7 windows, with partition and reverse."""

    def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, *_: object) -> Tensor:
        size, window = (shape.height, shape.width), (SOFTMAX_WINDOW, SOFTMAX_WINDOW)
        tiles = [reference.to_windows(t, size, window, None) for t in (q, k, v)]
        out = softmax(*(t.flatten(0, 1) for t in tiles), num_heads)
        return reference.from_windows(out.unflatten(0, tiles[0].shape[:2]), size, window, None)

    return attention


def bidirectional() -> Callable[..., Tensor] | None:
    """flash-bidirectional-linear-attention on mapped features, where it is installed: no phi, no taps."""
    try:
        library = importlib.import_module("flash_bla.ops.linear_attn.fused")
    except ImportError:
        return None

    def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, *_: object) -> Tensor:
        return library.linear_attention(*(heads_of(t, num_heads) for t in (q.relu(), k.relu(), v)))

    return attention


def functions(shape: Shape) -> dict[str, Callable[..., Tensor]]:
    """What to time, by name."""
    found: dict[str, Callable[..., Tensor]] = {
        "flatten": torch.ops.flatten.attention,
        "eager": reference.attention,
        "torch.compile": torch.compile(reference.attention, dynamic=False),
        "fused softmax": softmax,
    }
    divides = shape.height % SOFTMAX_WINDOW == 0 and shape.width % SOFTMAX_WINDOW == 0
    if divides and not shape.prefix:
        found["softmax windows"] = softmax_windows(shape)
    if (other := bidirectional()) is not None:
        found["flash-bidirectional-linear-attention"] = other
    return found


def median_seconds(call: Callable[[int], object], repetitions: int) -> float:
    for i in range(3):
        call(i)
    times = []
    for i in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(i)
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times) * 1e-3


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda i: target.copy_(source), 20)


def measure(shape: Shape, repetitions: int, copy: float) -> Iterator[dict]:
    """One record for every function and direction. A function that fails is a record with its error."""
    buffers = Buffers(shape)
    error = verify(shape, buffers.tokens[0], buffers.parameters)
    for name, function in functions(shape).items():
        for direction in COMPULSORY:
            record = {
                "shape": shape.name, "batch": shape.batch, "dtype": shape.dtype, "direction": direction,
                "what": name, "error": error,
            }  # fmt: skip
            try:
                if direction == "forward":
                    with torch.no_grad():
                        seconds = median_seconds(lambda i, f=function: f(*buffers.arguments(i)), repetitions)
                else:
                    seconds = median_seconds(recorded(function, buffers), repetitions)
            except RuntimeError as failure:  # out of memory, or a compiler that is not there
                yield record | {"failed": str(failure).splitlines()[0]}
                continue
            rate = shape.compulsory_bytes(direction) / seconds
            yield record | {"us": seconds * 1e6, "GB/s": rate / 1e9, "of copy": rate / copy}


def table_row(shape: Shape, result: dict) -> str:
    cells = [f"{shape.name}, B={shape.batch}", shape.dtype, result["direction"], result["what"]]
    if "failed" in result:
        cells += [result["failed"], "", ""]
    else:
        cells += [f"{result['us']:.1f}", f"{result['GB/s']:.0f}", f"{result['of copy']:.0%}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--batches", nargs="*", type=int, help="instead of each call's own batch")
    parser.add_argument(
        "--quick", action="store_true", help="calls with at most 32 images, fewer repetitions"
    )
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "cuda_bench.py times a GPU and there is none; benchmarks/cuda_counters.py counts without one"
        )
    shapes = [replace(s, batch=b) for s in MODEL_CALLS for b in args.batches or [s.batch]]
    if args.quick:
        shapes = [s for s in shapes if s.batch <= 32]
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy / 1e9:.0f} GB/s\n")
    print("| shape | dtype | direction | what | us | GB/s | of copy |\n|" + " --- |" * 7)
    results = []
    for shape in shapes:
        for result in measure(shape, 20 if args.quick else 100, copy):
            results.append(result)
            print(table_row(shape, result), flush=True)
    if args.json:
        device = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy GB/s": copy / 1e9}
        args.json.write_text(json.dumps({**device, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
