"""Key frames, both directions, merge, snapping, gates and overlap; mostly scripted motion."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pmvis_core import masks
from pmvis_core.errors import DataError, UsageError
from pmvis_core.files import canonical_json
from pmvis_core.propagation.flow import FlowPropagator, Prediction, SoftMask
from pmvis_core.propagation.frame_cache import Frames
from pmvis_core.refine import (
    RefineCounts,
    RefineOptions,
    key_frame,
    refine,
    refine_video,
)
from pmvis_core.tracks_io import video_to_json
from pmvis_core.types import RLE, Track, VideoInfo, VideoTracks
from pmvis_core.video.frames import find_frames

H, W, T = 24, 32, 7
Mask = NDArray[np.uint8]


def square(x: int, y: int = 8, side: int = 8) -> Mask:
    """Return a mask (H, W) of a square, cut at the border."""
    mask = np.zeros((H, W), np.uint8)
    mask[max(0, y) : max(0, y + side), max(0, x) : max(0, x + side)] = 1
    return mask


TRUTH = [square(2 + 3 * t) for t in range(T)]
"""A square moving three pixels a frame."""


class NoFrames:
    """Frames that nobody may read."""

    def frames(self) -> Iterator[Mask]:
        """Fail."""
        raise AssertionError("frames were read")

    def __getitem__(self, t: int) -> Mask:
        """Fail."""
        raise AssertionError("frames were read")


@dataclass
class Scripted:
    """A propagator that moves masks by three pixels a frame, or does as a script says."""

    script: Callable[[int, Mask], NDArray[np.float32]] | None = None
    """Makes the probability of a frame from (frame, moved mask)."""
    name: str = "scripted"
    patience: int | None = 2
    log: list[tuple[str, int]] = field(default_factory=list)
    """What was asked: ("add" | "predict", frame)."""

    def open(self, frames: Frames, video: VideoInfo) -> Scripted:
        """Return itself."""
        return self

    def sweep(self) -> ScriptedSweep:
        """Return a pass."""
        return ScriptedSweep(self)


class ScriptedSweep:
    """One pass of `Scripted`."""

    def __init__(self, owner: Scripted) -> None:
        """Start empty."""
        self.owner = owner
        self.t = -1
        self.held: dict[int, Mask] = {}

    def advance(self, t: int) -> dict[int, Prediction]:
        """Move all masks."""
        shift = 3 * (t - self.t)
        self.t = t
        out = {}
        for number, mask in self.held.items():
            moved = np.zeros_like(mask)
            if shift > 0:
                moved[:, shift:] = mask[:, :-shift]
            else:
                moved[:, :shift] = mask[:, -shift:]
            self.owner.log.append(("predict", t))
            probability = moved.astype(np.float32)
            if self.owner.script is not None:
                probability = self.owner.script(t, moved)
            out[number] = SoftMask(probability)
            self.held[number] = out[number].mask
        return out

    def add(self, number: int, mask: Mask) -> None:
        """Hold a mask."""
        self.owner.log.append(("add", self.t))
        self.held[number] = mask

    def drop(self, number: int) -> None:
        """Forget a mask."""
        del self.held[number]


def track(
    shapes: list[Mask | None],
    scores: list[float | None] | None = None,
    number: int = 1,
    score: float = 0.5,
    **more: object,
) -> Track:
    """Return a track of masks (None absent)."""
    rles = tuple(None if s is None else masks.encode(s) for s in shapes)
    if scores is None:
        scores = [None if rle is None else 0.5 for rle in rles]
    return Track(number, 1, score, tuple(scores), rles, **more)  # type: ignore[arg-type]


def only_key(t: int, number: int = 1) -> Track:
    """Return a track that is present in one frame."""
    return track([TRUTH[i] if i == t else None for i in range(T)], number=number)


def run(
    tracks: list[Track], options: RefineOptions | None = None, propagator: Scripted | None = None
) -> tuple[tuple[Track, ...], RefineCounts]:
    """Refine one video by the scripted propagator."""
    length = len(tracks[0].rles)
    video = VideoTracks(VideoInfo(3, "v", H, W, length), tuple(tracks))
    counts = RefineCounts()
    out = refine_video(
        video, lambda _: NoFrames(), propagator or Scripted(), options or RefineOptions(), counts
    )
    return out.tracks, counts


def rles(shapes: list[Mask]) -> tuple[RLE, ...]:
    """Encode masks."""
    return tuple(masks.encode(shape) for shape in shapes)


@pytest.mark.parametrize("key", [0, 3, 6])
def test_key_mask_reaches_both_ends(key: int) -> None:
    source = only_key(key)
    (result,), counts = run([source])
    assert result.rles == rles(TRUTH)
    assert result.rles[key] == source.rles[key]
    assert result.keyframe == key
    assert (result.score, result.frame_scores) == (source.score, source.frame_scores)
    assert result.lineage["refine"] == {
        "keyframe": key,
        "method": "scripted",
        "score_from": "infer",
        "track_conf": [1.0] * T,
    }
    assert counts == RefineCounts(videos=1, tracks=1, frames=6)


def test_one_frame_keeps_its_mask() -> None:
    (result,), _ = run([track([TRUTH[0]])])
    assert result.rles == (masks.encode(TRUTH[0]),)
    assert result.quality == 1.0


def iou(a: Mask, b: Mask) -> float:
    """Return the IoU of two masks."""
    return float((a & b).sum() / (a | b).sum())


def test_quality_is_the_mean_iou_of_a_side_then_of_both() -> None:
    own = [TRUTH[0], square(7), TRUTH[2], TRUTH[3], square(30, y=0), None, TRUTH[6]]
    scores: list[float | None] = [0.5 if t != 2 else 0.9 for t in range(T)]
    scores[5] = None
    (result,), _ = run([track(own, scores)], RefineOptions(snap=1.0))
    before = (1.0 + iou(TRUTH[1], square(7))) / 2
    # frame 4 disagrees, frame 5 is propagated but not seen
    after = (1.0 + 0.0 + 0.0 + 1.0) / 4
    assert result.keyframe == 2
    assert result.quality == pytest.approx((before + after) / 2, abs=1e-6)


def test_quality_counts_what_only_one_of_the_two_sees() -> None:
    (seen_once,), _ = run([only_key(3)])
    assert seen_once.quality == 0.0
    lost = Scripted(lambda t, moved: np.zeros((H, W), np.float32))
    (given_up,), _ = run([track(list(TRUTH), [0.9] + [0.5] * 6)], propagator=lost)
    assert given_up.quality == 0.0
    (steady,), _ = run([track(list(TRUTH))])
    assert steady.quality == 1.0
    alone = track([TRUTH[0], *[None] * 6])
    (unconfirmed,), _ = run([alone], propagator=lost)
    assert unconfirmed.quality == 0.0


def test_quality_does_not_depend_on_snapping_of_the_same_frame_or_on_gates() -> None:
    own = [TRUTH[0], square(4, y=9), None]
    source = track(own, [0.9, 0.1, None])
    (snapped,), _ = run([source], RefineOptions(snap=0.5))
    (plain,), _ = run([source], RefineOptions(snap=1.0))
    assert snapped.quality == plain.quality == pytest.approx(iou(TRUTH[1], own[1]) / 2, abs=1e-6)

    def burst(t: int, moved: Mask) -> NDArray[np.float32]:
        return np.ones((H, W), np.float32) if t == 3 else TRUTH[t].astype(np.float32)

    own = [mask if t != 3 else square(2) for t, mask in enumerate(TRUTH)]
    scores = [0.9] + [0.5] * 6
    (gated,), counts = run([track(own, scores)], RefineOptions(snap=1.0), Scripted(burst))
    (kept,), _ = run([track(own, scores)], RefineOptions(snap=1.0, area_jump=0), Scripted(burst))
    assert counts.gated == 1
    assert gated.quality == kept.quality


@pytest.mark.parametrize(
    ("scores", "sides", "expected"),
    [
        ([0.2, 0.9, 0.3], [8, 8, 8], 1),
        ([0.2, 0.9, 0.3], [8, 3, 8], 2),
        ([0.5, 0.5, 0.5], [6, 8, 8], 1),
        ([0.5, None, 0.4], [8, 8, 8], 1),
        ([0.5, 0.5, 0.5], [3, 2, 1], None),
        ([0.9, 0.5, 0.5], [0, 8, 8], 1),
    ],
    ids=["score", "too small", "larger then earlier", "track's score", "none", "absent"],
)
def test_key_frame(scores: list[float | None], sides: list[int], expected: int | None) -> None:
    shapes = [square(4, side=side) if side else None for side in sides]
    assert key_frame(track(shapes, scores, score=0.6), 16) == expected


def test_track_without_key_mask_is_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pmvis_core"):
        results, counts = run([track([None] * T, number=9), only_key(2)])
    assert [r.id for r in results] == [1]
    assert counts.dropped == 1
    assert "dropped tracks 9: no frame leaves them a mask of 16 pixels" in caplog.text


def test_video_without_a_key_mask_needs_no_frames() -> None:
    def never(video: VideoInfo) -> Frames:
        raise AssertionError("frames were looked for")

    video = VideoTracks(VideoInfo(3, "v", H, W, T), ())
    assert refine_video(video, never, Scripted(), RefineOptions(), RefineCounts()) == video


def test_rows_that_share_masks_and_key_share_the_work() -> None:
    shapes: list[Mask | None] = [TRUTH[0], TRUTH[1], TRUTH[2]]
    one = track(shapes, [0.1, 0.9, 0.1], number=1, instance=5)
    same_key = replace(one, id=2, category_id=2, frame_scores=(0.1, 0.3, 0.2), score=0.2)
    other_key = replace(one, id=3, category_id=3, frame_scores=(0.4, 0.3, 0.2), score=0.3)
    propagator = Scripted()
    results, _ = run([one, same_key, other_key], RefineOptions(snap=1.0), propagator)
    assert [r.keyframe for r in results] == [1, 1, 0]
    assert results[0].rles == results[1].rles
    assert propagator.log.count(("predict", 2)) == 2


def test_snapping_takes_the_own_mask_and_restarts_from_it() -> None:
    own = square(5, y=9)
    shapes: list[Mask | None] = [TRUTH[0], own, None]
    source = track(shapes, [0.9, 0.1, None])
    (snapped,), counts = run([source], RefineOptions(snap=0.5))
    assert snapped.rles == rles([TRUTH[0], own, square(8, y=9)])
    assert snapped.lineage["refine"]["snapped"] == [1]
    assert snapped.lineage["refine"]["agreement"] == 0.778
    assert counts.snapped == 1
    (plain,), counts = run([source], RefineOptions(snap=1.0))
    assert plain.rles == rles(TRUTH[:3])
    assert counts.snapped == 0


def test_disagreeing_own_mask_is_replaced() -> None:
    shapes: list[Mask | None] = [TRUTH[0], square(20), TRUTH[2]]
    (result,), _ = run([track(shapes, [0.9, 0.1, 0.1])])
    assert result.rles == rles(TRUTH[:3])
    assert result.lineage["refine"]["snapped"] == [2]


def test_object_that_leaves_is_absent_and_given_up() -> None:
    propagator = Scripted()
    shapes: list[Mask | None] = [square(26, side=6)] + [None] * 6
    (result,), _ = run([track(shapes)], RefineOptions(area_jump=0), propagator)
    assert [rle is not None for rle in result.rles] == [True, True] + [False] * 5
    assert result.lineage["refine"]["track_conf"][2:] == [None] * 5
    assert [t for what, t in propagator.log if what == "predict"] == [1, 2, 3]


def test_patience_none_never_gives_up() -> None:
    def blink(t: int, moved: Mask) -> NDArray[np.float32]:
        return (TRUTH[t] * (t == 6)).astype(np.float32)

    (result,), _ = run([only_key(0)], propagator=Scripted(blink, patience=None))
    assert [rle is not None for rle in result.rles] == [True] + [False] * 5 + [True]


def test_area_jump_gate() -> None:
    def burst(t: int, moved: Mask) -> NDArray[np.float32]:
        return np.ones((H, W), np.float32) if t == 3 else TRUTH[t].astype(np.float32)

    (gated,), counts = run([only_key(0)], propagator=Scripted(burst))
    assert gated.rles[3] is None
    assert gated.rles[4:] == rles(TRUTH[4:])
    assert (gated.lineage["refine"]["gated"], counts.gated) == ([3], 1)
    (kept,), _ = run([only_key(0)], RefineOptions(area_jump=0), Scripted(burst))
    assert kept.rles[3] is not None


def test_cycle_gate_cuts_where_the_way_back_fails() -> None:
    def lost(t: int, moved: Mask) -> NDArray[np.float32]:
        # from frame 4 on the propagator sits on something else and stays there
        return (square(24, y=0) if t >= 4 or moved[0, 20:].any() else moved).astype(np.float32)

    options = RefineOptions(cycle=0.5)
    (result,), counts = run([only_key(1)], options, Scripted(lost))
    assert [rle is not None for rle in result.rles] == [True] * 4 + [False] * 3
    assert counts.gated == 3
    (good,), counts = run([only_key(3)], options)
    assert good.rles == rles(TRUTH)
    assert counts.gated == 0


def test_overlap_by_score_and_by_probability() -> None:
    def unsure(t: int, moved: Mask) -> NDArray[np.float32]:
        return moved * np.float32(0.9 if moved[8].any() else 0.6)

    left = track([square(2, 8), None], number=1, score=0.3)
    right = track([square(4, 10), None], number=2, score=0.8)
    expected_left, expected_right = square(5, 8), square(7, 10)
    both = (expected_left & expected_right) != 0

    def second(overlap: str) -> list[Mask]:
        results, _ = run([left, right], RefineOptions(overlap=overlap), Scripted(unsure))
        return [masks.decode(r.rles[1]) for r in results if r.rles[1] is not None]

    a, b = second("independent")
    np.testing.assert_array_equal((a, b), (expected_left, expected_right))
    a, b = second("argmax")
    np.testing.assert_array_equal((a, b), (expected_left, expected_right * ~both))
    a, b = second("score")
    np.testing.assert_array_equal((a, b), (expected_left * ~both, expected_right))


def test_rows_of_one_instance_do_not_compete() -> None:
    one = track([TRUTH[0], TRUTH[1]], [0.9, 0.1], number=1, instance=4, score=0.4)
    two = replace(one, id=2, frame_scores=(0.1, 0.9), score=0.2)
    results, _ = run([one, two], RefineOptions(overlap="score"))
    assert results[0].rles == results[1].rles == rles(TRUTH[:2])


def test_two_instances_with_the_same_mask() -> None:
    one = replace(only_key(2, 1), instance=1, score=0.4)
    two = replace(only_key(2, 2), instance=2, score=0.6)
    results, _ = run([one, two])
    assert results[0].rles == results[1].rles == rles(TRUTH)
    (result,), counts = run([one, two], RefineOptions(overlap="score"))
    assert (result.id, result.rles, counts.dropped) == (2, rles(TRUTH), 1)


def test_done_videos_are_left_out_and_progress_is_told() -> None:
    videos = [VideoTracks(VideoInfo(number, "v", H, W, T), (only_key(0),)) for number in (1, 2, 3)]
    seen: list[str] = []

    def progress(items: object, what: str, total: int | None = None) -> Iterator[VideoTracks]:
        seen.append(what)
        yield from items  # type: ignore[misc]

    counts = RefineCounts()
    out = refine(
        videos,
        lambda _: NoFrames(),
        Scripted(),
        RefineOptions(),
        counts,
        done={2},
        progress=progress,  # type: ignore[arg-type]
    )
    assert [video.video.id for video in out] == [1, 3]
    assert seen == ["refine"]
    assert counts.videos == 2


@pytest.mark.parametrize(
    "bad",
    [{"overlap": "max"}, {"snap": 1.5}, {"cycle": -0.1}, {"min_area": 0}, {"area_jump": 0.5}],
)
def test_options_that_cannot_be_meant(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(bad.values())))):
        RefineOptions(**bad)  # type: ignore[arg-type]


class MovingSquare:
    """Textured frames for the real propagator."""

    def frames(self) -> Iterator[Mask]:
        """Yield all frames."""
        return (self[t] for t in range(T))

    def __getitem__(self, t: int) -> Mask:
        """Return a frame: noise on a green ground, noise on a red square."""
        rng = np.random.default_rng(8)
        ground = rng.integers(0, 60, (H, W, 3)) + np.array([10, 120, 10])
        skin = rng.integers(0, 60, (8, 8, 3)) + np.array([150, 10, 40])
        x = 2 + 3 * t
        ground[8:16, x : x + 8] = skin
        return ground.astype(np.uint8)


def test_flow_is_deterministic_and_ignores_row_order() -> None:
    first, second = only_key(3, 1), replace(only_key(2, 2), score=0.9)
    info = VideoInfo(1, "v", H, W, T)

    def result(*tracks: Track) -> dict[int, str]:
        out = refine_video(
            VideoTracks(info, tracks),
            lambda _: MovingSquare(),
            FlowPropagator(),
            RefineOptions(),
            RefineCounts(),
        )
        lines = [video_to_json(out.with_tracks((row,))) for row in out.tracks]
        return {row.id: canonical_json(line) for row, line in zip(out.tracks, lines, strict=True)}

    once = result(first, second)
    assert once == result(first, second) == result(second, first)
    assert once[1] == result(first)[1]


def test_missing_frames(tmp_path: Path) -> None:
    info = VideoInfo(7, "clip", H, W, T, tuple(f"clip/{t}.jpg" for t in range(T)))
    video = VideoTracks(info, (only_key(0),))
    with pytest.raises(DataError, match="video 7 `clip`"):
        refine_video(
            video,
            lambda v: find_frames(v, tmp_path),
            FlowPropagator(),
            RefineOptions(),
            RefineCounts(),
        )
