"""`pmvis refine` as a user meets it: files, pipes, resume and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from pmvis_core import masks
from pmvis_core.files import digest_file
from pmvis_core.models.deaot import build_deaot
from pmvis_core.tracks_io import TracksHeader, TracksWriter, read_tracks
from pmvis_core.types import Category, Track, VideoInfo, VideoTracks
from pmvis_core.weights.deaot import save_deaot
from tests.cli.conftest import EASY

H, W, T = 40, 56, 5
Run = Callable[..., Any]


def frame(t: int) -> np.ndarray:
    """Return a red textured square on green, moved by two pixels a frame."""
    rng = np.random.default_rng(4)
    image = rng.integers(0, 50, (H, W, 3)) + np.array([10, 130, 10])
    image[12:26, 6 + 2 * t : 20 + 2 * t] = rng.integers(0, 50, (14, 14, 3)) + np.array(
        [10, 20, 180]
    )
    return image.astype(np.uint8)


def truth(t: int) -> np.ndarray:
    """Return the square's mask."""
    mask = np.zeros((H, W), np.uint8)
    mask[12:26, 6 + 2 * t : 20 + 2 * t] = 1
    return mask


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with three videos, tracks of one frame each and the same as YouTube-VIS."""
    videos = []
    for number in (1, 2, 3):
        folder = tmp_path / "frames" / f"v{number}"
        folder.mkdir(parents=True)
        for t in range(T):
            cv2.imwrite(str(folder / f"{t:02}.png"), frame(t))
        names = tuple(f"v{number}/{t:02}.png" for t in range(T))
        rles = tuple(masks.encode(truth(t)) if t == number else None for t in range(T))
        scores = tuple(0.7 if rle else None for rle in rles)
        track = Track(1, 1, 0.7, scores, rles)
        videos.append(VideoTracks(VideoInfo(number, f"v{number}", H, W, T, names), (track,)))
    header = TracksHeader((Category(1, "square"),), ({"stage": "infer"},))
    with TracksWriter(tmp_path / "raw.tracks.jsonl", header) as out:
        for video in videos:
            out.write(video)
    return tmp_path


def test_file_to_file(pmvis: Run, place: Path) -> None:
    out = place / "out.tracks.jsonl"
    done = pmvis("refine", place / "raw.tracks.jsonl", "--frames", place / "frames", "-o", out)
    assert done.code == 0, done.err
    assert done.out == ""
    assert "refined 3 of 3 tracks in 3 videos by flow" in done.err
    reader = read_tracks(out)
    assert [entry["stage"] for entry in reader.header.lineage] == ["infer", "refine"]
    assert reader.header.lineage[1]["method"] == "flow"
    assert str(place) not in out.read_text()
    for video in reader:
        (track,) = video.tracks
        assert track.keyframe == video.video.id
        for t, rle in enumerate(track.rles):
            assert rle is not None
            assert masks.iou([rle], [masks.encode(truth(t))])[0, 0] > 0.8


def test_pipe_equals_file_twice(pmvis: Run, place: Path) -> None:
    raw, frames = place / "raw.tracks.jsonl", place / "frames"
    files = []
    for name in ("a", "b"):
        out = place / f"{name}.tracks.jsonl"
        assert pmvis("refine", raw, "--frames", frames, "-o", out).code == 0
        files.append(out.read_bytes())
    piped = pmvis("refine", "-", "--frames", frames, stdin=raw.read_bytes())
    assert piped.code == 0
    assert files[0] == files[1] == piped.out.encode()


def test_resume_gives_the_same_bytes(pmvis: Run, place: Path) -> None:
    raw, frames, out = place / "raw.tracks.jsonl", place / "frames", place / "o.tracks.jsonl"
    words = ("refine", raw, "--frames", frames, "-o", out)
    assert pmvis(*words).code == 0
    whole = out.read_bytes()
    out.unlink()
    part = out.with_name(out.name + ".part")
    part.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    for name in ("v1", "v2"):  # already done, so not needed any more
        for file in (frames / name).iterdir():
            file.unlink()
    assert pmvis(*words, "--resume").code == 0
    assert out.read_bytes() == whole
    part.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    other = pmvis(*words, "--resume", "--snap", "1")
    assert other.code == 2
    assert "other inputs or options" in other.err


def test_youtube_vis_json_is_read_directly(pmvis: Run, place: Path) -> None:
    names = [f"v1/{t:02}.png" for t in range(T)]
    video = {"id": 1, "height": H, "width": W, "length": T, "file_names": names}
    row = {
        "id": 1,
        "video_id": 1,
        "category_id": 1,
        "iscrowd": 0,
        "score": 0.6,
        "segmentations": [masks.encode(truth(t)) if t == 2 else None for t in range(T)],
    }
    document = {
        "videos": [video],
        "categories": [{"id": 1, "name": "square"}],
        "annotations": [row],
    }
    source = place / "frames" / "labels.json"
    source.write_text(json.dumps(document))
    out = place / "o.tracks.jsonl"
    done = pmvis("refine", source, "--frames", source, "-o", out)
    assert done.code == 0, done.err
    (result,) = read_tracks(out)
    assert result.tracks[0].keyframe == 2
    assert None not in result.tracks[0].rles


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--method", "deaot"], 2, "needs `--weights`"),
        (["--method", "deaot", "--weights", "nowhere"], 4, "weights `nowhere` do not exist"),
        (["--method", "magic"], 2, "expected one of: flow, deaot, sam2"),
        (["--weights", "some.pth"], 2, "`--weights` is for `deaot` and `sam2`"),
        (["--memory-limit", "3"], 2, "`--memory-limit` is for `deaot`"),
        (["--overlap", "max"], 2, "independent, argmax, score"),
        (["--snap", "2"], 2, "snap 2.0"),
    ],
)
def test_refusals(pmvis: Run, place: Path, words: list[str], code: int, message: str) -> None:
    out = place / "o.tracks.jsonl"
    raw = place / "raw.tracks.jsonl"
    done = pmvis("refine", raw, "--frames", place / "frames", "-o", out, *words)
    assert done.code == code
    assert message in done.err
    assert not out.exists()


@pytest.fixture(scope="module")
def deaot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of random weights of DeAOT-T."""
    file = tmp_path_factory.mktemp("deaot") / "model.safetensors"
    torch.manual_seed(0)
    save_deaot(file, build_deaot("deaott").state_dict(), "deaott")
    return file


def test_deaot_says_in_the_lineage_what_it_did(pmvis: Run, place: Path, deaot: Path) -> None:
    raw, frames, out = place / "raw.tracks.jsonl", place / "frames", place / "o.tracks.jsonl"
    words = ["--method", "deaot", "--weights", deaot, "--device", "cpu", "--memory-limit", "3"]
    words += ["--memory-gap", "2", "--separate", "--pscore", "0.5", "--variant", "deaott"]
    done = pmvis("refine", raw, "--frames", frames, "-o", out, *words)
    assert done.code == 0, done.err
    assert "3 tracks in 3 videos by deaot" in done.err
    entry = read_tracks(out).header.lineage[1]
    assert entry == {
        "stage": "refine",
        "method": "deaot",
        "variant": "deaott",
        "weights": digest_file(deaot),
        "memory_gap": 2,
        "memory_limit": 3,
        "max_long_edge": 1040,
        "joint": False,
        "precision": "fp32",
        "keep": {"topk": 0, "pscore": 0.5},
        "min_area": 16,
        "snap": 1.0,
        "area_jump": 0.0,
        "cycle": 0.0,
        "overlap": "independent",
    }
    for before, after in zip(read_tracks(raw), read_tracks(out), strict=True):
        key = after.tracks[0].keyframe
        assert key == after.video.id
        assert after.tracks[0].rles[key] == before.tracks[0].rles[key]
    wrong = pmvis("refine", raw, "--frames", frames, "-o", out, *words[:-1], "r50_deaotl")
    assert wrong.code == 2
    assert "is deaott, not r50_deaotl" in wrong.err


def test_filtering_before_is_filtering_after(pmvis: Run, place: Path, deaot: Path) -> None:
    words = ["--frames", place / "frames", "--method", "deaot", "--weights", deaot, "--separate"]
    words += ["--device", "cpu"]
    raw = place / "pairs.tracks.jsonl"
    reader = read_tracks(place / "raw.tracks.jsonl")
    with TracksWriter(raw, reader.header) as out:
        for video in reader:
            (row,) = video.tracks
            worse = replace(row, id=2, score=0.3)
            out.write(video.with_tracks((row, worse)))
    option = ["--topk", "1", "--pscore", "0.2"]
    names = ["filtered", "one", "two", "refined", "three"]
    filtered, one, two, refined, three = (place / f"{name}.tracks.jsonl" for name in names)
    assert pmvis("filter", raw, *option, "-o", filtered).code == 0
    assert pmvis("refine", filtered, *words, "-o", one).code == 0
    done = pmvis("refine", raw, *words, *option, "-o", two)
    assert "3 filtered before" in done.err
    assert pmvis("refine", raw, *words, "-o", refined).code == 0
    assert pmvis("filter", refined, *option, "-o", three).code == 0
    first, second, third = (list(read_tracks(file)) for file in (one, two, three))
    assert first == second
    assert second == third
    assert [len(video.tracks) for video in first] == [1, 1, 1]


def test_infer_refine_filter_as_processes(shell: Run, tiny: Path, deaot: Path) -> None:
    easy = " ".join(f"--set {setting}" for setting in EASY.split())
    script = f"""
    frames={tiny}/synth/videos/valid.json
    pmvis -q infer --weights {tiny}/run --frames $frames --device cpu {easy} -o raw.tracks.jsonl
    cat raw.tracks.jsonl |
      pmvis -q refine --frames $frames --method deaot --weights {deaot} --device cpu --topk 2 |
      pmvis -q filter --topk 1 > piped.tracks.jsonl
    pmvis -q refine raw.tracks.jsonl --frames $frames --method deaot --weights {deaot} \
      --device cpu --topk 2 -o refined.tracks.jsonl
    pmvis -q filter refined.tracks.jsonl --topk 1 -o filed.tracks.jsonl
    cmp piped.tracks.jsonl filed.tracks.jsonl && wc -l < piped.tracks.jsonl
    """
    done = shell(script, timeout=240.0)
    assert done.code == 0, done.err
    assert int(done.out) > 2


def test_killed_and_resumed(place: Path, environment: dict[str, str], deaot: Path) -> None:
    """A run that is killed with its first video written ends as an unbroken one."""
    words = [sys.executable, "-m", "pmvis_cli", "-q", "refine", "raw.tracks.jsonl"]
    words += ["--frames", "frames", "--method", "deaot", "--weights", str(deaot)]
    words += ["--device", "cpu"]

    def start(*more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*words, *more], cwd=place, env=environment)

    assert start("-o", "whole.tracks.jsonl").wait(120) == 0
    part = place / "o.tracks.jsonl.part"
    run = start("-o", "o.tracks.jsonl")
    while run.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") > 1):
        time.sleep(0.001)
    run.kill()
    run.wait()
    assert start("-o", "o.tracks.jsonl", "--resume").wait(120) == 0
    whole = (place / "whole.tracks.jsonl").read_bytes()
    assert (place / "o.tracks.jsonl").read_bytes() == whole


def test_missing_and_wrong_frames(pmvis: Run, place: Path) -> None:
    raw, out = place / "raw.tracks.jsonl", place / "o.tracks.jsonl"
    words = ("refine", raw, "--frames", place / "frames", "-o", out)
    (place / "frames" / "v2" / "03.png").unlink()
    done = pmvis(*words)
    assert done.code == 3
    assert "v2" in done.err
    assert not out.exists()
    cv2.imwrite(str(place / "frames" / "v2" / "03.png"), frame(3)[:-4])
    done = pmvis(*words)
    assert done.code == 3
    assert f"{W}x{H - 4}" in done.err
    done = pmvis("refine", raw, "--frames", place / "nowhere", "-o", out)
    assert done.code == 3
    assert "v1" in done.err


def test_cut_off_input_is_not_taken_for_a_short_one(pmvis: Run, place: Path) -> None:
    lines = (place / "raw.tracks.jsonl").read_bytes().splitlines(keepends=True)
    out = place / "o.tracks.jsonl"
    done = pmvis("refine", "-", "--frames", place / "frames", "-o", out, stdin=b"".join(lines[:-1]))
    assert done.code == 3
    assert "end record" in done.err
    assert not out.exists()
    assert (place / "o.tracks.jsonl.part").exists()
