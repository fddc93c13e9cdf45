"""An index of a COCO instances file: its numbers as memory-mapped columns, its masks left in place.

COCO 2017 train has 448 MB, 118,287 images and 860,001 annotations; as Python objects that is more
than 3 GB in every process. The index holds what decides which image to draw (ids, sizes, boxes,
categories) in two tables, and of each segmentation where its text stands; `segmentation` reads and
parses it when it is wanted. All processes of a machine share one mapping of the tables.

A large file's index is kept (`kept_tables`). `coco_tables` reads the file.

    index = open_index(Path("instances_train2017.json"))
    rows = index.annotations[index.first[7] : index.first[8]]   # those of image 7
    polygons = index.segmentation(rows[0])
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmvis_core.errors import DataError
from pmvis_core.files import digest_file
from pmvis_core.formats import coco
from pmvis_core.formats.coco_tables import (
    ANNOTATION,
    BOX,
    HOLLOW,
    IMAGE,
    MALFORMED,
    POLYGONS,
    RUNS,
    by_image,
    check_names,
    read_tables,
    string,
)
from pmvis_core.formats.kept_tables import (
    UNSOUND,
    WORTH_KEEPING_BYTES,
    FileText,
    kept_or_made,
    read_kept,
    write_kept,
)
from pmvis_core.types import Category

__all__ = [
    "ANNOTATION",
    "BOX",
    "HOLLOW",
    "IMAGE",
    "MALFORMED",
    "POLYGONS",
    "RUNS",
    "CocoIndex",
    "FileText",
    "MaskText",
    "as_dataset",
    "open_index",
]

FORMAT = 1
"""Version of an index file; another one is made again."""

_KINDS: tuple[np.dtype[Any], ...]
_KINDS = (IMAGE, ANNOTATION, np.dtype(np.int64), np.dtype(np.uint8))


@dataclass(frozen=True, slots=True)
class MaskText:
    """A segmentation that stands in a file; see `coco.SegmentationText`."""

    text: FileText
    """The file."""
    begin: int
    """Its first byte."""
    end: int
    """Behind its last byte."""

    def read(self) -> bytes:
        """Return its JSON."""
        return self.text.read(self.begin, self.end)


@dataclass(frozen=True)
class CocoIndex:
    """The tables of one file. Annotations are sorted by image, within one as in the file."""

    path: Path
    """The annotations' JSON."""
    digest: str
    """Of the JSON's content."""
    categories: tuple[Category, ...]
    """In the file's order."""
    sources: tuple[str, ...]
    """Names of the data sets that images say they come from."""
    images: NDArray[Any]
    """(I,) of `IMAGE`, in the file's order."""
    annotations: NDArray[Any]
    """(A,) of `ANNOTATION`."""
    first: NDArray[np.int64]
    """(I + 1,) where the annotations of each image begin."""
    names: tuple[str, ...]
    """(I,) ``file_name`` of each image."""
    text: FileText
    """Where segmentations are read from."""

    def source(self, row: int) -> str | None:
        """Return the data set that an image says it comes from."""
        number = int(self.images["source_begin"][row])
        return None if number < 0 else self.sources[number]

    def segmentation_text(self, annotation: Any) -> bytes:
        """Return a segmentation as it stands in the file, empty where there is none.

        Raises:
            DataError: the file was changed since it was opened.
        """
        return self.text.read(int(annotation["begin"]), int(annotation["end"]))

    def segmentation(self, annotation: Any) -> Any:
        """Return a segmentation as COCO's value: polygons, an RLE, or None.

        Raises:
            DataError: the file was changed since it was opened.
        """
        text = self.segmentation_text(annotation)
        return json.loads(text) if text else None


def open_index(
    path: Path, what: str = "COCO annotations", *, worth_keeping: int = WORTH_KEEPING_BYTES
) -> CocoIndex:
    """Return the index of a COCO instances file, from its kept copy if that is sound.

    Args:
        path: the file; not ``-``.
        what: how a message calls it.
        worth_keeping: least bytes of a file whose index is kept.

    Raises:
        DataError: the file is missing or malformed; the message names the entry.
    """
    try:
        text = FileText(path)
        digest = digest_file(path)
    except FileNotFoundError as error:
        raise DataError(
            f"{what} `{path}` does not exist", "check the path, or make the file first"
        ) from error
    except OSError as error:
        raise DataError(f"{what} `{path}` cannot be read: {error.strerror}") from error
    if path.stat().st_size < worth_keeping:
        return _built(path, what, digest, text)
    return kept_or_made(
        path,
        digest,
        lambda place: _kept(place, path, digest, text),
        lambda: _built(path, what, digest, text),
        _keep,
    )


def as_dataset(index: CocoIndex) -> coco.CocoDataset:
    """Return an index as a data set; annotations by ascending id, masks left in their file."""
    images = tuple(
        coco.CocoImage(number, name, height, width, index.source(row))
        for row, (name, (number, height, width)) in enumerate(
            zip(index.names, index.images[["id", "height", "width"]].tolist(), strict=True)
        )
    )
    order = np.argsort(index.annotations["id"])
    rows = index.annotations[order]
    boxes = np.stack([rows[name] for name in ("x", "y", "width", "height")], 1)
    columns = (rows[name].tolist() for name in "id image_id category_id area begin end".split())
    return coco.CocoDataset(
        index.categories,
        images,
        tuple(
            coco.CocoAnnotation(
                number,
                image,
                category,
                (box[0], box[1], box[2], box[3]),
                area,
                MaskText(index.text, begin, end) if end else None,
                crowd,
            )
            for number, image, category, area, begin, end, box, crowd in zip(
                *columns, boxes.tolist(), rows["crowd"].tolist(), strict=True
            )
        ),
    )


# --- making ---


def _built(path: Path, what: str, digest: str, text: FileText) -> CocoIndex:
    """Read a file into tables and check what they say."""
    if path.stat().st_size == 0:
        raise DataError(f"{what} `{path}` is empty, expected JSON")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        images, annotations, categories = read_tables(data, what, path)
        names = [string(data, row) for row in images[["name_begin", "name_end"]].tolist()]
        check_names(names, str(path))
        sources = [
            string(data, row) if row[1] else None
            for row in images[["source_begin", "source_end"]].tolist()
        ]
    known = tuple(sorted({source for source in sources if source is not None}))
    numbers = {name: number for number, name in enumerate(known)}
    images["source_begin"] = [-1 if source is None else numbers[source] for source in sources]
    images["source_end"] = 0
    annotations, first = by_image(images, annotations, categories, str(path))
    index = CocoIndex(
        path, digest, categories, known, images, annotations, first, tuple(names), text
    )
    _check_masks(index)
    return index


def _check_masks(index: CocoIndex) -> None:
    """Refuse broken polygons and run lengths.

    Raises:
        DataError: naming the first annotation whose mask is broken.
    """
    kinds = index.annotations["kind"]
    for row in index.annotations[kinds == MALFORMED][:1]:
        raise DataError(
            f"`{index.path}`: annotation {row['id']}: a malformed polygon, expected numbers "
            "x, y, x, y, ...",
            f"`pmvis check-data {index.path}` lists every fault",
        )
    for row in index.annotations[kinds == RUNS]:
        image = index.images[row["image_row"]]
        where = f"`{index.path}`: annotation {row['id']}"
        size = int(image["height"]), int(image["width"])
        coco.segmentation_to_rle(index.segmentation(row), *size, where)


# --- keeping ---


def _keep(place: Path, index: CocoIndex) -> bool:
    """Write an index, whole or not at all; tell whether it could be written."""
    facts = {
        "categories": [[category.id, category.name] for category in index.categories],
        "sources": index.sources,
    }
    names = np.frombuffer("\0".join(index.names).encode(), np.uint8)
    tables = (index.images, index.annotations, index.first, names)
    return write_kept(place, FORMAT, index.digest, facts, tables)


def _kept(place: Path, path: Path, digest: str, text: FileText) -> CocoIndex | None:
    """Return an index that was kept, or None if it is absent, of another file, or damaged."""
    try:
        found = read_kept(place, FORMAT, digest, _KINDS)
        if found is None:
            return None
        head, (images, annotations, first, names) = found
        categories = tuple(Category(int(number), str(name)) for number, name in head["categories"])
        sources = tuple(map(str, head["sources"]))
        called = tuple(bytes(names).decode().split("\0")) if len(images) else ()
    except UNSOUND:
        return None
    index = CocoIndex(
        path=path,
        digest=digest,
        categories=categories,
        sources=sources,
        images=images,
        annotations=annotations,
        first=first,
        names=called,
        text=text,
    )
    return index if _is_sound(index, path.stat().st_size) else None


def _is_sound(index: CocoIndex, size: int) -> bool:
    """Tell whether the tables agree with each other and with a file of so many bytes.

    The digest only tells that the index is as it was written, not that it was written by us.
    """
    images, annotations, first = index.images, index.annotations, index.first
    if len(index.names) != len(images) or len(first) != len(images) + 1:
        return False
    counts = np.diff(first)
    if first[0] != 0 or first[-1] != len(annotations) or (counts < 0).any():
        return False
    known = [category.id for category in index.categories]
    begin, end = annotations["begin"], annotations["end"]
    good = (begin >= 0) & (begin <= end) & (end <= size) & (annotations["kind"] <= RUNS)
    good &= annotations["image_row"] == np.repeat(np.arange(len(images)), counts)
    good &= np.isin(annotations["category_id"], known)
    source = images["source_begin"]
    fine = (images["height"] > 0) & (images["width"] > 0)
    return bool(good.all() and (fine & (source >= -1) & (source < len(index.sources))).all())
