"""One annotation of YouTube-VIS JSON: read with care, and as a track of its video.

An annotation need not fit its video: its masks may be too few or of another size, its score any
number. `evaluate` judges such things as the official code does; `as_track` refuses them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pmvis_core import masks
from pmvis_core.errors import DataError
from pmvis_core.types import RLE, Supervision, Track, VideoInfo

BLOCK = "pmvis"
"""Key under which annotations and `info` carry what only pmvis knows; other readers ignore it."""

_OWN_KEYS = frozenset(
    "id video_id category_id score iscrowd segmentations areas height width length".split()
)
_BLOCK_TYPES: tuple[tuple[str, type], ...] = (
    ("track_id", int),
    ("instance", int),
    ("keyframe", int),
    ("quality", float),
    ("supervision", str),
    ("frame_scores", list),
    ("lineage", dict),
)


@dataclass(frozen=True)
class Annotation:
    """One track as YouTube-VIS JSON holds it: not bound to fit its video, unlike `types.Track`."""

    id: int
    """As in the file; of predictions, the place in the list from 1."""
    video_id: int
    """Of the video."""
    category_id: int
    """Of the file's categories."""
    rles: tuple[RLE | None, ...]
    """One mask a frame; None where absent. Length and mask sizes are those of the file."""
    mask_areas: tuple[int | None, ...]
    """Pixels of each mask; None where absent."""
    score: float | None = None
    """Of predictions and pseudo labels."""
    iscrowd: bool = False
    """Neither counted as an object nor as a fault where it is found."""
    areas: tuple[float | None, ...] | None = None
    """Areas as annotated, which need not be those of the masks."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """All other keys: ``bboxes``, ``occlusion`` and what else the file holds."""
    converted: bool = False
    """Whether a mask was not given as compressed RLE."""


def parse_annotation(
    entry: Mapping[str, Any], videos: Mapping[int, VideoInfo], where: str
) -> Annotation:
    """Parse an annotation or a result.

    Args:
        entry: the object of the file.
        videos: those that the file lists, by id; polygons are rasterised at their size. Masks of
            an annotation of any other video are left out.
        where: how messages call the annotation.

    Raises:
        DataError: it is malformed; the message opens with ``where`` and names the frame.
    """
    video_id = whole(entry, "video_id", where)
    video = videos.get(video_id)
    score = entry.get("score")
    if score is not None and not is_number(score):
        raise DataError(f"{where} has score {score!r}, expected a finite number")
    areas = entry.get("areas")
    if areas is not None and not (
        isinstance(areas, list) and all(a is None or is_number(a) for a in areas)
    ):
        raise DataError(f"{where}: `areas` is no list of numbers and nulls")
    _check_block(entry.get(BLOCK, {}), where)
    found = ((), (), False) if video is None else _masks(entry, video, where)
    return Annotation(
        id=whole(entry, "id", where),
        video_id=video_id,
        category_id=whole(entry, "category_id", where),
        rles=found[0],
        mask_areas=found[1],
        score=None if score is None else float(score),
        iscrowd=bool(entry.get("iscrowd", 0)),
        areas=None if areas is None else tuple(areas),
        extra={key: value for key, value in entry.items() if key not in _OWN_KEYS},
        converted=found[2],
    )


def as_track(row: Annotation, video: VideoInfo, where: str) -> Track:
    """Return an annotation as a track of its video.

    A frame whose mask is empty is a frame without the object, unless pmvis wrote it. Keys that
    the masks do not imply are kept under ``lineage["ytvis"]``.

    Raises:
        DataError: a mask has another size than the video; the message opens with ``where``.
    """
    block = row.extra.get(BLOCK, {})
    score = 1.0 if row.score is None else row.score
    stated = block.get("frame_scores")
    rles = tuple(
        rle if area or (rle and stated and t < len(stated) and stated[t] is not None) else None
        for t, (rle, area) in enumerate(zip(row.rles, row.mask_areas, strict=True))
    )
    for frame, rle in enumerate(rles):
        if rle is not None and rle["size"] != [video.height, video.width]:
            raise DataError(
                f"{where}, frame {frame}: the mask is {rle['size'][0]}x{rle['size'][1]}, the "
                f"video {video.height}x{video.width}",
                "resize the masks to the video",
            )
    usual = tuple(None if rle is None else score for rle in rles)
    implied = Supervision.MASK if row.score is None else Supervision.PSEUDO
    lineage = dict(block.get("lineage", {}))
    if kept := _not_implied(row, rles):
        lineage["ytvis"] = kept
    return Track(
        id=block.get("track_id", row.id),
        category_id=row.category_id,
        score=score,
        frame_scores=usual if stated is None else tuple(stated),
        rles=rles,
        instance=block.get("instance"),
        keyframe=block.get("keyframe"),
        quality=block.get("quality"),
        supervision=Supervision(block.get("supervision", implied)),
        lineage=lineage,
    )


def frame_mask(value: Any, video: VideoInfo) -> RLE | None:
    """Return the mask of a frame from any of its three forms; null, ``[]``, ``{}`` are none.

    Raises:
        DataError: it has none of the forms.
    """
    if value is None or value in ([], {}):
        return None
    if isinstance(value, list):
        if not all(isinstance(part, list) and all(map(is_number, part)) for part in value):
            raise DataError("a polygon is no list of finite numbers")
        return masks.from_polygons(value, video.height, video.width)
    size = value.get("size") if isinstance(value, dict) else None
    if not isinstance(size, list) or len(size) != 2 or "counts" not in value:
        raise DataError("the mask is neither RLE (`size`, `counts`) nor a list of polygons")
    if isinstance(value["counts"], list):
        return masks.from_uncompressed(value["counts"], size[0], size[1])
    return RLE(size=size, counts=value["counts"])


def boxes_xywh(rles: Sequence[RLE | None]) -> list[list[float] | None]:
    """Return ``[x, y, width, height]`` in pixels of each frame, None for no or an empty mask."""
    boxes = ((0.0, 0.0, 0.0, 0.0) if box is None else box for box in masks.track_boxes(rles))
    return [[x1, y1, x2 - x1, y2 - y1] if x2 > x1 else None for x1, y1, x2, y2 in boxes]


def as_object(value: Any, where: str) -> dict[str, Any]:
    """Return a JSON object, checked."""
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, expected an object")
    return value


def whole(entry: Mapping[str, Any], key: str, where: str) -> int:
    """Return a whole number, checked."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        if isinstance(value, float) and value.is_integer():
            return int(value)
        found = "no" if key not in entry else f"{value!r} for"
        raise DataError(f"{where} has {found} `{key}`, expected a whole number")
    return value


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number that a double can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _check_block(block: Any, where: str) -> None:
    """Check what stands under `BLOCK`.

    Raises:
        DataError: it is not what `ytvis_writer` writes.
    """
    if not isinstance(block, dict):
        raise DataError(f"{where}: `{BLOCK}` is no object")
    for key, kind in _BLOCK_TYPES:
        if key in block and type(block[key]) is not kind:
            raise DataError(f"{where}: `{BLOCK}.{key}` is {block[key]!r}, not as pmvis writes it")
    stated = block.get("supervision", Supervision.MASK.value)
    if stated not in [kind.value for kind in Supervision]:
        raise DataError(f"{where}: supervision is `{stated}`, unknown to this pmvis")


def _masks(
    entry: Mapping[str, Any], video: VideoInfo, where: str
) -> tuple[tuple[RLE | None, ...], tuple[int | None, ...], bool]:
    """Return masks and areas of the frames, and whether one was no compressed RLE."""
    segmentations = entry.get("segmentations")
    if not isinstance(segmentations, list):
        raise DataError(
            f"{where} has no `segmentations`, expected a list with a mask or null for each frame"
        )
    rles: list[RLE | None] = []
    converted = False
    for frame, value in enumerate(segmentations):
        try:
            rle = frame_mask(value, video)
            rles.append(rle)
        except DataError as error:
            raise DataError(f"{where}, frame {frame}: {error.message}", error.hint) from error
        converted |= rle is not None and not (
            isinstance(value, dict) and isinstance(value["counts"], str)
        )
    return tuple(rles), masks.track_areas(rles, where), converted


def _not_implied(row: Annotation, rles: Sequence[RLE | None]) -> dict[str, Any]:
    """Return the keys of an annotation that its masks do not tell already."""
    kept = {key: value for key, value in row.extra.items() if key not in (BLOCK, "bboxes")}
    if "bboxes" in row.extra and row.extra["bboxes"] != boxes_xywh(rles):
        kept["bboxes"] = row.extra["bboxes"]
    areas = [a if r is not None else None for a, r in zip(row.mask_areas, rles, strict=True)]
    if row.areas is not None and list(row.areas) != areas:
        kept["areas"] = list(row.areas)
    return kept
