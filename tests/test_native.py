"""Finding the compiled libraries, our copy of torch's ABI, and doing without either."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pmvis_core import doctor, native
from pmvis_core.evaluation import compiled
from pmvis_core.formats import coco_tables

CSRC = Path(__file__).resolve().parents[1] / "csrc"


def _run(script: str, **environment: str) -> str:
    """Run Python in a process of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_off_means_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMVIS_NATIVE", "off")
    assert native.find_library("_masks.so") == (None, "turned off by PMVIS_NATIVE")


def test_a_folder_of_libraries_can_be_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PMVIS_NATIVE", raising=False)
    monkeypatch.setenv("PMVIS_LIB_DIR", str(tmp_path))
    (tmp_path / "_own.so").touch()
    assert native.find_library("_own.so")[0] == tmp_path / "_own.so"
    path, reason = native.find_library("_absent.so")
    assert path is None
    assert "was not built" in reason


def test_a_library_that_does_not_load_falls_back_and_says_so(tmp_path: Path) -> None:
    for name in ("_masks.so", "_C.so"):
        (tmp_path / name).write_bytes(b"no library")
    script = (
        "from pmvis_core import masks, native, ops\n"
        "print(masks.empty(3, 4)['counts'], 'does not load' in native.load_mask_library()[1])\n"
        "print(ops.status()[0].state, 'does not load' in ops.status()[0].reason)"
    )
    printed = _run(script, PMVIS_LIB_DIR=str(tmp_path), PMVIS_NATIVE="on")
    assert printed.splitlines() == ["< True", "torch True"]


@pytest.mark.parametrize("text", ["", 'extern "C" long pmvis_eval_version() { return 0; }'])
def test_an_evaluator_of_another_version_is_not_used(text: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "old.cpp").write_text(text)
    command = [compiler, "-shared", "-fPIC", "-o", str(tmp_path / "_eval.so")]
    subprocess.run([*command, str(tmp_path / "old.cpp")], check=True)
    script = (
        "from pmvis_core.evaluation import compiled\nlibrary, reason = compiled.load_library()\n"
        "print(library, reason.split('`')[2])"
    )
    printed = _run(script, PMVIS_LIB_DIR=str(tmp_path), PMVIS_NATIVE="on")
    assert printed == "None  is of another version: install pmvis again"


def test_the_evaluator_names_our_version() -> None:
    text = (CSRC / "evaluation/c_abi.cpp").read_text()
    assert f"kVersion = {compiled.VERSION};" in text


@pytest.mark.parametrize(
    ("source", "version"),
    [("formats/coco_index.cpp", coco_tables.VERSION), ("masks/module.cpp", native.MASKS_VERSION)],
)
def test_a_library_names_our_version(source: str, version: int) -> None:
    assert f"kVersion = {version};" in (CSRC / source).read_text()


def test_masks_do_not_import_torch() -> None:
    script = (
        "import sys, numpy\nfrom pmvis_core import masks\n"
        "masks.decode(masks.encode(numpy.eye(3, dtype=bool)))\nprint('torch' in sys.modules)"
    )
    assert _run(script) == "False"


def test_our_declarations_are_torchs(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    torch = pytest.importorskip("torch")
    headers = Path(torch.__file__).parent / "include"
    if not (headers / "torch/csrc/stable/c/shim.h").is_file():
        pytest.skip("this torch brings no headers")
    source = tmp_path / "both.cpp"
    ours = "ops/common/stable_abi.h"
    source.write_text(f'#include <torch/csrc/stable/c/shim.h>\n#include "{ours}"\n')
    command = [compiler, "-std=c++17", "-fsyntax-only", "-w", "-DUSE_CUDA"]
    version = "-DTORCH_TARGET_VERSION=0x020b000000000000"
    done = subprocess.run(
        [*command, version, f"-I{headers}", f"-I{CSRC}", str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_doctor_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[doctor.Finding]:
        raise OSError("libGL.so.1: cannot open\nmore")

    monkeypatch.setattr(doctor, "_opencv", broken)
    monkeypatch.setenv("PATH", "")
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["opencv"].state is doctor.State.MISSING
    assert findings["opencv"].reason == "OSError: libGL.so.1: cannot open"
    assert findings["ffmpeg"].value == "not installed"
    assert {f.part for f in findings.values()} == {"system", "torch", "native", "video"}
    assert all(f.reason for f in findings.values() if f.state is not doctor.State.GOOD)
