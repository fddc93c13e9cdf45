"""J, F and J&F of DAVIS: overlap of regions and of their outlines, frame by frame.

J is the IoU of a frame's masks, 1 where both are empty (Perazzi et al., A Benchmark Dataset and
Evaluation Methodology for Video Object Segmentation, CVPR 2016, section 4). F is the harmonic mean
of precision and recall of outline pixels, a pixel being right if the other outline comes within
0.008 of the frame's diagonal, rounded up. Numbers equal davis2017-evaluation's; per object they are
mean, recall (share of frames above 0.5) and decay (first quarter less last).

    found = region_boundary(truth, predictions, task="unsupervised"); found.summary["J&F-Mean"]

An outline is made and thickened once for each object and frame, within its box; every pair of
objects then costs two look-ups along the outlines, where the official code thickens both each time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from pmvis_core import masks
from pmvis_core.errors import DataError, UsageError
from pmvis_core.evaluation.protocol import Flags, Floats
from pmvis_core.formats.davis import HIGHEST, object_number
from pmvis_core.formats.ytvis import Dataset
from pmvis_core.formats.ytvis_annotation import Annotation
from pmvis_core.types import RLE, VideoInfo

TASKS = ("semi-supervised", "unsupervised")
MAX_PROPOSALS = 20
"""How many proposals a video may have in the unsupervised challenge."""
TOLERANCE = 0.008
"""How far apart outlines may be, as a share of the frame's diagonal."""

Pixels = NDArray[np.uint8]
Ints = NDArray[np.int64]
_Tracks = Mapping[int, Sequence[RLE | None]]

_RIGHT_FROM = 0.5
_QUARTERS = 4
_PARTS = ("Mean", "Recall", "Decay")


class Quality(NamedTuple):
    """One measure of one object over the judged frames."""

    mean: float
    """Over the frames, in [0, 1]."""
    recall: float
    """Share of the frames above 0.5."""
    decay: float
    """Mean of the first quarter of the frames less that of the last."""


@dataclass(frozen=True)
class ObjectQuality:
    """How well one object was followed."""

    video_id: int
    """Of the ground truth."""
    video: str
    """The video's name."""
    object: int
    """The object's number in its video."""
    matched: int | None
    """The number of its prediction; None if none is left for it."""
    region: Quality
    """J."""
    boundary: Quality
    """F."""


@dataclass(frozen=True)
class RegionBoundary:
    """An evaluation: every object, and the means over them."""

    task: str
    """``semi-supervised`` or ``unsupervised``."""
    objects: tuple[ObjectQuality, ...]
    """By video as in the ground truth, then by number."""

    @property
    def summary(self) -> dict[str, float | None]:
        """The seven official numbers, ``J&F-Mean`` first; None where there is no object."""
        names = [f"{measure}-{part}" for measure in "JF" for part in _PARTS]
        if not self.objects:
            return dict.fromkeys(["J&F-Mean", *names])
        values = np.array([[*one.region, *one.boundary] for one in self.objects]).mean(axis=0)
        both = (values[0] + values[len(_PARTS)]) / 2
        return dict(zip(["J&F-Mean", *names], [float(both), *values.tolist()], strict=True))

    def of_videos(self, videos: Collection[int]) -> RegionBoundary:
        """Return the evaluation of some videos, by id."""
        return replace(self, objects=tuple(o for o in self.objects if o.video_id in videos))


def region_boundary(
    truth: Dataset,
    predictions: Sequence[Annotation],
    *,
    task: str = "semi-supervised",
    indexed: bool = True,
    max_proposals: int | None = MAX_PROPOSALS,
) -> RegionBoundary:
    """Compare objects with predictions, whatever their categories.

    Args:
        truth: the ground truth; its crowds are void.
        predictions: under its video ids.
        task: ``semi-supervised``: a prediction belongs to the object of its number, void is
            background, the first and last frame are not judged. ``unsupervised``: predictions are
            assigned to objects so that the sum of mean J and mean F is highest, void is cut from
            both, all frames are judged.
        indexed: numbers are values of PNGs, as in DAVIS folders: the objects are those from 1 to
            the highest number in the first frame, and a number in between without any mask is an
            object (or proposal) that is empty throughout. False for other files: every annotation
            is an object.
        max_proposals: how many predictions a video may have if unsupervised; None for any.

    Raises:
        UsageError: there is no such task.
        DataError: ``truth`` has no annotations; a prediction is of another video, shares its number
            with one, or (semi-supervised) has a number that no object has; there are too many; a
            mask is not of the video's size; or no frame is left to judge.
    """
    if task not in TASKS:
        raise UsageError(f"task is `{task}`, expected `semi-supervised` or `unsupervised`")
    if not truth.annotated:
        raise DataError(
            f"{truth.name} holds no `annotations`: nothing to evaluate against",
            "give a file with ground truth",
        )
    by_video: dict[int, list[Annotation]] = {video.id: [] for video in truth.videos}
    for row in predictions:
        if row.video_id not in by_video:
            raise DataError(
                f"prediction {row.id} is of video {row.video_id}, which {truth.name} does not list",
                "evaluate against the file whose videos were labelled",
            )
        by_video[row.video_id].append(row)
    objects: list[ObjectQuality] = []
    for video in truth.videos:
        rows = [row for row in truth.annotations if row.video_id == video.id]
        objects += _Judge(video, task, indexed, max_proposals).judged(rows, by_video[video.id])
    return RegionBoundary(task, tuple(objects))


def region_boundary_metrics(found: RegionBoundary) -> dict[str, Any]:
    """Return the numbers as one JSON object: the summary and ``per_object``."""
    rows = [
        {
            "video_id": one.video_id,
            "video": one.video,
            "object": one.object,
            "matched": one.matched,
            "J": one.region._asdict(),
            "F": one.boundary._asdict(),
        }
        for one in found.objects
    ]
    return {**found.summary, "task": found.task, "per_object": rows}


def region_boundary_table(found: RegionBoundary, *, per_object: bool = False) -> str:
    """Return the official numbers in one line below their names, then J and F of each object."""
    cells = [(name, "-" if v is None else f"{v:.3f}") for name, v in found.summary.items()]
    lines = ["".join(f" {name:>8}" for name, _ in cells), "".join(f" {v:>8}" for _, v in cells)]
    if per_object:
        names = [f"{one.video}_{one.object}" for one in found.objects]
        width = max([len("object"), *map(len, names)])
        lines += ["", f" {'object':<{width}} {'J-Mean':>8} {'F-Mean':>8}"]
        lines += [
            f" {name:<{width}} {one.region.mean:>8.3f} {one.boundary.mean:>8.3f}"
            for name, one in zip(names, found.objects, strict=True)
        ]
    return "\n".join(lines)


def outline(mask: Pixels) -> Pixels:
    """Return the outline of a mask, half a pixel towards the origin of where it really runs.

    A pixel is on it if its right, lower or lower right neighbour differs from it; there is nothing
    beyond the last row and column.

    Args:
        mask: (H, W) uint8, 0 and 1.

    Returns:
        (H, W) uint8, 0 and 1.
    """
    padded: Pixels = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    here = padded[:-1, :-1]
    right, below, across = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    lines: Pixels = (here ^ right) | (here ^ below) | (here ^ across)
    return lines


def reach(height: int, width: int) -> int:
    """Return how many pixels outlines may be apart in a frame of this size."""
    return int(np.ceil(TOLERANCE * np.linalg.norm((height, width))))


class _Outline(NamedTuple):
    """An object's outline in one frame."""

    pixels: Ints
    """(P,) places in the flat frame."""
    near: Flags
    """(H * W,) whether a pixel is within reach of it."""


class _Judge:
    """Judges one video."""

    def __init__(
        self, video: VideoInfo, task: str, indexed: bool, max_proposals: int | None
    ) -> None:
        """Keep what is asked for and find the frames to judge."""
        self.video = video
        self.matching = task == "unsupervised"
        self.indexed = indexed
        self.max_proposals = max_proposals
        self.frames = range(video.length) if self.matching else range(1, video.length - 1)
        self.where = f"video {video.id} `{video.name}`"

    def judged(
        self, rows: Sequence[Annotation], predictions: Sequence[Annotation]
    ) -> list[ObjectQuality]:
        """Return how well each object was followed."""
        objects = self._objects([row for row in rows if not row.iscrowd])
        found = self._proposals(predictions)
        if objects and not self.frames:
            raise DataError(
                f"{self.where} has {self.video.length} frames, and none between the first and last",
                "judge all frames with the unsupervised task",
            )
        if self.matching:
            void = [row for row in rows if row.iscrowd]
            return self._assigned(objects, found, void)
        self._check_numbers(objects, found)
        results = []
        for number, rles in objects.items():
            ours = {number: found.get(number, ())}
            regions, boundaries = self._compare({number: rles}, ours, ())
            matched = number if number in found else None
            results.append(self._result(number, matched, regions[0, 0], boundaries[0, 0]))
        return results

    def _assigned(
        self, objects: _Tracks, found: _Tracks, void: Sequence[Annotation]
    ) -> list[ObjectQuality]:
        """Return the objects under the best assignment of proposals."""
        if self.max_proposals is not None and len(found) > self.max_proposals:
            raise DataError(
                f"{self.where} has {len(found)} proposals, the challenge allows "
                f"{self.max_proposals}",
                "keep the best, or allow any number",
            )
        numbers: list[int | None] = [*found]
        padding = max(0, len(objects) - len(found))
        regions, boundaries = self._compare(objects, found, void, padding)
        numbers += [None] * padding
        means = (regions.mean(axis=2) + boundaries.mean(axis=2)) / 2
        chosen, columns = linear_sum_assignment(means, maximize=True)
        # Proposals stand in rows, so the objects come in any order.
        results = [
            self._result(list(objects)[g], numbers[d], regions[d, g], boundaries[d, g])
            for d, g in zip(chosen.tolist(), columns.tolist(), strict=True)
        ]
        return sorted(results, key=lambda one: one.object)

    def _compare(
        self,
        objects: _Tracks,
        found: _Tracks,
        void: Sequence[Annotation],
        padding: int = 0,
    ) -> tuple[Floats, Floats]:
        """Return (D, G, T) J and F of each pair in each judged frame.

        Args:
            objects: G objects.
            found: predictions.
            void: what is cut from both.
            padding: empty predictions to append.
        """
        shape = (len(found) + padding, len(objects), len(self.frames))
        regions, boundaries = np.zeros(shape), np.zeros(shape)
        nothing = masks.empty(self.video.height, self.video.width)
        for n, t in enumerate(self.frames):
            cut = [rle for row in void if (rle := self._mask(row.rles, t)) is not None]
            ours = [self._mask(rles, t) or nothing for rles in found.values()]
            ours += [nothing] * padding
            theirs = [self._mask(rles, t) or nothing for rles in objects.values()]
            if cut:
                kept = 1 - masks.decode(masks.merge(cut))
                ours = [masks.encode(masks.decode(rle) & kept) for rle in ours]
                theirs = [masks.encode(masks.decode(rle) & kept) for rle in theirs]
            regions[:, :, n] = _regions(ours, theirs)
            boundaries[:, :, n] = _boundaries(ours, theirs)
        return regions, boundaries

    def _mask(self, rles: Sequence[RLE | None], t: int) -> RLE | None:
        """Return the mask in a frame, checked to be of the video's size; None where absent."""
        rle = rles[t] if t < len(rles) else None
        if rle is not None and list(rle["size"]) != [self.video.height, self.video.width]:
            raise DataError(
                f"{self.where}, frame {t}: a mask is {rle['size'][0]}x{rle['size'][1]}, the video "
                f"{self.video.height}x{self.video.width}",
                "bring predictions and ground truth to the size of the video",
            )
        return rle

    def _objects(self, rows: Sequence[Annotation]) -> _Tracks:
        """Return the objects that are judged, by number."""
        tracks = self._numbered(rows, "annotations")
        if not self.indexed:
            return tracks
        last = max((n for n, rles in tracks.items() if self._mask(rles, 0)), default=0)
        return self._filled(tracks, last)

    def _proposals(self, rows: Sequence[Annotation]) -> _Tracks:
        """Return the predictions that are there in a judged frame, by number."""
        tracks = self._numbered(rows, "predictions")
        seen = {n: r for n, r in tracks.items() if any(self._mask(r, t) for t in self.frames)}
        return self._filled(seen, max(seen, default=0)) if self.indexed else seen

    def _numbered(self, rows: Sequence[Annotation], what: str) -> _Tracks:
        """Return the masks by number, in ascending order."""
        tracks = {object_number(row): row.rles for row in rows}
        if len(tracks) < len(rows):
            raise DataError(f"{self.where}: two {what} share a number, expected unique numbers")
        return dict(sorted(tracks.items()))

    def _filled(self, tracks: _Tracks, last: int) -> _Tracks:
        """Return the tracks from 1 to the last one, those in between without masks too."""
        if last > HIGHEST or min(tracks, default=1) < 1:
            raise DataError(
                f"{self.where} has objects numbered from {min(tracks)} to {max(tracks)}, expected "
                f"values of a PNG, from 1 to {HIGHEST}",
                "numbers that are no values of a PNG are not indexed",
            )
        return {number: tracks.get(number, ()) for number in range(1, last + 1)}

    def _check_numbers(self, objects: _Tracks, found: _Tracks) -> None:
        """Check that every prediction has an object to belong to."""
        strangers = sorted(set(found) - set(objects))
        if strangers:
            raise DataError(
                f"{self.where}: a prediction has number {strangers[-1]}, and no object has",
                "predictions without the objects' numbers are for the unsupervised task",
            )

    def _result(
        self, number: int, matched: int | None, region: Floats, boundary: Floats
    ) -> ObjectQuality:
        """Return an object's numbers from its (T,) frames."""
        return ObjectQuality(
            self.video.id, self.video.name, number, matched, _quality(region), _quality(boundary)
        )


def _regions(ours: Sequence[RLE], theirs: Sequence[RLE]) -> Floats:
    """Return (D, G) J of a frame."""
    both_empty = np.logical_and.outer(_are_empty(ours), _are_empty(theirs))
    return np.where(both_empty, 1.0, masks.iou(ours, theirs))


def _are_empty(rles: Sequence[RLE]) -> Flags:
    """Return (N,) whether masks are empty."""
    return np.equal(masks.areas(rles), 0)


def _boundaries(ours: Sequence[RLE], theirs: Sequence[RLE]) -> Floats:
    """Return (D, G) F of a frame."""
    targets = [_outline_of(rle) for rle in theirs]
    return np.array(
        [[_f(mine, target) for target in targets] for mine in map(_outline_of, ours)]
    ).reshape(len(ours), len(theirs))


def _f(mine: _Outline | None, target: _Outline | None) -> float:
    """Return F of two outlines; None is an empty one, which only an empty one equals."""
    if mine is None or target is None:
        return float(mine is target)
    precision = np.count_nonzero(target.near[mine.pixels]) / len(mine.pixels)
    recall = np.count_nonzero(mine.near[target.pixels]) / len(target.pixels)
    if precision + recall == 0:
        return 0.0
    return float(2 * precision * recall / (precision + recall))


def _outline_of(rle: RLE) -> _Outline | None:
    """Return the outline of a mask, None if it has none (empty, or the whole frame)."""
    import cv2

    height, width = rle["size"]
    left, top, right, bottom = (int(edge) for edge in masks.to_box(rle))
    if right <= left:
        return None
    # Outlines reach one pixel beyond the box towards the origin, their vicinity `far` pixels more.
    far = reach(height, width)
    rows = slice(max(0, top - 1 - far), min(height, bottom + far))
    columns = slice(max(0, left - 1 - far), min(width, right + far))
    box = (columns.start, rows.start, columns.stop, rows.stop)
    lines = outline(masks.decode(rle, box=box))
    pixels = np.flatnonzero(lines)
    if not len(pixels):
        return None
    near = np.zeros((height, width), dtype=bool)
    near[rows, columns] = cv2.dilate(lines, _disk(far)).view(bool)
    y, x = np.divmod(pixels, lines.shape[1])
    return _Outline((y + rows.start) * width + x + columns.start, near.ravel())


def _disk(radius: int) -> Pixels:
    """Return (2 radius + 1, 2 radius + 1) uint8: 1 within the radius of the centre."""
    squares = np.arange(-radius, radius + 1) ** 2
    return (squares[:, None] + squares[None, :] <= radius**2).astype(np.uint8)


def _quality(frames: Floats) -> Quality:
    """Return mean, recall and decay of (T,) frames.

    The official code keeps the quarters' ends in 8 bits, so its decay is wrong from 257 frames on.
    """
    count = len(frames)
    ends = np.round(np.linspace(1, count, _QUARTERS + 1) + 1e-10).astype(int) - 1
    first, last = frames[ends[0] : ends[1] + 1], frames[ends[-2] : ends[-1] + 1]
    return Quality(
        mean=float(frames.mean()),
        recall=float((frames > _RIGHT_FROM).mean()),
        decay=float(first.mean() - last.mean()),
    )
