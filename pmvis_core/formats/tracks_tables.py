"""Labelled videos as tables: what each track states, and where the text of each of its masks is.

`of_lines` reads tracks files, `of_object` YouTube-VIS JSON annotation by annotation, so that the
masks of one track are in memory at a time; both note where masks stand in the file. `of_source`
takes any source, also packed files and standard input, and copies the masks. All of them check
what the readers of whole files check. `tracks_index` is the caller.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmvis_core.errors import DataError
from pmvis_core.formats.json_text import WINDOW_BYTES, JsonText, is_utf8
from pmvis_core.formats.kept_tables import FileText
from pmvis_core.formats.ytvis import TrackSource, checked_track, dataset_of, dataset_row, shown
from pmvis_core.tracks_io import TracksHeader, TracksReader
from pmvis_core.types import Supervision, Track, VideoInfo

VIDEO = np.dtype([(name, np.int64) for name in "begin end length".split()])
"""A row of the videos: where its identity stands in the notes, and its number of frames."""

TRACK = np.dtype(
    [("first_mask", np.int64), ("score", np.float64), ("label", np.int32), ("object", np.int32)]
    + [(name, np.uint8) for name in "supervision ignored dropped present".split()]
    + [("unused", np.uint32)]
)
"""A row of the tracks. ``object`` is the same for the rows of one instance and for no others in the
file, ``supervision`` the place in `SUPERVISIONS`; ``dropped`` tells that `filter` set it aside,
``present`` that a frame has a mask."""

MASK = np.dtype([("begin", np.int64), ("end", np.int64)])
"""A frame of a track: ``[begin, end)`` of the mask's text, 0 where it is absent."""

SUPERVISIONS = tuple(Supervision)
"""What the numbers in tables mean."""

Places = Sequence[tuple[int, int]]
"""``[begin, end)`` of a track's masks, one a frame."""


@dataclass(frozen=True)
class Tables:
    """The videos of a file that have tracks; a video's tracks are sorted by id."""

    header: TracksHeader
    """Vocabulary and lineage."""
    bare: int
    """Number of videos without any track, which are left out."""
    inside: bool
    """Whether the texts of masks stand in ``notes``, not in the file."""
    videos: NDArray[Any]
    """(V,) of `VIDEO`, in the file's order."""
    first: NDArray[np.int64]
    """(V + 1,) where the tracks of each video begin."""
    tracks: NDArray[Any]
    """(N,) of `TRACK`."""
    masks: NDArray[Any]
    """(M,) of `MASK`."""
    notes: NDArray[np.uint8]
    """Texts in JSON."""


def of_lines(reader: TracksReader) -> Tables:
    """Read a plain tracks file.

    Raises:
        DataError: it is malformed.
    """
    rows = _Rows(reader.header)
    for video, begin, line in reader.lines():
        number = rows.add_video(video.video)
        if video.tracks or video.ignored:
            places = _places_of_line(line, begin)
            for track, found in zip(video.tracks, places["tracks"], strict=True):
                rows.add_track(number, track, found)
            for track, found in zip(video.ignored, places["ignored"], strict=True):
                rows.add_track(number, track, found, ignored=True)
    return rows.tables()


def of_object(text: FileText) -> Tables:
    """Read plain YouTube-VIS JSON.

    Raises:
        DataError: something is wrong; `ytvis.read_dataset` says it best, or knows better.
        ValueError: the same.
        RecursionError: the same.
    """
    if not is_utf8(text.read, len(text)):
        raise ValueError("the text is no UTF-8")
    name = shown(text.path)
    document = JsonText(text.read, len(text), window_bytes=WINDOW_BYTES)
    sections, annotations = _sections(document)
    dataset = dataset_of(sections, name)
    categories = {category.id for category in dataset.categories}
    rows = _Rows(dataset.header)
    numbers = {video.video.id: rows.add_video(video.video) for video in dataset}
    videos = {video.id: video for video in dataset.videos}
    if annotations is not None:
        document.go(annotations)
        for _ in document.items():
            entry, places = _annotation(document)
            row = dataset_row(entry, videos, name)
            if row.video_id not in videos:
                raise DataError(f"{name}: annotation {row.id} is of no video of the file")
            track = checked_track(row, videos[row.video_id], categories, name)
            rows.add_track(numbers[row.video_id], track, places, ignored=row.iscrowd)
    return rows.tables()


def of_source(source: TrackSource) -> Tables:
    """Read any source, and copy the run lengths of its masks.

    Raises:
        DataError: it is malformed.
    """
    rows = _Rows(source.header)
    for video in source:
        number = rows.add_video(video.video)
        for group, ignored in ((video.tracks, False), (video.ignored, True)):
            for track in group:
                counts = (None if rle is None else rle["counts"] for rle in track.rles)
                places = [(0, 0) if text is None else rows.note(text) for text in counts]
                rows.add_track(number, track, places, ignored=ignored)
    return rows.tables(inside=True)


class _Rows:
    """Collects what the tables hold."""

    def __init__(self, header: TracksHeader) -> None:
        """Start with no video."""
        self._header = header
        ids = sorted(category.id for category in header.categories)
        self._labels = {number: label for label, number in enumerate(ids)}
        self._videos: list[tuple[str, int]] = []
        self._tracks: list[tuple[int, int, tuple[Any, ...]]] = []
        self._masks = array("q")
        self._objects: dict[tuple[int, str, int], int] = {}
        self._notes = bytearray()

    def note(self, value: Any) -> tuple[int, int]:
        """Write a JSON value down; return where."""
        begin = len(self._notes)
        self._notes += json.dumps(value).encode()
        return begin, len(self._notes)

    def add_video(self, info: VideoInfo) -> int:
        """Take in a video; return its number."""
        facts = (info.id, info.name, info.height, info.width, info.file_names)
        self._videos.append((json.dumps(facts), info.length))
        return len(self._videos) - 1

    def add_track(self, video: int, track: Track, places: Places, *, ignored: bool = False) -> None:
        """Take in a track of a video by the video's number, and where its masks stand."""
        kind, number = (
            ("track", track.id) if track.instance is None else ("instance", track.instance)
        )
        row = (
            len(self._masks) // 2,
            track.score,
            self._labels[track.category_id],
            self._objects.setdefault((video, kind, number), len(self._objects)),
            SUPERVISIONS.index(track.supervision),
            ignored,
            "filter" in track.lineage,
            any(track.rles),
            0,
        )
        self._tracks.append((video, track.id, row))
        for place, rle in zip(places, track.rles, strict=True):
            self._masks.extend((0, 0) if rle is None else place)

    def tables(self, *, inside: bool = False) -> Tables:
        """Return what was taken in.

        Raises:
            DataError: two tracks of a video share an id.
        """
        self._tracks.sort(key=lambda row: row[:2])
        for one, other in zip(self._tracks, self._tracks[1:], strict=False):
            if one[:2] == other[:2]:
                raise DataError(f"two tracks of a video share the id {one[1]}")
        owners = np.array([video for video, _, _ in self._tracks], np.int64)
        counts = np.bincount(owners, minlength=len(self._videos))
        videos = []
        for number in np.flatnonzero(counts).tolist():
            text, length = self._videos[number]
            begin = len(self._notes)
            self._notes += text.encode()
            videos.append((begin, len(self._notes), length))
        first = np.zeros(len(videos) + 1, np.int64)
        np.cumsum(counts[counts > 0], out=first[1:])
        return Tables(
            header=self._header,
            bare=len(self._videos) - len(videos),
            inside=inside,
            videos=np.array(videos, VIDEO),
            first=first,
            tracks=np.array([row for _, _, row in self._tracks], TRACK),
            masks=np.frombuffer(self._masks, MASK),
            notes=np.frombuffer(self._notes, np.uint8),
        )


def _places_of_line(line: bytes, begin: int) -> Mapping[str, Sequence[Places]]:
    """Return where the masks of a sound video's line stand, by `tracks` and `ignored`.

    Args:
        line: the text.
        begin: its place in the file.
    """
    text = JsonText(lambda start, end: line[start:end], len(line))
    found: dict[str, list[Places]] = {"tracks": [], "ignored": []}
    for key in text.members():
        if key in found:
            found[key] = [_places_of_track(text, begin) for _ in text.items()]
        else:
            text.skip()
    return found


def _places_of_track(text: JsonText, begin: int) -> Places:
    """Return where the masks of the track at the cursor stand, and go behind it."""
    places: list[tuple[int, int]] = []
    for key in text.members():
        if key != "masks":
            text.skip()
            continue
        places = []
        for place in text.items():
            text.skip()
            places.append((begin + place, begin + text.at))
    return places


def _sections(text: JsonText) -> tuple[dict[str, Any], int | None]:
    """Return all of a document but its annotations, and where the list of these stands.

    Where a key occurs twice, the last one counts, as it does for `json.loads`.

    Raises:
        ValueError: it is no JSON object.
    """
    sections: dict[str, Any] = {}
    annotations = None
    for key in text.members():
        if key == "annotations" and text.peek() == "[":
            annotations = text.at
            sections.pop(key, None)
            for _ in text.items():
                text.skip()
        else:
            sections[key] = text.value()
            annotations = None if key == "annotations" else annotations
    if not text.at_end():
        raise text.fault("Extra data")
    return sections, annotations


def _annotation(text: JsonText) -> tuple[dict[str, Any], Places]:
    """Return the annotation at the cursor and where its masks stand, and go behind it.

    Raises:
        ValueError: there is no JSON object.
    """
    entry: dict[str, Any] = {}
    places: list[tuple[int, int]] = []
    for key in text.members():
        if key != "segmentations" or text.peek() != "[":
            entry[key] = text.value()
            continue
        masks, places = [], []
        for place in text.items():
            masks.append(text.value())
            places.append((place, text.at))
        entry[key] = masks
    return entry, places
