"""The first run on a GPU: are the kernels right there, how fast are they, and is that what was predicted?

    python benchmarks/first_gpu_run.py                  # builds for this GPU if need be; under 9 minutes
    python benchmarks/first_gpu_run.py --wheel FILE     # installs a prebuilt wheel instead of building
    python benchmarks/first_gpu_run.py --seconds 300 --output h200

Needs torch 2.11 or newer with CUDA, and no network. Three steps, each of which is reported even if a later
one fails: `flatten_ext.self_check("cuda")` and the GPU tests (where pytest is installed); the published
models' calls, forward and backward, against eager, torch.compile and fused softmax, beside the predicted
time; and counters of Nsight Compute, where `ncu` is on PATH. Leaves OUTPUT.json and OUTPUT.md, whatever
happens.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PREDICTED = ROOT / "benchmarks" / "results" / "cuda_predicted.json"
# Parts of the time left that the tests and each timed call may take.
TESTS_SHARE = 0.45
NCU_SECONDS = 60
NCU_METRICS = {
    "dram__bytes.sum": "DRAM bytes",
    "smsp__inst_executed.sum": "warp instructions",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum": "shared wavefronts",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
}


class Report:
    """What was found so far, in two files that are written anew after every step."""

    def __init__(self, output: Path):
        self.output = output
        self.facts: dict[str, Any] = {}
        output.parent.mkdir(parents=True, exist_ok=True)
        self.write()  # a place that cannot be written shows before the work, not after

    def add(self, name: str, value: Any) -> None:
        self.facts[name] = value
        self.write()

    def write(self) -> None:
        for suffix, text in (
            (".json", json.dumps(self.facts, indent=1) + "\n"),
            (".md", markdown(self.facts)),
        ):
            partial = self.output.with_suffix(suffix + ".partial")
            partial.write_text(text)
            partial.replace(self.output.with_suffix(suffix))


def markdown(facts: dict[str, Any]) -> str:
    lines = ["# First run on a GPU", ""]
    for name in ("gpu", "compute capability", "torch", "flatten_ext", "build", "copy GB/s"):
        if name in facts:
            lines.append(f"- {name}: {facts[name]}")
    if "check" in facts:
        lines += ["", "## Check", "", "```", facts["check"], "```"]
    if "tests" in facts:
        lines += ["", "## GPU tests", "", "```", facts["tests"], "```"]
    if facts.get("timings"):
        lines += [
            "",
            "## Times",
            "",
            "| call | direction | what | us | of copy | predicted us |",
            "|" + " --- |" * 6,
        ]
        for r in facts["timings"]:
            cells = [f"{r['shape']}, B={r['batch']} {r['dtype']}", r["direction"], r["what"]]
            if "failed" in r:
                cells += [r["failed"], "", ""]
            else:
                predicted = r.get("predicted us")
                cells += [
                    f"{r['us']:.1f}",
                    f"{r['of copy']:.0%}",
                    "" if predicted is None else f"{predicted:.1f}",
                ]
            lines.append(f"| {' | '.join(cells)} |")
    if "ncu" in facts:
        lines += ["", "## Nsight Compute", ""]
        if isinstance(facts["ncu"], str):
            lines.append(facts["ncu"])
        else:
            lines += [
                "| kernel | " + " | ".join(NCU_METRICS.values()) + " |",
                "|" + " --- |" * (1 + len(NCU_METRICS)),
            ]
            for kernel in facts["ncu"]:
                cells = [kernel["kernel"], *(f"{kernel.get(m, float('nan')):.4g}" for m in NCU_METRICS)]
                lines.append(f"| {' | '.join(cells)} |")
    for name in ("not timed", "failed"):
        if facts.get(name):
            lines += ["", f"{name}: {facts[name]}"]
    return "\n".join(lines) + "\n"


def run(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Exit status and output; status -1 when the time was up."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env = {**os.environ, "PYTHONPATH": path, **environment}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
        return process.returncode, output
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return -1, output + f"\n(stopped after {seconds:.0f} s)"


def loads_for(capability: tuple[int, int]) -> bool:
    """Whether a flatten_ext that is here already has kernels for this GPU."""
    script = (
        "import flatten_ext, sys\n"
        "from flatten_ext import _load\n"
        "archs = _load.build_info()['cuda_archs'].replace('+PTX', '').split(';')\n"
        f"loads = '{capability[0]}.{capability[1]}' in archs and _load.cuda_unavailable_reason is None\n"
        "sys.exit(0 if loads else 1)"
    )
    return run([sys.executable, "-c", script], 120)[0] == 0


def install(capability: tuple[int, int], wheel: Path | None, seconds: float) -> str:
    """Makes flatten_ext importable with kernels for this GPU. Returns how.

    Raises:
        RuntimeError: it could not be built, with the end of what the compiler said.
    """
    start = time.monotonic()
    if wheel is not None:
        status, output = run([sys.executable, "-m", "pip", "install", "--no-deps", str(wheel)], seconds)
        how = f"wheel {wheel.name}"
    elif loads_for(capability):
        return "was built already"
    else:
        arch = f"{capability[0]}.{capability[1]}"
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        status, output = run(command, seconds, TORCH_CUDA_ARCH_LIST=arch, FLATTEN_WITH_CUDA="1")
        how = f"built in place for {arch}"
    if status:
        raise RuntimeError(f"{how} failed:\n{output[-3000:]}")
    return f"{how} in {time.monotonic() - start:.0f} s"


def gpu_tests(seconds: float) -> str:
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed: not run"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "tests/gpu",
        "--no-header",
        "-p",
        "no:cacheprovider",
    ]
    status, output = run(command, seconds)
    tail = "\n".join(output.strip().splitlines()[-15:])
    return f"exit status {status}\n{tail}"


def predictions(gpu: str) -> dict[tuple[str, str], float]:
    """Predicted us by (call, direction), for the GPU of this name if there are any."""
    if not PREDICTED.exists():
        return {}
    results = json.loads(PREDICTED.read_text())["results"]
    return {
        (r["shape"], r["direction"]): r["us"]
        for r in results
        if r["gpu"].lower() in gpu.lower().replace(" ", "")
    }


def timings(deadline: float, report: Report, largest_batch: int) -> None:
    """Times call after call until the time is up."""
    import torch
    from cuda_bench import copy_bandwidth, measure
    from cuda_shapes import MODEL_CALLS

    copy = copy_bandwidth()
    report.add("copy GB/s", round(copy / 1e9))
    predicted = predictions(torch.cuda.get_device_name())
    results: list[dict] = []
    for i, model_call in enumerate(MODEL_CALLS):
        shape = replace(model_call, batch=min(model_call.batch, largest_batch))
        if time.monotonic() > deadline:
            report.add("not timed", ", ".join(s.name for s in MODEL_CALLS[i:]))
            return
        try:
            for result in measure(shape, 30, copy):
                if result["what"] == "flatten" and shape == model_call:
                    result["predicted us"] = predicted.get((shape.name, result["direction"]))
                results.append(result)
                report.add("timings", results)
        except ArithmeticError as error:  # a wrong result: not timed
            results.append(
                {"shape": shape.name, "batch": shape.batch, "dtype": shape.dtype, "direction": "both",
                 "what": "flatten", "failed": str(error)}
            )  # fmt: skip
            report.add("timings", results)
        torch.cuda.empty_cache()


def ncu(seconds: float) -> str | list[dict]:
    """Counters of one forward and backward of the first call in the list, for each kernel."""
    tool = shutil.which("ncu")
    if tool is None:
        return "ncu is not on PATH: no counters"
    script = (
        "import sys; sys.path.insert(0, 'benchmarks')\n"
        "import torch\n"
        "from cuda_shapes import *\n"
        "shape = MODEL_CALLS[0]\n"
        "inputs = random_tokens(shape, 'cuda')[:3] + random_parameters(shape, 'cuda')\n"
        "inputs = [t.requires_grad_() for t in inputs]\n"
        "out = torch.ops.flatten.attention(*positional(shape, inputs[:3], inputs[3:]))\n"
        "torch.autograd.grad(out, inputs, torch.ones_like(out))\n"
    )
    command = [tool, "--csv", "--kernel-name", "regex:flatten|forward_|backward_|reduce_state|sum_parameters"]
    command += ["--metrics", ",".join(NCU_METRICS), sys.executable, "-c", script]
    status, output = run(command, seconds)
    rows = list(csv.DictReader(line for line in output.splitlines() if line.startswith('"')))
    if status or not rows:
        return f"ncu gave no counters (exit status {status}): {output.strip()[-300:]}"
    kernels: dict[str, dict] = {}
    for row in rows:
        kernel = kernels.setdefault(row["ID"], {"kernel": re.sub(r"\(.*", "", row["Kernel Name"])})
        kernel[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return list(kernels.values())


def attempt(report: Report, name: str, step: Callable[[], Any]) -> bool:
    """Runs a step and reports what it returns, or how it failed."""
    print(f"{name} ...", flush=True)
    try:
        value = step()
    except Exception as error:  # the steps after it may still tell something
        report.add("failed", f"{name}: {type(error).__name__}: {error}")
        print(f"  failed: {error}", flush=True)
        return False
    if value is not None:
        report.add(name, value)
    return True


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--wheel", type=Path, help="install this wheel instead of building")
    parser.add_argument("--seconds", type=float, default=520.0, help="the time that all of it may take")
    parser.add_argument("--largest-batch", type=int, default=128, help="less for a GPU of little memory")
    parser.add_argument(
        "--output", type=Path, default=Path("first_gpu_run"), help="name of the .json and .md"
    )
    args = parser.parse_args()
    import torch

    deadline = time.monotonic() + args.seconds
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no CUDA device")
    if args.wheel is not None and not args.wheel.is_file():
        raise SystemExit(f"--wheel {args.wheel} is not a file")
    capability = torch.cuda.get_device_capability()
    report = Report(args.output)
    report.add("gpu", torch.cuda.get_device_name())
    report.add("compute capability", f"{capability[0]}.{capability[1]}")
    report.add("torch", f"{torch.__version__} (CUDA {torch.version.cuda})")

    def left() -> float:
        return deadline - time.monotonic()

    if not attempt(report, "build", lambda: install(capability, args.wheel, left() * 0.6)):
        raise SystemExit(1)
    if args.wheel is None:
        sys.path.insert(0, str(ROOT))
    sys.path.insert(0, str(ROOT / "benchmarks"))

    def check() -> str:
        import flatten_ext

        report.add("flatten_ext", flatten_ext.__version__)
        return str(flatten_ext.self_check("cuda"))

    attempt(report, "check", check)
    attempt(report, "tests", lambda: gpu_tests(left() * TESTS_SHARE))
    attempt(report, "times", lambda: timings(deadline - NCU_SECONDS, report, args.largest_batch))
    attempt(report, "ncu", lambda: ncu(max(left(), NCU_SECONDS / 2)))
    print(markdown(report.facts))
    print(f"Written to {args.output.with_suffix('.json')} and {args.output.with_suffix('.md')}.")


if __name__ == "__main__":
    main()
