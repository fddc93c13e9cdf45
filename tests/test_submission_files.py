"""Submissions as files: what is no JSON, where the expected videos come from, what is packed."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmvis_core.errors import AnswerIsNo, DataError
from pmvis_core.files import canonical_json
from pmvis_core.formats.ytvis import read_results
from pmvis_core.formats.ytvis_writer import as_results
from pmvis_core.submission.check import check
from pmvis_core.submission.files import MEMBER, Submission, open_submission, pack, read_expected
from pmvis_core.submission.report import Report
from pmvis_core.tracks_io import TracksHeader, TracksWriter, read_tracks
from pmvis_core.types import Category, Track, VideoInfo, VideoTracks
from tests.submissions import (
    EXPECTED,
    LENGTH,
    SIZES,
    Entry,
    changed,
    entry,
    found,
    rle_of,
    sound,
    submissions,
)

SHARED_FOLDER = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def judged_text(folder: Path, text: str | bytes, name: str = "r.json") -> Report:
    """Check a file."""
    path = folder / name
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    return check(open_submission(path, EXPECTED), EXPECTED)


TEXTS: tuple[tuple[str, str | bytes, str], ...] = (
    ("json", "", "empty"),
    ("json", "  \n", "empty"),
    ("json", "[\n", "line 2, column 1: Expecting value (the file is cut off)"),
    ("json", '[\n{"a": "b', "line 2, column 7"),
    ("json", "[1,\n 2,,3]", "line 2, column 4: Expecting value"),
    ("json", "[1 2]", "line 1, column 4: expected `,` or `]`"),
    ("json", "[1] ]", "column 5: text behind the end of the list"),
    ("json", "[{'video_id': 1}]", "Python's notation"),
    ("json", "[None]", "Python's notation"),
    ("json", "\ufeff[]", "byte order mark"),
    ("json", b"[\xff]", "byte 1 is not UTF-8"),
    ("json", "[" * 100_000, "that a program can hold"),
    ("json", f"[{'9' * 5000}]", "that a program can hold"),
    ("not-a-list", '{"results": []}', "'results'"),
    ("not-a-list", "null", "null"),
    ("no-prediction", " [ ] ", ""),
    ("not-an-object", "[3]", "found 3"),
    ("not-an-object", "[[]]", "found []"),
    ("repeated-key", '[{"score": 1, "score": 0.5}]', "`score`"),
)
"""Kind, a whole file, and what the report says of its first fault of that kind."""


@pytest.mark.parametrize(("kind", "text", "words"), TEXTS)
def test_a_faulty_file(kind: str, text: str | bytes, words: str, tmp_path: Path) -> None:
    report = judged_text(tmp_path, text)
    assert not report.sound
    assert kind == "no-prediction" or "no-prediction" not in found(report)
    assert words in found(report)[kind].examples[0].text


def test_a_key_that_stands_twice_in_a_mask(tmp_path: Path) -> None:
    text = json.dumps(sound()).replace('"counts"', '"counts": "", "counts"', 1)
    report = judged_text(tmp_path, text)
    assert list(found(report)) == ["repeated-key"]
    (example,) = found(report)["repeated-key"].examples
    assert (example.place, example.text) == ("entry 0, video 1 `clip1`, frame 0", "`counts`")


@SHARED_FOLDER
@given(submissions(), st.sampled_from([None, 2, "\t"]))
def test_a_sound_submission_comes_back_from_its_zip(
    tmp_path: Path, entries: list[Entry], indent: Any
) -> None:
    path, packed, again = (tmp_path / name for name in ("r.json", "r.zip", "again.zip"))
    path.write_text(json.dumps(entries, indent=indent))
    submission = open_submission(path, EXPECTED)
    report = check(submission, EXPECTED)
    assert report.sound, report.findings
    assert pack(submission, report, packed) == packed.stat().st_size
    with zipfile.ZipFile(packed) as archive:
        assert archive.namelist() == [MEMBER]
        assert archive.infolist()[0].compress_type == zipfile.ZIP_DEFLATED
        assert archive.infolist()[0].date_time == (1980, 1, 1, 0, 0, 0)
        assert archive.testzip() is None
        content = archive.read(MEMBER)
    (tmp_path / "back.json").write_bytes(content)
    assert read_results(tmp_path / "back.json", EXPECTED) == read_results(path, EXPECTED)
    assert content.decode() == canonical_json(json.loads(content)) + "\n"
    turned = [
        {**dict(reversed(row.items())), "category_id": float(row["category_id"])}
        for row in json.loads(content)
    ]
    for row in turned:
        row["score"] = int(row["score"]) if row["score"] in (0, 1) else row["score"]
    pack(Submission("", turned), report, again)
    assert again.read_bytes() == packed.read_bytes()


@SHARED_FOLDER
@given(submissions(), st.data())
def test_a_file_that_is_cut_anywhere_is_no_json(
    tmp_path: Path, entries: list[Entry], data: Any
) -> None:
    text = json.dumps(entries)
    report = judged_text(tmp_path, text[: data.draw(st.integers(0, len(text) - 1))])
    finding = found(report)["json"]
    assert "line 1, column" in finding.examples[0].text
    assert report.predictions < len(entries) + (text[-2:] == "}]")


@SHARED_FOLDER
@given(st.binary(max_size=60))
def test_any_bytes_are_judged(tmp_path: Path, data: bytes) -> None:
    report = judged_text(tmp_path, b"[" + data)
    assert not report.sound


def test_unsound_is_not_packed(tmp_path: Path) -> None:
    submission = Submission("`r.json`", [changed(score=2)])
    with pytest.raises(AnswerIsNo, match="not sound"):
        pack(submission, check(submission, EXPECTED), tmp_path / "r.zip")
    assert list(tmp_path.iterdir()) == []


def test_the_entries_before_a_cut_are_checked(tmp_path: Path) -> None:
    report = judged_text(tmp_path, json.dumps([changed(score=2), entry(2, 7)])[:-9])
    assert set(found(report)) == {"json", "score-range", "video-without-prediction"}
    assert found(report)["json"].examples[0].entry == 1


def test_gzip(tmp_path: Path) -> None:
    data = gzip.compress(json.dumps(sound()).encode())
    assert judged_text(tmp_path, data, "r.json.gz").findings == ()
    with pytest.raises(DataError, match="cannot be read to its end"):
        judged_text(tmp_path, data[:-9])


def tracks_file(path: Path, videos: dict[str, int], categories: dict[str, int]) -> Path:
    """Write a tracks file with one track a video and category, under the given ids."""
    with TracksWriter(
        path, TracksHeader(tuple(Category(k, name) for name, k in categories.items()))
    ) as out:
        for name, number in videos.items():
            known = {video.name: video.id for video in EXPECTED.videos}.get(name, 1)
            rle = rle_of(known)
            rows = tuple(
                Track(k, category, score, (score, None, None), (rle, None, None))
                for k, (category, score) in enumerate(
                    zip(categories.values(), (0.5, 0.25), strict=False)
                )
            )
            out.write(VideoTracks(VideoInfo(number, name, *SIZES[known], LENGTH), rows))
    return path


def test_tracks_come_under_the_expected_ids(tmp_path: Path) -> None:
    names = {"clip5": 1, "clip2": 2, "clip1": 3}
    path = tracks_file(tmp_path / "a.tracks.jsonl", names, {"owl": 1, "fox": 2})
    submission = open_submission(path, EXPECTED)
    rows = [(row["video_id"], row["category_id"]) for row in submission.entries]
    assert rows == [(5, 7), (5, 1), (2, 7), (2, 1), (1, 7), (1, 1)]
    assert check(submission, EXPECTED).findings == ()


def test_tracks_with_the_expected_ids_become_what_convert_makes(tmp_path: Path) -> None:
    names = {f"clip{k}": k for k in SIZES}
    path = tracks_file(tmp_path / "a.jsonl", names, {"fox": 1, "owl": 7})
    submission = open_submission(path, EXPECTED)
    assert submission.entries == as_results(read_tracks(path))
    pack(submission, check(submission, EXPECTED), tmp_path / "r.zip")
    with zipfile.ZipFile(tmp_path / "r.zip") as archive:
        assert archive.read(MEMBER).decode() == canonical_json(submission.entries) + "\n"


def test_categories_and_names_that_the_expected_file_lacks(tmp_path: Path) -> None:
    names = {"a": 1, "b": 2}
    path = tracks_file(tmp_path / "a.tracks.jsonl", names, {"owl": 7, "cow": 9})
    report = check(open_submission(path, EXPECTED), EXPECTED)
    assert report.sound
    assert {"left-out", "matched-by-id"} <= set(found(report))
    assert found(report)["left-out"].examples[0].text == "`cow`"
    with pytest.raises(DataError, match="no name in common"):
        open_submission(tracks_file(tmp_path / "b.tracks.jsonl", names, {"cow": 1}), EXPECTED)


def test_nothing_is_left_of_the_tracks(tmp_path: Path) -> None:
    (tmp_path / "cow.json").write_text(
        json.dumps(
            dataset_json(
                categories=[{"id": 9, "name": "cow"}, {"id": 7, "name": "owl"}],
                annotations=[{"id": 1, "iscrowd": 0, **entry(category=9)}],
            )
        )
    )
    report = check(open_submission(tmp_path / "cow.json", EXPECTED), EXPECTED)
    assert set(found(report)) == {"left-out", "no-prediction"}


def test_a_broken_tracks_file_is_bad_input(tmp_path: Path) -> None:
    path = tracks_file(tmp_path / "a.tracks.jsonl", {"clip1": 1}, {"fox": 1})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"a\.tracks\.jsonl"):
        open_submission(path, EXPECTED)
    path.write_text("")
    with pytest.raises(DataError, match="expected a tracks file"):
        open_submission(path, EXPECTED)


def dataset_json(**more: Any) -> Any:
    """Return the expected videos as a YouTube-VIS dataset."""
    videos = [
        {
            "id": k,
            "height": h,
            "width": w,
            "length": LENGTH,
            "file_names": [f"clip{k}/{t}" for t in range(LENGTH)],
        }
        for k, (h, w) in SIZES.items()
    ]
    categories = [{"id": c.id, "name": c.name} for c in EXPECTED.categories]
    return {"videos": videos, "categories": categories, **more}


def test_pseudo_labels_become_a_submission(tmp_path: Path) -> None:
    path = tmp_path / "pseudo.json"
    path.write_text(json.dumps(dataset_json(annotations=[{"id": 1, "iscrowd": 0, **entry()}])))
    submission = open_submission(path, EXPECTED)
    assert submission.entries == [entry()]


@pytest.mark.parametrize("annotations", [{}, {"annotations": ["not read"]}])
def test_expected_from_a_dataset(annotations: Any, tmp_path: Path) -> None:
    path = tmp_path / "valid.json"
    path.write_text(json.dumps(dataset_json(**annotations)))
    expected = read_expected(path)
    assert [(v.id, v.name, v.height, v.width, v.length) for v in expected.videos] == [
        (v.id, v.name, v.height, v.width, v.length) for v in EXPECTED.videos
    ]
    assert expected.categories == EXPECTED.categories


def test_expected_from_a_folder_of_frames(tmp_path: Path) -> None:
    import cv2

    for name in ("a2", "a10"):
        (tmp_path / name).mkdir()
        for t in range(2):
            cv2.imwrite(str(tmp_path / name / f"{t}.png"), np.zeros((6, 4, 3), np.uint8))
    expected = read_expected(tmp_path)
    rows = [changed(video_id=2, category_id=99), changed(category_id=-1, score=0.25)]
    report = check(Submission("", rows), expected)
    assert set(found(report)) == {"length", "negative-id"}
    assert found(report)["length"].examples[0].video == "a10"


@pytest.mark.parametrize("text", ["[]", "{}", "", '{"images": []}'])
def test_expected_that_is_no_dataset(text: str, tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(DataError, match=r"v\.json"):
        read_expected(tmp_path / "v.json")
