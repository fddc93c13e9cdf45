"""The evaluator against golden cases of the official one, and against brute force."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmvis_core import masks
from pmvis_core.doubts import Doubts
from pmvis_core.errors import DataError, UsageError
from pmvis_core.evaluation.average_precision import evaluate
from pmvis_core.evaluation.label_quality import label_quality
from pmvis_core.evaluation.protocol import iou_thresholds, recall_points
from pmvis_core.evaluation.tables import category_table, metrics, official_table
from pmvis_core.formats.ytvis import Dataset
from pmvis_core.formats.ytvis_annotation import Annotation
from pmvis_core.types import Category, Track, VideoInfo, VideoTracks
from tests import parity_vis_eval


@pytest.mark.parametrize("number", range(1, 9))
def test_golden_case(shared: Path, number: int) -> None:
    """Every number, array, IoU and match of the official evaluator, without any tolerance."""
    folder = shared / "golden" / "vis_eval" / f"case_{number:02d}"
    expected = json.loads((folder / "expected.json").read_text())
    protocol = "ovis" if expected["evaluator"] == "ovis" else "ytvis"
    for way, found in parity_vis_eval.evaluations(folder, protocol):
        wrong = [row for row in parity_vis_eval.compare(found, expected) if not row[1]]
        assert not wrong, way


HEIGHT, WIDTH, FRAMES = 6, 7, 3
CATEGORIES = (Category(1, "cat"), Category(4, "dog"))
VIDEOS = tuple(VideoInfo(n, f"v{n}", HEIGHT, WIDTH, FRAMES) for n in (2, 1))
AREAS = {"": (0, 1e10), "s": (0, 128**2), "m": (128**2, 256**2), "l": (256**2, 1e10)}
HIDDEN = {"": (0, 1), "so": (0, 0.25), "mo": (0.25, 0.5), "ho": (0.5, 1)}
LEVELS = {"no_occlusion": 0.0, "slight_occlusion": 0.25, "severe_occlusion": 0.75}


def rectangles(*boxes: tuple[int, int, int, int] | None) -> tuple[Any, ...]:
    """Return one mask a frame from xyxy rectangles."""
    out: list[Any] = []
    for box in boxes:
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
        if box is not None:
            pixels[box[1] : box[3], box[0] : box[2]] = 1
        out.append(None if box is None else masks.encode(pixels))
    return tuple(out)


def row(number: int, boxes: Any, **changes: Any) -> Annotation:
    """Return an annotation of video 1 and category 1."""
    rles = rectangles(*boxes)
    areas = tuple(None if rle is None else masks.area(rle) for rle in rles)
    return replace(Annotation(number, 1, 1, rles, areas, areas=areas), **changes)


def dataset(*rows: Annotation, **changes: Any) -> Dataset:
    """Return a ground truth."""
    return replace(Dataset("truth", CATEGORIES, VIDEOS, rows), **changes)


SQUARE = [(1, 1, 4, 4)] * FRAMES
"""Nine pixels in each frame."""


def drawn(rng: np.random.Generator, number: int, truth: bool) -> Annotation:
    """Draw an annotation or a prediction near one of two places, so that some match."""
    boxes: list[Any] = []
    place = rng.integers(0, 2) * 2
    for _ in range(FRAMES):
        x, y = place + rng.integers(0, 2, 2)
        boxes.append(None if rng.random() < 0.15 else (x, y, x + 3, y + 2 + rng.integers(0, 2)))
    found = row(
        number,
        boxes,
        video_id=int(rng.integers(1, 3)),
        category_id=int(rng.choice([1, 4])),
        score=None if truth else float(rng.integers(0, 6)) / 10,
    )
    if not truth:
        return found
    size = float(rng.choice([100.0, 128.0**2, 2e4, 256.0**2, 9e4]))
    return replace(
        found,
        areas=(size, None, size),
        iscrowd=bool(rng.random() < 0.2),
        extra={"occlusion": [str(level) for level in rng.choice(list(LEVELS), FRAMES)]},
    )


@given(seed=st.integers(0, 2**32 - 1), protocol=st.sampled_from(["ytvis", "ovis"]))
@settings(max_examples=40, deadline=None)
def test_against_the_definition(seed: int, protocol: str) -> None:
    """Small random cases against a plain evaluator made of dense masks and definitions."""
    rng = np.random.default_rng(seed)
    gts = [drawn(rng, n + 1, truth=True) for n in range(rng.integers(0, 7))]
    dts = [drawn(rng, n + 1, truth=False) for n in range(rng.integers(0, 12))]
    found = evaluate(dataset(*gts), dts, protocol).summary
    for name, value in found.items():
        expected = by_definition(gts, dts, name)
        assert value == (expected if expected is None else pytest.approx(expected, abs=1e-12)), name


def by_definition(gts: list[Annotation], dts: list[Annotation], name: str) -> float | None:
    """Return one summary number: the mean over categories and IoU thresholds."""
    group = name.removeprefix("AP").removeprefix("AR")
    limit = {"AR1": 1, "AR10": 10}.get(name, 100)
    thresholds = {"AP50": [0.5], "AP75": [0.75]}.get(name, iou_thresholds().tolist())
    area = AREAS.get(group, AREAS[""])
    hidden = HIDDEN.get(group, HIDDEN[""])
    values = []
    for category in CATEGORIES:
        for threshold in thresholds:
            ranked, number = [], 0
            for video in VIDEOS:
                g = [x for x in gts if (x.video_id, x.category_id) == (video.id, category.id)]
                d = [x for x in dts if (x.video_id, x.category_id) == (video.id, category.id)]
                out = [not (area[0] <= mean_area(x) <= area[1]) for x in g]
                out = [o or not (hidden[0] <= hiding(x) <= hidden[1])
                       for o, x in zip(out, g, strict=True)]  # fmt: skip
                out = [o or x.iscrowd for o, x in zip(out, g, strict=True)]
                number += out.count(False)
                ranked += [(video.id, *one) for one in verdicts(d, g, out, threshold, area)[:limit]]
            if number == 0:
                continue
            ranked.sort(key=lambda one: (-one[1], one[0]))
            hits = [hit for _, _, hit in ranked if hit is not None]
            true = np.cumsum(hits)
            recall = true / number
            precision = true / np.arange(1, len(hits) + 1)
            if name.startswith("AR"):
                values.append(max(recall, default=0.0))
            else:
                values += [
                    max(
                        (p for p, r in zip(precision, recall, strict=True) if r >= point), default=0
                    )
                    for point in recall_points()
                ]
    return float(np.mean(values)) if values else None


def verdicts(
    dts: list[Annotation], gts: list[Annotation], out: list[bool], threshold: float, area: Any
) -> list[tuple[float, bool | None]]:
    """Return score and hit (None: does not count) of each prediction, best first."""
    free = set(range(len(gts)))
    told: list[tuple[float, bool | None]] = []
    for dt in sorted(dts, key=lambda x: -(x.score or 0)):
        ious = [dense_iou(dt, gt) for gt in gts]
        reach = [g for g in range(len(gts)) if g in free and ious[g] >= threshold]
        reach = [g for g in reach if not out[g]] or reach
        best = max(reach, key=lambda g: (ious[g], g), default=None)
        if best is None:
            inside = area[0] <= mean_area(replace(dt, areas=dt.mask_areas)) <= area[1]
            told.append((dt.score or 0.0, False if inside else None))
            continue
        if not gts[best].iscrowd:
            free.discard(best)
        told.append((dt.score or 0.0, None if out[best] else True))
    return told


def dense_iou(a: Annotation, b: Annotation) -> float:
    """Return the track IoU of pixel volumes."""
    empty = np.zeros((HEIGHT, WIDTH), np.uint8)
    one, other = (
        np.stack([empty if rle is None else masks.decode(rle) for rle in x.rles]) for x in (a, b)
    )
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 0.0


def mean_area(x: Annotation) -> float:
    """Return the mean stated area."""
    areas = [a for a in x.areas or () if a]
    return sum(areas) / len(areas) if areas else 0.0


def hiding(x: Annotation) -> float:
    """Return the occlusion score: the mean of the worse half."""
    levels = sorted(LEVELS[level] for level in x.extra["occlusion"])
    half = levels[-math.ceil(len(levels) / 2) :]
    return sum(half) / len(half)


def test_ground_truth_against_itself_is_perfect() -> None:
    truth = dataset(row(1, SQUARE), row(2, SQUARE, video_id=2, category_id=4))
    found = evaluate(truth, [replace(r, score=0.5) for r in truth.annotations])
    assert found.summary["AR1"] == 1.0
    assert found.summary["AP"] == pytest.approx(1.0)
    assert [r.category.id for r in found.per_category] == [1, 4]


def test_no_ground_truth_gives_null_not_zero() -> None:
    truth = dataset(row(1, SQUARE))
    found = metrics(evaluate(truth, []))
    assert (found["AP"], found["APl"], found["AR1"]) == (0.0, None, 0.0)
    assert found["per_category"] == [
        {"id": 1, "name": "cat", "AP": 0.0, "AP50": 0.0, "AP75": 0.0, "AR1": 0.0, "AR10": 0.0},
        {"id": 4, "name": "dog", "AP": None, "AP50": None, "AP75": None, "AR1": None, "AR10": None},
    ]
    assert set(evaluate(dataset(), []).summary.values()) == {None}


def test_tables_keep_the_official_spacing() -> None:
    truth = dataset(row(1, SQUARE, extra={"occlusion": ["no_occlusion", None, None]}))
    lines = official_table(evaluate(truth, [row(1, SQUARE, score=1.0)])).splitlines()
    assert lines[0] == (
        " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 1.000"
    )
    assert lines[1] == (
        " Average Precision  (AP) @[ IoU=0.50      | area=   all | maxDets=100 ] = 1.000"
    )
    assert lines[4] == (
        " Average Precision  (AP) @[ IoU=0.50:0.95 | area=medium | maxDets=100 ] = -1.000"
    )
    assert lines[6] == (
        " Average Recall     (AR) @[ IoU=0.50:0.95 | area=   all | maxDets=  1 ] = 1.000"
    )
    ovis = evaluate(truth, [row(1, SQUARE, score=1.0)], "ovis")
    assert official_table(ovis).splitlines()[7] == (
        " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | occ=medium | maxDets=100 ]"
        " = -1.000"
    )
    assert category_table(ovis).splitlines()[2].split() == ["4", "dog", "-", "-", "-", "-", "-"]


CROOKED = (masks.encode(np.ones((3, 3), np.uint8)),) * FRAMES
ODD: list[tuple[Dataset, list[Annotation], str]] = [
    (dataset(), [], "holds not one annotation"),
    (dataset(row(1, SQUARE)), [], "not one prediction"),
    (dataset(row(0, SQUARE)), [row(1, SQUARE, score=1.0)], "has id 0"),
    (dataset(row(3, SQUARE), row(3, SQUARE)), [row(1, SQUARE, score=1.0)], "evaluated in place"),
    (dataset(row(3, SQUARE), videos=VIDEOS * 2), [row(1, SQUARE, score=1.0)], "video ids occur"),
    (dataset(row(3, SQUARE, video_id=9)), [row(1, SQUARE, score=1.0)], "not listed"),
    (dataset(row(3, SQUARE, category_id=9)), [row(1, SQUARE, score=1.0)], "unlisted categories"),
    (dataset(row(3, SQUARE, areas=None)), [row(1, SQUARE, score=1.0)], "get those of their masks"),
    (dataset(row(3, SQUARE)), [row(1, SQUARE, score=1.0, category_id=9)], "category id 9"),
    (dataset(row(3, SQUARE)), [row(1, SQUARE, score=1.0, category_id=4)], "every AP is 0"),
    (dataset(row(3, SQUARE)), [row(1, SQUARE, score=1.0, converted=True)], "servers refuse"),
    (dataset(row(3, SQUARE)), [row(1, SQUARE[:2], score=1.0)], "video 1: 2 against 3 frames"),
    (dataset(row(3, SQUARE)), [row(1, SQUARE, score=1.0, rles=CROOKED)], "3x3 against 6x7"),
    (dataset(row(3, [None] * 3)), [row(1, [None] * 3, score=1.0)], "video 1, category 1"),
]  # fmt: skip


@pytest.mark.parametrize(("truth", "predictions", "text"), ODD)
def test_odd_input_is_told_once_or_refused(
    truth: Dataset, predictions: list[Annotation], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate(truth, predictions)
    assert text in caplog.text
    assert len(caplog.records) == 1
    with pytest.raises(DataError, match=text):
        evaluate(truth, predictions, strict=True)


def test_good_input_passes_the_strict_check(caplog: pytest.LogCaptureFixture) -> None:
    evaluate(dataset(row(1, SQUARE)), [row(1, SQUARE, score=1.0)], strict=True)
    assert not caplog.records


def test_what_cannot_be_evaluated_is_an_error() -> None:
    good = row(1, SQUARE, score=0.5)
    truth = dataset(row(1, SQUARE))
    with pytest.raises(UsageError, match="protocol is `coco`"):
        evaluate(truth, [good], "coco")
    with pytest.raises(DataError, match="holds no `annotations`"):
        evaluate(dataset(annotated=False), [good])
    with pytest.raises(DataError, match="is of video 9"):
        evaluate(truth, [replace(good, video_id=9)])
    for score in (None, math.nan, math.inf):
        with pytest.raises(DataError, match="expected a finite number"):
            evaluate(truth, [replace(good, score=score)])
    for occlusion in (None, [], [None], ["much"], "no"):
        with pytest.raises(DataError, match="annotation 1 of video 1 has no `occlusion`"):
            evaluate(dataset(row(1, SQUARE, extra={"occlusion": occlusion})), [good], "ovis")
    with pytest.raises(DataError, match="2 and 3 frames"):
        evaluate(truth, [row(1, SQUARE[:2], score=0.5)], "ovis")


def test_doubts_are_summed_up() -> None:
    doubts = Doubts()
    for number in (1, 2, 2, 3, 4, 5):
        doubts.add("odd", f"case {number}")
    assert doubts.texts == ("odd: case 1; case 2; case 3; and 2 more",)


def label(number: int, boxes: Any, score: float, category_id: int = 1) -> Track:
    """Return a label track."""
    return Track(number, category_id, score, (score,) * FRAMES, rectangles(*boxes))


def test_label_quality_counts_matches() -> None:
    truth = dataset(
        row(1, SQUARE),
        row(2, [(4, 4, 7, 6)] * FRAMES, category_id=4),
        row(3, [(0, 0, 1, 1)] * FRAMES, iscrowd=True),
        row(4, SQUARE, video_id=2),
    )
    video = VIDEOS[1]
    labels = VideoTracks(
        video,
        (
            label(1, [(1, 1, 4, 3)] * FRAMES, 0.5),  # IoU 2/3, but the next one is better
            label(2, SQUARE, 0.9),
            label(3, [(4, 4, 7, 6)] * FRAMES, 0.8),  # right place, wrong category
            label(4, [(0, 0, 1, 4)] * FRAMES, 0.7),
        ),
        (label(5, SQUARE, 1.0),),
    )
    found = label_quality([labels], truth)
    assert found == {
        "precision": 1 / 4,
        "recall": 1 / 3,
        "predicted": 4,
        "matched": 1,
        "truth": 3,
        "class_agnostic_precision": 2 / 4,
    }
    nothing = label_quality([], truth)
    assert (nothing["precision"], nothing["recall"], nothing["truth"]) == (0.0, 0.0, 3)
    assert label_quality([VideoTracks(video, ())], dataset())["recall"] == 0.0
    with pytest.raises(DataError, match="video 7 `x` is not in truth"):
        label_quality([VideoTracks(VideoInfo(7, "x", HEIGHT, WIDTH, FRAMES), ())], truth)


def test_torch_is_never_imported() -> None:
    code = (
        "import sys, pmvis_core.evaluation.average_precision, pmvis_core.evaluation.tables, "
        "pmvis_core.formats.ytvis_writer; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
