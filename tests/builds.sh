#!/usr/bin/env bash
# Installs pmvis in the ways in which people do, each into a fresh environment, and asks the result what
# carries its operations:
#
#     bash tests/builds.sh [CASE ...]     # all of them without one; `make builds`
#
# Cases: isolated, here, editable, uv, wheel (built once, then used by other Pythons and torches),
# bare (no compiler), cuda (compiles and links; needs nvcc). PYTHON names an interpreter that has
# torch and pmvis' other dependencies: environments share them by links, so that nothing large is
# downloaded. OTHER_PYTHONS and OTHER_TORCHES are lists of interpreters and of pip requirements that
# the wheel must serve as well. Environments lie below TMPDIR and are removed at the end.
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${PYTHON:-python3}")
other_pythons=${OTHER_PYTHONS:-}
other_torches=${OTHER_TORCHES:-}
cases=("$@")
(($#)) || cases=(isolated here editable uv wheel bare cuda)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1 CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-1}
unset PMVIS_LIB_DIR PMVIS_NATIVE PYTHONPATH
failed=()

# The checkout without what was built in it: builds must neither find nor leave anything there.
mkdir "$work/source" "$work/shared"
(cd "$source" && git ls-files -coz --exclude-standard | tar c --null --ignore-failed-read -T - 2>/dev/null) |
  tar x -C "$work/source"

# What PYTHON has installed, but for pmvis and what installs it.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for entry in "$packages"/*; do
  case ${entry##*/} in
    pmvis* | _editable* | pip | pip-* | setuptools* | scikit_build_core* | ninja* | cmake* | *.pth) ;;
    *) ln -s "$entry" "$work/shared/" ;;
  esac
done

# Makes the environment `name`, with what PYTHON has unless `alone` is asked for.
environment() {
  local name=$1 interpreter=${2:-$python} alone=${3:-}
  "$interpreter" -m venv "$work/$name"
  [[ $alone ]] ||
    echo "$work/shared" >"$("$work/$name/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
}

# Asks an installation what it is made of; `expected` is `compiled` or `fallback`, or what has no torch,
# `torchless`.
examine() {
  local name=$1 expected=$2
  (cd "$work" && "$work/$name/bin/python" - "$expected" "$work/source" <<'PYTHON'
import sys

from pmvis_core import masks, native
from pmvis_core.evaluation import compiled
from pmvis_core.formats import coco_tables

expected, source = sys.argv[1:]
assert native.__file__.startswith(source) == ("editable" in sys.prefix), native.__file__
assert native.find_kernels() is not None
loaded = [native.load_mask_library(), compiled.load_library(), coco_tables.load_library()]
states = [library is not None for library, _ in loaded]
reasons = [reason for _, reason in loaded]
assert masks.area(masks.from_boxes([[1, 1, 4, 5]], 9, 9)[0]) == 12
if expected != "torchless":
    import torch

    from pmvis_core import ops

    rows = [row for row in ops.status() if row.name.endswith("on the CPU")]
    states += [row.state.startswith("compiled") for row in rows]
    reasons += [row.reason for row in rows]
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert ops.lab_similarity(images).eq(1).all()
    print("torch", torch.__version__, end="; ")
assert states == [expected != "fallback"] * len(states), reasons
print("python", sys.version.split()[0], expected)
if expected == "fallback":
    assert all("C++ compiler" in reason for reason in reasons), reasons
PYTHON
  )
}

quietly() {  # shows what a command says only if it fails
  "$@" >"$work/log" 2>&1 || {
    tail -40 "$work/log"
    return 1
  }
}

isolated() {
  environment isolated
  quietly "$work/isolated/bin/pip" install "$work/source"
  examine isolated compiled
  (cd "$work" && quietly "$work/isolated/bin/pmvis" doctor)
}

here() {
  environment here
  quietly "$work/here/bin/pip" install 'scikit-build-core>=0.11' ninja
  quietly "$work/here/bin/pip" install --no-build-isolation "$work/source"
  examine here compiled
}

editable() {
  environment editable
  quietly "$work/editable/bin/pip" install -e "$work/source"
  examine editable compiled
}

uv() {
  environment uv
  environment uv-itself "$python" alone
  quietly "$work/uv-itself/bin/pip" install uv
  # uv sees only what lies in an environment itself, so dependencies are left out.
  quietly "$work/uv-itself/bin/uv" pip install --no-deps --python "$work/uv/bin/python" "$work/source"
  examine uv compiled
}

wheel() {
  environment builder
  quietly "$work/builder/bin/pip" install build
  quietly "$work/builder/bin/python" -m build --wheel -o "$work/dist" "$work/source"
  (cd "$work/dist" && ls -s --block-size=k ./*.whl)
  environment wheel
  quietly "$work/wheel/bin/pip" install --no-deps "$work"/dist/*.whl
  examine wheel compiled
  local number=0 other
  for other in $other_pythons; do
    environment "python$((++number))" "$other" alone
    quietly "$work/python$number/bin/pip" install numpy
    quietly "$work/python$number/bin/pip" install --no-deps "$work"/dist/*.whl
    examine "python$number" torchless
  done
  for other in $other_torches; do
    environment "torch$((++number))"
    # Torch looks for CUDA's libraries beside itself. A build for a CPU, or for the CUDA at hand, loads.
    [[ ! -e $packages/nvidia ]] || ln -s "$packages/nvidia" "$work/torch$number/lib/"python*/site-packages/
    quietly "$work/torch$number/bin/pip" install --no-deps --ignore-installed "$other"
    quietly "$work/torch$number/bin/pip" install --no-deps "$work"/dist/*.whl
    examine "torch$number" compiled
  done
}

bare() {
  environment bare
  mkdir "$work/tools"
  local tool
  for tool in bash sh cat rm mkdir ln cp mv ls env uname dirname basename; do
    ln -s "$(command -v $tool)" "$work/tools/"
  done
  quietly env PATH="$work/tools" CC=/nonexistent CXX=/nonexistent \
    "$work/bare/bin/pip" install -v "$work/source"
  grep -m1 "no C++ compiler" "$work/log"
  examine bare fallback
  (cd "$work" && "$work/bare/bin/pmvis" doctor --json) >"$work/log"
  grep -o -m1 "install a C++ compiler[^\"]*" "$work/log" | head -1
}

cuda() {
  if ! command -v nvcc >/dev/null; then
    echo "no nvcc here"
    return 0
  fi
  nvcc --version | tail -2 | head -1
  environment cuda
  quietly "$work/cuda/bin/pip" install -C cmake.define.PMVIS_WITH_CUDA=ON "$work/source"
  examine cuda compiled
  local folder
  folder=$(cd "$work" && "$work/cuda/bin/python" -c 'import pmvis_core; print(pmvis_core.__path__[0])')
  (cd "$folder" && ls -s --block-size=k _C_cuda.so)
}

for one in "${cases[@]}"; do
  echo "== $one"
  seconds=$SECONDS
  # In a shell of its own, so that the first failing command ends a case and no more.
  if (set +e; (set -e; "$one"); exit $?); then
    echo "$one: good, $((SECONDS - seconds)) s"
  else
    echo "$one: FAILED after $((SECONDS - seconds)) s"
    failed+=("$one")
  fi
done
((${#failed[@]} == 0)) || {
  echo "failed: ${failed[*]}"
  exit 1
}
