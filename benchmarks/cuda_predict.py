"""Predicts how long the published models' calls take on a GPU, without one.

    python benchmarks/cuda_predict.py --gpus H100 A100 RTX4090 --output benchmarks/results/cuda_predicted.json
    python benchmarks/cuda_predict.py --shapes DeiT PVT --waves 1

Runs each call under the CUDA emulator (at $CUDAEMU, or on PATH) with its timing
model, which replays traced blocks on a model of a multiprocessor. Its documentation states its error on
published kernels: 7 to 16 % on average, up to 38 % for single kernels, 159 % for one. Every launch counts
1 us more. With --waves N only the first N waves of blocks are executed: quick, but the results are wrong, so
one image of each call is also run whole and compared with float64. The forward runs without gradients; the
backward is that of a recorded call with every gradient asked for. key_bias, scale and taps are float32 beside
half-precision tokens, as models pass them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from cuda_counters import emulator
from cuda_shapes import COMPULSORY, MODEL_CALLS, Shape, positional, random_parameters, random_tokens, verify

LAUNCH_US = 1.0
# GPU: (compute capability, bytes / s).
GPUS = {
    "H100": ("9.0", 3.35e12),
    "A100": ("8.0", 1.555e12),
    "RTX4090": ("8.9", 1.008e12),
    "A6000": ("8.6", 0.768e12),
}


def run_call(shape: Shape, direction: str, timing: Path) -> None:
    """In the emulated process: runs one call and leaves its launches in `timing`."""
    torch.manual_seed(0)
    *qkv, grad_out = random_tokens(shape, "cuda")
    inputs = [t.requires_grad_(direction == "backward") for t in (*qkv, *random_parameters(shape, "cuda"))]
    before = len(launches_in(timing))
    out = torch.ops.flatten.attention(*positional(shape, inputs[:3], inputs[3:]))
    if direction == "backward":
        before = len(launches_in(timing))
        torch.autograd.grad(out, inputs, grad_out)
    timing.write_text("\n".join(launches_in(timing)[before:]) + "\n")


def launches_in(timing: Path) -> list[str]:
    return timing.read_text().splitlines() if timing.exists() else []


def check_call(shape: Shape) -> None:
    """In an emulated process that executes every block: one image against float64."""
    torch.manual_seed(0)
    shape = replace(shape, batch=1)
    verify(shape, random_tokens(shape, "cuda"), random_parameters(shape, "cuda"))


def emulate(options: list[str], arguments: list[str]) -> None:
    """Runs this script under the emulator.

    Raises:
        SystemExit: it failed, with what it printed.
    """
    command = [emulator(), *options, "--no-race-check", "--", sys.executable, __file__, *arguments]
    environment = {**os.environ, "CUDAEMU_TIMING_RELIEF": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}:\n{done.stdout}{done.stderr}")


def predict(shape: Shape, direction: str, gpu: str, waves: int) -> dict:
    """The predicted time of one call in us, and its launches."""
    with tempfile.TemporaryDirectory() as folder:
        timing = Path(folder) / "timing.jsonl"
        options = ["--cc", GPUS[gpu][0], "--timing", str(timing), "--gpu", gpu]
        options += ["--timing-waves", str(waves)] if waves else []
        emulate(options, ["--call", shape.name, direction, str(timing)])
        launches = [json.loads(line) for line in launches_in(timing) if line]
    floor = shape.compulsory_bytes(direction) / GPUS[gpu][1] * 1e6
    return {
        "shape": shape.name, "batch": shape.batch, "dtype": shape.dtype, "direction": direction, "gpu": gpu,
        "us": sum(launch["us"] + LAUNCH_US for launch in launches), "floor_us": floor,
        "launches": [{"kernel": short_name(line["kernel"]), "us": line["us"]} for line in launches],
    }  # fmt: skip


def named(name: str) -> Shape:
    return next(shape for shape in MODEL_CALLS if shape.name == name)


def short_name(kernel: str) -> str:
    return kernel.removeprefix("void ").split("(")[0].replace("flatten::cuda::", "")


def table(results: list[dict]) -> str:
    lines = ["| call | B | GPU | direction | floor us | predicted us | of the floor |", "|" + " --- |" * 7]
    for r in results:
        cells = [r["shape"], r["batch"], r["gpu"], r["direction"], f"{r['floor_us']:.1f}", f"{r['us']:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {r['us'] / r['floor_us']:.1f}x |")
    return "\n".join(lines)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--gpus", nargs="*", default=["H100"], choices=list(GPUS))
    parser.add_argument(
        "--shapes", nargs="*", default=[""], help="only calls whose name contains one of these"
    )
    parser.add_argument("--waves", type=int, default=1, help="waves of blocks to execute; 0 for all")
    parser.add_argument("--output", type=Path, help="write the predictions as JSON here")
    # In an emulated process:
    parser.add_argument("--call", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--check", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        name, direction, timing = args.call
        run_call(named(name), direction, Path(timing))
        return
    if args.check:
        check_call(named(args.check))
        return
    results = []
    for gpu in args.gpus:
        for shape in MODEL_CALLS:
            if not any(part in shape.name for part in args.shapes):
                continue
            emulate(["--cc", GPUS[gpu][0]], ["--check", shape.name])
            for direction in COMPULSORY:
                results.append(predict(shape, direction, gpu, args.waves))
                print(
                    f"{gpu} {shape.name} {direction}: {results[-1]['us']:.1f} us", file=sys.stderr, flush=True
                )
    print(table(results))
    if args.output:
        partial = args.output.with_suffix(".partial")
        partial.write_text(json.dumps({"waves": args.waves, "results": results}, indent=1) + "\n")
        partial.replace(args.output)


if __name__ == "__main__":
    main()
