"""What the shared objects ask of the outside world and what they offer it, read from their symbol tables.

One wheel serves every torch since the least supported one because nothing here names a C++ symbol of torch.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flatten_ext import _load

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("nm") is None, reason="reads ELF symbols with nm"
)

# Symbols carry the version of the library that has them, "memcpy@GLIBC_2.14"; torch's have none.
C_RUNTIME = r".*@+(GLIBC|GLIBCXX|CXXABI|GCC)_[\w.]+"
LOADER = r"_ITM_\w+|__gmon_start__|__cxa_finalize|__cxa_thread_atexit_impl|__tls_get_addr"
C_INTERFACE = (
    "torch/csrc/stable/c/shim.h",
    "torch/csrc/inductor/aoti_torch/c/shim.h",
    "torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h",  # what torch/csrc/stable/ops.h calls
)
CUDA_RUNTIME = r"(__)?cuda\w+(@+libcudart\.so\.\d+)?"
PYTHON = r"_?Py\w+"
OWN = r"_ZN7flatten3cpu(10isa_in_use|13runnable_isas)\w+"
# Of the audit's own terms: what would tie a build to one torch, one Python, one OpenMP.
FORBIDDEN = r"c10|_ZN2at|_ZNK2at|at::|torch::|GOMP_|omp_|__kmpc"

ALLOWED = {
    "libflatten": [C_RUNTIME, LOADER],
    "libflatten_cuda": [C_RUNTIME, LOADER, CUDA_RUNTIME],
    "_C": [C_RUNTIME, LOADER, PYTHON, OWN],
}
EXPORTED = {"libflatten": OWN, "libflatten_cuda": "flatten_cuda_level"}


def shared_objects() -> dict[str, Path]:
    package = Path(_load.__file__).parent
    return {p.name.partition(".")[0]: p for p in [*package.glob("lib/*.so"), *package.glob("_C.*.so")]}


def stable_functions() -> set[str]:
    """The stable ABI's C functions by name, from the headers that declare them. A version guard needs no look
    here: with TORCH_TARGET_VERSION set to the least torch, what is newer does not compile.
    """
    include = Path(torch.__path__[0]) / "include"
    text = "".join((include / header).read_text() for header in C_INTERFACE)
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", text))


def symbols(library: Path, which: str) -> list[str]:
    """Names in the dynamic symbol table; `which` is nm's --undefined-only or --defined-only."""
    listing = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in listing.splitlines()]


OBJECTS = shared_objects()


def test_all_objects_are_here() -> None:
    assert {"libflatten", "_C"} <= set(OBJECTS) <= set(ALLOWED)


@pytest.mark.parametrize("name", OBJECTS)
def test_undefined_symbols(name: str) -> None:
    allowed = re.compile("|".join(f"({pattern})" for pattern in ALLOWED[name]))
    undefined = set(symbols(OBJECTS[name], "--undefined-only"))
    assert len(undefined) > 10, "a library that needs nothing was not read right"
    if name != "_C":
        of_torch = undefined & stable_functions()
        assert len(of_torch) > 10, "the headers were not read right"
        undefined -= of_torch
    assert [s for s in undefined if not allowed.fullmatch(s)] == []
    assert [s for s in undefined if re.search(FORBIDDEN, s)] == []


@pytest.mark.parametrize("name", sorted(set(EXPORTED) & set(OBJECTS)))
def test_exported_symbols(name: str) -> None:
    exported = symbols(OBJECTS[name], "--defined-only")
    assert [s for s in exported if not re.fullmatch(EXPORTED[name], s)] == []
    assert len(exported) == (2 if name == "libflatten" else 1)


@pytest.mark.parametrize("name", OBJECTS)
def test_needed_libraries_have_no_path(name: str) -> None:
    """What was linked in the build folder is found beside the package, wherever that is installed."""
    listing = subprocess.run(["readelf", "-d", OBJECTS[name]], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listing.stdout)
    assert needed
    assert [library for library in needed if "/" in library] == []


def test_module_exports_its_entry() -> None:
    exported = symbols(OBJECTS["_C"], "--defined-only")
    assert [s for s in exported if not s.startswith("_Z")] == ["PyInit__C"]
    assert not any(re.search(FORBIDDEN + "|7flatten", s) for s in exported)
