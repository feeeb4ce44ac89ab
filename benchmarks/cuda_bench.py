"""Times the CUDA kernels on a GPU, after checking their results.

    python benchmarks/cuda_bench.py                    # every shape, batch 1, 8, 64 and 128, both directions
    python benchmarks/cuda_bench.py --quick            # one batch size, fewer repetitions
    python benchmarks/cuda_bench.py --json bench.json

Each call is compared with float64 first; one that is wrong is not timed. Times are medians between CUDA
events over buffers that rotate through more memory than the GPU's second-level cache. GB/s counts the
compulsory traffic (q, k, v, out forward; q, k, v, g, dq, dk, dv backward); "of copy" is its fraction of the
bandwidth that a large device-to-device copy reaches on the same GPU in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from cuda_counters import COMPULSORY, Shape
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flatten_ext import reference  # noqa: E402
from flatten_ext._torch.families import count_windows  # noqa: E402

SHAPES = [
    Shape("56x56 C=96 h=3", 0, 56, 56, 96, 3),
    Shape("56x56 C=64 h=1", 0, 56, 56, 64, 1),
    Shape("28x28 C=192 h=6", 0, 28, 28, 192, 6),
    Shape("28x28 C=128 h=2", 0, 28, 28, 128, 2),
    Shape("14x14 C=192 h=3", 0, 14, 14, 192, 3),
    Shape("14x14 C=384 h=12", 0, 14, 14, 384, 12),
    Shape("7x7 windows, 14x14 C=384 h=12", 0, 14, 14, 384, 12, (7, 7)),
    Shape("7x7 windows, 28x28 C=96 h=3", 0, 28, 28, 96, 3, (7, 7)),
]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
SOFTMAX_WINDOW = 7


class Buffers:
    """Tensors of one call, in as many copies as outgrow the second-level cache."""

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype):
        tokens, channels = shape.height * shape.width, shape.channels
        self.shape = shape
        self.bytes = batch * tokens * channels * dtype.itemsize
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.count = max(2, -(-2 * cache // (3 * self.bytes)))
        self.qkvg = [
            [torch.randn(batch, tokens, channels, device="cuda", dtype=dtype) for _ in range(4)]
            for _ in range(self.count)
        ]
        head_dim = channels // shape.heads
        self.parameters = [
            torch.rand(channels, device="cuda") + 0.5,
            None,
            torch.randn(head_dim, 1, 5, 5, device="cuda") * 0.2,
            torch.randn(head_dim, device="cuda"),
        ]

    def arguments(self, i: int, to: Callable[[Tensor], Tensor] = lambda t: t) -> list:
        q, k, v, _ = self.qkvg[i % self.count]
        parameters = [None if p is None else to(p) for p in self.parameters]
        shape = self.shape
        options = [(shape.height, shape.width), shape.window, None, 3.0, 1e-6]
        return [to(q), to(k), to(v), shape.heads, *parameters, *options]

    def forward(self, i: int) -> tuple[Tensor, Tensor]:
        """The output, and S and m of all windows."""
        arguments = self.arguments(i)
        windows = count_windows(arguments[0], self.shape.window)
        return torch.ops.flatten.attention_forward(*arguments, windows)


def softmax_windows(buffers: Buffers, i: int) -> Tensor:
    """What a Swin block runs instead: softmax attention in 7 x 7 windows, with partition and reverse."""
    shape = buffers.shape
    size, window = (shape.height, shape.width), (SOFTMAX_WINDOW, SOFTMAX_WINDOW)
    tiles = [reference.to_windows(t, size, window, None) for t in buffers.qkvg[i % buffers.count][:3]]
    q, k, v = (t.flatten(0, 1).unflatten(-1, (shape.heads, -1)).transpose(1, 2) for t in tiles)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return reference.from_windows(out.unflatten(0, tiles[0].shape[:2]), size, window, None)


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


def verify(buffers: Buffers, dtype: torch.dtype) -> None:
    """The first image, forward and backward, against float64. Raises if it is wrong."""

    def error(got: Tensor, want: Tensor) -> float:
        return ((got.double() - want).norm() / want.norm()).item()

    arguments = buffers.arguments(0)
    g = buffers.qkvg[0][3]
    out, state = buffers.forward(0)
    got = torch.ops.flatten.attention_backward(g, *arguments, state, [True] * 3 + [False] * 4)
    one = buffers.arguments(0, lambda t: t[:1].double() if t.dim() == 3 else t.double())
    one[:3] = [t.requires_grad_() for t in one[:3]]
    want = reference.attention(*one)
    gradients = torch.autograd.grad(want, one[:3], g[:1].double())
    errors = [error(out[:1], want.detach()), *(error(a[:1], b) for a, b in zip(got, gradients, strict=True))]
    if not max(errors) < TOLERANCE[dtype]:
        raise SystemExit(f"{buffers.shape.name}: relative errors {errors} against float64: not timed")


def candidates(buffers: Buffers, direction: str) -> dict[str, Callable[[int], object]]:
    """What to time, by name; each takes the number of the repetition."""
    op = torch.ops.flatten
    compiled = torch.compile(reference.attention, dynamic=False)
    if direction == "forward":
        calls = {
            "flatten": lambda i: op.attention(*buffers.arguments(i)),
            "eager": lambda i: reference.attention(*buffers.arguments(i)),
            "torch.compile": lambda i: compiled(*buffers.arguments(i)),
        }
        if buffers.shape.height % SOFTMAX_WINDOW == 0 and buffers.shape.width % SOFTMAX_WINDOW == 0:
            calls["softmax windows"] = lambda i: softmax_windows(buffers, i)
        return calls
    states = [buffers.forward(i)[1] for i in range(buffers.count)]
    mask = [True, True, True, True, False, True, True]

    def recorded(function) -> Callable[[int], object]:
        graphs = []
        for i in range(buffers.count):
            arguments = [
                t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in buffers.arguments(i)
            ]
            inputs = [t for t in arguments if isinstance(t, Tensor)]
            graphs.append((function(*arguments), inputs, buffers.qkvg[i][3]))

        def backward(i: int):
            out, inputs, g = graphs[i % buffers.count]
            return torch.autograd.grad(out, inputs, g, retain_graph=True)

        return backward

    return {
        "flatten": lambda i: op.attention_backward(
            buffers.qkvg[i % buffers.count][3], *buffers.arguments(i), states[i % buffers.count], mask
        ),
        "eager": recorded(reference.attention),
        "torch.compile": recorded(compiled),
    }


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 64, 128])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--quick", action="store_true", help="batch 8, bfloat16, fewer repetitions")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "cuda_bench.py times a GPU and there is none; benchmarks/cuda_counters.py counts without one"
        )
    if args.quick:
        args.batches, args.dtypes = [8], ["bfloat16"]
    repetitions = 20 if args.quick else 100
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy / 1e9:.0f} GB/s\n")
    print("| shape | dtype | direction | what | us | GB/s | of copy |\n|" + " --- |" * 7)
    results = []
    for dtype_name in args.dtypes:
        dtype = getattr(torch, dtype_name)
        for shape in SHAPES:
            for batch in args.batches:
                buffers = Buffers(shape, batch, dtype)
                verify(buffers, dtype)
                for direction in COMPULSORY:
                    for name, call in candidates(buffers, direction).items():
                        seconds = median_seconds(call, repetitions)
                        rate = COMPULSORY[direction] * buffers.bytes / seconds
                        result = {
                            "shape": shape.name,
                            "batch": batch,
                            "dtype": dtype_name,
                            "direction": direction,
                            "what": name,
                            "us": seconds * 1e6,
                            "GB/s": rate / 1e9,
                            "of copy": rate / copy,
                        }
                        results.append(result)
                        print(
                            f"| {shape.name}, B={batch} | {dtype_name} | {direction} | {name} | "
                            f"{seconds * 1e6:.1f} | {rate / 1e9:.0f} | {rate / copy:.0%} |",
                            flush=True,
                        )
    if args.json:
        device = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy GB/s": copy / 1e9}
        args.json.write_text(json.dumps({**device, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
