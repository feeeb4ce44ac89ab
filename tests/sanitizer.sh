#!/usr/bin/env bash
# Runs the tests of bad and odd arguments on CPU libraries instrumented with AddressSanitizer and
# UndefinedBehaviorSanitizer: a read or write outside a tensor ends them with a report.
#
#   bash tests/sanitizer.sh [pytest arguments]
#
# PYTHON chooses the interpreter; it needs what tests/run.sh installs. The build stays in build/sanitizer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=${PYTHON:-python}
compiler=${CXX:-c++}

build=$root/build/sanitizer
# -O1 compiles in half the time; the code that runs is the same.
FLATTEN_WITH_CUDA=0 FLATTEN_SANITIZE=address,undefined CXXFLAGS="-O1 ${CXXFLAGS:-}" \
  "$python" setup.py -q build --build-base "$build" --build-lib "$build/lib"

# The sanitizer has to be the first library of the process, which is Python's. Python frees little at exit, so
# leaks are not looked for. Not from the root: there `import flatten_ext` would find the ordinary build.
cd "$build"
export LD_PRELOAD="$($compiler -print-file-name=libasan.so):$($compiler -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:halt_on_error=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH=$build/lib PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=2

isas=$("$python" -c "
import flatten_ext._load as load
assert load.__file__.startswith('$build'), load.__file__
print(*load.cpu_isas())")
"$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" \
  "$root/tests/test_errors.py" "$root/tests/test_fuzz.py" "$@"
for isa in $isas; do
  echo "== $isa"
  FLATTEN_CPU_ISA=$isa "$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" \
    "$root/tests/test_fuzz.py" "$root/tests/test_golden.py" "$@"
done
