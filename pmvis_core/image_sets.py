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
from pmvis_core.files import digest_bytes
from pmvis_core.formats.coco import CocoAnnotation, CocoDataset, CocoImage
from pmvis_core.formats.coco_index import as_dataset, open_index
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
        index = open_index(path, f"{kind} annotations")
        dataset, digest = as_dataset(index), index.digest
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
        shown = _ShownFrom(folder)
        for image in sorted(source.dataset.images, key=lambda image: image.id):
            if image.id not in rows:
                continue
            place = root.find(image.file_name)
            if place is None:
                missing.append(image.file_name)
                continue
            number = len(images) + 1
            images.append(replace(image, id=number, file_name=shown(place), source=source.kind))
            hidden += image.id in source.hidden
            for row, target_id in rows[image.id]:
                annotations.append(_renumbered(row, len(annotations) + 1, number, target_id))
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


def find_root(source: ImageSource, names: Sequence[str]) -> ImageFolder:
    """Return the first of a source's roots in which pictures are found.

    Raises:
        DataError: not one of the first pictures lies in any of them.
    """
    if not names:
        return ImageFolder(source.roots[0])
    for root in map(ImageFolder, source.roots):
        if any(root.find(name) is not None for name in names[:PROBES]):
            return root
    option = "--coco-images" if source.kind == COCO else "--imagenet-images"
    raise DataError(
        f"no picture of `{source.path}` was found (`{names[0]}`, …; looked in "
        f"{', '.join(f'`{root}`' for root in source.roots)})",
        f"give their folder with `{option}`",
    )


def usual_root(json: Path, names: Sequence[str]) -> Path:
    """Return the folder around an annotation file in which its first pictures lie.

    Args:
        json: the file.
        names: of its pictures.

    Returns:
        The file's own folder if they lie in none of the usual ones.
    """
    for root in _usual_roots(json):
        if any((root / name).is_file() for name in names[:PROBES]):
            return root
    return json.parent


class ImageFolder:
    """A root of pictures; each folder below it is listed once, which is quick on any disk."""

    def __init__(self, root: Path) -> None:
        """Keep the root; nothing is listed yet."""
        self.root = str(root)
        self._listed: dict[str, frozenset[str]] = {}

    def find(self, name: str) -> str | None:
        """Return a picture's path, or None.

        Tried are the name itself, the name without its folders, and both with the usual suffixes
        if it has none.
        """
        known = os.path.splitext(name)[1].lower() in {".jpg", ".jpeg", ".png"}
        for place in dict.fromkeys((name, name.rpartition("/")[2])):
            folder, _, file = place.rpartition("/")
            for suffix in SUFFIXES[:1] if known else SUFFIXES:
                if file + suffix in self._names(folder):
                    return os.path.join(self.root, place + suffix)
        return None

    def _names(self, folder: str) -> frozenset[str]:
        """Return the names of the files of a folder below the root."""
        if folder not in self._listed:
            try:
                with os.scandir(os.path.join(self.root, folder)) as entries:
                    names = frozenset(entry.name for entry in entries if entry.is_file())
            except OSError:
                names = frozenset()
            self._listed[folder] = names
        return self._listed[folder]


class _ShownFrom:
    """Turns paths into ones relative to a folder; each folder of pictures is worked out once."""

    def __init__(self, folder: Path) -> None:
        """Keep the folder that paths become relative to."""
        self._folder = os.path.realpath(folder)
        self._known: dict[str, str] = {}

    def __call__(self, path: str) -> str:
        """Return the path relative to the folder, with slashes."""
        folder, name = os.path.split(os.path.abspath(path))
        if folder not in self._known:
            self._known[folder] = Path(os.path.relpath(folder, self._folder)).as_posix()
        known = self._known[folder]
        return name if known == "." else f"{known}/{name}"


def _box_only(row: CocoAnnotation) -> CocoAnnotation:
    """Return an annotation of which only the box is known."""
    return replace(row, segmentation=None, area=row.bbox[2] * row.bbox[3])


def _renumbered(row: CocoAnnotation, number: int, image_id: int, target: int) -> CocoAnnotation:
    """Return an annotation under new ids."""
    return CocoAnnotation(
        number, image_id, target, row.bbox, row.area, row.segmentation, row.is_crowd
    )


def _rows_by_image(
    source: ImageSource, matched: SourceMap
) -> dict[int, list[tuple[CocoAnnotation, int]]]:
    """Return the usable annotations of each picture that has any, with the target's ids."""
    rows: dict[int, list[tuple[CocoAnnotation, int]]] = {}
    empty = 0
    for row in sorted(source.dataset.annotations, key=lambda row: row.id):
        target_id = matched.target_ids.get(row.category_id)
        if target_id is None or row.is_crowd:
            continue
        if row.bbox[2] <= 0 or row.bbox[3] <= 0:
            empty += 1
            continue
        rows.setdefault(row.image_id, []).append((row, target_id))
    if empty:
        logger.warning("%s: %d boxes without area, dropped", source.path, empty)
    return rows


def _usual_roots(path: Path) -> Iterator[Path]:
    """Yield the folders in which the pictures of an annotation file or folder usually lie."""
    folder = path if path.is_dir() else path.parent
    stem = path.stem.removeprefix("instances_")
    yield folder
    if folder is path and "Annotations" in folder.parts:  # ImageNet: `Data/CLS-LOC/train`
        parts = ("Data" if part == "Annotations" else part for part in folder.parts)
        yield Path(*parts)
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
