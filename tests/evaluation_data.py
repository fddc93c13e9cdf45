"""Tracks of rectangles and random matches, for the tests of what follows an evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pmvis_core import masks
from pmvis_core.evaluation.matches import Matches, Pair
from pmvis_core.evaluation.protocol import groups_of
from pmvis_core.formats.ytvis import Dataset
from pmvis_core.formats.ytvis_annotation import Annotation
from pmvis_core.types import Category, VideoInfo

SIDE, FRAMES = 24, 4
CATEGORIES = (Category(1, "cat"), Category(4, "dog"))
VIDEOS = tuple(VideoInfo(n, f"clip{n}", SIDE, SIDE, FRAMES) for n in (2, 1))
THRESHOLDS = 10

Boxes = list[tuple[int, int, int, int] | None]


def track(number: int, boxes: Boxes, **changes: Any) -> Annotation:
    """Return an annotation of video 1 and category 1 from an xyxy rectangle a frame."""
    rles = []
    for box in boxes:
        pixels = np.zeros((SIDE, SIDE), np.uint8)
        if box is not None:
            pixels[box[1] : box[3], box[0] : box[2]] = 1
        rles.append(None if box is None else masks.encode(pixels))
    areas = tuple(None if rle is None else masks.area(rle) for rle in rles)
    return replace(Annotation(number, 1, 1, tuple(rles), areas, areas=areas), **changes)


def dataset(*rows: Annotation, **changes: Any) -> Dataset:
    """Return a ground truth."""
    return replace(Dataset("truth", CATEGORIES, VIDEOS, rows), **changes)


def random_tracks(rng: np.random.Generator, number: int, *, scored: bool) -> list[Annotation]:
    """Draw tracks that stand at one of two places, change it at times, and are absent at times."""
    rows = []
    for n in range(number):
        boxes: Boxes = []
        place = rng.integers(0, 2)
        for _ in range(FRAMES):
            place = 1 - place if rng.random() < 0.15 else place
            x, y = 10 * place + rng.integers(0, 3, 2)
            boxes.append(None if rng.random() < 0.2 else (x, y, x + 8, y + 6 + rng.integers(0, 3)))
        rows.append(
            track(
                n + 1,
                boxes,
                video_id=int(rng.integers(1, 3)),
                category_id=int(rng.choice([1, 4])),
                score=float(rng.integers(0, 8)) / 8 if scored else None,
                iscrowd=not scored and bool(rng.random() < 0.15),
            )
        )
    return rows


def random_pair(rng: np.random.Generator, video: int, category: int, protocol: str) -> Pair:
    """Draw what one video and category might have come to; the scores are distinct."""
    groups = groups_of(protocol).number
    found, there = int(rng.integers(0, 5)), int(rng.integers(0, 4))
    shape = (found, groups, THRESHOLDS)
    ids = np.arange(there, dtype=np.int64) + 1
    return Pair(
        video_id=video,
        category_id=category,
        ious=rng.random((found, there)),
        scores=-np.sort(-rng.random(found)),
        rows=rng.integers(1, 1000, found),
        matches=rng.choice([0, *ids], shape).astype(np.int64),
        ignored=rng.random(shape) < 0.2,
        truth_ids=ids,
        truth_ignored=rng.random((there, groups)) < 0.2,
        comparable=bool(rng.random() < 0.8),
    )


def random_matches(rng: np.random.Generator, videos: list[int], protocol: str = "ytvis") -> Matches:
    """Draw the matches of some videos."""
    keys = [(v, c.id) for v in videos for c in CATEGORIES if rng.random() < 0.7]
    return Matches.of_pairs(
        [random_pair(rng, video, category, protocol) for video, category in keys],
        groups_of(protocol),
    )
