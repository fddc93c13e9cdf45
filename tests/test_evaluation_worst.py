"""The list of the worst videos, and subsets of videos."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmvis_core.doubts import Doubts
from pmvis_core.errors import DataError
from pmvis_core.evaluation.average_precision import evaluate
from pmvis_core.evaluation.curves import accumulate
from pmvis_core.evaluation.subset import of_all_objects, read_subset
from pmvis_core.evaluation.worst import worst_json, worst_table, worst_videos
from pmvis_core.types import VideoInfo
from tests.evaluation_data import CATEGORIES, VIDEOS, dataset, random_matches, random_tracks, track

NAMES = {video.id: video.name for video in VIDEOS}
SQUARE: Any = [(2, 2, 12, 12)] * 4


def test_a_videos_score_is_its_ap_as_the_only_video() -> None:
    rng = np.random.default_rng(2)
    gts, dts = random_tracks(rng, 8, scored=False), random_tracks(rng, 12, scored=True)
    scores = worst_videos(evaluate(dataset(*gts), dts).matches, CATEGORIES, 9, NAMES)
    assert {score.video_id for score in scores} == {1, 2}
    aps = [score.ap for score in scores]
    assert aps == sorted(aps, key=lambda ap: ap or 0.0)
    for score in scores:
        own = dataset(*(gt for gt in gts if gt.video_id == score.video_id))
        alone = evaluate(own, [dt for dt in dts if dt.video_id == score.video_id])
        assert score.ap == alone.summary["AP"]
        pairs = alone.pairs
        hits = sum(int(((p.matches != 0) & ~p.ignored)[:, 0, 0].sum()) for p in pairs)
        wrong = sum(int(((p.matches == 0) & ~p.ignored)[:, 0, 0].sum()) for p in pairs)
        objects = sum(not gt.iscrowd for gt in own.annotations)
        assert (score.hits, score.misses, score.false_positives, score.objects) == (
            hits,
            objects - hits,
            wrong,
            objects,
        )
        assert score.name == NAMES[score.video_id]


def test_the_worst_come_first_and_those_without_objects_last() -> None:
    videos = tuple(VideoInfo(n, f"v{n}", 24, 24, 4) for n in range(1, 6))
    gts = [track(n, SQUARE, video_id=n) for n in (1, 2, 3)] + [track(9, SQUARE, video_id=3)]
    dts = [
        track(1, SQUARE, video_id=1, score=0.5),
        track(2, [(13, 13, 20, 20)] * 4, video_id=2, score=0.5),
        track(3, SQUARE, video_id=4, score=0.5),
    ]
    matches = evaluate(dataset(*gts, videos=videos), dts).matches
    found = worst_videos(matches, CATEGORIES, 9, {1: "one", 4: "four"})
    # Video 3 misses two objects and video 2 one; video 5 has no track at all.
    assert [score.video_id for score in found] == [3, 2, 1, 4]
    assert [score.ap for score in found] == [0.0, 0.0, pytest.approx(1.0), None]
    assert [score.false_positives for score in found] == [0, 1, 0, 1]
    assert worst_videos(matches, CATEGORIES, 2, {}) == tuple(
        replace(score, name=str(score.video_id)) for score in found[:2]
    )
    lines = worst_table(found).splitlines()
    assert lines[1].split() == ["3", "3", "0.000", "2", "0", "2", "0"]
    assert lines[4].split()[:3] == ["4", "four", "-"]
    assert len({len(line) for line in lines}) == 1
    assert json.loads(json.dumps(worst_json(found)))[3]["ap"] is None


@pytest.mark.parametrize("protocol", ["ytvis", "ovis"])
def test_the_group_of_all_objects_has_the_same_bits(protocol: str) -> None:
    matches = random_matches(np.random.default_rng(0), [1, 2, 3], protocol)
    alone = accumulate(CATEGORIES, of_all_objects(matches))
    whole = accumulate(CATEGORIES, matches)
    for name in ("AP", "AP50", "AP75", "AR1", "AR10", "AR100"):
        assert alone.summary[name] == whole.summary[name]
    assert alone.per_category == whole.per_category


HASHED = (VideoInfo(3, "0065", 2, 2, 1), VideoInfo(7, "cat", 2, 2, 1), VideoInfo(65, "b", 2, 2, 1))
FORMS = {
    "3\n\n  7 # the good one\n# none\n": {3, 7},
    "\ufeffcat\r\nb\r\n": {7, 65},
    "65": {65},
    '["cat", 3]': {3, 7},
    '["7"]': {7},
    json.dumps({"videos": [{"id": 7, "name": "cat", "height": 2, "width": 2, "length": 1}]}): {7},
    json.dumps(
        {"videos": [{"id": 1, "height": 2, "width": 2, "file_names": ["b/0.jpg"]}], "categories": 0}
    ): {65},
}


@pytest.mark.parametrize("text", FORMS)
def test_a_subset_may_be_lines_or_json(text: str, tmp_path: Path) -> None:
    path = tmp_path / "subset"
    path.write_text(text, encoding="utf-8")
    assert read_subset(path, HASHED) == FORMS[text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0065", r"`0065` means videos \[3, 65\], expected one"),
        ("dog\n12\ncat\nx\ny", "lists `dog`, `12`, `x` and 1 more, expected ids or names"),
        ("[true]", "lists `True`"),
        ("[[3]]", "lists `\\[3\\]`"),
        ("[3.5]", "lists `3.5`"),
        ("[3,", "not valid JSON at line 1"),
        ("# nothing\n", "lists no video"),
        ("", "lists no video"),
        ("[]", "lists no video"),
        ('{"videos": []}', "lists no video"),
        ("{}", "has no `videos`"),
        ('{"videos": [{"id": 8, "name": "x", "height": 2, "width": 2, "length": 1}]}', "video 8"),
    ],
)
def test_what_is_no_subset_is_told(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "subset.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as told:
        read_subset(path, HASHED)
    assert "subset" in told.value.message


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_subset(tmp_path / "x", HASHED)
    with pytest.raises(DataError, match="cannot be read"):
        read_subset(tmp_path, HASHED)
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_subset(tmp_path / "x", HASHED)


def test_videos_told_by_id_only_are_a_doubt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "subset.json"
    path.write_text('{"videos": [{"id": 7, "name": "x", "height": 2, "width": 2, "length": 1}]}')
    doubts = Doubts()
    assert read_subset(path, HASHED, doubts) == {7}
    assert "matched by id" in doubts.texts[0]
    assert not caplog.records
    read_subset(path, HASHED)
    assert "matched by id" in caplog.text
