"""`pmvis check-data`: every kind of fault is found, told and counted; sound data pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pmvis_core.data_check.report import KINDS
from tests.test_datasets import CATEGORIES, HEIGHT, WIDTH, rectangle, write_image

Run = Callable[..., Any]
SQUARE = [[10.0, 10, 30, 10, 30, 25, 10, 25]]
GOOD = {"category_id": 3, "bbox": [10, 10, 20, 15], "segmentation": SQUARE}
RLE = {"category_id": 3, "bbox": [40, 5, 15, 30]}


def write_stills(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """Write four images, the third without a sound annotation of its own."""
    images = []
    for number in range(1, 5):
        write_image(folder / f"{number}.png", number)
        size = {"height": HEIGHT, "width": WIDTH}
        images.append({"id": number, "file_name": f"{number}.png", **size})
    path = folder / "stills.json"
    numbered = [{"id": i, "image_id": 1, **row} for i, row in enumerate(rows, 1)]
    whole = [{"id": 100 + n, "image_id": n, **GOOD} for n in (1, 2, 4)]
    value = {"annotations": numbered + whole, "images": images, "categories": CATEGORIES}
    path.write_text(json.dumps({**value, **changes}))
    return path


def found(pmvis: Run, *words: Any) -> dict[str, tuple[str, int]]:
    """Return severity and count of each kind that is found."""
    done = pmvis("check-data", "--json", *words)
    report = json.loads(done.out)
    assert done.code == (0 if report["sound"] else 1), done.err
    assert {finding["kind"] for finding in report["findings"]} <= KINDS.keys()
    return {f["kind"]: (f["severity"], f["count"]) for f in report["findings"]}


def mask(*edges: int) -> dict[str, Any]:
    return dict(rectangle(*edges))


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({**GOOD, "image_id": 9}, "unknown-image"),
        ({**GOOD, "category_id": 9}, "unknown-category"),
        ({**GOOD, "id": 102}, "duplicate-id"),
        ({**GOOD, "bbox": [1, 2, 3]}, "malformed"),
        ({**GOOD, "image_id": "1"}, "malformed"),
        ({"category_id": 3, "bbox": [10, 10, 0, 15]}, "box-empty"),
        ({"category_id": 3, "bbox": [70, 10, 5, 5]}, "box-outside"),
        ({"category_id": 3, "bbox": [40, 10, 25, 5]}, "box-beyond"),
        ({**GOOD, "segmentation": [[1, 2, 3, 4, 5]]}, "polygon-malformed"),
        ({**GOOD, "segmentation": [[1, 2, 3, 4, 5, "x"]]}, "polygon-malformed"),
        ({**GOOD, "segmentation": [[1, 2, 3, 4]]}, "polygon-open"),
        ({**GOOD, "bbox": [30, 20, 20, 15]}, "mask-box"),
        ({**RLE, "segmentation": {**mask(40, 5, 55, 35), "size": [WIDTH, HEIGHT]}}, "mask-size"),
        ({**RLE, "segmentation": {"size": [HEIGHT, WIDTH], "counts": "x"}}, "mask-malformed"),
        ({**RLE, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [5]}}, "mask-malformed"),
        ({**RLE, "segmentation": mask(0, 0, 0, 0)}, "mask-empty"),
        ({**GOOD, "image_id": 3, "iscrowd": 1}, "crowd-only"),
    ],
)
def test_faults_of_stills(pmvis: Run, tmp_path: Path, row: dict[str, Any], kind: str) -> None:
    faults = found(pmvis, write_stills(tmp_path, [row]))
    usual = {"no-annotation"} - ({"no-annotation"} if kind == "crowd-only" else set())
    assert faults.keys() == {kind} | usual
    assert faults[kind] == (KINDS[kind].severity, 1)


def test_a_sound_row_has_none(pmvis: Run, tmp_path: Path) -> None:
    rows = [GOOD, {**RLE, "segmentation": mask(40, 5, 55, 35)}, {**RLE, "image_id": 3}]
    done = pmvis("check-data", write_stills(tmp_path, rows), "--strict")
    assert done.code == 0, done.out
    first, *_, last = done.out.splitlines()
    assert first.endswith("stills.json`: 4 images, 6 annotations, 4 files")
    assert last == "sound: fit to be trained on"


def test_faults_of_images(pmvis: Run, tmp_path: Path) -> None:
    path = write_stills(tmp_path, [{**GOOD, "image_id": 3}])
    (tmp_path / "1.png").unlink()
    truncated = tmp_path / "2.png"
    truncated.write_bytes(truncated.read_bytes()[:-30])
    (tmp_path / "3.png").write_text("no image")
    write_image(tmp_path / "4.png", size=(WIDTH, HEIGHT))
    expected = {"image-missing": 1, "image-unreadable": 2, "image-size": 1}
    assert {k: n for k, (_, n) in found(pmvis, path).items()} == expected
    fast = found(pmvis, path, "--fast", "--workers", 3)
    assert fast.keys() == expected.keys()  # what a head tells; a cut may be behind it
    done = pmvis("check-data", path)
    assert done.code == 1
    assert "is 40x60, the annotations say 60x40" in done.out
    assert "fault: the image file is missing: 1 image (image-missing)" in done.out
    assert "is not sound: 3 kinds of faults" in done.err


def test_what_two_entries_share(pmvis: Run, tmp_path: Path) -> None:
    image = {"height": HEIGHT, "width": WIDTH, "file_name": "1.png"}
    twice = [{"id": 1, **image}, {"id": 2, **image}, {"id": 2, **image}, {"id": 4, **image}]
    path = write_stills(tmp_path, [], images=twice, categories=[*CATEGORIES, CATEGORIES[0]])
    faults = found(pmvis, path)
    assert faults["file-twice"][1] == 1
    assert faults["duplicate-id"][1] == 2


def test_a_file_that_is_cut_off(pmvis: Run, tmp_path: Path) -> None:
    path = write_stills(tmp_path, [GOOD] * 3)
    path.write_text(path.read_text()[:-40])
    assert found(pmvis, path)["file"] == ("fault", 1)


def test_words_that_make_no_sense(pmvis: Run, tmp_path: Path) -> None:
    path = write_stills(tmp_path, [])
    assert pmvis("check-data", tmp_path / "absent.json").code == 3
    assert pmvis("check-data", tmp_path).code == 3
    assert pmvis("check-data", path, "--frames", tmp_path).code == 2
    (tmp_path / "list.json").write_text("[]")
    assert "`pmvis check`" in pmvis("check-data", tmp_path / "list.json").err


def write_videos(folder: Path, row: dict[str, Any], **video: Any) -> Path:
    """Write a data set of two videos with two frames each."""
    videos = []
    for number in (1, 2):
        names = [f"v{number}/{t}.png" for t in range(2)]
        for t, name in enumerate(names):
            write_image(folder / name, 10 * number + t)
        size = {"height": HEIGHT, "width": WIDTH, "length": 2}
        videos.append({"id": number, "file_names": names, **size})
    videos[1] |= video
    seen = [mask(5, 5, 30, 20), None]
    usual = {"video_id": 1, "category_id": 3, "segmentations": seen}
    rows = [{"id": 1, **usual}, {"id": 2, **usual, "video_id": 2}, {"id": 3, **usual, **row}]
    path = folder / "train.json"
    path.write_text(json.dumps({"videos": videos, "categories": CATEGORIES, "annotations": rows}))
    return path


@pytest.mark.parametrize(
    ("row", "video", "kind"),
    [
        ({}, {}, None),
        ({"id": 1}, {}, "duplicate-id"),
        ({"video_id": 7}, {}, "unknown-video"),
        ({"category_id": 9}, {}, "unknown-category"),
        ({"segmentations": [None]}, {}, "length"),
        ({"segmentations": [None, None]}, {}, "mask-empty"),
        ({"segmentations": [{"size": [4, 4], "counts": "`0"}, None]}, {}, "mask-size"),
        ({"segmentations": [{"size": [4, 4], "counts": "x"}, None]}, {}, "malformed"),
        ({"score": "x"}, {}, "malformed"),
        ({"bboxes": [[35, 25, 5, 5], None]}, {}, "mask-box"),
        ({}, {"height": "x"}, "malformed"),
        ({}, {"file_names": ["v2/0.png", "v2/9.png"]}, "image-missing"),
        ({}, {"width": WIDTH + 1}, "mask-size"),
        ({}, {"file_names": ["v2/0.png"]}, "malformed"),
    ],
)
def test_faults_of_videos(
    pmvis: Run, tmp_path: Path, row: dict[str, Any], video: dict[str, Any], kind: str | None
) -> None:
    faults = found(pmvis, write_videos(tmp_path, row, **video))
    assert (kind in faults) if kind else not faults


def test_videos_without_tracks_and_broken_frames(pmvis: Run, tmp_path: Path) -> None:
    path = write_videos(tmp_path, {})
    value = json.loads(path.read_text())
    value["annotations"] = value["annotations"][:1]
    path.write_text(json.dumps(value))
    frame = tmp_path / "v1/1.png"
    frame.write_bytes(frame.read_bytes()[:-30])
    write_image(tmp_path / "v2/0.png", size=(HEIGHT, WIDTH + 2))
    faults = found(pmvis, path)
    assert {k: n for k, (_, n) in faults.items()} == {
        "video-empty": 1, "image-unreadable": 1, "image-size": 1
    }  # fmt: skip


def test_tracks_files(pmvis: Run, tracks_file: Run, tmp_path: Path) -> None:
    path = tracks_file()
    faults = found(pmvis, path, "--fast")
    assert faults == {"image-missing": ("fault", 3)}
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    assert found(pmvis, path)["file"] == ("fault", 1)
