"""YouTube-VIS JSON: the dataset form (videos, annotations, categories) and the results form.

The dataset form is read by every VIS code base and holds ground truth or, with a ``score`` to each
annotation, pseudo labels. The results form is the list that the challenge servers take. Masks may
be compressed RLE, plain runs or polygons on input; what is written is compressed RLE. Files may be
gzip or ``-``. OVIS adds ``occlusion`` to annotations, which is kept.

    truth = read_dataset(Path("valid.json"))
    for video in open_tracks(Path("pseudo.json")):       # a tracks file would do as well
        print(video.video.name, len(video.tracks))

`ytvis_writer` is the way back.
"""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, cast

from pmvis_core.errors import DataError
from pmvis_core.files import STDIO, parse_json
from pmvis_core.formats.ytvis_annotation import (
    BLOCK,
    Annotation,
    as_object,
    as_track,
    parse_annotation,
    whole,
)
from pmvis_core.tracks_io import TracksHeader, TracksReader, check_track
from pmvis_core.types import Category, Track, VideoInfo, VideoTracks

_SNIFFED_BYTES = 1 << 16


class TrackSource(Protocol):
    """Anything that yields videos with tracks under one vocabulary."""

    @property
    def header(self) -> TracksHeader:
        """Categories and lineage."""

    def __iter__(self) -> Iterator[VideoTracks]:
        """Yield the videos in order."""


@dataclass(frozen=True)
class Dataset:
    """A YouTube-VIS file in its dataset form; iterated over, it is a `TrackSource`."""

    name: str
    """How messages call the file."""
    categories: tuple[Category, ...]
    """The vocabulary, in the file's order."""
    videos: tuple[VideoInfo, ...]
    """In the file's order."""
    annotations: tuple[Annotation, ...]
    """In the file's order."""
    annotated: bool = True
    """False where the file has no ``annotations``, as the published validation files."""
    lineage: tuple[Mapping[str, Any], ...] = ()
    """The lineage of the tracks file from which `as_dataset` made it."""

    @property
    def header(self) -> TracksHeader:
        """Categories and lineage, as a tracks file would state them."""
        return TracksHeader(self.categories, self.lineage)

    def __iter__(self) -> Iterator[VideoTracks]:
        """Yield each video with its annotations as tracks; crowds become ``ignored``.

        Raises:
            DataError: an annotation does not fit its video or the categories, an id occurs twice,
                or a score is not in [0, 1].
        """
        rows: dict[int, list[Annotation]] = {video.id: [] for video in self.videos}
        if len(rows) != len(self.videos):
            raise DataError(f"{self.name}: a video id occurs twice, expected unique ids")
        for annotation in self.annotations:
            if annotation.video_id not in rows:
                raise DataError(
                    f"{self.name}: annotation {annotation.id} is of video {annotation.video_id}, "
                    "which the file does not list"
                )
            rows[annotation.video_id].append(annotation)
        for video in self.videos:
            yield self._video_tracks(video, rows[video.id])

    def _video_tracks(self, video: VideoInfo, rows: Sequence[Annotation]) -> VideoTracks:
        """Return one video with its checked tracks."""
        here = f"{self.name}: video {video.id} `{video.name}`"
        if video.length < 1 or len(video.file_names) not in (0, video.length):
            raise DataError(
                f"{here} has {video.length} frames and {len(video.file_names)} file names"
            )
        categories = {category.id for category in self.categories}
        tracks: list[Track] = []
        ignored: list[Track] = []
        for row in rows:
            track = checked_track(row, video, categories, here)
            (ignored if row.iscrowd else tracks).append(track)
        ids = [track.id for track in (*tracks, *ignored)]
        if len(ids) != len(set(ids)):
            raise DataError(f"{here}: two annotations share an id, expected unique ids")
        return VideoTracks(video, tuple(tracks), tuple(ignored))


def open_tracks(path: Path) -> TrackSource:
    """Open a tracks file, ``-``, or a YouTube-VIS dataset, told apart by their first bytes.

    Annotations with a score become pseudo labels, those without one human masks.

    Raises:
        DataError: it is neither, or malformed.
    """
    kind = sniff(path)
    if kind == "results":
        raise DataError(
            f"{shown(path)} is a results list, which holds no videos and categories",
            "run `pmvis convert RESULTS.json --to tracks --gt DATASET.json` first",
        )
    return TracksReader(path) if kind == "tracks" else read_dataset(path)


def sniff(path: Path) -> str:
    """Tell from its first bytes what a file is: ``tracks``, ``dataset`` or ``results``.

    What is none of them counts as tracks, whose reader says best what is wrong with it. Standard
    input is only peeked at: nothing of it is consumed.
    """
    start = _first_bytes(path).lstrip()
    line, newline, _ = start.partition(b"\n")
    if start.startswith(b"["):
        return "results"
    if not start.startswith(b"{") or b'"pmvis_tracks"' in line:
        return "tracks"
    # A header longer than the bytes at hand: ours alone opens with categories of id and name.
    long_header = not newline and line.startswith(b'{"categories":[{"id":')
    return "tracks" if long_header and b'"supercategory"' not in line else "dataset"


def read_dataset(path: Path) -> Dataset:
    """Read a YouTube-VIS file in its dataset form.

    Polygons are rasterised at the size of their video. Masks whose size or number does not fit
    the video are kept as they are, for `evaluate` to judge.

    Raises:
        DataError: the file is missing or malformed; the message names the annotation and frame.
    """
    return dataset_of(read_document(path, "dataset"), shown(path))


def dataset_of(document: Any, name: str) -> Dataset:
    """Return a parsed JSON document as a dataset; see `read_dataset`.

    Args:
        document: what `read_document` returned.
        name: how messages call it.

    Raises:
        DataError: see `read_dataset`.
    """
    if not isinstance(document, dict) or not isinstance(document.get("videos"), list):
        stills = isinstance(document, dict) and "images" in document
        raise DataError(
            f"{name} has no `videos`, expected a YouTube-VIS dataset",
            "these are COCO stills; `pmvis convert STILLS.json --to dataset` makes videos of them"
            if stills
            else "a dataset is one object with `videos`, `categories` and `annotations`",
        )
    videos = tuple(_video(entry, f"{name}: video") for entry in document["videos"])
    rows = document.get("annotations")
    if rows is not None and not isinstance(rows, list):
        raise DataError(f"{name}: `annotations` is no list")
    by_id = {video.id: video for video in videos}
    return Dataset(
        name=name,
        categories=_categories(document.get("categories"), name),
        videos=videos,
        annotations=tuple(dataset_row(row, by_id, name) for row in rows or ()),
        annotated=rows is not None,
        lineage=_lineage(document.get("info")),
    )


def dataset_row(entry: Any, videos: Mapping[int, VideoInfo], name: str) -> Annotation:
    """Parse one of the ``annotations``.

    Args:
        entry: the object of the file.
        videos: those that the file lists, by id.
        name: how messages call the file.

    Raises:
        DataError: it is malformed.
    """
    entry = as_object(entry, f"{name}: annotation")
    number = whole(entry, "id", f"{name}: annotation")
    return parse_annotation(entry, videos, f"{name}: annotation {number}")


def checked_track(row: Annotation, video: VideoInfo, categories: set[int], here: str) -> Track:
    """Return an annotation as a track of its video, whose name ``here`` opens messages.

    Raises:
        DataError: it does not fit its video or the categories, or its score is not in [0, 1].
    """
    where = f"{here}: annotation {row.id}"
    track = as_track(row, video, where)
    check_track(track, video, categories, where)
    return track


def read_results(path: Path, dataset: Dataset) -> tuple[Annotation, ...]:
    """Read a results list.

    Args:
        path: the file.
        dataset: what the results are for; it gives the videos.

    Raises:
        DataError: the file is malformed, or a result is of a video that the dataset lacks.
    """
    name = shown(path)
    document = read_document(path, "results")
    if not isinstance(document, list):
        raise DataError(f"{name} is no list, expected results")
    videos = {video.id: video for video in dataset.videos}
    found = []
    for position, entry in enumerate(document):
        row = parse_annotation(
            {**as_object(entry, f"{name}: result {position}"), "id": position + 1},
            videos,
            f"{name}: result {position}",
        )
        if row.video_id not in videos:
            raise DataError(
                f"{name}: result {position} is of video {row.video_id}, which {dataset.name} "
                "does not list",
                "evaluate against the file whose videos were labelled",
            )
        if row.score is None:
            raise DataError(f"{name}: result {position} has no `score`, expected a number")
        found.append(row)
    return tuple(found)


def results_as_tracks(rows: Sequence[Annotation], dataset: Dataset) -> Dataset:
    """Return results as a dataset over the videos of another, also those without a result.

    Categories are those of ``dataset``, or called by their ids where it has none.
    """
    ids = sorted({row.category_id for row in rows})
    categories = dataset.categories or tuple(Category(number, str(number)) for number in ids)
    return replace(
        dataset, categories=categories, annotations=tuple(rows), annotated=True, lineage=()
    )


def shown(path: Path) -> str:
    """Return how a message calls a file."""
    return "standard input" if str(path) == STDIO else f"`{path}`"


def read_document(path: Path, what: str) -> Any:
    """Read a JSON document from a plain or gzip file or from ``-``; numbers in full precision.

    Raises:
        DataError: it is missing, empty, cut off or no strict JSON.
    """
    name = f"{what} {shown(path)}"
    try:
        data = sys.stdin.buffer.read() if str(path) == STDIO else path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        text = data.decode()
    except FileNotFoundError as error:
        raise DataError(f"{name} does not exist", "check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text, expected JSON") from error
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{name} cannot be read to its end: {error}") from error
    if not text.strip():
        raise DataError(f"{name} is empty, expected JSON")
    return parse_json(text, name)


def _first_bytes(path: Path) -> bytes:
    """Return the beginning of a plain or gzip file, or of what waits on standard input."""
    if str(path) == STDIO:
        waiting = cast(io.BufferedReader, sys.stdin.buffer).peek(_SNIFFED_BYTES)
        if not waiting.startswith(b"\x1f\x8b"):
            return waiting
        try:
            return zlib.decompressobj(wbits=31).decompress(waiting, _SNIFFED_BYTES)
        except zlib.error:
            return b""
    try:
        with path.open("rb") as raw:
            if raw.peek(2)[:2] == b"\x1f\x8b":
                return gzip.open(raw).read(_SNIFFED_BYTES)
            return raw.read(_SNIFFED_BYTES)
    except (EOFError, OSError, zlib.error):
        return b""


def _categories(entries: Any, name: str) -> tuple[Category, ...]:
    """Parse the vocabulary; a category without a name is called by its id."""
    if not isinstance(entries, list):
        raise DataError(f"{name} has no `categories`, expected a YouTube-VIS dataset")
    found: dict[int, Category] = {}
    for entry in entries:
        where = f"{name}: category"
        number = whole(as_object(entry, where), "id", where)
        if number in found:
            raise DataError(f"{name}: category id {number} occurs twice, expected unique ids")
        found[number] = Category(number, str(entry.get("name", number)))
    return tuple(found.values())


def _video(entry: Any, where: str) -> VideoInfo:
    """Parse one of the ``videos``."""
    entry = as_object(entry, where)
    number = whole(entry, "id", where)
    where = f"{where} {number}"
    files = entry.get("file_names") or ()
    if not isinstance(files, list | tuple) or not all(isinstance(file, str) for file in files):
        raise DataError(f"{where}: `file_names` is no list of names")
    folder = str(PurePosixPath(files[0]).parent) if files else str(number)
    name = entry.get("name")
    info = VideoInfo(
        id=number,
        name=name if isinstance(name, str) else folder,
        height=whole(entry, "height", where),
        width=whole(entry, "width", where),
        length=whole(entry, "length", where) if "length" in entry else len(files),
        file_names=tuple(files),
    )
    if info.height <= 0 or info.width <= 0 or info.length < 0:
        raise DataError(
            f"{where} is {info.height}x{info.width} with {info.length} frames, expected pixels"
        )
    return info


def _lineage(info: Any) -> tuple[Mapping[str, Any], ...]:
    """Return the lineage that `as_dataset` left in ``info``, or nothing."""
    block = info.get(BLOCK) if isinstance(info, dict) else None
    lineage = block.get("lineage") if isinstance(block, dict) else None
    return tuple(lineage) if isinstance(lineage, list) else ()
