"""Error types on cases made by hand and against their definitions on dense masks; their cost."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmvis_core import masks
from pmvis_core.errors import DataError
from pmvis_core.evaluation.average_precision import evaluate
from pmvis_core.evaluation.error_types import CORRECTABLE, FALSE_POSITIVES, KINDS, find_errors
from pmvis_core.evaluation.errors import (
    breakdown,
    breakdown_json,
    breakdown_table,
    corrected_ap,
    mistakes_json,
)
from pmvis_core.evaluation.overlaps import frame_overlaps
from pmvis_core.evaluation.protocol import iou_thresholds
from pmvis_core.evaluation.subset import of_all_objects
from pmvis_core.formats.ytvis_annotation import Annotation
from tests.evaluation_data import (
    CATEGORIES,
    FRAMES,
    SIDE,
    Boxes,
    dataset,
    random_tracks,
    track,
)

A, B, C = (0, 0, 10, 10), (12, 0, 22, 10), (0, 12, 10, 22)
"""Three places that do not touch."""
NEAR_A = (0, 5, 10, 15)
"""IoU 1/3 with A."""
HALF_A = (0, 0, 10, 5)
"""IoU 1/2 with A."""


def steady(box: tuple[int, int, int, int] | None) -> Boxes:
    """Return the boxes of a track that does not move."""
    return [box] * FRAMES


def dt(number: int, boxes: Boxes, score: float = 0.5, **changes: Any) -> Annotation:
    """Return a prediction."""
    return track(number, boxes, score=score, **changes)


ONE = [track(1, steady(A))]
TWO = [track(1, steady(A)), track(2, steady(B))]
BRIEF = [track(1, [A, None, None, None])]
RELAY = [track(1, [A, A, None, None]), track(2, steady(B))]
DOG = {"category_id": 4}

CASES: dict[str, tuple[list[Annotation], list[Annotation], dict[str, int]]] = {
    "perfect": (ONE, [dt(1, steady(A))], {}),
    "nothing found": (TWO, [], {"missed": 2}),
    "duplicate": (ONE, [dt(1, steady(A), 0.9), dt(2, steady(A))], {"duplicate": 1}),
    "duplicate that is not exact": (
        ONE,
        [dt(1, steady(A), 0.9), dt(2, steady(HALF_A))],
        {"duplicate": 1},
    ),
    "class": (ONE, [dt(1, steady(A), **DOG)], {"class": 1}),
    "class beside a hit": (ONE, [dt(1, steady(A)), dt(2, steady(A), **DOG)], {"class": 1}),
    "class before localisation": (
        [*ONE, track(2, steady(NEAR_A), **DOG)],
        [dt(1, steady(NEAR_A))],
        {"class": 1, "missed": 1},
    ),
    "localisation": (ONE, [dt(1, steady(NEAR_A))], {"localisation": 1}),
    "localisation in some frames": (ONE, [dt(1, [A, NEAR_A, C, C])], {"localisation": 1}),
    "both": (ONE, [dt(1, steady(NEAR_A), **DOG)], {"both": 1, "missed": 1}),
    "background": (ONE, [dt(1, steady(B))], {"background": 1, "missed": 1}),
    "background in a video without objects": (
        ONE,
        [dt(1, steady(A), video_id=2)],
        {"background": 1, "missed": 1},
    ),
    "background below a tenth": (
        ONE,
        [dt(1, steady((0, 9, 10, 19)))],
        {"background": 1, "missed": 1},
    ),
    "temporal: ends early": (ONE, [dt(1, [A, None, None, None])], {"temporal": 1}),
    "temporal: goes on": (BRIEF, [dt(1, steady(A))], {"temporal": 1}),
    "temporal: too short for a tenth": (
        ONE,
        [dt(1, [(0, 0, 7, 7), None, None, None])],
        {"localisation": 1},
    ),
    "temporal needs good masks": (ONE, [dt(1, [NEAR_A, NEAR_A, None, None])], {"localisation": 1}),
    "switch": (TWO, [dt(1, [A, A, B, B])], {"identity_switch": 1}),
    "switch after an object has left": (RELAY, [dt(1, [A, B, B, None])], {"identity_switch": 1}),
    "switch with a gap": (TWO, [dt(1, [A, None, B, B])], {"identity_switch": 1}),
    "switch that explains too little": (
        TWO,
        [dt(1, [A, C, C, B])],
        {"localisation": 1, "missed": 1},
    ),
    "switch to another category is none": (
        [track(1, steady(A)), track(2, steady(B), **DOG)],
        [dt(1, [A, A, B, B])],
        {"localisation": 1, "missed": 1},
    ),
    "crowds are no objects": (
        [track(1, steady(A), iscrowd=True), track(2, steady(B))],
        [dt(1, steady(A)), dt(2, steady(NEAR_A)), dt(3, steady(A), **DOG)],
        {"background": 2, "missed": 1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_type(case: str) -> None:
    gts, dts, expected = CASES[case]
    truth = dataset(*gts)
    found = breakdown(truth, dts, evaluate(truth, dts).matches)
    assert {row.kind: row.count for row in found.rows if row.count} == expected
    assert Counter(mistake.kind for mistake in found.mistakes) == expected
    assert [row.kind for row in found.rows] == list(KINDS)


@pytest.mark.parametrize(
    ("case", "costs"),
    [
        ("perfect", {}),
        ("nothing found", {"missed": None}),
        ("duplicate", {}),
        ("class", {"class": 1.0}),
        ("class beside a hit", {}),
        ("localisation", {"localisation": 1.0}),
        ("temporal: ends early", {"temporal": 1.0}),
        ("switch", {"identity_switch": 1.0}),
        ("switch with a gap", {"identity_switch": 1.0}),
        # One of two objects gets a match at rank 1: recall 0.5 of 51 of the 101 points.
        ("switch that explains too little", {"localisation": 51 / 101, "missed": 0.0}),
    ],
)
def test_what_a_type_costs(case: str, costs: dict[str, float | None]) -> None:
    gts, dts, _ = CASES[case]
    truth = dataset(*gts)
    found = breakdown(truth, dts, evaluate(truth, dts).matches)
    for row in found.rows:
        expected = costs.get(row.kind, 0.0)
        assert row.cost == (expected if expected is None else pytest.approx(expected)), row


def test_false_positives_cost_what_their_removal_gains() -> None:
    """Ranked first, a prediction of nothing halves the precision; so does one too many."""
    truth = dataset(*TWO)
    dts = [dt(1, steady(C), 0.9), dt(2, steady(A), 0.8), dt(3, steady(A), 0.7), dt(4, steady(B))]
    found = breakdown(truth, dts, evaluate(truth, dts).matches)
    costs = {row.kind: row.cost for row in found.rows if row.cost}
    # Recall 0.5 is reached at precision 1/2, recall 1 at 2/4, and with one removed at 2/3.
    assert found.ap == pytest.approx(1 / 2)
    assert costs["background"] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101 - 1 / 2)
    assert costs["duplicate"] == pytest.approx(2 / 3 - 1 / 2)
    assert set(costs) == {"background", "duplicate"}


def test_of_corrected_predictions_the_best_takes_the_object() -> None:
    """Two tracks that swap their objects are one match each, not two of both."""
    truth = dataset(*TWO)
    dts = [dt(1, [A, A, B, B], 0.9), dt(2, [B, B, A, A], 0.8), dt(3, steady(NEAR_A), 0.7)]
    matches = evaluate(truth, dts).matches
    (errors,) = find_errors(truth, dts, matches)
    kinds = [errors.kinds[n] for n in range(3)]
    assert kinds == ["identity_switch", "identity_switch", "localisation"]
    assert errors.targets == {0: (0, 1), 1: (0, 1), 2: (0,)}
    every = of_all_objects(matches)
    fixed = corrected_ap(CATEGORIES, every, errors, {"identity_switch"})
    assert fixed == pytest.approx(1.0)  # the wrong one that is left comes after both matches
    located = corrected_ap(CATEGORIES, every, errors, {"localisation"})
    assert located == pytest.approx(51 / 101 / 3)


@given(seed=st.integers(0, 2**32 - 1), t=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_counts_add_up_and_correcting_all_is_perfect(seed: int, t: int) -> None:
    rng = np.random.default_rng(seed)
    gts = random_tracks(rng, int(rng.integers(1, 6)), scored=False)
    dts = random_tracks(rng, int(rng.integers(0, 12)), scored=True)
    truth = dataset(*gts)
    evaluation = evaluate(truth, dts)
    every = of_all_objects(evaluation.matches)
    (errors,) = find_errors(truth, dts, evaluation.matches, [t])
    assert errors.threshold == t
    wrong = (evaluation.matches.matches[:, 0, t] == 0) & ~evaluation.matches.ignored[:, 0, t]
    assert sorted(errors.kinds) == np.flatnonzero(wrong).tolist()
    assert set(errors.kinds.values()) <= set(FALSE_POSITIVES)
    explained = {g for n, gs in errors.targets.items() for g in gs}
    missed = set(np.flatnonzero(errors.missed).tolist())
    counted = set(np.flatnonzero(~every.truth_ignored[:, 0]).tolist())
    taken = set(np.flatnonzero(errors.taken).tolist())
    assert missed == counted - taken - explained
    assert all(errors.kinds[n] in CORRECTABLE for n, gs in errors.targets.items() if gs)
    bare = corrected_ap(CATEGORIES, every, errors, ())
    precision = evaluation.precision[t, :, :, 0, -1]
    there = precision[precision > -1]
    assert bare == (float(np.mean(there)) if there.size else None)
    for kind in KINDS:
        fixed = corrected_ap(CATEGORIES, every, errors, {kind})
        assert fixed is None or bare is None or fixed >= bare - 1e-12
    best = corrected_ap(CATEGORIES, every, errors, KINDS)
    assert best is None or best == pytest.approx(1.0, abs=1e-12)
    assert (best is None) == (not counted - missed)


def test_means_over_the_thresholds() -> None:
    rng = np.random.default_rng(11)
    gts, dts = random_tracks(rng, 6, scored=False), random_tracks(rng, 14, scored=True)
    truth = dataset(*gts)
    evaluation = evaluate(truth, dts)
    found = breakdown(truth, dts, evaluation.matches, every_threshold=True)
    assert found.ap == pytest.approx(evaluation.summary["AP"])
    assert sum(row.count for row in found.rows[:-1]) == pytest.approx(found.false_positives)
    each = find_errors(truth, dts, evaluation.matches, range(10))
    assert found.rows[-1].count == pytest.approx(np.mean([e.missed.sum() for e in each]))
    assert found.hits == pytest.approx(np.mean([e.taken.sum() for e in each]))
    assert len(found.thresholds) == 10


def volume(row: Annotation) -> Any:
    """Return (F, H, W) masks, and (F,) whether there is one."""
    empty = np.zeros((SIDE, SIDE), np.uint8)
    pixels = [empty if rle is None else masks.decode(rle) for rle in row.rles]
    return np.stack(pixels).astype(bool), np.array([rle is not None for rle in row.rles])


def share(one: Any, other: Any) -> float:
    """Return the IoU of two volumes."""
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 0.0


def by_definition(dt: Annotation, gts: list[Annotation], t: float) -> str:
    """Return the type of a false positive, from the definitions and pixels."""
    pixels, there = volume(dt)
    own, others, common, follows = [0.0], [0.0], [0.0], []
    mine = [gt for gt in gts if gt.category_id == dt.category_id]
    for gt in gts:
        (own if gt in mine else others).append(share(pixels, volume(gt)[0]))
    for gt in mine:
        shared = there & volume(gt)[1]
        common.append(share(pixels[shared], volume(gt)[0][shared]))
    for frame in range(FRAMES):
        ious = [share(pixels[frame], volume(gt)[0][frame]) for gt in mine]
        best = max(range(len(mine)), key=lambda g: (ious[g], -g), default=None)
        follows.append(best if best is not None and ious[best] >= t else None)
    if max(own) >= t:
        return "duplicate"
    if max(others) >= t:
        return "class"
    known = [g for g in follows if g is not None]
    if len(set(known)) > 1:
        target, parts = known[0], []
        for frame, g in enumerate(follows):
            target = target if g is None else g
            parts.append(volume(mine[target])[0][frame])
        if share(pixels, np.stack(parts)) >= t:
            return "identity_switch"
    if max(common) >= t:
        return "temporal"
    if max(own) >= 0.1:
        return "localisation"
    return "both" if max(others) >= 0.1 else "background"


@given(seed=st.integers(0, 2**32 - 1), t=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_types_are_as_defined(seed: int, t: int) -> None:
    rng = np.random.default_rng(seed)
    gts, dts = random_tracks(rng, 5, scored=False), random_tracks(rng, 9, scored=True)
    truth = dataset(*gts)
    matches = evaluate(truth, dts).matches
    (errors,) = find_errors(truth, dts, matches, [t])
    for n, kind in errors.kinds.items():
        prediction = next(d for d in dts if d.id == matches.rows[n])
        objects = [g for g in gts if not g.iscrowd and g.video_id == prediction.video_id]
        assert kind == by_definition(prediction, objects, float(iou_thresholds()[t]))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_overlaps_follow_the_rules_of_track_iou(seed: int) -> None:
    """Lengths and mask sizes may differ, and masks be empty."""
    rng = np.random.default_rng(seed)
    rows = random_tracks(rng, 7, scored=True)
    for n, row in enumerate(rows):
        rles, areas = list(row.rles), list(row.mask_areas)
        frame = int(rng.integers(0, FRAMES))
        pixels = np.ones((SIDE, SIDE + 1), np.uint8) if n % 2 else np.zeros((SIDE, SIDE), np.uint8)
        rles[frame], areas[frame] = masks.encode(pixels), int(pixels.sum())
        length = int(rng.integers(0, FRAMES + 1)) if n % 3 == 0 else FRAMES
        rows[n] = replace(row, rles=tuple(rles[:length]), mask_areas=tuple(areas[:length]))
    dts, gts = rows[:4], rows[4:]
    found = frame_overlaps(dts, gts)
    expected = [[masks.track_iou(dt.rles, gt.rles) for gt in gts] for dt in dts]
    assert found.track_ious.tolist() == expected
    assert found.inter.shape == (found.inter.shape[0], 4, 3)
    assert not found.inter[~found.both].any()


def test_nothing_to_explain() -> None:
    assert frame_overlaps([], []).track_ious.shape == (0, 0)
    for gts in ([], ONE):
        truth = dataset(*gts)
        found = breakdown(truth, [], evaluate(truth, []).matches, every_threshold=True)
        assert (found.false_positives, found.hits, found.objects) == (0, 0, len(gts))


def test_other_tracks_than_were_matched_are_refused() -> None:
    truth, dts = dataset(*ONE), [dt(1, steady(B))]
    matches = evaluate(truth, dts).matches
    for predictions, gts, text in (
        ([], ONE, "track 1, which is neither"),
        (dts, [replace(ONE[0], id=5)], "track 1, which is neither"),
        ([*dts, *dts], ONE, "two predictions share an id"),
    ):
        with pytest.raises(DataError, match=text):
            breakdown(dataset(*gts), predictions, matches)


def test_table_and_json() -> None:
    truth = dataset(*TWO)
    dts = [dt(7, [A, A, B, B], 0.9), dt(9, steady(C), 0.3)]
    matches = evaluate(truth, dts).matches
    found = breakdown(truth, dts, matches)
    lines = breakdown_table(found).splitlines()
    assert lines[0] == " at IoU 0.50: AP 0.000, 2 objects, 0 hits, 2 false positives"
    assert [line.split()[-2:] for line in lines[4:5]] == [["1", "1.000"]]
    assert len({len(line) for line in lines[1:]}) == 1
    told = json.loads(json.dumps(breakdown_json(found)))
    assert told["errors"]["identity_switch"] == {"count": 1.0, "cost": pytest.approx(1.0)}
    assert list(told["errors"]) == list(KINDS)
    assert mistakes_json(found)[0] == {
        "kind": "identity_switch",
        "video_id": 1,
        "category_id": 1,
        "prediction": 7,
        "score": 0.9,
        "objects": (1, 2),
    }
    many = breakdown(truth, dts, matches, every_threshold=True)
    assert breakdown_table(many).startswith(" at IoU 0.50:0.95: AP 0.000, 2 objects, 0.0 hits")
