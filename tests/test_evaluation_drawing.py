"""Precision-recall curves: every number in the npz, and pictures that show them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmvis_core.errors import DataError
from pmvis_core.evaluation.average_precision import evaluate
from pmvis_core.evaluation.curves import accumulate
from pmvis_core.evaluation.drawing import draw_curves, save_curves
from pmvis_core.evaluation.protocol import iou_thresholds, recall_points
from pmvis_core.types import Category
from tests.evaluation_data import CATEGORIES, dataset, random_matches, track

ORANGE = (247, 103, 7)
SQUARE: Any = [(2, 2, 12, 12)] * 4


@pytest.mark.parametrize("protocol", ["ytvis", "ovis"])
def test_the_npz_holds_every_array(protocol: str, tmp_path: Path) -> None:
    found = accumulate(CATEGORIES, random_matches(np.random.default_rng(0), [1, 2, 3], protocol))
    path = tmp_path / "curves.npz"
    save_curves(path, found)
    with np.load(path, allow_pickle=False) as stored:
        for name in ("precision", "recall", "scores"):
            expected = getattr(found, name)
            assert stored[name].tobytes() == np.ascontiguousarray(expected).tobytes()
            assert stored[name].shape == expected.shape
        axes = ["iou_thresholds", "recall_points", "category_ids", "areas", "occlusions"]
        lengths = [len(stored[axis]) for axis in [*axes, "max_detections"]]
        if protocol == "ytvis":
            assert lengths.pop(4) == 1
        assert tuple(lengths) == found.precision.shape
        assert (stored["iou_thresholds"] == iou_thresholds()).all()
        assert (stored["recall_points"] == recall_points()).all()
        assert stored["category_names"].tolist() == ["cat", "dog"]
        assert stored["areas"].tolist() == ["all", "small", "medium", "large"]
    again = tmp_path / "again.npz"
    save_curves(again, found)
    assert again.read_bytes() == path.read_bytes()


def orange_heights(picture: Any, left: int, right: int) -> Any:
    """Return the middle height of what is orange in some columns of the large plot."""
    there = (picture[100:500, left:right] == ORANGE).all(axis=2)
    assert there.any(axis=0).all()
    return 100 + np.array([np.flatnonzero(column).mean() for column in there.T])


def test_a_curve_runs_where_its_precision_is() -> None:
    """Of two objects one is found at rank 1: precision 1 to recall 0.5, then 0."""
    truth = dataset(track(1, SQUARE), track(2, [(13, 13, 22, 22)] * 4))
    picture = draw_curves(evaluate(truth, [track(1, SQUARE, score=0.5)]))
    assert picture.dtype == np.uint8
    assert picture.shape[1:] == (1400, 3)
    # The plot of the unit square spans x from 84 to 1064 and y from 118 to 480.
    assert orange_heights(picture, 120, 560) == pytest.approx(118, abs=1)
    assert orange_heights(picture, 590, 1040) == pytest.approx(480, abs=1)


def test_categories_without_objects_are_left_out() -> None:
    one = draw_curves(evaluate(dataset(track(1, SQUARE)), []))
    both = dataset(track(1, SQUARE), track(2, SQUARE, category_id=4))
    assert draw_curves(evaluate(both, [])).shape == one.shape
    six = tuple(Category(n, "a name that is much too long for its plot" * n) for n in range(1, 7))
    rows = [track(n, SQUARE, category_id=n) for n in range(1, 7)]
    more = draw_curves(evaluate(dataset(*rows, categories=six), []), title="x" * 200)
    assert more.shape[0] > one.shape[0]


def test_of_very_many_categories_a_hundred_are_drawn() -> None:
    heights = []
    for number in (100, 103):
        many = tuple(Category(n, f"c{n}") for n in range(1, number + 1))
        rows = [track(n, SQUARE, category_id=n) for n in range(1, number + 1)]
        heights.append(draw_curves(evaluate(dataset(*rows, categories=many), [])).shape[0])
    assert heights[0] == heights[1]


def test_without_ground_truth_there_is_no_curve() -> None:
    nothing = evaluate(dataset(), [])
    with pytest.raises(DataError, match="no ground truth"):
        draw_curves(nothing)
    crowd = evaluate(dataset(replace(track(1, SQUARE), iscrowd=True)), [])
    with pytest.raises(DataError, match="no ground truth"):
        draw_curves(crowd)
