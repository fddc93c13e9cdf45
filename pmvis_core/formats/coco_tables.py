"""A COCO instances file as two tables: what each image and annotation states, and where it stands.

``csrc/formats/coco_index.cpp`` reads the file in place. Where it is absent, or does not understand
the text, the twin here goes through it entry by entry (`coco_text`) and says what is wrong.
`coco_index` is the caller.
"""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmvis_core.errors import DataError
from pmvis_core.formats import coco, coco_text
from pmvis_core.native import find_library
from pmvis_core.types import Category

IMAGE = np.dtype(
    [(name, np.int64) for name in "id height width name_begin name_end".split()]
    + [(name, np.int64) for name in ("source_begin", "source_end")]
)
"""A row of the images; ``source_begin`` becomes the number of the source, -1 for none."""

ANNOTATION = np.dtype(
    [(name, np.int64) for name in "id image_id category_id begin end".split()]
    + [(name, np.float64) for name in "x y width height area".split()]
    + [("image_row", np.int32), ("kind", np.uint8), ("crowd", np.bool_), ("unused", np.uint16)]
)
"""A row of the annotations: COCO's box, ``[begin, end)`` of the segmentation's text, its kind."""

BOX, POLYGONS, HOLLOW, RUNS, MALFORMED = range(5)
"""Kinds: box only; polygons; polygons that enclose nothing; run lengths; broken polygons."""

Tables = tuple[NDArray[Any], NDArray[Any], tuple[Category, ...]]
"""Images, annotations in the file's order, and the vocabulary."""

VERSION = 1
"""Of the rows above and of ``_data.so``; csrc/formats/coco_index.cpp names the same."""
_REFUSED, _NO_MEMORY = 1, 2


def read_tables(data: mmap.mmap, what: str, path: Path) -> Tables:
    """Read a file.

    Args:
        data: its content.
        what: how messages call it.
        path: where it lies.

    Raises:
        DataError: it is no COCO instances JSON, or an entry is malformed.
    """
    found = _read_native(data)
    return _read_slowly(data, what, path) if found is None else found


def _read_native(data: mmap.mmap) -> Tables | None:
    """Read a file by the compiled reader; None if it is absent or does not take the text."""
    library = load_library()[0]
    if library is None:
        return None
    whole = np.frombuffer(data, np.uint8)
    handle, sizes = ctypes.c_void_p(), np.zeros(4, np.int64)
    status = library.pmvis_coco_read(
        whole.ctypes.data, len(whole), ctypes.byref(handle), sizes.ctypes.data
    )
    if status == _NO_MEMORY:
        raise MemoryError
    if status == _REFUSED:
        return None
    images, annotations = np.zeros(sizes[0], IMAGE), np.zeros(sizes[1], ANNOTATION)
    library.pmvis_coco_take(handle, images.ctypes.data, annotations.ctypes.data)
    del whole
    rows = json.loads(data[sizes[2] : sizes[3]])
    try:
        return images, annotations, coco_text.categories_of(rows, "")
    except DataError:
        return None


@functools.cache
def load_library() -> tuple[ctypes.CDLL | None, str]:
    """Load ``_data.so`` once; return it, or None, and where it lies or why not."""
    path, reason = find_library("_data.so")
    if path is None:
        return None, reason
    pointer: Any = ctypes.c_void_p
    try:
        library = ctypes.CDLL(str(path))
        # One that does not tell its version is of another, too.
        version = getattr(library, "pmvis_coco_version", lambda: -1)()
        if version != VERSION:
            return None, f"`{path}` is of another version: install pmvis again"
        library.pmvis_coco_read.argtypes = [pointer, ctypes.c_int64, pointer, pointer]
        library.pmvis_coco_take.argtypes = [pointer] * 3
        library.pmvis_coco_take.restype = None
    except (OSError, AttributeError) as error:
        return None, f"`{path}` does not load: {error}"
    return library, reason


def _read_slowly(data: mmap.mmap, what: str, path: Path) -> Tables:
    """Read a file by the twin in Python, entry by entry.

    Raises:
        DataError: it is no COCO instances JSON, or an entry is malformed.
    """
    document = coco_text.CocoText(data[:], what, path)
    rows: dict[str, list[Any]] = {section: [] for section in coco_text.SECTIONS}
    for entry in document.entries():
        where = f"{path}: {entry.section}[{entry.position}]"
        if entry.section == "categories":
            rows["categories"].append(coco.parse_category(entry.value, where))
        elif entry.section == "images":
            rows["images"].append(_image_row(entry, document, where))
        else:
            rows["annotations"].append(_annotation_row(entry, document, where))
    try:
        images, annotations = (
            np.array(rows["images"], IMAGE),
            np.array(rows["annotations"], ANNOTATION),
        )
    except OverflowError as error:
        raise DataError(f"{path}: an id has more than 64 bits") from error
    return images, annotations, tuple(rows["categories"])


def _image_row(entry: coco_text.Entry, document: coco_text.CocoText, where: str) -> tuple[int, ...]:
    """Return one of the images as a row of `IMAGE`."""
    image = coco.parse_image(entry.value, where)
    spans = document.spans(entry.begin)
    source = spans["source"] if isinstance(image.source, str) else (0, 0)
    return (image.id, image.height, image.width, *spans["file_name"], *source)


def _annotation_row(
    entry: coco_text.Entry, document: coco_text.CocoText, where: str
) -> tuple[Any, ...]:
    """Return one of the annotations as a row of `ANNOTATION`."""
    row = coco.parse_annotation(entry.value, where)
    kind = _kind(row.segmentation)
    place = (0, 0) if kind == BOX else document.spans(entry.begin)["segmentation"]
    numbers = (*row.bbox, row.area, -1, kind, row.is_crowd, 0)
    return (row.id, row.image_id, row.category_id, *place, *numbers)


def _kind(segmentation: coco.Segmentation | None) -> int:
    """Tell what a segmentation is."""
    if segmentation is None:
        return BOX
    if not isinstance(segmentation, Sequence):
        return RUNS
    lengths = [coco.polygon_length(part) for part in segmentation]
    if None in lengths:
        return MALFORMED
    return POLYGONS if any(length >= 6 for length in lengths if length) else HOLLOW


def string(data: mmap.mmap, place: Sequence[int]) -> str:
    """Return the string whose text stands at ``[begin, end)``."""
    return str(json.loads(data[place[0] : place[1]]))


def check_names(names: Sequence[str], where: str) -> None:
    """Refuse what no file can be called.

    Raises:
        DataError: naming the first such name.
    """
    for row, name in enumerate(names):
        try:
            fine = "\0" not in name and bool(name.encode())
        except UnicodeEncodeError:
            fine = False
        if not fine:
            raise DataError(f"{where}: images[{row}]: no file can be called {name!a}")


def by_image(
    images: NDArray[Any], annotations: NDArray[Any], categories: Sequence[Category], where: str
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Sort annotations by their image and check ids.

    Raises:
        DataError: an id occurs twice, or an annotation is of no image or no category.
    """
    category_ids = np.array([category.id for category in categories], np.int64)
    for ids, what in (
        (images["id"], "image"),
        (category_ids, "category"),
        (annotations["id"], "annotation"),
    ):
        repeated = first_repeated(ids)
        if repeated is not None:
            raise DataError(f"{where}: {what} id {repeated} occurs a second time")
    order = np.argsort(images["id"])
    row = np.searchsorted(images["id"], annotations["image_id"], sorter=order)
    row = order[np.minimum(row, len(order) - 1)] if len(order) else row
    listed = (
        images["id"][row] == annotations["image_id"] if len(order) else np.zeros(len(row), bool)
    )
    lost = np.flatnonzero(~listed | ~np.isin(annotations["category_id"], category_ids))
    if len(lost):
        entry = annotations[lost[0]]
        raise DataError(
            f"{where}: annotation {entry['id']} is of image {entry['image_id']}, not listed"
            if not listed[lost[0]]
            else f"{where}: annotation {entry['id']} has category id {entry['category_id']}, "
            "not listed"
        )
    annotations["image_row"] = row
    unknown = np.isnan(annotations["area"])
    annotations["area"][unknown] = (annotations["width"] * annotations["height"])[unknown]
    first = np.zeros(len(images) + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=len(images)), out=first[1:])
    return annotations[np.argsort(row, kind="stable")], first


def first_repeated(ids: NDArray[np.int64]) -> int | None:
    """Return the first id that stands at an earlier place already, or None."""
    _, places = np.unique(ids, return_index=True)
    if len(places) == len(ids):
        return None
    again = np.ones(len(ids), bool)
    again[places] = False
    return int(ids[again][0])
