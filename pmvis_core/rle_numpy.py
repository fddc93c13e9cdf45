"""Run-length encodings in plain numpy: the oracle of the compiled masks, and their stand-in.

COCO's text stores the runs of a column-major mask, background first. Each run is written in groups
of five bits, least significant first, as characters from 48 on; bit 5 of a group says that another
follows, bit 4 of the last group is the sign. From the fourth run on, the difference to the run two
places before is written instead of the run. Every function here checks that and that the runs
cover the mask exactly, and raises `DataError` otherwise: no input reads or writes out of bounds.
Texts are bytes here, sizes numbers; `masks` takes dicts apart.

    area(b"0<", height=3, width=4)  # 12
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmvis_core.errors import DataError

Ints = NDArray[np.int64]
Box = tuple[float, float, float, float]

MAX_PIXELS = 2**32 - 1
"""Largest number of pixels of a mask; runs are 32-bit."""

MAX_COORDINATE = 1e6
"""Largest absolute coordinate of a polygon, in pixels."""

_MAX_GROUPS = 7
_MALFORMED_HINT = "write the mask again with pycocotools or `pmvis convert`"


def encode(masks: NDArray[np.uint8]) -> list[str]:
    """Encode masks.

    Args:
        masks: (N, H, W) uint8, foreground where nonzero, any memory order.
    """
    return [runs_to_text(_runs_of_pixels(mask)) for mask in masks]


def decode(text: bytes, height: int, width: int) -> NDArray[np.uint8]:
    """Return the (H, W) uint8 mask, foreground 1."""
    runs = text_to_runs(text, height * width)
    values = (np.arange(len(runs)) % 2).astype(np.uint8)
    return np.repeat(values, runs).reshape(width, height).T


def area(text: bytes, height: int, width: int) -> int:
    """Return the number of foreground pixels."""
    return int(text_to_runs(text, height * width)[1::2].sum())


def box(text: bytes, height: int, width: int) -> Box:
    """Return the xyxy box with an exclusive far edge; zeros if the mask is empty."""
    return _box(text_to_runs(text, height * width), height)


def merge(counts: Sequence[bytes], height: int, width: int, intersect: bool) -> str:
    """Return the union (or intersection) of N >= 1 masks."""
    pixels = height * width
    merged = text_to_runs(counts[0], pixels)
    for text in counts[1:]:
        merged = _merge_two(merged, text_to_runs(text, pixels), pixels, intersect)
    return runs_to_text(merged)


def intersections(first: Sequence[bytes], second: Sequence[bytes], height: int, width: int) -> Ints:
    """Return the (D, G) int64 matrix of common foreground pixels."""
    pixels = height * width
    firsts = [_intervals(text_to_runs(text, pixels)) for text in first]
    seconds = [_intervals(text_to_runs(text, pixels)) for text in second]
    values = [[_overlap(a, b) for b in seconds] for a in firsts]
    return np.array(values, dtype=np.int64).reshape(len(first), len(second))


def polygon(xy: Sequence[float], height: int, width: int) -> str:
    """Return the mask of one closed polygon by COCO's rule, which csrc/rle/polygons.h states.

    Args:
        xy: ``x, y, x, y, ...`` in pixels, each at most `MAX_COORDINATE`.
        height: of the mask.
        width: of the mask.
    """
    fine = np.trunc(5 * np.asarray(xy, dtype=np.float64).reshape(-1, 2) + 0.5).astype(np.int64)
    places = [np.zeros(0, dtype=np.int64)]
    for a, b in zip(np.roll(fine, 1, axis=0), fine, strict=True):
        dx, dy = np.abs(b - a)
        if dx > 0:
            axis = 0 if dx >= dy else 1
            start, end = (a, b) if a[axis] < b[axis] else (b, a)
            columns, rows = (_cross_flat if axis == 0 else _cross_steep)(start, end, width)
            places.append(columns * height + np.clip((rows + 2) // 5, 0, height))
    # Two crossings at one place cancel.
    values, counts = np.unique(np.concatenate(places), return_counts=True)
    pixels = height * width
    ends = values[(counts % 2 == 1) & (values < pixels)]
    return runs_to_text(np.diff(ends, prepend=0, append=pixels))


def text_to_runs(text: bytes, pixels: int) -> Ints:
    """Return the (R,) int64 runs of a text that covers ``pixels`` pixels.

    Raises:
        DataError: the text is malformed or its runs do not sum to ``pixels``.
    """
    if not text:
        text = b"0"
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if codes.min() < 0 or codes.max() > 63:
        at = int(np.flatnonzero((codes < 0) | (codes > 63))[0])
        raise _malformed(f"character {at} of the counts is outside COCO's alphabet")
    last = (codes & 32) == 0
    if not last[-1]:
        raise _malformed("the counts end in the middle of a run")
    ends = np.flatnonzero(last) + 1
    starts = np.concatenate([[0], ends[:-1]])
    if np.any(ends - starts > _MAX_GROUPS):
        raise _malformed(f"a run is written with more than {_MAX_GROUPS} characters")
    runs = _join_groups(codes, starts, ends)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if np.any(runs < 0) or np.any(runs > MAX_PIXELS):
        raise _malformed("a run is negative or does not fit into 32 bits")
    if (total := int(runs.sum())) != pixels:
        raise _malformed(f"the runs cover {total} pixels, expected height x width = {pixels}")
    return runs


def runs_to_text(runs: Sequence[int] | Ints) -> str:
    """Return COCO's text of (R,) runs."""
    values = np.asarray(runs, dtype=np.int64)
    deltas = values.copy()
    deltas[3:] -= values[1:-2]
    groups = np.zeros((len(deltas), _MAX_GROUPS), dtype=np.uint8)
    used = np.zeros(groups.shape, dtype=bool)
    open_ = np.ones(len(deltas), dtype=bool)
    rest = deltas
    for k in range(_MAX_GROUPS):
        low, rest = rest & 31, rest >> 5
        more = open_ & (rest != np.where(low & 16, -1, 0))
        groups[:, k] = low + 32 * more + 48
        used[:, k] = open_
        open_ = more
    return groups[used].tobytes().decode("ascii")


def _columns(first: Any, last: Any, width: int) -> Ints:
    """Return the pixel columns whose middles lie between two columns of the fine grid."""
    return np.arange(max(0, -(-(first - 2) // 5)), min(width, (last - 3) // 5 + 1), dtype=np.int64)


def _cross_flat(start: Ints, end: Ints, width: int) -> tuple[Ints, Ints]:
    """Return columns, and fine rows of crossings, of an edge from left to right."""
    columns = _columns(start[0], end[0], width)
    slope = float(end[1] - start[1]) / float(end[0] - start[0])
    steps = 5 * columns + np.array([[2], [3]]) - start[0]
    rows = np.trunc(start[1] + slope * steps + 0.5).astype(np.int64)
    return columns, rows.min(axis=0)


def _cross_steep(start: Ints, end: Ints, width: int) -> tuple[Ints, Ints]:
    """Return the same of an edge from top to bottom."""
    columns = _columns(min(start[0], end[0]), max(start[0], end[0]), width)
    slope = float(end[0] - start[0]) / float(end[1] - start[1])
    # The step at which x passes a column's middle, right but for rounding: look around it.
    about = np.floor((5 * columns + 2.5 - start[0]) / slope).astype(np.int64)
    steps = np.clip(about + np.arange(-2, 4)[:, None], 1, end[1] - start[1])
    x = np.trunc(start[0] + slope * steps + 0.5)
    passed = (x > 5 * columns + 2) == (slope > 0)
    first = np.take_along_axis(steps, passed.argmax(axis=0)[None], axis=0)[0]
    return columns, start[1] + first - 1


def _join_groups(codes: Ints, starts: Ints, ends: Ints) -> Ints:
    """Put groups of five bits together to signed numbers."""
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, ends - starts))
    values = np.add.reduceat((codes & 31) << shifts, starts)
    negative = (codes[ends - 1] & 16) != 0
    return np.asarray(values - np.where(negative, 1 << (5 * (ends - starts)), 0), dtype=np.int64)


def _malformed(problem: str) -> DataError:
    """Return the error of a text that is no mask."""
    return DataError(f"malformed RLE: {problem}", _MALFORMED_HINT)


def _runs_of_pixels(mask: NDArray[np.uint8]) -> Ints:
    """Return the runs of an (H, W) mask, column by column."""
    flat = (mask != 0).ravel(order="F")
    before = np.concatenate([[False], flat[:-1]])
    changes = np.flatnonzero(flat != before)
    return np.diff(changes, prepend=0, append=flat.size).astype(np.int64)


def _intervals(runs: Ints) -> tuple[Ints, Ints]:
    """Return starts and ends of the foreground intervals that are not empty."""
    ends = np.cumsum(runs)
    starts, ends = ends[0:-1:2], ends[1::2]
    keep = ends > starts
    return starts[keep], ends[keep]


def _overlap(first: tuple[Ints, Ints], second: tuple[Ints, Ints]) -> int:
    """Return the number of common positions of two lists of disjoint ascending intervals."""
    starts, ends = second
    if not len(starts) or not len(first[0]):
        return 0
    knots = np.stack([starts, ends], axis=1).ravel()
    covered = np.repeat(np.cumsum(ends - starts), 2)
    covered[0::2] -= ends - starts
    # Covered positions before p are piecewise linear with slopes 0 and 1: exact in float64.
    below = np.interp(np.stack(first), knots, covered)
    return int((below[1] - below[0]).sum())


def _box(runs: Ints, height: int) -> Box:
    """Return the xyxy box of the foreground."""
    starts, ends = _intervals(runs)
    if not len(starts):
        return (0.0, 0.0, 0.0, 0.0)
    last = ends - 1
    x1, x2 = starts[0] // height, last[-1] // height
    # An interval that goes on in the next column covers the last row of one and the first of
    # the other.
    crosses = np.any(starts // height != last // height)
    y1 = 0 if crosses else (starts % height).min()
    y2 = height - 1 if crosses else (last % height).max()
    return (float(x1), float(y1), float(x2 + 1), float(y2 + 1))


def _merge_two(first: Ints, second: Ints, pixels: int, intersect: bool) -> Ints:
    """Sweep two run lists by absolute position; runs of length zero survive, as in pycocotools."""
    operands = [first.tolist(), second.tolist()]
    index, values = [0, 0], [False, False]
    ends = [operands[0][0], operands[1][0]]
    merged: list[int] = []
    start, value, at = 0, False, -1
    while at < pixels:
        at = min(ends)
        for k in (0, 1):
            if ends[k] == at and index[k] + 1 < len(operands[k]):
                index[k] += 1
                ends[k] += operands[k][index[k]]
                values[k] = not values[k]
        now = all(values) if intersect else any(values)
        if now != value or at == pixels:
            merged.append(at - start)
            start, value = at, now
    return np.array(merged, dtype=np.int64)
