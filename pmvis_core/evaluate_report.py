"""From matches to curves, averages and tables: the second half of `evaluate`.

What decides the last digits: precision is ``tp / (fp + tp + eps)``; curves are read at the first
point that reaches a recall; sorting is stable, within a video and over the videos in ascending id;
averages run over the array in C order, thresholds slowest, with numpy's pairwise sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pmvis_core.types import Category

MAX_DETECTIONS = (1, 10, 100)

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
PairKey = tuple[int, int]
"""Video id and category id."""


class Range(NamedTuple):
    """A group of objects, by mean area in pixels or by occlusion; both ends belong to it."""

    name: str
    low: float
    high: float


AREAS = (
    Range("all", 0.0, 1e5**2),
    Range("small", 0.0, 128.0**2),
    Range("medium", 128.0**2, 256.0**2),
    Range("large", 256.0**2, 1e5**2),
)
OCCLUSIONS = (
    Range("all", 0.0, 1.0),
    Range("light", 0.0, 0.25),
    Range("medium", 0.25, 0.5),
    Range("heavy", 0.5, 1.0),
)


class Groups(NamedTuple):
    """The area and occlusion groups of a protocol; S pairs of them, area slowest."""

    areas: tuple[Range, ...]
    occlusions: tuple[Range, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(A,) where there is but one occlusion group, else (A, O)."""
        both = (len(self.areas), len(self.occlusions))
        return both if both[1] > 1 else both[:1]

    def outside_areas(self, values: Floats) -> Flags:
        """Return (S, N): whether mean areas (N,) lie outside each group."""
        return np.repeat(_outside(self.areas, values), len(self.occlusions), axis=0)

    def outside_occlusions(self, values: Floats) -> Flags:
        """Return (S, N): whether occlusions (N,) lie outside each group."""
        return np.tile(_outside(self.occlusions, values), (len(self.areas), 1))


_PER_CATEGORY = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100")


def iou_thresholds() -> Floats:
    """Return (T=10,) 0.50 to 0.95; computed as officially, so one of them is 0.8999999999999999."""
    return np.linspace(0.5, 0.95, 10)


def recall_points() -> Floats:
    """Return (R=101,) 0 to 1; some are not the double nearest to a hundredth."""
    return np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Pair:
    """What happened in one video under one category. S: area groups x occlusion groups."""

    video_id: int
    category_id: int
    ious: Floats
    """(D, G) track IoUs; rows by falling score, columns in the ground truth's order."""
    scores: Floats
    """(D,) falling."""
    matches: Floats
    """(S, T, D) id of the matched ground truth, 0 for none."""
    ignored: Flags
    """(S, T, D) predictions that count neither as hit nor as fault."""
    truth_ignored: Flags
    """(S, G) ground truths that are crowds or outside the group."""


@dataclass(frozen=True)
class CategoryResult:
    """Averages of one category, None where it has no ground truth."""

    category: Category
    values: dict[str, float | None]
    """AP, AP50, AP75, AR1, AR10, AR100."""


@dataclass(frozen=True)
class Evaluation:
    """All numbers of one evaluation. A: area groups, O: occlusion groups (ovis only), M: limits."""

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
    pairs: tuple[Pair, ...]
    """By category id, then video id; pairs without any track are left out."""
    without_union: tuple[PairKey, ...]
    """Where a prediction and a ground truth share not one comparable or nonempty mask."""
    groups: Groups
    """The area and occlusion groups of the protocol."""


def accumulate(
    categories: Sequence[Category],
    pairs: Sequence[Pair],
    groups: Groups,
    without_union: tuple[PairKey, ...] = (),
) -> Evaluation:
    """Turn the matches of all videos into curves and averages.

    Args:
        categories: the vocabulary.
        pairs: by category id, then video id.
        groups: those that ``pairs`` were matched in.
        without_union: passed on.
    """
    ordered = sorted(categories, key=lambda category: category.id)
    rows: dict[int, list[Pair]] = {category.id: [] for category in ordered}
    for pair in pairs:
        rows[pair.category_id].append(pair)
    shape = (len(ordered), len(groups.areas) * len(groups.occlusions), len(MAX_DETECTIONS))
    thresholds, points = len(iou_thresholds()), len(recall_points())
    precision = -np.ones((thresholds, points, *shape))
    recall = -np.ones((thresholds, *shape))
    scores = -np.ones((thresholds, points, *shape))
    for k, category in enumerate(ordered):
        for s in range(shape[1]):
            for m, limit in enumerate(MAX_DETECTIONS):
                curves = _curves(rows[category.id], s, limit)
                if curves is not None:
                    precision[:, :, k, s, m], recall[:, k, s, m], scores[:, :, k, s, m] = curves
    selected = {n: _selected(precision, recall, groups, row) for n, row in _rows(groups)}
    return Evaluation(
        summary={name: _mean(values) for name, values in selected.items()},
        per_category=tuple(
            CategoryResult(
                category,
                {name: _mean(selected[name][..., k]) for name in _PER_CATEGORY},
            )
            for k, category in enumerate(ordered)
        ),
        precision=_unfold(precision, groups),
        recall=_unfold(recall, groups),
        scores=_unfold(scores, groups),
        pairs=tuple(pairs),
        without_union=without_union,
        groups=groups,
    )


def metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Return the numbers as one JSON object: the summary and ``per_category``."""
    names = ("AP", "AP50", "AP75", "AR1", "AR10")
    rows = [
        {
            "id": row.category.id,
            "name": row.category.name,
            **{name: row.values[name] for name in names},
        }
        for row in evaluation.per_category
    ]
    return {**evaluation.summary, "per_category": rows}


def official_table(evaluation: Evaluation) -> str:
    """Return the table as the official evaluators print it, -1.000 for no ground truth."""
    thresholds = iou_thresholds()
    several = len(evaluation.groups.occlusions) > 1
    lines = []
    for name, row in _rows(evaluation.groups):
        title = "Average Precision  (AP)" if row.is_precision else "Average Recall     (AR)"
        span = f"{thresholds[0]:0.2f}:{thresholds[-1]:0.2f}"
        overlap = span if row.threshold is None else f"{row.threshold:0.2f}"
        occlusion = f" | occ={row.occlusion:>6s}" if several else ""
        value = evaluation.summary[name]
        lines.append(
            f" {title} @[ IoU={overlap:<9} | area={row.area:>6s}{occlusion} | "
            f"maxDets={MAX_DETECTIONS[row.limit]:>3d} ] = {-1 if value is None else value:0.3f}"
        )
    return "\n".join(lines)


def category_table(evaluation: Evaluation) -> str:
    """Return one line a category, ``-`` for no ground truth."""
    names = ("AP", "AP50", "AP75", "AR1", "AR10")
    width = max([len("category"), *(len(row.category.name) for row in evaluation.per_category)])
    lines = [f" {'id':>5} {'category':<{width}}" + "".join(f" {name:>6}" for name in names)]
    for row in evaluation.per_category:
        values = [row.values[name] for name in names]
        cells = "".join(f" {'-' if v is None else f'{v:0.3f}':>6}" for v in values)
        lines.append(f" {row.category.id:>5} {row.category.name:<{width}}{cells}")
    return "\n".join(lines)


def _outside(ranges: Sequence[Range], values: Floats) -> Flags:
    """Return (len(ranges), N): whether values (N,) lie outside each range, ends being inside."""
    return np.array([(values < r.low) | (values > r.high) for r in ranges], dtype=bool)


class _Row(NamedTuple):
    """One line of the official table: which part of the curves it averages."""

    is_precision: bool
    threshold: float | None = None
    area: str = "all"
    occlusion: str = "all"
    limit: int = -1
    """Index into `MAX_DETECTIONS`."""


def _rows(groups: Groups) -> list[tuple[str, _Row]]:
    """Return the lines of the official table with our short names, in its order."""
    sizes = [(area.name[0], area.name) for area in groups.areas[1:]]
    hidden = [
        (short, occlusion.name)
        for short, occlusion in zip(("so", "mo", "ho"), groups.occlusions[1:], strict=False)
    ]
    rows = [("AP", _Row(True)), ("AP50", _Row(True, 0.5)), ("AP75", _Row(True, 0.75))]
    rows += [(f"AP{short}", _Row(True, area=name)) for short, name in sizes]
    rows += [(f"AP{short}", _Row(True, occlusion=name)) for short, name in hidden]
    rows += [(f"AR{n}", _Row(False, limit=i)) for i, n in enumerate(MAX_DETECTIONS)]
    rows += [(f"AR{short}", _Row(False, area=name)) for short, name in sizes]
    rows += [(f"AR{short}", _Row(False, occlusion=name)) for short, name in hidden]
    return rows


def _selected(precision: Floats, recall: Floats, groups: Groups, row: _Row) -> Floats:
    """Return what a line averages: (T, R, K) precisions or (T, K) recalls."""
    area = [r.name for r in groups.areas].index(row.area)
    occlusion = [r.name for r in groups.occlusions].index(row.occlusion)
    values = (precision if row.is_precision else recall)[
        ..., area * len(groups.occlusions) + occlusion, row.limit
    ]
    return values if row.threshold is None else values[iou_thresholds() == row.threshold]


def _mean(values: Floats) -> float | None:
    """Return the mean of the entries that have ground truth, None if there are none."""
    counted = values[values > -1]
    return float(np.mean(counted)) if counted.size else None


def _unfold(values: Floats, groups: Groups) -> Floats:
    """Split the axis of groups S into areas and occlusions."""
    return values.reshape(*values.shape[:-2], *groups.shape, values.shape[-1])


def _curves(
    pairs: Sequence[Pair], group: int, limit: int
) -> tuple[Floats, NDArray[np.float64], Floats] | None:
    """Return (T, R) precision, (T,) recall and (T, R) scores of one category, None without truth.

    Args:
        pairs: the category's, by video id.
        group: index into S.
        limit: the number of predictions a video that count.
    """
    counted = sum(int(np.count_nonzero(~pair.truth_ignored[group])) for pair in pairs)
    if counted == 0:
        return None
    scores = np.concatenate([pair.scores[:limit] for pair in pairs])
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    matched = np.concatenate([pair.matches[group][:, :limit] for pair in pairs], axis=1) != 0
    ignored = np.concatenate([pair.ignored[group][:, :limit] for pair in pairs], axis=1)
    matched, ignored = matched[:, order], ignored[:, order]
    hits = np.cumsum(matched & ~ignored, axis=1).astype(np.float64)
    faults = np.cumsum(~matched & ~ignored, axis=1).astype(np.float64)
    reached = hits / counted
    precise = hits / (faults + hits + np.spacing(1))
    envelope = np.maximum.accumulate(precise[:, ::-1], axis=1)[:, ::-1]
    points = recall_points()
    curve = np.zeros((len(reached), len(points)))
    at_score = np.zeros_like(curve)
    for t, recalls in enumerate(reached):
        places = np.searchsorted(recalls, points, side="left")
        places = places[places < len(scores)]
        curve[t, : len(places)] = envelope[t, places]
        at_score[t, : len(places)] = scores[places]
    last = reached[:, -1] if len(scores) else np.zeros(len(reached))
    return curve, last, at_score
