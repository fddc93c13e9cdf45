"""Which videos went wrong: each video scored on its own, the worst first.

The score of a video is the AP that the official evaluator gives it as the only video: the mean
over the categories annotated in it, ten IoU thresholds and 101 recall points. Predictions of other
categories do not enter that mean, but are counted as false positives. A video without an object
that counts has no score and stands last.

    print(worst_table(worst_videos(evaluation.matches, truth.categories, 10, names)))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pmvis_core.evaluation.curves import accumulate
from pmvis_core.evaluation.matches import Matches, Pair
from pmvis_core.evaluation.subset import of_all_objects
from pmvis_core.types import Category


@dataclass(frozen=True)
class VideoScore:
    """How well one video went; counts are at IoU 0.5, over objects and predictions that count."""

    video_id: int
    """As in the ground truth."""
    name: str
    """As in the ground truth."""
    ap: float | None
    """AP of the video alone, 0 to 1; None without objects."""
    objects: int
    """Ground truths."""
    hits: int
    """Predictions that match one."""
    misses: int
    """Objects less hits."""
    false_positives: int
    """Predictions that match none, of any category."""


def worst_videos(
    matches: Matches, categories: Sequence[Category], number: int, names: Mapping[int, str]
) -> tuple[VideoScore, ...]:
    """Return the videos with the lowest AP of their own.

    Args:
        matches: of all videos.
        categories: the vocabulary.
        number: how many videos are wanted.
        names: of the videos, by id.

    Returns:
        At most ``number`` videos by rising AP; of equals those with more misses and then more
        false positives come first, then the lower id. Videos without any track are left out.
    """
    by_video: dict[int, list[Pair]] = {}
    every = of_all_objects(matches)
    for pair in every:
        by_video.setdefault(pair.video_id, []).append(pair)
    scores = [
        _score(Matches.of_pairs(pairs, every.groups), categories, names.get(number, str(number)))
        for number, pairs in by_video.items()
    ]
    return tuple(sorted(scores, key=_goodness)[:number])


def worst_json(scores: Sequence[VideoScore]) -> list[dict[str, Any]]:
    """Return one JSON object a video."""
    return [asdict(score) for score in scores]


def worst_table(scores: Sequence[VideoScore]) -> str:
    """Return one line a video, ``-`` for no score."""
    width = max([len("video"), *(len(score.name) for score in scores)])
    lines = [
        f" {'id':>6} {'video':<{width}} {'AP':>6} {'objects':>8} {'hits':>6} {'misses':>7} "
        f"{'false positives':>16}"
    ]
    for score in scores:
        ap = "-" if score.ap is None else f"{score.ap:.3f}"
        lines.append(
            f" {score.video_id:>6} {score.name:<{width}} {ap:>6} {score.objects:>8} "
            f"{score.hits:>6} {score.misses:>7} {score.false_positives:>16}"
        )
    return "\n".join(lines)


def _score(matches: Matches, categories: Sequence[Category], name: str) -> VideoScore:
    """Score the matches of one video in the group of all objects."""
    annotated = set(matches.category_ids[np.diff(matches.truth_starts) > 0].tolist())
    own = [category for category in categories if category.id in annotated]
    hit, counts = matches.matches[:, 0, 0] != 0, ~matches.ignored[:, 0, 0]
    objects = int(np.count_nonzero(~matches.truth_ignored[:, 0]))
    hits = int(np.count_nonzero(hit & counts))
    return VideoScore(
        video_id=int(matches.video_ids[0]),
        name=name,
        ap=accumulate(own, matches).summary["AP"],
        objects=objects,
        hits=hits,
        misses=objects - hits,
        false_positives=int(np.count_nonzero(~hit & counts)),
    )


def _goodness(score: VideoScore) -> tuple[bool, float, int, int, int]:
    """Return the key that sorts the worst video first."""
    ap = 0.0 if score.ap is None else score.ap
    return score.ap is None, ap, -score.misses, -score.false_positives, score.video_id
