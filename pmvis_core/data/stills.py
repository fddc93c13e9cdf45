"""Annotated stills as training reads them: records of a COCO instances file, made one by one.

`train_image.json` of `pmvis map-categories` is such a file: an annotation without `segmentation` is
a human box, an image's `source` says which data set it comes from. Labels are 0-based positions in
the vocabulary by ascending category id. Crowd annotations are kept apart, and images that have no
other annotation are dropped; polygons stay polygons, because they are rasterised after
augmentation. A file's numbers are mapped from its index and its masks read where they stand
(`formats.coco_index`), so that processes share both and COCO's size does not matter.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from pmvis_core.data.spares import STOP, OnError, judge_missing
from pmvis_core.data.streams import Ledger
from pmvis_core.errors import DataError
from pmvis_core.formats.coco import segmentation_to_rle
from pmvis_core.formats.coco_index import BOX, HOLLOW, POLYGONS, RUNS, CocoIndex, open_index
from pmvis_core.image_sets import usual_root
from pmvis_core.types import RLE, Box, Category, Supervision
from pmvis_core.video.frames import read_image

logger = logging.getLogger(__name__)

UNNAMED_SOURCE = "images"
"""What images without a `source` count under."""
_MIN_POLYGON = 6


@dataclass(frozen=True)
class Instance:
    """One annotation of a still."""

    label: int
    """0-based category."""
    box: Box
    """xyxy in pixels, as annotated."""
    supervision: Supervision
    """MASK or BOX."""
    polygons: tuple[NDArray[np.float64], ...] = ()
    """Each (2P,) x y x y ... in pixels."""
    rle: RLE | None = None
    """The mask at the image's size, if it is no polygon."""


@dataclass(frozen=True)
class Still:
    """One image and its annotations."""

    id: int
    """Unique in its file."""
    path: Path
    """The image file."""
    size: tuple[int, int]
    """(height, width) in pixels."""
    source: str
    """The data set it comes from (``coco``, ``imagenet``)."""
    instances: tuple[Instance, ...]
    """At least one."""
    crowds: tuple[RLE, ...] = ()
    """Regions at the image's size that hold objects which nobody took apart."""

    @property
    def has_mask(self) -> bool:
        """Whether any instance has a mask."""
        return any(instance.supervision is Supervision.MASK for instance in self.instances)


class Stills(Sequence[Still]):
    """The annotated images of a file, each made when it is asked for; see `read_stills`."""

    def __init__(self, index: CocoIndex, root: Path, rows: NDArray[np.intp]) -> None:
        """Keep which images count.

        Args:
            index: of the file.
            root: folder that `file_name` is relative to.
            rows: (N,) of ``index.images``.
        """
        self.root = root
        """Folder that `file_name` is relative to."""
        self._index, self._rows = index, rows
        ids = sorted(category.id for category in index.categories)
        self._labels = {number: label for label, number in enumerate(ids)}

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Still: ...

    @overload
    def __getitem__(self, place: slice) -> Stills: ...

    def __getitem__(self, place: int | slice) -> Still | Stills:
        """Return an image with its annotations, or some of the images.

        Raises:
            DataError: the annotations were changed since they were opened.
        """
        if isinstance(place, slice):
            return Stills(self._index, self.root, self._rows[place])
        row = int(self._rows[place])
        image = self._index.images[row]
        size = int(image["height"]), int(image["width"])
        found = self._index.annotations[self._index.first[row] : self._index.first[row + 1]]
        crowds = [a for a in found[found["crowd"]] if a["kind"] in (POLYGONS, RUNS)]
        return Still(
            id=int(image["id"]),
            path=self.root / self._index.names[row],
            size=size,
            source=self._index.source(row) or UNNAMED_SOURCE,
            instances=tuple(self._instance(a, size) for a in found[_trains(found)]),
            crowds=tuple(self._rle(a, size) for a in crowds),
        )

    def where(self, chosen: NDArray[np.bool_]) -> Stills:
        """Return the images for which the (N,) ``chosen`` is True."""
        return Stills(self._index, self.root, self._rows[chosen])

    @property
    def has_mask(self) -> NDArray[np.bool_]:
        """(N,) whether any instance of an image has a mask."""
        found = self._index.annotations
        masked = _trains(found) & (found["kind"] != BOX)
        return self._per_image(masked)[self._rows] > 0

    @property
    def names(self) -> list[str]:
        """(N,) `file_name` of each image."""
        return [self._index.names[row] for row in self._rows]

    def ledger(self) -> Ledger:
        """Return the images and annotations by the image's `source`."""
        found = self._index.annotations
        trains = _trains(found)
        boxes = self._per_image(trains & (found["kind"] == BOX))[self._rows]
        masked = self._per_image(trains & (found["kind"] != BOX))[self._rows]
        sources = self._index.images["source_begin"][self._rows]
        out: Ledger = {}
        for number in np.unique(sources).tolist():
            name = UNNAMED_SOURCE if number < 0 else self._index.sources[number]
            here = sources == number
            row = out.setdefault(name, Counter())
            row["images"] += int(here.sum())
            kinds = ((Supervision.MASK, masked), (Supervision.BOX, boxes))
            row.update({kind.value: int(n[here].sum()) for kind, n in kinds if n[here].any()})
        return out

    def _per_image(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the number of chosen annotations of each image of the file."""
        rows = self._index.annotations["image_row"][chosen]
        return np.bincount(rows, minlength=len(self._index.images))

    def _instance(self, row: Any, size: tuple[int, int]) -> Instance:
        """Return one annotation."""
        x, y, width, height = (float(row[name]) for name in ("x", "y", "width", "height"))
        label = self._labels[int(row["category_id"])]
        box = x, y, x + width, y + height
        if row["kind"] == BOX:
            return Instance(label, box, Supervision.BOX)
        if row["kind"] == RUNS:
            return Instance(label, box, Supervision.MASK, rle=self._rle(row, size))
        parts = (np.array(part, np.float64) for part in self._index.segmentation(row))
        whole = tuple(part for part in parts if len(part) >= _MIN_POLYGON)
        return Instance(label, box, Supervision.MASK, whole)

    def _rle(self, row: Any, size: tuple[int, int]) -> RLE:
        """Return the mask of an annotation."""
        where = f"`{self._index.path}`: annotation {row['id']}"
        return segmentation_to_rle(self._index.segmentation(row), *size, where)


def _trains(annotations: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which annotations something is learnt from: no crowds, none that enclose nothing."""
    return np.asarray(~annotations["crowd"] & (annotations["kind"] != HOLLOW))


def read_stills(
    json: Path, images: Path | None = None, on_error: OnError = STOP
) -> tuple[tuple[Category, ...], Stills]:
    """Open a COCO instances file; its index is kept where it is large (`coco_index`).

    Args:
        json: the file.
        images: folder that `file_name` is relative to; None looks beside the file and in the usual
            folders around it.
        on_error: what missing image files are: `STOP`, an error; `SKIP`, a warning, unless there
            are too many of them.

    Returns:
        The vocabulary by ascending id, and the images with annotations in the file's order.

    Raises:
        DataError: the file is malformed, image files are missing, or no annotation is left.
    """
    index = open_index(json, "training annotations")
    vocabulary = sorted_categories(index.categories)
    found = index.annotations
    hollow = int(np.count_nonzero(~found["crowd"] & (found["kind"] == HOLLOW)))
    if hollow:
        logger.warning(
            "`%s`: %d annotations without a polygon of three points left out", json, hollow
        )
    owners = np.bincount(found["image_row"][_trains(found)], minlength=len(index.images))
    stills = Stills(index, images or usual_root(json, index.names), np.flatnonzero(owners))
    if not stills:
        raise DataError(
            f"`{json}` holds no annotation to train on in its {len(owners)} images",
            "`pmvis map-categories` prints what it kept of each source",
        )
    if len(stills) < len(owners):
        logger.info("%s: %d images without annotations left out", json, len(owners) - len(stills))
    _check_files(stills, on_error)
    return vocabulary, stills


def read_picture(still: Still) -> NDArray[np.uint8]:
    """Return a still's (H, W, 3) RGB image.

    Raises:
        DataError: it cannot be read or has another size than the annotations say.
    """
    image = read_image(still.path, f"training image {still.id}")
    if image.shape[:2] != still.size:
        raise DataError(
            f"training image {still.id}: `{still.path}` is {image.shape[1]}x{image.shape[0]} "
            f"pixels, the annotations say {still.size[1]}x{still.size[0]}",
            "annotations and images do not belong together; check the images' folder",
        )
    return image


def sorted_categories(categories: Iterable[Category]) -> tuple[Category, ...]:
    """Return the vocabulary by ascending id, which is the order of the labels."""
    return tuple(sorted(categories, key=lambda category: category.id))


def _check_files(stills: Stills, on_error: OnError) -> None:
    """Check that all image files are there, listing each folder once."""
    names, root = stills.names, stills.root
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder not in listed:
            place = root / folder
            listed[folder] = set(os.listdir(place)) if place.is_dir() else set()
        if file not in listed[folder]:
            missing.append(name)
    if not missing:
        return
    told = (
        f"{len(missing)} of {len(names)} training images are missing, first `{root / missing[0]}`"
    )
    hint = f"the annotations name files relative to `{root}`; give their folder with `--images`"
    judge_missing(told, len(missing), len(names), on_error, hint)
