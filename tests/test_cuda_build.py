"""What the CUDA compiler made of the kernels: registers, spills, tensor-core instructions.

Reads the library that is there: machine code where it holds some for the architecture, else its PTX through
ptxas, for a part of the units. Skipped without a CUDA build or without the tools: the toolkit's, or pip's
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm (in the extra `test`), or those that come with triton.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from setup_py import load_setup_py

import flatten_ext

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(flatten_ext.__file__).parent / "lib" / "libflatten_cuda.so"
ARCHITECTURES = [80, 90]
# Without machine code for an architecture: the units of the shapes the paper's models have, and those whose
# kernels fill the registers.
REPRESENTATIVE = re.compile(
    r"forward_.*cubic|backward_(window_)?bf16_d(32|64)|backward_window_wide|heads_(bf16|fp16)_d(64|128)"
    r"|general_forward_float32|general_backward_float32|general_by_head_"
)
FAST = re.compile(r"flatten::cuda::tensorcore::")
TENSOR = re.compile(r"tensorcore::(forward|backward)_|heads::(accumulate|multiply|differentiate|correlate)")


def tool(name: str) -> str:
    candidates = [Path(p) / name for p in os.environ.get("PATH", "").split(os.pathsep)]
    candidates += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name]
    for site in sys.path:
        candidates += sorted(Path(site or ".").glob(f"nvidia/cu*/bin/{name}"))
        candidates.append(Path(site or ".") / "triton" / "backends" / "nvidia" / "bin" / name)
    for path in candidates:
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    pytest.skip(f"{name} was not found")


def run(*command: str, cwd: Path | None = None) -> str:
    folders = {str(Path(tool(name)).parent) for name in ("cuobjdump", "nvdisasm")}
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@dataclass
class Kernel:
    name: str
    registers: int
    stack: int
    spills: int
    tensor: bool | None = None  # None: not looked at


@cache
def demangle(name: str) -> str:
    return subprocess.run(
        [shutil.which("c++filt") or "cat"], input=name, capture_output=True, text=True
    ).stdout


def from_machine_code(arch: int) -> list[Kernel]:
    usage = run(tool("cuobjdump"), "--dump-resource-usage", "--gpu-architecture", f"sm_{arch}", str(LIBRARY))
    found = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    sass = run(tool("cuobjdump"), "--dump-sass", "--gpu-architecture", f"sm_{arch}", str(LIBRARY))
    tensor = {part.split("\n", 1)[0].strip(): "HMMA" in part for part in sass.split("Function : ")[1:]}
    return [
        Kernel(demangle(name), int(registers), int(stack), int(local), tensor[name])
        for name, registers, stack, local in found
    ]


def from_ptx(arch: int, folder: Path) -> list[Kernel]:
    listed = re.findall(r"PTX file +\d+: (\S+\.ptx)", run(tool("cuobjdump"), "--list-ptx", str(LIBRARY)))
    kernels = []
    for file in listed:
        if not REPRESENTATIVE.search(file):
            continue
        run(tool("cuobjdump"), "--extract-ptx", file, str(LIBRARY), cwd=folder)
        cubin = folder / f"{file}.cubin"
        said = run(tool("ptxas"), "-v", f"-arch=sm_{arch}", file, "-o", str(cubin), cwd=folder)
        sass = run(tool("cuobjdump"), "--dump-sass", str(cubin))
        tensor = {part.split("\n", 1)[0].strip(): "HMMA" in part for part in sass.split("Function : ")[1:]}
        pattern = (
            r"Compiling entry function '(\S+)' for.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers"
        )
        for name, stack, stores, loads, registers in re.findall(pattern, said, re.S):
            spills = int(stores) + int(loads)
            kernels.append(Kernel(demangle(name), int(registers), int(stack), spills, tensor[name]))
    return kernels


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
def kernels(request, tmp_path_factory) -> list[Kernel]:
    if not LIBRARY.exists():
        pytest.skip("this build has no CUDA kernels")
    arch = request.param
    held = run(tool("cuobjdump"), "--list-elf", str(LIBRARY))
    if f"sm_{arch}." in held:
        return from_machine_code(arch)
    found = from_ptx(arch, tmp_path_factory.mktemp(f"sm_{arch}"))
    if not found:
        pytest.skip(f"the library holds neither machine code for sm_{arch} nor PTX")
    return found


def fast(kernels: list[Kernel]) -> list[Kernel]:
    chosen = [k for k in kernels if FAST.search(k.name)]
    assert chosen, "no tensor-core kernels in the library"
    return chosen


def test_fast_paths_do_not_spill(kernels):
    spilling = {k.name: (k.stack, k.spills) for k in fast(kernels) if k.stack or k.spills}
    assert not spilling, spilling


def test_kernels_by_head_do_not_spill(kernels):
    by_head = [k for k in kernels if "_by_head<" in k.name]
    assert len(by_head) == 9, "state, three outputs; grad_state, grad_query, three grad_keys"
    spilling = {k.name: (k.stack, k.spills) for k in by_head if k.stack or k.spills}
    assert not spilling, spilling


def test_fast_paths_use_tensor_cores(kernels):
    products = [k for k in fast(kernels) if TENSOR.search(k.name)]
    assert products
    assert not [k.name for k in products if not k.tensor]


def test_registers_leave_room_for_the_blocks(kernels):
    """A multiprocessor has 65536: blocks of the general kernels are 128 threads, three of them fit at 168."""
    general = {
        k.name: k.registers for k in kernels if "flatten::cuda::general::" in k.name and "<float" in k.name
    }
    assert general
    assert max(general.values()) <= 168, general
    assert max(k.registers for k in fast(kernels)) <= 255


# ---- What is compiled, for which architectures ----


@pytest.fixture
def setup_py(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return load_setup_py()


CUDA_12_6 = [f"compute_{arch}" for arch in (50, 52, 60, 61, 70, 75, 80, 86, 87, 89, 90)]
CUDA_13_0 = [f"compute_{arch}" for arch in (75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120, 121)]


@pytest.mark.parametrize(
    ("known", "archs"),
    [
        (CUDA_12_6, ["7.5", "8.0", "8.6", "9.0+PTX"]),
        (CUDA_13_0, ["7.5", "8.0", "8.6", "9.0", "10.0", "11.0", "12.0+PTX"]),
    ],
)
def test_the_highest_architecture_comes_as_ptx(setup_py, known, archs):
    """Whatever the compiler knows: without PTX a later GPU would find no image at all."""
    assert setup_py.cuda_archs(known, "of this test") == archs


@pytest.mark.parametrize(("asked", "why"), [("8.0;13.0", "does not know"), ("Hopper", "expected such as")])
def test_an_architecture_that_cannot_be_built_is_refused(setup_py, monkeypatch, asked, why):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(setup_py.NoCuda, match=why):
        setup_py.cuda_archs(CUDA_13_0, "13.0")


def test_the_library_can_be_shipped():
    """A wheel of 100 MB is refused by the package index, and the next architecture is still to come."""
    if not LIBRARY.exists():
        pytest.skip("this build has no CUDA kernels")
    assert LIBRARY.stat().st_size < 90e6


def test_units_are_those_of_the_table():
    """csrc/cuda/units/ is in git: after a change of units.txt, make_units.py writes it anew."""
    folder = ROOT / "csrc" / "cuda"
    wanted = runpy.run_path(str(folder / "make_units.py"))["units"]()
    assert {path.name: path.read_text() for path in (folder / "units").iterdir()} == wanted
    assert len(wanted) == 59
