"""Image files side by side: present, whole, and of the size that annotations say.

``fast`` reads the head of a file only, which finds missing files, wrong sizes and what is no image;
decoding the whole finds truncated and damaged ones, too.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from pmvis_core.data_check.report import Notes
from pmvis_core.errors import DataError
from pmvis_core.progress import Progress
from pmvis_core.video.image_files import read_image

_ORIENTATION = 0x0112
_TURNED = range(5, 9)
"""Values of EXIF's orientation that swap height and width."""
_AT_ONCE = 4096
_UNREADABLE = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error),
    Image.DecompressionBombError,
)
"""What Pillow raises at heads that make no sense."""


class Picture(NamedTuple):
    """A file to be looked at."""

    path: Path
    """Where it should lie."""
    size: tuple[int, int]
    """(height, width) in pixels that the annotations say."""
    where: str
    """How messages call it."""


def check_pictures(
    pictures: Iterable[Picture], notes: Notes, *, fast: bool, workers: int, progress: Progress
) -> int:
    """Note what is wrong with files, in their order; return how many there are.

    Args:
        pictures: the files.
        notes: gets the faults.
        fast: read the heads only.
        workers: threads; 0 for one a processor.
        progress: is told of every file.
    """
    listed = list(pictures)
    number = workers or os.cpu_count() or 1
    with ThreadPoolExecutor(number) as pool:
        found = _in_blocks(pool, listed, fast)
        for picture, problem in progress(found, "images", len(listed)):
            if problem is not None:
                notes.add(problem[0], f"{picture.where}: {problem[1]}")
    return len(listed)


Problem = tuple[str, str] | None
"""Kind and text of what is wrong with a file."""


def _in_blocks(
    pool: ThreadPoolExecutor, pictures: list[Picture], fast: bool
) -> Iterator[tuple[Picture, Problem]]:
    """Yield each file with what is wrong; no more than a block waits, so an interrupt is quick."""
    look = _head if fast else _whole
    for begin in range(0, len(pictures), _AT_ONCE):
        block = pictures[begin : begin + _AT_ONCE]
        yield from zip(block, pool.map(look, block), strict=True)


def _whole(picture: Picture) -> Problem:
    """Decode a file."""
    if not picture.path.is_file():
        return "image-missing", f"`{picture.path}`"
    try:
        height, width = read_image(picture.path, "image").shape[:2]
    except DataError as error:
        return "image-unreadable", error.message.removeprefix("image: ")
    return _size_problem(picture, height, width)


def _head(picture: Picture) -> Problem:
    """Read the head of a file."""
    try:
        with Image.open(picture.path) as image:
            width, height = image.size
            if image.getexif().get(_ORIENTATION) in _TURNED:
                height, width = width, height
    except FileNotFoundError:
        return "image-missing", f"`{picture.path}`"
    except _UNREADABLE as error:
        return "image-unreadable", f"`{picture.path}`: {error}"
    return _size_problem(picture, height, width)


def _size_problem(picture: Picture, height: int, width: int) -> Problem:
    """Compare a size with the stated one."""
    if (height, width) == picture.size:
        return None
    told = f"{width}x{height}, the annotations say {picture.size[1]}x{picture.size[0]}"
    return "image-size", f"`{picture.path}` is {told}"
