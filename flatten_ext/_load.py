"""Loads the shared libraries, which register torch.ops.flatten."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch  # first: libflatten.so needs its libraries

LIBRARIES = Path(__file__).parent / "lib"


def _loaded_before() -> str | None:
    """Where torch.ops.flatten comes from when this process has it already, else None."""
    if package := getattr(torch.ops.flatten, "loaded_by", None):
        return package
    if not hasattr(torch.ops.flatten, "attention"):
        return None
    maps = Path("/proc/self/maps")  # a library that torch.ops.load_library brought
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.open()} if maps.exists() else set()
    found = sorted(path for path in paths if Path(path).name.startswith("libflatten."))
    if found == [str(LIBRARIES.resolve() / "libflatten.so")]:
        return None  # this package's own
    return ", ".join(found) or "a library of unknown place"


if _before := _loaded_before():
    raise ImportError(
        f"flatten_ext in {Path(__file__).parent} cannot be loaded: torch.ops.flatten is there already, from "
        f"{_before}. A process can load it once: take the other copy off sys.path, or start a new process."
    )

try:
    _C = importlib.import_module("flatten_ext._C")  # loads lib/libflatten.so
except (ImportError, RuntimeError) as error:
    raise ImportError(
        f"flatten_ext's compiled library cannot be loaded from {Path(__file__).parent}: {error}\n"
        "In a source checkout build it with `pip install -e .`; to use an installed flatten_ext, run Python "
        "from another folder."
    ) from error

torch.ops.flatten.__dict__["loaded_by"] = str(Path(__file__).parent)
build_info = _C.build_info
cpu_isa = _C.cpu_isa
cpu_isas = _C.cpu_isas


def _load_cuda() -> str | None:
    """Loads the CUDA kernels; returns why not if they cannot be."""
    library = LIBRARIES / "libflatten_cuda.so"
    if not library.exists():
        return "this build has no CUDA kernels (no CUDA compiler was found, or FLATTEN_WITH_CUDA=0)"
    if torch.version.cuda is None:
        kind = f"for ROCm {torch.version.hip}" if torch.version.hip else "without CUDA"
        return f"torch {torch.__version__} is a build {kind}"
    built, running = build_info()["cuda_version"], torch.version.cuda
    if built.split(".")[0] != running.split(".")[0]:
        return f"built with CUDA {built}, but torch {torch.__version__} runs on CUDA {running}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return str(error)
    return None


# None when the CUDA kernels are loaded, else the reason; CUDA tensors then run the plain-torch reference.
cuda_unavailable_reason: str | None = _load_cuda()
