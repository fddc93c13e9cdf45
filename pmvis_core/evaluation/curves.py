"""From matches to curves and averages: the second half of an evaluation.

What decides the last digits: precision is ``tp / (fp + tp + eps)``; curves are read at the first
point that reaches a recall; sorting is stable, within a video and over the videos in ascending id;
averages run over the array in C order, thresholds slowest, with numpy's pairwise sum.

    accumulate(categories, matches).summary["AP50"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pmvis_core.evaluation import compiled
from pmvis_core.evaluation.matches import Ints, Matches, Pair, PairKey
from pmvis_core.evaluation.protocol import (
    MAX_DETECTIONS,
    Floats,
    Groups,
    iou_thresholds,
    recall_points,
)
from pmvis_core.types import Category

_PER_CATEGORY = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100")


@dataclass(frozen=True)
class CategoryResult:
    """Averages of one category, None where it has no ground truth."""

    category: Category
    values: dict[str, float | None]
    """AP, AP50, AP75, AR1, AR10, AR100."""


@dataclass(frozen=True)
class Evaluation:
    """All numbers of one evaluation; for the axes see `protocol`."""

    summary: dict[str, float | None]
    """AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl, of ovis also APso ... ARho, in the
    order of the official table; None where there is no ground truth."""
    per_category: tuple[CategoryResult, ...]
    """By category id."""
    precision: Floats
    """(T, R, K, A, M) or (T, R, K, A, O, M); -1 without ground truth."""
    recall: Floats
    """(T, K, A, M) or (T, K, A, O, M); -1 without ground truth."""
    scores: Floats
    """Shape of ``precision``: score at which each recall is reached."""
    matches: Matches
    """What the curves were made of."""

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The matches of each video and category, by category id, then video id."""
        return tuple(self.matches)

    @property
    def without_union(self) -> tuple[PairKey, ...]:
        """Where a prediction and a ground truth share not one comparable or nonempty mask."""
        return tuple(
            (pair.video_id, pair.category_id) for pair in self.matches if not pair.comparable
        )


class Curves(NamedTuple):
    """What `accumulate` averages; S as in `protocol`."""

    precision: Floats
    """(T, R, K, S, M); -1 without ground truth."""
    recall: Floats
    """(T, K, S, M); -1 without ground truth."""
    scores: Floats
    """(T, R, K, S, M); -1 without ground truth."""


def accumulate(
    categories: Sequence[Category], matches: Matches, weights: Ints | None = None
) -> Evaluation:
    """Turn the matches of all videos into curves and averages.

    Args:
        categories: the vocabulary.
        matches: of all videos.
        weights: (P,) how often the pairs of each video count; a video of weight 2 counts as two
            videos would, but for the order of equal scores. By default once.
    """
    ordered = sorted(categories, key=lambda category: category.id)
    arrays = compiled.curves(matches, [category.id for category in ordered], weights)
    curves = _curves(ordered, matches, weights) if arrays is None else Curves(*arrays)
    return summarise(ordered, matches, curves)


def summarise(categories: Sequence[Category], matches: Matches, curves: Curves) -> Evaluation:
    """Average curves.

    Args:
        categories: the vocabulary by id.
        matches: what the curves were made of.
        curves: of these categories.
    """
    groups = matches.groups
    selected = {name: _selected(curves, groups, row) for name, row in table_rows(groups)}
    columns = zip(*(_means(selected[name]) for name in _PER_CATEGORY), strict=True)
    return Evaluation(
        summary={name: _mean(values) for name, values in selected.items()},
        per_category=tuple(
            CategoryResult(category, dict(zip(_PER_CATEGORY, values, strict=True)))
            for category, values in zip(categories, columns, strict=True)
        ),
        precision=_unfold(curves.precision, groups),
        recall=_unfold(curves.recall, groups),
        scores=_unfold(curves.scores, groups),
        matches=matches,
    )


class TableRow(NamedTuple):
    """One line of the official table: which part of the curves it averages."""

    is_precision: bool
    threshold: float | None = None
    area: str = "all"
    occlusion: str = "all"
    limit: int = -1
    """Index into `MAX_DETECTIONS`."""


def table_rows(groups: Groups) -> list[tuple[str, TableRow]]:
    """Return the lines of the official table with our short names, in its order."""
    sizes = [(area.name[0], area.name) for area in groups.areas[1:]]
    hidden = [
        (short, occlusion.name)
        for short, occlusion in zip(("so", "mo", "ho"), groups.occlusions[1:], strict=False)
    ]
    rows = [("AP", TableRow(True)), ("AP50", TableRow(True, 0.5)), ("AP75", TableRow(True, 0.75))]
    rows += [(f"AP{short}", TableRow(True, area=name)) for short, name in sizes]
    rows += [(f"AP{short}", TableRow(True, occlusion=name)) for short, name in hidden]
    rows += [(f"AR{n}", TableRow(False, limit=i)) for i, n in enumerate(MAX_DETECTIONS)]
    rows += [(f"AR{short}", TableRow(False, area=name)) for short, name in sizes]
    rows += [(f"AR{short}", TableRow(False, occlusion=name)) for short, name in hidden]
    return rows


def _selected(curves: Curves, groups: Groups, row: TableRow) -> Floats:
    """Return what a line averages: (T, R, K) precisions or (T, K) recalls."""
    area = [r.name for r in groups.areas].index(row.area)
    occlusion = [r.name for r in groups.occlusions].index(row.occlusion)
    values = (curves.precision if row.is_precision else curves.recall)[
        ..., area * len(groups.occlusions) + occlusion, row.limit
    ]
    return values if row.threshold is None else values[iou_thresholds() == row.threshold]


def _mean(values: Floats) -> float | None:
    """Return the mean of the entries that have ground truth, None if there are none."""
    counted = values[values > -1]
    return float(np.mean(counted)) if counted.size else None


def _means(values: Floats) -> list[float | None]:
    """Return `_mean` of each category, the last axis; a category has ground truth or has none."""
    if not values.size:
        return [None] * values.shape[-1]
    rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]).T)
    pairs = zip(rows.mean(axis=1).tolist(), (rows[:, 0] > -1).tolist(), strict=True)
    return [mean if counted else None for mean, counted in pairs]


def _unfold(values: Floats, groups: Groups) -> Floats:
    """Split the axis of groups S into areas and occlusions."""
    return values.reshape(*values.shape[:-2], *groups.shape, values.shape[-1])


def _curves(categories: Sequence[Category], matches: Matches, weights: Ints | None) -> Curves:
    """Return the curves of all categories."""
    shape = (len(categories), matches.groups.number, len(MAX_DETECTIONS))
    thresholds, points = len(iou_thresholds()), len(recall_points())
    curves = Curves(
        -np.ones((thresholds, points, *shape)),
        -np.ones((thresholds, *shape)),
        -np.ones((thresholds, points, *shape)),
    )
    times = np.ones(len(matches), dtype=np.int64) if weights is None else weights
    for k, category in enumerate(categories):
        found = matches.of_category(category.id)
        for m, limit in enumerate(MAX_DETECTIONS):
            for s in range(shape[1]):
                at = (k, s, m)
                _category_curves(matches, found, times, s, limit, _place(curves, at))
    return curves


def _place(curves: Curves, at: tuple[int, int, int]) -> Curves:
    """Return the curves of one category, group and limit, as views."""
    return Curves(*(values[(..., *at)] for values in curves))


def _category_curves(
    matches: Matches, pairs: slice, times: Ints, group: int, limit: int, out: Curves
) -> None:
    """Write (T, R) precision, (T,) recall and (T, R) scores of one category; not without truth.

    Args:
        matches: of all videos.
        pairs: those of the category.
        times: (P,) how often each pair counts.
        group: index into S.
        limit: the number of predictions a video that count.
        out: where to write.
    """
    truths = slice(matches.truth_starts[pairs.start], matches.truth_starts[pairs.stop])
    each = np.diff(matches.truth_starts)[pairs]
    counted = int(np.sum(~matches.truth_ignored[truths, group] * np.repeat(times[pairs], each)))
    if counted == 0:
        return
    ours = slice(matches.starts[pairs.start], matches.starts[pairs.stop])
    sizes = np.diff(matches.starts)[pairs]
    rank = np.arange(ours.start, ours.stop) - np.repeat(matches.starts[pairs], sizes)
    kept = np.flatnonzero(rank < limit) + ours.start
    order = kept[np.argsort(-matches.scores[kept], kind="stable")]
    scores = matches.scores[order]
    weight = np.repeat(times[pairs], sizes)[order - ours.start]
    matched = matches.matches[order, group].T != 0
    counts = ~matches.ignored[order, group].T * weight
    hits = np.cumsum(matched * counts, axis=1).astype(np.float64)
    faults = np.cumsum(~matched * counts, axis=1).astype(np.float64)
    reached = hits / counted
    precise = hits / (faults + hits + np.spacing(1))
    envelope = np.maximum.accumulate(precise[:, ::-1], axis=1)[:, ::-1]
    out.precision[:] = out.scores[:] = out.recall[:] = 0.0
    for t, recalls in enumerate(reached):
        places = np.searchsorted(recalls, recall_points(), side="left")
        places = places[places < len(scores)]
        out.precision[t, : len(places)] = envelope[t, places]
        out.scores[t, : len(places)] = scores[places]
    if len(scores):
        out.recall[:] = reached[:, -1]
