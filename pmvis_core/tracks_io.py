"""Reading and writing ``*.tracks.jsonl``: a header, then one video a line, then an end record.

Every decision of filter, refine and evaluation is made within one video, so each stage is a map
over lines: constant memory, real streaming, resume by video. The end record counts videos and
tracks and carries a digest of the lines, so a truncated file can never pass for a short data set.
Files concatenate (`cat a b`): a second header must equal the first. See ``docs/formats.md``.

    with TracksWriter(Path("out.tracks.jsonl"), header) as out:
        for video in read_tracks(Path("in.tracks.jsonl")):
            out.write(video)
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from pmvis_core import masks
from pmvis_core.errors import DataError, UsageError
from pmvis_core.files import STDIO, canonical_json, cannot_write, parse_json, part_path
from pmvis_core.types import RLE, Category, Supervision, Track, VideoInfo, VideoTracks

FORMAT_VERSION = 1
SUFFIXES = (".tracks.jsonl", ".tracks.jsonl.gz")


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


class TracksWriter:
    """Writes a tracks file whole or not at all; to standard output it streams line by line.

    Used as a context manager: leaving it cleanly writes the end record and renames the file into
    place; leaving it by an exception keeps ``NAME.part`` for `--resume` and writes no end record.
    """

    def __init__(self, path: Path, header: TracksHeader, *, resume: bool = False) -> None:
        """Open the file.

        Args:
            path: where to write; ``-`` is standard output.
            header: the first line.
            resume: continue ``path.part`` where it stops, if it is there and has this header.

        Raises:
            UsageError: the part file was made with another header.
            ResourceError: the place cannot be written.
        """
        self.path = path
        self.done_ids: set[int] = set()
        """Ids of the videos already written before this run (with ``resume``)."""
        self._videos = 0
        self._tracks = 0
        self._digest = hashlib.sha256()
        self._to_stdout = str(path) == STDIO
        kept = b"" if self._to_stdout or not resume else self._read_part(header)
        self._stream = self._open(kept)
        if not kept:
            self._put(canonical_json(header.as_json()))

    def _read_part(self, header: TracksHeader) -> bytes:
        """Return the whole lines of the part file, counting what they hold."""
        part = part_path(self.path)
        if not part.exists():
            return b""
        data = _salvage(part)
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        if not lines:
            return b""
        if lines[0].decode() != canonical_json(header.as_json()) + "\n":
            raise UsageError(
                f"`{part}` was made from other inputs or options, so it cannot be resumed",
                f"repeat the options it was made with, or remove `{part}`",
            )
        kept = [lines[0]]
        for line in lines[1:]:
            record = parse_json(line.decode(), str(part))
            if "video" not in record:
                break
            self._count(line.rstrip(b"\n"), len(record["tracks"]))
            self.done_ids.add(record["video"]["id"])
            kept.append(line)
        return b"".join(kept)

    def _open(self, kept: bytes) -> IO[bytes]:
        """Open the sink and put back what is kept of an earlier run."""
        if self._to_stdout:
            return sys.stdout.buffer
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            raw = part_path(self.path).open("wb")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._raw = raw
        packed = self.path.suffix == ".gz"
        stream = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if packed else raw
        stream.write(kept)
        return stream  # type: ignore[return-value]

    def _put(self, line: str) -> None:
        """Write a line and hand it to the operating system at once."""
        self._stream.write(line.encode() + b"\n")
        self._stream.flush()

    def _count(self, line: bytes, tracks: int) -> None:
        """Take a video's line into the end record."""
        self._videos += 1
        self._tracks += tracks
        self._digest.update(line + b"\n")

    def write(self, video: VideoTracks) -> None:
        """Append one video."""
        line = canonical_json(video_to_json(video))
        self._put(line)
        self._count(line.encode(), len(video.tracks))

    def __enter__(self) -> TracksWriter:
        """Return the writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the file if nothing was raised, else leave the part file as it is."""
        if kind is None:
            end = {
                "videos": self._videos,
                "tracks": self._tracks,
                "digest": self._digest.hexdigest()[:16],
            }
            self._put(canonical_json({"end": end}))
        if self._to_stdout:
            return
        if self._stream is not self._raw:
            self._stream.close()
        if kind is None:
            os.fsync(self._raw.fileno())
        self._raw.close()
        if kind is None:
            os.replace(part_path(self.path), self.path)


def _salvage(part: Path) -> bytes:
    """Return what can be read of a part file, also of a gzip stream that was cut off."""
    data = part.read_bytes()
    if data[:2] != b"\x1f\x8b":
        return data
    out = b""
    with gzip.open(io.BytesIO(data)) as stream:
        try:
            while block := stream.read1(1 << 16):
                out += block
        except (EOFError, OSError):
            pass
    return out


class TracksReader:
    """Iterates over the videos of a tracks file, checking each as it comes.

    The header is read at once (``.header``); videos are parsed one by one.
    """

    def __init__(self, path: Path) -> None:
        """Open a file (``-`` is standard input) and read its header.

        Raises:
            DataError: the file is missing, empty or not a tracks file.
        """
        self.name = "standard input" if str(path) == STDIO else str(path)
        self._lines = enumerate(_open_lines(path), start=1)
        first = next(self._lines, None)
        if first is None or not first[1].strip():
            raise DataError(
                f"{self.name} is empty, expected a tracks file",
                "if it comes from a pipe, see the messages of the command before",
            )
        self.header = header_from_json(
            parse_json(_text(first[1], self.name), f"{self.name}:1"), self.name
        )

    def __iter__(self) -> Iterator[VideoTracks]:
        """Yield the videos in order.

        Raises:
            DataError: a line is malformed, a video occurs twice, or the end record is missing
                or disagrees with the lines before it.
        """
        seen: set[int] = set()
        categories = {category.id for category in self.header.categories}
        count, tracks, digest = 0, 0, hashlib.sha256()
        ended = False
        for number, line in self._lines:
            where = f"{self.name}:{number}"
            record = parse_json(_text(line, where), where)
            if not isinstance(record, dict):
                raise DataError(f"{where}: a {type(record).__name__}, expected an object")
            if "end" in record:
                self._check_end(record["end"], (count, tracks, digest.hexdigest()[:16]), where)
                count, tracks, digest, ended = 0, 0, hashlib.sha256(), True
            elif "pmvis_tracks" in record:
                self._check_same_header(record, ended, where)
                ended = False
            else:
                video = video_from_json(record, categories, where)
                if video.video.id in seen:
                    raise DataError(f"{where}: video id {video.video.id} occurs a second time")
                seen.add(video.video.id)
                count, tracks = count + 1, tracks + len(video.tracks)
                digest.update(line if line.endswith(b"\n") else line + b"\n")
                yield video
        if not ended:
            raise DataError(
                f"{self.name} ended after {len(seen)} videos without its end record",
                "the command that wrote it failed, see its messages; rerun it with `--resume`",
            )

    def _check_same_header(self, record: dict[str, Any], ended: bool, where: str) -> None:
        """Accept the header of a concatenated file if it continues this one."""
        if not ended:
            raise DataError(f"{where}: a header before the end record of the file in front of it")
        if header_from_json(record, where).categories != self.header.categories:
            raise DataError(
                f"{where}: another vocabulary than on line 1",
                "concatenate only files made with the same categories",
            )

    @staticmethod
    def _check_end(end: Mapping[str, Any], seen: tuple[int, int, str], where: str) -> None:
        """Compare the end record with the lines before it."""
        stated = (end.get("videos"), end.get("tracks"), end.get("digest"))
        if stated != seen:
            raise DataError(
                f"{where}: the end record says {stated[0]} videos, {stated[1]} tracks, digest "
                f"{stated[2]}; the lines hold {seen[0]}, {seen[1]}, {seen[2]}",
                "the file was cut or edited; make it again",
            )


def read_tracks(path: Path) -> TracksReader:
    """Open a tracks file (or ``-``) for reading; see `TracksReader`."""
    return TracksReader(path)


def _open_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a plain or gzip file or of standard input."""
    if str(path) == STDIO:
        yield from sys.stdin.buffer
        return
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            yield from (gzip.open(raw) if packed else raw)
    except FileNotFoundError as error:
        raise DataError(f"tracks file `{path}` does not exist", "check the path") from error
    except (EOFError, OSError) as error:
        raise DataError(f"`{path}` cannot be read to its end: {error}") from error


def _text(line: bytes, where: str) -> str:
    """Decode a line as UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text, expected a tracks file") from error


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
    try:
        categories = tuple(Category(int(c["id"]), str(c["name"])) for c in record["categories"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: the header's categories are malformed ({error!r})") from error
    return TracksHeader(categories, tuple(record.get("lineage", ())))


def video_to_json(video: VideoTracks) -> dict[str, Any]:
    """Return a video as it stands on its line."""
    info = video.video
    record: dict[str, Any] = {
        "video": {
            "id": info.id,
            "name": info.name,
            "height": info.height,
            "width": info.width,
            "length": info.length,
            "file_names": list(info.file_names),
        },
        "tracks": [_track_to_json(track) for track in video.tracks],
    }
    if video.ignored:
        record["ignored"] = [_track_to_json(track) for track in video.ignored]
    return record


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
    try:
        v = record["video"]
        info = VideoInfo(
            id=v["id"],
            name=v["name"],
            height=v["height"],
            width=v["width"],
            length=v["length"],
            file_names=tuple(v["file_names"]),
        )
        rows, ignored = record["tracks"], record.get("ignored", [])
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: a video's line without {error}") from error
    here = f"{where}: video {info.id} `{info.name}`"
    tracks = tuple(_track_from_json(row, info, categories, here) for row in rows)
    aside = tuple(_track_from_json(row, info, categories, here) for row in ignored)
    ids = [track.id for track in tracks]
    if len(ids) != len(set(ids)):
        raise DataError(f"{here}: two tracks share an id, expected ids unique in the video")
    return VideoTracks(info, tracks, aside)


def _track_from_json(
    row: Mapping[str, Any], video: VideoInfo, categories: set[int], here: str
) -> Track:
    """Parse and check one track."""
    try:
        size = [video.height, video.width]
        track = Track(
            id=row["id"],
            category_id=row["category_id"],
            score=row["score"],
            frame_scores=tuple(row["frame_scores"]),
            rles=tuple(None if c is None else RLE(size=size, counts=c) for c in row["masks"]),
            instance=row.get("instance"),
            keyframe=row.get("keyframe"),
            supervision=Supervision(row["supervision"]),
            lineage=row.get("lineage", {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{here}: a malformed track ({error!r})") from error
    check_track(track, video, categories, f"{here}: track {track.id}")
    return track


def check_track(track: Track, video: VideoInfo, categories: set[int], here: str) -> None:
    """Check a track against its video and vocabulary.

    Raises:
        DataError: wrong number of masks or scores, a category outside the vocabulary, a score
            that is no number in [0, 1], or a mask that does not fill the video's frame exactly.
    """
    if track.category_id not in categories:
        raise DataError(f"{here} has category id {track.category_id}, not in the vocabulary")
    for what, found in (("masks", len(track.rles)), ("frame scores", len(track.frame_scores))):
        if found != video.length:
            raise DataError(
                f"{here} has {found} {what}, the video has {video.length} frames",
                "make the file again with the frames it was made from",
            )
    for score in (track.score, *track.frame_scores):
        if score is not None and not (isinstance(score, int | float) and _is_share(score)):
            raise DataError(f"{here} has score {score!r}, expected a number from 0 to 1")
    for frame, rle in enumerate(track.rles):
        if rle is not None:
            masks.validate(rle, f"{here}, frame {frame}")


def _is_share(score: float) -> bool:
    """Tell whether a score is finite and in [0, 1]."""
    return math.isfinite(score) and 0.0 <= score <= 1.0
