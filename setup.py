"""Builds flatten_ext's shared libraries with ninja; everything declarative is in pyproject.toml.

Three objects come out of csrc/:

    flatten_ext/lib/libflatten.so        schemas and CPU kernels; no Python in it
    flatten_ext/lib/libflatten_cuda.so   CUDA kernels; built when a CUDA compiler is found
    flatten_ext/_C.*.so                  pybind11: loads the first, reports how it was built

They use the LibTorch stable ABI only, so one build serves every torch from minimum_torch on. That, the
sources, cuda_archs and all else that CMakeLists.txt needs to know too stands in csrc/build_facts.txt and
csrc/cpu/isa/isas.inc.

Environment:
    FLATTEN_WITH_CUDA=0|1    never build the CUDA library | fail when it cannot be built
    TORCH_CUDA_ARCH_LIST     CUDA architectures, e.g. "8.0;9.0+PTX" (default: those of
                             cuda_archs, see above, that the compiler knows, and PTX of the highest)
    CUDA_HOME                the CUDA toolkit (default: nvcc on PATH, then pip's nvidia-cuda-nvcc)
    MAX_JOBS                 parallel compilations (default: one per core)
    FLATTEN_LINEINFO=1       source lines in the CUDA library, for profilers; several times as large
    FLATTEN_SANITIZE=address instrument the CPU library, for tests/sanitizer.sh
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEPFILE = "\n  depfile = $out.d\n  deps = gcc"


def build_facts() -> dict[str, list[str]]:
    lines = (CSRC / "build_facts.txt").read_text().splitlines()
    facts = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name.strip(): values.split() for name, _, values in facts}


FACTS = build_facts()
MINIMUM_TORCH = FACTS["minimum_torch"][0]
TENSOR_CORE_ARCH = float(FACTS["tensorcore_arch"][0])
CUDA_LIBRARY = "flatten_ext.lib.libflatten_cuda"


def sources(*facts: str) -> list[Path]:
    patterns = [pattern for fact in facts for pattern in FACTS[fact]]
    return [s for p in patterns for s in (sorted(CSRC.glob(p)) if "*" in p else [CSRC / p])]


def isa_flags() -> dict[Path, list[str]]:
    """The units of the instruction sets that the target's architecture has, and their compiler flags."""
    table = (CSRC / "cpu" / "isa" / "isas.inc").read_text()
    rows = re.findall(r"^FLATTEN_INSTRUCTION_SET\((\w+), (\w+), (.*)\)$", table, re.M)
    target = sysconfig.get_platform().replace("amd64", "x86_64")
    return {
        CSRC / "cpu" / "isa" / f"{name}.cpp": [f"-m{f}" for f in re.findall(r"FEATURE\((\w+)\)", features)]
        for name, architecture, features in rows
        if architecture == "any" or target.endswith(architecture)
    }


@dataclass
class CudaToolkit:
    home: Path
    nvcc: Path
    includes: list[Path]
    cudart: Path
    version: str
    archs: list[str]  # as in TORCH_CUDA_ARCH_LIST: "8.0", "9.0+PTX"
    flags: list[str]  # for every unit, where the compiler knows them

    def gencode(self, least: float = 0.0) -> list[str]:
        flags = []
        for arch in self.archs:
            name = arch.removesuffix("+PTX")
            if float(name) < least:
                continue
            number = name.replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if arch.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


class NoCuda(Exception):
    """Why the CUDA library is not built."""


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def cuda_home_candidates():
    """Toolkits, best first. An nvcc on PATH may be a wrapper script, so it is asked for its own TOP."""
    if os.environ.get("CUDA_HOME"):
        yield Path(os.environ["CUDA_HOME"])
        return
    if nvcc := shutil.which("nvcc"):
        dryrun = run(nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull)
        if top := re.search(r"^#\$ TOP=(.*)$", dryrun, re.M):
            yield Path(top[1].strip()).resolve()
    yield Path("/usr/local/cuda")
    for site in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]):
        yield from sorted(Path(site or ".").glob("nvidia/cu*[0-9]"), reverse=True)


def find_cuda() -> CudaToolkit:
    import torch

    if torch.version.cuda is None:  # ROCm's tensors, which call themselves cuda, take the plain formula
        build = f"a build for ROCm {torch.version.hip}" if torch.version.hip else "a CPU build"
        raise NoCuda(f"the torch to build against is {build}")
    homes = [home for home in cuda_home_candidates() if (home / "bin" / "nvcc").exists()]
    if not homes:
        raise NoCuda("no nvcc in CUDA_HOME, on PATH, in /usr/local/cuda or among pip's packages")
    home = homes[0]
    nvcc = home / "bin" / "nvcc"
    match = re.search(r"release (\d+)\.(\d+)", run(nvcc, "--version"))
    version = f"{match[1]}.{match[2]}" if match else "unknown"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise NoCuda(f"nvcc is of CUDA {version}, torch {torch.__version__} of CUDA {torch.version.cuda}")
    headers = [home / "include", *home.glob("targets/*/include")]
    includes = [path for path in headers if (path / "cuda_runtime.h").exists()]
    # pip's packages carry only libcudart.so.13, without the unversioned link that -lcudart wants.
    folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
    runtimes = [so for folder in folders for so in sorted(folder.glob("libcudart.so*"))]
    if not includes or not runtimes:
        raise NoCuda(f"{home} has nvcc but not cuda_runtime.h and libcudart.so")
    archs = cuda_archs(run(nvcc, "--list-gpu-arch").split(), version)
    flags = ["--compress-mode=size"] if "--compress-mode" in run(nvcc, "--help") else []  # since CUDA 12.8
    if switch("FLATTEN_LINEINFO"):
        flags.append("-lineinfo")
    return CudaToolkit(home, nvcc, includes, runtimes[0], version, archs, flags)


def cuda_archs(known: list[str], version: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, or the default architectures that this compiler knows and PTX of the last one."""

    def is_known(arch: str) -> bool:
        return f"compute_{arch.removesuffix('+PTX').replace('.', '')}" in known

    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        archs = re.split(r"[;, ]+", asked)
        if malformed := [a for a in archs if not re.fullmatch(r"\d+\.\d(\+PTX)?", a)]:
            raise NoCuda(f"TORCH_CUDA_ARCH_LIST has {malformed}, expected such as '8.0;9.0+PTX'")
        if unknown := [a for a in archs if not is_known(a)]:
            raise NoCuda(f"nvcc {version} does not know {unknown} of TORCH_CUDA_ARCH_LIST")
        return archs
    archs = [arch for arch in FACTS["cuda_archs"] if is_known(arch)]
    return [*archs[:-1], archs[-1] + "+PTX"]


def switch(name: str) -> bool:
    """An environment variable that is 0 (or unset) or 1."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} is {value!r}, expected 0 or 1")
    return value == "1"


def cuda_or_none() -> CudaToolkit | None:
    must = switch("FLATTEN_WITH_CUDA")
    if os.environ.get("FLATTEN_WITH_CUDA") == "0":
        return None
    try:
        return find_cuda()
    except NoCuda as reason:
        if must:
            raise SystemExit(f"FLATTEN_WITH_CUDA=1, but {reason}") from None
        print(f"flatten_ext: building without CUDA: {reason}", file=sys.stderr)
        return None


class Library(setuptools.Extension):
    """One shared object; sources are compiled by ninja, each with its own flags."""

    def __init__(self, name: str, sources: list[Path]):
        super().__init__(name, [str(s.relative_to(ROOT)) for s in sources])


class BuildLibraries(build_ext):
    """Writes a build.ninja for each Library and runs it, so that a change rebuilds only what it touched."""

    extensions: list[setuptools.Extension]

    def finalize_options(self) -> None:
        super().finalize_options()
        self.cuda = cuda_or_none()
        if self.cuda is None:
            self.extensions = [e for e in self.extensions if e.name != CUDA_LIBRARY]
        elif not self.cuda.gencode(TENSOR_CORE_ARCH):
            library = next(e for e in self.extensions if e.name == CUDA_LIBRARY)
            left_out = [str(s.relative_to(ROOT)) for s in sources("tensorcore_sources")]
            library.sources = [s for s in library.sources if s not in left_out]

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2].startswith("lib"):  # not a Python module: no ABI tag
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            (ROOT / self.get_ext_filename(ext.name)).parent.mkdir(parents=True, exist_ok=True)
        super().copy_extensions_to_source()

    def build_extension(self, ext: setuptools.Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(ext, output, folder))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([ninja(), "-C", str(folder), *jobs, *(["-v"] if self.verbose > 1 else [])], check=True)

    def ninja_file(self, ext: setuptools.Extension, output: Path, folder: Path) -> str:
        import torch

        torch_root = Path(torch.__path__[0])
        cxx = shlex.split(os.environ.get("CXX", "c++"))
        sanitize = sanitizer_flags()
        cxxflags = [
            *["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *sanitize],
            "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*map(int, MINIMUM_TORCH.split("."))),
            *["-isystem", str(torch_root / "include")],
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]
        ldflags = [*sanitize, *shlex.split(os.environ.get("LDFLAGS", ""))]
        libraries = [f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
        nvcc, nvccflags = "nvcc", ""
        name = ext.name.rpartition(".")[2]
        if name == "_C":
            import pybind11

            cxxflags += ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
            cxxflags += self.build_info()
            libraries = [str(output.parent / "lib" / "libflatten.so"), "-Wl,-rpath," + origin("lib")]
        if name == "libflatten_cuda":
            assert self.cuda is not None  # finalize_options dropped the extension otherwise
            includes = [flag for path in self.cuda.includes for flag in ("-isystem", str(path))]
            cxxflags += ["-DUSE_CUDA", *includes]
            if not self.cuda.gencode(TENSOR_CORE_ARCH):
                cxxflags.append("-DFLATTEN_WITHOUT_TENSOR_CORES")
            libraries += [f"-L{torch_root / 'lib'}", "-ltorch_cuda", str(self.cuda.cudart)]
            nvcc = str(self.cuda.nvcc)
            host = ["-ccbin", cxx[0], "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
            nvccflags = shlex.join(["-std=c++17", "-O3", *self.cuda.flags, *host])
        if sys.platform == "darwin":
            ldflags.append("-Wl,-install_name,@rpath/" + output.name)
        elif name != "_C":
            # Without a soname _C would remember the path that libflatten.so had when it was linked.
            ldflags += [f"-Wl,-soname,{output.name}", f"-Wl,--version-script={CSRC / 'exports.map'}"]
        shared = "-dynamiclib" if sys.platform == "darwin" and name != "_C" else "-shared"
        if sys.platform == "darwin" and name == "_C":
            shared = "-bundle -undefined dynamic_lookup"

        lines = [
            f"cxx = {shlex.join(cxx)}",
            f"cxxflags = {shlex.join(cxxflags)}",
            f"nvcc = {nvcc}",
            f"nvccflags = {nvccflags}",
            f"ldflags = {shlex.join(ldflags)}",
            f"libraries = {shlex.join(libraries).replace('$', '$$')}",
            f"rule cxx\n  command = $cxx -MMD -MF $out.d $cxxflags $isa -c $in -o $out{DEPFILE}",
            f"rule nvcc\n  command = $nvcc -MD -MF $out.d $nvccflags $gencode -c $in -o $out{DEPFILE}",
            f"rule link\n  command = $cxx {shared} $in -o $out $ldflags $libraries",
        ]
        objects, isa = [], isa_flags()
        for source in (ROOT / s for s in ext.sources):
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            target = f"{source.parent.name}_{source.name}.o"
            objects.append(target)
            lines.append(f"build {target}: {rule} {ninja_path(source)}")
            if rule == "nvcc":
                assert self.cuda is not None
                least = TENSOR_CORE_ARCH if source in sources("tensorcore_sources") else 0.0
                lines.append(f"  gencode = {shlex.join(self.cuda.gencode(least))}")
            if isa.get(source):
                lines.append(f"  isa = {shlex.join(isa[source])}")
        # What the linker reads besides: linked again when it changes.
        files = [ninja_path(Path(library)) for library in libraries if library.endswith(".so")]
        files.append(ninja_path(CSRC / "exports.map"))
        lines.append(f"build {ninja_path(output)}: link {' '.join(objects)} | {' '.join(files)}")
        return "\n".join(lines) + "\n"

    def build_info(self) -> list[str]:
        """What `python -m flatten_ext info` says of the build."""
        import torch

        facts = {
            "VERSION": self.distribution.get_version(),
            "BUILT_WITH_TORCH": torch.__version__,
            "MINIMUM_TORCH": MINIMUM_TORCH,
            "CUDA_VERSION": self.cuda.version if self.cuda else "",
            "CUDA_ARCHS": ";".join(self.cuda.archs) if self.cuda else "",
        }
        return [f'-DFLATTEN_{key}="{value}"' for key, value in facts.items()]


def sanitizer_flags() -> list[str]:
    asked = os.environ.get("FLATTEN_SANITIZE")
    return [f"-fsanitize={asked}", "-fno-omit-frame-pointer", "-g1"] if asked else []


def origin(folder: str) -> str:
    return ("@loader_path/" if sys.platform == "darwin" else "$ORIGIN/") + folder


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja() -> str:
    """The ninja on PATH, or the one of the pip package."""
    if found := shutil.which("ninja"):
        return found
    from ninja import BIN_DIR

    return str(Path(BIN_DIR) / "ninja")


runpy.run_path(str(CSRC / "cuda" / "make_units.py"))["write"]()
libflatten_sources = [*sources("host_sources", "cpu_sources", "cpu_kernel_sources"), *isa_flags()]
setuptools.setup(
    ext_modules=[
        Library("flatten_ext.lib.libflatten", libflatten_sources),
        Library(CUDA_LIBRARY, sources("host_sources", "cuda_sources", "tensorcore_sources")),
        Library("flatten_ext._C", [CSRC / "bindings.cpp"]),
    ],
    cmdclass={"build_ext": BuildLibraries},
)
