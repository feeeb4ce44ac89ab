"""Says which CUDA kernels take the models' calls, and fails where any is a general one.

    python benchmarks/cuda_coverage.py                                      # on a GPU
    cudaemu --cc 8.6 -- python benchmarks/cuda_coverage.py --shapes PVT     # under the CUDA emulator

Every call is made forward and backward, with every gradient asked for and in half precision, at batch 1 and
64: kernels are chosen by the shape of an image, the GPU's shared memory and, for small windows, their number.
The calls are those of the published models at 224 and at 384 pixels, and of options that users have: spatial
reduction of keys (PVT), more channels, heads of other widths, other taps, powers and per-channel taps. Under
the emulator no kernel runs to its end: what is asked for has been logged by then, so that this takes seconds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
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


BATCHES = (1, 64)


def make_calls(calls: list[Call], dtypes: list[str]) -> None:
    """In a process with FLATTEN_LOG=1: every call, forward and backward, each announced on stderr."""
    import flatten_ext  # noqa: F401

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    def attempt(function: Callable, *arguments: object) -> None:
        try:
            function(*arguments)
        except RuntimeError as error:
            if not stopped_by_emulator(error):
                raise

    for call, dtype, batch in itertools.product(calls, dtypes, BATCHES):
        print(f"call {call.name}, {dtype}, B={batch}", file=sys.stderr, flush=True)
        tokens = call.prefix + call.size[0] * call.size[1]
        keys = call.keys or tokens
        window = call.window or (keys, 1)
        images = [
            empty(1, n, call.channels, dtype=getattr(torch, dtype)) for n in (tokens, keys, keys, tokens)
        ]
        q, k, v, grad_out = (image.expand(batch, -1, -1) for image in images)
        weight = bias = size = None
        if call.keys is None:
            kernels = call.channels if call.per_channel else call.channels // call.heads
            weight, bias, size = empty(kernels, 1, call.taps, call.taps), empty(kernels), call.size
        scale, key_bias = empty(call.channels), empty(window[0] * window[1], call.channels)
        options = (call.heads, scale, key_bias, weight, bias, size, call.window, None, call.p, 1e-6)
        mask = [True] * 5 + [weight is not None] * 2
        attempt(torch.ops.flatten.attention, q, k, v, *options)
        attempt(torch.ops.flatten.attention_backward, grad_out, q, k, v, *options, empty(0), mask)


def stopped_by_emulator(error: RuntimeError) -> bool:
    return "exceeded CUDAEMU_MAX_WARP_INSTS" in str(error)


def kernels_of(calls: list[Call], dtypes: list[str]) -> dict[str, list[str]]:
    """What FLATTEN_LOG writes of each call's two directions.

    Raises:
        SystemExit: a call failed, with what was printed.
    """
    command = [sys.executable, __file__, "--dtypes", *dtypes, "--run", *(call.name for call in calls)]
    limits = {"FLATTEN_LOG": "1", "CUDAEMU_MAX_WARP_INSTS": "1", "CUDAEMU_STICKY": "0"}
    done = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    found: dict[str, list[str]] = {}
    for line in done.stderr.splitlines():
        if line.startswith("call "):
            found[line.removeprefix("call ")] = lines = []
        elif line.startswith("flatten.attention"):
            lines.append(line.partition(" windows: ")[2])
    return found


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float16"])
    parser.add_argument(
        "--shapes", nargs="*", default=[""], help="only calls whose name contains one of these"
    )
    parser.add_argument("--run", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        make_calls([call for call in CALLS if call.name in args.run], args.dtypes)
        return
    calls = [call for call in CALLS if any(part in call.name for part in args.shapes)]
    found = kernels_of(calls, args.dtypes)
    general = 0
    for name, kernels in found.items():
        print(f"{name}: {'; '.join(kernels)}")
        if len(kernels) != 2:
            raise SystemExit(f"{name} was not logged in both directions")
        general += any("general::" in each for each in kernels)
    print(f"{len(found)} calls, {general} of them on the general kernels")
    if general:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
