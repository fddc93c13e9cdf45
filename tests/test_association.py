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


@pytest.mark.parametrize("case", ["T1_tracker_ytvis", "T2_tracker_ovis", "T4_tracker_short_memory"])
def test_ids_and_memory_are_the_reference_ones(case: str, shared: Path) -> None:
    golden = np.load(shared / f"golden/idol/{case}.npz")
    options = dict(zip(golden["opt_names"].tolist(), golden["opt_values"].tolist(), strict=True))
    tracker = OnlineTracker(
        TrackerConfig(
            mask_nms=options["nms_thr_pre"],
            init_score=options["init_score_thr"],
            new_score=options["addnew_score_thr"],
            memory_frames=int(options["memory_len"]),
            max_gap_frames=int(options["memo_tracklet_frames"]),
        )
    )
    frames = sum(name.endswith("_in_bboxes") for name in golden.files)
    assert frames > 10
    for frame in range(frames):
        head = f"f{frame:02d}_"
        rows, ids = tracker.update(
            Detections(
                torch.from_numpy(golden[head + "in_bboxes"][:, 4]),
                torch.from_numpy(golden[head + "in_embeds"]),
                torch.from_numpy(golden[head + "in_masks"][:, 0]).sigmoid() > 0.5,
            )
        )
        assert rows.tolist() == golden[head + "out_kept"].tolist()
        assert ids == np.maximum(golden[head + "out_ids"], UNTRACKED).tolist()
        assert [t.id for t in tracker.tracklets] == golden[head + "state_ids"].tolist()
        memory = torch.stack([t.memory() for t in tracker.tracklets])
        expected = golden[head + "state_memo_embeds"]
        np.testing.assert_allclose(memory, expected, atol=1e-5, rtol=1e-5)


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
