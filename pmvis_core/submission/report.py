"""What `check` finds: the table of kinds of faults, and the report that counts them.

A fault is what servers refuse, or score as something else than was meant; a warning is legal and
probably not meant. A new kind is a row of `KINDS` and a line where `check` notes it.

    for finding in report.findings:
        print(finding.severity, finding.kind.what, finding.count, finding.examples[0].place)
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from reprlib import Repr
from typing import Any

FAULT, WARNING = "fault", "warning"

EXAMPLES_KEPT = 5
"""Examples that a report keeps of each kind."""

_CONTAINERS = Repr()
_LONGEST = 48


@dataclass(frozen=True)
class Kind:
    """A way in which a submission may be wrong."""

    name: str
    """For programs: ``mask-size``."""
    severity: str
    """`FAULT` or `WARNING`."""
    unit: str
    """What is counted: ``file``, ``entry``, ``mask`` or ``video``."""
    what: str
    """What is wrong with each of them."""
    fix: str
    """What to do about it."""


_KINDS = (
    Kind(
        "json", FAULT, "file", "the file is no JSON from some place on",
        "write it again with `json.dump`, whole; what comes after that place was not checked",
    ),
    Kind(
        "not-a-list", FAULT, "file", "the file is no list",
        "a submission is a list of objects, one a prediction",
    ),
    Kind(
        "no-prediction", FAULT, "file", "the list holds no prediction",
        "servers break off at an empty list: lower the model's score threshold",
    ),
    Kind(
        "not-an-object", FAULT, "entry", "the entry is no object",
        "each entry has the keys `video_id`, `category_id`, `score` and `segmentations`",
    ),
    Kind(
        "repeated-key", FAULT, "entry", "a key stands twice in one object",
        "readers keep the last one; remove the other",
    ),
    Kind(
        "missing-key", FAULT, "entry", "a key is missing",
        "each entry has the keys `video_id`, `category_id`, `score` and `segmentations`",
    ),
    Kind(
        "extra-key", WARNING, "entry", "a key does not belong to the format",
        "servers ignore it; `--pack` leaves it out",
    ),
    Kind(
        "wrong-type", FAULT, "entry", "a value has the wrong type",
        "ids are whole numbers, scores numbers, without quotes; `segmentations` is a list",
    ),
    Kind(
        "negative-id", FAULT, "entry", "an id is negative",
        "take video and category ids from the validation file",
    ),
    Kind(
        "unknown-video", FAULT, "entry", "the video is not in the expected file",
        "servers refuse the whole file: take the ids of `videos`, and check that it is the same "
        "split and year",
    ),
    Kind(
        "unknown-category", FAULT, "entry", "the category is not in the expected file",
        "it counts for nothing: take the ids of `categories`; a network's labels usually start at "
        "0 and the ids at 1",
    ),
    Kind(
        "score-not-finite", FAULT, "entry", "the score is not finite",
        "its place in the ranking is undefined: look for a division by zero or an overflow",
    ),
    Kind(
        "score-range", FAULT, "entry", "the score is not in [0, 1]",
        "the format asks for a confidence: apply the sigmoid or softmax",
    ),
    Kind(
        "length", FAULT, "entry", "there are not as many masks as the video has frames",
        "give each frame of the video a mask or null, in order; servers drop what is too much",
    ),
    Kind(
        "mask-form", FAULT, "mask", "the value is no mask",
        'a mask is null or {"size": [height, width], "counts": text}',
    ),
    Kind(
        "polygon", FAULT, "mask", "the mask is a list of polygons",
        "servers take compressed RLE only: `pycocotools.mask.frPyObjects`, then `merge`",
    ),
    Kind(
        "plain-runs", FAULT, "mask", "the mask is uncompressed RLE",
        "servers take compressed RLE only: `pycocotools.mask.frPyObjects(rle, height, width)`",
    ),
    Kind(
        "bytes-repr", FAULT, "mask", "`counts` is the text of a Python bytes object",
        "write `counts.decode('ascii')` instead of `str(counts)`",
    ),
    Kind(
        "mask-size", FAULT, "mask", "the mask has another size than its video",
        "it counts as a miss: resize masks to the height and width of the video before encoding "
        "them, not to those of the network's input",
    ),
    Kind(
        "run-sum", FAULT, "mask", "the runs do not cover the mask",
        "`size` and `counts` do not belong together, and servers may hang: encode the resized "
        "mask, do not edit `size`",
    ),
    Kind(
        "malformed-rle", FAULT, "mask", "the run lengths are malformed",
        "encode the mask again with `pycocotools.mask.encode`; the text may have been cut or "
        "escaped twice",
    ),
    Kind(
        "duplicate", FAULT, "entry", "the prediction repeats another one",
        "it counts as a false positive: perhaps two files with the same videos were joined",
    ),
    Kind(
        "same-masks", WARNING, "entry", "the masks are another prediction's, of the same category",
        "the one with the lower score counts as a false positive",
    ),
    Kind(
        "empty-track", WARNING, "entry", "no frame has any foreground",
        "it counts as a false positive: leave it out, or lower the threshold of masks",
    ),
    Kind(
        "equal-scores", WARNING, "file", "all scores are equal",
        "predictions are ranked by score, so AP then depends on their order: write the model's own",
    ),
    Kind(
        "too-many", WARNING, "video", "there are too many predictions of a category",
        "of a video and category only the 100 with the best scores count: leave the others out",
    ),
    Kind(
        "video-without-prediction", WARNING, "video", "the video has no prediction",
        "its objects count as missed: check that inference went through all videos",
    ),
    Kind(
        "matched-by-id", WARNING, "file", "the names of videos are not those of the expected file",
        "check that the ids mean the same videos",
    ),
    Kind(
        "left-out", WARNING, "entry", "a category is not in the expected file, by name",
        "`--pack` leaves these predictions out",
    ),
)  # fmt: skip

KINDS: dict[str, Kind] = {kind.name: kind for kind in _KINDS}
"""All kinds by name, in the order of a report."""


@dataclass(frozen=True)
class Example:
    """One place where something is wrong. Entries and frames count from 0."""

    text: str = ""
    """What was found there."""
    entry: int | None = None
    """Of the list."""
    video_id: int | None = None
    """As the entry says."""
    video: str | None = None
    """Name of the expected video with that id."""
    frame: int | None = None
    """The first frame of the track with this fault."""
    frames: int | None = None
    """How many frames of the track have it."""

    @property
    def place(self) -> str:
        """Where it is, in words; empty for the whole file."""
        parts = [] if self.entry is None else [f"entry {self.entry}"]
        if self.video_id is not None:
            name = "" if self.video is None else f" `{self.video}`"
            parts.append(f"video {self.video_id}{name}")
        if self.frame is not None:
            more = (self.frames or 1) - 1
            parts.append(f"frame {self.frame}" + (f" and {counted(more, 'more')}" if more else ""))
        return ", ".join(parts)


@dataclass
class Counted:
    """A kind, and how often it was found."""

    kind: Kind
    """What is wrong."""
    severity: str
    """That of the kind; under ``strict`` always `FAULT`."""
    count: int = 0
    """How many of the kind's unit have it."""

    def facts(self) -> dict[str, Any]:
        """Return what a JSON report says of it, but for where it was found."""
        return {
            "kind": self.kind.name,
            "severity": self.severity,
            "what": self.kind.what,
            "fix": self.kind.fix,
            "unit": self.kind.unit,
            "count": self.count,
        }


@dataclass
class Finding(Counted):
    """All that was found of one kind."""

    videos: set[int] = field(default_factory=set)
    """Ids of the videos concerned."""
    examples: list[Example] = field(default_factory=list)
    """The first `EXAMPLES_KEPT`."""

    def add(self, example: Example, count: int = 1) -> None:
        """Count a case."""
        self.count += count
        if example.video_id is not None:
            self.videos.add(example.video_id)
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(example)

    @property
    def extent(self) -> str:
        """How much is concerned, in words: ``36 masks in 1 video``; empty for the whole file."""
        if self.kind.unit == "file":
            return ""
        text = counted(self.count, self.kind.unit)
        if self.videos and self.kind.unit != "video":
            text += f" in {counted(len(self.videos), 'video')}"
        return text


class Verdict:
    """What follows from findings alone."""

    findings: tuple[Counted, ...]

    @property
    def sound(self) -> bool:
        """Whether there is no fault; warnings are allowed."""
        return not self.kinds(FAULT)

    def kinds(self, severity: str) -> int:
        """Return how many kinds of faults (or warnings) there are."""
        return sum(finding.severity == severity for finding in self.findings)


@dataclass(frozen=True)
class Report(Verdict):
    """What is wrong with a submission."""

    name: str
    """How messages call the submission."""
    expected: str
    """How messages call the file that it is for."""
    videos: int
    """Videos of that file."""
    predictions: int
    """Entries that were read."""
    masks: int
    """Masks that were read, null left aside."""
    characters: int
    """Characters of the masks' texts."""
    findings: tuple[Finding, ...]
    """One a kind, in the order of `KINDS`."""

    def as_json(self) -> dict[str, Any]:
        """Return it as one JSON object; places in a file are null where they do not apply."""
        return {
            "sound": self.sound,
            "videos": self.videos,
            "predictions": self.predictions,
            "masks": self.masks,
            "findings": [
                {
                    **finding.facts(),
                    "videos": len(finding.videos),
                    "examples": [asdict(example) for example in finding.examples],
                }
                for finding in self.findings
            ],
        }


def counted(number: int, unit: str) -> str:
    """Return a number with its unit in singular or plural: ``1 entry``, ``2 masks``."""
    plural = {"entry": "entries", "more": "more"}.get(unit, f"{unit}s")
    return f"{number} {unit if number == 1 else plural}"


def brief(value: Any) -> str:
    """Return a JSON value for a message, the beginning of a long one."""
    if isinstance(value, list | dict):
        return _CONTAINERS.repr(value)
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def quoted(keys: Iterable[str]) -> str:
    """Return keys of an object as a message quotes them."""
    return ", ".join(f"`{brief(key)[1:-1]}`" for key in keys)
