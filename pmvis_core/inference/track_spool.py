"""What the tracks of one video collect, kept on disk: memory holds the living tracks only.

A track's appearances (frame, class probabilities, mask) form a chain through one file, each record
pointing to the next; a track that has ended leaves its summary (first record, number, sums and
peaks) at its place in a second file, ordered by creation. So neither the length of a video nor the
number of its dead tracks shows in memory, and rows are read back in order at the end.

    spool.add(identity, frame, probabilities, counts)
    for summary in spool.summaries():
        for appearance in spool.appearances(summary): ...
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pmvis_core.files import cannot_write

_RECORD = struct.Struct("<qqq")
"""Place of the track's next record (0: none yet), frame, bytes of the mask's text."""
_SUMMARY = struct.Struct("<qqqq")
"""Identity, last frame, place of the first record, number of appearances."""
_USUAL_TEXT = 1024
"""Bytes of a mask's text that are read along with its record."""


class Appearance(NamedTuple):
    """One track in one frame."""

    frame: int
    """From 0."""
    probabilities: NDArray[np.float32]
    """(K,) class probabilities."""
    counts: str
    """The mask's run lengths, as in `types.RLE`."""


@dataclass
class Summary:
    """One track as a whole."""

    identity: int
    """The tracker's id."""
    order: int
    """Place among all tracks in the order of their creation."""
    number: int
    """Appearances."""
    first: int
    """Place of the first record."""
    sums: NDArray[np.float64]
    """(K,) class probabilities summed over the appearances."""
    peaks: NDArray[np.float32]
    """(K,) largest class probabilities of the appearances."""
    last: int = 0
    """Place of the last record."""
    last_frame: int = -1
    """Frame of the last appearance."""

    def means(self) -> NDArray[np.float64]:
        """Return (K,) mean probabilities over the frames in which the track is present."""
        return self.sums / self.number

    def scores(self, score_type: str) -> NDArray[np.float64]:
        """Return the (K,) scores of the track; ``score_type`` is one of `config.SCORE_TYPES`."""
        return self.means() if score_type == "mean" else self.peaks.astype(np.float64)


class TrackSpool:
    """The appearances of one video's tracks; a context manager that leaves nothing behind."""

    def __init__(self, classes: int, folder: Path | None = None) -> None:
        """Open two nameless files.

        Args:
            classes: K.
            folder: where they lie; None: where the system keeps temporary files.

        Raises:
            ResourceError: the folder cannot be written.
        """
        self.classes = classes
        self.alive: dict[int, Summary] = {}
        """The tracks that may still grow, by identity."""
        self._created = 0
        self._end = 1  # no record lies at 0, which means "none"
        try:
            self._records = tempfile.TemporaryFile(dir=folder, buffering=0)
            self._ended = tempfile.TemporaryFile(dir=folder, buffering=0)
        except OSError as error:
            raise cannot_write(folder or Path(tempfile.gettempdir()), error) from error

    def add(
        self, identity: int, frame: int, probabilities: NDArray[np.float32], counts: str
    ) -> None:
        """Append an appearance; an identity that is not alive begins a new track.

        Args:
            identity: the tracker's id.
            frame: later than the track's frames so far.
            probabilities: (K,).
            counts: the mask's run lengths.
        """
        place = self._end
        track = self.alive.get(identity)
        if track is None:
            sums, peaks = np.zeros(self.classes), np.zeros(self.classes, np.float32)
            track = Summary(identity, self._created, 0, place, sums, peaks)
            self.alive[identity] = track
            self._created += 1
        else:
            _write(self._records, place.to_bytes(8, "little"), track.last)
        text = counts.encode()
        data = _RECORD.pack(0, frame, len(text)) + probabilities.astype("<f4").tobytes() + text
        _write(self._records, data, place)
        self._end += len(data)
        track.sums += probabilities
        np.maximum(track.peaks, probabilities, out=track.peaks)
        track.number += 1
        track.last, track.last_frame = place, frame

    def drop(self, identity: int) -> None:
        """Forget a living track as if it had never been."""
        del self.alive[identity]

    def end(self, identity: int) -> None:
        """Take a living track out of memory; it keeps its place among the summaries."""
        track = self.alive.pop(identity)
        head = _SUMMARY.pack(track.identity, track.last_frame, track.first, track.number)
        data = head + track.sums.tobytes() + track.peaks.tobytes()
        _write(self._ended, data, track.order * len(data))

    def summaries(self) -> Iterator[Summary]:
        """End all tracks and yield them in the order of their creation."""
        for identity in list(self.alive):
            self.end(identity)
        size = _SUMMARY.size + 12 * self.classes
        for order in range(self._created):
            data = os.pread(self._ended.fileno(), size, order * size)
            if len(data) < size:
                return
            identity, last_frame, first, number = _SUMMARY.unpack_from(data)
            if number:
                sums = np.frombuffer(data, np.float64, self.classes, _SUMMARY.size)
                end = _SUMMARY.size + sums.nbytes
                peaks = np.frombuffer(data, np.float32, self.classes, end)
                yield Summary(identity, order, number, first, sums, peaks, last_frame=last_frame)

    def appearances(self, summary: Summary) -> Iterator[Appearance]:
        """Yield the appearances of a track in the order of frames."""
        place = summary.first
        head = _RECORD.size + 4 * self.classes
        while place:
            data = os.pread(self._records.fileno(), head + _USUAL_TEXT, place)
            following, frame, length = _RECORD.unpack_from(data)
            if length > _USUAL_TEXT:
                data = os.pread(self._records.fileno(), head + length, place)
            text = data[head : head + length].decode()
            values = np.frombuffer(data, "<f4", self.classes, _RECORD.size)
            yield Appearance(frame, values, text)
            place = following

    def __enter__(self) -> TrackSpool:
        """Return the spool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self.close()

    def close(self) -> None:
        """Close the files, which removes them."""
        self._records.close()
        self._ended.close()


def _write(file: IO[bytes], data: bytes, place: int) -> None:
    """Write all of ``data`` at a place of a file."""
    try:
        while data:
            done = os.pwrite(file.fileno(), data, place)
            data, place = data[done:], place + done
    except OSError as error:
        raise cannot_write(Path(tempfile.gettempdir()), error) from error
