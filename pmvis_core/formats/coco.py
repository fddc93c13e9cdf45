"""COCO instances JSON: reading with every fault named, writing, segmentations to RLE.

An annotation without the key ``segmentation`` is a box-only annotation; that absence *is* its
supervision. An empty ``segmentation`` (``[]``, as in ImageNet-bbox JSON) is read as absent.

    dataset = read_coco(Path("instances_train2017.json"))
    json_value = as_coco(dataset)

`StillVideos` is the way to inference and evaluation: every picture a video of one frame.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pmvis_core import masks
from pmvis_core.errors import DataError
from pmvis_core.files import atomic_write, canonical_json, read_json
from pmvis_core.tracks_json import TracksHeader
from pmvis_core.types import RLE, Category, Supervision, Track, VideoInfo, VideoTracks


class SegmentationText(Protocol):
    """A segmentation that was left in its file (`coco_index`)."""

    def read(self) -> bytes:
        """Return its JSON as it stands there."""


_PLAIN = frozenset([float])

Segmentation = Sequence[Sequence[float]] | Mapping[str, Any] | SegmentationText
"""COCO's own forms: a list of polygons ``[x0, y0, x1, y1, …]``, or an RLE, compressed or not; or
the place where one of these stands."""


@dataclass(frozen=True, slots=True)
class CocoImage:
    """One picture of a data set."""

    id: int
    """Unique in the data set."""
    file_name: str
    """Relative to the data set's root of images."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    source: str | None = None
    """Name of the data set it came from, in files that hold several."""


@dataclass(frozen=True, slots=True)
class CocoAnnotation:
    """One instance in one picture."""

    id: int
    """Unique in the data set."""
    image_id: int
    """The picture."""
    category_id: int
    """Of the data set's vocabulary."""
    bbox: tuple[float, float, float, float]
    """``(x, y, width, height)`` in absolute pixels, as COCO writes it."""
    area: float
    """Pixels of the mask, or of the box where there is no mask."""
    segmentation: Segmentation | None = None
    """The mask, or None where only the box is known."""
    is_crowd: bool = False
    """A region of many instances, which trains nothing."""


@dataclass(frozen=True, slots=True)
class CocoDataset:
    """Vocabulary, pictures and instances."""

    categories: tuple[Category, ...]
    images: tuple[CocoImage, ...]
    annotations: tuple[CocoAnnotation, ...]


@dataclass(frozen=True)
class StillVideos:
    """Pictures as videos of one frame under the same ids; iterated over, a `ytvis.TrackSource`."""

    name: str
    """How messages call the file."""
    dataset: CocoDataset
    """What it holds."""

    @property
    def header(self) -> TracksHeader:
        """Categories, and no lineage."""
        return TracksHeader(self.dataset.categories)

    def __iter__(self) -> Iterator[VideoTracks]:
        """Yield each picture with its instances as human tracks; crowds become ``ignored``.

        Raises:
            DataError: an instance has no mask or a malformed one.
        """
        rows: dict[int, list[CocoAnnotation]] = {image.id: [] for image in self.dataset.images}
        for row in self.dataset.annotations:
            rows[row.image_id].append(row)
        for image in self.dataset.images:
            name = PurePosixPath(image.file_name)
            info = VideoInfo(image.id, name.stem, image.height, image.width, 1, (image.file_name,))
            crowds = [_track(row, info, self.name) for row in rows[image.id] if row.is_crowd]
            tracks = [_track(row, info, self.name) for row in rows[image.id] if not row.is_crowd]
            yield VideoTracks(info, tuple(tracks), tuple(crowds))


def is_coco(document: Any) -> bool:
    """Tell a parsed COCO instances JSON from a YouTube-VIS data set, which has ``videos``."""
    return isinstance(document, dict) and "images" in document and "videos" not in document


def read_coco(path: Path, what: str = "COCO annotations") -> CocoDataset:
    """Read a COCO instances JSON and check that it is whole.

    Args:
        path: the file.
        what: how a message calls it.

    Raises:
        DataError: missing, not JSON, a field missing or of another type, an id twice, or an
            annotation that points to no image or no category; the message names the entry.
    """
    return from_coco(read_json(path, what), str(path))


def from_coco(value: Any, where: str) -> CocoDataset:
    """Build a data set from parsed COCO JSON.

    Raises:
        DataError: see `read_coco`; ``where`` begins each message.
    """
    if not isinstance(value, dict) or not all(
        isinstance(value.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise DataError(
            f"{where}: no COCO instances JSON, expected an object with the lists `images`, "
            "`annotations` and `categories`"
        )
    categories = tuple(
        parse_category(row, f"{where}: categories[{i}]")
        for i, row in enumerate(value["categories"])
    )
    images = tuple(
        parse_image(row, f"{where}: images[{i}]") for i, row in enumerate(value["images"])
    )
    annotations = tuple(
        parse_annotation(row, f"{where}: annotations[{i}]")
        for i, row in enumerate(value["annotations"])
    )
    image_ids = _unique([image.id for image in images], f"{where}: image id")
    category_ids = _unique([category.id for category in categories], f"{where}: category id")
    _unique([annotation.id for annotation in annotations], f"{where}: annotation id")
    for row in annotations:
        if row.image_id not in image_ids:
            raise DataError(f"{where}: annotation {row.id} is of image {row.image_id}, not listed")
        if row.category_id not in category_ids:
            raise DataError(
                f"{where}: annotation {row.id} has category id {row.category_id}, not listed"
            )
    return CocoDataset(categories, images, annotations)


def parse_category(row: Any, where: str) -> Category:
    """Parse one of the categories.

    Raises:
        DataError: a field is missing or of another type; ``where`` begins the message.
    """
    return Category(_integer(row, "id", where), _text(row, "name", where))


def parse_image(row: Any, where: str) -> CocoImage:
    """Parse one of the images.

    Raises:
        DataError: a field is missing or of another type; ``where`` begins the message.
    """
    image = CocoImage(
        id=_integer(row, "id", where),
        file_name=_text(row, "file_name", where),
        height=_integer(row, "height", where),
        width=_integer(row, "width", where),
        source=row.get("source"),
    )
    if image.height <= 0 or image.width <= 0:
        raise DataError(f"{where}: size {image.width}x{image.height}, expected positive numbers")
    return image


def parse_annotation(row: Any, where: str) -> CocoAnnotation:
    """Parse one of the annotations.

    Raises:
        DataError: a field is missing or of another type; ``where`` begins the message.
    """
    bbox = _field(row, "bbox", where)
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise DataError(f"{where}: bbox is {bbox!r}, expected `[x, y, width, height]`")
    segmentation = row.get("segmentation") or None
    if not isinstance(segmentation, list | dict | None):
        raise DataError(f"{where}: segmentation is a {type(segmentation).__name__}")
    area = row.get("area")
    return CocoAnnotation(
        id=_integer(row, "id", where),
        image_id=_integer(row, "image_id", where),
        category_id=_integer(row, "category_id", where),
        bbox=(bbox[0], bbox[1], bbox[2], bbox[3]),
        area=area if _is_number(area) else bbox[2] * bbox[3],
        segmentation=segmentation,
        is_crowd=bool(row.get("iscrowd", 0)),
    )


def as_coco(dataset: CocoDataset, description: str = "") -> dict[str, Any]:
    """Return a data set as COCO JSON; an annotation without a mask has no key ``segmentation``."""
    return {
        "info": {"description": description},
        "categories": [{"id": c.id, "name": c.name} for c in dataset.categories],
        "images": [_image_as_json(image) for image in dataset.images],
        "annotations": [_annotation_as_json(row) for row in dataset.annotations],
    }


def write_coco(path: Path, dataset: CocoDataset, description: str = "") -> None:
    """Write a data set as canonical JSON, entry by entry, atomically.

    The bytes are those of `as_coco` written by `files.write_json`, but for polygons that were left
    in their file: their numbers are written as they are spelt there.

    Raises:
        ResourceError: the place cannot be written.
    """
    with atomic_write(path, "wb") as stream:
        stream.write(b'{"annotations":[')
        for position, row in enumerate(dataset.annotations):
            stream.write((b"," if position else b"") + _annotation_line(row))
        rest = canonical_json(as_coco(replace(dataset, annotations=()), description))
        stream.write(rest.removeprefix('{"annotations":[').encode() + b"\n")


def segmentation_to_rle(segmentation: Segmentation, height: int, width: int, where: str) -> RLE:
    """Turn a COCO segmentation into a compressed RLE.

    Args:
        segmentation: polygons in pixels, or an RLE with string or integer counts.
        height: of the image, pixels.
        width: of the image, pixels.
        where: begins a message.

    Raises:
        DataError: the RLE is of another size or does not fill the image, or polygons are broken.
    """
    segmentation = segmentation_value(segmentation)
    if isinstance(segmentation, Mapping):
        size = list(segmentation.get("size", ()))
        if size != [height, width]:
            raise DataError(f"{where}: the mask's size is {size}, the image's {[height, width]}")
        counts = segmentation.get("counts")
        if isinstance(counts, list):
            return masks.from_uncompressed(counts, height, width)
        rle = RLE(size=[height, width], counts=counts)  # type: ignore[typeddict-item]
        masks.validate(rle, where)
        return rle
    for polygon in segmentation:
        if len(polygon) < 6 or len(polygon) % 2 or not all(map(_is_number, polygon)):
            raise DataError(
                f"{where}: a polygon of {len(polygon)} numbers, expected at least three points "
                "`x0, y0, x1, y1, …`"
            )
    return masks.from_polygons([list(polygon) for polygon in segmentation], height, width)


def segmentation_value(segmentation: Segmentation) -> Sequence[Sequence[float]] | Mapping[str, Any]:
    """Return a segmentation as polygons or RLE, also where it was left in its file.

    Raises:
        DataError: that file was changed since it was opened.
    """
    if isinstance(segmentation, Sequence | Mapping):
        return segmentation
    value: Sequence[Sequence[float]] | Mapping[str, Any] = json.loads(segmentation.read())
    return value


def polygon_length(part: Any) -> int | None:
    """Return the numbers of a polygon, or None if it is no list of pairs of finite numbers."""
    if not isinstance(part, list | tuple) or len(part) % 2:
        return None
    usual = set(map(type, part)) <= _PLAIN and math.isfinite(sum(part))
    return len(part) if usual or all(map(_is_number, part)) else None


def _track(row: CocoAnnotation, video: VideoInfo, name: str) -> Track:
    """Return an instance as a track of its one-frame video."""
    where = f"{name}: annotation {row.id}"
    if row.segmentation is None:
        raise DataError(
            f"{where} has no mask, and tracks need one",
            "take annotations with masks; box-only pictures can train, not measure",
        )
    rle = segmentation_to_rle(row.segmentation, video.height, video.width, where)
    return Track(row.id, row.category_id, 1.0, (1.0,), (rle,), supervision=Supervision.MASK)


def _image_as_json(image: CocoImage) -> dict[str, Any]:
    """Return one image as COCO writes it."""
    row: dict[str, Any] = {
        "id": image.id,
        "file_name": image.file_name,
        "height": image.height,
        "width": image.width,
    }
    if image.source is not None:
        row["source"] = image.source
    return row


def _annotation_as_json(annotation: CocoAnnotation) -> dict[str, Any]:
    """Return one annotation as COCO writes it."""
    row: dict[str, Any] = {
        "id": annotation.id,
        "image_id": annotation.image_id,
        "category_id": annotation.category_id,
        "bbox": list(annotation.bbox),
        "area": annotation.area,
        "iscrowd": int(annotation.is_crowd),
    }
    if annotation.segmentation is not None:
        row["segmentation"] = segmentation_value(annotation.segmentation)
    return row


def _annotation_line(annotation: CocoAnnotation) -> bytes:
    """Return one annotation as canonical JSON."""
    mask = annotation.segmentation
    if mask is None or isinstance(mask, Sequence | Mapping):
        return canonical_json(_annotation_as_json(annotation)).encode()
    text = mask.read()
    if text.startswith(b"["):
        text = text.translate(None, b" \t\r\n")
    else:
        text = canonical_json(json.loads(text)).encode()
    # By hand, for there are hundreds of thousands: the keys of `_annotation_as_json`, sorted.
    x, y, width, height = annotation.bbox
    rest = (
        f'{{"area":{annotation.area!r},"bbox":[{x!r},{y!r},{width!r},{height!r}],'
        f'"category_id":{annotation.category_id},"id":{annotation.id},'
        f'"image_id":{annotation.image_id},"iscrowd":{int(annotation.is_crowd)},"segmentation":'
    )
    return rest.encode() + text + b"}"


def _field(row: Any, key: str, where: str) -> Any:
    """Return a field that must be there."""
    if not isinstance(row, dict) or key not in row:
        raise DataError(f"{where}: no `{key}`")
    return row[key]


def _integer(row: Any, key: str, where: str) -> int:
    """Return a field that must be an integer."""
    value = _field(row, key, where)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{where}: {key} is {value!r}, expected an integer")
    return value


def _text(row: Any, key: str, where: str) -> str:
    """Return a field that must be a string with something in it."""
    value = _field(row, key, where)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {key} is {value!r}, expected a name")
    return value


def _is_number(value: Any) -> bool:
    """Tell whether a JSON value is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _unique(ids: list[int], what: str) -> set[int]:
    """Return the ids as a set.

    Raises:
        DataError: one occurs twice.
    """
    seen: set[int] = set()
    for value in ids:
        if value in seen:
            raise DataError(f"{what} {value} occurs a second time")
        seen.add(value)
    return seen
