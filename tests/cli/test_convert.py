"""`pmvis convert`: between tracks files and both forms of YouTube-VIS JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmvis_core import masks
from pmvis_core.tracks_io import TracksHeader, TracksWriter
from pmvis_core.types import Category, Track, VideoInfo, VideoTracks

Run = Callable[..., Any]


@pytest.fixture
def tracks(tmp_path: Path) -> Path:
    """Return a tracks file with two videos, the second without a track."""
    square = np.zeros((4, 5), np.uint8)
    square[1:3, 1:4] = 1
    rle = masks.encode(square)
    first = Track(0, 2, 0.5, (0.25, 0.75, None), (rle, rle, None), instance=0, keyframe=1)
    aside = Track(1, 2, 0.125, (None, 0.125, None), (None, rle, None))
    path = tmp_path / "a.tracks.jsonl"
    categories = (Category(2, "giant_panda"),)
    with TracksWriter(path, TracksHeader(categories, ({"stage": "infer"},))) as out:
        out.write(VideoTracks(VideoInfo(1, "a", 4, 5, 3), (first,), (aside,)))
        out.write(VideoTracks(VideoInfo(2, "b", 4, 5, 1, ("b/0.jpg",)), ()))
    return path


def test_round_trip_through_the_dataset_form_is_byte_equal(
    pmvis: Run, tracks: Path, tmp_path: Path
) -> None:
    dataset, back = tmp_path / "d.json", tmp_path / "back.tracks.jsonl"
    assert pmvis("convert", tracks, "--to", "dataset", "-o", dataset).code == 0
    assert pmvis("convert", dataset, "--to", "tracks", "-o", back).code == 0
    assert back.read_bytes() == tracks.read_bytes()
    rows = json.loads(dataset.read_text())["annotations"]
    assert [(row["id"], row["iscrowd"]) for row in rows] == [(1, 0), (2, 1)]
    assert rows[0]["bboxes"] == [[1.0, 1.0, 3.0, 2.0], [1.0, 1.0, 3.0, 2.0], None]


def test_real_pipe_through_results(shell: Run, tracks: Path, tmp_path: Path) -> None:
    done = shell(
        "pmvis convert a.tracks.jsonl --to dataset -o d.json"
        " && pmvis convert --to results < a.tracks.jsonl > r.json"
        " && pmvis convert - --gt d.json --to tracks < r.json | pmvis convert --to results"
    )
    assert done.code == 0, done.err
    assert done.out == (tmp_path / "r.json").read_text()
    assert set(json.loads(done.out)[0]) == {"video_id", "category_id", "score", "segmentations"}


def test_results_need_their_videos(pmvis: Run, tracks: Path, tmp_path: Path) -> None:
    results = tmp_path / "r.json"
    assert pmvis("convert", tracks, "--to", "results", "-o", results).code == 0
    done = pmvis("convert", results, "--to", "tracks", "-o", tmp_path / "x.tracks.jsonl")
    assert (done.code, "--gt" in done.err) == (2, True)
    assert not (tmp_path / "x.tracks.jsonl").exists()
    done = pmvis("convert", tracks, "--to", "results", "--gt", results, "-o", results)
    assert (done.code, "needs none" in done.err) == (2, True)


def test_results_take_videos_from_their_frames(pmvis: Run, tmp_path: Path) -> None:
    import cv2

    for name in ("a", "b"):
        (tmp_path / "frames" / name).mkdir(parents=True)
        for t in range(2):
            path = tmp_path / "frames" / name / f"{t}.png"
            cv2.imwrite(str(path), np.zeros((4, 5, 3), np.uint8))
    segmentations = [masks.empty(4, 5), masks.from_uncompressed([5, 2, 13], 4, 5)]
    row = {"video_id": 2, "category_id": 9, "score": 0.5, "segmentations": segmentations}
    (tmp_path / "r.json").write_text(json.dumps([row]))
    out = tmp_path / "x.tracks.jsonl"
    words = ("convert", tmp_path / "r.json", "--to", "tracks", "-o", out)
    assert pmvis(*words, "--videos", tmp_path / "frames").code == 0
    header, first, second, _ = map(json.loads, out.read_text().splitlines())
    assert header["categories"] == [{"id": 9, "name": "9"}]
    assert first["tracks"] == []
    assert second["video"]["name"] == "b"
    assert second["tracks"][0]["masks"][0] is None


def test_bad_input_leaves_no_output(pmvis: Run, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    (tmp_path / "a.tracks.jsonl").write_text("")
    assert pmvis("convert", tmp_path / "a.tracks.jsonl", "--to", "dataset", "-o", out).code == 3
    assert pmvis("convert", tmp_path / "none.json", "--to", "dataset", "-o", out).code == 3
    assert not out.exists()
    done = pmvis("convert", tmp_path / "a.tracks.jsonl", "--to", "coco", "-o", out)
    assert (done.code, "`dataset`" in done.err) == (2, True)


@pytest.fixture
def stills(tmp_path: Path) -> Path:
    """Return COCO instances: a dog and a crowd of cats in one picture, nothing in another."""
    crowd = {"size": [4, 5], "counts": [0, 20]}
    value = {
        "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
        "images": [
            {"id": 3, "file_name": "a.jpg", "height": 4, "width": 5},
            {"id": 5, "file_name": "b.jpg", "height": 4, "width": 5},
        ],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 18, "bbox": [0, 0, 2, 2], "iscrowd": 0,
             "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]},
            {"id": 2, "image_id": 3, "category_id": 17, "bbox": [0, 0, 5, 4], "iscrowd": 1,
             "segmentation": crowd},
        ],
    }  # fmt: skip
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(value))
    return path


def test_stills_become_a_dataset(pmvis: Run, stills: Path, tmp_path: Path) -> None:
    out = tmp_path / "stills.json"
    assert pmvis("convert", stills, "--to", "dataset", "-o", out).code == 0
    found = json.loads(out.read_text())
    assert [v["file_names"] for v in found["videos"]] == [["a.jpg"], ["b.jpg"]]
    assert [(r["video_id"], r["category_id"], r["iscrowd"]) for r in found["annotations"]] == [
        (3, 18, 0),
        (3, 17, 1),
    ]
    assert "score" not in found["annotations"][0]
    piped = pmvis("convert", "--to", "dataset", stdin=stills.read_bytes())
    assert json.loads(piped.out) == found
    done = pmvis("eval", out, "--gt", out, "--json")
    assert json.loads(done.out)["AP"] == pytest.approx(1.0)


def test_stills_in_a_target_vocabulary(pmvis: Run, stills: Path, tmp_path: Path) -> None:
    target, out = tmp_path / "t.toml", tmp_path / "stills.json"
    target.write_text('categories = ["fox", "dogs"]')
    words = ("convert", stills, "--target", target, "--to", "dataset", "-o", out)
    assert pmvis(*words).code == 0
    found = json.loads(out.read_text())
    assert [c["name"] for c in found["categories"]] == ["fox", "dogs"]
    assert [r["category_id"] for r in found["annotations"]] == [2]
    assert len(found["videos"]) == 2
