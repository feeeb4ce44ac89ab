"""What the CUDA kernels cost, counted: memory traffic, bank conflicts and instructions, without a GPU.

    python benchmarks/cuda_counters.py                       # every shape, forward and backward, as a table
    python benchmarks/cuda_counters.py --output docs/cuda_counters.md --json counters.json
    python benchmarks/cuda_counters.py --shapes 56x56 --directions forward --batch-divisor 8
    python benchmarks/cuda_counters.py --report a.json b.json    # one table of several runs' --json

Runs the operators under the CUDA emulator (at $CUDAEMU, or on PATH), which executes the
compiled PTX and counts exactly. The library must hold PTX that the emulated device takes: build it with
TORCH_CUDA_ARCH_LIST="8.0+PTX". The numbers are counts, the same on every machine; the times are predictions
from them, not measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from cuda_shapes import COMPULSORY, COUNTED, Shape

from flatten_ext import reference

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Gpu:
    name: str
    bandwidth: float  # bytes / s
    multiprocessors: int
    clock: float  # Hz

    def seconds(self, launch: dict) -> float:
        """The longest of the traffic, the issue slots (4 a cycle) and the shared wavefronts (1 a cycle)."""
        cycles = max(launch["warp_instructions"] / 4, launch["wavefronts"]) / self.multiprocessors
        return max(launch["dram_bytes"] / self.bandwidth, cycles / self.clock)


GPUS = [Gpu("A100", 1.555e12, 108, 1.41e9), Gpu("H100", 3.35e12, 132, 1.755e9)]


# ------------------------------------------------------------------------------------ under the emulator
def measure(shape: Shape, direction: str, dtype_name: str, divisor: int, stats: Path) -> dict:
    """Runs one call and returns its launches' counters, with the error of the first image."""
    torch.manual_seed(0)
    dtype = getattr(torch, dtype_name)
    batch = max(1, shape.batch // divisor)
    tokens, channels, heads = shape.height * shape.width, shape.channels, shape.heads
    head_dim = channels // heads
    size, window = (shape.height, shape.width), shape.window

    q, k, v, grad = (torch.randn(batch, tokens, channels).to(dtype) for _ in range(4))
    scale = torch.rand(channels) + 0.5
    weight, bias = torch.randn(head_dim, 1, 5, 5) * 0.2, torch.randn(head_dim)

    def arguments(images: slice, device: str, to: torch.dtype | None, taps: bool) -> list:
        moved = [t[images].to(device, to) for t in (q, k, v)]
        parameters = [t.to(device, to) for t in (scale, weight if taps else weight * 0, bias * taps)]
        moved = [t.requires_grad_() for t in moved]
        return [
            *moved,
            heads,
            parameters[0],
            None,
            parameters[1],
            parameters[2],
            size,
            window,
            None,
            3.0,
            1e-6,
        ]

    def error(got: torch.Tensor, want: torch.Tensor) -> float:
        return ((got.cpu().double() - want).norm() / want.norm()).item()

    errors = {}
    for taps in (True, False):
        one = slice(0, 1)
        call = arguments(one if not taps else slice(None), "cuda", None, taps)
        oracle = arguments(one, "cpu", torch.float64, taps)
        want = reference.attention(*oracle)
        q_, k_, v_, *options = (t.detach() if isinstance(t, torch.Tensor) else t for t in call)
        before = stats.stat().st_size if stats.exists() else 0
        if direction == "forward":
            out = torch.ops.flatten.attention(q_, k_, v_, *options)
            after = stats.stat().st_size
            found = error(out[one], want.detach())
        else:
            all_windows = replace(shape, batch=q_.shape[0]).windows
            out, state = torch.ops.flatten.attention_forward(q_, k_, v_, *options, all_windows)
            before = stats.stat().st_size
            mask = [True, True, True, True, False, True, True]
            g = grad.cuda()[: q_.shape[0]]
            got = torch.ops.flatten.attention_backward(g, q_, k_, v_, *options, state, mask)
            after = stats.stat().st_size
            gradients = torch.autograd.grad(want, oracle[:3], grad[one].double())
            found = max(error(a[one], b) for a, b in zip(got, gradients, strict=False))
        errors["with taps" if taps else "zero taps"] = found
        if taps:
            with stats.open() as file:
                file.seek(before)
                lines = file.read(after - before).splitlines()
    launches = [summarise(json.loads(line)) for line in lines]
    launches = [launch for launch in launches if "flatten" in launch["kernel"]]
    return {
        "shape": shape.name,
        "batch": batch,
        "direction": direction,
        "dtype": dtype_name,
        "token_channels": batch * tokens * channels,
        "compulsory_bytes": COMPULSORY[direction] * batch * tokens * channels * dtype.itemsize,
        "errors": errors,
        "launches": launches,
    }


def summarise(line: dict) -> dict:
    memory, shared = line["global"], line["shared"]
    blocks = line["grid"][0] * line["grid"][1] * line["grid"][2]
    return {
        "kernel": line["kernel"].removeprefix("void ").replace("(anonymous namespace)::", "").split("(")[0],
        "blocks": blocks,
        "threads": line["block"][0] * line["block"][1] * line["block"][2],
        "shared_bytes": line["dynamic_smem"] + line["static_smem"],
        "dram_bytes": 32 * (memory["unique_read_sectors"] + memory["unique_write_sectors"]),
        "sector_bytes": 32 * (memory["load_sectors"] + memory["store_sectors"]),
        "wavefronts": shared["load_wavefronts"] + shared["store_wavefronts"],
        "ideal_wavefronts": shared["load_wavefronts_ideal"] + shared["store_wavefronts_ideal"],
        "warp_instructions": line["warp_instructions"],
        "lane_instructions": line["lane_instructions"],
        "tensor_flops": line["flops"]["tensor"],
    }


# ------------------------------------------------------------------------------------------------ report
def total(call: dict, key: str) -> int:
    return sum(launch[key] for launch in call["launches"])


def row(call: dict, name: str, launches: list[dict]) -> str:
    part = {**call, "launches": launches}
    compulsory, elements = call["compulsory_bytes"], call["token_channels"]
    wavefronts = total(part, "wavefronts") / max(total(part, "ideal_wavefronts"), 1)
    times = [sum(gpu.seconds(launch) for launch in launches) * 1e6 for gpu in GPUS]
    cells = [
        name,
        f"{total(part, 'dram_bytes') / compulsory:.2f}",
        f"{total(part, 'sector_bytes') / compulsory:.2f}",
        f"{wavefronts:.2f}",
        f"{total(part, 'lane_instructions') / elements:.1f}",
        *(f"{time:.0f}" for time in times),
    ]
    return "| " + " | ".join(cells) + " |"


HAND_WRITTEN = "<!-- Written by hand from here on; what is above is made by benchmarks/cuda_counters.py. -->"


def report(calls: list[dict], commands: list[str]) -> str:
    gpus = [f"{g.name} {g.bandwidth / 1e12} TB/s, {g.multiprocessors} SMs, {g.clock / 1e9} GHz" for g in GPUS]
    lines = [
        "# What the CUDA kernels cost",
        "",
        "Counted by running the compiled kernels under the CUDA emulator at compute capability 8.0: no GPU",
        "was used. Counts are exact and the same on every machine. Times are **predictions** from them: per",
        "launch the longest of its memory traffic at the GPU's bandwidth, its instructions at 4 warp",
        "instructions a cycle and multiprocessor, and its shared-memory wavefronts at one. Launches and",
        "latencies cost nothing in them.",
        "",
        "- DRAM: distinct 32-byte sectors each launch touches, over the compulsory traffic: q, k, v, out",
        "  (4 N C) forward; q, k, v, g, dq, dk, dv (7 N C) backward, with S and m given and every gradient",
        "  asked for.",
        "- sectors: 32-byte sectors moved between multiprocessors and second-level cache, over the same.",
        "- wavefronts: shared-memory wavefronts over their conflict-free minimum.",
        "- instructions: PTX lane instructions for each (token, channel).",
        f"- GPUs: {'; '.join(gpus)}.",
        "",
        'Reproduce with a library built with TORCH_CUDA_ARCH_LIST="8.0+PTX":',
        "",
        *(f"    {command}" for command in commands),
        "",
        "Taps 5x5 shared by the heads, p = 3, key_bias None, float32 parameters. Errors are relative to",
        "float64 on the first image: the output's, or the worst of dq, dk, dv.",
    ]
    for direction, dtype in dict.fromkeys((c["direction"], c["dtype"]) for c in calls):
        head = ["shape", "launches", "error", "zero taps", "DRAM", "sectors", "wavefronts", "instructions"]
        head += [f"{gpu.name} us" for gpu in GPUS]
        lines += ["", f"## {direction.capitalize()}, {dtype}", "", "| " + " | ".join(head) + " |"]
        lines.append("|" + " --- |" * len(head))
        chosen = [c for c in calls if (c["direction"], c["dtype"]) == (direction, dtype)]
        for call in chosen:
            errors = call["errors"]
            name = f"{call['shape']}, B={call['batch']} | {len(call['launches'])} | "
            name += f"{errors['with taps']:.1e} | {errors['zero taps']:.1e}"
            lines.append(row(call, name, call["launches"]))
        lines += ["", "By kernel:", ""]
        head = ["shape", "kernel", "blocks x threads", "shared KiB", *head[4:]]
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for call in chosen:
            for launch in call["launches"]:
                kernel = launch["kernel"].replace("flatten::cuda::", "")
                name = f"{call['shape']} | `{kernel}` | {launch['blocks']} x {launch['threads']} | "
                name += f"{launch['shared_bytes'] / 1024:.1f}"
                lines.append(row(call, name, [launch]))
    return "\n".join(lines) + "\n"


def write(text: str, page: Path | None) -> None:
    """To the page, whose hand-written end stays; to the terminal where there is none."""
    if page is None:
        print(text)
        return
    _, mark, rest = (page.read_text() if page.exists() else "").partition(HAND_WRITTEN)
    page.write_text(f"{text}\n{mark}{rest}" if mark else text)


# ------------------------------------------------------------------------------------------------- main
def emulator() -> str:
    if found := shutil.which(os.environ.get("CUDAEMU") or "cudaemu"):
        return found
    raise SystemExit("the CUDA emulator was not found: set CUDAEMU to its launcher, or put cudaemu on PATH")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="*", default=[""], help="only shapes whose name contains one of these"
    )
    parser.add_argument("--directions", nargs="*", choices=list(COMPULSORY), default=list(COMPULSORY))
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16"], help="bfloat16, float16, float32")
    parser.add_argument("--batch-divisor", type=int, default=1, help="smaller batches, for a quick look")
    parser.add_argument("--threads", type=int, default=1, help="host threads of the emulator")
    parser.add_argument("--output", type=Path, help="write the Markdown table here instead of the terminal")
    parser.add_argument("--json", type=Path, help="write all counters here")
    parser.add_argument("--report", type=Path, nargs="+", help="only write the table of these --json files")
    parser.add_argument("--stats", type=Path, help=argparse.SUPPRESS)  # the emulated process
    args = parser.parse_args()
    if args.report:
        runs = [json.loads(path.read_text()) for path in args.report]
        write(
            report([c for run in runs for c in run["calls"]], [run["command"] for run in runs]), args.output
        )
        return
    if args.stats is None:
        with tempfile.TemporaryDirectory() as folder:
            stats = Path(folder) / "stats.jsonl"
            command = [
                emulator(),
                "--stats",
                str(stats),
                "--threads",
                str(args.threads),
                "--no-race-check",
                "--",
            ]
            command += [sys.executable, __file__, *sys.argv[1:], "--stats", str(stats)]
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
            raise SystemExit(subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode)
    shapes = [s for s in COUNTED if any(part in s.name for part in args.shapes)]
    calls = []
    for dtype in args.dtypes:
        for direction in args.directions:
            for shape in shapes:
                calls.append(measure(shape, direction, dtype, args.batch_divisor, args.stats))
                print(f"{direction} {dtype} {shape.name}", file=sys.stderr, flush=True)
    asked = [shlex.quote(arg) for arg in sys.argv[1:] if arg not in (str(args.stats), "--stats")]
    command = " ".join(["python", "benchmarks/cuda_counters.py", *asked])
    if args.json:
        args.json.write_text(json.dumps({"command": command, "calls": calls}, indent=1) + "\n")
    write(report(calls, [command]), args.output)


if __name__ == "__main__":
    main()
