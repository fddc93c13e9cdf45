"""J and F against their definition pixel by pixel, and against the official code's numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmvis_core import masks
from pmvis_core.errors import DataError, UsageError
from pmvis_core.evaluation.region_boundary import (
    TASKS,
    outline,
    reach,
    region_boundary,
    region_boundary_metrics,
    region_boundary_table,
)
from pmvis_core.formats.davis import OBJECT, IndexTracks
from pmvis_core.formats.ytvis import Dataset
from pmvis_core.formats.ytvis_annotation import Annotation
from pmvis_core.types import VideoInfo

VOID = 255


def indexed(frames: np.ndarray, video_id: int = 1, first_id: int = 1) -> list[Annotation]:
    """Return the objects of (T, H, W) indices; void is a crowd."""
    tracks = IndexTracks(len(frames))
    for t, frame in enumerate(frames):
        tracks.add(t, frame.astype(np.uint8), "frame")
    return tracks.annotations(video_id, first_id, crowds={VOID})


def truth_of(*videos: np.ndarray) -> Dataset:
    """Return (T, H, W) indices of each video as ground truth."""
    infos = tuple(
        VideoInfo(n, f"v{n}", v.shape[1], v.shape[2], len(v)) for n, v in enumerate(videos, start=1)
    )
    rows = tuple(row for info, v in zip(infos, videos, strict=True) for row in indexed(v, info.id))
    return Dataset("truth", (OBJECT,), infos, rows)


def predictions_of(*videos: np.ndarray) -> list[Annotation]:
    """Return (T, H, W) indices of each video as predictions."""
    return [row for n, v in enumerate(videos, start=1) for row in indexed(v, n)]


def drawn(seed: int, shape: tuple[int, int, int], task: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw (T, H, W) indices of truth and predictions: discs and boxes that move and vanish."""
    rng = np.random.default_rng(seed)
    truth, found = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    frames, height, width = shape
    number = int(rng.integers(1, 4))
    start = rng.random((number, 2)) * (height, width)
    step = rng.standard_normal((number, 2)) * height / 20
    size = rng.random(number) * height / 4 + 3
    order = rng.permutation(number + 1) + 1
    for t in range(frames):
        for k in range(number):
            place = start[k] + step[k] * t
            if t == 0 or rng.random() < 0.85:
                truth[t][disc(shape, place, size[k])] = k + 1
            if rng.random() < 0.85:
                moved = place + rng.standard_normal(2) * size[k] / 5
                value = k + 1 if task == "semi-supervised" else order[k]
                found[t][disc(shape, moved, size[k] * (0.8 + 0.4 * rng.random()))] = value
        truth[t, : height // 3, width // 3 : width // 2] = VOID
        if task == "unsupervised":
            found[t, : height // 4, :4] = order[number]
    return truth, found


def disc(shape: tuple[int, int, int], centre: Any, radius: float) -> np.ndarray:
    """Return (H, W) pixels of a disc."""
    y, x = np.mgrid[: shape[1], : shape[2]]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


# J&F-Mean, then mean, recall and decay of J and of F on three videos `drawn(3 * seed + n, ...)` of
# 13 frames of 160 x 220 pixels. Made with davis2017-evaluation's steps around TrackEval 1.3.0's
# _seg2bmap, scikit-image's disk and OpenCV's dilate on whole frames.
GOLDEN = """
semi-supervised 0 0.62630454 0.66385670 0.76136364 -0.24869436 0.58875239 0.57954545 -0.33900596
semi-supervised 1 0.45308709 0.55243304 0.63636364 -0.07087633 0.35374115 0.31313131 -0.15644822
unsupervised 0 0.65310315 0.68535792 0.78846154 -0.27044191 0.62084838 0.62500000 -0.29355203
unsupervised 1 0.49235332 0.57702428 0.67521368 -0.09169634 0.40768236 0.35897436 -0.14926842
"""


@pytest.mark.parametrize("line", GOLDEN.strip().splitlines())
def test_numbers_of_the_official_code(line: str) -> None:
    task, seed, *numbers = line.split()
    videos = golden_videos(int(seed), task)
    found = region_boundary(
        truth_of(*(t for t, _ in videos)), predictions_of(*(f for _, f in videos)), task=task
    )
    assert list(found.summary.values()) == pytest.approx(list(map(float, numbers)), abs=6e-9)


def golden_videos(seed: int, task: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return truth and predictions of the golden videos."""
    return [drawn(3 * seed + n, (13, 160, 220), task) for n in range(3)]


@given(seed=st.integers(0, 2**32 - 1), task=st.sampled_from(TASKS), frames=st.integers(3, 9))
@settings(max_examples=20, deadline=None)
def test_against_the_definition(seed: int, task: str, frames: int) -> None:
    truth, found = drawn(seed, (frames, 19, 23), task)
    ours = region_boundary(truth_of(truth), predictions_of(found), task=task)
    expected = by_definition(truth, found, task)
    assert len(ours.objects) == len(expected)
    for name, value in zip(ours.summary, np.mean(expected, axis=0), strict=False):
        assert ours.summary[name] == pytest.approx(value, abs=1e-12), name


def by_definition(truth: np.ndarray, found: np.ndarray, task: str) -> list[list[float]]:
    """Return J&F-Mean, J and F statistics of each object, pixel by pixel."""
    number = int(truth[0][truth[0] != VOID].max())
    kept = np.ones(truth.shape, bool)
    if task == "unsupervised":
        kept = truth != VOID
    else:
        truth, found, kept = truth[1:-1], found[1:-1], kept[1:-1]
    objects = [(truth == n) & kept for n in range(1, number + 1)]
    proposals = [(found == n) & kept for n in range(1, max(number, int(found.max())) + 1)]
    if task == "semi-supervised":
        return [statistics(o, p) for o, p in zip(objects, proposals, strict=True)]
    table = [[statistics(o, p) for p in proposals] for o in objects]
    choices = permutations(range(len(proposals)), number)
    best = max(choices, key=lambda choice: sum(table[o][p][0] for o, p in enumerate(choice)))
    return [table[o][p] for o, p in enumerate(best)]


def statistics(truth: np.ndarray, found: np.ndarray) -> list[float]:
    """Return J&F-Mean, J mean, recall, decay, F mean, recall, decay of (T, H, W) masks."""
    frames = list(zip(truth, found, strict=True))
    j = np.array([(a & b).sum() / (a | b).sum() if (a | b).any() else 1.0 for a, b in frames])
    f = np.array([slow_f(a, b) for a, b in frames])
    out = [(j.mean() + f.mean()) / 2]
    for values in (j, f):
        # The quarters' ends as places counted from 1, halves rounded up.
        ends = [int(np.floor(1 + (len(j) - 1) * q / 4 + 0.5 + 1e-9)) for q in range(5)]
        first, last = values[: ends[1]], values[ends[3] - 1 :]
        out += [values.mean(), (values > 0.5).mean(), first.mean() - last.mean()]
    return out


def slow_f(truth: np.ndarray, found: np.ndarray) -> float:
    """Return F of two masks by comparing all pixels of their outlines."""
    a, b = slow_outline(truth), slow_outline(found)
    if not a or not b:
        return float(not a and not b)
    radius = np.ceil(0.008 * np.hypot(*truth.shape))
    precision = np.mean([any(np.hypot(y - v, x - u) <= radius for v, u in a) for y, x in b])
    recall = np.mean([any(np.hypot(y - v, x - u) <= radius for v, u in b) for y, x in a])
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def slow_outline(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return the pixels that differ from one to the right, below or across, if there is one."""
    height, width = mask.shape
    found = []
    for y, x in np.ndindex(height, width):
        if (y, x) == (height - 1, width - 1):
            continue
        others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
        if any(v < height and u < width and mask[v, u] != mask[y, x] for v, u in others):
            found.append((y, x))
    return found


@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 9), width=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_outline(seed: int, height: int, width: int) -> None:
    mask = np.random.default_rng(seed).integers(0, 2, (height, width)).astype(np.uint8)
    assert list(map(tuple, np.argwhere(outline(mask)))) == slow_outline(mask)


def test_reach_of_known_sizes() -> None:
    assert [reach(480, 854), reach(1080, 1920), reach(10, 10)] == [8, 18, 1]


def still(frames: int = 6) -> np.ndarray:
    """Return (T, 20, 30) indices of one object that does not move."""
    values = np.zeros((frames, 20, 30), np.uint8)
    values[:, 5:15, 5:15] = 1
    return values


@pytest.mark.parametrize("task", TASKS)
def test_perfect_and_absent(task: str) -> None:
    truth = truth_of(still())
    perfect = region_boundary(truth, predictions_of(still()), task=task)
    means = ("J&F-Mean", "J-Mean", "J-Recall", "F-Mean", "F-Recall")
    assert perfect.summary == {**dict.fromkeys(means, 1.0), "J-Decay": 0.0, "F-Decay": 0.0}
    nothing = region_boundary(truth, [], task=task)
    assert set(nothing.summary.values()) == {0.0}
    assert (perfect.objects[0].matched, nothing.objects[0].matched) == (1, None)
    none = region_boundary(truth_of(still() * 0), [], task=task)
    assert set(none.summary.values()) == {None}
    assert "-" in region_boundary_table(none)


def test_a_half_is_not_recalled() -> None:
    found = still()
    found[:, 10:] = 0
    summary = region_boundary(truth_of(still()), predictions_of(found)).summary
    assert (summary["J-Mean"], summary["J-Recall"]) == (0.5, 0.0)


def test_only_semi_supervised_leaves_the_ends_out() -> None:
    found = still()
    found[[0, -1]] = 0
    truth = truth_of(still())
    assert region_boundary(truth, predictions_of(found)).summary["J-Mean"] == 1.0
    all_frames = region_boundary(truth, predictions_of(found), task="unsupervised")
    assert all_frames.summary["J-Mean"] == pytest.approx(4 / 6)


def test_void_is_background_if_semi_supervised_and_cut_out_otherwise() -> None:
    truth, found = still(), still()
    truth[:, :, 12:] = VOID
    found[:, 5:15, 15:29] = 1
    dataset, predictions = truth_of(truth), predictions_of(found)
    assert region_boundary(dataset, predictions).summary["J-Mean"] == pytest.approx(7 / 24)
    cut = region_boundary(dataset, predictions, task="unsupervised")
    assert cut.summary["J&F-Mean"] == 1.0


def test_numbers_decide_if_semi_supervised_and_overlap_otherwise() -> None:
    truth = still()
    truth[:, :3] = 2
    found = np.where(truth == 1, 2, np.where(truth == 2, 1, 0))
    dataset, predictions = truth_of(truth), predictions_of(found)
    assert region_boundary(dataset, predictions).summary["J-Mean"] == 0.0
    assigned = region_boundary(dataset, predictions, task="unsupervised")
    assert [(one.object, one.matched) for one in assigned.objects] == [(1, 2), (2, 1)]
    assert assigned.summary["J&F-Mean"] == 1.0


def test_numbers_of_objects_are_those_of_the_first_frame() -> None:
    truth = still()
    truth[0, 0, 0] = 3  # so object 2 is empty throughout, and found wherever nothing is predicted
    truth[1:, 17:] = 4  # appears later, which the official code does not judge
    found = region_boundary(truth_of(truth), predictions_of(still()))
    assert [one.object for one in found.objects] == [1, 2, 3]
    assert [one.region.mean for one in found.objects] == [1.0, 1.0, 1.0]
    every = region_boundary(truth_of(truth), predictions_of(still()), indexed=False)
    assert [one.object for one in every.objects] == [1, 3, 4]
    assert every.objects[2].region.mean == 0.0


def test_proposals_in_between_count_as_empty() -> None:
    truth, found = still(), still()
    truth[3:] = 0
    found[:] = 0
    found[:, 0, 0] = 2
    dataset, predictions = truth_of(truth), predictions_of(found)
    by_value = region_boundary(dataset, predictions, task="unsupervised")
    assert (by_value.objects[0].matched, by_value.summary["J-Mean"]) == (1, 0.5)
    by_row = region_boundary(dataset, predictions, task="unsupervised", indexed=False)
    assert (by_row.objects[0].matched, by_row.summary["J-Mean"]) == (2, 0.0)


def test_decay_of_a_long_video_does_not_wrap_round() -> None:
    truth = np.zeros((402, 4, 4), np.uint8)
    truth[:, 1:3, 1:3] = 1
    found = truth.copy()
    found[-99:] = 0
    summary = region_boundary(truth_of(truth), predictions_of(found)).summary
    assert summary["J-Decay"] == pytest.approx(98 / 101)


def test_videos_are_selected_and_told() -> None:
    truth = truth_of(still(), still())
    found = region_boundary(truth, predictions_of(still()))
    assert found.summary["J-Mean"] == 0.5
    assert found.of_videos({1}).summary["J-Mean"] == 1.0
    document = json.loads(json.dumps(region_boundary_metrics(found), allow_nan=False))
    assert document["J&F-Mean"] == 0.5
    assert [row["matched"] for row in document["per_object"]] == [1, None]
    lines = region_boundary_table(found, per_object=True).splitlines()
    assert lines[1].split()[:2] == ["0.500", "0.500"]
    assert [line.split()[0] for line in lines[4:]] == ["v1_1", "v2_1"]


def test_what_cannot_be_evaluated_is_an_error() -> None:
    truth, (good,) = truth_of(still()), predictions_of(still())
    many = [replace(good, id=n, extra={}) for n in range(1, 23)]
    small = replace(good, rles=(None, masks.empty(3, 3)))
    cases: list[tuple[str, Dataset, list[Annotation], dict[str, Any]]] = [
        ("nothing to evaluate", replace(truth, annotated=False), [good], {}),
        ("is of video 7", truth, [replace(good, video_id=7)], {}),
        ("two predictions share a number", truth, [good, good], {}),
        ("number 5, and no object has", truth, [replace(good, id=5, extra={})], {}),
        ("numbered from 1 to 255", truth, [good, replace(good, id=255, extra={})], {}),
        ("22 proposals, the challenge allows 20", truth, many, {"task": "unsupervised"}),
        ("frame 1: a mask is 3x3, the video 20x30", truth, [small], {}),
        ("none between the first and last", truth_of(still(2)), [], {}),
    ]
    for text, dataset, rows, options in cases:
        with pytest.raises(DataError, match=text):
            region_boundary(dataset, rows, **options)
    with pytest.raises(UsageError, match="task is `interactive`"):
        region_boundary(truth, [good], task="interactive")
    free = {"task": "unsupervised", "max_proposals": None, "indexed": False}
    assert region_boundary(truth, many, **free).summary["J&F-Mean"] == 1.0
