#!/usr/bin/env bash
# Runs tests/cpp/{kernels,general}_test.cpp on the NEON kernels: compiled for aarch64, and run under an emulator where this
# processor is another.
#
#   bash tests/neon.sh
#
# Installs the compiler and the emulator with apt-get where they are missing, and fails where it cannot. The build
# stays in build/neon. Takes three minutes of a core, half of which is compiling.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "$(uname -m)" = aarch64 ]; then
  compiler=${CXX:-c++} emulator=()
else
  compiler=aarch64-linux-gnu-g++ emulator=(qemu-aarch64-static)
  missing=()
  command -v "$compiler" >/dev/null || missing+=(g++-aarch64-linux-gnu libc6-dev-arm64-cross)
  command -v "${emulator[0]}" >/dev/null || missing+=(qemu-user-static)
  if [ ${#missing[@]} -gt 0 ]; then
    root=()
    [ "$(id -u)" = 0 ] || root=(sudo)
    "${root[@]}" apt-get update -qq
    DEBIAN_FRONTEND=noninteractive "${root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}"
  fi
fi

build=build/neon
mkdir -p "$build"
# The sources that csrc/build_facts.txt lists, and the one unit of csrc/cpu/isa/isas.inc that aarch64 has.
kernels=$(sed -n 's/^cpu_kernel_sources = //p' csrc/build_facts.txt)
objects=()
compile() { # source, further options
  local object=$build/${1//\//_}.o
  objects+=("$object")
  # -O1 compiles in half the time; the vectors' functions are inlined as in a release.
  "$compiler" -O1 -Wall -Wextra "${@:2}" -c "$1" -o "$object"
}
for source in $kernels cpu/isa/baseline.cpp; do compile "csrc/$source" -std=c++17; done
for test in kernels general; do
  "$compiler" -O1 -Wall -Wextra -std=c++20 -Icsrc -c "tests/cpp/${test}_test.cpp" -o "$build/${test}_test.o"
  "$compiler" -static "${objects[@]}" "$build/${test}_test.o" -o "$build/${test}_test"
  output=$("${emulator[@]}" "$build/${test}_test")
  echo "$output"
  grep -qx "neon kernels" <<<"$output" # else it was another set that passed
done
