"""The tracker against the reference's decisions, frame by frame, and its rules one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pmvis_core.association import (
    UNTRACKED,
    Detections,
    OnlineTracker,
    mask_nms,
    select_candidates,
)
from pmvis_core.config import TrackerConfig
from tests.golden_idol import assert_equal
from tests.parity_idol_tracks import check_tracker


@pytest.mark.parametrize(
    "case",
    [
        "T1_tracker_ytvis",
        "T2_tracker_ovis",
        "T3_tracker_plain_momentum",
        "T4_tracker_short_memory",
    ],
)
def test_ids_and_memory_are_the_reference_ones(case: str, shared: Path) -> None:
    assert_equal(check_tracker(case, np.load(shared / f"golden/idol/{case}.npz")))


FULL = torch.ones(1, 4, 4, dtype=torch.bool)


def detections(*rows: tuple[float, int]) -> Detections:
    """Make detections of (score, axis of the embedding), each with a mask of its own."""
    masks = torch.zeros(len(rows), 4, len(rows), dtype=torch.bool)
    for index in range(len(rows)):
        masks[index, :, index] = True
    embeddings = 10 * torch.eye(8)[[axis for _, axis in rows]]
    return Detections(torch.tensor([score for score, _ in rows]), embeddings, masks)


def test_an_object_keeps_its_id_when_the_order_changes() -> None:
    tracker = OnlineTracker(TrackerConfig())
    assert tracker.update(detections((0.9, 0), (0.8, 1)))[1] == [0, 1]
    assert tracker.update(detections((0.9, 1), (0.8, 0)))[1] == [1, 0]


def test_without_temporal_weight_the_scores_alone_weigh_a_memory() -> None:
    config = TrackerConfig(temporal_weight=False)
    tracker = OnlineTracker(config)
    tracker.update(Detections(torch.tensor([0.75]), torch.tensor([[4.0, 0.0]]), FULL))
    tracker.update(Detections(torch.tensor([0.25]), torch.tensor([[8.0, 4.0]]), FULL))
    (known,) = tracker.tracklets
    assert known.memory(config).tolist() == [5.0, 1.0]
    # With recency, the weights are 0.75 + 1/2 and 0.25 + 1.
    assert known.memory(TrackerConfig()).tolist() == [6.0, 2.0]
    assert known.momentum_embedding.tolist() == pytest.approx([7.2, 3.2])


def test_of_two_tracks_that_fit_the_older_wins_only_by_frame_weight() -> None:
    found = []
    for frame_weight in (True, False):
        tracker = OnlineTracker(TrackerConfig(frame_weight=frame_weight, long_match=False))
        tracker.update(detections((0.9, 0)))
        tracker.update(detections((0.9, 0)))
        tracker.update(detections((0.9, 0), (0.8, 1)))
        # Alone in its frame, a detection fits every track by half; it is nearer to the second.
        both = torch.tensor([[4.9, 5.1] + [0.0] * 6])
        found.append(tracker.update(Detections(torch.tensor([0.9]), both, FULL))[1])
    assert found == [[0], [1]]


def test_a_weak_newcomer_is_not_tracked_and_a_strong_one_is() -> None:
    tracker = OnlineTracker(TrackerConfig(new_score=0.5))
    tracker.update(detections((0.9, 0)))
    assert tracker.update(detections((0.9, 0), (0.6, 1), (0.4, 2)))[1] == [0, 1, UNTRACKED]


def test_a_track_is_forgotten_after_the_gap() -> None:
    tracker = OnlineTracker(TrackerConfig(max_gap_frames=2))
    tracker.update(detections((0.9, 0), (0.8, 1)))
    for _ in range(2):
        tracker.update(detections((0.9, 0)))
    assert [t.id for t in tracker.tracklets] == [0]
    assert tracker.update(detections((0.9, 0), (0.8, 1)))[1] == [0, 2]


def test_an_empty_frame_is_no_error() -> None:
    nothing = Detections(torch.zeros(0), torch.zeros(0, 8), torch.zeros(0, 4, 4, dtype=torch.bool))
    tracker = OnlineTracker(TrackerConfig())
    assert tracker.update(nothing)[1] == []
    tracker.update(detections((0.9, 0)))
    assert tracker.update(nothing)[1] == []


def test_two_empty_masks_count_as_the_same() -> None:
    assert mask_nms(torch.zeros(2, 3, 3, dtype=torch.bool), 0.5).tolist() == [True, False]


def test_the_best_query_stands_in_where_none_is_good_enough() -> None:
    probabilities = torch.tensor([[0.01, 0.02], [0.05, 0.01]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2]] * 2)
    assert select_candidates(probabilities, boxes, TrackerConfig()).tolist() == [1]


def test_box_nms_spares_other_classes() -> None:
    probabilities = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.0, 0.7]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2]] * 3)
    assert select_candidates(probabilities, boxes, TrackerConfig()).tolist() == [0, 2]
