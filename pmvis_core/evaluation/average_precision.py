"""AP and AR of video instance segmentation, digit for digit as the official evaluators count them.

``ytvis``: YTVOSeval of YouTube-VIS 2019 (Yang et al., Video Instance Segmentation, ICCV 2019);
``ovis``: the same with ground truth grouped by occlusion (Qi et al., OVIS, IJCV 2022). A track
matches by the IoU of its whole mask sequence. Size groups split at 128^2 and 256^2 pixels of mean
area; ten IoU thresholds, 101 recall points, at most 100 tracks a video and category.

What is odd in the input is counted as those evaluators count it, and told in one warning.

    truth = read_dataset(Path("valid.json"))
    evaluate(truth, read_predictions(Path("out.tracks.jsonl"), truth)).summary["AP"]

Steps: group by (video, category) -> track IoU -> match -> accumulate -> means.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pmvis_core import masks
from pmvis_core.doubts import Doubts
from pmvis_core.errors import DataError
from pmvis_core.evaluation import compiled, paired_tracks
from pmvis_core.evaluation.curves import Evaluation, accumulate
from pmvis_core.evaluation.matches import Matches, Pair, PairKey
from pmvis_core.evaluation.oddities import Oddity, note
from pmvis_core.evaluation.paired_tracks import Tracks
from pmvis_core.evaluation.protocol import (
    MAX_DETECTIONS,
    OCCLUSION_LEVELS,
    Flags,
    Floats,
    Groups,
    groups_of,
    iou_thresholds,
)
from pmvis_core.formats.ytvis import Dataset
from pmvis_core.formats.ytvis_annotation import Annotation
from pmvis_core.progress import Progress, silent
from pmvis_core.types import RLE


def evaluate(
    truth: Dataset,
    predictions: Sequence[Annotation],
    protocol: str = "ytvis",
    *,
    strict: bool = False,
    doubts: Doubts | None = None,
    exact: bool = True,
    threads: int = 0,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate predictions; natively where ``_eval.so`` is there, with the same bits.

    Args:
        truth: ground truth.
        predictions: under its ids, each with a score; see `formats.predictions`.
        protocol: ``ytvis`` or ``ovis``.
        strict: refuse what is odd instead of warning.
        doubts: oddities found while reading, to be told with those found here.
        exact: compute IoUs below 0.5, too, which match nothing; else they are 0.
        threads: how many work natively; 0 for one a processor.
        progress: tells how many videos and categories are done.

    Raises:
        DataError: the ground truth has no annotations, a prediction is of an unknown video, an
            annotation lacks its `occlusion` (ovis); or anything odd with ``strict``.
    """
    noted = Doubts() if doubts is None else doubts
    check_annotated(truth)
    matches = match(
        truth, predictions, protocol, noted, exact=exact, threads=threads, progress=progress
    )
    noted.settle(strict=strict)
    return accumulate(truth.categories, matches)


def match(
    truth: Dataset,
    predictions: Sequence[Annotation],
    protocol: str,
    doubts: Doubts,
    *,
    shard: tuple[int, int] = (1, 1),
    exact: bool = True,
    threads: int = 0,
    progress: Progress = silent,
) -> Matches:
    """Match the predictions of the shard's videos; see `evaluate` and `files.Work`.

    What is odd is noted for all videos, so that every shard knows what concerns the whole.

    Raises:
        DataError: a prediction is of an unknown video, or an annotation lacks its `occlusion`
            (ovis).
    """
    groups = groups_of(protocol)
    gts = _group_truth(truth, doubts)
    dts = _group_predictions(truth, predictions, doubts)
    videos = {video.id: video for video in truth.videos}
    mine = set(sorted(videos)[shard[0] - 1 :: shard[1]])
    known = {category.id for category in truth.categories}
    keys = sorted(gts.keys() | dts.keys(), key=lambda key: (key[1], key[0]))
    tracks = [
        Tracks(key, videos[key[0]], tuple(gts.get(key, ())), tuple(dts.get(key, ())))
        for key in keys
        if key[0] in mine and key[1] in known
    ]
    matches = _match_natively(tracks, groups, doubts, exact=exact, threads=threads)
    if matches is not None:
        return matches
    pairs = [_evaluate_pair(pair, groups, doubts, exact) for pair in progress(tracks, "evaluate")]
    return Matches.of_pairs(pairs, groups)


def check_annotated(truth: Dataset) -> None:
    """Check that a file is ground truth at all, before anything is read for it.

    Raises:
        DataError: it has no annotations.
    """
    if not truth.annotated:
        raise DataError(
            f"{truth.name} holds no `annotations`",
            "the public validation files have none: use a split with ground truth, or "
            "`pmvis convert --to results` and upload that to the challenge server",
        )


def _group_truth(truth: Dataset, doubts: Doubts) -> dict[PairKey, list[Annotation]]:
    """Return the ground truth by video and category, as the official index would hand it out.

    That index goes by id: of annotations that share one, the last stands in the place of each.
    """
    known = {category.id for category in truth.categories}
    by_id = {row.id: row for row in truth.annotations}
    by_video: dict[int, list[Annotation]] = defaultdict(list)
    listed = Counter(video.id for video in truth.videos)
    for row in truth.annotations:
        if row.video_id not in listed:
            note(doubts, Oddity.UNLISTED_VIDEO, row.id, row.video_id)
        elif row.category_id not in known:
            note(doubts, Oddity.UNLISTED_CATEGORY, row.id, row.video_id)
        else:
            by_video[row.video_id].append(row)
    _doubt_truth(truth, listed, doubts)
    found: dict[PairKey, list[Annotation]] = defaultdict(list)
    for video_id in sorted(by_video):
        for row in by_video[video_id]:
            last = by_id[row.id]
            found[last.video_id, last.category_id].append(last)
    return found


def _doubt_truth(truth: Dataset, listed: Counter[int], doubts: Doubts) -> None:
    """Note what is odd in the ground truth."""
    if not truth.annotations:
        note(doubts, Oddity.NO_ANNOTATION)
    for number, times in listed.items():
        if times > 1:
            note(doubts, Oddity.VIDEO_TWICE, number)
    for number, times in Counter(row.id for row in truth.annotations).items():
        if times > 1:
            note(doubts, Oddity.ANNOTATION_TWICE, number)
        if number == 0:
            note(doubts, Oddity.ID_ZERO)
    for row in truth.annotations:
        if row.areas is None:
            note(doubts, Oddity.NO_AREAS, row.id, row.video_id)


def _group_predictions(
    truth: Dataset, predictions: Sequence[Annotation], doubts: Doubts
) -> dict[PairKey, list[Annotation]]:
    """Return the predictions by video and category, by falling score, the best 100 of each."""
    videos = {video.id for video in truth.videos}
    known = {category.id for category in truth.categories}
    found: dict[PairKey, list[Annotation]] = defaultdict(list)
    for row in predictions:
        if row.video_id not in videos:
            raise DataError(f"prediction {row.id} is of video {row.video_id}, not in {truth.name}")
        if row.score is None or not math.isfinite(row.score):
            raise DataError(f"prediction {row.id} has score {row.score}, expected a finite number")
        if row.category_id not in known:
            note(doubts, Oddity.UNKNOWN_CATEGORY, row.category_id)
            continue
        if row.converted:
            note(doubts, Oddity.CONVERTED)
        found[row.video_id, row.category_id].append(row)
    if not predictions:
        note(doubts, Oddity.NO_PREDICTION)
    used = {row.category_id for row in truth.annotations}
    if used and found and not any(category in used for _, category in found):
        note(doubts, Oddity.NO_COMMON_CATEGORY)
    for rows in found.values():
        rows.sort(key=_falling)
        del rows[MAX_DETECTIONS[-1] :]
    return found


def _falling(row: Annotation) -> float:
    """Return the sort key for falling scores; the sort is stable, so ties keep their order."""
    return -(row.score or 0.0)


def _name(row: Annotation) -> str:
    """Return how a doubt calls an annotation."""
    return f"annotation {row.id} of video {row.video_id}"


def _match_natively(
    tracks: Sequence[Tracks], groups: Groups, doubts: Doubts, *, exact: bool, threads: int
) -> Matches | None:
    """Match all pairs by the compiled library; None if it is absent or refuses them."""
    columns = paired_tracks.columns(tracks, groups, _stated_area, _occlusion)
    found = columns and compiled.match_tracks(columns, groups, exact=exact, threads=threads)
    if not found:
        return None
    for kind, numbers in found.doubts:
        note(doubts, kind, *numbers)
    return found.matches


def _evaluate_pair(tracks: Tracks, groups: Groups, doubts: Doubts, exact: bool) -> Pair:
    """Match one video and category."""
    gts, dts = tracks.gts, tracks.dts
    _doubt_shapes(tracks, doubts, equal_lengths=groups.by_occlusion)
    ious, comparable = iou_matrix([d.rles for d in dts], [g.rles for g in gts])
    if not exact:
        ious = np.where(ious < iou_thresholds()[0], 0.0, ious)
    if not comparable:
        note(doubts, Oddity.NOT_COMPARABLE, *tracks.key)
    crowd = np.array([g.iscrowd for g in gts], dtype=bool)
    outside = groups.outside_areas(np.array([_mean_area(g.areas, g.mask_areas) for g in gts]))
    if groups.by_occlusion:
        outside |= groups.outside_occlusions(np.array([_occlusion(g) for g in gts]))
    truth_ignored = crowd | outside
    chosen = _match(ious, truth_ignored, crowd)
    hit = chosen >= 0
    ids = np.array([*(g.id for g in gts), 0], dtype=np.int64)
    matches = np.where(hit, ids[chosen], 0)
    columns = np.concatenate([truth_ignored, np.zeros((len(outside), 1), dtype=bool)], axis=1)
    matched_ignored = columns[np.arange(len(columns))[:, None, None], chosen]
    too_far = groups.outside_areas(np.array([_mean_area(None, d.mask_areas) for d in dts]))
    ignored = matched_ignored | ((matches == 0) & too_far[:, None, :])
    return Pair(
        *tracks.key,
        ious=ious,
        scores=np.array([d.score for d in dts], dtype=np.float64),
        rows=np.array([d.id for d in dts], dtype=np.int64),
        matches=np.moveaxis(matches, 2, 0),
        ignored=np.moveaxis(ignored, 2, 0),
        truth_ids=ids[:-1],
        truth_ignored=truth_ignored.T,
        comparable=comparable,
    )


def _doubt_shapes(tracks: Tracks, doubts: Doubts, *, equal_lengths: bool) -> None:
    """Note tracks whose length or mask sizes are not those of their video.

    Raises:
        DataError: ``equal_lengths``, as OVIS demands, and lengths differ.
    """
    video = tracks.video
    lengths = {len(row.rles) for row in (*tracks.gts, *tracks.dts)}
    if equal_lengths and len(lengths) > 1 and tracks.gts and tracks.dts:
        raise DataError(
            f"video {video.id} `{video.name}`: tracks have {min(lengths)} and {max(lengths)} "
            "frames, expected equal lengths under `--protocol ovis`"
        )
    for rows, length, size in (
        (tracks.gts, Oddity.TRUTH_LENGTH, Oddity.TRUTH_SIZE),
        (tracks.dts, Oddity.PREDICTION_LENGTH, Oddity.PREDICTION_SIZE),
    ):
        for row in rows:
            if len(row.rles) != video.length:
                note(doubts, length, video.id, len(row.rles), video.length)
            sizes = [(r["size"][0], r["size"][1]) for r in row.rles if r is not None]
            for height, width in dict.fromkeys(sizes):
                if (height, width) != (video.height, video.width):
                    note(doubts, size, video.id, height, width, video.height, video.width)


def iou_matrix(
    dts: Sequence[Sequence[RLE | None]], gts: Sequence[Sequence[RLE | None]]
) -> tuple[Floats, bool]:
    """Return (D, G) track IoUs, and False if a union was empty."""
    inter, union = masks.track_overlaps(dts, gts)
    ious = np.divide(inter, union, out=np.zeros(inter.shape), where=union > 0)
    return ious, bool((union > 0).all())


def _mean_area(annotated: Sequence[float | None] | None, of_masks: Sequence[int | None]) -> float:
    """Return the mean of the areas that are neither absent nor 0, in pixels; 0 if there is none."""
    areas = [area for area in (of_masks if annotated is None else annotated) if area]
    return float(np.array(areas).mean()) if areas else 0.0


def _stated_area(row: Annotation) -> float:
    """Return the mean of the stated areas, NaN if none are stated."""
    return math.nan if row.areas is None else _mean_area(row.areas, ())


def _occlusion(row: Annotation) -> float:
    """Return the mean of the more occluded half of the frames, in [0, 1].

    Raises:
        DataError: the annotation has no usable `occlusion`.
    """
    levels = dict(OCCLUSION_LEVELS)
    stated = row.extra.get("occlusion")
    frames = [level for level in stated if level is not None] if isinstance(stated, list) else []
    if not frames or not all(isinstance(f, str) and f in levels for f in frames):
        raise DataError(
            f"{_name(row)} has no `occlusion` with a level of any frame",
            "`--protocol ovis` needs OVIS annotations; the default protocol does not",
        )
    values = sorted((levels[level] for level in frames), reverse=True)
    half = values[: math.ceil(len(values) / 2)]
    return sum(half) / len(half)


def _match(ious: Floats, ignored: Flags, crowd: Flags) -> NDArray[np.int64]:
    """Match predictions to ground truth greedily, for all groups and thresholds at once.

    In order of falling score each prediction takes, of the ground truths that reach the threshold
    and are free, the one with the largest IoU, the later of equals; one that counts before any
    that is ignored. Crowds are never used up.

    Args:
        ious: (D, G), rows by falling score.
        ignored: (S, G) ground truths that do not count in a group.
        crowd: (G,).

    Returns:
        (S, T, D) column of the match, -1 for none.
    """
    floors = np.minimum(iou_thresholds(), 1 - 1e-10)
    number, columns = ious.shape
    chosen = np.full((len(ignored), len(floors), number), -1, dtype=np.int64)
    taken = np.zeros((len(ignored), len(floors), columns), dtype=bool)
    for d in np.flatnonzero((ious >= floors[0]).any(axis=1)):
        free = (ious[d] >= floors[:, None]) & (~taken | crowd)
        counted = free & ~ignored[:, None, :]
        pool = np.where(counted.any(axis=2, keepdims=True), counted, free)
        best = columns - 1 - np.where(pool, ious[d], -1.0)[..., ::-1].argmax(axis=2)
        hit = pool.any(axis=2)
        chosen[..., d] = np.where(hit, best, -1)
        group, threshold = np.nonzero(hit)
        taken[group, threshold, best[hit]] = True
    return chosen
