"""Mending tracks: from the best frame of each track to both ends of its video.

PM-VIS+ (Sec. III-C): the frame in which an instance's score is highest is its key frame; the image
model's mask there is propagated to the first and to the last frame; the halves are merged. Classes
and scores stay those of the image model, so that TopK and PScore keep their meaning afterwards.

Four things depart from the paper, each with a switch; the first two are on for `flow` alone, which
needs them (`RefineOptions.of`). *Snapping*: where the propagated mask agrees with the track's own
mask of that frame (IoU above ``snap``), the own mask is taken and propagation restarts from it, for
the image model's edge is better than drifted flow; ``snap=1`` switches it off. *Gates* take out
frames in which propagation has probably lost the object; ``area_jump=0`` and ``cycle=0`` switch
them off. *Overlap* of objects stays as it is unless ``overlap`` says otherwise. Tracks that the
filter would throw out need not be propagated first: ``keep``.

    options = RefineOptions.of("flow")
    for video in refine(read_tracks(path), frames_of, FlowPropagator(), options, RefineCounts()):
        out.write(video)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from pmvis_core import masks
from pmvis_core.errors import UsageError
from pmvis_core.files import significant
from pmvis_core.filter import FilterRule, filter_tracks
from pmvis_core.mending import Mended, Patch, separate
from pmvis_core.progress import Progress, silent
from pmvis_core.propagation.bilateral import surrounding_box
from pmvis_core.propagation.flow import Prediction, Propagation, Propagator
from pmvis_core.propagation.frame_cache import Frames
from pmvis_core.types import RLE, Track, VideoInfo, VideoTracks

logger = logging.getLogger(__name__)

OVERLAPS = ("independent", "argmax", "score")
_DIGITS = 3
"""Significant digits of the confidences in a track's lineage."""


@dataclass(frozen=True)
class RefineOptions:
    """What `refine` may decide; recorded in the header of the result."""

    min_area: int = 16
    """A mask of fewer pixels is no key mask, and an absent object when it is predicted."""
    snap: float = 0.5
    """IoU above which a frame keeps the track's own mask and restarts from it; 1 never does."""
    overlap: str = "independent"
    """`independent` lets objects overlap; `argmax` gives a pixel to the most probable instance,
    `score` to the one of the highest score."""
    area_jump: float = 4.0
    """A frame whose area differs from the last accepted one by more than this factor is taken
    out; 0 takes out none."""
    cycle: float = 0.0
    """Frames from which the way back finds the start with less than this IoU are taken out; 0, the
    default, checks none: with `flow` it takes out more right frames than wrong ones."""

    keep: FilterRule = field(default_factory=FilterRule)
    """Which tracks are worth the work; the others are left out, as `filter` would do later."""

    @classmethod
    def of(cls, method: str, **given: Any) -> RefineOptions:
        """Return a method's defaults, but for what is given and not None."""
        trusting = {} if method == "flow" else {"snap": 1.0, "area_jump": 0.0}
        said = {name: value for name, value in given.items() if value is not None}
        return cls(**{**trusting, **said})

    def as_json(self) -> dict[str, Any]:
        """Return the options for a file's lineage; a rule that keeps all is left out."""
        facts = {item.name: getattr(self, item.name) for item in fields(self)}
        rule = facts.pop("keep")
        return facts if rule == FilterRule() else {**facts, "keep": rule.as_json()}

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: naming the option, what was got and what was expected.
        """
        if self.overlap not in OVERLAPS:
            raise UsageError(f"overlap `{self.overlap}`, expected one of: {', '.join(OVERLAPS)}")
        for name in ("snap", "cycle"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"{name} {value}, expected an IoU from 0 to 1")
        if self.min_area < 1:
            raise UsageError(f"min-area {self.min_area}, expected at least 1 pixel")
        if self.area_jump != 0 and not self.area_jump > 1.0:
            raise UsageError(f"area-jump {self.area_jump}, expected a factor above 1, or 0")


@dataclass
class RefineCounts:
    """What happened, summed over the videos so far."""

    videos: int = 0
    """Videos refined."""
    tracks: int = 0
    """Rows read and worth the work."""
    filtered: int = 0
    """Rows left out before, by ``RefineOptions.keep``."""
    dropped: int = 0
    """Rows left out: no mask to start from, or (with an overlap policy) none left to them."""
    frames: int = 0
    """Frames of all objects but their key frames."""
    snapped: int = 0
    """Frames that kept the track's own mask."""
    gated: int = 0
    """Frames taken out by the gates."""

    def add(
        self, tracks: Sequence[Track], kept: Sequence[Track], objects: Sequence[Mended]
    ) -> None:
        """Count one video: its rows, those that are kept, and what was propagated."""
        self.videos += 1
        self.tracks += len(tracks)
        self.dropped += len(tracks) - len(kept)
        for item in objects:
            self.frames += len(item.rles) - 1
            self.snapped += len(item.snapped)
            self.gated += len(item.gated)


def refine(
    videos: Iterable[VideoTracks],
    frames_of: Callable[[VideoInfo], Frames],
    propagator: Propagator,
    options: RefineOptions,
    counts: RefineCounts,
    *,
    done: Collection[int] = (),
    progress: Progress = silent,
) -> Iterator[VideoTracks]:
    """Yield every video with its tracks refined, in order, one in memory at a time.

    Args:
        videos: with the image model's tracks.
        frames_of: finds the frames of a video; not called for a video without tracks.
        propagator: carries masks from frame to frame.
        options: decisions.
        counts: filled as the videos pass.
        done: ids of videos to leave out (already written by an earlier run).
        progress: told of every video.

    Raises:
        DataError: a video's frames are missing or of another size than its masks.
    """
    for video in progress(videos, "refine"):
        if video.video.id not in done:
            yield refine_video(video, frames_of, propagator, options, counts)


def refine_video(
    video: VideoTracks,
    frames_of: Callable[[VideoInfo], Frames],
    propagator: Propagator,
    options: RefineOptions,
    counts: RefineCounts,
) -> VideoTracks:
    """Return one video with its tracks refined; see `refine`."""
    counts.filtered += len(video.tracks)
    video = filter_tracks(video, options.keep).kept
    counts.filtered -= len(video.tracks)
    objects, owner = _objects(video.tracks, options.min_area)
    if objects:
        propagation = propagator.open(frames_of(video.video), video.video)
        _propagate(propagation, objects, propagator.patience, options)
        if options.cycle:
            _cycle_gate(propagation, objects, options)
        if options.area_jump:
            for item in objects:
                item.gate_area_jumps(options.area_jump)
        if options.overlap != "independent":
            separate(objects, video.video, options.overlap, options.min_area)
    kept = [track for track in video.tracks if track.id in owner and any(owner[track.id].rles)]
    counts.add(video.tracks, kept, objects)
    _warn_of_dropped(video, kept, options)
    return video.with_tracks(
        tuple(_refined(track, owner[track.id], propagator.name) for track in kept)
    )


def key_frame(track: Track, min_area: int) -> int | None:
    """Return the frame to propagate from: the best-scored among those with a mask large enough.

    Without a score for a frame the track's score stands in. Ties go to the larger mask, then to
    the earlier frame. None if no mask has ``min_area`` pixels.
    """
    best: tuple[float, int, int] | None = None
    for t, rle in enumerate(track.rles):
        area = 0 if rle is None else masks.area(rle)
        if area < min_area:
            continue
        score = track.frame_scores[t]
        candidate = (track.score if score is None else score, area, -t)
        best = candidate if best is None else max(best, candidate)
    return None if best is None else -best[2]


def _objects(tracks: Sequence[Track], min_area: int) -> tuple[list[Mended], dict[int, Mended]]:
    """Return what has to be propagated, and which of it each row (by track id) takes.

    The best come first: where objects compete for pixels of a key frame, they win.
    """
    found: dict[tuple[Any, ...], Mended] = {}
    owner: dict[int, Mended] = {}
    for track in tracks:
        key = key_frame(track, min_area)
        if key is None:
            continue
        instance: object = ("row", track.id) if track.instance is None else track.instance
        texts = tuple(None if rle is None else rle["counts"] for rle in track.rles)
        item = found.setdefault((instance, key, texts), Mended(key, track.rles, instance))
        item.score = max(item.score, track.score)
        owner[track.id] = item
    return sorted(found.values(), key=lambda item: -item.score), owner


def _warn_of_dropped(video: VideoTracks, kept: Sequence[Track], options: RefineOptions) -> None:
    """Warn of the rows that are not kept."""
    if left_out := ", ".join(str(track.id) for track in video.tracks if track not in kept):
        where = f"video {video.video.id} `{video.video.name}`"
        why = f"no frame leaves them a mask of {options.min_area} pixels"
        logger.warning("%s: dropped tracks %s: %s", where, left_out, why)


_Visit = Callable[[int, int, Prediction], RLE | bool]
"""Called as (object number, frame, prediction). Returns the mask to restart from, True to go on
or False to give the object up."""


def _sweep(
    propagation: Propagation, seeds: Mapping[int, tuple[int, RLE]], order: range, visit: _Visit
) -> None:
    """Carry every object from its seed (frame, mask) along ``order`` and show it to ``visit``."""
    sweep = propagation.sweep()
    live, waiting = 0, len(seeds)
    for t in order:
        starting = {number: rle for number, (start, rle) in seeds.items() if start == t}
        live, waiting = live + len(starting), waiting - len(starting)
        for number, prediction in sweep.advance(t).items():
            answer = visit(number, t, prediction)
            if answer is False:
                sweep.drop(number)
                live -= 1
            elif answer is not True:
                starting[number] = answer
        for number, rle in sorted(starting.items()):
            sweep.add(number, masks.decode(rle))
        if not live and not waiting:
            return


def _propagate(
    propagation: Propagation,
    objects: Sequence[Mended],
    patience: int | None,
    options: RefineOptions,
) -> None:
    """Fill the results of all objects: one pass to the last frame, one to the first."""
    length = len(objects[0].own)
    keys = [item.key for item in objects]
    seeds = {number: (item.key, item.keep_own(item.key)) for number, item in enumerate(objects)}
    for order in (range(min(keys), length), range(max(keys), -1, -1)):
        empty = [0] * len(objects)

        def visit(number: int, t: int, prediction: Prediction, empty: list[int] = empty) -> Any:
            item = objects[number]
            if _record(item, t, prediction, options):
                empty[number] = 0
                return item.own[t] if t in item.snapped else True
            empty[number] += 1
            return patience is None or empty[number] < patience

        _sweep(propagation, seeds, order, visit)


def _record(item: Mended, t: int, prediction: Prediction, options: RefineOptions) -> bool:
    """Write a prediction, or the own mask it agrees with, into the result; False if empty."""
    mask = prediction.mask
    if int(mask.sum()) < options.min_area:
        return False
    rle, own = masks.encode(mask), item.own[t]
    item.propagated.add(t)
    if own is not None:
        overlap = float(masks.iou([rle], [own])[0, 0])
        item.agreement[t] = overlap
        if overlap > options.snap:
            item.keep_own(t)
            item.snapped.add(t)
            return True
    item.rles[t] = rle
    item.confidence[t] = prediction.confidence
    if options.overlap == "argmax":
        item.patches[t] = _patch(prediction)
    return True


def _patch(prediction: Prediction) -> Patch:
    """Cut a prediction, which is not empty, to its mask's box."""
    place = surrounding_box(prediction.mask != 0, 0)
    assert place is not None, "only masks of some area are kept"
    return place, np.rint(prediction.probability[place] * 254).astype(np.uint8)


def _cycle_gate(
    propagation: Propagation, objects: Sequence[Mended], options: RefineOptions
) -> None:
    """Take out the far end of a propagated stretch where the way back misses its start.

    A stretch runs from the last frame known to be right (key or snapped) to an end of the result.
    Propagating back from its farthest frame should find the mask it came from; where it does not,
    the farthest frame from which it does is found by bisection.
    """
    for direction in (1, -1):
        found = {number: _stretch(item, direction) for number, item in enumerate(objects)}
        stretches = {number: stretch for number, stretch in found.items() if len(stretch) > 1}
        # frames of a stretch at [good] return to its start, those at [bad] do not
        good = dict.fromkeys(stretches, 0)
        bad = {number: len(stretch) for number, stretch in stretches.items()}
        probe = {number: len(stretch) - 1 for number, stretch in stretches.items()}
        while probe:
            tried = {number: stretches[number][i] for number, i in probe.items()}
            starts = {number: stretches[number][0] for number in probe}
            overlaps = _way_back(propagation, objects, tried, starts, -direction)
            for number, i in probe.items():
                if overlaps.get(number, 0.0) >= options.cycle:
                    good[number] = i
                else:
                    bad[number] = i
            probe = {n: (good[n] + bad[n]) // 2 for n in probe if bad[n] - good[n] > 1}
        for number, stretch in stretches.items():
            for t in stretch[bad[number] :]:
                objects[number].gate(t)


def _stretch(item: Mended, direction: int) -> list[int]:
    """Return the frames that rest on flow alone, after the known frame that they start from."""
    end = len(item.own) if direction > 0 else -1
    known = item.snapped | {item.key}
    start = max(known) if direction > 0 else min(known)
    return [t for t in range(start, end, direction) if item.rles[t] is not None]


def _way_back(
    propagation: Propagation,
    objects: Sequence[Mended],
    tried: Mapping[int, int],
    starts: Mapping[int, int],
    direction: int,
) -> dict[int, float]:
    """Return, by object, the IoU at its start after propagating back from the frame tried."""
    overlaps: dict[int, float] = {}

    def visit(number: int, t: int, prediction: Prediction) -> bool:
        if t != starts[number]:
            return True
        known = objects[number].rles[t]
        assert known is not None, "a stretch starts from a mask"
        overlaps[number] = float(masks.iou([masks.encode(prediction.mask)], [known])[0, 0])
        return False

    seeds = {n: (t, rle) for n, t in tried.items() if (rle := objects[n].rles[t]) is not None}
    first = (max if direction < 0 else min)(tried.values())
    last = (min if direction < 0 else max)(starts.values())
    _sweep(propagation, seeds, range(first, last + direction, direction), visit)
    return overlaps


def _refined(track: Track, item: Mended, method: str) -> Track:
    """Return a row with its new masks; scores are copied, never made anew."""
    story: dict[str, Any] = {
        "keyframe": item.key,
        "method": method,
        "score_from": "infer",
        "track_conf": [None if c is None else significant(c, _DIGITS) for c in item.confidence],
    }
    if item.snapped:
        story["snapped"] = sorted(item.snapped)
    if item.gated:
        story["gated"] = sorted(item.gated)
    if item.agreement:
        mean = sum(item.agreement.values()) / len(item.agreement)
        story["agreement"] = significant(mean, _DIGITS)
    return replace(
        track,
        rles=tuple(item.rles),
        keyframe=item.key,
        lineage={**track.lineage, "refine": story},
        quality=significant(item.quality()),
    )
