"""Tables made of a large file, kept in a file of their own that all processes map.

They are kept as ``.NAME.index`` beside the file, or in the user's cache folder where that is not
writable. Such an index states the digest of the file it was made of and of its own content;
whatever does not agree is made again. What a table does not hold stays in the file: `FileText`
reads it at its place. `coco_index` and `tracks_index` say what is in the tables.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pmvis_core.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")

WORTH_KEEPING_BYTES = 16 << 20
"""Smaller files are read anew each time, which takes less than a second."""
UNSOUND = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)
"""What reading an index may raise that is damaged, or was not written by us."""

_MAGIC = b"pmvis index\n"
_ALIGNMENT = 64


class FileText:
    """Parts of a file that must not change while it is read.

    Reads at a place of its own each time, so threads share it; it is pickled as its path and state.
    """

    def __init__(self, path: Path, state: tuple[int, int] | None = None) -> None:
        """Open the file.

        Args:
            path: where it lies.
            state: size and time of change that it must have; None: those that it has now.

        Raises:
            OSError: it cannot be opened.
        """
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._state = self._stated() if state is None else state

    def __len__(self) -> int:
        """Return the file's size in bytes."""
        return self._state[0]

    def _stated(self) -> tuple[int, int]:
        """Return what a change of the file changes."""
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns

    def read(self, begin: int, end: int) -> bytes:
        """Return the bytes of ``[begin, end)``.

        Raises:
            DataError: the file was changed since it was opened.
        """
        self.check()
        return os.pread(self._file.fileno(), end - begin, begin) if end > begin else b""

    def check(self) -> None:
        """Refuse a file that is not what it was.

        Raises:
            DataError: it was changed since it was opened.
        """
        if self._stated() != self._state:
            raise DataError(
                f"`{self.path}` was changed while it was in use", "start again; `--resume` goes on"
            )

    def __reduce__(self) -> tuple[type[FileText], tuple[Path, tuple[int, int]]]:
        """Be opened again in another process, which must find the same file."""
        return FileText, (self.path, self._state)


def kept_or_made(
    path: Path,
    digest: str,
    load: Callable[[Path], T | None],
    make: Callable[[], T],
    keep: Callable[[Path, T], bool],
) -> T:
    """Return the index of a file: one that was kept, or a new one, which is kept for the next time.

    Args:
        path: the file.
        digest: of its content.
        load: reads an index that was kept; None if it is absent or not sound.
        make: makes it of the file.
        keep: writes it; tells whether it could be written.
    """
    places = _places(path, digest)
    for place in places:
        index = load(place)
        if index is not None:
            return index
    index = make()
    for place in places:
        if keep(place, index):
            return load(place) or index
    logger.info("`%s`: no place to keep an index, so it is read anew each time", path)
    return index


def _places(path: Path, digest: str) -> list[Path]:
    """Return where an index may lie: beside the file, or in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [
        path.with_name(f".{path.name}.index"),
        Path(cache) / "pmvis" / f"{path.name}-{digest}.index",
    ]


def write_kept(
    place: Path,
    version: int | str,
    digest: str,
    facts: Mapping[str, Any],
    tables: Sequence[NDArray[Any]],
) -> bool:
    """Write an index, whole or not at all; tell whether it could be written.

    Processes that start together write files of their own; the last one to be renamed stays.

    Args:
        place: where.
        version: of what facts and tables mean.
        digest: of the file that they were made of.
        facts: JSON values.
        tables: (N,) each.
    """
    parts = [np.ascontiguousarray(table).view(np.uint8).data for table in tables]
    body = [piece for part in parts for piece in (part, _padding(len(part)))]
    head = {
        "format": version,
        "file": digest,
        "body": _digest(body),
        **facts,
        "lengths": [len(table) for table in tables],
    }
    start = _MAGIC + json.dumps(head).encode() + b"\n"
    start += _padding(len(start))
    half_done = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        number, half_done = tempfile.mkstemp(dir=place.parent, prefix=place.name, suffix=".part")
        with os.fdopen(number, "wb") as stream:
            stream.write(start)
            stream.writelines(body)
        os.chmod(half_done, 0o644)
        os.replace(half_done, place)
    except OSError:
        if half_done is not None:
            Path(half_done).unlink(missing_ok=True)
        return False
    return True


def _digest(pieces: Iterable[bytes | memoryview]) -> str:
    """Return the digest of pieces that follow each other; see `files.digest_bytes`."""
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(piece)
    return sha.hexdigest()[:16]


def _padding(length: int) -> bytes:
    """Return what makes the next part aligned."""
    return b"\0" * (-length % _ALIGNMENT)


def read_kept(
    place: Path, version: int | str, digest: str, kinds: Sequence[np.dtype[Any]]
) -> tuple[dict[str, Any], list[NDArray[Any]]] | None:
    """Map an index that was kept; see `write_kept`.

    Args:
        place: where.
        version: that it must have.
        digest: of the file that it must be made of.
        kinds: types of the tables' elements.

    Returns:
        Its head with the facts, and its tables, which cannot be written; None if it is another
        version's or file's, or damaged.

    Raises:
        Exception: one of `UNSOUND`: it is absent, or no index at all.
    """
    with place.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if data[: len(_MAGIC)] != _MAGIC:
        return None
    end = data.find(b"\n", len(_MAGIC)) + 1
    head = json.loads(data[len(_MAGIC) : end])
    start = end + len(_padding(end))
    if (head["format"], head["file"]) != (version, digest):
        return None
    if _digest([memoryview(data)[start:]]) != head["body"]:
        logger.warning("`%s` is damaged; the index is made again", place)
        return None
    return head, list(_cut(data, start, head["lengths"], kinds))


def _cut(
    data: mmap.mmap, start: int, lengths: Sequence[int], kinds: Sequence[np.dtype[Any]]
) -> Iterator[NDArray[Any]]:
    """Yield the tables that follow each other in a mapped file."""
    for kind, length in zip(kinds, lengths, strict=True):
        yield np.frombuffer(data, kind, length, start)
        size = length * kind.itemsize
        start += size + len(_padding(size))
