"""ImageNet-bbox as it is published: a folder of Pascal VOC XML files, one a picture.

``<object><name>`` is a WordNet id (``n02510455``) or a plain name; ``<bndbox>`` holds 1-based pixel
indices, both ends inclusive. They become COCO boxes with an exclusive far edge:
``x = xmin - 1``, ``width = xmax - xmin + 1``, clipped to the picture (ImageNet has some zeros).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from pmvis_core.errors import DataError
from pmvis_core.formats.coco import CocoAnnotation, CocoDataset, CocoImage
from pmvis_core.types import Category

logger = logging.getLogger(__name__)

Corners = tuple[float, float, float, float]
"""``(xmin, ymin, xmax, ymax)``, 1-based, inclusive."""


@dataclass(frozen=True)
class VocPicture:
    """One XML file."""

    file_name: str
    """``<filename>`` as written; ImageNet leaves its suffix out."""
    folder: str
    """``<folder>``, empty where absent."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    objects: tuple[tuple[str, Corners], ...]
    """``(name, corners)`` of each object."""


def read_voc(folder: Path) -> CocoDataset:
    """Read every ``*.xml`` under a folder, in the order of their paths.

    The categories are the names that occur, sorted and numbered from 1. A picture's ``file_name``
    is ``n01/n01_7`` for ``n01/n01_7.xml`` that states ``<filename>n01_7``; an XML that lies in
    ``folder`` itself takes the folder that it states.

    Raises:
        DataError: there is no XML, or one is malformed; the message names the file.
    """
    paths = xml_files(folder)
    pictures = [(path, parse_voc(path)) for path in paths]
    names = sorted({name for _, picture in pictures for name, _ in picture.objects})
    ids = {name: number for number, name in enumerate(names, start=1)}
    images: list[CocoImage] = []
    annotations: list[CocoAnnotation] = []
    empty = 0
    for number, (path, picture) in enumerate(pictures, start=1):
        below = path.parent.relative_to(folder)
        place = (below if below.parts else Path(picture.folder)) / picture.file_name
        images.append(CocoImage(number, place.as_posix(), picture.height, picture.width))
        for name, corners in picture.objects:
            bbox = corners_to_bbox(corners, picture.height, picture.width)
            if bbox is None:
                empty += 1
                continue
            annotations.append(
                CocoAnnotation(len(annotations) + 1, number, ids[name], bbox, bbox[2] * bbox[3])
            )
    if empty:
        logger.warning("%s: %d boxes without area, dropped", folder, empty)
    categories = tuple(Category(number, name) for name, number in ids.items())
    return CocoDataset(categories, tuple(images), tuple(annotations))


def xml_files(folder: Path) -> list[Path]:
    """Return the XML files under a folder, sorted by path.

    Raises:
        DataError: there is none.
    """
    paths = sorted(folder.rglob("*.xml"), key=lambda path: path.relative_to(folder).as_posix())
    if not paths:
        raise DataError(
            f"`{folder}` holds no `*.xml`",
            "give the folder of ImageNet-bbox annotations, or a COCO-style JSON",
        )
    return paths


def parse_voc(path: Path) -> VocPicture:
    """Parse one annotation file.

    A document type declaration is refused: an annotation needs none, and entities that expand
    without end hide there.

    Raises:
        DataError: not XML, or a field is missing or no number; the message names the file.
    """
    parser = ElementTree.XMLParser(target=_NoDoctype(str(path)))
    try:
        root = ElementTree.fromstring(path.read_bytes(), parser=parser)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"`{path}` is not valid XML: {error}", "download it again") from error
    return VocPicture(
        file_name=_text(root, "filename", path),
        folder=root.findtext("folder", "").strip(),
        height=int(_number(root, "size/height", path, least=1)),
        width=int(_number(root, "size/width", path, least=1)),
        objects=tuple(_objects(root, path)),
    )


def corners_to_bbox(
    corners: Corners, height: int, width: int
) -> tuple[float, float, float, float] | None:
    """Turn 1-based inclusive corners into COCO's ``(x, y, width, height)``.

    Returns:
        The box clipped to the picture, or None if nothing of it is left.
    """
    left, top = max(corners[0] - 1, 0.0), max(corners[1] - 1, 0.0)
    right, bottom = min(corners[2], float(width)), min(corners[3], float(height))
    if right <= left or bottom <= top:
        return None
    return (left, top, right - left, bottom - top)


class _NoDoctype(ElementTree.TreeBuilder):
    """A tree builder that refuses a document type declaration."""

    def __init__(self, where: str) -> None:
        """Keep the file's name for the message."""
        super().__init__()
        self._where = where

    def doctype(self, name: str, pubid: str, system: str) -> None:
        """Refuse.

        Raises:
            DataError: always.
        """
        raise DataError(f"`{self._where}` declares a document type, which no annotation needs")


def _objects(root: ElementTree.Element, path: Path) -> Iterator[tuple[str, Corners]]:
    """Yield name and corners of each object."""
    for entry in root.iter("object"):
        edges = [_number(entry, f"bndbox/{key}", path) for key in ("xmin", "ymin", "xmax", "ymax")]
        yield _text(entry, "name", path), (edges[0], edges[1], edges[2], edges[3])


def _text(entry: ElementTree.Element, key: str, path: Path) -> str:
    """Return the text of a field that must be there."""
    value = entry.findtext(key, "").strip()
    if not value:
        raise DataError(f"`{path}`: <{entry.tag}> has no <{key}>")
    return value


def _number(entry: ElementTree.Element, key: str, path: Path, least: float = -math.inf) -> float:
    """Return a field that must be a finite number, not below ``least``."""
    text = _text(entry, key, path)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < least:
        raise DataError(f"`{path}`: <{key}> is `{text}`, expected a number")
    return value
