"""What each false positive and each missed object is an instance of.

After TIDE (Bolya et al., TIDE: A General Toolbox for Identifying Object Detection Errors, ECCV
2020), whose types are of boxes in one image; a track can fail in time as well. At an IoU threshold
t a prediction that counts and matches nothing gets the first type that holds of it. "Object" means
a ground truth that counts (no crowd), IoU the track IoU, a prediction's own objects those of its
category.

1. ``duplicate``: IoU >= t with an own object, which a better prediction has taken.
2. ``class``: IoU >= t with an object of another category.
3. ``identity_switch``: it follows two own objects or more, each in other frames. It follows, in a
   frame, the own object with the largest IoU of masks there, if that is >= t. Its target in a
   frame is the object that it follows there or followed last (before the first: follows first);
   the intersections with the targets over all frames, divided by the unions, must reach t.
4. ``temporal``: right object, wrong frames: over the frames in which both hold a mask the IoU with
   an own object is >= t, so it is frames that only one of them holds that make the IoU fail.
5. ``localisation``: 0.1 <= IoU < t with an own object.
6. ``both``: 0.1 <= IoU < t with an object of another category.
7. ``background``: IoU < 0.1 with every object.

``missed`` is an object without a match that no error of types 2 to 5 is about (TIDE's rule): such
an error is about the object with the largest IoU among those that made it so, a switch about all
that it follows. So the counts of 1 to 7 sum to the false positives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pmvis_core.errors import DataError
from pmvis_core.evaluation.matches import Ints, Matches
from pmvis_core.evaluation.overlaps import Overlaps, frame_overlaps
from pmvis_core.evaluation.protocol import Flags, iou_thresholds
from pmvis_core.formats.ytvis import Dataset
from pmvis_core.formats.ytvis_annotation import Annotation
from pmvis_core.progress import Progress, silent

FALSE_POSITIVES = (
    "duplicate",
    "class",
    "identity_switch",
    "temporal",
    "localisation",
    "both",
    "background",
)
"""Types of predictions, in the order in which they are tried."""
MISSED = "missed"
"""The type of objects that nothing explains."""
KINDS = (*FALSE_POSITIVES, MISSED)
"""All types."""
CORRECTABLE = ("class", "identity_switch", "temporal", "localisation")
"""Types that are about an object, which a corrected prediction would have found."""

_FLOOR = 0.1
"""IoU below which a prediction has nothing to do with an object."""
_AT_ONCE = 128
"""Predictions whose overlaps are held at a time."""


@dataclass(frozen=True)
class Errors:
    """All errors at one IoU threshold; N predictions and G ground truths as in `Matches`."""

    threshold: int
    """Index into `iou_thresholds`."""
    kinds: Mapping[int, str]
    """Type of each false positive, by its place among the N predictions, ascending."""
    targets: Mapping[int, tuple[int, ...]]
    """The objects that errors of `CORRECTABLE` types are about: places among the G."""
    taken: Flags
    """(G,) objects that a counted prediction matches."""
    missed: Flags
    """(G,) objects of type ``missed``."""


def find_errors(
    truth: Dataset,
    predictions: Sequence[Annotation],
    matches: Matches,
    thresholds: Sequence[int] = (0,),
    progress: Progress = silent,
) -> tuple[Errors, ...]:
    """Find the type of every error, in the group of objects of all sizes.

    Memory grows with the frames and objects of one video, not with the number of videos.

    Args:
        truth: the ground truth.
        predictions: those that were matched.
        matches: of them with it, or of some of the videos.
        thresholds: indices into `iou_thresholds`.
        progress: tells how many videos are done.

    Raises:
        DataError: the matches are of other tracks, or two predictions share an id.
    """
    counted = ~matches.ignored[:, 0] & (matches.matches[:, 0] == 0)
    wrong = counted[:, list(thresholds)]
    kinds: list[dict[int, str]] = [{} for _ in thresholds]
    targets: list[dict[int, tuple[int, ...]]] = [{} for _ in thresholds]
    tracks = _Tracks(truth, predictions, matches)
    for pairs in progress(tracks.videos, "explain errors"):
        for part in tracks.parts(pairs, wrong.any(axis=1)):
            for place, t in enumerate(thresholds):
                judged = _judge(part, float(iou_thresholds()[t]))
                for n, (kind, columns) in zip(part.rows.tolist(), judged, strict=True):
                    if wrong[n, place]:
                        kinds[place][n] = kind
                        targets[place][n] = tuple(part.columns[list(columns)].tolist())
    return tuple(
        _errors(matches, t, dict(sorted(kinds[place].items())), targets[place])
        for place, t in enumerate(thresholds)
    )


def places_in_pairs(starts: Ints) -> Ints:
    """Return for each entry of a column to which pair it belongs, given where the pairs begin."""
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


class _Part(NamedTuple):
    """Some false positives of one video, and all objects of it."""

    rows: Ints
    """(D,) places among the N predictions."""
    columns: Ints
    """(G,) places among the ground truths."""
    own: Flags
    """(D, G) whether they are of one category."""
    overlaps: Overlaps
    """Of the D with the G."""


class _Tracks:
    """The tracks behind the columns of matches, video by video."""

    def __init__(self, truth: Dataset, predictions: Sequence[Annotation], matches: Matches) -> None:
        """Find each track by its id."""
        by_id = {row.id: row for row in predictions}
        if len(by_id) < len(predictions):
            raise DataError(
                "two predictions share an id, expected their places in the file",
                "number the predictions from 1",
            )
        # Of annotations that share an id the last stands for each, as in the evaluation.
        truths = {row.id: row for row in truth.annotations}
        try:
            self.dts = [by_id[number] for number in matches.rows.tolist()]
            self.gts = [truths[number] for number in matches.truth_ids.tolist()]
        except KeyError as error:
            raise DataError(
                f"the matches know a track {error}, which is neither annotated nor predicted",
                "give the ground truth and the predictions that were evaluated",
            ) from error
        self.matches = matches
        videos: dict[int, list[int]] = {}
        for place, video in enumerate(matches.video_ids.tolist()):
            videos.setdefault(video, []).append(place)
        self.videos = list(videos.values())
        """Places of the pairs of each video."""

    def parts(self, pairs: Sequence[int], wanted: Flags) -> Iterator[_Part]:
        """Yield the wanted predictions (N,) of a video with its objects, a portion at a time."""
        matches = self.matches
        rows = _entries(matches.starts, pairs)
        rows = rows[wanted[rows]]
        columns = _entries(matches.truth_starts, pairs)
        columns = columns[~matches.truth_ignored[columns, 0]]
        ours = matches.category_ids[places_in_pairs(matches.starts)[rows]]
        theirs = matches.category_ids[places_in_pairs(matches.truth_starts)[columns]]
        for begin in range(0, len(rows), _AT_ONCE):
            some = slice(begin, begin + _AT_ONCE)
            yield _Part(
                rows[some],
                columns,
                ours[some, None] == theirs[None, :],
                frame_overlaps([self.dts[n] for n in rows[some]], [self.gts[g] for g in columns]),
            )


def _entries(starts: Ints, pairs: Sequence[int]) -> Ints:
    """Return the entries of some pairs, given where the pairs begin."""
    return np.concatenate([np.arange(starts[p], starts[p + 1]) for p in pairs])


def _judge(part: _Part, t: float) -> list[tuple[str, tuple[int, ...]]]:
    """Return the type of each prediction and the columns of the objects that it is about."""
    if not len(part.columns):
        return [("background", ())] * len(part.rows)
    t = min(t, 1 - 1e-10)  # as the matching has it
    ious, own = part.overlaps.track_ious, part.own
    common = np.where(own, part.overlaps.common_ious, 0.0)
    follows = _follows(part, t)
    own_ious, other_ious = np.where(own, ious, 0.0), np.where(own, 0.0, ious)
    in_time = np.where(common >= t, ious, -1.0)
    judged: list[tuple[str, tuple[int, ...]]] = []
    for d in range(len(part.rows)):
        best, other = own_ious[d].max(), other_ious[d].max()
        if best >= t:
            judged.append(("duplicate", ()))
        elif other >= t:
            judged.append(("class", (int(other_ious[d].argmax()),)))
        elif switched := _switch(part.overlaps, d, follows[:, d], t):
            judged.append(("identity_switch", switched))
        elif common[d].max() >= t:
            judged.append(("temporal", (int(in_time[d].argmax()),)))
        elif best >= _FLOOR:
            judged.append(("localisation", (int(own_ious[d].argmax()),)))
        else:
            judged.append(("both" if other >= _FLOOR else "background", ()))
    return judged


def _follows(part: _Part, t: float) -> Ints:
    """Return (F, D) the object of its category that a prediction follows in a frame, or -1."""
    ious = np.where(part.own, part.overlaps.frame_ious, 0.0)
    return np.where(ious.max(axis=2) >= t, ious.argmax(axis=2), -1)


def _switch(overlaps: Overlaps, d: int, follows: Ints, t: float) -> tuple[int, ...]:
    """Return the objects between which a prediction switches; none if it does not, or not only.

    Args:
        overlaps: of the video.
        d: the prediction.
        follows: (F,) what it follows in each frame, -1 for nothing.
        t: the IoU that the sequence of its targets must reach.
    """
    (frames,) = np.nonzero(follows >= 0)
    objects = tuple(np.unique(follows[frames]).tolist())
    if len(objects) < 2:
        return ()
    every = np.arange(len(follows))
    last = np.maximum(np.searchsorted(frames, every, side="right") - 1, 0)
    targets = follows[frames[last]]
    inter = int(overlaps.inter[every, d, targets].sum())
    union = int(overlaps.union[every, d, targets].sum())
    return objects if inter >= t * union else ()


def _errors(
    matches: Matches, t: int, kinds: dict[int, str], targets: dict[int, tuple[int, ...]]
) -> Errors:
    """Put the errors of a threshold together with the objects that they leave unexplained."""
    taken = _taken(matches, t)
    explained = np.zeros(len(taken), dtype=bool)
    explained[[g for objects in targets.values() for g in objects]] = True
    missed = ~matches.truth_ignored[:, 0] & ~taken & ~explained
    return Errors(t, kinds, targets, taken, missed)


def _taken(matches: Matches, t: int) -> Flags:
    """Return (G,) which objects counted predictions match; of equal ids the first ones."""
    taken = np.zeros(len(matches.truth_ids), dtype=bool)
    ids, counts = matches.matches[:, 0, t], ~matches.ignored[:, 0, t]
    hits = np.flatnonzero((ids != 0) & counts)
    for n, p in zip(hits, places_in_pairs(matches.starts)[hits], strict=True):
        start, stop = matches.truth_starts[p], matches.truth_starts[p + 1]
        free = (matches.truth_ids[start:stop] == ids[n]) & ~taken[start:stop]
        taken[start + free.argmax()] = True
    return taken
