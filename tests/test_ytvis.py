"""YouTube-VIS JSON: round trips, the three forms of masks, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pmvis_core import masks
from pmvis_core.doubts import Doubts
from pmvis_core.errors import DataError
from pmvis_core.files import canonical_json
from pmvis_core.formats.predictions import match_categories, match_videos, read_predictions
from pmvis_core.formats.ytvis import (
    Dataset,
    open_tracks,
    read_dataset,
    read_results,
    results_as_tracks,
    sniff,
)
from pmvis_core.formats.ytvis_writer import as_dataset, as_results
from pmvis_core.tracks_io import TracksHeader, TracksWriter
from pmvis_core.types import Category, Supervision, Track, VideoInfo, VideoTracks

CATEGORIES = (Category(1, "person"), Category(7, "giant_panda"))
NAMES = st.text(string.ascii_letters + "_ 0é", min_size=1, max_size=6)
SHARES = st.floats(0, 1)


class Source:
    """Tracks in memory."""

    def __init__(self, header: TracksHeader, videos: list[VideoTracks]) -> None:
        """Hold them."""
        self.header = header
        self.videos = videos

    def __iter__(self) -> Any:
        """Yield the videos."""
        return iter(self.videos)


@st.composite
def tracks(draw: Any, number: int, video: VideoInfo) -> Track:
    """Draw a track, with or without the facts that YouTube-VIS has no key for."""
    shape = (video.length, video.height, video.width)
    pixels = draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, 1)))
    present = draw(st.lists(st.booleans(), min_size=video.length, max_size=video.length))
    rles = tuple(masks.encode(m) if p else None for m, p in zip(pixels, present, strict=True))
    score = draw(SHARES)
    usual = tuple(None if rle is None else score for rle in rles)
    own = tuple(None if rle is None else draw(SHARES) for rle in rles)
    return Track(
        id=number,
        category_id=draw(st.sampled_from(CATEGORIES)).id,
        score=score,
        frame_scores=draw(st.sampled_from([usual, own])),
        rles=rles,
        instance=draw(st.none() | st.integers(0, 9)),
        keyframe=draw(st.none() | st.integers(0, video.length - 1)),
        supervision=draw(st.sampled_from(list(Supervision))),
        lineage=draw(st.sampled_from([{}, {"filter": {"topk": 4}}, {"refine": {"a": [1, None]}}])),
        quality=draw(st.sampled_from([None, 0.0, 0.25, 1.0])),
    )


@st.composite
def sources(draw: Any) -> Source:
    """Draw a whole tracks file."""
    videos = []
    for number in range(draw(st.integers(0, 3))):
        size = [draw(st.integers(1, 4)) for _ in range(3)]
        files = tuple(f"v/{t}.jpg" for t in range(size[2])) if draw(st.booleans()) else ()
        info = VideoInfo(number * 3 + 1, draw(NAMES), size[0], size[1], size[2], files)
        ids = draw(st.lists(st.integers(0, 30), max_size=4, unique=True))
        rows = [draw(tracks(track_id, info)) for track_id in ids]
        cut = draw(st.integers(0, len(rows)))
        videos.append(VideoTracks(info, tuple(rows[:cut]), tuple(rows[cut:])))
    lineage = draw(st.sampled_from([(), ({"stage": "infer", "seed": 1},)]))
    return Source(TracksHeader(CATEGORIES, lineage), videos)


def written(folder: Path, value: Any, name: str = "x.json") -> Path:
    """Write JSON and return where."""
    path = folder / name
    path.write_text(json.dumps(value))
    return path


@given(source=sources())
@settings(max_examples=60, deadline=None)
def test_dataset_form_keeps_all_of_a_tracks_file(
    source: Source, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.mktemp("a"), as_dataset(source))
    back = open_tracks(path)
    assert back.header == source.header
    assert list(back) == source.videos
    assert canonical_json(as_dataset(back)) == canonical_json(as_dataset(source))


@given(source=sources())
@settings(max_examples=40, deadline=None)
def test_results_form_keeps_what_is_scored(
    source: Source, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("a")
    truth = read_dataset(written(folder, as_dataset(source)))
    rows = read_results(written(folder, as_results(source), "r.json"), truth)
    back = results_as_tracks(rows, truth)
    assert canonical_json(as_results(back)) == canonical_json(
        [
            {**row, "segmentations": without_empty(row["segmentations"])}
            for row in as_results(source)
        ]
    )
    assert [video.video for video in back] == [video.video for video in source]


def without_empty(rles: list[Any]) -> list[Any]:
    """Return masks with null for those without a pixel."""
    return [rle if rle and masks.area(rle) else None for rle in rles]


def dataset_json(**changes: Any) -> dict[str, Any]:
    """Return a small dataset: one video of two frames, 4x5, with one annotation."""
    square = np.zeros((4, 5), np.uint8)
    square[1:3, 1:4] = 1
    annotation = {
        "id": 3,
        "video_id": 1,
        "category_id": 1,
        "iscrowd": 0,
        "segmentations": [masks.encode(square), None],
        "bboxes": [[1.0, 1.0, 3.0, 2.0], None],
        "areas": [6, None],
    }
    return {
        "videos": [
            {"id": 1, "height": 4, "width": 5, "length": 2, "file_names": ["c/0.jpg", "c/1.jpg"]}
        ],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [{**annotation, **changes}],
    }


def test_other_code_can_train_on_the_dataset_form(tmp_path: Path) -> None:
    """Keys and values that VIS loaders read: 1-based ids, xywh boxes, null where absent."""
    (track,) = next(iter(open_tracks(written(tmp_path, dataset_json(score=0.5))))).tracks
    info = VideoInfo(1, "c", 4, 5, 2, ("c/0.jpg", "c/1.jpg"))
    out = as_dataset(Source(TracksHeader(CATEGORIES), [VideoTracks(info, (track,))]))
    assert out["videos"][0]["file_names"] == ["c/0.jpg", "c/1.jpg"]
    assert out["categories"][1] == {"id": 7, "name": "giant_panda", "supercategory": "object"}
    (row,) = out["annotations"]
    assert {key: row[key] for key in ("id", "video_id", "category_id", "iscrowd", "score")} == {
        "id": 3, "video_id": 1, "category_id": 1, "iscrowd": 0, "score": 0.5
    }  # fmt: skip
    assert row["bboxes"] == [[1.0, 1.0, 3.0, 2.0], None]
    assert row["areas"] == [6, None]
    assert (row["height"], row["width"], row["length"]) == (4, 5, 2)
    assert isinstance(row["segmentations"][0]["counts"], str)


def test_foreign_facts_survive_a_round_trip(tmp_path: Path) -> None:
    """Areas and boxes that the masks do not imply, and keys we do not know, come back."""
    facts = {"areas": [6.5, None], "occlusion": ["no_occlusion", None], "noise": {"a": 1}}
    back = as_dataset(open_tracks(written(tmp_path, dataset_json(**facts))))["annotations"][0]
    assert {key: back[key] for key in facts} == facts
    assert "score" not in back
    assert "pmvis" not in back


def test_score_decides_the_supervision(tmp_path: Path) -> None:
    for score, expected in ((None, Supervision.MASK), (0.25, Supervision.PSEUDO)):
        source = open_tracks(written(tmp_path, dataset_json(score=score)))
        (track,) = next(iter(source)).tracks
        assert track.supervision is expected
        assert track.frame_scores == (score or 1.0, None)


def test_crowds_are_ignored_tracks(tmp_path: Path) -> None:
    video = next(iter(open_tracks(written(tmp_path, dataset_json(iscrowd=1)))))
    assert not video.tracks
    assert [track.id for track in video.ignored] == [3]


def test_polygons_and_plain_runs_are_read(tmp_path: Path) -> None:
    runs = {"size": [4, 5], "counts": [5, 2, 2, 2, 2, 2, 5]}
    polygon = [[1.0, 1.0, 4.0, 1.0, 4.0, 3.0, 1.0, 3.0]]
    rows = read_dataset(written(tmp_path, dataset_json(segmentations=[runs, polygon]))).annotations
    assert rows[0].rles[0] == dataset_json()["annotations"][0]["segmentations"][0]
    assert rows[0].rles[1] == masks.from_polygons(polygon, 4, 5)
    assert rows[0].converted


@pytest.mark.parametrize("absent", [None, [], {}])
def test_three_spellings_of_absence(tmp_path: Path, absent: Any) -> None:
    (row,) = read_dataset(
        written(tmp_path, dataset_json(segmentations=[absent, absent]))
    ).annotations
    assert row.rles == (None, None)


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"segmentations": None}, "annotation 3 has no `segmentations`"),
    ({"segmentations": [{"size": [4, 5], "counts": "0"}, None]}, "annotation 3, frame 0"),
    ({"segmentations": [None, {"size": [4, 5], "counts": [1]}]}, "annotation 3, frame 1"),
    ({"segmentations": [{"counts": "0"}, None]}, "frame 0: the mask is neither"),
    ({"segmentations": ["mask", None]}, "frame 0: the mask is neither"),
    ({"segmentations": [[[1, 2, 3]], None]}, "frame 0: polygon"),
    ({"segmentations": [[["a"]], None]}, "frame 0: a polygon"),
    ({"score": "high"}, "annotation 3 has score 'high'"),
    ({"score": 10**400}, "expected a finite number"),
    ({"video_id": "1"}, "annotation 3 has '1' for `video_id`"),
    ({"category_id": True}, "annotation 3 has True for `category_id`"),
    ({"id": None}, "annotation has None for `id`"),
    ({"areas": ["big", None]}, "`areas` is no list of numbers"),
    ({"pmvis": 1}, "`pmvis` is no object"),
    ({"pmvis": {"keyframe": "2"}}, "`pmvis.keyframe` is '2'"),
    ({"pmvis": {"supervision": "magic"}}, "supervision is `magic`"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_ROWS)
def test_malformed_annotations_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(written(tmp_path, dataset_json(**changes)))
    assert message in caught.value.message
    assert "x.json" in caught.value.message


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"segmentations": [None]}, "1 masks, the video has 2 frames"),
    ({"segmentations": [masks.empty(4, 5), masks.from_uncompressed([1, 1], 1, 2)]}, "is 1x2"),
    ({"category_id": 5}, "category id 5, not in the vocabulary"),
    ({"video_id": 5}, "of video 5"),
    ({"score": 1.5}, "score 1.5, expected a number from 0 to 1"),
    ({"pmvis": {"frame_scores": [0.5]}}, "1 frame scores"),
    ({"pmvis": {"keyframe": 2}}, "key frame 2 of 2"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), MISFITS)
def test_annotations_that_do_not_fit_are_no_tracks(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        list(open_tracks(written(tmp_path, dataset_json(**changes))))
    assert message in caught.value.message


def test_duplicate_ids_are_no_tracks(tmp_path: Path) -> None:
    twice = dataset_json()
    twice["annotations"] *= 2
    with pytest.raises(DataError, match="share an id"):
        list(open_tracks(written(tmp_path, twice)))
    twice = dataset_json()
    twice["videos"] *= 2
    with pytest.raises(DataError, match="video id occurs twice"):
        list(open_tracks(written(tmp_path, twice)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"{}", "no `videos`"),
        (b'{"videos": [', "not valid JSON"),
        (b'{"videos": [], "categories": [{"id": 1}, {"id": 1}]}', "category id 1 occurs twice"),
        (b'{"videos": [], "annotations": []}', "no `categories`"),
        (b'{"videos": [{"id": 1, "height": 0, "width": 1}], "categories": []}', "video 1 is 0x1"),
        (b'{"videos": [{"height": 0, "width": 1}], "categories": []}', "no `id`"),
        (b"\x80\x04\x95pickle", "not UTF-8"),
        (b"\x1f\x8b\x08cut", "cannot be read to its end"),
    ],
)
def test_files_that_are_no_dataset(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path / "x.json")
    assert message in caught.value.message


def test_videos_without_their_frames_hold_no_tracks(tmp_path: Path) -> None:
    for change in ({"length": 3}, {"length": 0, "file_names": []}):
        value = dataset_json()
        value["videos"][0].update(change)
        with pytest.raises(DataError, match="file names"):
            list(open_tracks(written(tmp_path, value)))


def test_published_validation_file_gives_videos(tmp_path: Path) -> None:
    dataset = read_dataset(written(tmp_path, {**dataset_json(), "annotations": None}))
    assert not dataset.annotated
    assert [video.name for video in dataset.videos] == ["c"]


def result(**changes: Any) -> dict[str, Any]:
    """Return one result for `dataset_json`."""
    return {"video_id": 1, "category_id": 1, "score": 0.5, "segmentations": [None, None], **changes}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([result(), result(video_id=9)], "result 1 is of video 9"),
        ([result(score=None)], "result 0 has no `score`"),
        ([3], "result 0 is a int"),
        ([result(segmentations=3)], "result 0 has no `segmentations`"),
        ({"a": 1}, "is no list"),
    ],
)
def test_malformed_results_are_named(tmp_path: Path, entries: Any, message: str) -> None:
    truth = read_dataset(written(tmp_path, dataset_json()))
    with pytest.raises(DataError) as caught:
        read_results(written(tmp_path, entries, "r.json"), truth)
    assert message in caught.value.message


def test_not_a_number_is_no_score(tmp_path: Path) -> None:
    truth = read_dataset(written(tmp_path, dataset_json()))
    path = tmp_path / "r.json"
    path.write_text(json.dumps([result(score=float("nan"))]))
    with pytest.raises(DataError, match=r"holds `NaN`, expected a finite number"):
        read_results(path, truth)


@given(score=st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=50, deadline=None)
def test_scores_keep_every_bit(score: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("a")
    truth = read_dataset(written(folder, dataset_json()))
    (row,) = read_results(written(folder, [result(score=score)], "r.json"), truth)
    assert row.score == score


def test_kinds_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = TracksHeader(tuple(Category(i, f"category {i}") for i in range(1, 9000)))
    for name, header in (("short", TracksHeader(CATEGORIES)), ("long", long)):
        for suffix in (".tracks.jsonl", ".tracks.jsonl.gz"):
            with TracksWriter(tmp_path / (name + suffix), header):
                pass
            assert sniff(tmp_path / (name + suffix)) == "tracks"
    assert sniff(written(tmp_path, dataset_json())) == "dataset"
    assert sniff(written(tmp_path, [result()])) == "results"
    (tmp_path / "x.gz").write_bytes(gzip.compress(b" \n" + json.dumps(dataset_json()).encode()))
    assert sniff(tmp_path / "x.gz") == "dataset"
    assert read_dataset(tmp_path / "x.gz").videos[0].id == 1
    data = (tmp_path / "long.tracks.jsonl").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))
    assert sniff(Path("-")) == "tracks"
    assert list(open_tracks(Path("-"))) == []


def test_results_alone_are_no_tracks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no videos") as caught:
        open_tracks(written(tmp_path, [result()]))
    assert "pmvis convert" in (caught.value.hint or "")


def test_categories_are_matched_by_id_then_name() -> None:
    truth = (Category(1, "giant_panda"), Category(2, "person"))
    match: Callable[..., Any] = lambda *c: match_categories(c, truth, "x")  # noqa: E731
    assert match(Category(1, "Giant panda"), Category(2, "person")) == {1: 1, 2: 2}
    assert match(Category(2, "person"), Category(9, "cat")) == {2: 2, 9: None}
    assert match(Category(1, "person"), Category(2, "giant-panda")) == {1: 2, 2: 1}
    assert match(Category(5, "person"), Category(6, "cat")) == {5: 2, 6: None}
    with pytest.raises(DataError) as caught:
        match(Category(1, "cat"))
    assert "1 `cat`" in caught.value.message
    assert "1 `giant_panda`, 2 `person`" in caught.value.message


def test_videos_are_matched_by_id_then_name() -> None:
    truth = [VideoInfo(1, "a", 4, 5, 2), VideoInfo(2, "b", 4, 5, 2)]
    doubts = Doubts()
    match: Callable[..., Any] = lambda *v: match_videos(v, truth, "x", doubts)  # noqa: E731
    assert match(VideoInfo(2, "b", 4, 5, 2)) == {2: 2}
    assert match(VideoInfo(1, "b", 4, 5, 2), VideoInfo(2, "a", 4, 5, 2)) == {1: 2, 2: 1}
    assert not doubts.texts
    assert match(VideoInfo(2, "other", 4, 5, 2)) == {2: 2}
    assert "matched by id: `other` with `b`" in doubts.texts[0]
    for stranger in (VideoInfo(2, "other", 4, 5, 3), VideoInfo(3, "other", 4, 5, 2)):
        with pytest.raises(DataError, match=r"holds video . `other`"):
            match(stranger)
        with pytest.raises(DataError, match=r"holds video . `other`"):
            match(VideoInfo(1, "a", 4, 5, 2), stranger)


def test_predictions_come_in_three_forms(tmp_path: Path) -> None:
    truth = read_dataset(written(tmp_path, dataset_json()))
    source = open_tracks(written(tmp_path, dataset_json(score=0.5)))
    with TracksWriter(tmp_path / "a.tracks.jsonl", source.header) as out:
        for video in source:
            out.write(video)
    paths = [
        tmp_path / "a.tracks.jsonl",
        written(tmp_path, as_dataset(source), "a.json"),
        written(tmp_path, as_results(source), "b.json"),
    ]
    rows = [read_predictions(path, truth) for path in paths]
    assert [[(r.id, r.video_id, r.category_id, r.score, r.rles) for r in row] for row in rows] == [
        [(1, 1, 1, 0.5, truth.annotations[0].rles)]
    ] * 3


def test_annotations_as_predictions_score_1(tmp_path: Path) -> None:
    path = written(tmp_path, dataset_json())
    (row,) = read_predictions(path, read_dataset(path))
    assert row.score == 1.0


def test_iterating_needs_no_file() -> None:
    dataset = Dataset("x", CATEGORIES, (VideoInfo(1, "a", 4, 5, 2),), ())
    assert [video.tracks for video in dataset] == [()]
