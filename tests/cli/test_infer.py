"""`pmvis infer`: every place that frames may lie in, shards, settings, and stills."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pmvis_cli.app import load_command
from pmvis_core.files import digest_file
from pmvis_core.tracks_io import read_tracks
from pmvis_core.types import VideoTracks
from pmvis_core.video import open_videos, write_video

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
    examples = re.findall(r"pmvis infer (.*?)(?=pmvis|\||Reads:)", text, re.DOTALL)
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
    assert (done.code, "infer: 2 of 2" in done.err) == (0, True)
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
