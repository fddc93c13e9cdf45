"""An index of labelled videos: tables that processes map, and masks that are read where they stand.

Thousands of videos have hundreds of thousands of masks, which as Python objects take gigabytes in
every process and minutes before a run starts. The index holds what decides which tracks and frames
are drawn; the text of a mask is read and parsed when its frame is. A large file's index is kept
(`kept_tables`). `tracks_tables` reads the file.

    index = open_index(Path("kept.tracks.jsonl"))
    video = index.info(0)
    for row in range(index.first[0], index.first[1]):
        mask = index.rle(row, 7, video)     # of frame 7
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmvis_core.errors import DataError
from pmvis_core.files import STDIO, digest_file
from pmvis_core.formats import tracks_tables
from pmvis_core.formats.kept_tables import (
    UNSOUND,
    WORTH_KEEPING_BYTES,
    FileText,
    kept_or_made,
    read_kept,
    write_kept,
)
from pmvis_core.formats.tracks_tables import MASK, SUPERVISIONS, TRACK, VIDEO, Tables
from pmvis_core.formats.ytvis import open_tracks, sniff
from pmvis_core.formats.ytvis_annotation import frame_mask
from pmvis_core.tracks_io import TracksHeader, TracksReader
from pmvis_core.types import RLE, Category, VideoInfo

FORMAT = "tracks 1"
"""Version of an index file; another one is made again."""

_KINDS: tuple[np.dtype[Any], ...]
_KINDS = (VIDEO, np.dtype(np.int64), TRACK, MASK, np.dtype(np.uint8))


@dataclass(frozen=True)
class TracksIndex:
    """The tables of one file."""

    tables: Tables
    """What it holds."""
    text: FileText | None
    """Where masks are read from; None where the tables hold them."""

    def info(self, video: int) -> VideoInfo:
        """Return a video by its row."""
        begin, end, length = self.tables.videos[video].tolist()
        number, name, height, width, files = json.loads(bytes(self.tables.notes[begin:end]))
        return VideoInfo(number, name, height, width, length, tuple(files))

    def shown(self, tracks: NDArray[np.intp], frame: int) -> NDArray[np.bool_]:
        """Tell which of the (N,) rows of tracks, all of one video, have a mask in a frame."""
        places = self.tables.tracks["first_mask"][tracks] + frame
        return np.asarray(self.tables.masks["end"][places] > 0)

    def rle(self, track: int, frame: int, video: VideoInfo) -> RLE | None:
        """Return the mask of a track in a frame of its video, None where it is absent.

        Raises:
            DataError: the file was changed since it was opened.
        """
        tables = self.tables
        begin, end = tables.masks[int(tables.tracks["first_mask"][track]) + frame].tolist()
        if not end:
            return None
        if self.text is None:
            value = json.loads(bytes(tables.notes[begin:end]))
        else:
            value = json.loads(self.text.read(begin, end))
        if isinstance(value, str):
            return RLE(size=[video.height, video.width], counts=value)
        return frame_mask(value, video)


def open_index(path: Path, *, worth_keeping: int = WORTH_KEEPING_BYTES) -> TracksIndex:
    """Return the index of a tracks file or YouTube-VIS dataset, the kept one if that is sound.

    Args:
        path: the file, also packed; or ``-``.
        worth_keeping: least bytes of a file whose index is kept.

    Raises:
        DataError: as `ytvis.open_tracks` and reading all of it.
    """
    text = _opened(path)
    if text is None:
        return TracksIndex(tracks_tables.of_source(open_tracks(path)), None)
    if len(text) < worth_keeping:
        return _made(path, text)
    digest = digest_file(path)
    return kept_or_made(
        path,
        digest,
        lambda place: _kept(place, digest, text),
        lambda: _made(path, text),
        lambda place, index: _keep(place, digest, index.tables),
    )


def _opened(path: Path) -> FileText | None:
    """Open a file whose parts can be read; None where it is none, or there is none."""
    try:
        return FileText(path) if str(path) != STDIO and path.is_file() else None
    except OSError:
        return None


def _made(path: Path, text: FileText) -> TracksIndex:
    """Read a file into tables.

    What is wrong with it, readers of the whole file say; what they take all the same, they give.

    Raises:
        DataError: it is malformed, or was changed meanwhile.
    """
    kind = sniff(path)
    if text.read(0, 2) != b"\x1f\x8b" and kind != "results":
        try:
            lines = kind == "tracks"
            of_file = tracks_tables.of_lines(TracksReader(path)) if lines else _of_object(text)
            return TracksIndex(of_file, text)
        except (ValueError, RecursionError):
            pass
    index = TracksIndex(tracks_tables.of_source(open_tracks(path)), None)
    text.check()
    return index


def _of_object(text: FileText) -> Tables:
    """Read YouTube-VIS JSON into tables.

    Raises:
        ValueError: something is wrong.
        RecursionError: the same.
    """
    try:
        return tracks_tables.of_object(text)
    except DataError as error:
        raise ValueError(error.message) from error


def _keep(place: Path, digest: str, tables: Tables) -> bool:
    """Write an index, whole or not at all; tell whether it could be written."""
    header = tables.header
    facts = {
        "categories": [[category.id, category.name] for category in header.categories],
        "lineage": header.lineage,
        "bare": tables.bare,
        "inside": tables.inside,
    }
    columns = (tables.videos, tables.first, tables.tracks, tables.masks, tables.notes)
    return write_kept(place, FORMAT, digest, facts, columns)


def _kept(place: Path, digest: str, text: FileText) -> TracksIndex | None:
    """Return an index that was kept, or None if it is absent, of another file, or damaged."""
    try:
        found = read_kept(place, FORMAT, digest, _KINDS)
        if found is None:
            return None
        head, (videos, first, tracks, masks, notes) = found
        names = tuple(Category(int(number), str(name)) for number, name in head["categories"])
        tables = Tables(
            header=TracksHeader(names, tuple(head["lineage"])),
            bare=int(head["bare"]),
            inside=bool(head["inside"]),
            videos=videos,
            first=first,
            tracks=tracks,
            masks=masks,
            notes=notes,
        )
    except UNSOUND:
        return None
    if not _is_sound(tables, len(notes) if tables.inside else len(text)):
        return None
    return TracksIndex(tables, None if tables.inside else text)


def _is_sound(tables: Tables, size: int) -> bool:
    """Tell whether the tables agree with each other and with a text of so many bytes.

    The digest only tells that the index is as it was written, not that it was written by us.
    """
    videos, first, tracks, masks = tables.videos, tables.first, tables.tracks, tables.masks
    if len(first) != len(videos) + 1 or first[0] != 0 or first[-1] != len(tracks):
        return False
    counts = np.diff(first)
    if (counts < 1).any():
        return False
    good = [
        _within(videos, len(tables.notes)),
        videos["length"] > 0,
        _within(masks, size),
        tracks["first_mask"] >= 0,
        tracks["first_mask"] + np.repeat(videos["length"], counts) <= len(masks),
        tracks["label"] >= 0,
        tracks["label"] < len(tables.header.categories),
        tracks["supervision"] < len(SUPERVISIONS),
    ]
    return all(bool(rows.all()) for rows in good)


def _within(rows: NDArray[Any], size: int) -> NDArray[np.bool_]:
    """Tell which places lie in a text of so many bytes."""
    return np.asarray((rows["begin"] >= 0) & (rows["begin"] <= rows["end"]) & (rows["end"] <= size))
