"""Tracks files: round trips, truncation, concatenation, resume, and one message for every fault."""

from __future__ import annotations

import copy
import gzip
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmvis_core import masks
from pmvis_core.errors import DataError, UsageError
from pmvis_core.tracks_io import (
    TracksHeader,
    TracksReader,
    TracksWriter,
    header_from_json,
    read_tracks,
    video_from_json,
    video_to_json,
)
from pmvis_core.types import Category, Supervision, Track, VideoInfo, VideoTracks

HEADER = TracksHeader((Category(1, "fox"), Category(7, "giant_panda")), ({"stage": "infer"},))
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
SHARES = st.floats(0.0, 1.0)


@st.composite
def tracks(draw: st.DrawFn, number: int, info: VideoInfo) -> Track:
    """Draw a track of a video."""
    bits = st.integers(0, 2 ** (info.height * info.width) - 1)
    rles = []
    for _ in range(info.length):
        pattern = draw(st.none() | bits)
        if pattern is None:
            rles.append(None)
            continue
        flat = [pattern >> i & 1 for i in range(info.height * info.width)]
        rles.append(masks.encode(np.array(flat, np.uint8).reshape(info.height, info.width)))
    return Track(
        id=number,
        category_id=draw(st.sampled_from([1, 7])),
        score=draw(SHARES),
        frame_scores=tuple(
            draw(st.lists(st.none() | SHARES, min_size=info.length, max_size=info.length))
        ),
        rles=tuple(rles),
        instance=draw(st.none() | st.integers(0, 9)),
        keyframe=draw(st.none() | st.integers(0, info.length - 1)),
        supervision=draw(st.sampled_from(Supervision)),
        lineage=draw(st.dictionaries(TEXT, TEXT, max_size=2)),
        quality=draw(st.none() | SHARES),
    )


@st.composite
def videos(draw: st.DrawFn, number: int = 1) -> VideoTracks:
    """Draw a video with tracks."""
    length = draw(st.integers(1, 3))
    info = VideoInfo(
        id=number,
        name=draw(TEXT),
        height=draw(st.integers(1, 4)),
        width=draw(st.integers(1, 4)),
        length=length,
        file_names=draw(st.sampled_from([(), tuple(f"{i}.jpg" for i in range(length))])),
    )
    kept = tuple(draw(tracks(i, info)) for i in range(draw(st.integers(0, 2))))
    ignored = tuple(draw(tracks(10 + i, info)) for i in range(draw(st.integers(0, 1))))
    return VideoTracks(info, kept, ignored)


def video(number: int, name: str = "clip", score: float = 0.5) -> VideoTracks:
    """Return a video of three frames with one track."""
    mask = np.zeros((6, 8), np.uint8)
    mask[1:4, 2:6] = 1
    info = VideoInfo(number, name, 6, 8, 3, ("a.jpg", "b.jpg", "c.jpg"))
    rle = masks.encode(mask)
    track = Track(4, 7, score, (score, None, score), (rle, None, rle), instance=2, keyframe=0)
    return VideoTracks(info, (track,))


def write(path: Path, *content: VideoTracks, resume: bool = False) -> Path:
    """Write a whole file."""
    with TracksWriter(path, HEADER, resume=resume) as out:
        for entry in content:
            if entry.video.id not in out.done_ids:
                out.write(entry)
    return path


def interrupted(path: Path, *content: VideoTracks) -> Path:
    """Write videos and fail before the end; return the part file."""
    with pytest.raises(RuntimeError), TracksWriter(path, HEADER) as out:
        for entry in content:
            out.write(entry)
        raise RuntimeError
    return path.with_name(path.name + ".part")


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 3), st.sampled_from([".tracks.jsonl", ".tracks.jsonl.gz"]))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, count: int, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("round") / f"x{suffix}"
    content = [data.draw(videos(number)) for number in range(count)]
    write(path, *content)
    reader = read_tracks(path)
    assert reader.header == HEADER
    assert list(reader) == content
    first = path.read_bytes()
    write(path, *content)
    assert path.read_bytes() == first


def test_lines_are_videos_between_header_and_end(tmp_path: Path) -> None:
    lines = write(tmp_path / "x.tracks.jsonl", video(1), video(2)).read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[0])["categories"][1] == {"id": 7, "name": "giant_panda"}
    assert [json.loads(line)["video"]["id"] for line in lines[1:3]] == [1, 2]
    assert json.loads(lines[3])["end"] | {"digest": ""} == {"videos": 2, "tracks": 2, "digest": ""}


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_cut_is_noticed(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"x.tracks.jsonl{suffix}", video(1), video(2))
    data = path.read_bytes()
    whole = list(read_tracks(path))
    for length in range(0, len(data) - 1, 1 if suffix else 7):
        path.write_bytes(data[:length])
        try:
            seen = list(read_tracks(path))
        except DataError:
            continue
        # gzip's own trailer may be cut off once every line is out
        raise AssertionError(f"{length} of {len(data)} bytes passed as {len(seen)} videos")
    path.write_bytes(data)
    assert list(read_tracks(path)) == whole


def test_missing_end_record_names_count_and_next_command(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tracks.jsonl", video(1), video(2))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match="ended after 2 videos without its end record") as caught:
        list(read_tracks(path))
    assert "--resume" in str(caught.value.hint)


def test_an_edited_line_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tracks.jsonl", video(1, score=0.5))
    path.write_text(path.read_text().replace('"score":0.5', '"score":0.9'))
    with pytest.raises(DataError, match="digest"):
        list(read_tracks(path))


def test_files_concatenate(tmp_path: Path) -> None:
    one = write(tmp_path / "1.tracks.jsonl", video(1)).read_bytes()
    two = write(tmp_path / "2.tracks.jsonl", video(2), video(3)).read_bytes()
    both = tmp_path / "both.tracks.jsonl"
    both.write_bytes(one + two)
    assert [entry.video.id for entry in read_tracks(both)] == [1, 2, 3]


def test_packed_files_concatenate(tmp_path: Path) -> None:
    one = write(tmp_path / "1.tracks.jsonl.gz", video(1)).read_bytes()
    two = write(tmp_path / "2.tracks.jsonl.gz", video(2)).read_bytes()
    both = tmp_path / "both.tracks.jsonl.gz"
    both.write_bytes(one + two)
    assert [entry.video.id for entry in read_tracks(both)] == [1, 2]


def lines_of(*content: VideoTracks) -> tuple[str, list[str], str]:
    """Return header, video lines and end record of a file, as text."""
    stream = io.BytesIO()
    fake = io.TextIOWrapper(stream)
    real, sys.stdout = sys.stdout, fake
    try:
        write(Path("-"), *content)
    finally:
        sys.stdout = real
    lines = stream.getvalue().decode().splitlines(keepends=True)
    return lines[0], lines[1:-1], lines[-1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda h, v, e: h + v[0] + h + v[1] + e, "a header before the end record"),
        (lambda h, v, e: h + v[0] + v[1] + e + v[0], "a line after the end record"),
        (lambda h, v, e: h + v[0] + v[1] + e + e, "a second end record"),
        (lambda h, v, e: h + v[0] + e, "the end record says 2 videos"),
        (lambda h, v, e: h + v[0] + v[0] + e, "video id 1 occurs a second time"),
        (lambda h, v, e: h + v[0] + '{"end":3}\n', "the end record is 3"),
        (lambda h, v, e: h + v[0] + "7\n" + e, "a int, expected an object"),
        (lambda h, v, e: h + v[0] + "\n" + e, "not valid JSON"),
        (lambda h, v, e: h + v[0][:-20] + "\n" + e, "not valid JSON"),
        (lambda h, v, e: h + v[0] + v[1] + e + h.replace("fox", "cat"), "another vocabulary"),
        (lambda h, v, e: "", "is empty, expected a tracks file"),
        (lambda h, v, e: "\n", "is empty, expected a tracks file"),
        (lambda h, v, e: v[0] + e, "the first line is no tracks header"),
        (lambda h, v, e: "[1]\n", "the first line is no tracks header"),
        (lambda h, v, e: h.replace('"pmvis_tracks":1', '"pmvis_tracks":9'), "format version 9"),
    ],
)
def test_broken_sequences_of_lines(
    tmp_path: Path, build: Callable[[str, list[str], str], str], message: str
) -> None:
    path = tmp_path / "x.tracks.jsonl"
    path.write_text(build(*lines_of(video(1), video(2))))
    with pytest.raises(DataError, match=message) as caught:
        list(read_tracks(path))
    assert str(path) in caught.value.message


def test_a_cut_second_file_never_passes(tmp_path: Path) -> None:
    header, content, end = lines_of(video(1), video(2))
    path = tmp_path / "x.tracks.jsonl"
    path.write_text(header + "".join(content) + end + header)
    with pytest.raises(DataError, match="without its end record"):
        list(read_tracks(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": None}, "no list of categories"),
        ({"categories": [3]}, "no list of categories"),
        ({"categories": [{"id": "1", "name": "fox"}]}, "id is '1', expected an integer"),
        ({"categories": [{"id": True, "name": "fox"}]}, "id is True, expected an integer"),
        ({"categories": [{"id": 1}]}, "no `name`"),
        ({"categories": [{"id": 0, "name": "fox"}]}, "expected distinct positive"),
        ({"categories": [{"id": 2, "name": "a"}, {"id": 2, "name": "b"}]}, "distinct positive"),
        ({"lineage": 5}, "lineage is no list"),
        ({"lineage": ["infer"]}, "lineage is no list"),
    ],
)
def test_broken_headers(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        header_from_json({**HEADER.as_json(), **change}, "x.jsonl")


VIDEO_FAULTS = [
    ("id", "3", "id is '3', expected an integer"),
    ("id", [3], "expected an integer"),
    ("name", None, "name is None, expected text"),
    ("height", 0, "expected positive numbers"),
    ("width", 8.0, "width is 8.0, expected an integer"),
    ("length", -1, "expected positive numbers"),
    ("file_names", "abc", "expected a list"),
    ("file_names", ["a.jpg"], "1 file names, 3 frames"),
    ("file_names", [1, 2, 3], "a file name is no text"),
]

TRACK_FAULTS = [
    ("id", None, "id is None"),
    ("category_id", 2, "category id 2, not in the vocabulary"),
    ("category_id", [7], "expected an integer"),
    ("score", None, "has score None"),
    ("score", "high", "has score 'high'"),
    ("score", True, "has score True"),
    ("score", 1.5, "has score 1.5"),
    ("score", -0.1, "has score -0.1"),
    ("score", float("nan"), "has score nan"),
    ("frame_scores", [0.5, None], "has 2 frame scores, the video has 3 frames"),
    ("frame_scores", {"0": 0.5}, "expected a list"),
    ("frame_scores", [0.5, None, float("inf")], "has score inf"),
    ("masks", [None, None], "has 2 masks, the video has 3 frames"),
    ("masks", [5, None, None], "neither a run-length text nor null"),
    ("masks", ["000", None, None], "frame 0"),
    ("masks", ["", None, None], "frame 0"),
    ("masks", ["é", None, None], "frame 0"),
    ("quality", 1.5, "has quality 1.5"),
    ("quality", True, "has quality True"),
    ("quality", "high", "has quality 'high'"),
    ("keyframe", 3, "key frame 3 of 3 frames"),
    ("keyframe", -1, "key frame -1"),
    ("keyframe", "0", "keyframe is '0'"),
    ("instance", 1.5, "instance is 1.5"),
    ("supervision", "guess", "supervision is `guess`"),
    ("supervision", None, "supervision is None"),
    ("lineage", [], "lineage is"),
]


@pytest.mark.parametrize(("key", "value", "message"), VIDEO_FAULTS)
def test_broken_videos(key: str, value: Any, message: str) -> None:
    record = video_to_json(video(1))
    record["video"][key] = value
    with pytest.raises(DataError, match=message):
        video_from_json(record, {1, 7}, "x.jsonl:2")


@pytest.mark.parametrize(("key", "value", "message"), TRACK_FAULTS)
@pytest.mark.parametrize("place", ["tracks", "ignored"])
def test_broken_tracks(key: str, value: Any, message: str, place: str) -> None:
    record = video_to_json(video(1))
    record["ignored"] = copy.deepcopy(record["tracks"])
    record["ignored"][0]["id"] = 5
    record[place][0][key] = value
    with pytest.raises(DataError, match=message) as caught:
        video_from_json(record, {1, 7}, "x.jsonl:2")
    assert "x.jsonl:2: video 1 `clip`" in caught.value.message


@pytest.mark.parametrize("key", ["video", "tracks"])
def test_a_video_without_a_field(key: str) -> None:
    record = video_to_json(video(1))
    del record[key]
    with pytest.raises(DataError, match=f"no `{key}`"):
        video_from_json(record, {1, 7}, "x.jsonl:2")


@pytest.mark.parametrize("value", [5, "tracks", {"a": 1}, [3], ["x"], [None]])
def test_tracks_of_another_type(value: Any) -> None:
    record = {**video_to_json(video(1)), "tracks": value}
    with pytest.raises(DataError, match="expected"):
        video_from_json(record, {1, 7}, "x.jsonl:2")


def test_track_ids_are_unique_in_a_video() -> None:
    record = video_to_json(video(1))
    record["ignored"] = record["tracks"]
    with pytest.raises(DataError, match="two tracks share an id"):
        video_from_json(record, {1, 7}, "x.jsonl:2")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_writer_refuses_what_no_reader_takes(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "x.tracks.jsonl"
    with pytest.raises(DataError, match="video 1 'clip' cannot be written"):
        write(path, video(1, score=bad))
    with pytest.raises(DataError, match="cannot be written"):
        write(path, video(1, name="\udcff"))
    assert not path.exists()


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("cut", [0, 1, 25, 300])
def test_resume_gives_the_bytes_of_an_undisturbed_run(
    tmp_path: Path, suffix: str, cut: int
) -> None:
    content = [video(number) for number in range(1, 6)]
    whole = write(tmp_path / f"a.tracks.jsonl{suffix}", *content).read_bytes()
    path = tmp_path / f"b.tracks.jsonl{suffix}"
    part = interrupted(path, *content[:3])
    assert not path.exists()
    data = part.read_bytes()
    part.write_bytes(data[: len(data) - cut])
    write(path, *content, resume=True)
    assert path.read_bytes() == whole
    assert not part.exists()


def test_resume_does_not_repeat_whole_videos(tmp_path: Path) -> None:
    path = tmp_path / "x.tracks.jsonl"
    interrupted(path, video(1), video(2))
    with TracksWriter(path, HEADER, resume=True) as out:
        assert out.done_ids == {1, 2}


def test_resume_drops_a_damaged_tail(tmp_path: Path) -> None:
    path = tmp_path / "x.tracks.jsonl"
    part = interrupted(path, video(1), video(2))
    part.write_bytes(part.read_bytes() + b"\0" * 64 + b'\n{"tracks":[]}\n')
    write(path, video(1), video(2), video(3), resume=True)
    assert [entry.video.id for entry in read_tracks(path)] == [1, 2, 3]


def test_resume_without_a_part_file_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.tracks.jsonl"
    write(path, video(1), resume=True)
    assert len(list(read_tracks(path))) == 1


def test_resume_refuses_another_header(tmp_path: Path) -> None:
    path = tmp_path / "x.tracks.jsonl"
    part = interrupted(path, video(1))
    before = part.read_bytes()
    other = replace(HEADER, lineage=({"stage": "infer", "seed": 1},))
    with pytest.raises(UsageError, match="other inputs or options"):
        TracksWriter(path, other, resume=True)
    assert part.read_bytes() == before


def test_without_resume_a_part_file_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.tracks.jsonl"
    interrupted(path, video(1), video(2))
    write(path, video(3))
    assert [entry.video.id for entry in read_tracks(path)] == [3]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_standard_input_may_be_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
) -> None:
    data = write(tmp_path / "x.tracks.jsonl", video(1)).read_bytes()
    stream = io.TextIOWrapper(io.BufferedReader(io.BytesIO(pack(data))))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stdin", stream)
    reader = TracksReader(Path("-"))
    assert reader.name == "standard input"
    assert [entry.video.id for entry in reader] == [1]


def test_damaged_packing_is_a_fault_of_the_data(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tracks.jsonl.gz", *(video(i) for i in range(40)))
    data = bytearray(path.read_bytes())
    for i in range(60, len(data) - 8):
        data[i] ^= 0x5A
    path.write_bytes(bytes(data))
    with pytest.raises(DataError):
        list(read_tracks(path))


@pytest.mark.parametrize(
    ("name", "message"), [("none.jsonl", "does not exist"), (".", "cannot be read")]
)
def test_files_that_cannot_be_opened(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_tracks(tmp_path / name)


def test_a_pickle_posing_as_tracks(tmp_path: Path) -> None:
    path = tmp_path / "x.tracks.jsonl"
    path.write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\n\xff\xfe.")
    with pytest.raises(DataError, match="not UTF-8"):
        read_tracks(path)
