"""Who is held out, how far two labellings agree, and which round wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmvis_core import masks
from pmvis_core.self_train import (
    adopt,
    agreement,
    best_round,
    consistency,
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


def test_consistency_reads_held_out_videos_only(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", {1: [track(1, 0), track(2, 8)], 2: [track(1, 0)], 3: []})
    kept = write(tmp_path / "kept", {1: [track(1, 2)], 2: [track(1, 12)], 3: []})
    before = write(tmp_path / "before", {1: [track(9, 0)], 2: [], 3: []})
    found = consistency(raw, kept, before, {1, 3})
    assert found.own == pytest.approx(1 / 3)
    assert found.kept_on == 1.0
    assert found.mean == pytest.approx(2 / 3)
    nothing = consistency(raw, kept, before, {3})
    assert (nothing.own, nothing.kept_on) == (0.0, 0.0)


def test_the_part_to_learn_from_is_the_rest(tmp_path: Path) -> None:
    kept = write(tmp_path / "kept", {1: [track(1, 0)], 2: [track(1, 1), track(2, 5)], 3: []})
    assert write_part(kept, tmp_path / "learn", {1}) == 2
    assert [video.video.id for video in read_tracks(tmp_path / "learn")] == [2, 3]


def test_stop_and_choice() -> None:
    assert not should_stop([])
    assert not should_stop([0.0])
    assert not should_stop([0.3, 0.4])
    assert should_stop([0.3, 0.3])
    assert should_stop([0.5, 0.4])
    assert best_round([0.3, 0.5, 0.5, 0.4]) == 2


def test_adopting_a_run_copies_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("model.safetensors", "config.toml", "state.pt"):
        (run / name).write_text(name)
    adopt(run, tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "model.safetensors"
    assert (tmp_path / "config.toml").exists()
    assert not (tmp_path / "state.pt").exists()
