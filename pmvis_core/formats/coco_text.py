"""COCO instances JSON entry by entry: one text in memory, and one entry of it at a time.

The twin of ``csrc/formats/coco_index.cpp``, where each entry is known with its place;
`data_check.stills` goes through the same entries to find every fault.

    for section, position, value, begin, end in CocoText(data, "annotations", path).entries():
        ...
"""

from __future__ import annotations

from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple

from pmvis_core.errors import DataError
from pmvis_core.formats.coco import parse_category
from pmvis_core.formats.json_text import JsonText
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
        if not data.isascii():
            try:
                data.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{self._where} cannot be read as text: {error}") from error
        self._text = JsonText(lambda begin, end: data[begin:end], len(data), self._refuse)

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
        found, text, place = {}, self._text, self._text.at
        text.go(begin)
        for key in text.members():
            value = text.at
            text.skip()
            found[key] = value, text.at
        text.go(place)
        return found

    def _entries(self) -> Iterator[Entry]:
        """Yield the entries of all sections."""
        text, missing = self._text, set(SECTIONS)
        self._expect("{")
        for key in text.members():
            if key not in SECTIONS:
                text.skip()
                continue
            if key not in missing:
                raise DataError(f"{self._where}: has two lists called `{key}`, expected one")
            missing.discard(key)
            self._expect("[")
            for position, begin in enumerate(text.items()):
                value = text.value()
                yield Entry(key, position, value, begin, text.at)
        if not text.at_end():
            raise text.fault("Extra data")
        if missing:
            raise self._no_coco()

    def _expect(self, bracket: str) -> None:
        """Refuse a value that opens with another bracket, or is no JSON at all."""
        if self._text.peek() != bracket:
            self._text.skip()
            raise self._no_coco()

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
