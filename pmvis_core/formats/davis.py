"""DAVIS folders: one folder a video, one indexed PNG a frame, the value of a pixel is its object.

0 is background, 1 to 254 are objects, numbered anew in each video, and 255 is void (Caelles et al.,
The 2019 DAVIS Challenge on VOS; arXiv:1905.00737). YouTube-VOS and its kin use the same folders.
The files are read by PIL, never OpenCV, which turns the indices of a palette into colours.

    truth = read_davis(Path("Annotations_unsupervised/480p"))
    found = read_davis_predictions(Path("results"), truth)

An object's number in its video stays with it as `object_number`, and as the id of its track; void
becomes a crowd. `write_davis` is the way back, from any source of tracks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pmvis_core import masks
from pmvis_core.errors import DataError, UsageError
from pmvis_core.files import cannot_write, part_path
from pmvis_core.formats.ytvis import Dataset, TrackSource
from pmvis_core.formats.ytvis_annotation import BLOCK, Annotation
from pmvis_core.types import RLE, Category, Track, VideoInfo, VideoTracks

if TYPE_CHECKING:
    from PIL import Image

Indices = NDArray[np.uint8]
"""(H, W): 0 background, 1 to 254 objects, 255 void."""

OBJECT = Category(1, "object")
"""The one category of such folders."""
VOID = 255
"""The value of pixels that are not judged."""
HIGHEST = 254
"""The highest number that an object can have."""

_MODES = ("P", "L", "1")
_PLAIN = "save masks as 8-bit indexed (or grey) PNG whose pixel values are the numbers of objects"


def read_davis(folder: Path, *, binary: bool = False) -> Dataset:
    """Read ground truth.

    Args:
        folder: holds one folder a video (``Annotations/480p``), each with its ``*.png`` in the
            order of their names.
        binary: 255 is object 1, as in DAVIS 2016, and nothing is void.

    Returns:
        Videos numbered from 1 by name; one annotation an object, and one crowd for the void of a
        video. Ids are unique in the folder.

    Raises:
        DataError: there is no video, a PNG is none or is no image of indices, the frames of a video
            differ in size, or all its pixels are 0 and 255 although not ``binary``.
    """
    videos: list[VideoInfo] = []
    rows: list[Annotation] = []
    for number, place in enumerate(video_folders(folder), start=1):
        files = sorted(path for path in place.glob("*.png") if path.is_file())
        tracks = IndexTracks(len(files))
        for t, path in enumerate(files):
            tracks.add(t, read_indices(path, binary=binary), str(path))
        if set(tracks.rles) == {VOID}:
            raise DataError(
                f"`{place}` holds no value but 0 and {VOID}, which is void",
                f"if {VOID} is the object, as in DAVIS 2016, read the folder as binary",
            )
        height, width = tracks.size
        names = tuple(f"{place.name}/{path.name}" for path in files)
        videos.append(VideoInfo(number, place.name, height, width, len(files), names))
        rows += tracks.annotations(number, first_id=len(rows) + 1, crowds={VOID})
    return Dataset(f"`{folder}`", (OBJECT,), tuple(videos), tuple(rows))


def read_davis_predictions(
    folder: Path, truth: Dataset, *, binary: bool = False, ends: bool = True
) -> tuple[Annotation, ...]:
    """Read results for the videos of a ground truth.

    Args:
        folder: holds a folder with the name of each video, and a PNG for each of its frames: of
            the same stem as the frame, or ``00000.png``, ... where ``truth`` names no frames.
            Other files and folders are left alone.
        truth: the ground truth; if it has one category, predictions are of that.
        binary: 255 is object 1.
        ends: False where the first and last frame need not be there (semi-supervised evaluation
            judges neither).

    Returns:
        Predictions of score 1, numbered from 1 through the folder.

    Raises:
        DataError: a folder or frame is missing, differs in size from its video, holds 255 although
            not ``binary``, or a PNG is none or is no image of indices.
    """
    category = truth.categories[0] if len(truth.categories) == 1 else OBJECT
    rows: list[Annotation] = []
    for video in truth.videos:
        place = folder / safe_name(video.name)
        if not place.is_dir():
            raise DataError(
                f"`{folder}` has no folder `{video.name}`, a video of {truth.name}",
                "results hold one folder a video, called as the video is",
            )
        tracks = IndexTracks(video.length, (video.height, video.width))
        for t, stem in enumerate(frame_stems(video)):
            path = place / f"{stem}.png"
            if not path.is_file():
                if not ends and t in (0, video.length - 1):
                    continue
                raise DataError(
                    f"`{path}` is missing, frame {t} of video `{video.name}`",
                    "results hold a PNG for each frame, called as in the ground truth",
                )
            tracks.add(t, read_indices(path, binary=binary), str(path))
        if VOID in tracks.rles:
            raise DataError(
                f"`{place}` holds the value {VOID}, expected objects from 1 to {HIGHEST}",
                f"if {VOID} is the object, as in DAVIS 2016, read the folder as binary",
            )
        rows += tracks.annotations(
            video.id, first_id=len(rows) + 1, category_id=category.id, score=1.0
        )
    return tuple(rows)


def object_number(row: Annotation) -> int:
    """Return an object's number in its video; of other than DAVIS and MOTS files, its track id."""
    number = row.extra.get(BLOCK, {}).get("track_id", row.id)
    return int(number)


def write_davis(source: TrackSource, folder: Path) -> dict[int, dict[int, int]]:
    """Write tracks as PNGs with DAVIS's palette: ``folder/NAME/STEM.png`` for every frame.

    A track keeps its id as its number where all ids of the video are from 1 to 254; otherwise
    tracks are numbered from 1 by falling score. A pixel of several tracks goes to the one of the
    highest score, of equal ones to the first; ignored tracks become void below all others. Rows of
    one object under several categories share its pixels so, and only the best remains.

    Args:
        source: videos with tracks: a tracks file, a dataset, `read_davis`.
        folder: a new or empty folder; it appears when it is complete.

    Returns:
        For each video id, the number of each track id.

    Raises:
        UsageError: something lies there already.
        DataError: a video has more than 254 tracks, two of a name, or a name that leaves the
            folder.
        ResourceError: the place cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"`{folder}` exists already", "give another place")
    part = part_path(folder)
    written: dict[int, dict[int, int]] = {}
    try:
        if part.exists():
            shutil.rmtree(part)
        part.mkdir(parents=True)
        for video in source:
            place = part / safe_name(video.video.name)
            if place.exists():
                raise DataError(f"two videos are called `{video.video.name}`")
            place.mkdir(parents=True)
            written[video.video.id] = numbers = _numbers(video)
            for t, stem in enumerate(frame_stems(video.video)):
                _write_indices(place / f"{stem}.png", _painted(video, numbers, t))
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return written


@dataclass
class IndexTracks:
    """Collects the objects of a video from its frames of indices."""

    length: int
    """Number of frames."""
    size: tuple[int, int] = (0, 0)
    """(height, width) of the frames; that of the first one where none is given."""
    rles: dict[int, list[RLE | None]] = field(default_factory=dict)
    """For each value but 0 that occurs, its mask in each frame."""

    def add(self, frame: int, values: NDArray[np.uint8] | NDArray[np.uint16], name: str) -> None:
        """Take the (H, W) values of a frame.

        Raises:
            DataError: they are of another size; the message calls the file ``name``.
        """
        if self.size == (0, 0):
            self.size = (values.shape[0], values.shape[1])
        if values.shape != self.size:
            raise DataError(
                f"`{name}` is {values.shape[0]}x{values.shape[1]}, expected "
                f"{self.size[0]}x{self.size[1]} like the other frames",
                "bring all masks to the size of the video, by nearest neighbour",
            )
        # Counting beats sorting: a frame has few distinct values.
        for value in np.flatnonzero(np.bincount(values.ravel())).tolist():
            if value:
                self.put(frame, value, masks.encode(values == value))

    def put(self, frame: int, value: int, rle: RLE) -> None:
        """Take the mask of one object in a frame."""
        self.rles.setdefault(value, [None] * self.length)[frame] = rle

    def annotations(
        self,
        video_id: int,
        first_id: int,
        *,
        category_id: int = OBJECT.id,
        score: float | None = None,
        crowds: Collection[int] = (),
    ) -> list[Annotation]:
        """Return the objects by number, their ids counting from ``first_id``; some as crowds."""
        return [
            annotation(
                first_id + n,
                video_id,
                category_id,
                value,
                self.rles[value],
                score=score,
                iscrowd=value in crowds,
            )
            for n, value in enumerate(sorted(self.rles))
        ]


def annotation(
    number: int,
    video_id: int,
    category_id: int,
    object_id: int,
    rles: Sequence[RLE | None],
    *,
    score: float | None = None,
    iscrowd: bool = False,
) -> Annotation:
    """Return an object as an annotation that remembers its `object_number`."""
    areas = masks.track_areas(rles)
    return Annotation(
        id=number,
        video_id=video_id,
        category_id=category_id,
        rles=tuple(rles),
        mask_areas=areas,
        score=score,
        iscrowd=iscrowd,
        areas=areas,
        extra={BLOCK: {"track_id": object_id}},
    )


def video_folders(folder: Path) -> list[Path]:
    """Return the folders that hold PNGs, by name.

    Raises:
        DataError: there is none.
    """
    if not folder.is_dir():
        raise DataError(f"`{folder}` is no folder", "check the path")
    places = sorted(p for p in folder.iterdir() if p.is_dir() and any(p.glob("*.png")))
    if not places:
        raise DataError(
            f"`{folder}` holds no folder with PNGs, expected one folder a video",
            "give the folder that the folders of the videos lie in (`Annotations/480p`)",
        )
    return places


def frame_stems(video: VideoInfo) -> list[str]:
    """Return the names of a video's frames without suffix, ``00000``, ... where it has none."""
    names = [PurePosixPath(name).stem for name in video.file_names]
    if len(names) != video.length or len(set(names)) != len(names):
        names = [f"{t:05d}" for t in range(video.length)]
    return names


def safe_name(name: str) -> str:
    """Return a video's name, checked to stay below the folder that it is joined to.

    Raises:
        DataError: it does not.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        raise DataError(f"a video is called `{name}`, expected the name of a folder")
    return name


def read_indices(path: Path, *, binary: bool = False) -> Indices:
    """Read a PNG of indices.

    Args:
        path: the file.
        binary: 255 is object 1.

    Raises:
        DataError: it is no PNG, cut off, or no image of indices.
    """
    values = np.asarray(open_png(path, _MODES, _PLAIN), dtype=np.uint8)
    return np.where(values == VOID, 1, values).astype(np.uint8) if binary else values


def open_png(path: Path, modes: Sequence[str], hint: str) -> Image.Image:
    """Read an image file whole.

    Args:
        path: the file.
        modes: PIL's modes that will do.
        hint: what to do about another.

    Raises:
        DataError: it is missing, malformed, or of another mode.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except FileNotFoundError as error:
        raise DataError(f"`{path}` is missing", "each frame has a PNG") from error
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as error:
        raise DataError(f"`{path}` cannot be read as a PNG: {error}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"`{path}` is too large for a mask: {error}") from error
    if image.mode not in modes:
        raise DataError(f"`{path}` is an image of mode {image.mode}, expected indices", hint)
    return image


def palette() -> bytes:
    """Return 256 RGB colours, those of PASCAL VOC and DAVIS: the bits of the index, reversed."""
    index = np.arange(256)[:, None]
    channel = np.arange(3)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for level in range(8):
        bits = index >> (3 * level + channel) & 1
        colours |= (bits << (7 - level)).astype(np.uint8)
    return colours.tobytes()


def _numbers(video: VideoTracks) -> dict[int, int]:
    """Return the number of each track id."""
    ids = [track.id for track in video.tracks]
    if len(ids) > HIGHEST:
        raise DataError(
            f"video {video.video.id} `{video.video.name}` has {len(ids)} tracks, a PNG of indices "
            f"holds {HIGHEST}",
            "drop those of low score with `pmvis filter`",
        )
    if all(1 <= number <= HIGHEST for number in ids):
        return {number: number for number in ids}
    ordered = sorted(video.tracks, key=lambda track: -track.score)
    return {track.id: number for number, track in enumerate(ordered, start=1)}


def _painted(video: VideoTracks, numbers: Mapping[int, int], t: int) -> Indices:
    """Return the indices of a frame."""
    canvas = np.zeros((video.video.height, video.video.width), dtype=np.uint8)
    for value, rle in _layers(video, numbers, t):
        canvas[masks.decode(rle).view(bool)] = value
    return canvas


def _layers(video: VideoTracks, numbers: Mapping[int, int], t: int) -> Iterator[tuple[int, RLE]]:
    """Yield value and mask of what is in a frame, the lowest layer first."""
    for track in _there(video.ignored, t):
        yield VOID, track.rles[t]  # type: ignore[misc]
    # Sorting is stable, so of equal scores the first track is painted last when turned round.
    for track in sorted(reversed(list(_there(video.tracks, t))), key=lambda track: track.score):
        yield numbers[track.id], track.rles[t]  # type: ignore[misc]


def _there(tracks: Iterable[Track], t: int) -> Iterator[Track]:
    """Yield the tracks that have a mask in a frame."""
    return (track for track in tracks if track.rles[t] is not None)


def _write_indices(path: Path, indices: Indices) -> None:
    """Write a PNG with DAVIS's palette."""
    from PIL import Image

    image = Image.fromarray(indices)
    image.putpalette(palette())
    image.save(path, format="PNG")
