"""Where the frames of one video come from: image files, a video file, a camera, or a part of them.

Frames are RGB uint8 arrays (H, W, 3), upright, and come one at a time, so memory does not grow with
a video. `FrameSource.frames` stops at the first frame that cannot be trusted; `readings` hands the
error out in that frame's place, for callers that can go on without it.

    for frame in SelectedFrames(VideoFile(path, 1, "clip"), range(0, 300, 5)).frames():
        ...
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import cv2

from pmvis_core.errors import DataError, ResourceError, UsageError
from pmvis_core.types import VideoInfo
from pmvis_core.video.decoder import VideoDecoder
from pmvis_core.video.image_files import Frame, read_image, to_rgb

ENDLESS = sys.maxsize
"""The number of frames of a source that goes on until it is stopped."""
_COUNTED = (".mp4", ".m4v", ".mov", ".avi")
"""Containers that store their number of frames; the others are counted by decoding them."""
_SLICE = re.compile(r"(.+)\[(\d+):(\d+):(\d+)\]")


class FrameSource(ABC):
    """The frames of one video; nothing is read before it is asked for."""

    live = False
    """Whether frames come from a camera: no length is known, and none can be read again."""

    def __init__(self, info: VideoInfo | None = None) -> None:
        """Keep the video's identity if it is known; else it is measured when first needed."""
        self._info = info
        self._stopped = False

    @property
    def info(self) -> VideoInfo:
        """The video's identity, size and number of frames (`ENDLESS` for a camera).

        Raises:
            DataError: no frame can be read.
        """
        if self._info is None:
            self._info = self._measure()
        return self._info

    @property
    def fps(self) -> float:
        """Frames a second, or 0 where nothing tells."""
        return 0.0

    @abstractmethod
    def _measure(self) -> VideoInfo:
        """Read what is needed to know size and length."""

    @abstractmethod
    def readings(self, which: range | None = None) -> Iterator[Frame | DataError]:
        """Yield the frames ``which`` (default: all) in order; an error stands for a broken one.

        A file that turns out longer than it says gives one more error at the end.
        """

    def frames(self) -> Iterator[Frame]:
        """Yield the frames in order, (H, W, 3) uint8 RGB each.

        Raises:
            DataError: a frame is missing, truncated or of another size than the video's.
        """
        for frame in self.readings():
            if isinstance(frame, DataError):
                raise frame
            yield frame

    def stop(self) -> None:
        """End a live video after the frame that is being taken; others end by themselves."""
        self._stopped = True

    @abstractmethod
    def __getitem__(self, t: int) -> Frame:
        """Return frame ``t`` from 0, (H, W, 3) uint8 RGB.

        Raises:
            IndexError: there is no such frame.
            DataError: as `frames`.
        """

    def __len__(self) -> int:
        """Return the number of frames."""
        return self.info.length

    def _checked(self, frame: Frame, t: int) -> Frame:
        """Return the frame if it has the video's size."""
        height, width = frame.shape[:2]
        if (height, width) != (self.info.height, self.info.width):
            raise DataError(
                f"{_where(self.info, t)} is {width}x{height}, expected "
                f"{self.info.width}x{self.info.height}",
                "all frames of a video must have the size that the video declares",
            )
        return frame

    def _checked_index(self, t: int) -> int:
        """Return the index if the video has such a frame."""
        if not 0 <= t < self.info.length:
            raise IndexError(f"{_where(self.info, t)}: the video has {self.info.length} frames")
        return t


class ImageFrames(FrameSource):
    """A video stored as one image file a frame."""

    def __init__(self, root: Path, info: VideoInfo | None = None, *, found: VideoInfo) -> None:
        """Keep where the frames lie.

        Args:
            root: what the file names are relative to.
            info: the video as declared elsewhere; None measures the first frame.
            found: identity and file names, with size 0 x 0 where they are to be measured.
        """
        super().__init__(info)
        self.root = root
        """What the file names are relative to."""
        self._found = found

    @property
    def paths(self) -> list[Path]:
        """The files, one a frame."""
        return [self.root / name for name in self._found.file_names]

    def _measure(self) -> VideoInfo:
        """Take the size from the first frame that can be read."""
        first: DataError | None = None
        for t in range(len(self._found.file_names)):
            try:
                height, width = self._read(t).shape[:2]
                return replace(self._found, height=height, width=width)
            except DataError as error:
                first = first or error
        raise first or DataError(f"{_where(self._found, 0)}: the video has no frame")

    def readings(self, which: range | None = None) -> Iterator[Frame | DataError]:
        """Yield the frames in order; see `FrameSource.readings`."""
        for t in range(self.info.length) if which is None else which:
            try:
                yield self._checked(self._read(t), t)
            except DataError as error:
                yield error

    def __getitem__(self, t: int) -> Frame:
        """Return frame ``t``; see `FrameSource.__getitem__`."""
        return self._checked(self._read(self._checked_index(t)), t)

    def _read(self, t: int) -> Frame:
        """Read an image file."""
        return read_image(self.root / self._found.file_names[t], _where(self._found, t))


class VideoFile(FrameSource):
    """A video stored as one file that OpenCV can decode."""

    def __init__(self, path: Path, video_id: int, name: str, info: VideoInfo | None = None) -> None:
        """Keep where the file lies; ``info`` is the video as declared elsewhere, if it is."""
        super().__init__(info)
        self._path = path
        self._id = video_id
        self._name = name

    @property
    def fps(self) -> float:
        """Frames a second as the container states them."""
        with self._open() as capture:
            return capture.fps

    def _measure(self) -> VideoInfo:
        """Take the size from the first frame and the length from the container or by counting."""
        with self._open() as capture:
            first = capture.read()
            if first is None:
                raise capture.broken("holds no frame that can be decoded")
            height, width = first.shape[:2]
            length = capture.declared_length
            if self._path.suffix.lower() not in _COUNTED or length <= 0:
                length = 1 + capture.count_rest()
        return VideoInfo(self._id, self._name, height, width, length)

    def readings(self, which: range | None = None) -> Iterator[Frame | DataError]:
        """Yield the frames in order; see `FrameSource.readings`.

        Where decoding ends early, all later frames are broken: OpenCV cannot jump over a hole.
        """
        length = self.info.length
        which = range(length) if which is None else which
        with self._open() as capture:
            position = 0
            for number, t in enumerate(which):
                far = number == 0 and t > 0
                frame = capture.read_at(t) if far else capture.read_after(t - position)
                if frame is None:
                    error = capture.broken(f"ends after {t} frames, expected {length}")
                    yield from repeat(error, len(which) - number)
                    return
                position = t + 1
                try:
                    yield self._checked(frame, t)
                except DataError as error:
                    yield error
            if position == length and capture.read() is not None:
                yield capture.broken(f"goes on after {length} frames, where it should end")

    def __getitem__(self, t: int) -> Frame:
        """Return frame ``t``; see `FrameSource.__getitem__`."""
        self._checked_index(t)
        with self._open() as capture:
            frame = capture.read_at(t)
            if frame is None:
                raise capture.broken(f"ends before frame {t}, expected {self.info.length} frames")
            return self._checked(frame, t)

    def can_be_opened(self) -> bool:
        """Tell whether OpenCV takes the file for a video."""
        try:
            with self._open():
                return True
        except DataError:
            return False

    def _open(self) -> VideoDecoder:
        """Open the file."""
        return VideoDecoder(self._path, self._id, self._name)


class Camera(FrameSource):
    """A camera that OpenCV knows by a number; its frames end when it is stopped or unplugged."""

    live = True

    def __init__(self, index: int, open_camera: Callable[[int], Any] = cv2.VideoCapture) -> None:
        """Keep the camera's number; it is opened with the first frame that is asked for."""
        super().__init__()
        self._index = index
        self._open_camera = open_camera
        self._camera: Any = None
        self._first: Frame | None = None

    @property
    def fps(self) -> float:
        """Frames a second as the driver states them."""
        self.info  # noqa: B018  # opens the camera
        return float(self._camera.get(cv2.CAP_PROP_FPS))

    def _measure(self) -> VideoInfo:
        """Open the camera and take the size from its first frame."""
        self._camera = self._open_camera(self._index)
        frame = self._camera.read()[1] if self._camera.isOpened() else None
        if frame is None:
            raise ResourceError(
                f"camera {self._index} gives no frame", "look whether another program holds it"
            )
        self._first = to_rgb(frame)
        height, width = self._first.shape[:2]
        return VideoInfo(1, f"camera{self._index}", height, width, ENDLESS)

    def readings(self, which: range | None = None) -> Iterator[Frame | DataError]:
        """Yield frames until `stop` is called or the camera gives no more."""
        which = range(self.info.length) if which is None else which
        try:
            yield from islice(self._all(), which.start, which.stop, which.step)
        finally:
            self._camera.release()

    def _all(self) -> Iterator[Frame]:
        """Yield the first frame, then new ones."""
        frame = self._first
        while frame is not None and not self._stopped:
            yield frame
            found, pixels = self._camera.read()
            frame = to_rgb(pixels) if found else None

    def __getitem__(self, t: int) -> Frame:
        """Refuse: a camera's frames are gone when they have been seen."""
        raise DataError(f"camera {self._index} cannot give frame {t} again")


class SelectedFrames(FrameSource):
    """Some frames of a video, evenly spaced; frame ``t`` of it is frame ``which[t]`` of the whole.

    A part of a video file is named like a slice, ``clip[30:300:5]``, by which `find_frames` in
    `video` finds the same frames again; a part of a folder keeps the names of its files.
    """

    def __init__(self, whole: FrameSource, which: range) -> None:
        """Keep the choice.

        Args:
            whole: the video.
            which: frames of it; for a camera it may end at `ENDLESS`.
        """
        super().__init__()
        self.live = whole.live
        self.whole = whole
        self._which = which

    @property
    def fps(self) -> float:
        """Selected frames a second."""
        return self.whole.fps / self._which.step

    def _measure(self) -> VideoInfo:
        """Cut the whole video's length and files."""
        info = self.whole.info
        names = tuple(info.file_names[t] for t in self._which) if info.file_names else ()
        name = info.name if names or self.live else _sliced(info.name, self._which)
        return replace(info, name=name, length=len(self._which), file_names=names)

    def readings(self, which: range | None = None) -> Iterator[Frame | DataError]:
        """Yield the selected frames; see `FrameSource.readings`."""
        return self.whole.readings(self._which if which is None else self._which[_as_slice(which)])

    def stop(self) -> None:
        """Stop the whole; see `FrameSource.stop`."""
        self.whole.stop()

    def __getitem__(self, t: int) -> Frame:
        """Return the ``t``-th selected frame; see `FrameSource.__getitem__`."""
        return self.whole[self._which[self._checked_index(t)]]


def select_frames(
    source: FrameSource, start: str = "", end: str = "", every: int = 1
) -> FrameSource:
    """Return the part of a video between two places, or the video itself.

    Args:
        source: the video.
        start: the first frame, from 0, or a time such as ``2.5s``; empty: the first.
        end: behind the last frame, or such a time; empty: the end.
        every: take each ``every``-th frame.

    Raises:
        UsageError: a place is malformed, leaves no frame, or is a time where the source has none.
    """
    length = source.info.length
    first = _place(start, source, "--start") if start else 0
    last = min(_place(end, source, "--end") if end else length, length)
    if every < 1 or first >= last:
        raise UsageError(
            f"`--start {start or 0} --end {end or 'the end'} --every {every}` leaves none of the "
            f"frames of video `{source.info.name}`"
            + ("" if source.live else f", which has {length}"),
        )
    which = range(first, last, every)
    return source if which == range(length) else SelectedFrames(source, which)


def kept_info(info: VideoInfo, kept: Sequence[int]) -> VideoInfo:
    """Return a video's identity without the frames that were left out.

    Args:
        info: the video.
        kept: ascending frames that remain; of a video file, only its beginning can.
    """
    if len(kept) == info.length:
        return info
    names = tuple(info.file_names[t] for t in kept) if info.file_names else ()
    name = info.name if names or info.length == ENDLESS else _sliced(info.name, range(len(kept)))
    return replace(info, name=name, length=len(kept), file_names=names)


def split_slice(name: str) -> tuple[str, range | None]:
    """Return the name of the whole video and the frames that ``NAME[start:stop:every]`` means."""
    match = _SLICE.fullmatch(name)
    if match is None or match[4] == "0":
        return name, None
    return match[1], range(int(match[2]), int(match[3]), int(match[4]))


def _sliced(name: str, which: range) -> str:
    """Return the name of a part of a video file, or of a part of a part."""
    whole, inside = split_slice(name)
    part = which if inside is None else inside[_as_slice(which)]
    return f"{whole}[{part.start}:{part.stop}:{part.step}]"


def _as_slice(which: range) -> slice:
    """Return the slice that takes the same places."""
    return slice(which.start, which.stop, which.step)


def _place(text: str, source: FrameSource, option: str) -> int:
    """Return the frame that a number or a time means."""
    seconds = text.endswith("s")
    try:
        number = float(text[:-1]) if seconds else int(text)
    except ValueError:
        number = -1
    if not 0 <= number < ENDLESS:
        raise UsageError(f"`{option} {text}`, expected a frame such as 120 or a time such as 2.5s")
    if not seconds:
        return int(number)
    if source.fps <= 0:
        raise UsageError(
            f"`{option} {text}`: video `{source.info.name}` tells no frames a second",
            "give the place as a frame number",
        )
    return round(number * source.fps)


def _where(video: VideoInfo, t: int) -> str:
    """Return how a message names a frame."""
    return f"video {video.id} `{video.name}`, frame {t}"
