"""Predictions for three small videos: sound ones, and one for each fault that an entry may have."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pmvis_core import masks
from pmvis_core.formats.ytvis import Dataset
from pmvis_core.submission.check import check
from pmvis_core.submission.files import Submission
from pmvis_core.submission.report import Finding, Report
from pmvis_core.types import Category, VideoInfo

Entry = dict[str, Any]

SIZES = {1: (6, 4), 2: (6, 4), 5: (3, 7)}
LENGTH = 3
EXPECTED = Dataset(
    "`valid.json`",
    (Category(1, "fox"), Category(7, "owl")),
    tuple(VideoInfo(k, f"clip{k}", h, w, LENGTH) for k, (h, w) in SIZES.items()),
    (),
    annotated=False,
)


def rle_of(video: int, first: int = 0) -> Any:
    """Return a mask of a video: four pixels of its first columns from row ``first`` on."""
    pixels = np.zeros(SIZES[video], np.uint8)
    pixels[first : first + 2, :2] = 1
    return masks.encode(pixels)


def entry(video: int = 1, category: int = 1, score: Any = 0.5, first: int = 2) -> Entry:
    """Return a sound prediction that is absent from the last frame."""
    rles = [rle_of(video, first), rle_of(video, first), None]
    return {"video_id": video, "category_id": category, "score": score, "segmentations": rles}


def sound() -> list[Entry]:
    """Return predictions without fault or warning."""
    return [entry(1, first=0), entry(2, 7, 0.25), entry(5, 1, 0.75), entry(1, 1, 0.125, first=1)]


def judged(entries: Any, **options: Any) -> Report:
    """Check parsed entries."""
    return check(Submission("`r.json`", entries), EXPECTED, **options)


def found(report: Report) -> dict[str, Finding]:
    """Return the findings by their kinds' names."""
    return {finding.kind.name: finding for finding in report.findings}


def with_mask(value: Any, frame: int = 1) -> Entry:
    """Return a prediction with another value in the place of one mask."""
    row = entry()
    row["segmentations"][frame] = value
    return row


def changed(**keys: Any) -> Entry:
    """Return a prediction with other values."""
    return {**entry(), **keys}


def without(key: str) -> Entry:
    """Return a prediction that lacks a key."""
    return {name: value for name, value in entry().items() if name != key}


SIZE = [6, 4]
FULL = masks.from_uncompressed([0, 24], 6, 4)["counts"]

FAULTY: tuple[tuple[str, Entry, str], ...] = (
    ("missing-key", without("score"), "`score`"),
    ("missing-key", without("segmentations"), "`segmentations`"),
    ("extra-key", changed(id=3, bbox=[]), "`id`, `bbox`"),
    ("wrong-type", changed(video_id="1"), '`video_id` is "1", expected a whole number'),
    ("wrong-type", changed(category_id=1.5), "`category_id` is 1.5"),
    ("wrong-type", changed(category_id=None), "`category_id` is null"),
    ("wrong-type", changed(category_id=True), "`category_id` is true"),
    ("wrong-type", changed(score=True), "`score` is true"),
    ("wrong-type", changed(score="0.5"), "expected a number"),
    ("wrong-type", changed(segmentations={}), "a mask or null for each frame"),
    ("negative-id", changed(video_id=-3), ""),
    ("negative-id", changed(category_id=-1), "category -1"),
    ("unknown-video", changed(video_id=3), ""),
    ("unknown-category", changed(category_id=0), "category 0, expected one of 2 from 1 to 7"),
    ("score-not-finite", changed(score=float("nan")), "nan"),
    ("score-not-finite", changed(score=float("-inf")), "-inf"),
    ("score-range", changed(score=-0.001), "-0.001"),
    ("score-range", changed(score=10**400), "1000"),
    ("length", changed(segmentations=[rle_of(1)]), "1 mask, the video has 3 frames"),
    ("length", changed(segmentations=[rle_of(1)] * 4), "4 masks, the video has 3 frames"),
    ("mask-form", with_mask("text"), 'found "text"'),
    ("mask-form", with_mask(0), "found 0"),
    ("mask-form", with_mask({"size": SIZE}), "'size'"),
    ("mask-form", with_mask({"size": [6.0, 4], "counts": FULL}), "expected [height, width]"),
    ("mask-form", with_mask({"size": [6, -4], "counts": FULL}), "expected [height, width]"),
    ("mask-form", with_mask({"size": [6, 4, 1], "counts": FULL}), "expected [height, width]"),
    ("mask-form", with_mask({"size": SIZE, "counts": None}), "`counts` is null, expected text"),
    ("polygon", with_mask([[0, 0, 3, 0, 3, 3]]), ""),
    ("plain-runs", with_mask({"size": SIZE, "counts": [0, 24]}), ""),
    ("bytes-repr", with_mask({"size": SIZE, "counts": str(FULL.encode())}), "b'"),
    ("mask-size", with_mask(rle_of(5)), "3x7, the video is 6x4"),
    ("mask-size", with_mask(masks.empty(4, 6)), "4x6, the video is 6x4 (height comes first)"),
    ("run-sum", with_mask({"size": SIZE, "counts": rle_of(5)["counts"]}), "cover 21 pixels"),
    ("run-sum", with_mask({"size": SIZE, "counts": ""}), "height x width = 24"),
    ("malformed-rle", with_mask({"size": SIZE, "counts": FULL + "~"}), "alphabet"),
    ("malformed-rle", with_mask({"size": SIZE, "counts": "P"}), "middle of a run"),
    ("malformed-rle", with_mask({"size": SIZE, "counts": "\udc80é"}), "alphabet"),
    ("empty-track", changed(segmentations=[None] * LENGTH), "null in every frame"),
    ("empty-track", changed(segmentations=[masks.empty(6, 4), [], {}]), "1 mask, empty"),
    ("duplicate", entry(2, 7, 0.25), "as entry 1"),
    ("same-masks", entry(2, 7, 0.5), "as entry 1"),
)
"""Kind, an entry that has this fault and no other, and what the report says of it."""


@st.composite
def submissions(draw: Any) -> list[Entry]:
    """Draw sound predictions with scores of their own."""
    scores = draw(st.lists(st.floats(0, 1), min_size=1, max_size=6, unique=True))
    rows = []
    for score in scores:
        video = draw(st.sampled_from(list(SIZES)))
        pixels = draw(arrays.arrays(np.uint8, (LENGTH, *SIZES[video]), elements=st.integers(0, 1)))
        absent = draw(st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH))
        rles = [
            draw(st.sampled_from([None, [], {}])) if gone else masks.encode(mask)
            for gone, mask in zip(absent, pixels, strict=True)
        ]
        category = draw(st.sampled_from([1, 7, 7.0]))
        rows.append(
            {"video_id": video, "category_id": category, "score": score, "segmentations": rles}
        )
    return rows
