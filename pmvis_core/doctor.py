"""What this machine offers, and what carries each operation: the facts behind `pmvis doctor`.

Nothing here raises: what cannot be found out is itself a finding. torch, cupy and OpenCV are
imported only while their finding is made.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pmvis_core
from pmvis_core import native


class State(str, Enum):
    """How good a finding is."""

    GOOD = "good"
    """There, in its best form."""
    FALLBACK = "fallback"
    """Works, but slower or in another way."""
    MISSING = "missing"
    """Not there; something optional does not work."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    part: str
    """Group of lines: ``system``, ``torch``, ``native``, ``video``."""
    name: str
    """What was looked at."""
    state: State
    """How good it is."""
    value: str
    """What was found: a version, a device, ``compiled (avx2)``."""
    reason: str = ""
    """Where it lies, or why it is not better and what would help."""


def examine() -> list[Finding]:
    """Return all findings, in the order in which a reader wants them."""
    examiners: tuple[tuple[str, str, Callable[[], list[Finding]]], ...] = (
        ("system", "python", _system),
        ("torch", "torch", _torch),
        ("torch", "cuda", _cuda),
        ("torch", "cupy", _cupy),
        ("native", "masks", _masks),
        ("native", "evaluator", _evaluator),
        ("native", "COCO reader", _coco_reader),
        ("native", "operations", _operations),
        ("video", "opencv", _opencv),
        ("video", "ffmpeg", _ffmpeg),
    )
    findings: list[Finding] = []
    for part, name, look in examiners:
        try:
            findings += look()
        except Exception as error:
            findings.append(Finding(part, name, State.MISSING, "not usable", _one_line(error)))
    return findings


def _system() -> list[Finding]:
    """Look at Python, the processor and the disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    folder = str(Path(__file__).resolve().parent)
    free_gb = shutil.disk_usage(".").free / 1e9
    return [
        Finding("system", "pmvis", State.GOOD, pmvis_core.__version__, folder),
        Finding("system", "python", State.GOOD, platform.python_version(), sys.executable),
        Finding("system", "platform", State.GOOD, f"{platform.system()} {platform.machine()}"),
        Finding("system", "cores", State.GOOD, str(cores)),
        Finding("system", "free disk", State.GOOD, f"{free_gb:.0f} GB", "in the current folder"),
    ]


def _torch() -> list[Finding]:
    """Look at torch and torchvision."""
    import torch
    import torchvision

    threads = f"{torch.get_num_threads()} threads"
    return [
        Finding("torch", "torch", State.GOOD, torch.__version__, threads),
        Finding("torch", "torchvision", State.GOOD, torchvision.__version__),
    ]


def _cuda() -> list[Finding]:
    """Look at the GPUs that torch can use."""
    import torch

    if torch.version.cuda is None:
        reason = "this torch was built without CUDA"
        return [Finding("torch", "cuda", State.MISSING, "none", reason)]
    built_for = f"torch was built for CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        return [Finding("torch", "cuda", State.MISSING, "no usable GPU", built_for)]
    return [
        Finding("torch", f"cuda:{index}", State.GOOD, _describe_gpu(index), built_for)
        for index in range(torch.cuda.device_count())
    ]


def _describe_gpu(index: int) -> str:
    """Return name, memory and compute capability of a GPU."""
    import torch

    gpu = torch.cuda.get_device_properties(index)
    memory = f"{gpu.total_memory / 2**30:.0f} GiB"
    return f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}"


def _cupy() -> list[Finding]:
    """Look at the optional cupy."""
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        reason = "optional: `pip install 'pmvis[cupy]'`"
        return [Finding("torch", "cupy", State.MISSING, "not installed", reason)]
    return [Finding("torch", "cupy", State.GOOD, str(cupy.__version__))]


def _masks() -> list[Finding]:
    """Look at the kernels of masks."""
    library, reason = native.load_mask_library()
    name = "masks (RLE encode, decode, area, box, merge, IoU, track overlap)"
    if library is None:
        return [Finding("native", name, State.FALLBACK, "numpy", reason)]
    return [Finding("native", name, State.GOOD, f"compiled ({library.instructions})", reason)]


def _evaluator() -> list[Finding]:
    """Look at the evaluator."""
    from pmvis_core.evaluation import compiled

    return [_plain_library("evaluator", *compiled.load_library())]


def _coco_reader() -> list[Finding]:
    """Look at the reader of large COCO files."""
    from pmvis_core.formats import coco_tables

    return [_plain_library("COCO reader", *coco_tables.load_library())]


def _plain_library(name: str, library: object | None, reason: str) -> Finding:
    """Say whether a library of plain C is in use, or its twin in Python."""
    if library is None:
        return Finding("native", name, State.FALLBACK, "python", reason)
    return Finding("native", name, State.GOOD, "compiled", reason)


def _operations() -> list[Finding]:
    """Look at the operations on tensors, and say what a GPU would run."""
    from pmvis_core import ops

    findings = []
    for name, value, reason in ops.status():
        state = State.GOOD if value.startswith(("compiled", "jit")) else State.FALLBACK
        findings.append(Finding("native", name, state, value, reason))
    return findings


def _opencv() -> list[Finding]:
    """Look at OpenCV and whether it reads and writes videos."""
    import cv2

    registry = cv2.videoio_registry
    names = sorted({registry.getBackendName(backend) for backend in registry.getBackends()})
    value = f"{cv2.__version__}, video through {', '.join(names) or 'nothing'}"
    if "FFMPEG" not in names:
        reason = "without its FFMPEG backend mp4 files may not open; folders of frames do"
        return [Finding("video", "opencv", State.FALLBACK, value, reason)]
    return [Finding("video", "opencv", State.GOOD, value)]


def _ffmpeg() -> list[Finding]:
    """Look at the ffmpeg program, which pmvis itself does not need."""
    path = shutil.which("ffmpeg")
    if path is None:
        reason = "optional: pmvis reads and writes videos through OpenCV"
        return [Finding("video", "ffmpeg", State.MISSING, "not installed", reason)]
    done = subprocess.run(
        [path, "-version"], capture_output=True, text=True, timeout=10, check=False
    )
    words = done.stdout.split()
    version = words[2] if len(words) > 2 else "unknown version"
    return [Finding("video", "ffmpeg", State.GOOD, version, path)]


def _one_line(error: Exception) -> str:
    """Return an error's first line with its kind."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"
