"""MOTS: segmented cars and pedestrians, as text or as 16-bit PNGs, with regions to ignore.

Text has one line a mask, ``frame object_id class_id height width rle``, the last being COCO's
compressed runs; classes are 1 car, 2 pedestrian and 10 ignore. The PNG form is one folder a
sequence, one picture a frame, where a pixel's value is ``1000 class + instance``, 0 background
and 10000 ignore (Voigtlaender et al., MOTS: Multi-Object Tracking and Segmentation, CVPR 2019).

    truth = read_mots(Path("instances_txt"))
    found = read_mots_predictions(Path("results"), truth)
    hota(truth, found, rules="mots")

Frames count from 0 in KITTI MOTS and from 1 in MOTSChallenge. Ignored regions become crowds, the
same under each category. Masks of one frame never overlap in this format, and that is checked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pmvis_core import masks
from pmvis_core.errors import DataError
from pmvis_core.formats.davis import IndexTracks, annotation, frame_stems, open_png, safe_name
from pmvis_core.formats.ytvis import Dataset
from pmvis_core.formats.ytvis_annotation import Annotation
from pmvis_core.types import RLE, Category, VideoInfo

CATEGORIES = (Category(1, "car"), Category(2, "pedestrian"))
"""The two classes; what is to be ignored is a crowd of both."""
IGNORE_CLASS = 10
"""The class of regions to ignore; in PNGs 10000."""
PER_CLASS = 1000
"""What a class is worth in a PNG's value."""

_MODES = ("I;16", "I;16B", "I")
_COLUMNS = "frame object_id class_id height width rle"
_SIXTEEN = "MOTS PNGs are 16-bit grey, 1000 class + instance; 8 bits cannot hold that"
_CLASSES = frozenset([*(category.id for category in CATEGORIES), IGNORE_CLASS])


class MotsLine(NamedTuple):
    """One mask of the text form."""

    frame: int
    """As written, so from 0 or 1."""
    object_id: int
    """As written; KITTI MOTS has 1000 class + instance."""
    class_id: int
    """1, 2 or 10."""
    rle: RLE
    """The mask."""


class _Sequence(NamedTuple):
    """What was read of a sequence."""

    size: tuple[int, int]
    """(height, width) of the frames."""
    objects: dict[tuple[int, int], list[RLE | None]]
    """By class and number, the mask in each frame."""


def read_mots(
    path: Path, *, first_frame: int = 0, lengths: Mapping[str, int] | None = None
) -> Dataset:
    """Read ground truth.

    Args:
        path: a folder of ``NAME.txt``, of ``NAME/gt/gt.txt`` (MOTSChallenge) or of folders of PNGs,
            or one such text.
        first_frame: the number of the first frame of texts: 0 in KITTI MOTS, 1 in MOTSChallenge.
        lengths: numbers of frames of the sequences that texts describe; by default up to the last
            mask.

    Returns:
        Videos numbered from 1 by name. Frames of texts are called by their number.

    Raises:
        DataError: nothing of the kind is there; a line or PNG is malformed; masks of a sequence
            differ in size or those of a frame overlap; an object occurs twice in a frame; or a
            frame lies outside the sequence.
    """
    videos: list[VideoInfo] = []
    rows: list[Annotation] = []
    for number, (name, place) in enumerate(sorted(_sequences(path).items()), start=1):
        if place.is_dir():
            files = _pictures(place)
            names = tuple(f"{name}/{file.name}" for file in files)
            sequence = _of_pictures(files)
            video = VideoInfo(number, name, *sequence.size, len(files), names)
        else:
            lines = list(read_lines(place))
            if not lines:
                raise DataError(
                    f"`{place}` holds no mask, so the size of its frames is unknown",
                    "leave sequences without masks out",
                )
            last = max(line.frame for line in lines)
            length = (lengths or {}).get(name, last + 1 - first_frame)
            names = tuple(f"{name}/{first_frame + t:06d}.png" for t in range(length))
            height, width = lines[0].rle["size"]
            video = VideoInfo(number, name, height, width, length, names)
            sequence = _of_lines(place, lines, video)
        videos.append(video)
        rows += _annotations(sequence, number, len(rows) + 1, None)
    return Dataset(f"`{path}`", CATEGORIES, tuple(videos), tuple(rows))


def read_mots_predictions(path: Path, truth: Dataset) -> tuple[Annotation, ...]:
    """Read results for the sequences of a ground truth that `read_mots` returned.

    Args:
        path: as of `read_mots`; every sequence must be there. PNGs are called as the ground
            truth's, texts count frames as it does, and may be empty.
        truth: the ground truth.

    Returns:
        Predictions of score 1, numbered from 1; regions to ignore are left out.

    Raises:
        DataError: a sequence or frame is missing, a mask is not of its size, and as `read_mots`.
    """
    places = _sequences(path)
    rows: list[Annotation] = []
    for video in truth.videos:
        place = places.get(safe_name(video.name))
        if place is None:
            raise DataError(
                f"`{path}` has no sequence `{video.name}` of {truth.name}",
                "results hold a text or a folder for each sequence, an empty one for none found",
            )
        if place.is_dir():
            files = [place / f"{stem}.png" for stem in frame_stems(video)]
            sequence = _of_pictures(files, (video.height, video.width))
        else:
            sequence = _of_lines(place, list(read_lines(place)), video)
        found = _annotations(sequence, video.id, len(rows) + 1, 1.0)
        rows += [row for row in found if not row.iscrowd]
    return tuple(rows)


def read_lines(path: Path) -> Iterator[MotsLine]:
    """Read the text form, line by line; empty lines do not count.

    Raises:
        DataError: a line is malformed; the message names it.
    """
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"`{path}` cannot be read as text: {error}") from error
    # Only newlines part lines: splitlines would also break at control characters.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _line(line.split(), f"`{path}`, line {number}")


def _line(fields: list[str], where: str) -> MotsLine:
    """Parse one line."""
    if len(fields) != len(_COLUMNS.split()):
        raise DataError(f"{where} has {len(fields)} fields, expected `{_COLUMNS}`")
    if not all(value.isdecimal() and len(value) < 10 for value in fields[:5]):
        raise DataError(f"{where} is `{' '.join(fields[:5])} ...`, expected whole numbers >= 0")
    frame, object_id, class_id, height, width = map(int, fields[:5])
    if class_id not in _CLASSES:
        raise DataError(
            f"{where} has class {class_id}, expected 1 (car), 2 (pedestrian) or 10 (ignore)"
        )
    rle = RLE(size=[height, width], counts=fields[5])
    masks.validate(rle, where)
    return MotsLine(frame, object_id, class_id, rle)


def _sequences(path: Path) -> dict[str, Path]:
    """Return for each sequence its text or its folder of PNGs."""
    if path.is_file():
        return {path.stem: path}
    if not path.is_dir():
        raise DataError(f"`{path}` does not exist", "check the path")
    entries = sorted(path.iterdir())
    texts = {p.stem: p for p in entries if p.suffix == ".txt" and p.is_file()}
    inner = {p.name: p / "gt" / "gt.txt" for p in entries if (p / "gt" / "gt.txt").is_file()}
    pictures = {p.name: p for p in entries if p.is_dir() and any(p.glob("*.png"))}
    for found in (texts, inner, pictures):
        if found:
            return found
    raise DataError(
        f"`{path}` holds neither `*.txt`, nor `*/gt/gt.txt`, nor folders of PNGs",
        "give the folder of MOTS annotations (`instances_txt` or `instances`)",
    )


def _pictures(place: Path) -> list[Path]:
    """Return the PNGs of a sequence."""
    return sorted(file for file in place.glob("*.png") if file.is_file())


def _of_pictures(files: list[Path], size: tuple[int, int] | None = None) -> _Sequence:
    """Return the objects of a sequence of PNGs; all are of a size, if one is given of that."""
    tracks = IndexTracks(len(files), size or (0, 0))
    for t, file in enumerate(files):
        values = np.asarray(open_png(file, _MODES, _SIXTEEN)).astype(np.uint16)
        tracks.add(t, values, str(file))
        for value in tracks.rles:
            if value // PER_CLASS not in (1, 2) and value != IGNORE_CLASS * PER_CLASS:
                raise DataError(
                    f"`{file}` has value {value}, expected 1000 class + instance of class 1 (car) "
                    "or 2 (pedestrian), or 10000"
                )
    objects = {(value // PER_CLASS, value): rles for value, rles in tracks.rles.items()}
    return _Sequence(tracks.size, objects)


def _of_lines(path: Path, lines: list[MotsLine], video: VideoInfo) -> _Sequence:
    """Return the objects of a text about a video whose frames are called by their numbers."""
    stems = frame_stems(video)
    place_of = {int(stem): t for t, stem in enumerate(stems)}
    groups: dict[int, list[MotsLine]] = defaultdict(list)
    for line in lines:
        groups[line.frame].append(line)
    objects: dict[tuple[int, int], list[RLE | None]] = {}
    for frame, group in sorted(groups.items()):
        where = f"`{path}`, frame {frame}"
        if frame not in place_of:
            raise DataError(
                f"{where}: the sequence has frames {stems[0]} to {stems[-1]}",
                "frames count from 0 in KITTI MOTS and from 1 in MOTSChallenge",
            )
        for key, rle in _frame_masks(group, (video.height, video.width), where).items():
            objects.setdefault(key, [None] * video.length)[place_of[frame]] = rle
    return _Sequence((video.height, video.width), objects)


def _frame_masks(
    lines: list[MotsLine], size: tuple[int, int], where: str
) -> dict[tuple[int, int], RLE]:
    """Return the masks of a frame by class and object, what is to be ignored as one, checked."""
    found: dict[tuple[int, int], RLE] = {}
    ignored: list[RLE] = []
    for line in lines:
        if tuple(line.rle["size"]) != size:
            raise DataError(
                f"{where}: a mask is {line.rle['size'][0]}x{line.rle['size'][1]}, expected "
                f"{size[0]}x{size[1]} like the others",
                "bring all masks to the size of the video",
            )
        if line.class_id == IGNORE_CLASS:
            ignored.append(line.rle)
            continue
        if any(line.object_id == number for _, number in found):
            raise DataError(f"{where}: object {line.object_id} occurs twice")
        found[line.class_id, line.object_id] = line.rle
    if ignored:
        found[IGNORE_CLASS, IGNORE_CLASS * PER_CLASS] = masks.merge(ignored)
    if sum(map(masks.area, found.values())) != masks.area(masks.merge(list(found.values()))):
        raise DataError(f"{where}: masks overlap", "give each pixel to one object")
    return found


def _annotations(
    sequence: _Sequence, video_id: int, first_id: int, score: float | None
) -> list[Annotation]:
    """Return objects as annotations, what is to be ignored as a crowd of every category."""
    found: list[Annotation] = []
    for (class_id, number), rles in sorted(sequence.objects.items()):
        crowd = class_id == IGNORE_CLASS
        for category_id in [c.id for c in CATEGORIES] if crowd else [class_id]:
            # Track ids are unique in a video, so the crowds of the two categories have two.
            track_id = number + category_id if crowd else number
            ids = (first_id + len(found), video_id, category_id, track_id)
            found.append(annotation(*ids, rles, score=score, iscrowd=crowd))
    return found
