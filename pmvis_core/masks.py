"""Masks as COCO run-length encodings: everything outside the network handles masks through here.

An `RLE` is ``{"size": [height, width], "counts": text}``; ``counts`` may be bytes on input (as
pycocotools writes it) and is always text on output, fit for JSON. The texts equal pycocotools' byte
for byte, but nothing here reads out of bounds, loops for ever or guesses: a text whose runs do not
cover the mask exactly is a `DataError`.

    rle = encode(image > 0)
    area(rle), to_box(rle), decode(rle).shape, iou([rle], [rle])

``_masks.so`` (see `native`) answers whatever is usual in one call. Its twin in numpy, `rle_numpy`,
answers the rest, words every error and stands in where the library is absent. Batches (`areas`,
`to_boxes`, `track_areas`, `validate_track`, ...) cost a fraction of as many single calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pmvis_core import native, rle_numpy
from pmvis_core.errors import DataError
from pmvis_core.types import RLE, Box

MaskTrack = Sequence[RLE | None]
"""Masks of one object, a frame each; None where it is absent."""

Number = TypeVar("Number")

_MIN_POLYGON = 6
_BYTES = (np.dtype(np.uint8), np.dtype(np.bool_))
_COMPILED = native.mask_library()


def encode(mask: ArrayLike) -> RLE:
    """Encode one mask.

    Args:
        mask: (H, W) bool or uint8; whatever is not 0 is foreground, so 0/1 and 0/255 masks give the
            same (pycocotools starts a run wherever two bytes differ). Rows or columns may lie one
            after the other (C or Fortran order) at no cost; other layouts are copied.

    Raises:
        DataError: the array is no such mask.
    """
    if _COMPILED is not None and isinstance(found := _COMPILED.encode(mask), dict):
        return found  # type: ignore[return-value]
    pixels = np.asarray(mask)
    if pixels.ndim != 2:
        raise DataError(f"a mask has shape {pixels.shape}, expected (height, width)")
    return encode_many(pixels[None])[0]


def encode_many(masks: ArrayLike) -> list[RLE]:
    """Encode (N, H, W) bool or uint8 masks; see `encode`.

    The (H, W, N) stacks in Fortran order that pycocotools takes are ``stack.transpose(2, 0, 1)``
    here, which copies nothing.

    Raises:
        DataError: the array is no such stack.
    """
    if _COMPILED is not None and isinstance(found := _COMPILED.encode(masks), list):
        return found
    pixels = np.asarray(masks)
    if pixels.ndim != 3:
        raise DataError(f"masks have shape {pixels.shape}, expected (number, height, width)")
    if pixels.dtype == np.bool_:
        pixels = pixels.view(np.uint8)
    if pixels.dtype != np.uint8:
        raise DataError(f"masks have type {pixels.dtype}, expected bool or uint8")
    _, height, width = pixels.shape
    _check_pixels(height, width)
    if _COMPILED is not None and (found := _COMPILED.encode(np.ascontiguousarray(pixels))):
        return list(found)
    return [_rle(text, height, width) for text in rle_numpy.encode(pixels)]


def decode(
    rle: RLE, out: NDArray[Any] | None = None, box: Sequence[float] | None = None
) -> NDArray[np.uint8]:
    """Return the (H, W) uint8 mask in C order, foreground 1.

    Args:
        rle: the mask.
        out: where to write it, and what is returned: uint8 or bool, of that shape, in C order.
            Undefined if the RLE is malformed.
        box: whole ``(x1, y1, x2, y2)`` inside the frame, as `to_box` gives it: only this part is
            decoded, to (y2 - y1, x2 - x1).

    Raises:
        DataError: the RLE is malformed, or ``out`` or ``box`` do not fit.
    """
    stack = decode_many((rle,), None if out is None else out[None], box)
    return stack.reshape(stack.shape[1:]) if out is None else out


def decode_many(
    rles: Sequence[RLE], out: NDArray[Any] | None = None, box: Sequence[float] | None = None
) -> NDArray[np.uint8]:
    """Return the (N, H, W) uint8 masks in C order; all of one size. See `decode`.

    Raises:
        DataError: an RLE is malformed, sizes differ, there is none, or ``out`` or ``box`` do not
            fit.
    """
    if not rles:
        raise DataError("no mask is given, expected at least one")
    height, width = _size(rles[0])
    x1, y1, x2, y2 = (0, 0, width, height) if box is None else _whole_box(box, height, width)
    shape = (len(rles), y2 - y1, x2 - x1)
    if out is None:
        out = np.empty(shape, dtype=np.uint8)
    elif out.shape != shape or out.dtype not in _BYTES or not out.flags.c_contiguous:
        raise DataError(
            f"`out` is {out.dtype} of shape {out.shape}, expected uint8 or bool of shape {shape} "
            "in C order (the first number is that of the masks)"
        )
    if _COMPILED is None or not _COMPILED.decode(rles, out, height, width, x1, y1, x2, y2):
        _common_size(rles)
        for mask, rle in zip(out, rles, strict=True):
            mask[:] = rle_numpy.decode(_counts(rle), height, width)[y1:y2, x1:x2]
    return out


def area(rle: RLE) -> int:
    """Return the number of foreground pixels.

    Raises:
        DataError: the RLE is malformed.
    """
    if _COMPILED is not None and (found := _COMPILED.area(rle)) is not None:
        return found
    return rle_numpy.area(_counts(rle), *_size(rle))


def areas(rles: Sequence[RLE]) -> NDArray[np.int64]:
    """Return the (N,) foreground pixels of masks, whose sizes may differ; see `area`."""
    return np.array(_of_all(rles, track_areas), dtype=np.int64)


def track_areas(rles: MaskTrack, where: str | None = None) -> tuple[int | None, ...]:
    """Return the (T,) foreground pixels of a track, None where it is absent.

    Args:
        rles: the masks.
        where: how a message calls the track; it adds the frame. None: it names neither.

    Raises:
        DataError: an RLE is malformed.
    """
    if _COMPILED is not None and (found := _COMPILED.areas(rles)) is not None:
        return tuple(found)
    return _frame_by_frame(area, rles, where)


def to_box(rle: RLE) -> Box:
    """Return the xyxy box in pixels, far edge exclusive; zeros if the mask is empty.

    Raises:
        DataError: the RLE is malformed.
    """
    if _COMPILED is not None and (found := _COMPILED.box(rle)) is not None:
        return found
    return rle_numpy.box(_counts(rle), *_size(rle))


def to_boxes(rles: Sequence[RLE]) -> NDArray[np.float64]:
    """Return the (N, 4) xyxy boxes of masks, whose sizes may differ; see `to_box`."""
    return np.array(_of_all(rles, track_boxes), dtype=np.float64).reshape(-1, 4)


def track_boxes(rles: MaskTrack, where: str | None = None) -> tuple[Box | None, ...]:
    """Return the (T,) xyxy boxes of a track, None where it is absent; see `track_areas`."""
    if _COMPILED is not None and (found := _COMPILED.boxes(rles)) is not None:
        return tuple(found)
    return _frame_by_frame(to_box, rles, where)


def merge(rles: Sequence[RLE], intersect: bool = False) -> RLE:
    """Return the union of N >= 1 masks, or their intersection.

    Raises:
        DataError: an RLE is malformed, sizes differ, or there is none.
    """
    if _COMPILED is not None and (found := _COMPILED.merge(rles, intersect)) is not None:
        return found
    height, width = _common_size(rles)
    texts = [_counts(rle) for rle in rles]
    return _rle(rle_numpy.merge(texts, height, width, intersect), height, width)


def iou(
    dts: Sequence[RLE], gts: Sequence[RLE], iscrowd: Sequence[bool | int] | None = None
) -> NDArray[np.float64]:
    """Return the (D, G) float64 intersections over union.

    Args:
        dts: detections.
        gts: ground truths.
        iscrowd: (G,) ground truths that stand for many objects: the divisor is then the area of
            the detection alone.

    Raises:
        DataError: an RLE is malformed, or sizes differ.
    """
    out = np.zeros((len(dts), len(gts)))
    crowd = None if iscrowd is None else bytes(map(bool, iscrowd))
    if crowd is not None and len(crowd) != len(gts):
        raise DataError(f"`iscrowd` has {len(crowd)} entries, expected {len(gts)}")
    if not out.size or (_COMPILED is not None and _COMPILED.iou(dts, gts, crowd, out)):
        return out
    size = _common_size([*dts, *gts])
    first, second = ([_counts(rle) for rle in rles] for rles in (dts, gts))
    inter = rle_numpy.intersections(first, second, *size)
    area_dt, area_gt = (
        [rle_numpy.area(text, *size) for text in texts] for texts in (first, second)
    )
    union = np.add.outer(area_dt, area_gt) - inter
    if crowd is not None:
        union = np.where(np.frombuffer(crowd, dtype=bool), np.array(area_dt)[:, None], union)
    return np.divide(inter, union, out=out, where=inter > 0)


def track_overlap(a: MaskTrack, b: MaskTrack) -> tuple[int, int]:
    """Return intersection and union, in pixels, summed over the frames of two tracks.

    The official evaluator's rules (YTVOSeval.iou_seq): frames beyond the shorter track do not
    count; a frame that only one track holds adds its area to the union; a frame whose masks differ
    in size adds nothing to either.

    Raises:
        DataError: an RLE is malformed.
    """
    inter, union = track_overlaps((a,), (b,))
    return int(inter[0, 0]), int(union[0, 0])


def track_overlaps(
    dts: Sequence[MaskTrack], gts: Sequence[MaskTrack]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the (D, G) intersections and unions of all pairs of tracks; see `track_overlap`.

    Each mask is read once, frame by frame.

    Raises:
        DataError: an RLE is malformed.
    """
    inter, union = np.zeros((2, len(dts), len(gts)), dtype=np.int64)
    if _COMPILED is not None and _COMPILED.track_overlaps(dts, gts, inter, union):
        return inter, union
    for d, dt in enumerate(dts):
        for g, gt in enumerate(gts):
            inter[d, g], union[d, g] = _track_overlap(dt, gt)
    return inter, union


def track_iou(a: MaskTrack, b: MaskTrack) -> float:
    """Return the spatio-temporal IoU of two tracks, 0 if both are empty; see `track_overlap`."""
    inter, union = track_overlap(a, b)
    return inter / union if union > 0 else 0.0


def track_ious(dts: Sequence[MaskTrack], gts: Sequence[MaskTrack]) -> NDArray[np.float64]:
    """Return the (D, G) float64 IoUs of all pairs of tracks; see `track_iou`."""
    inter, union = track_overlaps(dts, gts)
    return np.divide(inter, union, out=np.zeros(inter.shape), where=union > 0)


def from_polygons(polygons: Sequence[Sequence[float]], h: int, w: int) -> RLE:
    """Return the union of polygons, rasterised as COCO does.

    Args:
        polygons: each a flat list ``x, y, x, y, ...`` of at least three points, in pixels.
        h: height of the mask in pixels.
        w: width of the mask in pixels.

    Raises:
        DataError: a polygon has too few or odd numbers, or one that is not finite.
    """
    if _COMPILED is not None and (found := _COMPILED.from_polygons(polygons, h, w)) is not None:
        return found
    _check_pixels(h, w)
    for number, polygon in enumerate(polygons):
        if len(polygon) < _MIN_POLYGON or len(polygon) % 2:
            raise DataError(
                f"polygon {number} has {len(polygon)} numbers, expected an even number >= 6"
            )
        if not all(math.isfinite(v) and abs(v) <= rle_numpy.MAX_COORDINATE for v in polygon):
            raise DataError(f"polygon {number} holds a coordinate that is not a finite pixel")
    if not polygons:
        return empty(h, w)
    texts = [rle_numpy.polygon(polygon, h, w).encode() for polygon in polygons]
    return _rle(rle_numpy.merge(texts, h, w, False), h, w)


def from_boxes(boxes: Sequence[Sequence[float]], h: int, w: int) -> list[RLE]:
    """Return the masks of N xyxy boxes, rasterised as COCO does with polygons of four points.

    Args:
        boxes: each ``(x1, y1, x2, y2)`` in pixels; what lies outside the frame is cut off.
        h: height of the masks in pixels.
        w: width of the masks in pixels.

    Raises:
        DataError: a coordinate is not finite.
    """
    corners = ((x1, y1, x1, y2, x2, y2, x2, y1) for x1, y1, x2, y2 in boxes)
    return [from_polygons((polygon,), h, w) for polygon in corners]


def from_uncompressed(counts: Sequence[int], h: int, w: int) -> RLE:
    """Return the RLE of plain runs, column-major, background first.

    Raises:
        DataError: a run is no whole number >= 0, or they do not sum to ``h * w``.
    """
    if _COMPILED is not None and (found := _COMPILED.from_runs(counts, h, w)) is not None:
        return found
    _check_pixels(h, w)
    if not all(isinstance(run, int | np.integer) and 0 <= run <= h * w for run in counts):
        raise DataError("uncompressed RLE: a run is no whole number from 0 to height x width")
    # Not in numpy, whose sums could wrap.
    if (total := sum(map(int, counts))) != h * w:
        raise DataError(
            f"uncompressed RLE: the runs cover {total} pixels, expected height x width = {h * w}"
        )
    return _rle(rle_numpy.runs_to_text(list(counts) or [0]), h, w)


def to_uncompressed(rle: RLE) -> list[int]:
    """Return the runs of a mask, column-major, background first, as they are written.

    Raises:
        DataError: the RLE is malformed.
    """
    if _COMPILED is not None and (found := _COMPILED.to_runs(rle)) is not None:
        return found
    height, width = _size(rle)
    return [int(run) for run in rle_numpy.text_to_runs(_counts(rle), height * width)]


def empty(h: int, w: int) -> RLE:
    """Return a mask without foreground."""
    return from_uncompressed([h * w], h, w)


def validate(rle: Any, where: str) -> None:
    """Check that a value is a well-formed RLE.

    Args:
        rle: any value, as it came from a file.
        where: how a message calls it (``video `cat`, track 3, frame 7``).

    Raises:
        DataError: it is no RLE; the message opens with ``where``.
    """
    if _COMPILED is not None and _COMPILED.area(rle) is not None:
        return
    with _named(where):
        if not isinstance(rle, dict) or "counts" not in rle:
            raise DataError("is no RLE, expected an object with `size` and `counts`")
        rle_numpy.area(_counts(rle), *_size(rle))  # type: ignore[arg-type]


def validate_track(rles: Sequence[Any], where: str) -> None:
    """Check that each value of a track is None or a well-formed RLE; see `validate`.

    Args:
        rles: (T,) any values.
        where: how a message calls the track (``video `cat`, track 3``); it adds the frame.

    Raises:
        DataError: one is no RLE; the message opens with ``where, frame t``.
    """
    frame = 0  # a value that the library does not know may still be right: it is looked at alone
    while _COMPILED is not None and (found := _COMPILED.faulty(rles, frame)) is not None:
        if found < 0:
            return
        validate(rles[found], f"{where}, frame {found}")
        frame = found + 1
    for number, rle in enumerate(rles):
        if rle is not None:
            validate(rle, f"{where}, frame {number}")


def _of_all(rles: Sequence[RLE], measure: Any) -> Any:
    """Measure masks, none of which may be absent."""
    if None in rles:
        raise DataError("a mask is None, expected an RLE")
    return measure(rles)


def _frame_by_frame(
    measure: Callable[[RLE], Number], rles: MaskTrack, where: str | None
) -> tuple[Number | None, ...]:
    """Measure the masks of a track one by one, so that an error can name its frame."""
    found: list[Number | None] = []
    for frame, rle in enumerate(rles):
        with _named(None if where is None else f"{where}, frame {frame}"):
            found.append(None if rle is None else measure(rle))
    return tuple(found)


@contextmanager
def _named(where: str | None) -> Iterator[None]:
    """Let the message of a data error open with a place."""
    try:
        yield
    except DataError as error:
        if where is None:
            raise
        raise DataError(f"{where}: {error.message}", error.hint) from error


def _track_overlap(a: MaskTrack, b: MaskTrack) -> tuple[int, int]:
    """Return what `track_overlap` does, through the twin."""
    inter = union = 0
    for one, other in zip(a, b, strict=False):
        if one and other:
            if (size := _size(one)) == _size(other):
                common = int(rle_numpy.intersections([_counts(one)], [_counts(other)], *size)[0, 0])
                inter += common
                union += area(one) + area(other) - common
        elif alone := one or other:
            union += area(alone)
    return inter, union


def _whole_box(box: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """Return the edges of a box inside a frame as whole numbers, checked."""
    edges = tuple(box)
    if len(edges) == 4 and all(float(edge).is_integer() for edge in edges):
        x1, y1, x2, y2 = map(int, edges)
        if 0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height:
            return x1, y1, x2, y2
    raise DataError(
        f"`box` is {edges}, expected whole x1, y1, x2, y2 inside the frame of {width}x{height}"
    )


def _rle(text: str, height: int, width: int) -> RLE:
    """Put an RLE together."""
    return {"size": [height, width], "counts": text}


def _size(rle: RLE) -> tuple[int, int]:
    """Return height and width, checked."""
    size: Any = rle.get("size") if isinstance(rle, Mapping) else None
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise DataError(f"malformed RLE: size is {size!r}, expected [height, width]")
    height, width = size
    _check_pixels(height, width)
    return int(height), int(width)


def _check_pixels(height: Any, width: Any) -> None:
    """Check that a mask of this size can be."""
    # Exact types first: this runs for every mask of every file.
    whole = type(height) is int and type(width) is int
    if not whole:
        kinds = (int, np.integer)
        whole = isinstance(height, kinds) and isinstance(width, kinds)
        whole = whole and not isinstance(height, bool) and not isinstance(width, bool)
    if not whole or height < 0 or width < 0 or int(height) * int(width) > rle_numpy.MAX_PIXELS:
        raise DataError(f"malformed RLE: size is [{height!r}, {width!r}], expected whole pixels")


def _common_size(rles: Sequence[RLE]) -> tuple[int, int]:
    """Return the size that all masks share."""
    if not rles:
        raise DataError("no mask is given, expected at least one")
    size = _size(rles[0])
    for rle in rles:
        if (other := _size(rle)) != size:
            raise DataError(
                f"masks differ in size: {other[0]}x{other[1]} against {size[0]}x{size[1]}",
                "bring predictions and ground truth to the size of the video",
            )
    return size


def _counts(rle: RLE) -> bytes:
    """Return the text as bytes."""
    counts: Any = rle.get("counts")
    if isinstance(counts, str):
        # Anything outside ASCII becomes `?`, whose code lies in the alphabet: use 0xff instead.
        return counts.encode("ascii") if counts.isascii() else b"\xff"
    if isinstance(counts, bytes):
        return counts
    raise DataError(
        f"malformed RLE: counts are {type(counts).__name__}, expected text",
        "uncompressed runs become text with `pmvis convert`",
    )
