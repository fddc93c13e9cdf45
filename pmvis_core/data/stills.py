"""Annotated stills as training reads them: checked records of a COCO instances file.

`train_image.json` of `pmvis map-categories` is such a file: an annotation without `segmentation` is
a human box, an image's `source` says which data set it comes from. Labels are 0-based positions in
the vocabulary by ascending category id. Crowd annotations are kept apart, and images that have no
other annotation are dropped; polygons stay polygons, because they are rasterised after
augmentation.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmvis_core.errors import DataError
from pmvis_core.formats.coco import CocoAnnotation, read_coco, segmentation_to_rle
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


def read_stills(json: Path, root: Path) -> tuple[tuple[Category, ...], list[Still]]:
    """Read a COCO instances file.

    Args:
        json: the file.
        root: folder that `file_name` is relative to.

    Returns:
        The vocabulary by ascending id, and the images with annotations in the file's order.

    Raises:
        DataError: the file is malformed, image files are missing, or no annotation is left.
    """
    dataset = read_coco(json, "training annotations")
    vocabulary = sorted_categories(dataset.categories)
    sizes = {image.id: (image.height, image.width) for image in dataset.images}
    instances = _read_instances(json, dataset.annotations, sizes, vocabulary)
    crowds = _read_crowds(json, dataset.annotations, sizes)
    stills = [
        Still(
            image.id,
            root / image.file_name,
            sizes[image.id],
            image.source or UNNAMED_SOURCE,
            tuple(instances[image.id]),
            tuple(crowds.get(image.id, ())),
        )
        for image in dataset.images
        if image.id in instances
    ]
    if not stills:
        raise DataError(
            f"`{json}` holds no annotation to train on in its {len(sizes)} images",
            "`pmvis map-categories` prints what it kept of each source",
        )
    if len(stills) < len(sizes):
        logger.info("%s: %d images without annotations left out", json, len(sizes) - len(stills))
    _check_files(stills, root)
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


def _read_instances(
    json: Path,
    annotations: Sequence[CocoAnnotation],
    sizes: dict[int, tuple[int, int]],
    vocabulary: tuple[Category, ...],
) -> dict[int, list[Instance]]:
    """Return the instances by image id, without the images that have none."""
    labels = {category.id: label for label, category in enumerate(vocabulary)}
    instances: dict[int, list[Instance]] = {}
    degenerate = 0
    for row in annotations:
        if row.is_crowd:
            continue
        where = f"`{json}`: annotation {row.id}"
        instance = _read_instance(row, labels[row.category_id], sizes[row.image_id], where)
        if instance is None:
            degenerate += 1
        else:
            instances.setdefault(row.image_id, []).append(instance)
    if degenerate:
        logger.warning(
            "`%s`: %d annotations without a polygon of three points left out", json, degenerate
        )
    return instances


def _read_crowds(
    json: Path, annotations: Sequence[CocoAnnotation], sizes: dict[int, tuple[int, int]]
) -> dict[int, list[RLE]]:
    """Return the masks of crowd annotations by image id; those with a box only say nothing."""
    crowds: dict[int, list[RLE]] = {}
    for row in annotations:
        if row.is_crowd and row.segmentation is not None:
            where = f"`{json}`: annotation {row.id}"
            rle = segmentation_to_rle(row.segmentation, *sizes[row.image_id], where)
            crowds.setdefault(row.image_id, []).append(rle)
    return crowds


def _read_instance(
    row: CocoAnnotation, label: int, size: tuple[int, int], where: str
) -> Instance | None:
    """Return one annotation, or None if its polygons enclose nothing."""
    x, y, width, height = row.bbox
    box = float(x), float(y), float(x + width), float(y + height)
    if row.segmentation is None:
        return Instance(label, box, Supervision.BOX)
    if isinstance(row.segmentation, Sequence):
        polygons = tuple(_read_polygon(part, where) for part in row.segmentation)
        whole = tuple(part for part in polygons if len(part) >= _MIN_POLYGON)
        return Instance(label, box, Supervision.MASK, whole) if whole else None
    rle = segmentation_to_rle(row.segmentation, *size, where)
    return Instance(label, box, Supervision.MASK, rle=rle)


def _read_polygon(part: Sequence[float], where: str) -> NDArray[np.float64]:
    """Return a polygon as (2P,) numbers."""
    try:
        polygon = np.array(part, np.float64)
    except (TypeError, ValueError):
        polygon = np.zeros(1)
    if polygon.ndim != 1 or len(polygon) % 2 or not np.isfinite(polygon).all():
        raise DataError(f"{where}: a malformed polygon, expected numbers x, y, x, y, ...")
    return polygon


def _check_files(stills: Sequence[Still], root: Path) -> None:
    """Check that all image files are there, listing each folder once."""
    listed: dict[Path, set[str]] = {}
    missing = []
    for still in stills:
        folder = still.path.parent
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
        if still.path.name not in listed[folder]:
            missing.append(still.path)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(stills)} training images are missing, first `{missing[0]}`",
            f"the annotations name files relative to `{root}`; give their folder with `--images`",
        )
