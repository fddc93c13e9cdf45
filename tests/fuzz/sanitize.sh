#!/usr/bin/env bash
# Builds `_C.so` under the address and undefined-behaviour sanitizers, in a folder of its own, and
# runs the tests of the operators on it: `sanitize.sh [PYTEST ARGUMENT...]`. PYTHON names an
# interpreter that has torch and pytest. Ends with an error on the first finding; leaks are not
# looked for, because Python and torch keep memory on purpose.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${OUT:-build/sanitize}
python=${PYTHON:-python3}
compiler=${CXX:-g++}
flags="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
cmake -S . -B "$out" -DPMVIS_WITH_CUDA=OFF -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_COMPILER="$compiler" \
  -DCMAKE_CXX_FLAGS="$flags" -DPython_EXECUTABLE="$(command -v "$python")" >/dev/null
cmake --build "$out" --target _C
out=$(cd "$out" && pwd)

# The runtimes come first, and C++'s with them, or exceptions thrown by torch are not understood.
preload=
for name in libasan.so libubsan.so libstdc++.so.6; do
  preload+="${preload:+:}$("$compiler" -print-file-name="$name")"
done
tests=("$@")
[[ $# -gt 0 ]] || tests=(tests/test_ops.py tests/test_ops_*.py
  -k "not emulated and not nvrtc and not launchers and not torch_compile and not compiled_without")
export PMVIS_LIB_DIR=$out OMP_NUM_THREADS=2
unset PMVIS_NATIVE  # some tests ask for twins; that the kernels are there is looked at first
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD=$preload "$python" -c 'from pmvis_core.ops import library; assert library.CPU.loaded, library.CPU'
LD_PRELOAD=$preload "$python" -m pytest -q -p no:cacheprovider "${tests[@]}"
