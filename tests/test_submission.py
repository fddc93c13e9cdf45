"""The faults of a submission: each is found and placed, and nothing else is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from pmvis_core import masks
from pmvis_core.errors import DataError
from pmvis_core.files import canonical_json
from pmvis_core.submission.check import check
from pmvis_core.submission.files import open_submission, read_expected
from pmvis_core.submission.report import EXAMPLES_KEPT, KINDS
from tests.submissions import (
    EXPECTED,
    FAULTY,
    SIZES,
    Entry,
    entry,
    found,
    judged,
    rle_of,
    sound,
    submissions,
)
from tests.test_submission_files import TEXTS

IN_A_MASK = {kind.name for kind in KINDS.values() if kind.unit == "mask"}


@pytest.mark.parametrize(("kind", "row", "text"), FAULTY)
def test_a_faulty_entry_is_placed_and_explained(kind: str, row: Entry, text: str) -> None:
    report = judged([*sound(), row])
    assert list(found(report)) == [kind]
    (example,) = found(report)[kind].examples
    assert (example.entry, text in example.text) == (4, True), example.text
    assert example.frame == (1 if kind in IN_A_MASK else None)
    assert report.sound == (KINDS[kind].severity == "warning")


def whole_list_cases() -> dict[str, list[Entry]]:
    """Return lists that only as a whole are odd, by kind."""
    return {
        "equal-scores": [entry(k, score=0.5) for k in SIZES],
        "too-many": sound() + [entry(5, 7, k / 200, first=k % 2) for k in range(101)],
        "video-without-prediction": [entry(1), entry(2, score=0.25)],
    }


@pytest.mark.parametrize("kind", whole_list_cases())
def test_what_only_the_whole_list_shows(kind: str) -> None:
    entries = whole_list_cases()[kind]
    report = judged(entries)
    assert report.sound
    assert kind in found(report)
    assert not judged(entries, strict=True).sound
    if kind == "too-many":
        assert found(report)[kind].examples[0].text == "101 predictions of category 7"
        assert kind not in found(judged(entries[:-1]))
    if kind == "video-without-prediction":
        assert found(report)[kind].examples[0].place == "video 5 `clip5`"


def test_every_kind_has_a_case() -> None:
    tried = {row[0] for row in (*FAULTY, *TEXTS)} | set(whole_list_cases())
    assert tried | {"matched-by-id", "left-out"} == set(KINDS)


def test_all_faults_of_a_list_at_once() -> None:
    rows = [row for _, row, _ in FAULTY]
    report = judged([*sound(), *rows, 5])
    assert {kind for kind, _, _ in FAULTY} | {"not-an-object"} <= set(found(report))
    assert report.predictions == len(rows) + 5
    assert found(report)["mask-size"].count == 2
    assert found(report)["missing-key"].extent == "2 entries in 1 video"


def test_one_entry_with_many_faults() -> None:
    row = {"video_id": 1, "category_id": 0, "score": 7, "segmentations": [rle_of(5)] * 4}
    report = judged([row])
    assert {"unknown-category", "score-range", "length", "mask-size"} <= set(found(report))
    assert (
        found(report)["mask-size"].examples[0].place
        == "entry 0, video 1 `clip1`, frame 0 and 3 more"
    )
    assert found(report)["mask-size"].extent == "4 masks in 1 video"


def test_many_cases_are_counted_and_few_are_shown() -> None:
    report = judged([{**entry(5), "video_id": 1, "score": k / 50} for k in range(50)])
    finding = found(report)["mask-size"]
    assert (finding.count, len(finding.examples)) == (100, EXAMPLES_KEPT)


def test_a_sound_list_has_no_finding() -> None:
    report = judged(sound(), strict=True)
    assert report.sound
    assert report.findings == ()
    assert (report.predictions, report.videos, report.masks) == (4, 3, 8)


def test_scores_of_zero_and_one_are_scores() -> None:
    assert judged([entry(1, score=0), entry(2, score=1), entry(5, score=1.0)]).findings == ()


def test_the_same_mask_in_another_frame_is_another_prediction() -> None:
    moved = entry()
    moved["segmentations"] = moved["segmentations"][::-1]
    assert judged([entry(), moved, *sound()[1:]]).sound


@settings(deadline=None, max_examples=150)
@given(submissions(), st.sampled_from(FAULTY), st.data())
def test_a_mutation_is_found_where_it_is(
    entries: list[Entry], fault: tuple[str, Entry, str], data: Any
) -> None:
    kind, row, _ = fault
    entries = [{**known, "score": known["score"] / 2} for known in entries]
    at = data.draw(st.integers(0, len(entries)))
    entries.insert(at, copy.deepcopy(row))
    if kind in {"duplicate", "same-masks"}:
        entries.insert(at, {**copy.deepcopy(row), "score": 0.75 if kind == "same-masks" else 0.25})
        at += 1
    finding = found(judged(entries))[kind]
    assert at in [example.entry for example in finding.examples]
    if KINDS[kind].severity == "fault":
        faults = [f for f in judged(entries).findings if f.severity == "fault"]
        assert [f.kind.name for f in faults] == [kind]
        assert {example.entry for example in finding.examples} == {at}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 30) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*entry(), "size", "counts", "x"]), inner, max_size=4)
    ),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values inside a JSON value."""
    keys: Any = ()
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
    return [path] * bool(path) + [p for key in keys for p in places(value[key], (*path, key))]


def oracle_refuses(entries: list[Any]) -> bool:
    """Tell by other means than the checker's whether a list breaks the format."""
    lengths = {video.id: (video.length, [video.height, video.width]) for video in EXPECTED.videos}
    try:
        for row in entries:
            length, size = lengths[row["video_id"]]
            assert row["category_id"] in (1, 7) and row["category_id"] is not True
            assert row["video_id"] is not True
            assert not isinstance(row["score"], bool | str) and 0 <= row["score"] <= 1
            assert type(row["segmentations"]) is list and len(row["segmentations"]) == length
            for rle in row["segmentations"]:
                if rle is None or rle in ([], {}):
                    continue
                assert rle["size"] == size and all(type(n) is int for n in rle["size"])
                assert isinstance(rle["counts"], str)
                masks.validate(rle, "")
                assert coco_mask.area(rle) == masks.area(rle)
    except (AssertionError, KeyError, TypeError, DataError):
        return True
    return not entries


@settings(deadline=None, max_examples=300)
@given(submissions(), st.data())
def test_any_json_in_any_place_is_judged_as_the_oracle_does(
    entries: list[Entry], data: Any
) -> None:
    entries = copy.deepcopy(entries)
    *way, last = data.draw(st.sampled_from(places(entries)))
    target: Any = entries
    for key in way:
        target = target[key]
    target[last] = data.draw(JSON)
    report = judged(entries)
    faults = {f.kind.name for f in report.findings if f.severity == "fault"} - {"duplicate"}
    assert bool(faults) == oracle_refuses(entries), report.findings


def test_a_report_as_json_is_finite_and_complete() -> None:
    report = judged([row for _, row, _ in FAULTY])
    value = json.loads(canonical_json(report.as_json()))
    assert value["sound"] is False
    assert [row["kind"] for row in value["findings"]] == list(found(report))
    assert all(row["fix"] and row["count"] for row in value["findings"])
    assert set(value["findings"][0]["examples"][0]) == {
        *("entry", "video_id", "video", "frame", "frames", "text")
    }


@pytest.mark.parametrize("case", range(1, 9))
def test_golden_predictions_are_read_to_their_end(case: int, shared: Path) -> None:
    folder = shared / "golden" / "vis_eval" / f"case_{case:02}"
    expected = read_expected(folder / "gt.json")
    report = check(open_submission(folder / "pred.json", expected), expected)
    assert report.predictions == len(json.loads((folder / "pred.json").read_text()))
    assert not {"json", "malformed-rle", "run-sum", "unknown-video"} & set(found(report))
