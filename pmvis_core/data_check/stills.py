"""Walks through a COCO instances file once and notes every fault, then looks at its images.

The checks of an entry do not depend on each other. Memory holds the file's text, the ids and the
images, not the annotations, so a file of COCO's size is fine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pmvis_core import masks
from pmvis_core.data_check.pictures import Picture, check_pictures
from pmvis_core.data_check.report import Notes, Report
from pmvis_core.errors import DataError
from pmvis_core.formats.coco import (
    CocoAnnotation,
    CocoImage,
    parse_annotation,
    parse_category,
    parse_image,
    polygon_length,
    segmentation_to_rle,
)
from pmvis_core.formats.coco_text import CocoText, Entry
from pmvis_core.image_sets import usual_root
from pmvis_core.progress import Progress, silent
from pmvis_core.types import Box

_TOLERANCE_PX = 1.0
_LEAST_IOU = 0.5


def check_stills(
    path: Path,
    images: Path | None,
    *,
    fast: bool = False,
    strict: bool = False,
    workers: int = 0,
    progress: Progress = silent,
) -> Report:
    """Find every fault of a COCO instances file and of its images.

    Args:
        path: the file.
        images: folder that `file_name` is relative to; None looks in the usual places.
        fast: read only the heads of image files.
        strict: count warnings as faults.
        workers: threads that read images; 0 for one a processor.
        progress: is told of every entry and every image.

    Raises:
        DataError: the file is missing.
    """
    notes = Notes(strict=strict)
    walk = _Walk(notes)
    try:
        document = CocoText(_content(path), "annotations", path)
        for entry in progress(document.entries(), "annotations"):
            walk.entry(entry)
    except DataError as error:
        notes.add("file", error.message)
    walk.end()
    root = images or usual_root(path, [image.file_name for image in walk.images.values()])
    pictures = (
        Picture(root / image.file_name, (image.height, image.width), f"image {image.id}")
        for image in walk.images.values()
    )
    files = check_pictures(pictures, notes, fast=fast, workers=workers, progress=progress)
    return notes.report(
        f"`{path}`", {"image": len(walk.images), "annotation": walk.annotations, "file": files}
    )


def _content(path: Path) -> bytes:
    """Return a file's content."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"annotations `{path}` cannot be read: {error.strerror}") from error


class _Walk:
    """Goes through the entries once and notes what is wrong."""

    def __init__(self, notes: Notes) -> None:
        """Start with nothing seen."""
        self.images: dict[int, CocoImage] = {}
        self.annotations = 0
        self._notes = notes
        self._categories: set[int] = set()
        self._ids: set[int] = set()
        self._names: Counter[str] = Counter()
        self._instances: Counter[int] = Counter()
        self._crowds: Counter[int] = Counter()
        self._waiting: list[tuple[CocoAnnotation, str]] = []
        self._of_category: dict[int, list[str]] = {}

    def entry(self, entry: Entry) -> None:
        """Check the next entry."""
        where = f"{entry.section}[{entry.position}]"
        try:
            if entry.section == "categories":
                self._add_id(self._categories, parse_category(entry.value, where).id, where)
            elif entry.section == "images":
                self._image(parse_image(entry.value, where), where)
            else:
                self.annotations += 1
                row = parse_annotation(entry.value, where)
                self._annotation(row, f"annotation {row.id}", where)
        except DataError as error:
            self._notes.add("malformed", error.message)

    def _add_id(self, known: set[int], number: int, where: str) -> None:
        """Note an id that is known already."""
        if number in known:
            self._notes.add("duplicate-id", f"{where}: {number}")
        known.add(number)

    def _image(self, image: CocoImage, where: str) -> None:
        """Check an image's entry."""
        if image.id in self.images:
            self._notes.add("duplicate-id", f"{where}: {image.id}")
            return
        self.images[image.id] = image
        self._names[image.file_name] += 1
        if self._names[image.file_name] == 2:
            self._notes.add("file-twice", f"{where}: `{image.file_name}`")

    def _annotation(self, row: CocoAnnotation, name: str, where: str) -> None:
        """Check an annotation, later if its image may still come."""
        self._add_id(self._ids, row.id, where)
        self._of_category.setdefault(row.category_id, [])
        places = self._of_category[row.category_id]
        if row.category_id not in self._categories:
            places.append(name)
        if row.image_id in self.images:
            self._fits(row, self.images[row.image_id], name)
        else:
            self._waiting.append((row, name))

    def _fits(self, row: CocoAnnotation, image: CocoImage, name: str) -> None:
        """Check box and mask against the image."""
        (self._crowds if row.is_crowd else self._instances)[image.id] += 1
        name = f"{name}, image {image.id}"
        if row.segmentation is not None and not row.is_crowd:
            seen = self._mask(row, image, name)
            if seen is not None and _iou(_corners(row.bbox), seen) < _LEAST_IOU:
                self._notes.add("mask-box", f"{name}: box {_told(_corners(row.bbox))}, mask "
                                f"{_told(seen)}")  # fmt: skip
        elif row.segmentation is not None:
            self._mask(row, image, name)
        self._box(row, image, name)

    def _box(self, row: CocoAnnotation, image: CocoImage, name: str) -> None:
        """Check a box."""
        x1, y1, x2, y2 = _corners(row.bbox)
        told = f"{name}: {list(row.bbox)} in {image.width}x{image.height}"
        beyond = max(-x1, -y1, x2 - image.width, y2 - image.height)
        if row.bbox[2] <= 0 or row.bbox[3] <= 0:
            self._notes.add("box-empty", told)
        elif x1 >= image.width or y1 >= image.height or x2 <= 0 or y2 <= 0:
            self._notes.add("box-outside", told)
        elif beyond > _TOLERANCE_PX:
            self._notes.add("box-beyond", told)

    def _mask(self, row: CocoAnnotation, image: CocoImage, name: str) -> Box | None:
        """Check a mask; return its xyxy box if it has one."""
        mask: Any = row.segmentation
        if isinstance(mask, Mapping):
            return self._runs(mask, image, name)
        if any(polygon_length(part) is None for part in mask):
            self._notes.add("polygon-malformed", name)
            return None
        solid = [part for part in mask if len(part) >= 6]
        if not solid:
            self._notes.add("polygon-open", name)
            return None
        across = [x for part in solid for x in part[0::2]]
        down = [y for part in solid for y in part[1::2]]
        return min(across), min(down), max(across), max(down)

    def _runs(self, mask: Mapping[str, Any], image: CocoImage, name: str) -> Box | None:
        """Check run lengths."""
        size = [image.height, image.width]
        if mask.get("size") != size:
            told = f"{name}: {mask.get('size')}, the image is {size} (height, width)"
            self._notes.add("mask-size", told)
            return None
        try:
            rle = segmentation_to_rle(mask, image.height, image.width, name)
        except DataError as error:
            self._notes.add("mask-malformed", error.message)
            return None
        if masks.area(rle) == 0:
            self._notes.add("mask-empty", name)
            return None
        return masks.to_box(rle)

    def end(self) -> None:
        """Check what only the whole file shows."""
        for row, name in self._waiting:
            if row.image_id in self.images:
                self._fits(row, self.images[row.image_id], name)
            else:
                self._notes.add("unknown-image", f"{name}: image {row.image_id}")
        for category, places in self._of_category.items():
            for name in places if category not in self._categories else ():
                self._notes.add("unknown-category", f"{name}: category {category}")
        for number in self.images:
            if not self._instances[number]:
                kind = "crowd-only" if self._crowds[number] else "no-annotation"
                self._notes.add(kind, f"image {number} `{self.images[number].file_name}`")


def _corners(bbox: Sequence[float]) -> Box:
    """Return xyxy corners of COCO's box."""
    x, y, width, height = bbox
    return x, y, x + width, y + height


def _told(box: Box) -> str:
    """Return corners for a message."""
    return "[" + ", ".join(f"{edge:g}" for edge in box) + "]"


def _iou(a: Box, b: Box) -> float:
    """Return the IoU of two xyxy boxes; 1 where one is empty, as that has a kind of its own."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    if area_a <= 0 or area_b <= 0:
        return 1.0
    return width * height / (area_a + area_b - width * height)
