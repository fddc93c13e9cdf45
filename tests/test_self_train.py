"""Who is held out, how far two labellings agree, and which round wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import sem

from pmvis_core import masks
from pmvis_core.filter import FilterRule
from pmvis_core.self_train import (
    Judge,
    adopt,
    agreement,
    best_round,
    count_tracks,
    held_out,
    should_stop,
    write_part,
)
from pmvis_core.tracks_io import TracksHeader, TracksWriter, read_tracks
from pmvis_core.types import Category, Track, VideoInfo, VideoTracks

HEADER = TracksHeader((Category(1, "fox"), Category(2, "owl")))


def track(number: int, x: int, category: int = 1) -> Track:
    """Return a track of a 4 by 4 square in two frames of 8 by 16 pixels."""
    mask = np.zeros((8, 16), np.uint8)
    mask[2:6, x : x + 4] = 1
    return Track(number, category, 0.5, (0.5, 0.5), (masks.encode(mask),) * 2)


def rated(track: Track, score: float, quality: float) -> Track:
    return replace(track, score=score, quality=quality)


def write(path: Path, videos: dict[int, Sequence[Track]]) -> Path:
    with TracksWriter(path, HEADER) as out:
        for number, tracks in videos.items():
            out.write(VideoTracks(VideoInfo(number, f"v{number}", 8, 16, 2), tuple(tracks)))
    return path


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10**6), unique=True, max_size=40), st.floats(0.0, 0.99))
def test_held_out_videos_depend_on_ids_alone_and_leave_some(ids: list[int], share: float) -> None:
    held = held_out(ids, share)
    assert held == held_out(reversed(ids), share)
    assert held <= set(ids)
    assert len(held) < len(ids) or not ids
    assert bool(held) == (share > 0 and len(ids) > 1)
    assert len(held) <= share * len(ids) + 1


def test_more_share_holds_the_same_videos_and_others() -> None:
    assert held_out(range(50), 0.1) < held_out(range(50), 0.3)


def test_agreement() -> None:
    a, near, other = track(1, 0), track(2, 2), track(3, 10)
    assert agreement([([a, other], [a, other])]) == 1.0
    assert agreement([([a], [near])]) == pytest.approx(1 / 3)
    assert agreement([([a], [replace(a, category_id=2)])]) == 0.0
    assert agreement([([a, other], [a])]) == pytest.approx(2 / 3)
    assert agreement([([], [a]), ([other], [])]) == 0.0
    assert agreement([([], [])]) == agreement([]) == 0.0
    # the better pair goes first, and nothing is matched twice
    assert agreement([([near, a], [a])]) == pytest.approx(2 / 3)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_agreement_is_symmetric_and_a_share(data: st.DataObject) -> None:
    rows = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 2)), max_size=4)
    first, second = ([track(i, x, c) for i, (x, c) in enumerate(data.draw(rows))] for _ in range(2))
    value = agreement([(first, second)])
    assert 0.0 <= value <= 1.0
    assert agreement([(first, first)]) == pytest.approx(float(bool(first)))
    if len({t.rles[0]["counts"] for t in (*first, *second) if t.rles[0]}) == len(first + second):
        assert value == pytest.approx(agreement([(second, first)]))


def test_consistency_is_of_the_best_labels_of_held_out_videos(tmp_path: Path) -> None:
    kept = write(tmp_path / "kept", {1: [track(1, 0), track(2, 8)], 2: [track(1, 0)], 3: []})
    judge = replace(Judge.of(kept, 0.0, FilterRule(2, overlap=0.5)), held=frozenset({1, 3}))
    judge = replace(judge, labels=3)
    rows = [
        rated(track(1, 0), 0.9, 0.8),
        rated(track(2, 1), 0.8, 1.0),  # lies on the first by more than half
        rated(track(3, 8), 0.7, 0.6),
        rated(track(4, 12), 0.6, 1.0),  # the third of its video
    ]
    last = [rated(track(1, 0), 0.1, 0.7)]
    refined = write(tmp_path / "refined", {1: rows, 2: [rated(track(1, 0), 1.0, 0.0)], 3: last})
    assert judge.consistency(refined) == pytest.approx((0.8 + 0.6 + 0.7) / 3)
    assert replace(judge, labels=2).consistency(refined) == pytest.approx((0.8 + 0.6) / 2)
    assert replace(judge, labels=6).consistency(refined) == pytest.approx((0.8 + 0.6 + 0.7) / 6)
    assert replace(judge, labels=0).consistency(refined) == 0.0


def test_noise_is_the_error_of_the_gain(tmp_path: Path) -> None:
    first, second = [0.2, 0.5, 0.9, 0.4], [0.6, 0.5, 0.8, 0.9]
    paths = [
        write(tmp_path / name, {i: [rated(track(1, 0), 0.5, q)] for i, q in enumerate(values)})
        for name, values in (("first", first), ("second", second))
    ]
    judge = Judge(frozenset(range(4)), FilterRule(), 4)
    assert judge.noise(*paths) == pytest.approx(sem(np.subtract(second, first)))
    assert replace(judge, held=frozenset([1])).noise(*paths) == 0.0


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_neither_scores_nor_further_labels_make_a_round_more_consistent(
    data: st.DataObject,
) -> None:
    numbers = st.tuples(st.floats(0.1, 1.0), st.floats(0.0, 1.0))
    drawn = data.draw(st.lists(numbers, min_size=1, max_size=6))
    rows = [rated(track(i, 0), score, quality) for i, (score, quality) in enumerate(drawn)]
    worse = rated(track(99, 0), 0.05, data.draw(st.floats(0.0, 1.0)))
    judge = Judge(frozenset({1}), FilterRule(), len(rows))
    with TemporaryDirectory() as folder:
        refined = write(Path(folder) / "a", {1: rows})
        louder = write(Path(folder) / "b", {1: [replace(t, score=t.score**0.5) for t in rows]})
        more = write(Path(folder) / "c", {1: [*rows, worse]})
        value = judge.consistency(refined)
        assert judge.consistency(louder) == judge.consistency(more) == value
    assert value == pytest.approx(np.mean([quality for _, quality in drawn]))


def test_a_judge_counts_the_labels_that_were_kept(tmp_path: Path) -> None:
    tracks = [track(1, 0), track(2, 8)]
    kept = write(tmp_path / "kept", {i: tracks[: i % 3] for i in range(20)})
    judge = Judge.of(kept, 0.3, FilterRule(4))
    assert judge.held == held_out(range(20), 0.3)
    assert judge.labels == sum(i % 3 for i in judge.held)
    assert Judge.of(kept, 0.0, FilterRule(4)).labels == 0


def test_agreement_of_files_is_that_of_held_out_videos(tmp_path: Path) -> None:
    before = write(tmp_path / "before", {1: [track(9, 0)], 2: [], 3: []})
    kept = write(tmp_path / "kept", {1: [track(1, 2)], 2: [track(1, 12)], 3: []})
    some = Judge(frozenset({1, 3}), FilterRule(), 1)
    assert some.agreement(before, kept) == pytest.approx(1 / 3)
    everything = Judge(frozenset(), FilterRule(), 0)
    assert everything.agreement(before, kept) == pytest.approx(2 / 9)


def test_the_part_to_learn_from_is_the_rest(tmp_path: Path) -> None:
    kept = write(tmp_path / "kept", {1: [track(1, 0)], 2: [track(1, 1), track(2, 5)], 3: []})
    write_part(kept, tmp_path / "learn", {1})
    assert [video.video.id for video in read_tracks(tmp_path / "learn")] == [2, 3]
    assert (count_tracks(kept), count_tracks(tmp_path / "learn")) == (3, 2)


def test_stop_and_choice() -> None:
    assert not should_stop([])
    assert not should_stop([(0.1, 0.0)])
    assert should_stop([(0.0, 0.0)])
    assert should_stop([(-0.1, 0.0)])
    assert should_stop([(0.1, 0.2)])
    assert not should_stop([(-0.1, 0.0)], 2)
    assert not should_stop([(-0.1, 0.0), (0.1, 0.05), (-0.1, 0.0)], 2)
    assert should_stop([(0.1, 0.05), (-0.1, 0.0), (0.1, 0.2)], 2)
    assert best_round([0.3, 0.5, 0.5, 0.4]) == 1
    assert best_round([0.5, 0.4]) == 0


def test_adopting_a_run_copies_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("model.safetensors", "config.toml", "state.pt"):
        (run / name).write_text(name)
    adopt(run, tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "model.safetensors"
    assert (tmp_path / "config.toml").exists()
    assert not (tmp_path / "state.pt").exists()
    (run / "config.toml").unlink()
    adopt(run, tmp_path)
    assert not (tmp_path / "config.toml").exists()
