"""Frames of videos in and out: folders of images, video files, YouTube-VIS data sets.

Frames are RGB uint8 arrays (H, W, 3), upright (EXIF is obeyed), and come one at a time, so memory
does not grow with a video. What cannot be trusted is refused: OpenCV returns half an image for a
truncated JPEG and stops without a word in a truncated mp4; here both are errors that name the
file, the video and the frame.

    for video in open_videos(Path("clips")):
        for frame in video.frames():
            ...
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pmvis_core.errors import DataError, UsageError
from pmvis_core.files import cannot_write
from pmvis_core.formats import ytvis
from pmvis_core.types import VideoInfo

Frame = NDArray[np.uint8]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")
_UNCOUNTED = (".mkv", ".webm")
"""Containers that store a duration but no number of frames."""
_FRAME_FOLDER = "JPEGImages"
_EBML, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"
"""Ids of the first two elements of a Matroska file."""
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


class FrameSource(ABC):
    """The frames of one video; nothing is read before it is asked for."""

    def __init__(self, info: VideoInfo | None = None) -> None:
        """Keep the video's identity if it is known; else it is measured when first needed."""
        self._info = info

    @property
    def info(self) -> VideoInfo:
        """The video's identity, size and number of frames.

        Raises:
            DataError: the first frame cannot be read.
        """
        if self._info is None:
            self._info = self._measure()
        return self._info

    @abstractmethod
    def _measure(self) -> VideoInfo:
        """Read what is needed to know size and length."""

    @abstractmethod
    def frames(self) -> Iterator[Frame]:
        """Yield the frames in order, (H, W, 3) uint8 RGB each.

        Raises:
            DataError: a frame is missing, truncated or of another size than the video's.
        """

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
        self._root = root
        self._found = found

    def _measure(self) -> VideoInfo:
        """Take the size from the first frame."""
        height, width = self._read(0).shape[:2]
        return replace(self._found, height=height, width=width)

    def frames(self) -> Iterator[Frame]:
        """Yield the frames in order; see `FrameSource.frames`."""
        for t in range(self.info.length):
            yield self._checked(self._read(t), t)

    def __getitem__(self, t: int) -> Frame:
        """Return frame ``t``; see `FrameSource.__getitem__`."""
        return self._checked(self._read(self._checked_index(t)), t)

    def _read(self, t: int) -> Frame:
        """Read an image file."""
        return read_image(self._root / self._found.file_names[t], _where(self._found, t))


class VideoFile(FrameSource):
    """A video stored as one file that OpenCV can decode."""

    def __init__(self, path: Path, video_id: int, name: str, info: VideoInfo | None = None) -> None:
        """Keep where the file lies; ``info`` is the video as declared elsewhere, if it is."""
        super().__init__(info)
        self._path = path
        self._id = video_id
        self._name = name

    def _measure(self) -> VideoInfo:
        """Take the size from the first frame and the length from the container or by counting."""
        with _Capture(self._path, self._id, self._name) as capture:
            first = capture.read()
            if first is None:
                raise capture.broken("holds no frame that can be decoded")
            height, width = first.shape[:2]
            length = capture.declared_length
            if self._path.suffix.lower() in _UNCOUNTED or length <= 0:
                length = 1 + capture.count_rest()
        return VideoInfo(self._id, self._name, height, width, length)

    def frames(self) -> Iterator[Frame]:
        """Yield the frames in order; see `FrameSource.frames`."""
        length = self.info.length
        with _Capture(self._path, self._id, self._name) as capture:
            for t in range(length):
                frame = capture.read()
                if frame is None:
                    raise capture.broken(f"ends after {t} frames, expected {length}")
                yield self._checked(frame, t)
            if capture.read() is not None:
                raise capture.broken(f"goes on after {length} frames, where it should end")

    def __getitem__(self, t: int) -> Frame:
        """Return frame ``t``; see `FrameSource.__getitem__`."""
        self._checked_index(t)
        with _Capture(self._path, self._id, self._name) as capture:
            frame = capture.read_at(t)
            if frame is None:
                raise capture.broken(f"ends before frame {t}, expected {self.info.length} frames")
            return self._checked(frame, t)


class _Capture:
    """OpenCV's decoder of one video file, closed when left."""

    def __init__(self, path: Path, video_id: int, name: str) -> None:
        """Open the file.

        Raises:
            DataError: it is missing, empty or not a video.
        """
        self._where = f"video {video_id} `{name}`: `{path}`"
        if not path.is_file():
            raise DataError(f"{self._where} does not exist", "check `--frames`")
        if path.stat().st_size == 0:
            raise DataError(f"{self._where} is empty, expected a video")
        if path.suffix.lower() in _UNCOUNTED and not _matroska_is_whole(path):
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

    def read(self) -> Frame | None:
        """Return the next frame (H, W, 3) RGB, or None at the end."""
        found, frame = self._capture.read()
        return _rgb(frame) if found else None

    def read_at(self, t: int) -> Frame | None:
        """Return frame ``t``, by seeking where that is exact and else by decoding up to it."""
        self._capture.set(cv2.CAP_PROP_POS_FRAMES, t)
        if round(self._capture.get(cv2.CAP_PROP_POS_FRAMES)) == t:
            return self.read()
        self._capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
        skipped = all(self._capture.grab() for _ in range(t))
        return self.read() if skipped else None

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

    def __enter__(self) -> _Capture:
        """Return the decoder itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the decoder."""
        self._capture.release()


def open_videos(path: Path, root: Path | None = None) -> list[FrameSource]:
    """List the videos of a place, in natural order.

    Args:
        path: a folder of frames (one video), a folder of such folders or of video files, a video
            file, or a YouTube-VIS JSON (its ids are kept; elsewhere ids count from 1).
        root: what the JSON's file names are relative to; without it the JSON's folder,
            `JPEGImages` in it, and `NAME/JPEGImages` beside `NAME.json` are tried.

    Raises:
        DataError: there is nothing to be found, or the JSON is malformed.
    """
    if path.is_dir():
        return _open_folder(path)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        if not path.exists():
            raise DataError(f"video `{path}` does not exist", "check `--frames`")
        return [VideoFile(path, 1, path.stem)]
    if path.suffix.lower() == ".json":
        videos = ytvis.read_dataset(path).videos
        return [find_frames(video, path if root is None else root) for video in videos]
    if not path.exists():
        raise DataError(f"frames `{path}` do not exist", "check `--frames`")
    raise DataError(
        f"`{path}` is neither a folder nor a video nor a YouTube-VIS JSON",
        f"videos end in one of {' '.join(VIDEO_SUFFIXES)}",
    )


def find_frames(video: VideoInfo, root: Path) -> FrameSource:
    """Find the frames of a video that a tracks file or data set names.

    Args:
        video: identity, size and file names; without file names it was a video file.
        root: the place it was opened from: frames' root, folder, video file or YouTube-VIS JSON.

    Raises:
        DataError: its first frame or file is at none of the places where it may be.
    """
    folders = _frame_roots(root)
    if video.file_names and len(video.file_names) != video.length:
        raise DataError(
            f"video {video.id} `{video.name}` names {len(video.file_names)} frame files, "
            f"expected {video.length}, its length"
        )
    if video.file_names:
        # A folder of frames opened by itself names them without the folder, and the reverse.
        bases = [*folders, *(folder / video.name for folder in folders), root.parent]
        for base in bases:
            if (base / video.file_names[0]).is_file():
                return ImageFrames(base, video, found=video)
        looked = " or ".join(f"`{base / video.file_names[0]}`" for base in bases[:2])
    else:
        files = [root] if root.suffix.lower() in VIDEO_SUFFIXES else []
        files += [f / (video.name + suffix) for f in folders for suffix in VIDEO_SUFFIXES]
        for file in files:
            if file.is_file() and file.stem == Path(video.name).name:
                return VideoFile(file, video.id, video.name, video)
        looked = f"`{root / video.name}` with a suffix {' '.join(VIDEO_SUFFIXES)}"
    raise DataError(
        f"frames of video {video.id} `{video.name}` not found: no file {looked}",
        "give the folder that holds the videos' frames with `--frames`",
    )


def _frame_roots(path: Path) -> list[Path]:
    """Return the folders that file names may be relative to, likeliest first."""
    if path.suffix.lower() == ".json" and not path.is_dir():
        stem = path.with_suffix("")
        return [path.parent, path.parent / _FRAME_FOLDER, stem / _FRAME_FOLDER, stem]
    return [path, path / _FRAME_FOLDER]


def _open_folder(folder: Path) -> list[FrameSource]:
    """List the videos of a folder: itself, or its subfolders of frames and its video files."""
    if images := _images(folder):
        return [_image_video(folder, 1, folder.resolve().name, images)]
    sources: list[FrameSource] = []
    for entry in _entries(folder):
        number = len(sources) + 1
        if entry.is_dir() and (images := _images(entry)):
            names = [f"{entry.name}/{image}" for image in images]
            sources.append(_image_video(folder, number, entry.name, names))
        elif entry.is_file() and entry.suffix.lower() in VIDEO_SUFFIXES:
            sources.append(VideoFile(entry, number, entry.stem))
    if sources:
        return sources
    if (folder / _FRAME_FOLDER).is_dir():
        return _open_folder(folder / _FRAME_FOLDER)
    raise DataError(
        f"`{folder}` holds no frames, folders of frames or video files",
        f"frames end in one of {' '.join(IMAGE_SUFFIXES)}, videos in {' '.join(VIDEO_SUFFIXES)}",
    )


def _image_video(root: Path, video_id: int, name: str, files: Sequence[str]) -> ImageFrames:
    """Return a video of image files whose size is not known yet."""
    return ImageFrames(root, found=VideoInfo(video_id, name, 0, 0, len(files), tuple(files)))


def _images(folder: Path) -> list[str]:
    """Return the names of the image files of a folder in natural order."""
    return [e.name for e in _entries(folder) if e.suffix.lower() in IMAGE_SUFFIXES and e.is_file()]


def _entries(folder: Path) -> list[Path]:
    """Return the visible entries of a folder, digits in their names sorted as numbers."""
    visible = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(visible, key=lambda entry: natural_key(entry.name))


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key under which `frame2` comes before `frame10`."""
    parts = re.split(r"(\d+)", name)
    return [(int(p), "") if p.isdecimal() and p.isascii() else (-1, p) for p in parts], name


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
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise DataError(f"{where}: `{path}` is no image that can be decoded")
    return _rgb(pixels)


def _rgb(bgr: NDArray[Any]) -> Frame:
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


def write_video(path: Path, frames: Iterator[Frame], fps: float = 10.0) -> None:
    """Write frames (H, W, 3) uint8 RGB as an MPEG-4 file that appears when it is complete.

    Odd sizes gain one row or column, which the codec needs.

    Args:
        path: the file, ``.mp4``.
        frames: all of one size.
        fps: frames a second.

    Raises:
        UsageError: there is no frame, or the name does not end in ``.mp4``.
        ResourceError: the place cannot be written.
    """
    if path.suffix.lower() != ".mp4":
        raise UsageError(f"cannot write a video to `{path}`", "name it with the suffix `.mp4`")
    first = next(frames, None)
    if first is None:
        raise UsageError(f"no frame to write to `{path}`", "choose at least one video")
    # OpenCV chooses the container by the suffix, so the part file needs it too.
    part = path.with_name(f"{path.stem}.part.mp4")
    height, width = (side + side % 2 for side in first.shape[:2])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise cannot_write(path, error) from error
    fourcc = cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(part), fourcc, fps, (width, height))
    try:
        for frame in chain((first,), frames):
            writer.write(_even(frame))
    finally:
        writer.release()
    os.replace(part, path)


def _even(frame: Frame) -> NDArray[np.uint8]:
    """Return the frame as BGR with even sides."""
    height, width = frame.shape[:2]
    bgr = frame[:, :, ::-1]
    return np.pad(bgr, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _where(video: VideoInfo, t: int) -> str:
    """Return how a message names a frame."""
    return f"video {video.id} `{video.name}`, frame {t}"
