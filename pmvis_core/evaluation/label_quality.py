"""How good labels are that nobody trains on yet: precision and recall against ground truth."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pmvis_core.errors import DataError
from pmvis_core.evaluation.average_precision import iou_matrix
from pmvis_core.evaluation.protocol import Floats
from pmvis_core.formats.ytvis import Dataset
from pmvis_core.types import VideoTracks


def label_quality(
    tracks: Iterable[VideoTracks], truth: Dataset, iou: float = 0.5
) -> dict[str, float]:
    """Tell how good pseudo labels are against ground truth that training never sees.

    Per video, label tracks take in order of falling score the ground-truth track of the same
    category with the largest track IoU that is still free, if it is at least ``iou``.

    Args:
        tracks: the labels, under the ids of ``truth``; ignored tracks are left out.
        truth: crowds are left out; videos without labels count as missed.
        iou: smallest track IoU of a match.

    Returns:
        ``predicted``, ``matched``, ``truth``: numbers of tracks; ``precision`` = matched /
        predicted and ``recall`` = matched / truth, 0 where the divisor is 0;
        ``class_agnostic_precision``: precision when categories are not compared.

    Raises:
        DataError: a video of ``tracks`` is not in ``truth``.
    """
    there = {video.video.id: video for video in truth}
    predicted = matched = matched_any = 0
    for video in tracks:
        if video.video.id not in there:
            raise DataError(
                f"video {video.video.id} `{video.video.name}` is not in {truth.name}",
                "compare with the ground truth of the videos that were labelled",
            )
        labels = sorted(video.tracks, key=lambda track: -track.score)
        objects = there[video.video.id].tracks
        ious = iou_matrix([t.rles for t in labels], [t.rles for t in objects])[0]
        same = np.array([[a.category_id == b.category_id for b in objects] for a in labels])
        predicted += len(labels)
        matched += _count_matches(np.where(same.reshape(ious.shape), ious, -1.0), iou)
        matched_any += _count_matches(ious, iou)
    objects_there = sum(len(video.tracks) for video in there.values())
    return {
        "precision": matched / predicted if predicted else 0.0,
        "recall": matched / objects_there if objects_there else 0.0,
        "predicted": predicted,
        "matched": matched,
        "truth": objects_there,
        "class_agnostic_precision": matched_any / predicted if predicted else 0.0,
    }


def _count_matches(ious: Floats, threshold: float) -> int:
    """Return how many rows of (D, G) IoUs find a partner, greedily in their order."""
    free = np.ones(ious.shape[1], dtype=bool)
    count = 0
    for row in ious:
        candidates = np.where(free, row, -1.0)
        if candidates.size and candidates.max() >= threshold:
            free[candidates.argmax()] = False
            count += 1
    return count
