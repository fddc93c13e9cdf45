"""Indexed videos: the draws and messages of eager reading, kept copies, texts left in files."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pmvis_core import masks
from pmvis_core.data.augment import SMALL_FRAMES
from pmvis_core.data.clips import Clips
from pmvis_core.data.datasets import PseudoVideos
from pmvis_core.errors import DataError
from pmvis_core.formats import tracks_index, tracks_tables
from pmvis_core.formats.tracks_index import TracksIndex, open_index
from pmvis_core.formats.ytvis import open_tracks
from pmvis_core.formats.ytvis_writer import as_dataset
from pmvis_core.tracks_io import TracksHeader, TracksWriter, read_tracks
from pmvis_core.types import RLE, Category, Supervision, Track, VideoInfo, VideoTracks
from pmvis_core.video.frames import FrameSource, find_frames
from tests.test_datasets import (
    CATEGORIES,
    HEIGHT,
    WIDTH,
    assert_equal_pairs,
    info,
    rectangle,
    track,
    write_image,
    write_videos,
)

HEADER = TracksHeader((Category(7, "dog"), Category(3, "cat")), ({"stage": "infer"},))


def random_track(number: int, length: int, rng: np.random.Generator, **fields: Any) -> Track:
    """Return a track with gaps, scores that tie, and now and then an instance of others."""
    low = rng.integers(0, 20, (length, 2))
    high = low + rng.integers(3, 20, (length, 2))
    rles: list[RLE | None] = [
        rectangle(int(x1), int(y1), int(x2), int(y2)) if rng.random() < 0.6 else None
        for (x1, y1), (x2, y2) in zip(low, high, strict=True)
    ]
    facts = {
        "category_id": int(rng.choice([3, 7])),
        "score": float(rng.choice([0.25, 0.5, 1.0])),
        "instance": None if rng.random() < 0.3 else int(rng.integers(3)),
        "supervision": Supervision.PSEUDO if rng.random() < 0.8 else Supervision.MASK,
    }
    return track(number, rles, **{**facts, **fields})


def random_videos(seed: int) -> list[VideoTracks]:
    """Return videos with kept, dropped and crowd tracks, their ids in no order."""
    rng = np.random.default_rng(seed)
    videos = []
    for number in (5, 2, 1 << 70, 4, 3):
        length = int(rng.integers(1, 6))
        ids = rng.permutation(9).tolist()
        ids[0] = 1 << 66  # ids are numbers of Python
        kept = [random_track(k, length, rng) for k in ids[: int(rng.integers(6))]]
        aside = [
            random_track(k, length, rng, lineage={"filter": "topk"} if rng.random() < 0.6 else {})
            for k in ids[6:]
        ]
        name = VideoInfo(number, f"vidéo {number}", HEIGHT, WIDTH, length, files(number, length))
        videos.append(VideoTracks(name, tuple(kept), tuple(aside)))
    return videos


def files(number: int, length: int) -> tuple[str, ...]:
    return tuple(f"vidéo {number}/{t}.png" for t in range(length))


def write_lines(folder: Path, videos: Sequence[VideoTracks], suffix: str = "") -> Path:
    path = folder / f"x.tracks.jsonl{suffix}"
    with TracksWriter(path, HEADER) as out:
        for video in videos:
            out.write(video)
    return path


def write_spaced_lines(folder: Path, videos: Sequence[VideoTracks]) -> Path:
    """Write lines that are not as we write them, their masks with escapes."""
    path = write_lines(folder, videos)
    _, *rows, _ = path.read_text().splitlines()
    lines = [json.dumps(json.loads(row), separators=(" , ", " : ")) for row in rows]
    lines = [row.replace('"masks"', '"\\u006dasks"').replace('"0', '"\\u0030') for row in lines]
    with TracksWriter(path, HEADER) as out:
        for row, video in zip(lines, videos, strict=True):
            out.write_pieces([row], lambda video=video: len(video.tracks))  # type: ignore[misc]
    return path


def write_object(folder: Path, videos: Sequence[VideoTracks], *keys: str, **how: Any) -> Path:
    """Write YouTube-VIS JSON with its sections in an order."""
    written = write_lines(folder, videos)
    document = as_dataset(read_tracks(written))
    written.unlink()
    document["annotations"].reverse()
    path = folder / "x.json"
    order = [*keys, *(key for key in document if key not in keys)]
    path.write_text(json.dumps({key: document[key] for key in order}, **how))
    return path


def write_other_masks(folder: Path, videos: Sequence[VideoTracks]) -> Path:
    """Write YouTube-VIS JSON with plain runs, polygons and empty masks."""
    path = write_object(folder, videos, "videos")
    document = json.loads(path.read_text())
    for row in document["annotations"]:
        for t, mask in enumerate(row["segmentations"]):
            if mask is None:
                row["segmentations"][t] = [None, [], {}, masks.empty(HEIGHT, WIDTH)][t % 4]
            elif t % 3 == 0:
                row["segmentations"][t]["counts"] = masks.to_uncompressed(mask)
            elif t % 3 == 1:
                x1, y1, x2, y2 = masks.to_box(mask)
                row["segmentations"][t] = [[x1, y1, x2, y1, x2, y2 + 0.25, x1, y2]]
    path.write_text(json.dumps(document))
    return path


FORMS: dict[str, Callable[[Path, Sequence[VideoTracks]], Path]] = {
    "lines": write_lines,
    "spaced lines": write_spaced_lines,
    "packed lines": lambda folder, videos: write_lines(folder, videos, ".gz"),
    "object": lambda folder, videos: write_object(folder, videos, "annotations", indent=1),
    "object, videos first": lambda folder, videos: write_object(
        folder, videos, "videos", "categories", ensure_ascii=False
    ),
    "object, other masks": write_other_masks,
}


@dataclass(frozen=True)
class EagerClip:
    """A video all in memory, chosen from as it was before there was an index."""

    info: VideoInfo
    frames: FrameSource
    all: list[Track]
    categories: list[int]
    kept: int

    @property
    def ignored(self) -> NDArray[np.intp]:
        return np.arange(self.kept, len(self.all))

    def seen(self, times: Sequence[int]) -> NDArray[np.intp]:
        rows = range(self.kept)
        return np.array([i for i in rows if any(self.all[i].rles[t] for t in times)], np.intp)

    def rles(self, rows: NDArray[np.intp], time: int) -> list[RLE | None]:
        return [self.all[i].rles[time] for i in rows]

    def labels(self, rows: NDArray[np.intp]) -> list[int]:
        return [self.categories.index(self.all[i].category_id) for i in rows]

    def supervision(self, rows: NDArray[np.intp]) -> tuple[Supervision, ...]:
        return tuple(self.all[i].supervision for i in rows)


def eager_clips(path: Path, root: Path, dropped: str | None) -> list[EagerClip]:
    """Return the videos of a file with a track that counts."""
    source = open_tracks(path)
    categories = sorted(category.id for category in source.header.categories)
    clips = []
    for video in source:
        aside = video.ignored
        if dropped == "background":
            aside = tuple(t for t in aside if "filter" not in t.lineage)
        kept = best(video.tracks)
        objects = {instance_of(t) for t in kept}
        ignored = [t for t in best(aside) if instance_of(t) not in objects]
        if kept:
            frames = find_frames(video.video, root)
            clips.append(EagerClip(video.video, frames, kept + ignored, categories, len(kept)))
    return clips


def best(tracks: Sequence[Track]) -> list[Track]:
    found: dict[Any, Track] = {}
    for row in sorted(tracks, key=lambda t: (-t.score, t.id)):
        if row.present:
            found.setdefault(instance_of(row), row)
    return sorted(found.values(), key=lambda t: t.id)


def instance_of(row: Track) -> tuple[bool, int]:
    return row.instance is None, row.id if row.instance is None else row.instance


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_draws_are_those_of_eager_reading(
    tmp_path: Path, form: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = random_videos(seed)
    for video in videos:
        for t, name in enumerate(video.video.file_names):
            write_image(tmp_path / name, video.video.id % 99 + t)
    path = FORMS[form](tmp_path, videos)
    monkeypatch.setattr(
        "pmvis_core.data.datasets.open_index", lambda path: open_index(path, worth_keeping=1)
    )
    for dropped in (None, "background", None):  # the second and third map what the first kept
        indexed = PseudoVideos(path, tmp_path, SMALL_FRAMES, dropped=dropped)
        assert kept(path).is_file()
        eager = PseudoVideos(path, tmp_path, SMALL_FRAMES, dropped=dropped)
        eager._clips = clips = eager_clips(path, tmp_path, dropped)  # type: ignore[assignment]
        assert (len(indexed), indexed.left_out) == (len(clips), len(videos) - len(clips))
        assert_same_counts(indexed, clips)
        for index in range(len(clips)):
            one, other = (np.random.default_rng([seed, index]) for _ in range(2))
            for _ in range(3):
                drawn, expected = indexed.sample(index, one), eager.sample(index, other)
                assert_equal_pairs(drawn, expected)
                assert drawn.name == expected.name
            assert one.bit_generator.state == other.bit_generator.state


def assert_same_counts(indexed: PseudoVideos, clips: Sequence[EagerClip]) -> None:
    row = dict(indexed.ledger()["videos"])
    kinds = [t.supervision.value for clip in clips for t in clip.all[: clip.kept]]
    expected = {kind: kinds.count(kind) for kind in set(kinds)}
    ignored = sum(len(clip.ignored) for clip in clips)
    assert row == {"videos": len(clips), "ignored": ignored, **expected}


def test_masks_stay_in_plain_files(tmp_path: Path) -> None:
    videos = random_videos(3)
    for form, write in FORMS.items():
        path = write(tmp_path, videos)
        index = open_index(path)
        assert (index.text is None) == (form == "packed lines")
        assert (index.tables.header.lineage, index.tables.bare) == (HEADER.lineage, 0)
        path.unlink()


def object_json(**changes: Any) -> dict[str, Any]:
    video = {"id": 1, "file_names": ["a/0.png", "a/1.png"], "height": HEIGHT, "width": WIDTH}
    row = {"id": 4, "video_id": 1, "category_id": 3, "iscrowd": 0}
    row["segmentations"] = [dict(rectangle(1, 1, 9, 9)), None]
    sections = {"videos": [video], "annotations": [row], "categories": CATEGORIES}
    return {**sections, **{key: value for key, value in changes.items() if key in sections}}


def changed(section: str, **changes: Any) -> str:
    document = object_json()
    document[section][0].update(changes)
    return json.dumps(document)


def twice(section: str) -> str:
    document = object_json()
    document[section] = 2 * document[section]
    return json.dumps(document)


SOUND = json.dumps(object_json())
OBJECTS = {
    "cut": SOUND[:-30],
    "more": SOUND + "x",
    "comma": SOUND.replace('"annotations": [', '"annotations": [,'),
    "no utf-8": SOUND.replace("a/0.png", "a/\udcff.png"),
    "nan": changed("annotations", score=float("nan")),
    "score": changed("annotations", score=1.5),
    "masks": changed("annotations", segmentations=[None]),
    "no masks": changed("annotations", segmentations={}),
    "mask": changed("annotations", segmentations=[{"size": [1, 1], "counts": "01"}, None]),
    "run lengths": changed("annotations", segmentations=[{"size": [40, 60], "counts": "~"}, None]),
    "polygon": changed("annotations", segmentations=[[[1, "x"]], None]),
    "video": changed("annotations", video_id=2),
    "category": changed("annotations", category_id=4),
    "block": changed("annotations", pmvis={"track_id": "x"}),
    "size": changed("videos", height=0),
    "length": changed("videos", length=3),
    "ids": twice("videos"),
    "track ids": twice("annotations"),
    "category ids": twice("categories"),
    "annotation": json.dumps({**object_json(), "annotations": [3]}),
    "annotations": json.dumps({**object_json(), "annotations": {"a": 3}}),
    "stills": json.dumps({"images": [], "annotations": []}),
    "list": "[]",
    "nothing": "",
    "brackets": '{"videos": ' + "[" * 100_000,
}


def outcome(call: Callable[[], Any]) -> tuple[str, str | None]:
    with pytest.raises(DataError) as caught:
        call()
    return caught.value.message, caught.value.hint


@pytest.mark.parametrize("fault", OBJECTS)
def test_faults_of_objects_are_told_as_before(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(OBJECTS[fault].encode(errors="surrogateescape"))
    assert outcome(lambda: open_index(path)) == outcome(lambda: list(open_tracks(path)))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-40],
        lambda text: text.replace('"score":0.5', '"score":2', 1),
        lambda text: text.replace('"masks":[', '"masks":[null,', 1),
        lambda text: text + text.splitlines()[1] + "\n",
        lambda text: text.replace('"masks"', '"maskz"', 1),
        lambda text: text.replace('"tracks":[', '"tracks":[7,', 1),
    ],
)
def test_faults_of_lines_are_told_as_before(tmp_path: Path, change: Callable[[str], str]) -> None:
    video = VideoTracks(info(1, 2), (track(1, [rectangle(1, 1, 9, 9), None]),))
    path = write_videos(tmp_path, [video])
    path.write_text(change(path.read_text()))
    assert outcome(lambda: open_index(path)) == outcome(lambda: list(open_tracks(path)))
    missing = tmp_path / "absent.tracks.jsonl"
    assert outcome(lambda: open_index(missing)) == outcome(lambda: open_tracks(missing))


@pytest.mark.parametrize(
    "text",
    [
        SOUND[:-1] + ', "annotations": ' + json.dumps(object_json()["annotations"]) + "}",
        '{"annotations": 3, "videos": [7], ' + SOUND[1:],
        SOUND.replace('"id": 4', '"id": 9, "id": 4.0'),
        SOUND.replace("segmentations", "segmentation\\u0073"),
        SOUND.replace(
            '"segmentations"', '"segmentations": 3, "segmentations": [null], "segmentations"'
        ),
    ],
)
def test_odd_objects_are_read_as_before(tmp_path: Path, text: str) -> None:
    """Keys that occur twice, escapes in keys: the last counts, as for any reader of JSON."""
    path = tmp_path / "x.json"
    path.write_text(text)
    (video,) = open_tracks(path)
    index = open_index(path)
    assert index.info(0) == video.video
    assert [index.rle(0, t, video.video) for t in range(2)] == list(video.tracks[0].rles)


def test_lines_that_only_the_last_key_makes_sound(tmp_path: Path) -> None:
    video = VideoTracks(info(1, 2), (track(1, [rectangle(1, 1, 9, 9), None]),))
    row = json.dumps(tracks_row(tmp_path, video))
    row = '{"tracks": [{"masks": 3}], ' + row[1:].replace('"masks"', '"masks": "x", "masks"')
    path = tmp_path / "x.tracks.jsonl"
    with TracksWriter(path, HEADER) as out:
        out.write_pieces([row], lambda: 1)
    index = open_index(path)
    assert index.rle(0, 0, index.info(0)) == rectangle(1, 1, 9, 9)


def tracks_row(folder: Path, video: VideoTracks) -> Any:
    return json.loads(write_lines(folder, [video]).read_text().splitlines()[1])


def kept(path: Path) -> Path:
    return path.with_name(f".{path.name}.index")


def assert_equal(a: TracksIndex, b: TracksIndex) -> None:
    for name in ("videos", "first", "tracks", "masks", "notes"):
        np.testing.assert_array_equal(getattr(a.tables, name), getattr(b.tables, name))
    for name in ("header", "bare", "inside"):
        assert getattr(a.tables, name) == getattr(b.tables, name)


@pytest.mark.parametrize("form", FORMS)
def test_a_kept_index_is_used_and_mapped(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = FORMS[form](tmp_path, random_videos(4))
    first = open_index(path, worth_keeping=1)
    for reader in ("of_lines", "of_object", "of_source"):
        monkeypatch.setattr(tracks_tables, reader, lambda *_: pytest.fail("read again"))
    again = open_index(path, worth_keeping=1)
    assert_equal(first, again)
    assert not again.tables.masks.flags.writeable  # mapped, not copied
    assert not [place for place in tmp_path.iterdir() if place.suffix == ".part"]


@pytest.mark.parametrize(
    ("table", "column", "number"),
    [
        ("masks", "end", 1 << 40),
        ("masks", "begin", -1),
        ("videos", "end", 1 << 40),
        ("videos", "length", 99),
        ("tracks", "first_mask", 1 << 40),
        ("tracks", "label", 2),
        ("tracks", "supervision", 9),
    ],
)
def test_an_index_that_was_not_made_of_the_file(
    tmp_path: Path, table: str, column: str, number: int
) -> None:
    path = write_lines(tmp_path, random_videos(5))
    expected = open_index(path, worth_keeping=1)
    rows = getattr(expected.tables, table).copy()
    rows[column][-1] = number
    spoilt = dataclasses.replace(expected.tables, **{table: rows})
    kept(path).unlink()  # it is mapped: a file that shrinks under a map ends the process
    digest = tracks_index.digest_file(path)
    assert tracks_index._keep(kept(path), digest, spoilt)
    assert_equal(open_index(path, worth_keeping=1), expected)


def test_a_changed_file_is_read_anew_or_refused(tmp_path: Path) -> None:
    path = write_object(tmp_path, random_videos(6))
    index = open_index(path, worth_keeping=1)
    state = path.stat()
    path.write_text(path.read_text().replace('"dog"', '"dot"'))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # same size and time, other content
    again = open_index(path, worth_keeping=1)
    assert [category.name for category in again.tables.header.categories] == ["dot", "cat"]
    assert [category.name for category in index.tables.header.categories] == ["dog", "cat"]
    with path.open("ab") as stream:
        stream.write(b" ")
    row = int(np.flatnonzero(index.tables.tracks["present"])[0])
    video = index.info(int(np.searchsorted(index.tables.first, row, side="right")) - 1)
    with pytest.raises(DataError, match="was changed while it was in use"):
        [index.rle(row, t, video) for t in range(video.length)]


@pytest.mark.parametrize("damage", ["cut", "bit", "noise", "empty", "of stills"])
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: str) -> None:
    path = write_lines(tmp_path, random_videos(6))
    expected = open_index(path, worth_keeping=1)
    sound = kept(path).read_bytes()
    spoilt = {
        "cut": sound[:-70],
        "bit": sound[:-70] + bytes([sound[-70] ^ 1]) + sound[-69:],
        "noise": os.urandom(1000),
        "empty": b"",
        "of stills": sound.replace(b'"format": "tracks 1"', b'"format": 1'),
    }[damage]
    kept(path).unlink()  # it is mapped: a file that shrinks under a map ends the process
    kept(path).write_bytes(spoilt)
    assert_equal(open_index(path, worth_keeping=1), expected)
    assert kept(path).read_bytes() == sound


def test_small_files_leave_nothing_behind(tmp_path: Path) -> None:
    path = write_lines(tmp_path, random_videos(0))
    open_index(path)
    assert list(tmp_path.iterdir()) == [path]


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path, random_videos(8))
    expected = Clips(open_index(path), without_dropped=False)
    for data in (path.read_bytes(), gzip.compress(path.read_bytes())):
        stream = io.TextIOWrapper(io.BufferedReader(io.BytesIO(data)))
        monkeypatch.setattr(sys, "stdin", stream)
        index = open_index(Path("-"))
        assert index.text is None
        assert Clips(index, without_dropped=False).counts() == expected.counts()
