"""The CUDA library compiles for every default architecture, and knows at run time which images it has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from building import ROOT, run
from setup_py import load_setup_py

EMULATOR = shutil.which(os.environ.get("CUDAEMU") or "cudaemu")

KINDS = [
    "general_conv_float32",
    "general_backward_key_bfloat16",
    "forward_bf16_d16_power",
    "forward_window_bf16_d16_power",
    "backward_bf16_d16",
    "backward_window_fp16_d16",
    "reduce_state",
]


@pytest.fixture(scope="module")
def setup_py() -> Iterator[ModuleType]:
    """setup.py with the default architectures; skips where it finds no CUDA compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        module = load_setup_py()
        try:
            module.find_cuda()
        except module.NoCuda as reason:
            pytest.skip(str(reason))
        yield module


@pytest.mark.parametrize("kind", KINDS)
def test_units_compile_for_every_default_architecture(setup_py, tmp_path, kind):
    """To PTX, unoptimised: each unit for those of the architectures that it is built for, in some seconds."""
    cuda = setup_py.find_cuda()
    [unit] = (ROOT / "csrc" / "cuda").rglob(f"{kind}.cu")
    least = setup_py.TENSOR_CORE_ARCH if unit in setup_py.sources("tensorcore_sources") else 0.0
    built_for = re.findall(r"code=sm_(\d+)", " ".join(cuda.gencode(least)))
    assert ("75" in built_for) == kind.startswith("general")
    assert set(built_for) | {"75"} == set(re.findall(r"sm_(\d+)", " ".join(cuda.gencode())))
    includes = [flag for path in cuda.includes for flag in ("-isystem", str(path))]
    # One PTX in a fat binary for each: the compiler's front end, where unknown names show, runs for each.
    archs = [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in built_for]
    done = subprocess.run(
        [cuda.nvcc, "-std=c++17", "-Xcicc", "-O0", *includes, *archs, "-fatbin", unit, "-o", tmp_path / "x"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def oldest(setup_py: ModuleType, source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout built for 7.5 alone, without tensor-core kernels; its machine code is not optimised."""
    if EMULATOR is None:
        pytest.skip("no CUDA emulator: CUDAEMU is not set and cudaemu not on PATH")
    folder = shutil.copytree(source_tree, tmp_path_factory.mktemp("oldest") / "source")
    env = {
        "FLATTEN_WITH_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "7.5+PTX", "CXXFLAGS": "-O0",
        "NVCC_APPEND_FLAGS": "-Xptxas -O0",
    }  # fmt: skip
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=folder, env=env)
    return folder


# Under 8.0 the general kernels run from PTX of 7.5, under 7.5 with its 64 KiB of shared memory.
@pytest.mark.parametrize(
    ("capability", "file", "chosen"),
    [
        ("8.0", "test_oracle.py", "saved_state or requested_gradients_in_half_precision or strided"),
        ("7.5", "test_limits.py", "shared_memory"),
    ],
)
def test_ptx_of_an_older_architecture(oldest: Path, capability: str, file: str, chosen: str) -> None:
    """Tensor-core kernels without an image are not launched: the general ones take their calls."""
    emulated = [EMULATOR, "--cc", capability, "--no-sticky", "--", sys.executable, "-m", "pytest"]
    options = ["-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", chosen]
    told = run(*emulated, *options, f"tests/gpu/{file}", cwd=oldest, env={"PYTHONPATH": str(oldest)})
    assert re.search(r"\d+ passed", told)
    assert "skipped" not in told
