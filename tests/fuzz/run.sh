#!/usr/bin/env bash
# Fuzzes the C++ readers under the address and undefined-behaviour sanitizers: `run.sh [TARGET...]`
# with targets rle, masks, eval, coco. With clang it is libFuzzer's work, otherwise driver.cpp's. RUNS,
# SECONDS_EACH and SEED change the defaults. Ends with an error on the first finding.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${OUT:-build/fuzz}
runs=${RUNS:-1000000}
seconds=${SECONDS_EACH:-120}
seed=${SEED:-1}
flags=(-std=c++17 -O2 -g -pthread -fno-omit-frame-pointer -fsanitize=address,undefined
       -fno-sanitize-recover=all -Wall -Wextra -Wno-psabi -Icsrc)
avx2=(-mavx2 -mbmi -mbmi2 -mlzcnt -mpopcnt)
if command -v clang++ >/dev/null; then
  compiler=clang++ engine=(-fsanitize=fuzzer)
else
  compiler=${CXX:-g++} engine=(tests/fuzz/driver.cpp)
fi
[[ $(uname -m) == x86_64 ]] && flags+=(-DPMVIS_X86_ISA)
mkdir -p "$out"

# Compiles csrc/NAME.cpp for each NAME; those for AVX2 only where they can run.
objects=()
compile() {
  objects=()
  local name object
  for name in "$@"; do
    local extra=()
    object="$out/${name//\//_}.o"
    if [[ $name == *_avx2 ]]; then
      [[ $(uname -m) == x86_64 ]] || continue
      extra=("${avx2[@]}")
    fi
    "$compiler" "${flags[@]}" "${extra[@]}" -c "csrc/$name.cpp" -o "$object"
    objects+=("$object")
  done
}

targets=("$@")
[[ $# -gt 0 ]] || targets=(rle masks eval coco)
rle=(rle/text rle/text_avx2)
for name in "${targets[@]}"; do
  case $name in
    rle) compile "${rle[@]}" ;;
    masks) compile "${rle[@]}" rle/polygons masks/{dense,dense_avx2,operations} ;;
    eval)
      compile "${rle[@]}" rle/polygons \
        evaluation/{c_abi,curves,group,match,overlap,plain_runs,track_masks,tracks}
      ;;
    coco) compile formats/coco_index ;;
    *) echo "unknown target $name: rle, masks, eval or coco" >&2; exit 2 ;;
  esac
  "$compiler" "${flags[@]}" "${engine[@]}" "tests/fuzz/fuzz_$name.cpp" "${objects[@]}" \
    -o "$out/fuzz_$name"
  (cd "$out" && "./fuzz_$name" "-runs=$runs" "-max_total_time=$seconds" "-seed=$seed")
done
