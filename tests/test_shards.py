"""Who does what, when all have finished, and that shards join to the file of one process."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmvis_core.errors import DataError, UsageError
from pmvis_core.inference.shards import Launch, is_finished, merge_shards
from pmvis_core.tracks_io import TracksHeader, TracksWriter
from pmvis_core.types import Category, Track, VideoInfo, VideoTracks

HEADER = TracksHeader((Category(1, "fox"),)).extended("infer", weights="0")


def write(path, numbers, header=HEADER):
    with TracksWriter(path, header) as out:
        for number in numbers:
            track = Track(1, 1, 0.5, (0.5, None), (None, None))
            out.write(VideoTracks(VideoInfo(number, f"v{number}", 4, 4, 2), (track,)))
    return path


@given(videos=st.integers(0, 9), shards=st.integers(1, 5))
def test_shards_join_to_the_whole(tmp_path_factory, videos, shards):
    folder = tmp_path_factory.mktemp("shards")
    numbers = list(range(1, videos + 1))
    parts = [write(folder / f"{i}.tracks.jsonl", numbers[i::shards]) for i in range(shards)]
    merge_shards(parts, folder / "joined.tracks.jsonl")
    whole = write(folder / "whole.tracks.jsonl", numbers)
    assert (folder / "joined.tracks.jsonl").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("numbers", [([1], [2, 3]), ([1, 2, 3], [4]), ([], [1])])
def test_what_are_no_shards_in_order(tmp_path, numbers):
    parts = [write(tmp_path / f"{i}.tracks.jsonl", part) for i, part in enumerate(numbers)]
    with pytest.raises(DataError, match="more videos than its place"):
        merge_shards(parts, tmp_path / "x.tracks.jsonl")
    assert not (tmp_path / "x.tracks.jsonl").exists()


def test_shards_of_two_runs_do_not_join(tmp_path):
    other = write(tmp_path / "b.tracks.jsonl", [2], HEADER.extended("infer", weights="1"))
    with pytest.raises(DataError, match="other inputs or options"):
        merge_shards([write(tmp_path / "a.tracks.jsonl", [1]), other], tmp_path / "x.tracks.jsonl")


def test_a_shard_that_was_cut_does_not_join(tmp_path):
    cut = write(tmp_path / "a.tracks.jsonl", [1, 2])
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(DataError):
        merge_shards([cut], tmp_path / "x.tracks.jsonl")


def test_a_process_reads_its_number_from_the_environment():
    launch = Launch.of({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (launch.rank, launch.world, launch.local_rank) == (5, 8, 1)
    assert launch.part(Path("a/raw.tracks.jsonl.gz")) == Path("a/raw.6-of-8.tracks.jsonl.gz")
    alone = Launch.of({})
    assert (alone.rank, alone.world, alone.part(Path("x"))) == (0, 1, Path("x"))


@pytest.mark.parametrize("rank", ["2", "-1", "x"])
def test_what_is_no_number_of_a_process(rank):
    with pytest.raises(UsageError, match="RANK"):
        Launch.of({"RANK": rank, "WORLD_SIZE": "2"})


def test_the_first_process_waits_for_files_of_this_launch(tmp_path):
    launch = Launch(0, 2, 0, time.time())
    out = tmp_path / "x.tracks.jsonl"
    mine, other = (write(part, []) for part in launch.parts(out))
    os.utime(other, (0, 0))
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            assert is_finished(other, HEADER)

    assert launch.wait(out, nap) == [mine, other]
    assert len(naps) == 3


def test_only_a_file_with_the_same_options_is_finished(tmp_path):
    part = write(tmp_path / "x.tracks.jsonl", [1])
    assert is_finished(part, HEADER)
    assert not is_finished(part, HEADER.extended("infer"))
    assert not is_finished(tmp_path / "none", HEADER)
