"""`pmvis infer`: every place that frames may lie in, shards, settings, and stills."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pmvis_cli.app import load_command
from pmvis_core.files import digest_file
from pmvis_core.tracks_io import read_tracks
from pmvis_core.types import VideoTracks
from pmvis_core.video.frames import find_frames, open_videos, write_video
from tests.cli.conftest import PROJECT

Run = Callable[..., Any]


@pytest.fixture
def infer(pmvis: Run, tiny: Path) -> Run:
    """Return a function that runs `infer` with the tiny model."""

    def run(frames: Path, *more: Any) -> Any:
        words = ("infer", "--weights", tiny / "run", "--device", "cpu", "--frames", frames)
        return pmvis(*words, *more)

    return run


@pytest.fixture
def videos(infer: Run, tmp_path: Path) -> Callable[..., list[VideoTracks]]:
    """Return a function that runs `infer` into a file and reads it."""

    def run(frames: Path, *more: Any) -> list[VideoTracks]:
        out = tmp_path / "found.tracks.jsonl"
        done = infer(frames, *more, "-o", out)
        assert done.code == 0, done.err
        assert done.out == ""
        return list(read_tracks(out))

    return run


def test_examples_in_the_help_use_options_that_exist(pmvis: Run) -> None:
    text = pmvis("infer", "--help").out
    known = {option for param in load_command("infer").params for option in param.opts}
    examples = re.findall(r"pmvis infer (.*?)(?=pmvis|torchrun|\||Reads:)", text, re.DOTALL)
    assert len(examples) >= 3
    used = {option for example in examples for option in re.findall(r"(?<!\w)--?[a-z-]+", example)}
    assert {"--weights", "--frames", "--resume"} <= used <= known


def test_json_folders_and_one_folder_give_the_same_tracks(
    videos: Run, tiny: Path, tmp_path: Path
) -> None:
    place = tiny / "synth/videos"
    by_json = videos(place / "train.json")
    assert [video.video.name for video in by_json] == ["train0001", "train0002", "train0003"]
    assert all(video.tracks for video in by_json)
    assert videos(place / "train/JPEGImages") == by_json
    assert videos(place / "train") == by_json
    (single,) = videos(place / "train/JPEGImages/train0002")
    assert single.tracks == by_json[1].tracks
    assert single.video.file_names == ("00000.jpg", "00001.jpg", "00002.jpg", "00003.jpg")
    elsewhere = tmp_path / "list.json"
    shutil.copy(place / "train.json", elsewhere)
    assert videos(elsewhere, "--root", place / "train/JPEGImages") == by_json


def test_a_video_file(videos: Run, tiny: Path, tmp_path: Path) -> None:
    source = open_videos(tiny / "synth/videos/train.json")[0]
    write_video(tmp_path / "clips/a.mp4", source.frames())
    (video,) = videos(tmp_path / "clips/a.mp4")
    assert (video.video.name, video.video.length, video.video.file_names) == ("a", 4, ())
    assert (video.video.height, video.video.width) == (96, 128)
    assert video.tracks
    assert all(len(track.rles) == 4 for track in video.tracks)
    assert videos(tmp_path / "clips") == [video]


def test_what_a_file_tells_of_its_making(infer: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.tracks.jsonl"
    frames = tiny / "synth/videos/train.json"
    thresholds = ("--set", "row_score=0.03", "--set", "tracker_is=unknown")
    refused = infer(frames, *thresholds, "-o", out)
    assert (refused.code, "tracker_is" in refused.err) == (2, True)
    done = infer(frames, *thresholds[:2], "-o", out)
    assert "3 videos, 7 categories, on cpu" in done.err
    (entry,) = read_tracks(out).header.lineage
    assert entry == {
        "stage": "infer",
        "weights": digest_file(tiny / "run/model.safetensors"),
        "settings": {"row_score": 0.03},
    }
    names = [category.name for category in read_tracks(out).header.categories]
    assert names == "disc triangle star plus square ring crescent".split()
    assert str(tiny) not in out.read_text()
    piped = infer(frames, *thresholds[:2])
    assert piped.out.encode() == out.read_bytes()


def test_a_model_file_does_as_well_as_its_folder(pmvis: Run, infer: Run, tiny: Path) -> None:
    frames = tiny / "synth/videos/train/JPEGImages/train0001"
    file = tiny / "run/model.safetensors"
    done = pmvis("infer", "--weights", file, "--device", "cpu", "--frames", frames)
    assert (done.code, done.out) == (0, infer(frames).out)


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/0", "-1/2", "a/b", "1/2/3", "", "1.0/2"])
def test_what_is_no_shard(infer: Run, tiny: Path, tmp_path: Path, shard: str) -> None:
    out = tmp_path / "x.tracks.jsonl"
    done = infer(tiny / "synth/videos/train.json", f"--shard={shard}", "-o", out)
    assert done.code == 2
    assert f"`--shard {shard}`, expected `i/n` with 1 <= i <= n" in done.err
    assert not list(tmp_path.iterdir())


def test_more_shards_than_videos(videos: Run, tiny: Path) -> None:
    frames = tiny / "synth/videos/train.json"
    found = [videos(frames, "--shard", f"{i}/4") for i in range(1, 5)]
    assert [[video.video.id for video in shard] for shard in found] == [[1], [2], [3], []]


def test_resume_wants_the_same_options(infer: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.tracks.jsonl"
    frames = tiny / "synth/videos/train.json"
    assert infer(frames, "-o", out).code == 0
    whole = out.read_bytes()
    part = out.with_name(out.name + ".part")
    part.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    out.unlink()
    other = infer(frames, "-o", out, "--resume", "--set", "mask_nms=0.4")
    assert (other.code, "made from other inputs or options" in other.err) == (2, True)
    assert part.exists()
    done = infer(frames, "-o", out, "--resume")
    assert (done.code, "1 videos were done before" in done.err) == (0, True)
    assert "frames: 8 of 8 in " in done.err
    assert out.read_bytes() == whole


def test_stills_are_inferred_and_measured(
    pmvis: Run, infer: Run, tiny: Path, tmp_path: Path
) -> None:
    stills, out = tmp_path / "stills.json", tmp_path / "stills.tracks.jsonl"
    truth = tiny / "synth/stills_val.json"
    assert pmvis("convert", truth, "--to", "dataset", "-o", stills).code == 0
    done = infer(stills, "--root", tiny / "synth/stills_val", "-o", out)
    assert done.code == 0, done.err
    assert [video.video.length for video in read_tracks(out)] == [1, 1]
    measured = pmvis("eval", out, "--gt", stills, "--json")
    assert measured.code == 0, measured.err
    assert 0 <= json.loads(measured.out)["AP"] <= 1


def test_every_second_frame_of_a_part(videos: Run, tiny: Path) -> None:
    place = tiny / "synth/videos/train/JPEGImages/train0002"
    (part,) = videos(place, "--start", 1, "--end", 4, "--every", 2)
    assert part.video.file_names == ("00001.jpg", "00003.jpg")
    assert all(len(track.rles) == 2 for track in part.tracks)
    assert part.tracks


def test_a_part_of_a_video_file_is_found_again(videos: Run, tiny: Path, tmp_path: Path) -> None:
    source = open_videos(tiny / "synth/videos/train.json")[0]
    write_video(tmp_path / "clips/a.mp4", source.frames())
    (part,) = videos(tmp_path / "clips/a.mp4", "--start", "0.1s", "--every", 2)
    assert (part.video.name, part.video.length) == ("a[1:4:2]", 2)
    again = list(find_frames(part.video, tmp_path / "clips").frames())
    whole = list(open_videos(tmp_path / "clips/a.mp4")[0].frames())
    assert [(again[i] == whole[t]).all() for i, t in enumerate((1, 3))] == [True, True]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--start", "9"), "leaves none of the frames of video `train0001`, which has 4"),
        (("--start", "x"), "`--start x`, expected a frame such as 120 or a time such as 2.5s"),
        (("--end", "1s"), "tells no frames a second"),
        (("--on-error", "ignore"), "expected one of stop, skip, blank"),
    ],
)
def test_parts_that_make_no_sense(infer: Run, tiny: Path, words: Any, told: str) -> None:
    done = infer(tiny / "synth/videos/train.json", *words)
    assert (done.code, done.out) == (2, "")
    assert told in " ".join(done.err.split())


def test_a_list_on_standard_input(infer: Run, pmvis: Run, tiny: Path, tmp_path: Path) -> None:
    place = tiny / "synth/videos/train/JPEGImages"
    names = [*sorted((place / "train0001").iterdir()), place / "train0003"]
    listed = "".join(f"{name}\n" for name in names).encode()
    words = ("infer", "--weights", tiny / "run", "--device", "cpu", "--frames", "-")
    done = pmvis(*words, "-o", tmp_path / "x.tracks.jsonl", stdin=listed)
    assert done.code == 0, done.err
    first, second = read_tracks(tmp_path / "x.tracks.jsonl")
    assert (first.video.name, second.video.name) == ("train0001", "train0003")
    assert infer(place / "train0001", "-o", tmp_path / "y.tracks.jsonl").code == 0
    (alone,) = read_tracks(tmp_path / "y.tracks.jsonl")
    assert first.tracks == alone.tracks


def test_a_broken_frame_stops_or_is_passed_over(
    infer: Run, videos: Run, tiny: Path, tmp_path: Path
) -> None:
    clip = tmp_path / "clip"
    shutil.copytree(tiny / "synth/videos/train/JPEGImages/train0002", clip)
    torn = clip / "00002.jpg"
    torn.write_bytes(torn.read_bytes()[:300])
    stopped = infer(clip)
    assert (stopped.code, "frame 2: " in stopped.err, "is truncated" in stopped.err) == (
        3,
        True,
        True,
    )
    (skipped,) = videos(clip, "--on-error", "skip")
    assert skipped.video.file_names == ("00000.jpg", "00001.jpg", "00003.jpg")
    assert all(len(track.rles) == 3 for track in skipped.tracks)
    (blank,) = videos(clip, "--on-error", "blank")
    assert blank.video.length == 4
    assert blank.tracks
    assert all(track.rles[2] is None for track in blank.tracks)


def test_one_label_a_track(videos: Run, tiny: Path) -> None:
    place = tiny / "synth/videos/train/JPEGImages/train0002"
    (every,), (single,) = videos(place), videos(place, "--single-label")
    assert len({track.instance for track in single.tracks}) == len(single.tracks)
    best = {track.instance: track.score for track in reversed(every.tracks)}
    for track in every.tracks:
        best[track.instance] = max(best[track.instance], track.score)
    assert {t.instance: t.score for t in single.tracks if t.instance in best} == best


def test_shards_join_to_the_file_of_one_run(
    pmvis: Run, infer: Run, tiny: Path, tmp_path: Path
) -> None:
    frames = tiny / "synth/videos/train.json"
    whole, joined = tmp_path / "whole.tracks.jsonl", tmp_path / "joined.tracks.jsonl"
    assert infer(frames, "-o", whole).code == 0
    parts = [tmp_path / f"{i}.tracks.jsonl" for i in (1, 2)]
    for i, part in enumerate(parts, start=1):
        assert infer(frames, "--shard", f"{i}/2", "-o", part).code == 0
    assert pmvis("join", *parts, "-o", joined).code == 0
    assert joined.read_bytes() == whole.read_bytes()
    wrong = pmvis("join", *parts[::-1], "-o", tmp_path / "wrong.tracks.jsonl")
    assert (wrong.code, "more videos than its place" in wrong.err) == (3, True)


def test_two_processes_write_the_file_of_one(
    infer: Run, tiny: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    frames = tiny / "synth/videos/train.json"
    out, whole = tmp_path / "many/x.tracks.jsonl", tmp_path / "whole.tracks.jsonl"
    words = [sys.executable, "-m", "pmvis_cli", "infer", "--weights", tiny / "run", "--frames"]
    words += [frames, "--device", "cpu", "-o"]
    subprocess.run([*words, whole], env=environment, check=True, cwd=PROJECT, timeout=60)
    runs = []
    for rank in range(2):
        numbers = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        runs.append(subprocess.Popen([*words, out], env={**environment, **numbers}, cwd=PROJECT))
    assert [run.wait(60) for run in runs] == [0, 0]
    assert out.read_bytes() == whole.read_bytes()
    assert list(out.parent.iterdir()) == [out]


def test_a_killed_run_is_resumed_to_the_same_bytes(
    infer: Run, tiny: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    frames = tiny / "synth/videos/train.json"
    out, whole = tmp_path / "x.tracks.jsonl", tmp_path / "whole.tracks.jsonl"
    assert infer(frames, "-o", whole).code == 0
    code = """
import os, signal, sys
from pmvis_core.tracks_io import TracksWriter
write = TracksWriter.write_pieces
def once(self, pieces, tracks):
    if self._videos == 1:
        self._put("{\\"tracks\\":[")
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, pieces, tracks)
TracksWriter.write_pieces = once
from pmvis_cli.app import main
main(sys.argv[1:])
"""
    words = ["infer", "--weights", tiny / "run", "--frames", frames, "--device", "cpu", "-o", out]
    killed = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], env=environment, cwd=PROJECT, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert [p.name for p in tmp_path.iterdir() if p != whole] == ["x.tracks.jsonl.part"]
    done = infer(frames, "-o", out, "--resume")
    assert (done.code, "1 videos were done before" in done.err) == (0, True)
    assert out.read_bytes() == whole.read_bytes()


def test_processes_share_no_output_and_no_shard(
    infer: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "RANK", "0")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    frames = tiny / "synth/videos/train.json"
    assert "cannot share standard output" in infer(frames).err
    sharded = infer(frames, "--shard", "1/2", "-o", tmp_path / "x.tracks.jsonl")
    assert (sharded.code, "within 2 processes" in sharded.err) == (2, True)
