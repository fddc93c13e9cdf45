"""The GPU kernels on the CPU, for tests: compiled as C++ with tests/emulator/emulator.h."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pmvis_core.ops import jit, library

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++") or shutil.which("clang++")
CSRC = ROOT / "csrc"
LAUNCHERS = sorted(CSRC.rglob("*.cu"))
TEXTS = [path.relative_to(CSRC).as_posix() for path in sorted(CSRC.rglob("*.cuh"))]

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def build(*sources: Path, **definitions: str) -> Path:
    """Compile sources to a library, once for each text of them and of what they include."""
    texts = sorted(path for path in CSRC.rglob("*") if path.is_file())
    texts += [ROOT / "tests/emulator/emulator.h", *sources]
    texts.append(Path(__file__))  # the command itself
    sha = hashlib.sha256(repr(sorted(definitions.items())).encode())
    for path in texts:
        sha.update(path.name.encode() + path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"pmvis-emulated-{torch.__version__}"
    folder.mkdir(exist_ok=True)
    library_path = folder / f"{sha.hexdigest()[:24]}.so"
    if library_path.is_file():
        return library_path
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "library.so"
        command = [str(COMPILER), "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-psabi"]
        command += ["-Wno-attributes", "-DPMVIS_EMULATE", f"-I{CSRC}"]
        command += [f"-I{ROOT / 'tests/emulator'}", "-o", str(made)]
        command += [f"-D{name}={value}" for name, value in definitions.items()]
        command += ["-x", "c++", *map(str, sources), "-x", "none", "-Wl,--no-as-needed"]
        command += [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        made.replace(library_path)
    return library_path


@functools.cache
def operators() -> Any:
    """Return the operators whose kernels, with the C++ that launches them, are emulated."""
    global _fragment  # noqa: PLW0603  operators live as long as it
    _fragment = torch.library.Library("pmvis_emulated", "FRAGMENT")
    for name, schema in library.SCHEMAS.items():
        _fragment.define(name + schema)
    path = build(*LAUNCHERS, PMVIS_NAMESPACE='"pmvis_emulated"')
    torch.ops.load_library(str(path))
    assert ctypes.CDLL(str(path)).pmvis_cuda_schemas() == library.SCHEMA_VERSION
    return torch.ops.pmvis_emulated


_fragment: Any = None


class Launcher:
    """Stands in for `pmvis_core.ops.jit.launch`: runs kernels, named beforehand, on CPU tensors."""

    def __init__(self, kernels: list[str], folder: Path) -> None:
        lines = [f'#include "{text}"' for text in TEXTS]
        lines += [
            f'extern "C" void run_{place}(const unsigned* grid, const unsigned* block, '
            f"size_t shared, void** arguments) "
            f"{{ emulator::launch(&{kernel}, grid, block, shared, arguments); }}"
            for place, kernel in enumerate(kernels)
        ]
        source = folder / "kernels.cpp"
        source.write_text("\n".join(lines))
        self._library = ctypes.CDLL(str(build(source)))
        self._kernels = kernels

    def __call__(
        self, text: str, kernel: str, grid: Any, block: Any, arguments: Any, shared: int = 0
    ) -> None:
        """Run a kernel."""
        assert (CSRC / text).is_file()
        values = [jit._number(item) for item in arguments]
        kept = [np.array(value) for value in values]
        addresses = (ctypes.c_void_p * len(kept))(*(item.ctypes.data for item in kept))
        triple = ctypes.c_uint * 3
        run = getattr(self._library, f"run_{self._kernels.index(kernel)}")
        run(triple(*grid), triple(*block), ctypes.c_size_t(shared), addresses)
