"""One training file out of several still-image data sets: remap, find the pictures, renumber.

What `map-categories` does after the vocabularies are matched: annotations of unmapped categories
and crowds go, pictures that are missing or left empty go, ids are given anew in the order of the
sources and of their own ids, and ``file_name`` becomes relative to the file that will be written.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pmvis_core.categories import COCO, SourceMap, Target, Unmatched, match_source
from pmvis_core.errors import DataError
from pmvis_core.files import digest_bytes, digest_file
from pmvis_core.formats.coco import CocoAnnotation, CocoDataset, CocoImage, read_coco
from pmvis_core.formats.voc import read_voc, xml_files

logger = logging.getLogger(__name__)

USUAL_FOLDERS = ("images", "train2017", "train", "JPEGImages", "Data", "val2017", "val")
"""Names under which pictures lie beside their annotations."""

SUFFIXES = ("", ".JPEG", ".jpg", ".jpeg", ".png", ".JPG")
"""Tried in turn where a file name has none, as in ImageNet's XML."""

PROBES = 50
"""Pictures looked for before a folder is given up as the root."""


@dataclass(frozen=True)
class ImageSource:
    """A data set as it was read, before anything is mapped."""

    kind: str
    """`categories.COCO` or `categories.IMAGENET`."""
    path: Path
    """The JSON, or the folder of XML."""
    dataset: CocoDataset
    """With the source's own ids."""
    digest: str
    """Of the annotations' content."""
    roots: tuple[Path, ...]
    """Folders in which the pictures may lie, the likeliest first."""
    hidden: frozenset[int] = frozenset()
    """Ids of the pictures whose masks were hidden."""


@dataclass(frozen=True)
class SourceReport:
    """What one source gave: a line of the paper's Table I, and what was left out."""

    source: ImageSource
    categories: SourceMap
    images: int
    """Pictures in the training file."""
    annotations: int
    """Instances in the training file."""
    missing: tuple[str, ...]
    """Pictures with mapped annotations that are in no folder."""
    reached: frozenset[int]
    """Target ids that have at least one annotation."""
    hidden: int
    """Pictures in the training file whose masks were hidden."""

    def as_json(self) -> dict[str, Any]:
        """Return what ``categories.json`` says of this source; no absolute paths."""
        names = {category.id: category.name for category in self.source.dataset.categories}
        mapped = self.categories.target_ids
        return {
            "file": self.source.path.name,
            "digest": self.source.digest,
            "classes": self.categories.classes,
            "targets": self.categories.targets,
            "images": self.images,
            "annotations": self.annotations,
            "map": [
                {"id": key, "name": names[key], "target_id": mapped[key]} for key in sorted(mapped)
            ],
            "unmatched": [_unmatched_as_json(entry) for entry in self.categories.unmatched],
            "many_to_one": {key: list(v) for key, v in self.categories.many_to_one.items()},
            "missing_images": len(self.missing),
            "hidden_mask_images": self.hidden,
        }


def read_source(kind: str, path: Path, images: Path | None = None) -> ImageSource:
    """Read a source's annotations.

    Args:
        kind: `categories.COCO` or `categories.IMAGENET`. The latter gives boxes only: masks that
            its JSON may hold are left out.
        path: a COCO-style JSON, or a folder of VOC XML.
        images: the pictures' root; by default the usual places beside the annotations.

    Raises:
        DataError: the annotations are missing or malformed.
    """
    if path.is_dir():
        dataset, digest = read_voc(path), _digest_folder(path)
    else:
        dataset = read_coco(path, f"{kind} annotations")
        digest = digest_file(path)
    if kind != COCO:
        dataset = replace(dataset, annotations=tuple(map(_box_only, dataset.annotations)))
    roots = (images,) if images is not None else tuple(_usual_roots(path))
    return ImageSource(kind, path, dataset, digest, roots)


def in_vocabulary(dataset: CocoDataset, target: Target) -> CocoDataset:
    """Return a COCO data set in a target vocabulary, with all its pictures and their old ids.

    Annotations of unmapped categories go; crowds and pictures without annotations stay, as an
    evaluation needs them.
    """
    ids = match_source(target, COCO, dataset.categories).target_ids
    if not ids:
        logger.warning("not one category of the pictures is in the vocabulary `%s`", target.name)
    rows = tuple(
        replace(row, category_id=ids[row.category_id])
        for row in dataset.annotations
        if row.category_id in ids
    )
    return CocoDataset(target.categories, dataset.images, rows)


def hide_masks(source: ImageSource, every: int) -> ImageSource:
    """Return a source of which some pictures are box-only.

    Args:
        source: with masks.
        every: of the pictures by ascending id, those at places N, 2N, … lose their masks.
    """
    ids = sorted(image.id for image in source.dataset.images)
    hidden = frozenset(ids[every - 1 :: every])
    rows = tuple(
        _box_only(row) if row.image_id in hidden else row for row in source.dataset.annotations
    )
    return replace(source, dataset=replace(source.dataset, annotations=rows), hidden=hidden)


def merge_sources(
    target: Target, sources: Sequence[ImageSource], folder: Path, *, by_name: bool = False
) -> tuple[CocoDataset, list[SourceReport]]:
    """Make one data set in the target vocabulary.

    Args:
        target: the vocabulary.
        sources: what to merge, in this order.
        folder: where the training file will lie; file names become relative to it.
        by_name: see `categories.match_source`.

    Returns:
        The data set, ids 1..n, and a report for each source.

    Raises:
        DataError: none of a source's pictures can be found.
    """
    images: list[CocoImage] = []
    annotations: list[CocoAnnotation] = []
    reports = []
    for source in sources:
        matched = match_source(target, source.kind, source.dataset.categories, by_name=by_name)
        rows = _rows_by_image(source, matched)
        root = find_root(source, [i.file_name for i in source.dataset.images if i.id in rows])
        before = len(images), len(annotations)
        missing = []
        hidden = 0
        for image in sorted(source.dataset.images, key=lambda image: image.id):
            if image.id not in rows:
                continue
            place = find_image(root, image.file_name)
            if place is None:
                missing.append(image.file_name)
                continue
            number = len(images) + 1
            name = Path(os.path.relpath(os.path.abspath(place), os.path.realpath(folder)))
            images.append(replace(image, id=number, file_name=name.as_posix(), source=source.kind))
            hidden += image.id in source.hidden
            for row in rows[image.id]:
                annotations.append(replace(row, id=len(annotations) + 1, image_id=number))
        added = annotations[before[1] :]
        reports.append(
            SourceReport(
                source=source,
                categories=matched,
                images=len(images) - before[0],
                annotations=len(added),
                missing=tuple(missing),
                reached=frozenset(row.category_id for row in added),
                hidden=hidden,
            )
        )
    return CocoDataset(target.categories, tuple(images), tuple(annotations)), reports


def find_root(source: ImageSource, names: Sequence[str]) -> Path:
    """Return the first of a source's roots in which pictures are found.

    Raises:
        DataError: not one of the first pictures lies in any of them.
    """
    if not names:
        return source.roots[0]
    for root in source.roots:
        if any(find_image(root, name) is not None for name in names[:PROBES]):
            return root
    option = "--coco-images" if source.kind == COCO else "--imagenet-images"
    raise DataError(
        f"no picture of `{source.path}` was found (`{names[0]}`, …; looked in "
        f"{', '.join(f'`{root}`' for root in source.roots)})",
        f"give their folder with `{option}`",
    )


def find_image(root: Path, name: str) -> Path | None:
    """Return a picture's path under ``root``, or None.

    Tried are the name itself, the name without its folders, and both with the usual suffixes if
    it has none.
    """
    suffixes = SUFFIXES[:1] if Path(name).suffix.lower() in {".jpg", ".jpeg", ".png"} else SUFFIXES
    for place in dict.fromkeys((name, name.rpartition("/")[2])):
        for suffix in suffixes:
            path = os.path.join(root, place + suffix)
            if os.path.isfile(path):
                return Path(path)
    return None


def _box_only(row: CocoAnnotation) -> CocoAnnotation:
    """Return an annotation of which only the box is known."""
    return replace(row, segmentation=None, area=row.bbox[2] * row.bbox[3])


def _rows_by_image(source: ImageSource, matched: SourceMap) -> dict[int, list[CocoAnnotation]]:
    """Return the usable annotations of each picture that has any, in the target's ids."""
    rows: dict[int, list[CocoAnnotation]] = {}
    empty = 0
    for row in sorted(source.dataset.annotations, key=lambda row: row.id):
        target_id = matched.target_ids.get(row.category_id)
        if target_id is None or row.is_crowd:
            continue
        if row.bbox[2] <= 0 or row.bbox[3] <= 0:
            empty += 1
            continue
        rows.setdefault(row.image_id, []).append(replace(row, category_id=target_id))
    if empty:
        logger.warning("%s: %d boxes without area, dropped", source.path, empty)
    return rows


def _usual_roots(path: Path) -> Iterator[Path]:
    """Yield the folders in which the pictures of an annotation file or folder usually lie."""
    folder = path if path.is_dir() else path.parent
    stem = path.stem.removeprefix("instances_")
    yield folder
    for base in (folder, folder.parent):
        yield from _folders(base, (stem, *USUAL_FOLDERS))
    yield folder.parent


def _folders(base: Path, names: Iterable[str]) -> Iterator[Path]:
    """Yield the folders of these names that exist, each with its own ``images`` and splits."""
    for name in dict.fromkeys(names):
        if (base / name).is_dir():
            yield base / name
            yield from (p for n in USUAL_FOLDERS if (p := base / name / n).is_dir())


def _digest_folder(folder: Path) -> str:
    """Return the digest of a folder's annotations: their places and contents."""
    whole = hashlib.sha256()
    for path in xml_files(folder):
        place = path.relative_to(folder).as_posix()
        whole.update(f"{place} {digest_bytes(path.read_bytes())}\n".encode())
    return whole.hexdigest()[:16]


def _unmatched_as_json(entry: Unmatched) -> dict[str, Any]:
    """Return an unmatched category for ``categories.json``."""
    row: dict[str, Any] = {"id": entry.category.id, "name": entry.category.name}
    if entry.suggestions:
        row["suggestions"] = list(entry.suggestions)
    return row
