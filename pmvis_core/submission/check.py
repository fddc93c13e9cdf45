"""Walks through the entries of a submission once and counts every fault.

What is known of a fault stands in `report.KINDS`; here is when it is one. The checks of an entry
do not depend on each other: a result with a wrong score still has its masks looked at.

    report = check(open_submission(path, expected), expected)
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, TypeGuard

from pmvis_core import masks
from pmvis_core.errors import DataError
from pmvis_core.formats.ytvis import Dataset
from pmvis_core.progress import Progress, silent
from pmvis_core.submission.files import NotJson, RepeatedKeys, Submission, is_absent
from pmvis_core.submission.report import (
    FAULT,
    KINDS,
    Example,
    Finding,
    Report,
    brief,
    counted,
    quoted,
)
from pmvis_core.types import RLE, VideoInfo

MOST_COUNTED = 100
"""Predictions of one video and category that the evaluators look at, best first."""

_BYTES_REPR = re.compile(r"""b(['"]).*\1""", re.DOTALL)


def check(
    submission: Submission,
    expected: Dataset,
    *,
    strict: bool = False,
    progress: Progress = silent,
) -> Report:
    """Find every fault of a submission.

    Args:
        submission: what `open_submission` returned.
        expected: the videos and categories that it is for; without categories any id >= 0 will do.
        strict: count warnings as faults.
        progress: is told of every entry.
    """
    walk = _Walk(expected, strict=strict)
    for kind, text in submission.notes:
        walk.note(kind, Example(text))
    try:
        for value in progress(submission.entries, "check"):
            walk.entry(value)
    except NotJson as error:
        walk.note("json", Example(error.message, walk.entries))
    walk.end()
    return Report(
        name=submission.name,
        expected=expected.name,
        videos=len(walk.videos),
        predictions=walk.entries,
        masks=walk.masks,
        characters=walk.characters,
        findings=tuple(walk.findings[name] for name in KINDS if name in walk.findings),
    )


class _Walk:
    """Goes through the entries once and notes what is wrong."""

    def __init__(self, expected: Dataset, *, strict: bool) -> None:
        """Start with nothing noted."""
        self.videos = {video.id: video for video in expected.videos}
        self.findings: dict[str, Finding] = {}
        self.entries = self.masks = self.characters = 0
        self._categories = {category.id for category in expected.categories}
        self._strict = strict
        self._predicted: Counter[tuple[int, int | None]] = Counter()
        self._scores: set[float] = set()
        self._seen: dict[tuple[int, int, bytes], tuple[int, float]] = {}

    def note(self, kind: str, example: Example, count: int = 1) -> None:
        """Count a case of a kind."""
        if kind not in self.findings:
            severity = FAULT if self._strict else KINDS[kind].severity
            self.findings[kind] = Finding(KINDS[kind], severity)
        self.findings[kind].add(example, count)

    def entry(self, value: Any) -> None:
        """Check the next entry."""
        place = Example(entry=self.entries)
        self.entries += 1
        if not isinstance(value, dict):
            self.note("not-an-object", replace(place, text=f"found {brief(value)}"))
            return
        if _is_whole(value.get("video_id")):
            video = self.videos.get(int(value["video_id"]))
            name = None if video is None else video.name
            place = replace(place, video_id=int(value["video_id"]), video=name)
        for kind, text in chain(_key_faults(value), self._faults(value)):
            self.note(kind, replace(place, text=text))
        score = value.get("score")
        if _is_number(score) and _is_finite(score):
            self._scores.add(score)
        if isinstance(value.get("segmentations"), list):
            digest = self._segmentations(value["segmentations"], place)
            if digest is not None and place.video_id in self.videos and _is_number(score):
                self._compare(value, digest, place)
        if place.video_id in self.videos:
            category = value.get("category_id")
            self._predicted[place.video_id, int(category) if _is_whole(category) else None] += 1

    def _faults(self, value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield kind and text of what is wrong with the values of an entry, masks aside."""
        number, category, score = (value.get(key) for key in _FIELDS if key != "segmentations")
        if _is_whole(number):
            yield from self._video_faults(int(number), value.get("segmentations"))
        if _is_whole(category) and category not in self._categories:
            if category < 0:
                yield "negative-id", f"category {int(category)}"
            elif known := sorted(self._categories):
                told = f"{len(known)} from {known[0]} to {known[-1]}"
                yield "unknown-category", f"category {int(category)}, expected one of {told}"
        if _is_number(score):
            if not _is_finite(score):
                yield "score-not-finite", f"the score is {score}"
            elif not 0 <= score <= 1:
                yield "score-range", f"the score is {brief(score)}"

    def _video_faults(self, number: int, segmentations: Any) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the video of an entry, or with the number of masks for it."""
        video = self.videos.get(number)
        if video is None:
            yield ("negative-id" if number < 0 else "unknown-video"), ""
        elif _is_list(segmentations) and len(segmentations) != video.length:
            found = counted(len(segmentations), "mask")
            yield "length", f"{found}, the video has {counted(video.length, 'frame')}"

    def _segmentations(self, values: Sequence[Any], place: Example) -> bytes | None:
        """Check the masks of an entry; return a digest of them if they are sound and not empty."""
        video = None if place.video_id is None else self.videos.get(place.video_id)
        problems: dict[tuple[str, str], list[int]] = {}
        rles: list[tuple[int, RLE]] = []
        for frame, value in enumerate(values):
            if is_absent(value):
                continue
            self.masks += 1
            found = list(_mask_faults(value, video))
            for problem in found:
                problems.setdefault(problem, []).append(frame)
            if all(kind in _STILL_RLE for kind, _ in found):
                rles.append((frame, value))
        pixels, malformed = _measured([rle for _, rle in rles])
        for at, problem in malformed:
            problems.setdefault(problem, []).append(rles[at][0])
        for (kind, text), frames in problems.items():
            example = replace(place, text=text, frame=frames[0], frames=len(frames))
            self.note(kind, example, len(frames) if KINDS[kind].unit == "mask" else 1)
        self.characters += sum(len(rle["counts"]) for _, rle in rles)
        if problems:
            return None
        if not pixels:
            text = f"{counted(len(rles), 'mask')}, empty" if rles else "null in every frame"
            self.note("empty-track", replace(place, text=text))
            return None
        texts = "\n".join(f"{frame} {rle['size']} {rle['counts']}" for frame, rle in rles)
        return hashlib.blake2b(texts.encode(), digest_size=16).digest()

    def _compare(self, value: Mapping[str, Any], digest: bytes, place: Example) -> None:
        """Compare an entry with those before it."""
        assert place.video_id is not None and place.entry is not None
        if not _is_whole(value.get("category_id")):
            return
        key = (place.video_id, int(value["category_id"]), digest)
        if key not in self._seen:
            self._seen[key] = place.entry, value["score"]
            return
        first, score = self._seen[key]
        kind = "duplicate" if score == value["score"] else "same-masks"
        self.note(kind, replace(place, text=f"as entry {first}"))

    def end(self) -> None:
        """Check what only the whole list shows."""
        if not self.entries and not {"json", "not-a-list"} & self.findings.keys():
            self.note("no-prediction", Example())
        if len(self._scores) == 1 and self.entries > 1:
            self.note("equal-scores", Example(f"each is {brief(self._scores.pop())}"))
        for (number, category), count in self._predicted.items():
            if count > MOST_COUNTED and category is not None:
                text = f"{count} predictions of category {category}"
                self.note("too-many", self._of_video(number, text))
        predicted = {number for number, _ in self._predicted}
        for number in self.videos if self.entries else ():
            if number not in predicted:
                self.note("video-without-prediction", self._of_video(number))

    def _of_video(self, number: int, text: str = "") -> Example:
        """Return an example that is a whole video."""
        return Example(text, video_id=number, video=self.videos[number].name)


def _is_whole(value: Any) -> TypeGuard[int | float]:
    """Tell whether a value is a whole number, as the readers of the format understand it."""
    return type(value) is int or (type(value) is float and value.is_integer())


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Tell whether a value is a number, finite or not."""
    return type(value) is int or type(value) is float


def _is_finite(value: int | float) -> bool:
    """Tell whether a number is finite; a whole number may be too large for a double."""
    return isinstance(value, int) or math.isfinite(value)


def _is_list(value: Any) -> bool:
    """Tell whether a value is a list."""
    return isinstance(value, list)


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "video_id": (_is_whole, "a whole number"),
    "category_id": (_is_whole, "a whole number"),
    "score": (_is_number, "a number"),
    "segmentations": (_is_list, "a list with a mask or null for each frame"),
}
"""Key of an entry -> whether a value fits, and what would."""

_STILL_RLE = frozenset(["mask-size", "repeated-key"])
"""Faults of a mask whose runs can be read all the same."""


def _key_faults(value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield kind and text of what is wrong with the keys of an entry and the types of values."""
    if isinstance(value, RepeatedKeys):
        yield "repeated-key", value.told
    if missing := [key for key in _FIELDS if key not in value]:
        yield "missing-key", quoted(missing)
    if extra := [key for key in value if key not in _FIELDS]:
        yield "extra-key", quoted(extra)
    wrong = [
        f"`{key}` is {brief(value[key])}, expected {wanted}"
        for key, (fits, wanted) in _FIELDS.items()
        if key in value and not fits(value[key])
    ]
    if wrong:
        yield "wrong-type", "; ".join(wrong)


def _mask_faults(value: Any, video: VideoInfo | None) -> Iterator[tuple[str, str]]:
    """Yield kind and text of what is wrong with one mask, its runs aside."""
    if isinstance(value, list):
        yield "polygon", ""
        return
    if not isinstance(value, dict) or "size" not in value or "counts" not in value:
        yield "mask-form", f"found {brief(value)}"
        return
    if isinstance(value, RepeatedKeys):
        yield "repeated-key", value.told
    size, counts = value["size"], value["counts"]
    if not (_is_list(size) and len(size) == 2 and all(type(n) is int and n >= 0 for n in size)):
        yield "mask-form", f"`size` is {brief(size)}, expected [height, width]"
    elif video is not None and size != [video.height, video.width]:
        swapped = size == [video.width, video.height]
        yield (
            "mask-size",
            f"{size[0]}x{size[1]}, the video is {video.height}x{video.width}"
            + (" (height comes first)" if swapped else ""),
        )
    if isinstance(counts, list):
        yield "plain-runs", ""
    elif not isinstance(counts, str):
        yield "mask-form", f"`counts` is {brief(counts)}, expected text"
    elif _BYTES_REPR.fullmatch(counts):
        yield "bytes-repr", f"`counts` is {brief(counts)}"


def _measured(rles: Sequence[RLE]) -> tuple[int, list[tuple[int, tuple[str, str]]]]:
    """Return the foreground pixels of a track, and which masks are malformed: kind and text."""
    pixels = 0
    malformed = []
    for at, rle in enumerate(rles):
        try:
            pixels += masks.area(rle)
        except DataError as error:
            text = error.message.removeprefix("malformed RLE: ")
            kind = "run-sum" if "the runs cover" in text else "malformed-rle"
            malformed.append((at, (kind, text)))
    return pixels, malformed
