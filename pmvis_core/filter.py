"""Throwing out doubtful tracks: PScore and TopK (PM-VIS+, section III-D), video by video.

PScore keeps the tracks whose mean score is at least tau; TopK keeps the K best of those. The paper
uses tau = 0.2 and K = 4; K = 0 keeps all (Table III). Scores are those of `infer`, never of the
propagation. Quality, which the paper has not, is what `refine` measured: the agreement of the
image model's masks with the propagated ones (`mending.Mended.quality`). Rows of one instance under
several categories count one by one, as in the paper, unless ``overlap`` removes what lies on a
better track. No pixel is read without ``overlap``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pmvis_core import masks
from pmvis_core.errors import DataError, UsageError
from pmvis_core.types import Box, Track, VideoTracks


@dataclass(frozen=True)
class FilterRule:
    """What a track must be to stay."""

    topk: int = 0
    """Tracks kept in a video, the best first; 0 keeps all."""
    pscore: float = 0.0
    """Least mean score, in [0, 1]; a track that has it exactly stays."""
    overlap: float | None = None
    """Greatest track IoU with a better kept track, in [0, 1]; None asks for no overlap removal."""
    keep_ignored: bool = False
    """Put what is dropped into `VideoTracks.ignored`, one track an instance."""
    quality: float = 0.0
    """Least agreement that `refine` measured, in [0, 1]; 0 asks for none and reads none."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UsageError: one is out of its range.
        """
        if self.topk < 0:
            raise UsageError(f"K is {self.topk}, expected 0 (keep all) or more")
        for what, share in (
            ("pscore", self.pscore),
            ("overlap", self.overlap),
            ("quality", self.quality),
        ):
            if share is not None and not 0.0 <= share <= 1.0:
                raise UsageError(f"{what} is {share}, expected a number from 0 to 1")

    def as_json(self) -> dict[str, Any]:
        """Return the rule for a file's lineage; what is off is left out."""
        facts: dict[str, Any] = {"topk": self.topk, "pscore": self.pscore}
        if self.overlap is not None:
            facts["overlap"] = self.overlap
        if self.keep_ignored:
            facts["keep_ignored"] = True
        if self.quality:
            facts["quality"] = self.quality
        return facts


@dataclass(frozen=True)
class Dropped:
    """A track that did not stay, and why."""

    track: Track
    """The track."""
    rule: str
    """``pscore``, ``quality``, ``topk`` or ``overlap``."""
    reason: str
    """The same for a reader, with the numbers."""


@dataclass(frozen=True)
class FilterOutcome:
    """One video after filtering."""

    kept: VideoTracks
    """The video with the tracks that stay, in their old order."""
    dropped: tuple[Dropped, ...]
    """The others, best first."""


@dataclass(frozen=True)
class SweepCell:
    """What one choice of K, tau and quality would keep of a file."""

    topk: int
    pscore: float
    quality: float
    tracks: int
    """Tracks kept."""
    videos: int
    """Videos with at least one of them."""
    categories: int
    """Categories with at least one of them."""


def filter_tracks(video: VideoTracks, rule: FilterRule) -> FilterOutcome:
    """Keep the tracks of a video that a rule lets stay.

    Tracks are taken best first (ties: smaller id first). One is dropped if its score is below
    ``pscore`` or its quality below ``quality``; if it overlaps a better kept track by more than
    ``overlap``; if K are kept already. So a duplicate takes no place among the K.

    Raises:
        DataError: ``quality`` is asked for, and a track has none.
    """
    if rule.quality:
        _check_measured(video)
    kept, dropped = _decide(video.tracks, rule)
    ids = {track.id for track in kept}
    rest = video.with_tracks(tuple(track for track in video.tracks if track.id in ids))
    if rule.keep_ignored:
        rest = replace(rest, ignored=_set_aside(rest, dropped))
    return FilterOutcome(rest, dropped)


def sweep(
    videos: Iterable[VideoTracks],
    topks: Sequence[int],
    pscores: Sequence[float],
    overlap: float | None = None,
    qualities: Sequence[float] = (0.0,),
) -> list[SweepCell]:
    """Count what every choice of K, tau and quality would keep, in one pass over the videos.

    Returns:
        A cell for each, K by K, tau by tau within it and quality by quality within that.

    Raises:
        DataError: a quality is asked for, and a track has none.
    """
    cells = [(topk, tau, floor) for topk in topks for tau in pscores for floor in qualities]
    tracks, seen = [0] * len(cells), [0] * len(cells)
    categories: list[set[int]] = [set() for _ in cells]
    rules = {
        (tau, floor): FilterRule(0, tau, overlap, quality=floor)
        for tau in pscores
        for floor in qualities
    }
    limits = [FilterRule(topk).topk or None for topk, _, _ in cells]
    for video in videos:
        if any(qualities):
            _check_measured(video)
        # what K keeps is the beginning of what K = 0 keeps, also with overlap removal
        best = {pair: _decide(video.tracks, rule)[0] for pair, rule in rules.items()}
        for i, (_, tau, floor) in enumerate(cells):
            kept = best[tau, floor][: limits[i]]
            tracks[i] += len(kept)
            seen[i] += bool(kept)
            categories[i].update(track.category_id for track in kept)
    return [
        SweepCell(*cell, tracks[i], seen[i], len(categories[i])) for i, cell in enumerate(cells)
    ]


def ranked(tracks: Iterable[Track]) -> list[Track]:
    """Return tracks best first, ties by id."""
    return sorted(tracks, key=lambda track: (-track.score, track.id))


def _decide(
    tracks: Sequence[Track], rule: FilterRule
) -> tuple[tuple[Track, ...], tuple[Dropped, ...]]:
    """Return what stays, best first, and what goes with its reason."""
    kept: list[Track] = []
    shapes: list[_Shape] = []
    dropped: list[Dropped] = []
    for track in ranked(tracks):
        if track.score < rule.pscore:
            reason = f"score {track.score:.6g} is below {rule.pscore:.6g}"
            dropped.append(Dropped(track, "pscore", reason))
            continue
        if track.quality is not None and track.quality < rule.quality:
            reason = f"quality {track.quality:.6g} is below {rule.quality:.6g}"
            dropped.append(Dropped(track, "quality", reason))
            continue
        shape = None
        if rule.overlap is not None:
            shape = _Shape.of(track)
            found = _overlapped(shape, shapes, rule.overlap)
            if found is not None:
                dropped.append(Dropped(track, "overlap", found))
                continue
        if rule.topk and len(kept) >= rule.topk:
            reason = f"{rule.topk} better tracks are kept already"
            dropped.append(Dropped(track, "topk", reason))
            continue
        kept.append(track)
        if shape is not None:
            shapes.append(shape)
    return tuple(kept), tuple(dropped)


def _check_measured(video: VideoTracks) -> None:
    """Refuse tracks without a quality.

    Raises:
        DataError: naming the first.
    """
    for track in video.tracks:
        if track.quality is None:
            info = video.video
            raise DataError(
                f"video {info.id} `{info.name}`: track {track.id} has no quality to filter by",
                "`pmvis refine` measures it; run it first, or leave out `--quality`",
            )


def _set_aside(rest: VideoTracks, dropped: Sequence[Dropped]) -> tuple[Track, ...]:
    """Return the ignored tracks of a video: the old ones, then the best row of each lost instance.

    An instance that stays under another category is no lost one.
    """
    known = {_instance(track) for track in (*rest.tracks, *rest.ignored)}
    aside = list(rest.ignored)
    for entry in sorted(dropped, key=lambda entry: (-entry.track.score, entry.track.id)):
        name = _instance(entry.track)
        if name not in known:
            known.add(name)
            lineage = {**entry.track.lineage, "filter": entry.rule}
            aside.append(replace(entry.track, lineage=lineage))
    return tuple(aside)


def _instance(track: Track) -> tuple[str, int]:
    """Return what rows of one instance share."""
    return ("track", track.id) if track.instance is None else ("instance", track.instance)


@dataclass(frozen=True)
class _Shape:
    """What is known of a track's masks before two of them are compared pixel by pixel."""

    track: Track
    area: int
    boxes: tuple[Box | None, ...]

    @classmethod
    def of(cls, track: Track) -> _Shape:
        """Measure a track."""
        areas = masks.track_areas(track.rles)
        return cls(track, sum(area or 0 for area in areas), masks.track_boxes(track.rles))

    def most_shared(self, other: _Shape) -> float:
        """Return an upper bound of the two tracks' intersection in pixels."""
        shared = 0.0
        for a, b in zip(self.boxes, other.boxes, strict=False):
            if a is not None and b is not None:
                width = min(a[2], b[2]) - max(a[0], b[0])
                height = min(a[3], b[3]) - max(a[1], b[1])
                shared += max(width, 0.0) * max(height, 0.0)
        return min(shared, self.area, other.area)


def _overlapped(shape: _Shape, better: Sequence[_Shape], most: float) -> str | None:
    """Return the reason if a track lies on a better one by more than ``most``, else None."""
    for other in better:
        bound = shape.most_shared(other)
        if bound <= most * (shape.area + other.area - bound):
            continue
        iou = masks.track_iou(shape.track.rles, other.track.rles)
        if iou > most:
            return f"overlaps track {other.track.id} by IoU {iou:.3f}, more than {most:.6g}"
    return None
