"""What `check-data` finds: the table of kinds of faults, and the report that counts them.

A fault stops training, or makes it learn what is wrong; a warning is legal and probably not meant.
A new kind is a row of `KINDS` and a line where it is noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pmvis_core.submission.report import (
    EXAMPLES_KEPT,
    FAULT,
    WARNING,
    Counted,
    Kind,
    Verdict,
    counted,
)

_KINDS = (
    Kind(
        "file", FAULT, "file", "the file cannot be read to its end",
        "make or download it again; what comes after that place was not checked",
    ),
    Kind(
        "malformed", FAULT, "entry", "a field is missing or no such value",
        "training stops at it: mend the entry or take it out",
    ),
    Kind(
        "duplicate-id", FAULT, "entry", "an id stands twice",
        "number the entries anew; perhaps two files were joined",
    ),
    Kind(
        "unknown-image", FAULT, "annotation", "the annotation is of an image that is not listed",
        "add the image to `images`, or take the annotation out",
    ),
    Kind(
        "unknown-video", FAULT, "annotation", "the annotation is of a video that is not listed",
        "add the video to `videos`, or take the annotation out",
    ),
    Kind(
        "unknown-category", FAULT, "annotation", "the category is not listed",
        "add it to `categories`; a network's labels usually start at 0 and the ids at 1",
    ),
    Kind(
        "box-empty", FAULT, "annotation", "the box has no area",
        "boxes are `[x, y, width, height]` in pixels; take the annotation out",
    ),
    Kind(
        "box-outside", FAULT, "annotation", "the box lies outside of its image",
        "boxes are `[x, y, width, height]` in pixels of the image as annotated",
    ),
    Kind(
        "box-beyond", WARNING, "annotation", "the box reaches more than a pixel beyond its image",
        "it is clipped; perhaps it was written as `[x1, y1, x2, y2]`",
    ),
    Kind(
        "polygon-malformed", FAULT, "annotation", "a polygon is no list of pairs of numbers",
        "a mask is a list of polygons `[x0, y0, x1, y1, …]`",
    ),
    Kind(
        "polygon-open", WARNING, "annotation", "no polygon has three points",
        "the annotation trains nothing; without `segmentation` its box would",
    ),
    Kind(
        "mask-size", FAULT, "annotation", "the mask has another size than its image or video",
        "resize masks to the image before encoding them",
    ),
    Kind(
        "mask-malformed", FAULT, "annotation", "the run lengths are malformed",
        "encode the mask again; the text may have been cut",
    ),
    Kind(
        "mask-empty", WARNING, "annotation", "the mask has no pixel",
        "the annotation trains nothing: take it out",
    ),
    Kind(
        "mask-box", WARNING, "annotation", "mask and box lie apart (IoU below 0.5)",
        "one of them belongs to another object, or the box is `[x1, y1, x2, y2]`",
    ),
    Kind(
        "length", FAULT, "annotation", "there are not as many masks as the video has frames",
        "give each frame a mask or null, in order",
    ),
    Kind(
        "crowd-only", WARNING, "image", "the image holds crowds only",
        "it trains nothing and is left out",
    ),
    Kind(
        "no-annotation", WARNING, "image", "the image has no annotation",
        "it trains nothing and is left out",
    ),
    Kind(
        "video-empty", WARNING, "video", "the video has no track with a mask",
        "it trains nothing and is left out",
    ),
    Kind(
        "file-twice", WARNING, "image", "two images have the same file",
        "the data set counts it twice",
    ),
    Kind(
        "image-missing", FAULT, "image", "the image file is missing",
        "give the folder with `--images` or `--frames`, or download it; training skips it",
    ),
    Kind(
        "image-unreadable", FAULT, "image", "the image file is truncated or no image",
        "download it again; training skips it",
    ),
    Kind(
        "image-size", FAULT, "image", "the image has another size than the annotations say",
        "annotations and images do not belong together; training skips it",
    ),
)  # fmt: skip

KINDS: dict[str, Kind] = {kind.name: kind for kind in _KINDS}
"""All kinds by name, in the order of a report."""


@dataclass
class Finding(Counted):
    """All that was found of one kind."""

    examples: list[str] = field(default_factory=list)
    """The first `EXAMPLES_KEPT`: the place, and what was found there."""

    @property
    def extent(self) -> str:
        """How much is concerned, in words; empty for the whole file."""
        return "" if self.kind.unit == "file" else counted(self.count, self.kind.unit)


class Notes:
    """Collects findings."""

    def __init__(self, *, strict: bool) -> None:
        """Start with nothing noted.

        Args:
            strict: count warnings as faults.
        """
        self._strict = strict
        self._findings: dict[str, Finding] = {}

    def add(self, kind: str, example: str) -> None:
        """Count a case of a kind."""
        if kind not in self._findings:
            severity = FAULT if self._strict else KINDS[kind].severity
            self._findings[kind] = Finding(KINDS[kind], severity)
        finding = self._findings[kind]
        finding.count += 1
        if len(finding.examples) < EXAMPLES_KEPT:
            finding.examples.append(example)

    def report(self, name: str, counts: Mapping[str, int]) -> Report:
        """Return what was noted."""
        found = tuple(self._findings[kind] for kind in KINDS if kind in self._findings)
        return Report(name, counts, found)


@dataclass(frozen=True)
class Report(Verdict):
    """What is wrong with a data set."""

    name: str
    """How messages call it."""
    counts: Mapping[str, int]
    """What was looked at: ``image``, ``annotation``, ``file`` and so on."""
    findings: tuple[Finding, ...]
    """One a kind, in the order of `KINDS`."""

    def as_json(self) -> dict[str, Any]:
        """Return it as one JSON object."""
        return {
            "sound": self.sound,
            **{f"{name}s": count for name, count in self.counts.items()},
            "findings": [
                {**finding.facts(), "examples": finding.examples} for finding in self.findings
            ],
        }
