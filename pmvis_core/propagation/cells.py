"""Labels by the likeness of a frozen network's features: what `flow` may ask beside the colours.

Frames are described by unit vectors on a coarse grid. A cell of the current frame asks the cells of
remembered frames around the place that the flow predicts; the most alike of them say, by their
labels, whether it is object, and their likeness says how far to believe them. Top-k label
propagation in a window, as in Jabri et al. (NeurIPS 2020, Sec. 3.2), with the window carried along
by flow. Cells are numbered row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pmvis_core.propagation.bilateral import Box, Float

REACH = 6
"""Cells that are asked lie at most so many cells from the predicted one, in x and in y."""
MOST_ALIKE = 7
"""Cells that are believed, of all that are asked."""
TEMPERATURE = 0.1
"""A cell that is less alike by this (cosine) counts 1/e as much."""
_SURE = np.float32(0.98)
"""The most that the cells may claim."""


@dataclass(frozen=True)
class Cells:
    """A frame as the network sees it."""

    grid: tuple[int, int]
    """Rows and columns."""
    vectors: Float
    """(rows * columns, C), of length one."""

    @property
    def nbytes(self) -> int:
        """Size in the cache."""
        return self.vectors.nbytes


@dataclass(frozen=True)
class CellMemory:
    """A remembered frame that is asked."""

    cells: Cells
    """The frame."""
    probability: Float
    """(h, w) of the object in it."""
    flow: Float
    """(h, w, 2) xy displacement from a pixel of the current frame to its place in this one."""


def cell_odds(now: Cells, memories: Sequence[CellMemory], box: Box) -> Float:
    """Return the log odds (crop) that the pixels of ``box`` are object, weighted by likeness.

    Args:
        now: the current frame.
        memories: frames to ask; all maps are of one size (h, w), the crop is part of it.
        box: the crop.
    """
    size = memories[0].probability.shape
    scale = now.grid[0] / size[0], now.grid[1] / size[1]
    rows, columns = (
        np.arange(int(part.start * s), min(n, int(np.ceil(part.stop * s))))
        for part, s, n in zip(box, scale, now.grid, strict=True)
    )
    asked = [_ask(now, memory, rows, columns) for memory in memories]
    alike = np.concatenate([likeness for likeness, _ in asked])
    labels = np.concatenate([label for _, label in asked])
    best = np.argpartition(alike, -MOST_ALIKE, axis=0)[-MOST_ALIKE:]
    alike = np.take_along_axis(alike, best, 0)
    weights = np.exp((alike - alike.max(0)) / np.float32(TEMPERATURE))
    weights /= weights.sum(0)
    share = (weights * np.take_along_axis(labels, best, 0)).sum(0)
    belief = np.clip((weights * alike).sum(0), 0, 1)

    place = (rows.size, columns.size)
    share = _to_pixels(share.reshape(place), box, scale, rows[0], columns[0])
    belief = _to_pixels(belief.reshape(place), box, scale, rows[0], columns[0])
    share = np.clip(share, 1 - _SURE, _SURE)
    odds: Float = belief * np.log(share / (1 - share))
    return odds


def _ask(
    now: Cells, memory: CellMemory, rows: NDArray[np.intp], columns: NDArray[np.intp]
) -> tuple[Float, Float]:
    """Return likeness and label (window, cells) of what lies around the predicted places.

    Places outside of the frame have likeness -2, less than anything can have.
    """
    height, width = now.grid
    grid_scale = np.array([width, height], np.float32) / memory.probability.shape[::-1]
    flow = cv2.resize(memory.flow, (width, height), interpolation=cv2.INTER_AREA) * grid_scale
    labels = cv2.resize(memory.probability, (width, height), interpolation=cv2.INTER_AREA).ravel()
    cells = (rows[:, None] * width + columns).ravel()
    predicted = flow.reshape(-1, 2)[cells] + np.stack([cells % width, cells // width], 1)
    predicted = np.rint(np.clip(predicted, 0, (width - 1, height - 1))).astype(np.intp)
    asking = now.vectors[cells]

    side = 2 * REACH + 1
    alike = np.full((side * side, cells.size), -2, np.float32)
    found = np.zeros_like(alike)
    for i, (dy, dx) in enumerate(np.ndindex(side, side)):
        x, y = predicted[:, 0] + dx - REACH, predicted[:, 1] + dy - REACH
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        at = (y * width + x)[inside]
        alike[i, inside] = np.einsum("nc,nc->n", asking[inside], memory.cells.vectors[at])
        found[i, inside] = labels[at]
    return alike, found


def _to_pixels(
    values: Float, box: Box, scale: tuple[float, float], first_row: int, first_column: int
) -> Float:
    """Interpolate values of a part of the grid at the pixel centres of a crop."""
    y, x = (
        ((np.arange(part.start, part.stop) + 0.5) * s - 0.5 - first).astype(np.float32)
        for part, s, first in zip(box, scale, (first_row, first_column), strict=True)
    )
    maps = np.meshgrid(x, y)
    found = cv2.remap(values, maps[0], maps[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(found, np.float32)
