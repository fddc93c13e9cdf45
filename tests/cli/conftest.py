"""Ways to run the command line: in this process (fast) and as a process of its own (real)."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmvis_cli.app import main
from pmvis_core import masks
from pmvis_core.tracks_io import TracksHeader, TracksWriter
from pmvis_core.types import Category, Track, VideoInfo, VideoTracks
from tests.tiny_data import draw_tiny

PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """What a run of `pmvis` left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def pmvis(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Return a function that runs `pmvis WORDS...` in this process.

    ``stdin`` is given as bytes; neither stream is a terminal.
    """

    def run(*words: Any, stdin: bytes = b"") -> Outcome:
        out, err = io.BytesIO(), io.BytesIO()
        with monkeypatch.context() as patch:
            source = io.BufferedReader(io.BytesIO(stdin))
            patch.setattr(sys, "stdin", io.TextIOWrapper(source, encoding="utf-8"))
            patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8"))
            patch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding="utf-8"))
            code = main([str(word) for word in words])
            sys.stdout.flush()
            sys.stderr.flush()
            return Outcome(code, out.getvalue().decode(), err.getvalue().decode())

    return run


@pytest.fixture
def environment() -> dict[str, str]:
    """Return the environment in which a `pmvis` process finds this checkout."""
    path = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@pytest.fixture
def shell(tmp_path: Path, environment: dict[str, str]) -> Callable[..., Outcome]:
    """Return a function that runs a bash script in which ``pmvis`` is the real program."""

    def run(script: str, timeout: float = 60.0) -> Outcome:
        prologue = f'set -o pipefail; pmvis() {{ "{sys.executable}" -m pmvis_cli.app "$@"; }}\n'
        done = subprocess.run(
            ["bash", "-c", prologue + script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


def clip(number: int, tracks: int = 4, frames: int = 3) -> VideoTracks:
    """Return a video whose tracks have scores 0.9, 0.7, 0.5, ... and categories in turn."""
    info = VideoInfo(number, f"clip{number}", 12, 16, frames)
    rows = []
    for i in range(tracks):
        mask = np.zeros((12, 16), np.uint8)
        mask[1 + i : 5 + i, number % 8 : number % 8 + 6] = 1
        score = round(max(0.9 - 0.2 * i, 0.05), 6)
        rows.append(
            Track(i + 1, i % 2 + 1, score, (score,) * frames, (masks.encode(mask),) * frames)
        )
    return VideoTracks(info, tuple(rows))


@pytest.fixture
def tracks_file(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a whole tracks file of made-up videos."""

    def write(name: str = "raw.tracks.jsonl", videos: int = 3, **more: int) -> Path:
        header = TracksHeader((Category(1, "fox"), Category(2, "owl")), ({"stage": "infer"},))
        with TracksWriter(tmp_path / name, header) as out:
            for number in range(1, videos + 1):
                out.write(clip(number, **more))
        return tmp_path / name

    return write


EASY = "select_score=0 init_score=0 new_score=1 match_score=0.1 row_score=0.02"
"""Thresholds under which a model of two steps has some tracks, through several frames."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the drawn benchmark, its map, and a model of two steps in ``run``.

    Tests read it and write elsewhere.
    """
    folder = draw_tiny(tmp_path_factory.mktemp("tiny"))
    words = ["-q", "train-image", "--data", f"{folder}/maps/train_image.json", "--preset", "tiny"]
    words += ["--device", "cpu", "--steps", "2", "--set", "train.pairs_per_batch=2"]
    words += [w for setting in EASY.split() for w in ("--set", f"tracker.{setting}")]
    assert main([*words, "-o", f"{folder}/run"]) == 0
    return folder
