"""How good labels are that nobody trains on yet: precision and recall against ground truth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pmvis_core.errors import DataError
from pmvis_core.evaluation.average_precision import iou_matrix
from pmvis_core.evaluation.protocol import Floats
from pmvis_core.formats.ytvis import Dataset
from pmvis_core.types import Track, VideoTracks


@dataclass(frozen=True)
class ComparedVideo:
    """The labels of one video against its truth, compared once and counted as often as wanted."""

    tracks: tuple[Track, ...]
    """(D,) labels, best first."""
    ious: Floats
    """(D, G) track IoUs with the objects that are there."""
    same: NDArray[np.bool_]
    """(D, G) whether the categories agree."""

    def matched(self, rows: Sequence[int], iou: float = 0.5, *, any_class: bool = False) -> int:
        """Return how many of some labels find an object, greedily, best label first.

        Args:
            rows: places of the labels in ``tracks``, ascending.
            iou: smallest track IoU of a match.
            any_class: whether categories are not compared.
        """
        ious = self.ious if any_class else np.where(self.same, self.ious, -1.0)
        return _count_matches(ious[list(rows)], iou)


def compare(tracks: Iterable[VideoTracks], truth: Dataset) -> Iterator[ComparedVideo]:
    """Yield every labelled video with the IoUs of its labels, for `label_quality` and sweeps.

    Raises:
        DataError: a video of ``tracks`` is not in ``truth``.
    """
    there = {video.video.id: video for video in truth}
    for video in tracks:
        if video.video.id not in there:
            raise DataError(
                f"video {video.video.id} `{video.video.name}` is not in {truth.name}",
                "compare with the ground truth of the videos that were labelled",
            )
        labels = tuple(sorted(video.tracks, key=lambda track: -track.score))
        objects = there[video.video.id].tracks
        ious = iou_matrix([t.rles for t in labels], [t.rles for t in objects])[0]
        same = [[a.category_id == b.category_id for b in objects] for a in labels]
        yield ComparedVideo(labels, ious, np.array(same, dtype=bool).reshape(ious.shape))


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
    predicted = matched = matched_any = 0
    for video in compare(tracks, truth):
        every = range(len(video.tracks))
        predicted += len(every)
        matched += video.matched(every, iou)
        matched_any += video.matched(every, iou, any_class=True)
    objects_there = sum(len(video.tracks) for video in truth)
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
