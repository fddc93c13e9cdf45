"""The chain of real processes on real files: pipes, seeds, shards, and what a kill leaves behind.

A command is caught in the middle of its work by a frame that is a named pipe: it has finished the
videos before and waits for ever in this one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pmvis_core.tracks_io import read_tracks

Run = Callable[..., Any]
PMVIS = [sys.executable, "-m", "pmvis_cli.app", "-q"]


@pytest.fixture
def place(tiny: Path, tmp_path: Path) -> Path:
    """Return a folder with videos of its own and links to the tiny data and model."""
    shutil.copytree(tiny / "synth/videos", tmp_path / "videos")
    for name in ("maps", "synth", "run"):
        (tmp_path / name).symlink_to(tiny / name)
    return tmp_path


@pytest.fixture
def as_here(environment: dict[str, str]) -> dict[str, str]:
    """Return an environment in which a process sums in the order that this one does."""
    import torch

    return {**environment, "OMP_NUM_THREADS": str(torch.get_num_threads())}


@contextmanager
def stuck(frame: Path) -> Iterator[None]:
    """Replace a frame by a pipe that nobody writes to, for a while."""
    aside = frame.with_suffix(".aside")
    frame.rename(aside)
    os.mkfifo(frame)
    try:
        yield
    finally:
        aside.replace(frame)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until something is so while a process is at work."""
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "the process ended before it was caught"
        assert time.monotonic() < end
        time.sleep(0.01)


def lines_in(path: Path) -> int:
    """Return the number of whole lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


INFER = "infer --weights run --device cpu --frames videos/train.json"
REFINE = "refine --frames videos/train.json"
FILTER = "filter --topk 4 --pscore 0.03"


def test_the_pipe_equals_the_run_by_files_twice(shell: Run, place: Path) -> None:
    done = shell(
        f"""
        set -e
        pmvis {INFER} -o raw.tracks.jsonl
        pmvis {REFINE} raw.tracks.jsonl -o refined.tracks.jsonl
        pmvis {FILTER} refined.tracks.jsonl -o files.tracks.jsonl
        pmvis {INFER} | tee again.tracks.jsonl | pmvis {REFINE} | pmvis {FILTER} > pipe.tracks.jsonl
        cmp raw.tracks.jsonl again.tracks.jsonl
        cmp files.tracks.jsonl pipe.tracks.jsonl
        """,
        timeout=120,
    )
    assert done.code == 0, done.err
    kept = [len(video.tracks) for video in read_tracks(place / "pipe.tracks.jsonl")]
    raw = [len(video.tracks) for video in read_tracks(place / "raw.tracks.jsonl")]
    assert len(kept) == 3
    assert 0 < sum(kept) < sum(raw)
    assert max(kept) <= 4
    stages = [entry["stage"] for entry in read_tracks(place / "pipe.tracks.jsonl").header.lineage]
    assert stages == ["infer", "refine", "filter"]
    assert str(place) not in (place / "pipe.tracks.jsonl").read_text()


def test_shards_join_to_the_whole(pmvis: Run, place: Path) -> None:
    def infer(name: str, *more: str) -> Path:
        out = place / f"{name}.tracks.jsonl"
        words = ["infer", "--weights", place / "run", "--frames", place / "videos/train.json"]
        done = pmvis(*words, "--device", "cpu", "-o", out, *more)
        assert done.code == 0, done.err
        return out

    parts = [infer(f"s{i}", "--shard", f"{i}/2") for i in (1, 2)]
    joined = place / "joined.tracks.jsonl"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    whole = {video.video.id: video for video in read_tracks(infer("whole"))}
    assert {video.video.id: video for video in read_tracks(joined)} == whole
    assert [len(list(read_tracks(part))) for part in parts] == [2, 1]


@pytest.mark.parametrize("words", [INFER, f"{REFINE} raw.tracks.jsonl"], ids=["infer", "refine"])
def test_a_kill_leaves_no_output_and_resume_completes(
    pmvis: Run, place: Path, as_here: dict[str, str], monkeypatch: Any, words: str
) -> None:
    monkeypatch.chdir(place)
    assert pmvis(*INFER.split(), "-o", "raw.tracks.jsonl").code == 0
    out, part = place / "x.tracks.jsonl", place / "x.tracks.jsonl.part"
    command = [*PMVIS, *words.split(), "-o", out.name]
    with stuck(place / "videos/train/JPEGImages/train0003/00002.jpg"):
        process = subprocess.Popen(command, env=as_here, cwd=place)
        wait_for(lambda: lines_in(part) == 3, process)
        process.kill()
        process.wait(timeout=20)
    assert not out.exists()
    resumed = pmvis(*words.split(), "-o", out.name, "--resume")
    assert resumed.code == 0, resumed.err
    assert pmvis(*words.split(), "-o", "whole.tracks.jsonl").code == 0
    assert out.read_bytes() == (place / "whole.tracks.jsonl").read_bytes()
    assert [video.video.id for video in read_tracks(out)] == [1, 2, 3]
    assert not part.exists()


def test_a_killed_upstream_is_no_short_data_set(place: Path, environment: dict[str, str]) -> None:
    out, part = place / "x.tracks.jsonl", place / "x.tracks.jsonl.part"
    with stuck(place / "videos/train/JPEGImages/train0003/00002.jpg"):
        first = subprocess.Popen(
            [*PMVIS, *INFER.split()], env=environment, cwd=place, stdout=subprocess.PIPE
        )
        second = subprocess.Popen(
            [*PMVIS, *REFINE.split(), "-o", out.name],
            env=environment,
            cwd=place,
            stdin=first.stdout,
            stderr=subprocess.PIPE,
        )
        assert first.stdout is not None
        first.stdout.close()
        wait_for(lambda: lines_in(part) == 3, second)
        first.send_signal(signal.SIGKILL)
        _, err = second.communicate(timeout=30)
        first.wait(timeout=20)
    assert second.returncode == 3
    assert b"standard input ended after 2 videos without its end record" in err
    assert not out.exists()


def test_a_killed_training_resumes_to_the_same_model(
    pmvis: Run, place: Path, as_here: dict[str, str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(place)
    words = "train-image --data maps/train_image.json --preset tiny --device cpu --steps 12"
    words += " --set train.pairs_per_batch=2 --set train.save_every=1 --set train.log_every=1"
    words += " --accumulate 2"
    metrics, model = place / "killed/metrics.jsonl", place / "killed/model.safetensors"
    process = subprocess.Popen([*PMVIS, *words.split(), "-o", "killed"], env=as_here, cwd=place)
    wait_for(lambda: lines_in(metrics) >= 3, process)
    process.kill()
    process.wait(timeout=20)
    assert (place / "killed/state.pt").exists()
    assert not model.exists()
    for out in ("killed", "whole"):
        done = pmvis(*words.split(), "-o", out)
        assert done.code == 0, done.err
    assert model.read_bytes() == (place / "whole/model.safetensors").read_bytes()
    assert metrics.read_bytes() == (place / "whole/metrics.jsonl").read_bytes()
    assert lines_in(metrics) == 12
    assert sorted(os.listdir(place / "killed")) == sorted(os.listdir(place / "whole"))
