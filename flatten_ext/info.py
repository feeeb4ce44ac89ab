"""Facts about this installation and machine: what a bug report and a benchmark's record need.

Imports torch and the standard library only.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from . import _load

__all__ = ["installation", "machine", "problem", "render"]

ENVIRONMENT = ("FLATTEN_", "OMP_", "MKL_", "KMP_", "PYTORCH_", "TORCH_", "CUDA_", "TORCHINDUCTOR_")
OPTIONAL = (
    "timm",
    "torchvision",
    "numpy",
    "matplotlib",
    "mlxtend",
    "typer",
    "rich",
    "performer-pytorch",
    "linformer",
    "flash-linear-attention",
    "natten",
)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _isa_in_use() -> str:
    try:
        return _load.cpu_isa()
    except RuntimeError as error:  # FLATTEN_CPU_ISA names a set that this machine cannot run
        return f"none ({error})"


def problem() -> str | None:
    """Why no operator can run on the CPU, or None: what a small call says, of a bad FLATTEN_CPU_ISA or
    FLATTEN_CPU_STREAM_FROM for example."""
    q, k, v = torch.ones(3, 1, 4, 16)  # rows of whole cache lines
    try:
        torch.ops.flatten.attention(q, k, v, 1)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What timings depend on: processor, threads, versions. JSON-ready; for the record of a benchmark."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu_name(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "cpu_isa": _isa_in_use(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flatten_ext": _load.build_info()["version"],
    }


def installation() -> dict[str, Any]:
    """Everything a bug report needs, as labelled facts in the order they are printed."""
    build = _load.build_info()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    extras = {name: version for name in OPTIONAL if (version := _version(name))}
    environment = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(ENVIRONMENT)}
    libraries = sorted(str(path) for path in _load.LIBRARIES.glob("libflatten*"))
    cuda_reason = _load.cuda_unavailable_reason
    broken = problem()
    return {
        **({"PROBLEM": broken} if broken else {}),
        "flatten_ext": f"{build['version']} in {Path(__file__).parent}",
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "built with": f"torch {build['built_with_torch']} (runs on {build['minimum_torch']} and later), "
        f"{build['compiler']}",
        "libraries": libraries,
        "CUDA kernels": "loaded" if cuda_reason is None else f"not loaded: {cuda_reason}",
        "other devices": "plain-torch reference",
        "built for CUDA": f"{build['cuda_version']}, architectures {build['cuda_archs']}"
        if build["cuda_version"]
        else "no",
        "CUDA devices": devices or "none",
        "CPU": f"{_cpu_name()}, {_usable_cores()} cores",
        "instruction set": f"{_isa_in_use()} in use; this CPU runs {', '.join(_load.cpu_isas())}",
        "threads": f"{torch.get_num_threads()} within an operator, {torch.get_num_interop_threads()} between",
        "optional packages": [f"{name} {version}" for name, version in extras.items()] or "none",
        "environment": [f"{name}={value}" for name, value in environment.items()] or "nothing set",
    }


def render(facts: dict[str, Any]) -> str:
    """The facts as plain text, one a line, lists one entry a line: ready to paste."""
    width = max(map(len, facts)) + 2
    lines = []
    for label, value in facts.items():
        values = value if isinstance(value, list) else [value]
        for i, entry in enumerate(values):
            lines.append(f"{label if i == 0 else '':<{width}}{entry}")
    return "\n".join(lines)
