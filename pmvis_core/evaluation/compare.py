"""Is one evaluation better than another? A paired bootstrap over videos answers with an interval.

Objects of one video stand or fall together, so videos are what is drawn, with replacement, and
both evaluations count the same draw (Efron & Tibshirani, An Introduction to the Bootstrap, 1993,
chapters 13 and 16). A draw is an integer weight to each video: nothing is matched again.

    ids = [video.id for video in truth.videos]
    comparison = compare(ours.matches, theirs.matches, truth.categories, ids)
    print(comparison_table(comparison))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pmvis_core.errors import DataError
from pmvis_core.evaluation.curves import accumulate
from pmvis_core.evaluation.matches import Ints, Matches
from pmvis_core.evaluation.protocol import Floats
from pmvis_core.evaluation.subset import of_all_objects
from pmvis_core.progress import Progress, silent
from pmvis_core.types import Category

COMPARED = ("AP", "AP50", "AP75", "AR10")
_TAIL_PERCENT = 2.5


@dataclass(frozen=True)
class Difference:
    """One number of two evaluations; all but the name None where there is no ground truth."""

    name: str
    """``AP``, ``AP50``, ``AP75`` or ``AR10``."""
    first: float | None
    """Of the first evaluation on all videos, 0 to 1."""
    second: float | None
    """Of the second."""
    difference: float | None
    """First less second."""
    low: float | None
    """Lower end of the difference's 95 % percentile interval."""
    high: float | None
    """Upper end."""
    better: float | None
    """Share of the draws in which the first is greater."""
    worse: float | None
    """Share of the draws in which the second is greater; in the rest they are equal."""


@dataclass(frozen=True)
class Comparison:
    """How two evaluations of the same videos differ."""

    rows: tuple[Difference, ...]
    """One a number of `COMPARED`."""
    videos: int
    """How many videos each draw holds."""
    samples: int
    """How many draws counted; those without any ground truth do not."""
    seed: int
    """Of the draws."""


def compare(
    first: Matches,
    second: Matches,
    categories: Sequence[Category],
    videos: Iterable[int],
    *,
    samples: int = 1000,
    seed: int = 0,
    progress: Progress = silent,
) -> Comparison:
    """Compare two evaluations by a paired bootstrap over videos.

    Args:
        first: matches of one set of predictions.
        second: of another, against the same ground truth under the same protocol.
        categories: the vocabulary.
        videos: ids of all videos of the ground truth; those without any track are drawn, too.
        samples: number of draws; 0 gives the differences without intervals.
        seed: the same seed gives the same result.
        progress: tells how many draws are done.

    Raises:
        DataError: the two were evaluated against different ground truth.
    """
    _check_same_truth(first, second)
    ids = np.unique(np.fromiter(videos, dtype=np.int64))
    sides = (of_all_objects(first), of_all_objects(second))
    places = [_places(side, ids) for side in sides]
    stated = np.array([_numbers(categories, side, None) for side in sides])
    rng = np.random.default_rng(seed)
    drawn: list[Floats] = []
    for _ in progress(range(samples), "compare", samples):
        times = np.bincount(rng.integers(0, len(ids), len(ids)), minlength=len(ids))
        values = [
            _numbers(categories, side, times[place])
            for side, place in zip(sides, places, strict=True)
        ]
        drawn.append(np.array(values))
    stack = np.array(drawn).reshape(-1, len(sides), len(COMPARED))
    stack = stack[~np.isnan(stack).any(axis=(1, 2))]
    rows = (_difference(name, stated[:, n], stack[:, :, n]) for n, name in enumerate(COMPARED))
    return Comparison(tuple(rows), len(ids), len(stack), seed)


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as one JSON object: by number, with ``videos, samples, seed``."""
    rows = {row.name: asdict(row) for row in comparison.rows}
    for row in rows.values():
        del row["name"]
    return {**asdict(comparison), "rows": rows}


def comparison_table(comparison: Comparison) -> str:
    """Return the comparison as a table, ``-`` where there is no ground truth."""
    lines = [
        f" {'':<5} {'first':>7} {'second':>7} {'difference':>11}   {'95 % interval':<18} "
        f"{'first better':>13} {'second better':>14}"
    ]
    for row in comparison.rows:
        interval = "-"
        if row.low is not None and row.high is not None:
            interval = f"[{row.low:+.4f}, {row.high:+.4f}]"
        lines.append(
            f" {row.name:<5} {_cell(row.first, '.4f'):>7} {_cell(row.second, '.4f'):>7} "
            f"{_cell(row.difference, '+.4f'):>11}   {interval:<18} "
            f"{_cell(row.better, '.1%'):>13} {_cell(row.worse, '.1%'):>14}"
        )
    lines.append(
        f" {comparison.samples} draws of {comparison.videos} videos with replacement, both sides "
        f"alike, seed {comparison.seed}"
    )
    return "\n".join(lines)


def _check_same_truth(first: Matches, second: Matches) -> None:
    """Check that both sides were matched with the same objects.

    Raises:
        DataError: they were not.
    """
    ours, theirs = (
        np.stack([side.category_ids, side.video_ids])[:, np.diff(side.truth_starts) > 0]
        for side in (first, second)
    )
    if (
        first.groups != second.groups
        or not np.array_equal(ours, theirs)
        or not np.array_equal(first.truth_ids, second.truth_ids)
        or not np.array_equal(first.truth_ignored, second.truth_ignored)
    ):
        raise DataError(
            "the two evaluations are of different ground truth or protocols",
            "evaluate both against the same file, with the same `--protocol` and `--subset`",
        )


def _places(matches: Matches, ids: Ints) -> Ints:
    """Return (P,) the place of each pair's video among sorted ids.

    Raises:
        DataError: a video is not among them.
    """
    places = np.searchsorted(ids, matches.video_ids)
    strange = matches.video_ids[~np.isin(matches.video_ids, ids)]
    if strange.size:
        raise DataError(f"video {strange[0]} was evaluated, but the ground truth does not list it")
    return places.astype(np.int64)


def _numbers(categories: Sequence[Category], matches: Matches, times: Ints | None) -> list[float]:
    """Return the compared numbers under weights, NaN where there is no ground truth."""
    summary = accumulate(categories, matches, times).summary
    values = [summary[name] for name in COMPARED]
    return [np.nan if value is None else value for value in values]


def _difference(name: str, stated: Floats, drawn: Floats) -> Difference:
    """Return one row.

    Args:
        name: of the number.
        stated: (2,) on all videos.
        drawn: (samples, 2) in each draw.
    """
    if np.isnan(stated).any():
        return Difference(name, *[None] * 7)
    first, second = stated.tolist()
    if not len(drawn):
        return Difference(name, first, second, first - second, *[None] * 4)
    gaps = drawn[:, 0] - drawn[:, 1]
    low, high = np.percentile(gaps, [_TAIL_PERCENT, 100.0 - _TAIL_PERCENT]).tolist()
    shares = float(np.mean(gaps > 0)), float(np.mean(gaps < 0))
    return Difference(name, first, second, first - second, low, high, *shares)


def _cell(value: float | None, form: str) -> str:
    """Return a number for the table."""
    return "-" if value is None else format(value, form)
