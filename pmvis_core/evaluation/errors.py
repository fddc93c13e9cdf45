"""What stands between a model and AP 1: how often it errs in which way, and what each way costs.

The types and their definitions are in `error_types`. What a type costs is the AP that would be
gained if its errors, and no others, were corrected by an oracle (TIDE, section 3.2, there called
fixing; for tracks):

- ``class``, ``localisation``, ``temporal``: the prediction becomes a match of the object that it is
  about, at its score; ``identity_switch``: it is cut into one match of each object that it follows.
- Of corrected predictions that are about one object the best-scored matches it; the others, and
  those whose object is matched already, are removed.
- ``duplicate``, ``both``, ``background``: the prediction is removed.
- ``missed``: the object is removed; a category without objects leaves the mean.

Matches that are there stay. Costs do not add up to 1 - AP, since errors hide each other, but with
all types corrected AP is 1 (below, only where a video has over 100 objects of a category).

    print(breakdown_table(breakdown(truth, predictions, evaluation.matches)))
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pmvis_core.evaluation.curves import accumulate
from pmvis_core.evaluation.error_types import (
    KINDS,
    MISSED,
    Errors,
    find_errors,
    places_in_pairs,
)
from pmvis_core.evaluation.matches import Ints, Matches
from pmvis_core.evaluation.protocol import Flags, iou_thresholds
from pmvis_core.evaluation.subset import of_all_objects
from pmvis_core.formats.ytvis import Dataset
from pmvis_core.formats.ytvis_annotation import Annotation
from pmvis_core.progress import Progress, silent
from pmvis_core.types import Category


@dataclass(frozen=True)
class Mistake:
    """One error at the first threshold."""

    kind: str
    """One of `error_types.KINDS`."""
    video_id: int
    """Where."""
    category_id: int
    """Of the prediction, or of the object that is missed."""
    prediction: int | None
    """Id of the prediction; None for a missed object."""
    score: float | None
    """Of the prediction."""
    objects: tuple[int, ...]
    """Annotation ids of what the error is about."""


@dataclass(frozen=True)
class ErrorCount:
    """One type of errors."""

    kind: str
    """One of `error_types.KINDS`."""
    count: float
    """How many there are: the mean over the thresholds."""
    cost: float | None
    """AP gained by correcting this type alone, 0 to 1: the mean over the thresholds. None where AP
    has no value, before or after."""


@dataclass(frozen=True)
class Breakdown:
    """All errors of an evaluation; numbers are means over the thresholds."""

    thresholds: tuple[float, ...]
    """IoU thresholds."""
    ap: float | None
    """AP as it is, 0 to 1."""
    objects: int
    """Ground truths that count."""
    hits: float
    """Predictions that match one."""
    false_positives: float
    """Predictions that match none."""
    rows: tuple[ErrorCount, ...]
    """One a type, in the order of `error_types.KINDS`; all but the last sum to the false
    positives."""
    mistakes: tuple[Mistake, ...]
    """Every error at the first threshold, false positives by category and video, then misses."""


def breakdown(
    truth: Dataset,
    predictions: Sequence[Annotation],
    matches: Matches,
    *,
    every_threshold: bool = False,
    progress: Progress = silent,
) -> Breakdown:
    """Explain every error of an evaluation and what each type costs.

    Args:
        truth: the ground truth.
        predictions: those that were evaluated.
        matches: of them, or of a subset of the videos.
        every_threshold: means over the ten IoU thresholds instead of IoU 0.5 alone.
        progress: tells how many videos are done.

    Raises:
        DataError: the matches are of other tracks, or two predictions share an id.
    """
    chosen = range(len(iou_thresholds())) if every_threshold else range(1)
    found = find_errors(truth, predictions, matches, chosen, progress)
    every = of_all_objects(matches)
    bare = [corrected_ap(truth.categories, every, errors, ()) for errors in found]
    rows = []
    for kind in KINDS:
        fixed = [corrected_ap(truth.categories, every, errors, {kind}) for errors in found]
        gains = [
            None if a is None or b is None else b - a for a, b in zip(bare, fixed, strict=True)
        ]
        rows.append(
            ErrorCount(kind, _mean([_count(errors, kind) for errors in found]), _or_none(gains))
        )
    return Breakdown(
        thresholds=tuple(float(iou_thresholds()[errors.threshold]) for errors in found),
        ap=_or_none(bare),
        objects=int(np.count_nonzero(~every.truth_ignored[:, 0])),
        hits=_mean([int(np.count_nonzero(errors.taken)) for errors in found]),
        false_positives=_mean([len(errors.kinds) for errors in found]),
        rows=tuple(rows),
        mistakes=_mistakes(matches, found[0]),
    )


def breakdown_json(found: Breakdown) -> dict[str, Any]:
    """Return the numbers as one JSON object, without the single mistakes."""
    return {
        "thresholds": list(found.thresholds),
        "AP": found.ap,
        "objects": found.objects,
        "hits": found.hits,
        "false_positives": found.false_positives,
        "errors": {row.kind: {"count": row.count, "cost": row.cost} for row in found.rows},
    }


def mistakes_json(found: Breakdown) -> list[dict[str, Any]]:
    """Return one JSON object a mistake."""
    return [asdict(mistake) for mistake in found.mistakes]


def breakdown_table(found: Breakdown) -> str:
    """Return one line a type, ``-`` where AP has no value."""
    first, last = found.thresholds[0], found.thresholds[-1]
    span = f"{first:.2f}" if first == last else f"{first:.2f}:{last:.2f}"
    ap = "-" if found.ap is None else f"{found.ap:.3f}"
    form = ".0f" if len(found.thresholds) == 1 else ".1f"
    lines = [
        f" at IoU {span}: AP {ap}, {found.objects} objects, {found.hits:{form}} hits, "
        f"{found.false_positives:{form}} false positives",
        f" {'error':<16} {'count':>9} {'AP cost':>8}",
    ]
    for row in found.rows:
        cost = "-" if row.cost is None else f"{row.cost:.3f}"
        lines.append(f" {row.kind.replace('_', ' '):<16} {row.count:>9{form}} {cost:>8}")
    return "\n".join(lines)


def corrected_ap(
    categories: Sequence[Category], matches: Matches, errors: Errors, kinds: Collection[str]
) -> float | None:
    """Return AP at a threshold with all errors of some types corrected; see the module.

    Args:
        categories: the vocabulary.
        matches: those in which the errors were found, of the group of all objects.
        errors: what was found.
        kinds: the types that an oracle corrects; none gives AP as it is.

    Returns:
        0 to 1, or None where no object is left.
    """
    t = errors.threshold
    wrong = np.array([n for n, kind in errors.kinds.items() if kind in kinds], dtype=np.int64)
    kept = np.ones(len(matches.scores), dtype=bool)
    kept[wrong] = False
    (rows,) = np.nonzero(kept)
    sources, objects = _corrected(matches, errors, wrong)
    owners = places_in_pairs(matches.truth_starts)[objects]
    changed = _Column(
        pairs=np.concatenate([places_in_pairs(matches.starts)[rows], owners]),
        sources=np.concatenate([rows, sources]),
        hits=np.concatenate([matches.matches[rows, 0, t] != 0, np.ones(len(sources), bool)]),
        ignored=np.concatenate([matches.ignored[rows, 0, t], np.zeros(len(sources), bool)]),
    )
    gone = errors.missed if MISSED in kinds else np.zeros_like(errors.missed)
    precision = accumulate(categories, _with(matches, changed, gone)).precision[t, :, :, 0, -1]
    counted = precision[precision > -1]
    return float(np.mean(counted)) if counted.size else None


@dataclass(frozen=True)
class _Column:
    """Predictions as an oracle leaves them at one threshold: N of them."""

    pairs: Ints
    """(N,) the pair of video and category that each belongs to."""
    sources: Ints
    """(N,) the place that each had before, which gives its score and its order among equals."""
    hits: Flags
    """(N,)"""
    ignored: Flags
    """(N,)"""


def _corrected(matches: Matches, errors: Errors, wrong: Ints) -> tuple[Ints, Ints]:
    """Return which wrong predictions match which objects once corrected, the best-scored each."""
    free = ~errors.taken
    sources: list[int] = []
    objects: list[int] = []
    for n in wrong[np.argsort(-matches.scores[wrong], kind="stable")].tolist():
        for g in errors.targets.get(n, ()):
            if free[g]:
                free[g] = False
                sources.append(n)
                objects.append(g)
    return np.array(sources, dtype=np.int64), np.array(objects, dtype=np.int64)


def _with(matches: Matches, changed: _Column, gone: Flags) -> Matches:
    """Return matches with other predictions, alike at all thresholds, and without some objects."""
    scores = matches.scores[changed.sources]
    order = np.lexsort((changed.sources, -scores, changed.pairs))
    number = np.bincount(changed.pairs, minlength=len(matches))
    starts = np.concatenate([[0], np.cumsum(number)]).astype(np.int64)
    cells = number * np.diff(matches.truth_starts)
    shape = (len(order), 1, len(iou_thresholds()))
    return replace(
        matches,
        starts=starts,
        scores=scores[order],
        rows=matches.rows[changed.sources][order],
        matches=np.array(np.broadcast_to(changed.hits[order, None, None], shape), dtype=np.int64),
        ignored=np.array(np.broadcast_to(changed.ignored[order, None, None], shape)),
        truth_ignored=matches.truth_ignored | gone[:, None],
        iou_starts=np.concatenate([[0], np.cumsum(cells)]).astype(np.int64),
        ious=np.zeros(int(cells.sum())),
    )


def _count(errors: Errors, kind: str) -> int:
    """Return how many errors are of a type."""
    if kind == MISSED:
        return int(np.count_nonzero(errors.missed))
    return sum(one == kind for one in errors.kinds.values())


def _mistakes(matches: Matches, errors: Errors) -> tuple[Mistake, ...]:
    """List the errors of one threshold."""
    pairs, owners = places_in_pairs(matches.starts), places_in_pairs(matches.truth_starts)
    found = [
        Mistake(
            kind=kind,
            video_id=int(matches.video_ids[pairs[n]]),
            category_id=int(matches.category_ids[pairs[n]]),
            prediction=int(matches.rows[n]),
            score=float(matches.scores[n]),
            objects=tuple(int(matches.truth_ids[g]) for g in errors.targets.get(n, ())),
        )
        for n, kind in errors.kinds.items()
    ]
    for g in np.flatnonzero(errors.missed).tolist():
        video, category = matches.video_ids[owners[g]], matches.category_ids[owners[g]]
        number = int(matches.truth_ids[g])
        found.append(Mistake(MISSED, int(video), int(category), None, None, (number,)))
    return tuple(found)


def _mean(values: Sequence[float]) -> float:
    """Return the mean over the thresholds."""
    return sum(values) / len(values)


def _or_none(values: Sequence[float | None]) -> float | None:
    """Return the mean over the thresholds, None if one has no value."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if len(there) == len(values) else None
