#!/usr/bin/env bash
# Sets up a virtual environment, builds flatten-ext in place and runs every test that this machine can.
#
#   VENV=PATH      the environment to make or reuse (default: .venv)
#   PYTHON=PATH    the interpreter to make it with (default: python3)
#   CUDAEMU=PATH   a CUDA emulator's launcher, to run the GPU tests without a GPU
#                  (default: cudaemu on PATH, if it is there)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

step() { printf '\n== %s (%(%H:%M:%S)T)\n' "$1" -1; }

venv=${VENV:-.venv}
emulator=${CUDAEMU:-$(command -v cudaemu || true)}

step "environment: $venv"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
venv=$(cd "$venv" && pwd)
export PATH="$venv/bin:$PATH"
# Without a GPU the CUDA library is built for what the emulator runs; with one, for what it is.
if ! command -v nvidia-smi >/dev/null; then
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-8.0+PTX}
  export FLATTEN_LINEINFO=${FLATTEN_LINEINFO:-1} # its reports then name source lines
fi
# The build requirements of pyproject.toml first: an isolated build would fetch torch, gigabytes, a second time.
pip install -q torch "setuptools>=77" ninja "pybind11>=2.13"
pip install -q --no-build-isolation -e ".[test]"
python -m flatten_ext info

step "CPU tests"
python -m pytest -q -n 2 --dist worksteal -m "not gpu and not packaging and not slow"

step "packaging tests"
# CMake in one process, installing in the other.
python -m pytest -q -n 2 --dist loadfile -m "packaging and not slow"

step "bad arguments under AddressSanitizer"
bash tests/sanitizer.sh

if [ "$(uname)" = Linux ]; then
  step "NEON kernels, under an emulator where this processor has no NEON"
  bash tests/neon.sh
fi

if python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  step "GPU tests"
  python -m pytest -q -m gpu
elif [ -x "$emulator" ] && [ -e flatten_ext/lib/libflatten_cuda.so ]; then
  step "GPU tests under the CUDA emulator: compute capability 8.0, warp-level race checks too"
  "$emulator" --cc 8.0 --warp-race-check --no-sticky -- python -m pytest -q -n 2 --dist worksteal -m gpu
  step "GPU tests under the CUDA emulator: compute capability 9.0"
  "$emulator" --cc 9.0 --no-sticky -- python -m pytest -q -n 2 --dist worksteal -m gpu
else
  step "GPU tests: skipped, no GPU and no emulator (or no CUDA library built)"
fi
