"""How the masks of tracks overlap frame by frame, whatever their categories.

`average_precision` needs one number to a pair of tracks and only within a category; to explain an
error one must know in which frames two tracks agree. F frames, D predictions, G ground truths.

    overlaps = frame_overlaps(predictions, truths)
    overlaps.track_ious[0, 0] == masks.track_iou(predictions[0].rles, truths[0].rles)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from pmvis_core import masks
from pmvis_core.evaluation.matches import Ints
from pmvis_core.evaluation.protocol import Flags, Floats
from pmvis_core.formats.ytvis_annotation import Annotation
from pmvis_core.types import RLE


@dataclass(frozen=True)
class Overlaps:
    """Of all pairs of D predictions and G ground truths of one video, in pixels."""

    inter: Ints
    """(F, D, G) pixels that both masks hold."""
    union: Ints
    """(F, D, G) pixels that either holds; 0 where the frame does not count for the pair."""
    both: Flags
    """(F, D, G) whether both tracks hold a mask, of one size."""

    @cached_property
    def track_ious(self) -> Floats:
        """(D, G) IoU of whole tracks, as officially counted."""
        return _ratio(self.inter.sum(axis=0), self.union.sum(axis=0))

    @cached_property
    def common_ious(self) -> Floats:
        """(D, G) IoU over the frames in which both tracks hold a mask; 0 without such a frame."""
        return _ratio(self.inter.sum(axis=0), np.where(self.both, self.union, 0).sum(axis=0))

    @cached_property
    def frame_ious(self) -> Floats:
        """(F, D, G) IoU in each frame."""
        return _ratio(self.inter, self.union)


def frame_overlaps(dts: Sequence[Annotation], gts: Sequence[Annotation]) -> Overlaps:
    """Return the overlaps of tracks of one video under the rules of `masks.track_overlap`.

    Frames beyond the shorter of two tracks do not count; a mask that only one track holds adds its
    area to the union; a frame whose masks differ in size adds nothing.

    Raises:
        DataError: an RLE is malformed.
    """
    frames = min(
        max((len(row.rles) for row in dts), default=0),
        max((len(row.rles) for row in gts), default=0),
    )
    first, second = _side(dts, frames), _side(gts, frames)
    inter = np.zeros((frames, len(dts), len(gts)), dtype=np.int64)
    both = np.zeros(inter.shape, dtype=bool)
    for t in range(frames):
        ours, theirs = _by_size(dts, t), _by_size(gts, t)
        for size in ours.keys() & theirs.keys():
            rows, columns = ours[size], theirs[size]
            place = np.ix_(rows, columns)
            common = _intersections(
                [dts[d].rles[t] for d in rows], [gts[g].rles[t] for g in columns]
            )
            inter[t][place] = np.rint(common * first.areas[t, rows, None]).astype(np.int64)
            both[t][place] = True
    there, there_too = first.present[:, :, None], second.present[:, None, :]
    lasting = first.lasting[:, :, None] & second.lasting[:, None, :]
    counted = both | (lasting & (there ^ there_too))
    sums = first.areas[:, :, None] + second.areas[:, None, :]
    return Overlaps(inter, np.where(counted, sums - inter, 0), both)


class _Side(NamedTuple):
    """N tracks in F frames."""

    areas: Ints
    """(F, N) pixels, 0 without a mask."""
    present: Flags
    """(F, N) whether there is a mask."""
    lasting: Flags
    """(F, N) whether the track's list reaches that frame."""


def _side(rows: Sequence[Annotation], frames: int) -> _Side:
    """Return what is known of the masks of tracks."""
    areas = np.zeros((frames, len(rows)), dtype=np.int64)
    present = np.zeros((frames, len(rows)), dtype=bool)
    for n, row in enumerate(rows):
        there = [area is not None for area in row.mask_areas[:frames]]
        present[: len(there), n] = there
        areas[: len(there), n] = [area or 0 for area in row.mask_areas[:frames]]
    lengths = np.array([len(row.rles) for row in rows], dtype=np.int64)
    return _Side(areas, present, np.arange(frames)[:, None] < lengths)


def _by_size(rows: Sequence[Annotation], t: int) -> dict[tuple[int, int], list[int]]:
    """Return which tracks hold a mask in a frame, by the mask's size."""
    found: dict[tuple[int, int], list[int]] = {}
    for n, row in enumerate(rows):
        rle = row.rles[t] if t < len(row.rles) else None
        if rle is not None:
            found.setdefault((rle["size"][0], rle["size"][1]), []).append(n)
    return found


def _intersections(dts: Sequence[RLE | None], gts: Sequence[RLE | None]) -> Floats:
    """Return (D, G) intersections as shares of the predictions' areas.

    A share times the area, rounded, is the whole number of pixels again: exact below 2^52.
    """
    return masks.iou(
        [rle for rle in dts if rle is not None],
        [rle for rle in gts if rle is not None],
        [True] * len(gts),
    )


def _ratio(inter: Ints, union: Ints) -> Floats:
    """Return intersections over unions, 0 where the union is empty."""
    return np.where(union > 0, inter / np.maximum(union, 1), 0.0)
