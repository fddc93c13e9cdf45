#!/usr/bin/env bash
# Builds the GPU kernels, checks them and times them, and training on them, on a machine with a GPU,
# nvcc and torch, in one call of under 10 minutes that downloads nothing:
#
#     bash tests/benchmarks/gpu.sh [FOLDER]    # logs and the table go there; build/gpu without one
#
# PYTHON names the interpreter. Stops at the first build or check that fails.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD PMVIS_LIB_DIR=$work/build OMP_NUM_THREADS=4

nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv | tee "$out/gpu.txt"
"$python" -c 'import sys, torch; print(sys.version, torch.__version__, torch.version.cuda)' |
  tee -a "$out/gpu.txt"

seconds=$SECONDS
architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
cmake -S . -B "$work/build" -DPMVIS_WITH_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$architecture" \
  -DPython_EXECUTABLE="$(command -v "$python")" >"$out/build.log" 2>&1 || { tail -30 "$out/build.log"; exit 1; }
cmake --build "$work/build" --parallel 4 >>"$out/build.log" 2>&1 || {
  tail -60 "$out/build.log"
  exit 1
}
echo "built in $((SECONDS - seconds)) s"

timeout 100 env PMVIS_NATIVE=compiled "$python" -m pytest -q -p no:cacheprovider tests/test_ops_gpu.py |
  tee "$out/compiled.log"
if "$python" -c 'import cupy' 2>/dev/null; then
  timeout 120 env PMVIS_NATIVE=jit "$python" -m pytest -q -p no:cacheprovider tests/test_ops_gpu.py |
    tee "$out/jit.log"
fi
if command -v compute-sanitizer >/dev/null; then
  timeout 60 compute-sanitizer --error-exitcode 1 "$python" -m pytest -q -p no:cacheprovider \
    tests/test_ops_gpu.py -k 'masks or windows or (attention_equals and 32)' >"$out/sanitizer.log" 2>&1 ||
    echo "compute-sanitizer: status $?, see $out/sanitizer.log"
fi
timeout 150 "$python" tests/benchmarks/bench_gpu.py | tee "$out/table.txt"
timeout 90 "$python" tests/benchmarks/bench_train.py --device cuda --pairs 4 --precision bfloat16 \
  --steps 10 | tee "$out/train.txt" || echo "training: status $?"
echo "all in $SECONDS s"
