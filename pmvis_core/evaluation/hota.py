"""HOTA: how well objects are found, and how well each keeps its identity, in one number.

Luiten et al., HOTA: A Higher Order Metric for Evaluating Multi-Object Tracking (IJCV 2021). At a
threshold alpha a frame's truths and predictions are matched one to one; a match c of at least that
IoU is a TP. A(c) is the share of frames, of all that the two tracks of c have, in which they match:

    DetA = TP / (TP + FN + FP)      AssA = sum of A(c) over the TPs / TP      HOTA = sqrt(DetA AssA)

and all are averaged over 19 alphas. Every number is a function of sums over matches, so videos,
categories and shards are added up, never averaged (`HotaSums`). As in TrackEval, whose numbers
these are, the matching maximises IoU times the tracks' alignment, once for all alphas.

    found = hota(truth, predictions, score_threshold=0.3); found.combined.summary["HOTA"]

A VIS submission holds many predictions an object, each counted as a fault: set a threshold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from pmvis_core import masks
from pmvis_core.errors import DataError, UsageError
from pmvis_core.evaluation.protocol import Flags, Floats
from pmvis_core.formats.ytvis import Dataset
from pmvis_core.formats.ytvis_annotation import Annotation
from pmvis_core.types import RLE, Category, VideoInfo

Ints = NDArray[np.int64]

RULES = ("ytvis", "davis", "mots")
"""Whose way of reading a data set is followed; see `hota`."""
CURVES = ("HOTA", "DetA", "AssA", "DetRe", "DetPr", "AssRe", "AssPr", "LocA", "OWTA")
"""What is a number at each alpha, in TrackEval's order of importance."""
OBJECTS = Category(1, "object")
"""The one category of a data set that is evaluated without categories."""

_PRODUCT = "HOTALocA"
_EPS = float(np.finfo(np.float64).eps)


def alphas() -> Floats:
    """Return (A=19,) thresholds 0.05 to 0.95, computed as TrackEval does."""
    return np.arange(0.05, 0.99, 0.05)


@dataclass(frozen=True)
class HotaScores:
    """The numbers of a video, a category or everything."""

    curves: Mapping[str, Floats]
    """(A,) values in [0, 1] at each alpha, for each name of `CURVES` and their HOTA x LocA."""
    counts: Mapping[str, Floats]
    """(A,) ``tp``, ``fn`` and ``fp``: masks, over all frames."""

    @property
    def summary(self) -> dict[str, float]:
        """Means over the alphas, then HOTA, LocA and their product at the lowest alpha."""
        means = {name: float(np.mean(self.curves[name])) for name in CURVES}
        first = {f"{name}(0)": float(self.curves[name][0]) for name in ("HOTA", "LocA", _PRODUCT)}
        return {**means, **first}


@dataclass(frozen=True)
class HotaSums:
    """What adds up: over frames, over videos, over categories."""

    rows: Floats
    """(7, A) at each alpha: TP, FN, FP, then over the TPs the sums of IoU, of A(c), and of A(c)
    with the frames of the truth alone and of the prediction alone as divisor."""

    def __add__(self, other: HotaSums) -> HotaSums:
        """Add the sums of other matches."""
        return HotaSums(self.rows + other.rows)

    @property
    def is_empty(self) -> bool:
        """Whether there was neither truth nor prediction."""
        return not self.rows[:3].any()

    def scores(self) -> HotaScores:
        """Return the numbers; LocA is 1 where nothing matched, all others are 0 then."""
        tp, fn, fp, overlap, association, recall, precision = self.rows
        hits = np.maximum(1, tp)
        det_a = tp / np.maximum(1, tp + fn + fp)
        det_re = tp / np.maximum(1, tp + fn)
        ass_a = association / hits
        curves = {
            "HOTA": np.sqrt(det_a * ass_a),
            "DetA": det_a,
            "AssA": ass_a,
            "DetRe": det_re,
            "DetPr": tp / np.maximum(1, tp + fp),
            "AssRe": recall / hits,
            "AssPr": precision / hits,
            "LocA": np.where(tp > 0, overlap / hits, 1.0),
            "OWTA": np.sqrt(det_re * ass_a),
        }
        curves[_PRODUCT] = curves["HOTA"] * curves["LocA"]
        return HotaScores(curves, {"tp": tp, "fn": fn, "fp": fp})


@dataclass(frozen=True)
class Hota:
    """An evaluation: the sums of every video and category, and what they come to."""

    categories: tuple[Category, ...]
    """The ground truth's, also those without any track."""
    videos: tuple[VideoInfo, ...]
    """The ground truth's, in its order."""
    sums: Mapping[tuple[int, int], HotaSums]
    """By video id and category id; absent where there is neither truth nor prediction."""

    @property
    def combined(self) -> HotaScores:
        """All matches of all categories alike (TrackEval's `cls_comb_det_av`)."""
        return _total(self.sums.values()).scores()

    def class_averaged(self, *, ignore_empty: bool = False) -> HotaScores:
        """Return the mean over the categories (TrackEval's `cls_comb_cls_av`).

        Args:
            ignore_empty: leave out categories without truth and prediction. TrackEval counts them
                by default: with HOTA 0, and LocA 1.
        """
        totals = [self._of(category.id) for category in self.categories]
        scores = [t.scores() for t in totals if not (ignore_empty and t.is_empty)]
        scores = scores or [_total(()).scores()]
        curves = {n: np.mean([s.curves[n] for s in scores], axis=0) for n in scores[0].curves}
        counts = {n: np.sum([s.counts[n] for s in scores], axis=0) for n in scores[0].counts}
        return HotaScores(curves, counts)

    def of_category(self, category_id: int) -> HotaScores:
        """Return the numbers of one category."""
        return self._of(category_id).scores()

    def of_video(self, video_id: int) -> HotaScores:
        """Return the numbers of one video, all categories alike."""
        return self.of_videos({video_id}).combined

    def of_videos(self, videos: Collection[int]) -> Hota:
        """Return the evaluation of some videos, without any new matching."""
        kept = {key: one for key, one in self.sums.items() if key[0] in videos}
        return replace(self, videos=tuple(v for v in self.videos if v.id in videos), sums=kept)

    @classmethod
    def joined(cls, parts: Sequence[Hota]) -> Hota:
        """Join evaluations of disjoint sets of videos, one or more, of the same categories."""
        sums = {key: one for part in parts for key, one in part.sums.items()}
        return cls(parts[0].categories, tuple(v for part in parts for v in part.videos), sums)

    def _of(self, category_id: int) -> HotaSums:
        """Return the sums of one category."""
        return _total(one for key, one in self.sums.items() if key[1] == category_id)


def hota(
    truth: Dataset,
    predictions: Sequence[Annotation],
    *,
    rules: str = "ytvis",
    score_threshold: float | None = None,
) -> Hota:
    """Match predictions with the ground truth.

    Args:
        truth: the ground truth.
        predictions: under its video and category ids; those of unknown categories do not count.
        rules: TrackEval's for the data set. ``ytvis``: each category on its own, and crowds are
            objects like others. ``davis``: all categories are one; crowds (void pixels) are left
            out, without being cut from predictions. ``mots``: each category on its own; crowds are
            regions, and a prediction that matches no truth by half does not count where more than
            half of it lies inside.
        score_threshold: keep predictions of at least this score only; without a score it is 1.

    Raises:
        UsageError: there are no such rules.
        DataError: ``truth`` has no annotations or categories, a prediction is of another video, or
            masks of one frame differ in size.
    """
    if rules not in RULES:
        raise UsageError(f"rules are `{rules}`, expected `ytvis`, `davis` or `mots`")
    if not truth.annotated or not truth.categories:
        raise DataError(
            f"{truth.name} holds no `annotations` or no `categories`: nothing to evaluate against",
            "give a file with ground truth",
        )
    categories = (OBJECTS,) if rules == "davis" else truth.categories
    videos = {video.id: video for video in truth.videos}
    least = -np.inf if score_threshold is None else score_threshold
    kept = [row for row in predictions if (1.0 if row.score is None else row.score) >= least]
    sums: dict[tuple[int, int], HotaSums] = {}
    for key, group in sorted(_grouped(truth.annotations, kept, rules).items()):
        if key[0] not in videos:
            raise DataError(
                f"a track is of video {key[0]}, which {truth.name} does not list",
                "evaluate against the file whose videos were labelled",
            )
        if key[1] not in {category.id for category in categories}:
            continue
        one = _matched(group, videos[key[0]], rules)
        if not one.is_empty:
            sums[key] = one
    return Hota(categories, tuple(videos.values()), sums)


def hota_metrics(found: Hota) -> dict[str, Any]:
    """Return the numbers as one JSON object: combined, class-averaged, curves, per category."""
    combined, averaged = found.combined, found.class_averaged()
    return {
        **combined.summary,
        "alphas": alphas().tolist(),
        "curves": {name: curve.tolist() for name, curve in combined.curves.items()},
        "counts": {name: count.astype(int).tolist() for name, count in combined.counts.items()},
        "class_averaged": averaged.summary,
        "per_category": [
            {"id": c.id, "name": c.name, **found.of_category(c.id).summary}
            for c in found.categories
        ],
    }


def hota_table(found: Hota, *, per_category: bool = False) -> str:
    """Return one line for all matches, one for the mean over categories, and one a category."""
    rows = [("all matches", found.combined), ("mean of categories", found.class_averaged())]
    if per_category:
        rows += [(c.name, found.of_category(c.id)) for c in found.categories]
    width = max(len(name) for name, _ in rows)
    lines = [f" {'HOTA':<{width}}" + "".join(f" {name:>7}" for name in (*CURVES, "HOTA(0)"))]
    for name, scores in rows:
        values = [scores.summary[column] for column in (*CURVES, "HOTA(0)")]
        lines.append(f" {name:<{width}}" + "".join(f" {value:7.3f}" for value in values))
    return "\n".join(lines)


class _Group(NamedTuple):
    """What meets in one video under one category."""

    truths: list[Annotation]
    found: list[Annotation]
    crowds: list[Annotation]


class _Frame(NamedTuple):
    """One frame of a group."""

    truths: Ints
    """(G,) which truths are there."""
    found: Ints
    """(D,) which predictions are there, and count."""
    ious: Floats
    """(G, D)"""


class _Matches(NamedTuple):
    """The M one-to-one matches of all frames."""

    truths: Ints
    found: Ints
    ious: Floats


def _grouped(
    annotations: Iterable[Annotation], predictions: Iterable[Annotation], rules: str
) -> dict[tuple[int, int], _Group]:
    """Return the tracks by video and category; without categories for ``davis``."""
    groups: dict[tuple[int, int], _Group] = {}

    def of(row: Annotation) -> _Group:
        category_id = OBJECTS.id if rules == "davis" else row.category_id
        return groups.setdefault((row.video_id, category_id), _Group([], [], []))

    for row in annotations:
        group = of(row)
        (group.crowds if row.iscrowd and rules != "ytvis" else group.truths).append(row)
    for row in predictions:
        of(row).found.append(row)
    return groups


def _matched(group: _Group, video: VideoInfo, rules: str) -> HotaSums:
    """Match a group's frames and add up."""
    frames = [_frame(group, t, video, rules == "mots") for t in range(video.length)]
    lives = (
        np.bincount(_joined([f.truths for f in frames]), minlength=len(group.truths)),
        np.bincount(_joined([f.found for f in frames]), minlength=len(group.found)),
    )
    lengths = np.add.outer(*lives)
    return _sums(_assigned(frames, lengths), lives, lengths)


def _frame(group: _Group, t: int, video: VideoInfo, regions: bool) -> _Frame:
    """Return who is in a frame and how they overlap."""
    truths, truth_rles = _present(group.truths, t)
    found, found_rles = _present(group.found, t)
    try:
        ious = masks.iou(truth_rles, found_rles)
        if regions and (crowds := _present(group.crowds, t)[1]) and found_rles:
            counts = ~_excused(ious, found_rles, crowds)
            found, ious = found[counts], ious[:, counts]
    except DataError as error:
        raise DataError(
            f"video {video.id} `{video.name}`, frame {t}: {error.message}", error.hint
        ) from error
    return _Frame(truths, found, ious)


def _present(rows: Sequence[Annotation], t: int) -> tuple[Ints, list[RLE]]:
    """Return which tracks have a mask in a frame, be it an empty one, and the masks."""
    there = [(n, rle) for n, row in enumerate(rows) if t < len(row.rles) and (rle := row.rles[t])]
    return np.array([n for n, _ in there], dtype=np.int64), [rle for _, rle in there]


def _excused(ious: Floats, found: list[RLE], crowds: list[RLE]) -> Flags:
    """Return (D,) predictions that match no truth by half and lie in crowds by more than half."""
    good = np.where(ious >= 0.5 - _EPS, ious, -10000.0)
    rows, columns = linear_sum_assignment(-good)
    matched = columns[good[rows, columns] > _EPS]
    inside = masks.iou(found, [masks.merge(crowds)], [True])[:, 0] > 0.5 + _EPS
    inside[matched] = False
    return inside


def _assigned(frames: Sequence[_Frame], lengths: Ints) -> _Matches:
    """Match truths and predictions of each frame one to one.

    The alignment of two tracks is a soft Jaccard index: each frame adds their IoU, shared with all
    that either overlaps there, against the frames that they have. Even matches of IoU 0 are kept.

    Args:
        frames: the frames.
        lengths: (G, D) numbers of frames of both tracks together.
    """
    meeting = [frame for frame in frames if frame.ious.size]
    shared = np.zeros(lengths.shape)
    for frame in meeting:
        rivals = frame.ious.sum(0)[None, :] + frame.ious.sum(1)[:, None] - frame.ious
        parts = np.divide(frame.ious, rivals, out=np.zeros_like(frame.ious), where=rivals > _EPS)
        shared[np.ix_(frame.truths, frame.found)] += parts
    # At least 1 wherever both tracks have a frame; tracks without any never ask for it.
    alignment = shared / np.maximum(lengths - shared, 1)
    matches = []
    for frame in meeting:
        rows, columns = linear_sum_assignment(
            alignment[np.ix_(frame.truths, frame.found)] * frame.ious, maximize=True
        )
        pairs = (frame.truths[rows], frame.found[columns], frame.ious[rows, columns])
        matches.append(_Matches(*pairs))
    return _Matches(
        _joined([m.truths for m in matches]),
        _joined([m.found for m in matches]),
        np.concatenate([np.zeros(0), *(m.ious for m in matches)]),
    )


def _sums(matches: _Matches, lives: tuple[Ints, Ints], lengths: Ints) -> HotaSums:
    """Add up the matches that reach each alpha.

    Args:
        matches: the matches of all frames.
        lives: (G,) and (D,) numbers of frames of each track.
        lengths: (G, D) their sums.
    """
    hits = matches.ious >= alphas()[:, None] - _EPS
    places = matches.truths * len(lives[1]) + matches.found
    together = np.array([np.bincount(places[hit], minlength=lengths.size) for hit in hits])
    together = together.reshape(len(hits), *lengths.shape).astype(np.float64)
    tp = hits.sum(1).astype(np.float64)

    def over_hits(divisor: NDArray[Any]) -> Floats:
        return np.asarray((together * (together / np.maximum(1, divisor))).sum((1, 2)))

    return HotaSums(
        np.stack(
            [
                tp,
                lives[0].sum() - tp,
                lives[1].sum() - tp,
                np.where(hits, matches.ious, 0.0).sum(1),
                over_hits(lengths - together),
                over_hits(lives[0][:, None]),
                over_hits(lives[1][None, :]),
            ]
        )
    )


def _joined(parts: Sequence[Ints]) -> Ints:
    """Concatenate indices, of which there may be none."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def _total(sums: Iterable[HotaSums]) -> HotaSums:
    """Add up any number of sums."""
    return sum(sums, HotaSums(np.zeros((7, len(alphas())))))
