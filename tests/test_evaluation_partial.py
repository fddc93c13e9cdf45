"""Partial evaluations: any split of the videos merges to the bits of one run, or is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from pmvis_core.errors import DataError, UsageError
from pmvis_core.evaluation.average_precision import evaluate
from pmvis_core.evaluation.curves import accumulate
from pmvis_core.evaluation.matches import Matches
from pmvis_core.evaluation.partial import (
    Part,
    load_part,
    merge,
    save_part,
    videos_of_shard,
)
from tests.evaluation_data import (
    CATEGORIES,
    VIDEOS,
    dataset,
    random_matches,
    random_tracks,
)


def part_of(matches: Matches, videos: list[int], index: int, count: int, **changes: Any) -> Part:
    """Return the part of a shard."""
    mine = videos_of_shard(videos, index, count)
    kept = matches.of_videos(mine.tolist())
    return replace(Part("ytvis", "t", "p", (index, count), CATEGORIES, mine, kept), **changes)


def same_bits(one: Any, other: Any) -> bool:
    """Tell whether two arrays are the same to the bit."""
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )


def assert_same(one: Matches, other: Matches) -> None:
    """Check every column, and every curve made of them."""
    for column in fields(Matches):
        if column.name != "groups":
            assert same_bits(getattr(one, column.name), getattr(other, column.name)), column.name
    assert one.groups == other.groups
    first, second = accumulate(CATEGORIES, one), accumulate(CATEGORIES, other)
    for name in ("precision", "recall", "scores"):
        assert same_bits(getattr(first, name), getattr(second, name)), name
    assert first.summary == second.summary


@given(
    seed=st.integers(0, 2**32 - 1),
    ids=st.sets(st.integers(0, 2**40), max_size=9),
    count=st.integers(1, 5),
    protocol=st.sampled_from(["ytvis", "ovis"]),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=30, deadline=None)
def test_shards_merge_to_the_bits_of_the_whole(
    seed: int, ids: set[int], count: int, protocol: str, order: Any
) -> None:
    videos = list(ids)
    whole = random_matches(np.random.default_rng(seed), videos, protocol)
    with TemporaryDirectory() as folder:
        paths = []
        for index in range(1, count + 1):
            paths.append(Path(folder) / f"{index}.part")
            save_part(paths[-1], part_of(whole, videos, index, count, protocol=protocol))
        order.shuffle(paths)
        merged = merge([load_part(path) for path in paths])
    assert_same(merged.matches, whole)
    assert merged.videos.tolist() == sorted(videos)
    assert (merged.shard, merged.protocol, merged.categories) == ((1, 1), protocol, CATEGORIES)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_each_job_may_evaluate_its_videos_alone(seed: int) -> None:
    """What a job finds in its own videos is what the whole run finds there."""
    rng = np.random.default_rng(seed)
    gts, dts = random_tracks(rng, 6, scored=False), random_tracks(rng, 9, scored=True)
    whole = evaluate(dataset(*gts), dts).matches
    ids = [video.id for video in VIDEOS]
    parts = []
    for index in (1, 2):
        mine = set(videos_of_shard(ids, index, 2).tolist())
        truth = dataset(*(gt for gt in gts if gt.video_id in mine))
        found = evaluate(truth, [dt for dt in dts if dt.video_id in mine]).matches
        parts.append(replace(part_of(whole, ids, index, 2), matches=found))
    assert_same(merge(parts).matches, whole)


@given(ids=st.lists(st.integers(0, 10**6), max_size=40), count=st.integers(1, 9))
def test_shards_cover_every_video_once_and_evenly(ids: list[int], count: int) -> None:
    shards = [videos_of_shard(ids, index, count).tolist() for index in range(1, count + 1)]
    assert sorted(number for shard in shards for number in shard) == sorted(set(ids))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert shards[0] == videos_of_shard(reversed(ids), 1, count).tolist()


@pytest.mark.parametrize(("index", "count"), [(0, 3), (4, 3), (1, 0)])
def test_a_shard_that_cannot_be_is_a_usage_error(index: int, count: int) -> None:
    with pytest.raises(UsageError, match=f"shard {index}/{count}"):
        videos_of_shard([1, 2], index, count)


@pytest.fixture
def parts() -> list[Part]:
    """Return the three shards of one run."""
    videos = [7, 3, 9, 4]
    whole = random_matches(np.random.default_rng(0), videos)
    return [part_of(whole, videos, index, 3) for index in (1, 2, 3)]


def test_a_file_is_the_same_each_time_and_opens_with_readable_json(
    parts: list[Part], tmp_path: Path
) -> None:
    part = replace(parts[1], doubts={"odd ids": ["a", "b", "a"]})
    for name in "ab":
        save_part(tmp_path / name, part)
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["pmvis_evaluation"])
    assert about == {
        "version": 1,
        "protocol": "ytvis",
        "truth": "t",
        "predictions": "p",
        "shard": [2, 3],
        "categories": [[1, "cat"], [4, "dog"]],
        "doubts": [["odd ids", ["a", "b"]]],
    }
    assert not list(tmp_path.glob("*.part"))


def test_doubts_are_joined(parts: list[Part]) -> None:
    told = [{"odd": ("x",)}, {}, {"odd": ("y", "x"), "strange": ()}]
    found = merge([replace(p, doubts=d) for p, d in zip(parts, told, strict=True)]).doubts
    assert found == {"odd": ("x", "y"), "strange": ()}
    assert merge(parts).doubts == {}


Change = Callable[[list[Part]], list[Part]]
NOT_ONE_RUN: dict[str, Change] = {
    "shard 2/3 is missing: 2 of 3 parts": lambda parts: [parts[2], parts[0]],
    "shard 1/3, 3/3 is missing": lambda parts: parts[1:2],
    "`b` and shard 2/3 are both shard 2/3|shard 2/3 and `b` are both": lambda parts: [
        *parts,
        replace(parts[1], name="`b`"),
    ],
    "shard 3/3 was made with another ground truth than shard 1/3": lambda parts: [
        *parts[:2],
        replace(parts[2], truth="other"),
    ],
    "another predictions than": lambda parts: [*parts[:2], replace(parts[2], predictions="x")],
    "another protocol than": lambda parts: [*parts[:2], replace(parts[2], protocol="ovis")],
    "another categories than": lambda parts: [
        *parts[:2],
        replace(parts[2], categories=CATEGORIES[:1]),
    ],
    "runs in 2 and 3 shards": lambda parts: [*parts[:2], replace(parts[2], shard=(2, 2))],
    "video 3 is in more than one part": lambda parts: [
        *parts[:2],
        replace(parts[2], videos=np.array([3])),
    ],
    "no partial evaluation to merge": lambda parts: [],
}  # fmt: skip


@pytest.mark.parametrize("text", NOT_ONE_RUN)
def test_only_the_shards_of_one_run_merge(text: str, parts: list[Part]) -> None:
    with pytest.raises(DataError, match=text):
        merge(NOT_ONE_RUN[text](parts))


def test_other_files_are_refused_with_their_name(tmp_path: Path) -> None:
    path = tmp_path / "x.part"
    with pytest.raises(DataError, match="does not exist"):
        load_part(path)
    path.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(DataError, match=r"x\.part` is no partial evaluation: not a safetensors"):
        load_part(path)
    path.write_bytes(save({"a": np.zeros(3)}))
    with pytest.raises(DataError, match="safetensors of something else"):
        load_part(path)


def changed(data: bytes, header: dict[str, Any], arrays: dict[str, Any]) -> bytes:
    """Return a saved part with other values in its header or of its arrays (None takes one out)."""
    (length,) = struct.unpack("<Q", data[:8])
    about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["pmvis_evaluation"])
    columns = {k: v for k, v in {**load(data), **arrays}.items() if v is not None}
    return save(columns, {"pmvis_evaluation": json.dumps({**about, **header})})


@pytest.mark.parametrize(
    ("header", "arrays", "text"),
    [
        ({"version": 2}, {}, "is of version 2, this pmvis reads 1"),
        ({"version": None}, {}, "is of version None"),
        ({"protocol": "coco"}, {}, "header is damaged"),
        ({"protocol": "ovis"}, {}, "`matches` is int64"),
        ({"shard": [4, 3]}, {}, "header is damaged"),
        ({"shard": [1.5, 3]}, {}, "header is damaged"),
        ({"shard": 3}, {}, "header is damaged"),
        ({"categories": [[1]]}, {}, "header is damaged"),
        ({"categories": [["1", "cat"]]}, {}, "header is damaged"),
        ({"doubts": [["odd", [3]]]}, {}, "header is damaged"),
        ({"truth": None}, {}, "header is damaged"),
        ({}, {"ious": None}, "lacks `ious`"),
        ({}, {"ious": np.zeros(())}, "lacks `ious`"),
        ({}, {"ious": np.zeros(1000)}, "`iou_starts` does not fit"),
        ({}, {"scores": np.zeros(1)}, "expected"),
        ({}, {"scores": None, "videos": None}, "lacks `scores`"),
        ({}, {"videos": np.zeros(0, np.int64)}, "videos that it does not list"),
        ({}, {"comparable": np.zeros(1, np.int8)}, "`comparable` is int8"),
    ],
)
def test_a_file_that_does_not_hold_together_is_refused(
    header: dict[str, Any], arrays: dict[str, Any], text: str, parts: list[Part], tmp_path: Path
) -> None:
    path = tmp_path / "x.part"
    save_part(path, parts[0])
    path.write_bytes(changed(path.read_bytes(), header, arrays))
    with pytest.raises(DataError, match=text):
        load_part(path)


@given(steps=st.lists(st.integers(-2, 2), max_size=3))
@settings(max_examples=30, deadline=None)
def test_starts_that_lead_outside_are_refused(steps: list[int]) -> None:
    whole = random_matches(np.random.default_rng(3), [1, 2])
    moved = whole.starts.copy()
    for place, step in enumerate(steps):
        moved[place] += step
    part = replace(part_of(whole, [1, 2], 1, 1), matches=replace(whole, starts=moved))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        save_part(path, part)
        try:
            starts = load_part(path).matches.starts
        except DataError as error:
            assert "starts` does not fit its column" in error.message
            assert not (moved == whole.starts).all()
            return
        assert starts.min() == 0 and starts.max() == len(whole.scores)
        assert (np.diff(starts) >= 0).all()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damage_is_an_error_or_another_value_but_never_a_crash(data: st.DataObject) -> None:
    whole = random_matches(np.random.default_rng(3), [1, 2])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        save_part(path, part_of(whole, [1, 2], 1, 1))
        content = bytearray(path.read_bytes())
        if data.draw(st.booleans()):
            del content[data.draw(st.integers(0, len(content) - 1)) :]
            path.write_bytes(content)
            with pytest.raises(DataError):
                load_part(path)
            return
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        try:
            part = load_part(path)
        except DataError:
            return
        assert len(part.matches.scores) == len(whole.scores)
