"""COCO instances JSON entry by entry: one text in memory, and one entry of it at a time.

The twin of ``csrc/coco_index.cpp``, where each entry is known with its place; `data_check.stills`
goes through the same entries to find every fault. The text is taken as Latin-1, so that places in
it are places in the file; strings that are not ASCII are parsed again from bytes.

    for section, position, value, begin, end in CocoText(data, "annotations", path).entries():
        ...
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from json.decoder import WHITESPACE, JSONDecodeError, JSONDecoder, scanstring  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any, NamedTuple

from pmvis_core.errors import DataError
from pmvis_core.formats.coco import parse_category
from pmvis_core.types import Category

SECTIONS = ("images", "annotations", "categories")
"""The lists that are gone through; what else a file holds is only read past."""


class Entry(NamedTuple):
    """One entry of one of the `SECTIONS`."""

    section: str
    """Which list."""
    position: int
    """In the list, from 0."""
    value: Any
    """As parsed."""
    begin: int
    """Where its text begins, in bytes."""
    end: int
    """Where it ends."""


class CocoText:
    """The text of a COCO file."""

    def __init__(self, data: bytes, what: str, path: Path) -> None:
        """Take a file's content.

        Args:
            data: all of it.
            what: how messages call the file.
            path: where it lies.

        Raises:
            DataError: it is not UTF-8.
        """
        self._where = f"{what} `{path}`"
        self._path = path
        self._data = data
        self._ascii = data.isascii()
        if not self._ascii:
            try:
                data.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{self._where} cannot be read as text: {error}") from error
        self._text = data.decode("latin-1")
        self._decoder = JSONDecoder(parse_constant=self._refuse)

    def _refuse(self, token: str) -> None:
        """Refuse NaN and infinity."""
        raise DataError(f"{self._where}: holds `{token}`, expected a finite number")

    def entries(self) -> Iterator[Entry]:
        """Yield the entries of all sections in the file's order.

        Raises:
            DataError: the text is no JSON from some place on, or no COCO instances file.
        """
        try:
            yield from self._entries()
        except (JSONDecodeError, StopIteration) as error:
            where = ""
            if isinstance(error, JSONDecodeError):
                where = f" at line {error.lineno}, column {error.colno}: {error.msg}"
            raise DataError(
                f"{self._where}: not valid JSON{where}", "the file may be cut off; make it again"
            ) from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{self._where}: no JSON that a program can hold: {error}") from error

    def spans(self, begin: int) -> dict[str, tuple[int, int]]:
        """Return where the values of an object that begins there stand, by their keys."""
        found = {}
        at, ended = self._first(begin, "}")
        while not ended:
            key, place = self._key(at)
            end = self._decoder.raw_decode(self._text, place)[1]
            found[key] = place, end
            at, ended = self._next(end, "}")
        return found

    def _entries(self) -> Iterator[Entry]:
        """Yield the entries of all sections."""
        missing = set(SECTIONS)
        begin = self._space(0)
        if not self._text.startswith("{", begin):
            self._decoder.raw_decode(self._text, begin)
            raise self._no_coco()
        at, ended = self._first(begin, "}")
        while not ended:
            key, at = self._key(at)
            if key in SECTIONS:
                if key not in missing:
                    raise DataError(f"{self._where}: has two lists called `{key}`, expected one")
                missing.discard(key)
                at = yield from self._list(key, at)
            else:
                at = self._decoder.raw_decode(self._text, at)[1]
            at, ended = self._next(at, "}")
        if self._space(at) != len(self._text):
            raise JSONDecodeError("Extra data", self._text, at)
        if missing:
            raise self._no_coco()

    def _list(self, section: str, begin: int) -> Generator[Entry, None, int]:
        """Yield the entries of a list; return where it ends."""
        if not self._text.startswith("[", begin):
            self._decoder.raw_decode(self._text, begin)
            raise self._no_coco()
        at, ended = self._first(begin, "]")
        position = 0
        while not ended:
            value, end = self._decoder.raw_decode(self._text, at)
            if not self._ascii and not self._text[at:end].isascii():
                value = json.loads(self._data[at:end])
            yield Entry(section, position, value, at, end)
            position += 1
            at, ended = self._next(end, "]")
        return at

    def _first(self, begin: int, close: str) -> tuple[int, bool]:
        """Go behind the bracket that opens; return the place, and whether it closes at once."""
        at = self._space(begin + 1)
        ended = self._text.startswith(close, at)
        return at + ended, ended

    def _next(self, at: int, close: str) -> tuple[int, bool]:
        """Go behind the comma or the bracket that closes; return the place, and whether it did."""
        at = self._space(at)
        if self._text.startswith(close, at):
            return at + 1, True
        if not self._text.startswith(",", at):
            raise JSONDecodeError("Expecting ',' delimiter", self._text, at)
        return self._space(at + 1), False

    def _key(self, at: int) -> tuple[str, int]:
        """Read a key; return it, and where its value begins."""
        if not self._text.startswith('"', at):
            raise JSONDecodeError("Expecting property name", self._text, at)
        key, at = scanstring(self._text, at + 1)
        at = self._space(at)
        if not self._text.startswith(":", at):
            raise JSONDecodeError("Expecting ':' delimiter", self._text, at)
        return key, self._space(at + 1)

    def _space(self, at: int) -> int:
        """Return the next place that is no space."""
        return int(WHITESPACE.match(self._text, at).end())

    def _no_coco(self) -> DataError:
        """Return the error for a file that is something else."""
        return DataError(
            f"{self._path}: no COCO instances JSON, expected an object with the lists `images`, "
            "`annotations` and `categories`"
        )


def categories_of(rows: Any, where: str) -> tuple[Category, ...]:
    """Parse a file's ``categories``.

    Raises:
        DataError: one is malformed; ``where`` begins the message.
    """
    return tuple(parse_category(row, f"{where}: categories[{i}]") for i, row in enumerate(rows))
