"""Files that appear whole or not at all, canonical JSON, and digests.

A named output is written as ``NAME.part`` in the same folder and renamed when it is complete, so
Make never sees half a target. The same value always gives the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pmvis_core.errors import DataError, ResourceError

STDIO = "-"
"""The name that stands for standard input or output."""


def part_path(path: Path) -> Path:
    """Return where a file lies while it is being written."""
    return path.with_name(path.name + ".part")


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open ``path.part`` for writing; on a clean exit flush it to disk and rename it to ``path``.

    Raises:
        ResourceError: the folder cannot be made or written, or ``path`` is a folder.
    """
    part = part_path(path)
    try:
        make_room(path)
        text = "b" not in mode
        stream = part.open(mode, encoding="utf-8" if text else None, newline="\n" if text else None)
    except OSError as error:
        raise cannot_write(path, error) from error
    with stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)


def make_room(path: Path) -> None:
    """Make the folder of an output file.

    Raises:
        OSError: it cannot be made, or ``path`` is a folder itself.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)


def cannot_write(path: Path, error: OSError) -> ResourceError:
    """Return the error for a place that cannot be written."""
    return ResourceError(
        f"cannot write `{path}`: {error.strerror}", "give a writable place with `-o`"
    )


def canonical_json(value: Any) -> str:
    """Return ``value`` as one line of JSON: sorted keys, no spaces, shortest floats, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as canonical JSON with a final newline, atomically."""
    with atomic_write(path) as stream:
        stream.write(canonical_json(value) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: how a message calls it (``ground truth``).

    Raises:
        DataError: it is missing, empty or not JSON; the message names line and column.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(
            f"{what} `{path}` does not exist", "check the path, or make the file first"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what} `{path}` cannot be read as text: {error}") from error
    if not text.strip():
        raise DataError(f"{what} `{path}` is empty, expected JSON")
    return parse_json(text, f"{what} `{path}`")


def parse_json(text: str, where: str) -> Any:
    """Parse strict JSON (no NaN, no Infinity).

    Raises:
        DataError: naming ``where``, line and column.
    """

    def refuse(token: str) -> None:
        raise DataError(f"{where}: holds `{token}`, expected a finite number")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DataError(
            f"{where}: not valid JSON at {place}: {error.msg}",
            "the file may be cut off; make it again",
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deep, or a number without end
        raise DataError(f"{where}: no JSON that a program can hold: {error}") from error


def significant(value: float, digits: int = 6) -> float:
    """Round to significant digits, so that noise of the last bits does not change a file."""
    return float(f"{value:.{digits}g}")


def digest_bytes(data: bytes) -> str:
    """Return the first 16 hexadecimal digits of SHA-256, enough to tell inputs apart."""
    return hashlib.sha256(data).hexdigest()[:16]


def digest_file(path: Path) -> str:
    """Return the digest of a file's content, read in blocks."""
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()[:16]
