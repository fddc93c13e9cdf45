"""The lines of a tracks file as values: header and video to JSON, and back with every check.

A field that is missing, of another type or out of its range is named with its video and track; what
comes out of here can be trusted by every stage. `tracks_io` holds the files around the lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pmvis_core import masks
from pmvis_core.errors import DataError
from pmvis_core.files import canonical_json
from pmvis_core.types import RLE, Category, Supervision, Track, VideoInfo, VideoTracks

FORMAT_VERSION = 1

_T = TypeVar("_T")
_KINDS: Mapping[type, str] = {
    int: "an integer",
    str: "text",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class TracksHeader:
    """The first line of a tracks file."""

    categories: tuple[Category, ...]
    """The vocabulary that `category_id` refers to."""
    lineage: tuple[Mapping[str, Any], ...] = ()
    """One entry a stage, in order: its name, its options, digests of its inputs."""

    def extended(self, stage: str, **facts: Any) -> TracksHeader:
        """Return the header with one more stage in its lineage."""
        return TracksHeader(self.categories, (*self.lineage, {"stage": stage, **facts}))

    def as_json(self) -> dict[str, Any]:
        """Return the header as it stands on the first line."""
        return {
            "pmvis_tracks": FORMAT_VERSION,
            "categories": [{"id": c.id, "name": c.name} for c in self.categories],
            "lineage": [dict(entry) for entry in self.lineage],
        }


def header_from_json(record: Any, where: str) -> TracksHeader:
    """Parse the first line.

    Raises:
        DataError: it is no header, or of a version this program does not know.
    """
    if not isinstance(record, dict) or "pmvis_tracks" not in record:
        raise DataError(
            f"{where}: the first line is no tracks header",
            "for YouTube-VIS JSON run `pmvis convert` first",
        )
    version = record["pmvis_tracks"]
    if version != FORMAT_VERSION:
        raise DataError(f"{where}: format version {version}, this pmvis reads {FORMAT_VERSION}")
    rows, lineage = record.get("categories"), record.get("lineage", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{where}: the header has no list of categories")
    if not isinstance(lineage, list) or not all(isinstance(entry, dict) for entry in lineage):
        raise DataError(f"{where}: the header's lineage is no list of objects")
    categories = tuple(
        Category(_typed(row, "id", int, where), _typed(row, "name", str, where)) for row in rows
    )
    ids = [category.id for category in categories]
    if len(ids) != len(set(ids)) or any(key < 1 for key in ids):
        raise DataError(f"{where}: category ids {ids}, expected distinct positive numbers")
    return TracksHeader(categories, tuple(lineage))


def _typed(record: Mapping[str, Any], key: str, kind: type[_T], where: str) -> _T:
    """Return a field that must be there and of one type (a bool is no int)."""
    if key not in record:
        raise DataError(f"{where}: no `{key}`")
    value = record[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise DataError(f"{where}: {key} is {value!r}, expected {_KINDS[kind]}")
    return value


def video_to_json(video: VideoTracks) -> dict[str, Any]:
    """Return a video as it stands on its line."""
    record: dict[str, Any] = {
        "video": _info_to_json(video.video),
        "tracks": [_track_to_json(track) for track in video.tracks],
    }
    if video.ignored:
        record["ignored"] = [_track_to_json(track) for track in video.ignored]
    return record


def stream_video(video: VideoInfo, tracks: Iterable[Iterator[str]]) -> Iterator[str]:
    """Yield, in pieces, the text of a video's line: `canonical_json` of `video_to_json`.

    Args:
        video: the video; read after the tracks are written, as its place on the line is.
        tracks: the pieces of each track's text, from `stream_track`.
    """
    yield '{"tracks":['
    for number, pieces in enumerate(tracks):
        yield "," if number else ""
        yield from pieces
    yield f'],"video":{canonical_json(_info_to_json(video))}}}'


def stream_track(
    track: Track, length: int, appearances: Callable[[], Iterator[tuple[int, float, str]]]
) -> Iterator[str]:
    """Yield the text of one track in pieces, its frames read one at a time.

    Args:
        track: everything but scores and masks, which are left empty.
        length: frames of the video.
        appearances: gives (frame, score, run lengths) in the order of frames, as often as called.
    """
    record = _track_to_json(track)
    for number, key in enumerate(sorted(record)):
        yield f'{"," if number else "{"}"{key}":'
        if key == "frame_scores":
            yield from _stream_list(((t, score) for t, score, _ in appearances()), length)
        elif key == "masks":
            yield from _stream_list(((t, counts) for t, _, counts in appearances()), length)
        else:
            yield canonical_json(record[key])
    yield "}"


def _stream_list(entries: Iterator[tuple[int, Any]], length: int) -> Iterator[str]:
    """Yield the text of a list of ``length`` entries, null but at the given places."""
    written, separator = 0, "["
    for place, value in entries:
        yield separator + "null," * (place - written) + canonical_json(value)
        written, separator = place + 1, ","
    if written < length:
        yield separator + ",".join(["null"] * (length - written))
    yield "]" if length else "[]"


def _info_to_json(info: VideoInfo) -> dict[str, Any]:
    """Return what a line says of its video."""
    return {
        "id": info.id,
        "name": info.name,
        "height": info.height,
        "width": info.width,
        "length": info.length,
        "file_names": list(info.file_names),
    }


def _track_to_json(track: Track) -> dict[str, Any]:
    """Return a track as an object of its video's line; absent options are left out."""
    record: dict[str, Any] = {
        "id": track.id,
        "category_id": track.category_id,
        "score": track.score,
        "frame_scores": list(track.frame_scores),
        "masks": [None if rle is None else rle["counts"] for rle in track.rles],
        "supervision": track.supervision.value,
    }
    if track.instance is not None:
        record["instance"] = track.instance
    if track.keyframe is not None:
        record["keyframe"] = track.keyframe
    if track.lineage:
        record["lineage"] = dict(track.lineage)
    if track.quality is not None:
        record["quality"] = track.quality
    return record


def video_from_json(record: Mapping[str, Any], categories: set[int], where: str) -> VideoTracks:
    """Parse and check one video's line.

    Args:
        record: the parsed line.
        categories: ids of the header's vocabulary.
        where: file and line for messages.

    Raises:
        DataError: naming video and track, what was got and what was expected.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: a {type(record).__name__}, expected an object")
    info = _info_from_json(_typed(record, "video", dict, where), where)
    rows = _typed(record, "tracks", list, where)
    ignored = _typed({"ignored": [], **record}, "ignored", list, where)
    here = f"{where}: video {info.id} `{info.name}`"
    tracks = tuple(_track_from_json(row, info, categories, here) for row in rows)
    aside = tuple(_track_from_json(row, info, categories, here) for row in ignored)
    ids = [track.id for track in (*tracks, *aside)]
    if len(ids) != len(set(ids)):
        raise DataError(f"{here}: two tracks share an id, expected ids unique in the video")
    return VideoTracks(info, tracks, aside)


def _info_from_json(record: Mapping[str, Any], where: str) -> VideoInfo:
    """Parse and check what a line says of its video."""
    info = VideoInfo(
        id=_typed(record, "id", int, where),
        name=_typed(record, "name", str, where),
        height=_typed(record, "height", int, where),
        width=_typed(record, "width", int, where),
        length=_typed(record, "length", int, where),
        file_names=tuple(_typed(record, "file_names", list, where)),
    )
    here = f"{where}: video {info.id} `{info.name}`"
    if min(info.height, info.width, info.length) < 1:
        size = f"{info.width}x{info.height}, {info.length} frames"
        raise DataError(f"{here}: {size}, expected positive numbers")
    if not all(isinstance(name, str) for name in info.file_names):
        raise DataError(f"{here}: a file name is no text")
    if info.file_names and len(info.file_names) != info.length:
        raise DataError(f"{here}: {len(info.file_names)} file names, {info.length} frames")
    return info


def _track_from_json(row: Any, video: VideoInfo, categories: set[int], here: str) -> Track:
    """Parse and check one track."""
    if not isinstance(row, dict):
        raise DataError(f"{here}: a track is {row!r}, expected an object")
    number = _typed(row, "id", int, f"{here}: a track")
    where = f"{here}: track {number}"
    counts = _typed(row, "masks", list, where)
    if not all(text is None or isinstance(text, str) for text in counts):
        raise DataError(f"{where}: a mask is neither a run-length text nor null")
    stated = _typed(row, "supervision", str, where)
    if stated not in (kind.value for kind in Supervision):
        raise DataError(f"{where}: supervision is `{stated}`, unknown to this pmvis")
    size = [video.height, video.width]
    track = Track(
        id=number,
        category_id=_typed(row, "category_id", int, where),
        score=row.get("score"),  # type: ignore[arg-type]  # checked with the frame scores below
        frame_scores=tuple(_typed(row, "frame_scores", list, where)),
        rles=tuple(None if text is None else RLE(size=size, counts=text) for text in counts),
        instance=None if row.get("instance") is None else _typed(row, "instance", int, where),
        keyframe=None if row.get("keyframe") is None else _typed(row, "keyframe", int, where),
        supervision=Supervision(stated),
        lineage=_typed({"lineage": {}, **row}, "lineage", dict, where),
        quality=row.get("quality"),
    )
    check_track(track, video, categories, where)
    return track


def check_track(track: Track, video: VideoInfo, categories: set[int], here: str) -> None:
    """Check a track against its video and vocabulary.

    Raises:
        DataError: wrong number of masks or scores, a category outside the vocabulary, a score
            or quality that is no number in [0, 1], a key frame outside the video, or a mask that
            does not fill the video's frame exactly.
    """
    if track.category_id not in categories:
        raise DataError(f"{here} has category id {track.category_id}, not in the vocabulary")
    for what, found in (("masks", len(track.rles)), ("frame scores", len(track.frame_scores))):
        if found != video.length:
            raise DataError(
                f"{here} has {found} {what}, the video has {video.length} frames",
                "make the file again with the frames it was made from",
            )
    for score in (track.score, *(s for s in track.frame_scores if s is not None)):
        if not _is_share(score):
            raise DataError(f"{here} has score {score!r}, expected a number from 0 to 1")
    if track.quality is not None and not _is_share(track.quality):
        raise DataError(f"{here} has quality {track.quality!r}, expected a number from 0 to 1")
    if track.keyframe is not None and not 0 <= track.keyframe < video.length:
        raise DataError(f"{here} has key frame {track.keyframe} of {video.length} frames")
    masks.validate_track(track.rles, here)


def _is_share(score: Any) -> bool:
    """Tell whether a score is a finite number in [0, 1]; a bool is no number."""
    number = isinstance(score, int | float) and not isinstance(score, bool)
    return number and math.isfinite(score) and 0.0 <= score <= 1.0
