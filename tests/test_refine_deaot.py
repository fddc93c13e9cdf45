"""`refine` carried by DeAOT: key frames, many objects, absence, and filtering before or after.

The networks are random, so masks mean nothing; what is asserted holds for any weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pmvis_core import masks
from pmvis_core.filter import FilterRule, filter_tracks
from pmvis_core.models.deaot import DeAOT, Variant
from pmvis_core.propagation.deaot import DeaotPropagator, DeaotSettings
from pmvis_core.refine import RefineCounts, RefineOptions, refine_video
from pmvis_core.types import Track, VideoInfo, VideoTracks
from tests.parity_deaot import Stack

HEIGHT, WIDTH, LENGTH = 40, 56, 5
Mask = NDArray[np.uint8]
FRAMES = np.random.default_rng(1).integers(0, 256, (LENGTH, HEIGHT, WIDTH, 3), dtype=np.uint8)


def cell(i: int) -> Mask:
    """Return the i-th of 48 small masks that do not touch."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    row, column = divmod(i, 8)
    mask[6 * row : 6 * row + 5, 7 * column : 7 * column + 6] = 1
    return mask


def track(number: int, key: int, mask: Mask, score: float = 0.5, length: int = LENGTH) -> Track:
    """Return a track with one mask."""
    rles = tuple(masks.encode(mask) if t == key else None for t in range(length))
    scores = tuple(score if t == key else None for t in range(length))
    return Track(number, 1, score, scores, rles)


def propagator(**settings: Any) -> DeaotPropagator:
    """Return a small random network."""
    torch.manual_seed(0)
    network = DeAOT(Variant("mobilenet_v2", 2, 2))
    return DeaotPropagator(network, torch.device("cpu"), DeaotSettings(**settings))


def run(
    tracks: list[Track],
    carrier: DeaotPropagator | None = None,
    counts: RefineCounts | None = None,
    **options: Any,
) -> tuple[Track, ...]:
    """Refine one video."""
    length = len(tracks[0].rles)
    video = VideoTracks(VideoInfo(3, "v", HEIGHT, WIDTH, length), tuple(tracks))
    refined = refine_video(
        video,
        lambda _: Stack(FRAMES),
        carrier or propagator(),
        RefineOptions.of("deaot", **options),
        counts or RefineCounts(),
    )
    return refined.tracks


def decoded(row: Track, t: int) -> Mask:
    """Return a track's mask, empty where it is absent."""
    rle = row.rles[t]
    return np.zeros((HEIGHT, WIDTH), np.uint8) if rle is None else masks.decode(rle)


def test_defaults_are_the_papers() -> None:
    options = RefineOptions.of("deaot")
    assert (options.snap, options.area_jump, options.cycle) == (1.0, 0.0, 0.0)
    assert options.overlap == "independent"
    assert RefineOptions.of("flow") == RefineOptions()
    assert RefineOptions.of("deaot", snap=0.4, area_jump=None).snap == 0.4


@pytest.mark.parametrize("key", [0, 2, LENGTH - 1])
def test_the_key_mask_stays_and_all_other_frames_are_predicted(key: int) -> None:
    source = track(1, key, cell(9))
    (result,) = run([source], min_area=1)
    assert result.keyframe == key
    assert result.rles[key] == source.rles[key]
    confidence = result.lineage["refine"]["track_conf"]
    assert [c is None for c in confidence] == [rle is None for rle in result.rles]
    assert confidence[key] == 1.0
    assert (result.score, result.frame_scores) == (source.score, source.frame_scores)
    assert result.lineage["refine"]["method"] == "deaot"


def test_a_video_of_one_frame_runs_no_network() -> None:
    carrier = propagator()
    carrier.network.encode = None  # type: ignore[assignment]
    source = track(1, 0, cell(9), length=1)
    (result,) = run([source], carrier)
    assert result.rles == source.rles


@pytest.mark.parametrize("number", [13, 40])
def test_objects_of_one_key_frame_share_no_pixel(number: int) -> None:
    tracks = [track(i + 1, 2, cell(i), score=0.9 - 0.01 * i) for i in range(number)]
    results = run(tracks, min_area=1)
    assert [row.id for row in results] == list(range(1, number + 1))
    for t in range(LENGTH):
        claims = sum(decoded(row, t).astype(int) for row in results)
        assert np.max(claims) <= 1
    assert all(row.rles[2] == source.rles[2] for row, source in zip(results, tracks, strict=True))


def test_objects_of_many_key_frames() -> None:
    tracks = [track(i + 1, i % LENGTH, cell(i), score=0.5) for i in range(40)]
    results = run(tracks, min_area=1)
    assert [row.keyframe for row in results] == [i % LENGTH for i in range(40)]


def test_the_order_of_rows_does_not_matter() -> None:
    tracks = [track(i + 1, i % 2, cell(2 * i), score=0.9 - 0.05 * i) for i in range(6)]
    once = {row.id: row for row in run(tracks)}
    again = {row.id: row for row in run(tracks[::-1])}
    assert once == again


def test_the_better_of_two_wins_the_pixels_that_both_claim() -> None:
    """A label map is exclusive: the weaker starts with what the better one leaves."""
    lower, upper = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    lower[10:20, 10:30], upper[10:20, 24:44] = 1, 1
    carrier = propagator()
    seen: list[NDArray[np.float32]] = []
    refer = carrier.network.refer

    def watched(features: Any, identities: torch.Tensor) -> Any:
        seen.append(identities.numpy())
        return refer(features, identities)

    carrier.network.refer = watched  # type: ignore[method-assign]
    run([track(1, 0, lower, 0.3), track(2, 0, upper, 0.8)], carrier)
    (labels,) = seen
    best, second = labels[0, 1], labels[0, 2]
    assert best.sum() > second.sum() > 0
    assert not (best * second).any()


def test_an_object_may_leave_and_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is found the frame is null, and the network goes on asking."""
    carrier = propagator()
    there = {1: True, 2: False, 3: False, 4: True}
    frames: Iterator[int] = iter(there)

    def upsample(logits: Any, objects: Any, size: tuple[int, int]) -> torch.Tensor:
        shape = torch.from_numpy(cell(9) * there[next(frames)]).float()
        return torch.stack([0.5 - shape, shape - 0.5])[None] * 8

    monkeypatch.setattr(carrier.network, "upsample", upsample)
    (result,) = run([track(1, 0, cell(9))], carrier)
    assert [rle is not None for rle in result.rles] == [True, True, False, False, True]
    np.testing.assert_array_equal(decoded(result, 4), cell(9))
    assert result.lineage["refine"]["track_conf"][2:4] == [None, None]


@pytest.mark.parametrize("joint", [False, True])
def test_filter_before_or_after(joint: bool) -> None:
    """Alone and independent, what the filter drops later had no influence."""
    tracks = [track(i + 1, i % 3, cell(3 * i), score=0.9 - 0.12 * i) for i in range(6)]
    rule = FilterRule(topk=3, pscore=0.4)
    carrier, counts = propagator(joint=joint), RefineCounts()
    before = run(tracks, carrier, counts, keep=rule, min_area=1)
    info = VideoInfo(3, "v", HEIGHT, WIDTH, LENGTH)
    refined = VideoTracks(info, run(tracks, carrier, min_area=1))
    after = filter_tracks(refined, rule).kept.tracks
    assert (counts.filtered, counts.tracks) == (3, 3)
    assert [row.id for row in before] == [row.id for row in after] == [1, 2, 3]
    if not joint:
        assert before == after
    for a, b in zip(before, after, strict=True):
        assert replace(a, rles=(), lineage={}) == replace(b, rles=(), lineage={})


def test_arranged_for_speed_computes_the_same() -> None:
    """Rounding is all that differs, so probabilities agree in frames that rest on no argmax."""
    results = []
    for arranged in (True, False):
        carrier = propagator(arranged=arranged)
        sweep = carrier.open(Stack(FRAMES), VideoInfo(3, "v", HEIGHT, WIDTH, LENGTH)).sweep()
        sweep.advance(0)
        for i in range(12):
            sweep.add(i, cell(i))
        results.append(sweep.advance(1))
    for i in range(12):
        a, b = (found[i].probability for found in results)
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_lower_precision_is_near() -> None:
    whole, lower = (
        carried_probability(propagator(precision=precision)) for precision in ("fp32", "bf16")
    )
    assert 0 < np.abs(whole - lower).max() < 0.1


def carried_probability(carrier: DeaotPropagator) -> NDArray[np.float32]:
    """Return an object's probability in the frame after its key frame."""
    sweep = carrier.open(Stack(FRAMES), VideoInfo(3, "v", HEIGHT, WIDTH, LENGTH)).sweep()
    sweep.advance(0)
    sweep.add(0, cell(9))
    return sweep.advance(1)[0].probability
