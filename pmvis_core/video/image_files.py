"""Image files as frames: RGB uint8, upright, and whole or refused.

OpenCV returns half an image for a truncated JPEG without a word; `read_image` walks the file to its
own end first and says which file, video and frame is broken.

    pixels = read_image(Path("clip/00007.jpg"), "video 3 `clip`, frame 7")
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pmvis_core.errors import DataError

Frame = NDArray[np.uint8]

_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def read_image(path: Path, where: str = "image") -> Frame:
    """Read an image file as (H, W, 3) uint8 RGB, upright.

    Args:
        path: the file.
        where: what a message calls it (``video 3 `a`, frame 7``).

    Raises:
        DataError: it is missing, empty, truncated or no image.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{where}: `{path}` does not exist", "check the images' folder") from error
    except OSError as error:
        raise DataError(f"{where}: `{path}` cannot be read: {error.strerror}") from error
    if not data:
        raise DataError(f"{where}: `{path}` is empty, expected an image")
    if not is_whole(data):
        raise DataError(f"{where}: `{path}` is truncated", "copy or download the file again")
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # a head that states an absurd size
        pixels = None
    if pixels is None:
        raise DataError(f"{where}: `{path}` is no image that can be decoded")
    return to_rgb(pixels)


def to_rgb(bgr: NDArray[Any]) -> Frame:
    """Return OpenCV's pixels (H, W, 3) as RGB uint8."""
    return np.ascontiguousarray(bgr[:, :, ::-1], dtype=np.uint8)


def is_whole(data: bytes) -> bool:
    """Tell whether an image file's content reaches its own end (JPEG, PNG, WebP; else True)."""
    if data.startswith(b"\xff\xd8"):
        return _jpeg_is_whole(data)
    if data.startswith(b"\x89PNG"):
        return b"IEND\xaeB`\x82" in data
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    return True


def _jpeg_is_whole(data: bytes) -> bool:
    """Walk a JPEG's segments to its end marker; thumbnails inside segments do not count.

    Bytes after the end marker are allowed, as cameras append some.
    """
    at = 2
    while at + 4 <= len(data) or data[at : at + 2] == b"\xff\xd9":
        if data[at] != 0xFF:
            return False
        marker = data[at + 1]
        if marker == 0xD9:
            return True
        if marker == 0xFF:
            at += 1
            continue
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            found = _NEXT_MARKER.search(data, at)
            if found is None:
                return False
            at = found.start()
    return False
