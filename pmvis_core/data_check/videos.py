"""Walks through labelled videos and notes every fault: tracks files and YouTube-VIS data sets.

A tracks file is written by machines and checked line by line as it is read: what is wrong with a
line ends it. A data set may come from anywhere, so each of its entries is judged by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmvis_core import masks
from pmvis_core.data_check.pictures import Picture, check_pictures
from pmvis_core.data_check.report import Notes, Report
from pmvis_core.errors import DataError
from pmvis_core.formats.ytvis import dataset_of, open_tracks, read_document, shown, sniff
from pmvis_core.formats.ytvis_annotation import Annotation, parse_annotation
from pmvis_core.progress import Progress, silent
from pmvis_core.types import RLE, VideoInfo
from pmvis_core.video.frames import FrameSource, ImageFrames, find_frames


def check_videos(
    path: Path,
    frames: Path | None,
    *,
    fast: bool = False,
    strict: bool = False,
    workers: int = 0,
    progress: Progress = silent,
) -> Report:
    """Find every fault of labelled videos and of their frames.

    Args:
        path: a tracks file or a YouTube-VIS data set.
        frames: root of the videos' frames; None looks in the usual places beside ``path``.
        fast: read only the heads of image files, and of video files the first frame.
        strict: count warnings as faults.
        workers: threads that read images; 0 for one a processor.
        progress: is told of every track and every image.

    Raises:
        DataError: the file is missing, or neither of the two.
    """
    notes = Notes(strict=strict)
    read = _read_tracks if sniff(path) == "tracks" else _read_dataset
    videos, tracks = read(path, notes, progress)
    root = frames or (path if path.suffix == ".json" else path.parent)
    pictures = _frames(videos, root, notes, fast=fast)
    files = check_pictures(pictures, notes, fast=fast, workers=workers, progress=progress)
    counts = {"video": len(videos), "annotation": tracks, "file": files}
    return notes.report(shown(path), counts)


Walked = tuple[Sequence[VideoInfo], int]
"""The videos whose frames are to be looked at, and the number of tracks."""


def _read_tracks(path: Path, notes: Notes, progress: Progress) -> Walked:
    """Walk through a tracks file."""
    videos: list[VideoInfo] = []
    count = 0
    source = open_tracks(path)
    try:
        for video in progress(source, "tracks"):
            videos.append(video.video)
            count += len(video.tracks)
            for track in video.tracks:
                if not track.present:
                    where = f"video {video.video.id} `{video.video.name}`, track {track.id}"
                    notes.add("mask-empty", where)
            if not any(track.present for track in video.tracks):
                notes.add("video-empty", f"video {video.video.id} `{video.video.name}`")
    except DataError as error:
        notes.add("file", error.message)
    return videos, count


def _read_dataset(path: Path, notes: Notes, progress: Progress) -> Walked:
    """Walk through a YouTube-VIS data set."""
    document = read_document(path, "annotations")
    if not isinstance(document, dict) or not isinstance(document.get("videos"), list):
        dataset_of(document, shown(path))
    categories = {
        category.id
        for row in _entries(document, "categories")
        for category in _parsed(document, "categories", row, notes)
    }
    videos: dict[int, VideoInfo] = {}
    for row in _entries(document, "videos"):
        for video in _parsed(document, "videos", row, notes):
            if video.id in videos:
                notes.add("duplicate-id", f"video {video.id} `{video.name}`")
            elif video.length < 1 or len(video.file_names) not in (0, video.length):
                told = f"{video.length} frames and {len(video.file_names)} file names"
                notes.add("malformed", f"video {video.id} `{video.name}` has {told}")
            videos.setdefault(video.id, video)
    walk = _Annotations(videos, categories, notes)
    rows = _entries(document, "annotations")
    for position, value in enumerate(progress(rows, "annotations", len(rows))):
        walk.entry(value, f"annotations[{position}]")
    for number, video in videos.items():
        if number not in walk.labelled:
            notes.add("video-empty", f"video {number} `{video.name}`")
    return list(videos.values()), len(rows)


def _entries(document: Mapping[str, Any], key: str) -> list[Any]:
    """Return one of a data set's lists."""
    rows = document.get(key)
    return rows if isinstance(rows, list) else []


def _parsed(document: Mapping[str, Any], key: str, row: Any, notes: Notes) -> Iterator[Any]:
    """Yield one video or category, parsed by itself, or note what is wrong with it."""
    alone = {**document, "annotations": [], "videos": [], "categories": [], key: [row]}
    try:
        yield from getattr(dataset_of(alone, key), key)
    except DataError as error:
        notes.add("malformed", error.message)


class _Annotations:
    """Goes through the annotations of a data set and notes what is wrong."""

    def __init__(self, videos: Mapping[int, VideoInfo], categories: set[int], notes: Notes) -> None:
        """Start with nothing seen.

        Args:
            videos: that the file lists.
            categories: ids that it lists.
            notes: gets the faults.
        """
        self.labelled: set[int] = set()
        """Ids of the videos that have a track with a mask."""
        self._videos, self._categories, self._notes = videos, categories, notes
        self._ids: set[int] = set()

    def entry(self, value: Any, where: str) -> None:
        """Check the next annotation."""
        if not isinstance(value, dict):
            self._notes.add("malformed", f"{where} is no object")
            return
        try:
            row = parse_annotation(value, self._videos, where)
        except DataError as error:
            self._notes.add("malformed", error.message)
            return
        name = f"annotation {row.id}"
        if row.id in self._ids:
            self._notes.add("duplicate-id", f"{where}: {row.id}")
        self._ids.add(row.id)
        if row.category_id not in self._categories:
            self._notes.add("unknown-category", f"{name}: category {row.category_id}")
        video = self._videos.get(row.video_id)
        if video is None:
            self._notes.add("unknown-video", f"{name}: video {row.video_id}")
        else:
            self._fits(row, video, f"{name}, video {video.id} `{video.name}`")

    def _fits(self, row: Annotation, video: VideoInfo, name: str) -> None:
        """Check the masks and boxes of an annotation against its video."""
        if len(row.rles) != video.length:
            told = f"{name}: {len(row.rles)} masks for {video.length} frames"
            self._notes.add("length", told)
        size = [video.height, video.width]
        for frame, rle in enumerate(row.rles):
            if rle is not None and list(rle["size"]) != size:
                told = f"{name}, frame {frame}: {rle['size']}, the video is {size} (height, width)"
                self._notes.add("mask-size", told)
                break
        if not any(row.mask_areas):
            self._notes.add("mask-empty", name)
        elif not row.iscrowd:
            self.labelled.add(video.id)
        self._boxes(row, name)

    def _boxes(self, row: Annotation, name: str) -> None:
        """Check stated boxes against the masks."""
        stated = row.extra.get("bboxes")
        if not isinstance(stated, list) or len(stated) != len(row.rles):
            return
        for frame, (box, rle) in enumerate(zip(stated, row.rles, strict=True)):
            if rle is not None and row.mask_areas[frame] and _apart(box, rle):
                self._notes.add("mask-box", f"{name}, frame {frame}: box {box}")
                return


def _apart(box: Any, rle: RLE) -> bool:
    """Tell whether COCO's box, where it is one, lies apart from a mask."""
    if not isinstance(box, list) or len(box) != 4:
        return box is not None
    x1, y1, x2, y2 = masks.to_box(rle)
    width = min(box[0] + box[2], x2) - max(box[0], x1)
    height = min(box[1] + box[3], y2) - max(box[1], y1)
    shared = max(0.0, width) * max(0.0, height)
    return bool(2 * shared < box[2] * box[3] + (x2 - x1) * (y2 - y1) - shared)


def _frames(
    videos: Iterable[VideoInfo], root: Path, notes: Notes, *, fast: bool
) -> Iterator[Picture]:
    """Yield the image files of the videos; video files are looked at on the way."""
    for video in videos:
        where = f"video {video.id} `{video.name}`"
        try:
            source = find_frames(video, root)
        except DataError as error:
            notes.add("image-missing", error.message)
            continue
        if not isinstance(source, ImageFrames):
            _decode(source, notes, fast=fast)
            continue
        for frame, path in enumerate(source.paths):
            yield Picture(path, (video.height, video.width), f"{where}, frame {frame}")


def _decode(source: FrameSource, notes: Notes, *, fast: bool) -> None:
    """Note the first frame of a video file that cannot be trusted."""
    for reading in source.readings(range(1) if fast else None):
        if isinstance(reading, DataError):
            notes.add("image-unreadable", reading.message)
            return
