"""What the tests of the operators share: other processes, digests, and who can run what."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from torch import Tensor

from pmvis_core.ops import library

needs_kernel = pytest.mark.skipif(
    not (library.CPU.loaded and library.WISH != "torch"),
    reason=f"no compiled kernels: {library.CPU.reason}",
)


def python(script: str, **environment: str) -> str:
    """Run a script in a process of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a digest of the tensors' bits."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()
