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
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from pmvis_core.errors import DataError, UsageError
from pmvis_core.files import (
    STDIO,
    cannot_write,
    canonical_json,
    make_room,
    parse_json,
    part_path,
)
from pmvis_core.tracks_json import (
    TracksHeader,
    check_track,
    header_from_json,
    video_from_json,
    video_to_json,
)
from pmvis_core.types import VideoTracks

__all__ = [
    "SUFFIXES",
    "TracksHeader",
    "TracksReader",
    "TracksWriter",
    "check_track",
    "header_from_json",
    "read_tracks",
    "video_from_json",
    "video_to_json",
]

SUFFIXES = (".tracks.jsonl", ".tracks.jsonl.gz")


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
        kept = [] if self._to_stdout or not resume else self._read_part(header)
        self._stream = self._open(kept)
        if not kept:
            self._put(canonical_json(header.as_json()))

    def _read_part(self, header: TracksHeader) -> list[bytes]:
        """Return the whole lines of the part file, counting what they hold."""
        part = part_path(self.path)
        if not part.exists():
            return []
        data = _salvage(part)
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        if not lines:
            return []
        if lines[0].decode() != canonical_json(header.as_json()) + "\n":
            raise UsageError(
                f"`{part}` was made from other inputs or options, so it cannot be resumed",
                f"repeat the options it was made with, or remove `{part}`",
            )
        kept = [lines[0]]
        for line in lines[1:]:
            video = _kept_video(line, header)
            if video is None:
                break
            self._count(line.rstrip(b"\n"), len(video.tracks))
            self.done_ids.add(video.video.id)
            kept.append(line)
        return kept

    def _open(self, kept: Sequence[bytes]) -> IO[bytes]:
        """Open the sink behind what is kept of an earlier run.

        The earlier work is never at risk: a plain part file is only cut behind its last whole
        line; a packed one, which must be packed anew, is replaced when the copy is whole.
        """
        if self._to_stdout:
            return sys.stdout.buffer
        part = part_path(self.path)
        packed = self.path.suffix == ".gz"
        place = part.with_name(part.name + ".new") if packed and kept else part
        try:
            make_room(self.path)
            self._raw = place.open("r+b" if kept and not packed else "wb")
            if not packed:
                self._raw.truncate(self._raw.seek(sum(map(len, kept))))
                return self._raw
            stream = gzip.GzipFile("", "wb", fileobj=self._raw, mtime=0)
            for line in kept:  # flushed one by one, so that a resumed file has the same bytes
                stream.write(line)
                stream.flush()
            os.replace(place, part)
        except OSError as error:
            raise cannot_write(self.path, error) from error
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
        """Append one video.

        Raises:
            DataError: it holds what no file can (a score that is no number, a name that is no
                text); a reader would refuse the file.
        """
        try:
            line = canonical_json(video_to_json(video))
            line.encode()
        except (UnicodeEncodeError, ValueError) as error:
            info = video.video
            raise DataError(f"video {info.id} {info.name!a} cannot be written: {error}") from error
        self._put(line)
        self._count(line.encode(), len(video.tracks))

    def write_pieces(self, pieces: Iterable[str], tracks: Callable[[], int]) -> None:
        """Append one video whose line is too long to hold, piece by piece.

        Args:
            pieces: the text of `tracks_json.stream_video`.
            tracks: how many tracks it held, asked for at the end.
        """
        for piece in pieces:
            data = piece.encode()
            self._stream.write(data)
            self._digest.update(data)
        self._stream.write(b"\n")
        self._digest.update(b"\n")
        self._stream.flush()
        self._videos += 1
        self._tracks += tracks()

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


def _kept_video(line: bytes, header: TracksHeader) -> VideoTracks | None:
    """Return the video of a part file's line, or None where its sound beginning ends."""
    try:
        record = parse_json(line.decode(), "")
        return video_from_json(record, {category.id for category in header.categories}, "")
    except (DataError, UnicodeDecodeError):
        return None


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
        except (EOFError, OSError, zlib.error):
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
        self._begin = len(first[1])
        self.header = header_from_json(
            parse_json(_text(first[1], self.name), f"{self.name}:1"), self.name
        )

    def __iter__(self) -> Iterator[VideoTracks]:
        """Yield the videos in order.

        Raises:
            DataError: a line is malformed, a video occurs twice, or the end record is missing
                or disagrees with the lines before it.
        """
        return (video for video, _, _ in self.lines())

    def lines(self) -> Iterator[tuple[VideoTracks, int, bytes]]:
        """Yield each video, where its line begins in bytes (of the unpacked file), and the line.

        Raises:
            DataError: as iterating does.
        """
        seen: set[int] = set()
        categories = {category.id for category in self.header.categories}
        count, tracks, digest = 0, 0, hashlib.sha256()
        ended = False
        for number, line in self._lines:
            begin, self._begin = self._begin, self._begin + len(line)
            where = f"{self.name}:{number}"
            record = parse_json(_text(line, where), where)
            if not isinstance(record, dict):
                raise DataError(f"{where}: a {type(record).__name__}, expected an object")
            if "end" in record:
                if ended:
                    raise DataError(f"{where}: a second end record, expected a header")
                self._check_end(record["end"], (count, tracks, digest.hexdigest()[:16]), where)
                count, tracks, digest, ended = 0, 0, hashlib.sha256(), True
            elif "pmvis_tracks" in record:
                self._check_same_header(record, ended, where)
                ended = False
            else:
                if ended:
                    raise DataError(
                        f"{where}: a line after the end record, expected a header",
                        "concatenate whole files, headers and end records included",
                    )
                video = video_from_json(record, categories, where)
                if video.video.id in seen:
                    raise DataError(f"{where}: video id {video.video.id} occurs a second time")
                seen.add(video.video.id)
                count, tracks = count + 1, tracks + len(video.tracks)
                digest.update(line if line.endswith(b"\n") else line + b"\n")
                yield video, begin, line
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
    def _check_end(end: Any, seen: tuple[int, int, str], where: str) -> None:
        """Compare the end record with the lines before it."""
        if not isinstance(end, dict):
            raise DataError(f"{where}: the end record is {end!r}, expected an object")
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
    name = "standard input" if str(path) == STDIO else f"`{path}`"
    try:
        raw: Any = nullcontext(sys.stdin.buffer) if str(path) == STDIO else path.open("rb")
        with raw as stream:
            packed = stream.peek(2)[:2] == b"\x1f\x8b"
            yield from (gzip.open(stream) if packed else stream)
    except FileNotFoundError as error:
        raise DataError(f"tracks file {name} does not exist", "check the path") from error
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{name} cannot be read to its end: {error}",
            "the command that wrote it failed, or the file was cut; make it again",
        ) from error


def _text(line: bytes, where: str) -> str:
    """Decode a line as UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text, expected a tracks file") from error
