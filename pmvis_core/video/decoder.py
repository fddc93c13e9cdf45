"""One video file under OpenCV's decoder, and the ways in which it may be cut off.

OpenCV stops without a word where a file ends early; `declared_length` and `count_rest` let the
caller notice, and a Matroska file's own length is checked before anything is decoded.

    with VideoDecoder(path, 1, "clip") as decoder:
        first = decoder.read()
"""

from __future__ import annotations

import os
from pathlib import Path

import cv2

from pmvis_core.errors import DataError
from pmvis_core.video.image_files import Frame, to_rgb

_MATROSKA = (".mkv", ".webm")
_EBML, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"
"""Ids of the first two elements of a Matroska file."""


class VideoDecoder:
    """OpenCV's decoder of one video file, closed when left."""

    def __init__(self, path: Path, video_id: int, name: str) -> None:
        """Open the file; id and name are for messages.

        Raises:
            DataError: it is missing, empty or not a video.
        """
        self._where = f"video {video_id} `{name}`: `{path}`"
        if not path.is_file():
            raise DataError(f"{self._where} does not exist", "check `--frames`")
        if path.stat().st_size == 0:
            raise DataError(f"{self._where} is empty, expected a video")
        if path.suffix.lower() in _MATROSKA and not _matroska_is_whole(path):
            raise self.broken("is shorter than its header says")
        # The decoder's own complaints would stand beside our one message.
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise self.broken("cannot be opened as a video")

    @property
    def declared_length(self) -> int:
        """Number of frames that the container states or implies."""
        return int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))

    @property
    def fps(self) -> float:
        """Frames a second that the container states."""
        return float(self._capture.get(cv2.CAP_PROP_FPS))

    def read(self) -> Frame | None:
        """Return the next frame (H, W, 3) RGB, or None at the end."""
        found, frame = self._capture.read()
        return to_rgb(frame) if found else None

    def read_after(self, skipped: int) -> Frame | None:
        """Return the frame behind the next ``skipped`` ones."""
        whole = all(self._capture.grab() for _ in range(skipped))
        return self.read() if whole else None

    def read_at(self, t: int) -> Frame | None:
        """Return frame ``t``, by seeking where that is exact and else by decoding up to it."""
        self._capture.set(cv2.CAP_PROP_POS_FRAMES, t)
        if round(self._capture.get(cv2.CAP_PROP_POS_FRAMES)) == t:
            return self.read()
        self._capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
        return self.read_after(t)

    def count_rest(self) -> int:
        """Decode to the end and return the number of frames from here."""
        count = 0
        while self._capture.grab():
            count += 1
        return count

    def broken(self, what: str) -> DataError:
        """Return the error for a file that is not what it says."""
        return DataError(
            f"{self._where} {what}",
            "the file may be cut off; if it plays to its end elsewhere, re-encode it with ffmpeg",
        )

    def __enter__(self) -> VideoDecoder:
        """Return the decoder itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the decoder."""
        self._capture.release()


def _matroska_is_whole(path: Path) -> bool:
    """Tell whether a Matroska or WebM file is as long as its segment says, where it says so."""
    with path.open("rb") as stream:
        head = stream.read(4096)
    if not head.startswith(_EBML):
        return True
    at, header = _ebml_size(head, len(_EBML))
    if header is None or not head.startswith(_SEGMENT, at + header):
        return True
    at, segment = _ebml_size(head, at + header + len(_SEGMENT))
    return segment is None or path.stat().st_size >= at + segment


def _ebml_size(head: bytes, at: int) -> tuple[int, int | None]:
    """Return where an element's content begins and its bytes, None if the writer left it open."""
    first = head[at] if at < len(head) else 0
    length = 9 - first.bit_length()
    value = int.from_bytes(head[at : at + length], "big") & ((1 << 7 * length) - 1)
    return at + length, None if value == (1 << 7 * length) - 1 else value
