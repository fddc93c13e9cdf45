"""Places of videos: folders of images, video files, YouTube-VIS data sets, lists, a camera.

`open_videos` lists the videos of a place as `frame_sources.FrameSource`; `find_frames` finds the
frames of a video that a tracks file names; `write_video` writes one.

    for video in open_videos(Path("clips")):
        for frame in video.frames():
            ...
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pmvis_core.errors import DataError, UsageError
from pmvis_core.files import STDIO, cannot_write
from pmvis_core.formats import ytvis
from pmvis_core.types import VideoInfo
from pmvis_core.video.image_files import Frame, is_whole, read_image
from pmvis_core.video.sources import (
    Camera,
    FrameSource,
    ImageFrames,
    SelectedFrames,
    VideoFile,
    split_slice,
)

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Frame",
    "FrameSource",
    "ImageFrames",
    "VideoFile",
    "camera_number",
    "find_frames",
    "is_whole",
    "natural_key",
    "open_videos",
    "read_image",
    "write_video",
]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VIDEO_SUFFIXES = tuple(
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .ts .mts .wmv .flv .3gp .ogv".split()
)
"""What a folder is searched for; a file given by its name may have any suffix."""
_FRAME_FOLDER = "JPEGImages"
_FILE_OF_SPLIT = re.compile("^(annotations|instances)_|_sub$")
_CAMERA = re.compile(r"(?:webcam:)?(\d+)")


def open_videos(path: Path, root: Path | None = None) -> list[FrameSource]:
    """List the videos of a place, in natural order.

    Args:
        path: a folder of frames (one video), a folder of such folders or of video files, a video
            file, a YouTube-VIS JSON (its ids are kept; elsewhere ids count from 1), ``-`` for a
            list of any of these on standard input, or ``webcam:0``.
        root: what the JSON's file names are relative to; without it the JSON's folder,
            `JPEGImages` in it, and `NAME/JPEGImages` and `NAME` beside `NAME.json`,
            `annotations_NAME.json` or `annotations/instances_NAME.json` are tried.

    Raises:
        DataError: there is nothing to be found, or the JSON is malformed.
    """
    number = camera_number(path)
    if number is not None:
        return [Camera(number)]
    if str(path) == STDIO:
        return _open_list(line.rstrip("\r\n") for line in sys.stdin)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        what = "video" if path.suffix.lower() in VIDEO_SUFFIXES else "place of frames"
        raise DataError(f"{what} `{path}` does not exist", "check `--frames`")
    if path.suffix.lower() == ".json":
        videos = ytvis.read_dataset(path).videos
        return [find_frames(video, path if root is None else root) for video in videos]
    source = VideoFile(path, 1, path.stem)
    if path.suffix.lower() not in VIDEO_SUFFIXES and not source.can_be_opened():
        raise DataError(
            f"`{path}` is neither a folder nor a video nor a YouTube-VIS JSON",
            f"videos end in {' '.join(VIDEO_SUFFIXES)}, or in what else OpenCV can decode",
        )
    return [source]


def camera_number(path: Path) -> int | None:
    """Return the camera that ``0`` or ``webcam:0`` means, unless there is a file of that name."""
    match = _CAMERA.fullmatch(str(path))
    return int(match[1]) if match and not path.exists() else None


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
        for name, which in ((video.name, None), split_slice(video.name)):
            file = _video_file(name, root, folders)
            if file is not None and which is None:
                return VideoFile(file, video.id, name, video)
            if file is not None and which is not None:
                return SelectedFrames(VideoFile(file, video.id, name), which)
        looked = f"`{root / video.name}` with a suffix {' '.join(VIDEO_SUFFIXES)}"
    raise DataError(
        f"frames of video {video.id} `{video.name}` not found: no file {looked}",
        "give the folder that holds the videos' frames with `--frames`",
    )


def _video_file(name: str, root: Path, folders: Sequence[Path]) -> Path | None:
    """Return the video file of that name: the root itself, or one in the folders."""
    files = [] if root.is_dir() or root.suffix.lower() == ".json" else [root]
    files += [folder / (name + suffix) for folder in folders for suffix in VIDEO_SUFFIXES]
    return next((f for f in files if f.is_file() and f.stem == Path(name).name), None)


def _frame_roots(path: Path) -> list[Path]:
    """Return the folders that file names may be relative to, likeliest first."""
    if path.suffix.lower() == ".json" and not path.is_dir():
        stem = path.with_suffix("")
        places = [path.parent, path.parent / _FRAME_FOLDER, stem / _FRAME_FOLDER, stem]
        # OVIS: `annotations_train.json` beside `train`; IDOL: `annotations/instances_train.json`.
        split = _FILE_OF_SPLIT.sub("", path.stem)
        for base in (path.parent / split, path.parent.parent / split):
            places += [base / _FRAME_FOLDER, base]
        return list(dict.fromkeys(places))
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


def _open_list(lines: Iterable[str]) -> list[FrameSource]:
    """List the videos of a list: images that follow each other in one folder are one video."""
    sources: list[FrameSource] = []
    for folder, images in _runs(Path(line) for line in lines if line):
        number = len(sources) + 1
        if images:
            sources.append(_image_video(Path(), number, folder.resolve().name, images))
        elif folder.is_dir() and (inside := _images(folder)):
            names = [str(folder / image) for image in inside]
            sources.append(_image_video(Path(), number, folder.resolve().name, names))
        elif folder.is_file():
            sources.append(VideoFile(folder, number, folder.stem))
        else:
            raise DataError(f"standard input names `{folder}`, where there are no frames")
    if not sources:
        raise DataError("standard input names no frames", "write one path a line")
    return sources


def _runs(paths: Iterable[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Yield (folder, images) for images in a row, and (path, nothing) for all else."""
    folder, images = Path(), list[str]()
    for path in paths:
        image = path.suffix.lower() in IMAGE_SUFFIXES
        if images and not (image and path.parent == folder):
            yield folder, images
            images = []
        if image:
            folder = path.parent
            images.append(str(path))
        else:
            yield path, []
    if images:
        yield folder, images


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
