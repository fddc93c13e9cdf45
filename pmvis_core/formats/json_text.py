"""A JSON text to walk through: one value in memory at a time, and of each where it stands.

Whoever walks decides at each value whether to take it, to go into it, or to read past it; the
cursor then stands behind it. The text is taken as Latin-1, so that places in it are places in the
file; values that are not ASCII are parsed again from bytes. Of a long file only a window is held.

    text = JsonText(file.read, size)
    for key in text.members():
        if key == "annotations":
            for begin in text.items():
                row = text.value()
        else:
            text.skip()
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from json.decoder import WHITESPACE, JSONDecodeError, JSONDecoder, scanstring  # type: ignore[attr-defined]
from typing import Any

WINDOW_BYTES = 4 << 20
"""What is held of a long text, unless one of its values is longer."""

_NUMBER_TAIL = 3
"""What a number may still need behind its last digit to be told whole: ``e-7``."""
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_BEHIND = re.compile(r"[ \t\n\r]*([,\]}])[ \t\n\r]*")


class JsonText:
    """A text and a cursor in it."""

    def __init__(
        self,
        read: Callable[[int, int], bytes],
        size: int,
        refuse: Callable[[str], Any] | None = None,
        *,
        window_bytes: int | None = None,
    ) -> None:
        """Start before the first value.

        Args:
            read: returns the bytes of ``[begin, end)``.
            size: bytes of all.
            refuse: is called with ``NaN``, ``Infinity`` and ``-Infinity``, and raises; None: they
                are no valid JSON.
            window_bytes: what to hold; None: all of it.
        """
        self.at = 0
        """The cursor: a place in the file, in bytes."""
        self._read, self._size = read, size
        self._decoder = JSONDecoder(parse_constant=_refuse if refuse is None else refuse)
        self._window_bytes = size if window_bytes is None else window_bytes
        self._load(self._window_bytes)
        self._space()

    def go(self, place: int) -> None:
        """Move the cursor."""
        self.at = place
        if not self._base <= place < self._base + len(self._text):
            self._load(self._window_bytes)

    def peek(self) -> str:
        """Return the character at the cursor, nothing at the end."""
        place = self.at - self._base
        return self._text[place : place + 1]

    def at_end(self) -> bool:
        """Tell whether nothing but space is left."""
        self._space()
        return self.at == self._size

    def value(self) -> Any:
        """Return the value at the cursor and go behind it.

        Raises:
            ValueError: it is no JSON (`JSONDecodeError`), no UTF-8, or a number without end.
            RecursionError: it is nested too deep.
        """
        begin = self.at
        value = self._scan()
        if not self._ascii:
            data = self._read(begin, self.at)
            if not data.isascii():
                value = json.loads(data)
        return value

    def skip(self) -> None:
        """Go behind the value at the cursor; see `value`."""
        self._scan()

    def members(self) -> Iterator[str]:
        """Yield the keys of the object at the cursor, which then stands at the key's value.

        Raises:
            JSONDecodeError: there is no JSON object.
        """
        ended = self._open("{", "}")
        while not ended:
            yield self._key()
            ended = self._behind("}")

    def items(self) -> Iterator[int]:
        """Yield the places of the items of the list at the cursor, where it then stands.

        Raises:
            JSONDecodeError: there is no JSON list.
        """
        ended = self._open("[", "]")
        while not ended:
            yield self.at
            ended = self._behind("]")

    def fault(self, message: str) -> JSONDecodeError:
        """Return the error that there is no JSON at the cursor."""
        return JSONDecodeError(message, self._text, self.at - self._base)

    def _load(self, size: int) -> None:
        """Hold so many bytes from the cursor on."""
        self._base = self.at
        self._text = self._read(self.at, min(self.at + size, self._size)).decode("latin-1")
        self._ascii = self._text.isascii()
        self._last = self.at + size >= self._size

    def _more(self) -> bool:
        """Hold what comes behind the window, too; tell whether there is anything."""
        if self._last:
            return False
        moved = self.at - self._base > self._window_bytes // 2
        self._load(self._window_bytes if moved else 2 * len(self._text))
        return True

    def _scan(self) -> Any:
        """Return the value at the cursor, strings as Latin-1, and go behind it."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self.at - self._base)
            except JSONDecodeError:
                if not self._more():
                    raise
                continue
            if self._last or end + _NUMBER_TAIL < len(self._text):
                self.at = self._base + end
                return value
            self._more()

    def _space(self) -> None:
        """Go behind white space."""
        while True:
            end = int(WHITESPACE.match(self._text, self.at - self._base).end())
            self.at = self._base + end
            if end < len(self._text) or not self._more():
                return

    def _open(self, bracket: str, close: str) -> bool:
        """Go behind a bracket that opens; tell whether it closes at once."""
        if self.peek() != bracket:
            raise self.fault(f"Expecting '{bracket}'")
        self.at += 1
        self._space()
        ended = self.peek() == close
        self.at += ended
        return ended

    def _behind(self, close: str) -> bool:
        """Go behind the comma or the bracket that closes; tell whether it did."""
        while True:
            match = _BEHIND.match(self._text, self.at - self._base)
            if (match is not None and match.end() < len(self._text)) or not self._more():
                break
        if match is None or match[1] not in (",", close):
            self._space()
            raise self.fault("Expecting ',' delimiter")
        ended = match[1] == close
        self.at = self._base + (match.end(1) if ended else match.end())
        return ended

    def _key(self) -> str:
        """Return a key and go to its value."""
        if self.peek() != '"':
            raise self.fault("Expecting property name")
        while True:
            try:
                key, end = scanstring(self._text, self.at - self._base + 1)
            except JSONDecodeError:
                if not self._more():
                    raise
                continue
            match = _COLON.match(self._text, end)
            if (match is not None and match.end() < len(self._text)) or not self._more():
                break
        if match is None:
            self.at = self._base + end
            self._space()
            raise self.fault("Expecting ':' delimiter")
        self.at = self._base + match.end()
        return str(key)


def is_utf8(read: Callable[[int, int], bytes], size: int) -> bool:
    """Tell whether a text is UTF-8, reading it in parts."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for begin in range(0, size, WINDOW_BYTES):
            decoder.decode(read(begin, min(begin + WINDOW_BYTES, size)))
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _refuse(token: str) -> None:
    """Refuse NaN and infinity."""
    raise ValueError(f"`{token}` is no number")
