"""PScore, TopK and overlap removal, against the rules stated one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmvis_core import masks
from pmvis_core.errors import DataError, UsageError
from pmvis_core.filter import FilterRule, filter_tracks, sweep
from pmvis_core.types import RLE, Track, VideoInfo, VideoTracks

INFO = VideoInfo(1, "clip", 12, 16, 2)
SCORES = st.sampled_from([0.0, 0.1, 0.2, 0.2000001, 0.5, 0.5, 1.0])


def box_mask(x: int, width: int = 4) -> RLE:
    """Return a mask of a rectangle eight rows high."""
    mask = np.zeros((12, 16), np.uint8)
    mask[2:10, x : x + width] = 1
    return masks.encode(mask)


def track(
    number: int, score: float, x: int = 0, category: int = 1, instance: int | None = None
) -> Track:
    """Return a track with the same rectangle in both frames."""
    rle = box_mask(x)
    return Track(number, category, score, (score, score), (rle, rle), instance=instance)


def clip(*tracks: Track) -> VideoTracks:
    return VideoTracks(INFO, tracks)


@st.composite
def clips(draw: st.DrawFn) -> VideoTracks:
    """Draw a video whose tracks have scores with ties and ids in no order."""
    ids = draw(st.lists(st.integers(0, 50), unique=True, max_size=8))
    return clip(
        *(
            track(
                i,
                draw(SCORES),
                draw(st.integers(0, 12)),
                draw(st.integers(1, 3)),
                draw(st.none() | st.integers(0, 2)),
            )
            for i in ids
        )
    )


def kept(video: VideoTracks, rule: FilterRule) -> list[int]:
    return [t.id for t in filter_tracks(video, rule).kept.tracks]


def test_pscore_keeps_what_has_it_exactly() -> None:
    video = clip(track(1, 0.2), track(2, 0.19999), track(3, 0.9))
    assert kept(video, FilterRule(pscore=0.2)) == [1, 3]


def test_topk_keeps_the_best_and_zero_keeps_all() -> None:
    video = clip(*(track(i, 0.1 * i) for i in range(1, 6)))
    assert kept(video, FilterRule(topk=2)) == [4, 5]
    assert kept(video, FilterRule(topk=0)) == [1, 2, 3, 4, 5]
    assert kept(video, FilterRule(topk=9)) == [1, 2, 3, 4, 5]


def test_ties_go_to_the_smaller_id_and_the_order_stays() -> None:
    video = clip(track(9, 0.5), track(3, 0.5), track(7, 0.5))
    assert kept(video, FilterRule(topk=2)) == [3, 7]


def test_a_video_without_tracks() -> None:
    outcome = filter_tracks(clip(), FilterRule(4, 0.2, 0.5, keep_ignored=True))
    assert (outcome.kept.tracks, outcome.kept.ignored, outcome.dropped) == ((), (), ())


def test_reasons_name_the_numbers() -> None:
    video = clip(track(1, 0.9), track(2, 0.1), track(3, 0.8, x=1), track(4, 0.7, x=12))
    dropped = filter_tracks(video, FilterRule(1, 0.2, 0.5)).dropped
    assert [(d.track.id, d.rule, d.reason) for d in dropped] == [
        (3, "overlap", "overlaps track 1 by IoU 0.600, more than 0.5"),
        (4, "topk", "1 better tracks are kept already"),
        (2, "pscore", "score 0.1 is below 0.2"),
    ]


def test_overlap_at_the_threshold_stays() -> None:
    video = clip(track(1, 0.9), track(2, 0.8, x=1))
    assert kept(video, FilterRule(overlap=0.6)) == [1, 2]
    assert kept(video, FilterRule(overlap=0.5999)) == [1]


def test_a_duplicate_takes_no_place_among_the_k() -> None:
    video = clip(track(1, 0.9), track(2, 0.8, category=2), track(3, 0.7, x=9))
    assert kept(video, FilterRule(topk=2)) == [1, 2]
    assert kept(video, FilterRule(topk=2, overlap=0.5)) == [1, 3]


def test_a_dropped_track_removes_no_other() -> None:
    video = clip(track(1, 0.9, x=0), track(2, 0.8, x=2), track(3, 0.7, x=4))
    assert kept(video, FilterRule(overlap=0.3)) == [1, 3]


def test_overlap_zero_keeps_what_does_not_touch() -> None:
    video = clip(track(1, 0.9, x=0), track(2, 0.8, x=4), track(3, 0.7, x=7))
    assert kept(video, FilterRule(overlap=0.0)) == [1, 2]


def test_tracks_in_different_frames_do_not_overlap() -> None:
    one, two = track(1, 0.9), track(2, 0.8)
    one = replace(one, rles=(one.rles[0], None))
    two = replace(two, rles=(None, two.rles[1]))
    assert kept(clip(one, two), FilterRule(overlap=0.0)) == [1, 2]


def test_ignored_holds_one_track_an_instance_and_no_kept_one() -> None:
    video = clip(
        track(1, 0.9, instance=0),
        track(2, 0.3, instance=0, category=2),
        track(3, 0.1, instance=1),
        track(4, 0.15, instance=1, category=2),
        track(5, 0.05),
    )
    video = replace(video, ignored=(track(8, 0.4, instance=7),))
    outcome = filter_tracks(video, FilterRule(1, 0.2, keep_ignored=True))
    assert [t.id for t in outcome.kept.ignored] == [8, 4, 5]
    assert outcome.kept.ignored[1].lineage == {"filter": "pscore"}
    assert [t.id for t in filter_tracks(video, FilterRule(1)).kept.ignored] == [8]


@settings(max_examples=80, deadline=None)
@given(clips(), st.integers(0, 4), SCORES, st.sampled_from([None, 0.0, 0.3, 0.5, 1.0]))
def test_against_the_rules_spelt_out(
    video: VideoTracks, topk: int, pscore: float, overlap: float | None
) -> None:
    outcome = filter_tracks(video, FilterRule(topk, pscore, overlap))
    chosen: list[Track] = []
    for t in sorted(video.tracks, key=lambda t: (-t.score, t.id)):
        lies_on = overlap is not None and any(
            masks.track_iou(t.rles, better.rles) > overlap for better in chosen
        )
        if t.score >= pscore and not lies_on and not (topk and len(chosen) == topk):
            chosen.append(t)
    assert sorted(t.id for t in outcome.kept.tracks) == sorted(t.id for t in chosen)
    order = [t.id for t in video.tracks]
    assert [t.id for t in outcome.kept.tracks] == sorted(
        (t.id for t in outcome.kept.tracks), key=order.index
    )
    assert len(outcome.kept.tracks) + len(outcome.dropped) == len(video.tracks)


@settings(max_examples=40, deadline=None)
@given(st.lists(clips(), max_size=3), st.sampled_from([None, 0.4]))
def test_every_cell_of_a_sweep_equals_a_filter_run(
    videos: list[VideoTracks], overlap: float | None
) -> None:
    cells = sweep(videos, [0, 1, 3], [0.0, 0.2, 0.5], overlap)
    assert all(cell.quality == 0 for cell in cells)
    assert [(c.topk, c.pscore) for c in cells][:4] == [(0, 0.0), (0, 0.2), (0, 0.5), (1, 0.0)]
    for cell in cells:
        rule = FilterRule(cell.topk, cell.pscore, overlap)
        left = [filter_tracks(video, rule).kept.tracks for video in videos]
        assert cell.tracks == sum(map(len, left))
        assert cell.videos == sum(map(bool, left))
        assert cell.categories == len({t.category_id for tracks in left for t in tracks})


@settings(max_examples=40, deadline=None)
@given(clips(), st.data(), st.integers(0, 3), st.sampled_from([0.0, 0.2]))
def test_quality_is_asked_before_the_places_are_given(
    video: VideoTracks, data: st.DataObject, topk: int, pscore: float
) -> None:
    shares = st.sampled_from([0.0, 0.3, 0.5, 1.0])
    video = video.with_tracks(tuple(replace(t, quality=data.draw(shares)) for t in video.tracks))
    rule = FilterRule(topk, pscore, keep_ignored=True, quality=0.5)
    outcome = filter_tracks(video, rule)
    good = video.with_tracks(tuple(t for t in video.tracks if (t.quality or 0.0) >= 0.5))
    assert outcome.kept.tracks == filter_tracks(good, FilterRule(topk, pscore)).kept.tracks
    for entry in outcome.dropped:
        if entry.rule == "quality":
            assert entry.track.score >= pscore
            assert (entry.track.quality or 0.0) < 0.5
    (cell,) = sweep([video], [topk], [pscore], qualities=[0.5])
    assert (cell.quality, cell.tracks) == (0.5, len(outcome.kept.tracks))
    assert rule.as_json()["quality"] == 0.5


def test_a_track_without_quality_is_refused_only_where_it_is_asked_for() -> None:
    video = clip(replace(track(1, 0.9), quality=0.9), track(7, 0.1))
    assert kept(video, FilterRule(quality=0.0)) == [1, 7]
    with pytest.raises(DataError, match="track 7 has no quality to filter by"):
        filter_tracks(video, FilterRule(pscore=0.5, quality=0.1))
    with pytest.raises(DataError, match="track 7 has no quality"):
        sweep([video], [0], [0.5], qualities=[0.0, 0.1])
    with pytest.raises(UsageError, match=r"quality is 1.5, expected"):
        FilterRule(quality=1.5)


@pytest.mark.parametrize(
    "numbers",
    [(-1, 0.0, None), (0, 1.1, None), (0, -0.1, None), (0, 0.0, 2.0), (0, float("nan"), None)],
)
def test_rules_out_of_range(numbers: tuple[int, float, float | None]) -> None:
    with pytest.raises(UsageError, match="expected"):
        FilterRule(*numbers)
