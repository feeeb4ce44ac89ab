"""Says which CUDA kernels take the models' calls, and fails where any is a general one.

    python benchmarks/cuda_coverage.py                                      # on a GPU
    cudaemu --cc 8.6 -- python benchmarks/cuda_coverage.py --shapes PVT     # under the CUDA emulator

Every call runs forward and backward, with every gradient asked for, at batch 1 and in half precision:
kernels are chosen by the shape of an image, the GPU's shared memory and, for small windows, their number.
The calls are those of the published models at 224 and at 384 pixels, and of options that users have:
spatial reduction of keys (PVT), more channels, heads of other widths, other taps, powers and per-channel
taps.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@dataclass(frozen=True)
class Call:
    name: str
    size: tuple[int, int]
    channels: int
    heads: int
    prefix: int = 0
    window: tuple[int, int] | None = None
    keys: int | None = None  # other than the queries; then without taps
    taps: int = 5
    per_channel: bool = False
    p: float = 3.0


CALLS = [
    Call("Swin-T 1", (56, 56), 96, 3),
    Call("Swin-T 2", (28, 28), 192, 6),
    Call("Swin-B 1", (56, 56), 128, 4),
    Call("Swin-B 2", (28, 28), 256, 8),
    Call("Swin-B/384 1", (96, 96), 128, 4),
    Call("Swin-B/384 2", (48, 48), 256, 8),
    Call("Swin-L/384 4", (12, 12), 1536, 48),
    Call("Swin windows", (14, 14), 384, 12, window=(7, 7)),
    Call("Swin-B windows", (14, 14), 512, 16, window=(7, 7)),
    Call("CSwin-T 1", (56, 56), 64, 2),
    Call("CSwin-T 2", (28, 28), 128, 4),
    Call("CSwin-B 1", (56, 56), 96, 4),
    Call("CSwin-B 2", (28, 28), 192, 8),
    Call("CSwin-B/384 2", (48, 48), 192, 8),
    Call("DeiT-T", (14, 14), 192, 3, prefix=1),
    Call("DeiT-S", (14, 14), 384, 6, prefix=1),
    Call("DeiT-B", (14, 14), 768, 12, prefix=1),
    Call("DeiT-B/384", (24, 24), 768, 12, prefix=1),
    Call("PVT 1", (56, 56), 64, 1),
    Call("PVT 2", (28, 28), 128, 2),
    Call("PVT 3", (14, 14), 320, 5),
    Call("PVT 4", (7, 7), 512, 8),
    Call("PVT/384 3", (24, 24), 320, 5),
    Call("PVT 1, sr_ratio 8", (56, 56), 64, 1, keys=49),
    Call("PVT 2, sr_ratio 4", (28, 28), 128, 2, keys=49),
    Call("PVT 3, sr_ratio 2", (14, 14), 320, 5, keys=49),
    Call("heads of 48", (14, 14), 384, 8),
    Call("heads of 96", (14, 14), 384, 4),
    Call("heads of 128", (14, 14), 256, 2, taps=7),
    Call("per-channel taps, p = 2.5", (14, 14), 192, 3, prefix=5, taps=7, per_channel=True, p=2.5),
]


def run(call: Call, dtype: torch.dtype) -> None:
    """In a process with FLATTEN_LOG=1: the call, forward and backward."""
    import flatten_ext  # noqa: F401

    tokens = call.prefix + call.size[0] * call.size[1]
    keys = call.keys or tokens
    window = call.window or (keys, 1)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype).cuda().requires_grad_()

    q, k, v = (random(1, n, call.channels, dtype=dtype) for n in (tokens, keys, keys))
    scale = (torch.rand(call.channels) + 0.5).cuda().requires_grad_()
    key_bias = random(window[0] * window[1], call.channels)
    weight = bias = size = None
    if call.keys is None:
        kernels = call.channels if call.per_channel else call.channels // call.heads
        weight, bias, size = random(kernels, 1, call.taps, call.taps), random(kernels), call.size
    out = torch.ops.flatten.attention(
        q, k, v, call.heads, scale, key_bias, weight, bias, size, call.window, None, call.p, 1e-6
    )
    inputs = [t for t in (q, k, v, scale, key_bias, weight, bias) if t is not None]
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def kernels_of(call: Call, dtype: str) -> list[str]:
    """What FLATTEN_LOG writes of the call's two directions.

    Raises:
        SystemExit: it failed, with what it printed.
    """
    command = [sys.executable, __file__, "--run", call.name, dtype]
    environment = {**os.environ, "FLATTEN_LOG": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("flatten.attention")]
    if done.returncode or len(lines) != 2:
        raise SystemExit(f"{call.name}, {dtype}:\n{done.stdout}{done.stderr}")
    return [line.partition(" windows: ")[2] for line in lines]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float16"])
    parser.add_argument(
        "--shapes", nargs="*", default=[""], help="only calls whose name contains one of these"
    )
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(next(call for call in CALLS if call.name == args.run[0]), getattr(torch, args.run[1]))
        return
    general = 0
    for call in CALLS:
        if not any(part in call.name for part in args.shapes):
            continue
        for dtype in args.dtypes:
            forward, backward = kernels_of(call, dtype)
            print(f"{call.name}, {dtype}: {forward}; {backward}", flush=True)
            general += "general::" in forward + backward
    if general:
        raise SystemExit(f"{general} calls are on the general kernels")


if __name__ == "__main__":
    main()
