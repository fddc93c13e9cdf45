"""Masks as COCO run-length encodings: everything outside the network handles masks through here.

An `RLE` is ``{"size": [height, width], "counts": text}``; ``counts`` may be bytes on input and is
always text on output. The texts equal pycocotools' byte for byte, but nothing here reads out of
bounds, loops for ever or guesses: a text whose runs do not cover the mask exactly is a `DataError`.

    rle = encode(image > 0)
    area(rle), to_box(rle), decode(rle).shape

The work is done by `native.MaskLibrary` where the compiled library is there, else by its twin in
numpy, `rle_numpy`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pmvis_core import native, rle_numpy
from pmvis_core.errors import DataError
from pmvis_core.types import RLE, Box

_MAX_COORDINATE = 1e6
_MIN_POLYGON = 6


def encode(mask: ArrayLike) -> RLE:
    """Encode one mask.

    Args:
        mask: (H, W) bool or uint8, foreground where nonzero, any memory order.

    Raises:
        DataError: the array is no such mask.
    """
    pixels = np.asarray(mask)
    if pixels.ndim != 2:
        raise DataError(f"a mask has shape {pixels.shape}, expected (height, width)")
    return encode_many(pixels[None])[0]


def encode_many(masks: ArrayLike) -> list[RLE]:
    """Encode (N, H, W) bool or uint8 masks; see `encode`."""
    pixels = np.asarray(masks)
    if pixels.ndim != 3:
        raise DataError(f"masks have shape {pixels.shape}, expected (number, height, width)")
    if pixels.dtype == np.bool_:
        pixels = pixels.view(np.uint8)
    if pixels.dtype != np.uint8:
        raise DataError(f"masks have type {pixels.dtype}, expected bool or uint8")
    _, height, width = pixels.shape
    _check_pixels(height, width)
    return [_rle(text, height, width) for text in _kernels().encode(pixels)]


def decode(rle: RLE, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Return the (H, W) uint8 mask in C order, foreground 1.

    Args:
        rle: the mask.
        out: where to write it, of that shape, type and order.

    Raises:
        DataError: the RLE is malformed, or ``out`` does not fit.
    """
    height, width = _size(rle)
    cleared = out is None
    if out is None:
        out = np.zeros((height, width), dtype=np.uint8)
    elif out.shape != (height, width) or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise DataError(
            f"`out` is {out.dtype} of shape {out.shape}, expected uint8 of shape "
            f"{(height, width)} in C order"
        )
    _kernels().decode([_counts(rle)], out[None], cleared)
    return out


def decode_many(rles: Sequence[RLE]) -> NDArray[np.uint8]:
    """Return the (N, H, W) uint8 masks in C order; all of one size.

    Raises:
        DataError: an RLE is malformed, sizes differ, or there is none.
    """
    height, width = _common_size(rles)
    out = np.zeros((len(rles), height, width), dtype=np.uint8)
    _kernels().decode([_counts(rle) for rle in rles], out, True)
    return out


def area(rle: RLE) -> int:
    """Return the number of foreground pixels."""
    return int(_kernels().areas([_counts(rle)], *_size(rle))[0])


def to_box(rle: RLE) -> Box:
    """Return the xyxy box in pixels, far edge exclusive; zeros if the mask is empty."""
    return _kernels().boxes([_counts(rle)], *_size(rle))[0]


def merge(rles: Sequence[RLE], intersect: bool = False) -> RLE:
    """Return the union of N >= 1 masks, or their intersection.

    Raises:
        DataError: an RLE is malformed, sizes differ, or there is none.
    """
    height, width = _common_size(rles)
    counts = [_counts(rle) for rle in rles]
    return _rle(_kernels().merge(counts, height, width, intersect), height, width)


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
    if not dts or not gts:
        return np.zeros((len(dts), len(gts)))
    size = _common_size([*dts, *gts])
    first, second = [_counts(rle) for rle in dts], [_counts(rle) for rle in gts]
    kernels = _kernels()
    inter = kernels.intersections(first, second, *size)
    area_dt = kernels.areas(first, *size)[:, None]
    area_gt = kernels.areas(second, *size)[None, :]
    crowd = np.zeros(len(gts), dtype=bool) if iscrowd is None else np.asarray(iscrowd, dtype=bool)
    if crowd.shape != (len(gts),):
        raise DataError(f"`iscrowd` has {crowd.size} entries, expected {len(gts)}")
    union = np.where(crowd[None, :], area_dt, area_dt + area_gt - inter)
    return np.asarray(np.where(inter > 0, inter / np.maximum(union, 1), 0.0), dtype=np.float64)


def track_overlap(a: Sequence[RLE | None], b: Sequence[RLE | None]) -> tuple[int, int]:
    """Return intersection and union, in pixels, summed over the frames of two tracks.

    The official evaluator's rules (YTVOSeval.iou_seq): frames beyond the shorter track do not
    count; a frame that only one track holds adds its area to the union; a frame whose masks differ
    in size adds nothing to either.

    Raises:
        DataError: an RLE is malformed.
    """
    kernels = _kernels()
    first: list[bytes] = []
    second: list[bytes] = []
    pixels: list[int] = []
    alone = 0
    for one, other in zip(a, b, strict=False):
        if one and other:
            size = _size(one)
            if size == _size(other):
                first.append(_counts(one))
                second.append(_counts(other))
                pixels.append(size[0] * size[1])
        elif one or other:
            alone += area(one or other)  # type: ignore[arg-type]
    inter, union = kernels.track_overlap(first, second, pixels)
    return inter, union + alone


def track_iou(a: Sequence[RLE | None], b: Sequence[RLE | None]) -> float:
    """Return the spatio-temporal IoU of two tracks, 0 if both are empty; see `track_overlap`."""
    inter, union = track_overlap(a, b)
    return inter / union if union > 0 else 0.0


def from_polygons(polygons: Sequence[Sequence[float]], h: int, w: int) -> RLE:
    """Return the union of polygons, rasterised as COCO does.

    Args:
        polygons: each a flat list ``x, y, x, y, ...`` of at least three points, in pixels.
        h: height of the mask in pixels.
        w: width of the mask in pixels.

    Raises:
        DataError: a polygon has too few or odd numbers, or one that is not finite.
    """
    from pycocotools import mask as coco_mask

    _check_pixels(h, w)
    for number, polygon in enumerate(polygons):
        if len(polygon) < _MIN_POLYGON or len(polygon) % 2:
            raise DataError(
                f"polygon {number} has {len(polygon)} numbers, expected an even number >= 6"
            )
        if not all(math.isfinite(v) and abs(v) <= _MAX_COORDINATE for v in polygon):
            raise DataError(f"polygon {number} holds a coordinate that is not a finite pixel")
    if not polygons:
        return empty(h, w)
    parts = coco_mask.frPyObjects([list(map(float, polygon)) for polygon in polygons], h, w)
    return merge([_rle(part["counts"].decode("ascii"), h, w) for part in parts])


def from_uncompressed(counts: Sequence[int], h: int, w: int) -> RLE:
    """Return the RLE of plain runs, column-major, background first.

    Raises:
        DataError: a run is no whole number >= 0, or they do not sum to ``h * w``.
    """
    _check_pixels(h, w)
    if not all(isinstance(run, int | np.integer) and 0 <= run <= h * w for run in counts):
        raise DataError("uncompressed RLE: a run is no whole number from 0 to height x width")
    if sum(counts) != h * w:
        raise DataError(
            f"uncompressed RLE: the runs cover {sum(counts)} pixels, expected height x width = "
            f"{h * w}"
        )
    return _rle(rle_numpy.runs_to_text(list(counts)), h, w)


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
    try:
        if not isinstance(rle, dict) or "counts" not in rle:
            raise DataError("is no RLE, expected an object with `size` and `counts`")
        area(rle)  # type: ignore[arg-type]
    except DataError as error:
        raise DataError(f"{where}: {error.message}", error.hint) from error


def _kernels() -> native.MaskKernels:
    """Return the compiled kernels, or their twin in numpy."""
    return native.mask_library() or rle_numpy


def _rle(text: str, height: int, width: int) -> RLE:
    """Put an RLE together."""
    return {"size": [height, width], "counts": text}


def _size(rle: RLE) -> tuple[int, int]:
    """Return height and width, checked."""
    size: Any = rle.get("size")
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
