"""The paired bootstrap against one that really copies videos, and its corner cases."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmvis_core.errors import DataError
from pmvis_core.evaluation.average_precision import evaluate
from pmvis_core.evaluation.compare import (
    COMPARED,
    Comparison,
    compare,
    comparison_json,
    comparison_table,
)
from pmvis_core.evaluation.curves import accumulate
from pmvis_core.evaluation.matches import Matches
from pmvis_core.evaluation.protocol import groups_of
from tests.evaluation_data import CATEGORIES, dataset, random_matches, random_tracks, track

SQUARE = [(2, 2, 12, 12)] * 4


def other_predictions(rng: np.random.Generator, matches: Matches) -> Matches:
    """Return the same pairs under other predictions."""
    pairs = []
    for pair in matches:
        order = rng.permutation(len(pair.scores))
        pairs.append(
            pair._replace(
                scores=-np.sort(-rng.random(len(order))), matches=pair.matches[order], rows=order
            )
        )
    return Matches.of_pairs(pairs, matches.groups)


def by_copying(matches: Matches, draw: list[int]) -> list[float]:
    """Return the compared numbers of drawn videos, each copy standing as a video of its own."""
    copies = [
        pair._replace(video_id=place)
        for place, video in enumerate(draw)
        for pair in matches
        if pair.video_id == video
    ]
    summary = accumulate(CATEGORIES, Matches.of_pairs(copies, matches.groups)).summary
    return [np.nan if summary[name] is None else summary[name] for name in COMPARED]


@given(seed=st.integers(0, 2**32 - 1), protocol=st.sampled_from(["ytvis", "ovis"]))
@settings(max_examples=15, deadline=None)
def test_weights_are_copies_of_videos(seed: int, protocol: str) -> None:
    rng = np.random.default_rng(seed)
    videos = [5, 2, 9, 4]
    first = random_matches(rng, videos, protocol)
    second = other_predictions(rng, first)
    found = compare(first, second, CATEGORIES, videos, samples=6, seed=3)

    draws = np.random.default_rng(3)
    drawn = [np.sort(videos)[draws.integers(0, 4, 4)].tolist() for _ in range(6)]
    values = np.array([[by_copying(side, draw) for side in (first, second)] for draw in drawn])
    counted = values[~np.isnan(values).any(axis=(1, 2))]
    assert found.samples == len(counted)
    assert found.videos == 4
    for n, row in enumerate(found.rows):
        stated = [accumulate(CATEGORIES, side).summary[row.name] for side in (first, second)]
        assert [row.first, row.second] == stated
        if row.low is None or row.high is None:
            assert stated[0] is None or not len(counted)
            continue
        gaps = counted[:, 0, n] - counted[:, 1, n]
        # Copies of a prediction fare alike, so weights and copies draw the same curve.
        assert row.low == pytest.approx(np.quantile(gaps, 0.025), abs=1e-12)
        assert row.high == pytest.approx(np.quantile(gaps, 0.975), abs=1e-12)


@pytest.fixture
def sides() -> tuple[Matches, Matches]:
    """Return two evaluations of the same videos."""
    rng = np.random.default_rng(5)
    first = random_matches(rng, list(range(12)))
    return first, other_predictions(rng, first)


def test_the_seed_decides(sides: tuple[Matches, Matches]) -> None:
    runs = [compare(*sides, CATEGORIES, range(12), samples=20, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0].rows != runs[2].rows


def test_exchanging_the_sides_turns_the_answer_round(sides: tuple[Matches, Matches]) -> None:
    there = compare(*sides, CATEGORIES, range(12), samples=20)
    back = compare(*sides[::-1], CATEGORIES, range(12), samples=20)
    for one, other in zip(there.rows, back.rows, strict=True):
        assert one.difference == -(other.difference or 0.0)
        assert (one.better, one.worse) == (other.worse, other.better)
        assert one.low == pytest.approx(-(other.high or 0.0), abs=1e-15)


def test_an_evaluation_is_no_better_than_itself(sides: tuple[Matches, Matches]) -> None:
    for row in compare(sides[0], sides[0], CATEGORIES, range(12), samples=10).rows:
        assert (row.difference, row.low, row.high, row.better, row.worse) == (0, 0, 0, 0, 0)


def test_videos_without_tracks_are_drawn_too() -> None:
    """With one object in one of many videos most draws hold nothing that could be compared."""
    truth = dataset(track(1, SQUARE))
    good = evaluate(truth, [track(1, SQUARE, score=0.5)]).matches
    bad = evaluate(truth, []).matches
    found = compare(good, bad, CATEGORIES, [1, 2], samples=400)
    assert found.videos == 2
    assert found.samples == pytest.approx(300, abs=40)
    assert all(row.better == 1.0 and row.worse == 0.0 for row in found.rows)
    alone = compare(good, bad, CATEGORIES, [1], samples=10)
    assert (alone.samples, alone.rows[0].low) == (10, pytest.approx(1.0))


def test_what_has_no_value_is_none() -> None:
    nothing = evaluate(dataset(), []).matches
    row = compare(nothing, nothing, CATEGORIES, [1, 2], samples=3).rows[0]
    assert (row.first, row.difference, row.low, row.better) == (None,) * 4
    truth = dataset(track(1, SQUARE))
    found = evaluate(truth, [track(1, SQUARE, score=1.0)]).matches
    bare = compare(found, found, CATEGORIES, [1, 2], samples=0).rows[0]
    assert (bare.difference, bare.low, bare.better) == (0.0, None, None)


def test_only_evaluations_of_one_ground_truth_are_compared() -> None:
    gts = random_tracks(np.random.default_rng(0), 4, scored=False)
    here = evaluate(dataset(*gts), []).matches
    fewer = evaluate(dataset(*gts[1:]), []).matches
    renamed = evaluate(dataset(*(replace(gt, id=gt.id + 9) for gt in gts)), []).matches
    crowds = evaluate(dataset(*(replace(gt, iscrowd=not gt.iscrowd) for gt in gts)), []).matches
    wider = replace(here, groups=groups_of("ovis"))
    for other in (fewer, renamed, crowds, wider):
        with pytest.raises(DataError, match="different ground truth"):
            compare(here, other, CATEGORIES, [1, 2], samples=1)
    with pytest.raises(DataError, match="video 2 was evaluated"):
        compare(here, here, CATEGORIES, [1], samples=1)


def test_table_and_json(sides: tuple[Matches, Matches]) -> None:
    found = compare(*sides, CATEGORIES, range(12), samples=20)
    lines = comparison_table(found).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == list(COMPARED)
    assert lines[-1].startswith(" 20 draws of 12 videos")
    assert len({line.index("]") for line in lines[1:5]}) == 1
    told = json.loads(json.dumps(comparison_json(found)))
    assert told["samples"] == 20
    assert told["rows"]["AP"]["difference"] == found.rows[0].difference
    empty = Comparison(tuple(replace(row, low=None, better=None) for row in found.rows), 1, 0, 0)
    assert " - " in comparison_table(empty).splitlines()[1]
