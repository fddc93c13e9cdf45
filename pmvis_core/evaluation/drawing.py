"""Precision-recall curves: all arrays as npz, and a picture of them.

The picture shows the mean over categories large, at IoU 0.5, 0.75 and averaged over the ten
thresholds, and below it the same three curves of each category, best AP first; of more than a
hundred categories the worst hundred.

    save_curves(Path("curves.npz"), evaluation)
    write_picture(Path("curves.png"), draw_curves(evaluation))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pmvis_core.errors import DataError
from pmvis_core.evaluation.curves import CategoryResult, Evaluation
from pmvis_core.evaluation.protocol import MAX_DETECTIONS, Floats, iou_thresholds, recall_points
from pmvis_core.files import atomic_write
from pmvis_core.report.drawing import (
    FADED,
    GREY,
    INK,
    RULE,
    Colour,
    Frame,
    blank,
    fitted,
    text_width,
    write,
)


class _Style(NamedTuple):
    """How one of the curves is drawn."""

    name: str
    short: str
    """Its number in the summary."""
    threshold: float | None
    """IoU; None for the mean of all ten."""
    colour: Colour
    line: int
    """Width in the large plot; the lower curves are thinner, so that equal ones show through."""


_STYLES = (
    _Style("IoU 0.50", "AP50", 0.5, (165, 216, 255), 7),
    _Style("IoU 0.75", "AP75", 0.75, (28, 126, 214), 4),
    _Style("mean 0.50:0.95", "AP", None, (247, 103, 7), 3),
)
_PALE: Colour = (233, 236, 239)
_MARGIN = 40
_WIDTH = 1400
_COLUMNS = 5
_MOST_CELLS = 100
_MAIN_HEIGHT = 600
_CELL_HEIGHT = 214
_GAP = 30
"""Pixels between the plots of categories side by side."""
_SHIFT = 4
"""Binary digits of a pixel to which lines are placed."""


def save_curves(path: Path, evaluation: Evaluation) -> None:
    """Write all curves as npz, atomically; the same evaluation gives the same bytes.

    Arrays: ``precision`` and ``scores`` (T, R, K, A, M) or, with occlusion groups,
    (T, R, K, A, O, M); ``recall`` the same without R; -1 where there is no ground truth. Their
    axes: ``iou_thresholds`` (T,), ``recall_points`` (R,), ``category_ids`` and ``category_names``
    (K,), ``areas`` (A,), ``occlusions`` (O,), ``max_detections`` (M,). Nothing needs pickle.

    Raises:
        ResourceError: the place cannot be written.
    """
    groups = evaluation.matches.groups
    categories = [row.category for row in evaluation.per_category]
    with atomic_write(path, "wb") as stream:
        np.savez_compressed(
            stream,
            precision=evaluation.precision,
            recall=evaluation.recall,
            scores=evaluation.scores,
            iou_thresholds=iou_thresholds(),
            recall_points=recall_points(),
            category_ids=np.array([category.id for category in categories], dtype=np.int64),
            category_names=np.array([category.name for category in categories], dtype=np.str_),
            areas=np.array([group.name for group in groups.areas]),
            occlusions=np.array([group.name for group in groups.occlusions]),
            max_detections=np.array(MAX_DETECTIONS, dtype=np.int64),
        )


def draw_curves(evaluation: Evaluation, title: str = "Precision and recall") -> Frame:
    """Draw the curves of all objects with at most 100 predictions a video and category.

    Args:
        evaluation: with ground truth of one category at least.
        title: the headline.

    Returns:
        (H, 1400, 3) uint8 RGB; categories without ground truth are left out.

    Raises:
        DataError: there is no ground truth, so there are no curves.
    """
    curves = _curves(evaluation)
    there = [k for k in range(curves.shape[2]) if curves[0, 0, k] > -1]
    if not there:
        raise DataError("there is no ground truth, so there is no curve to draw")
    ranked = sorted(there, key=lambda k: (-(evaluation.per_category[k].values["AP"] or 0.0), k))
    shown = ranked[-_MOST_CELLS:]
    rows = -(-len(shown) // _COLUMNS)
    canvas = blank(_MAIN_HEIGHT + rows * _CELL_HEIGHT, _WIDTH)
    write(canvas, fitted(title, 30, _WIDTH - 2 * _MARGIN), _MARGIN, 58, 30, INK, bold=True)
    mean = [_line(curves[:, :, there].mean(axis=2), style) for style in _STYLES]
    pale = [_line(curves[:, :, k], _STYLES[-1]) for k in there]
    _draw_main(canvas, mean, pale, evaluation.summary)
    step = (_WIDTH - 2 * _MARGIN + _GAP) // _COLUMNS
    for number, k in enumerate(shown):
        row, column = divmod(number, _COLUMNS)
        top = _MAIN_HEIGHT + row * _CELL_HEIGHT
        axes = _Axes(_MARGIN + column * step, top, step - _GAP, _CELL_HEIGHT - 66)
        lines = [_line(curves[:, :, k], style) for style in _STYLES]
        _draw_cell(canvas, axes, lines, evaluation.per_category[k])
    return canvas


class _Axes(NamedTuple):
    """Where a plot of the unit square lies on the canvas, in pixels."""

    left: int
    top: int
    width: int
    height: int

    def points(self, x: Floats, y: Floats) -> NDArray[np.int32]:
        """Return (N, 1, 2) places of values in [0, 1], in parts of pixels."""
        places = np.stack([self.left + x * self.width, self.top + (1.0 - y) * self.height], axis=-1)
        return np.asarray(np.rint(places * 2**_SHIFT), dtype=np.int32)[:, None]


def _curves(evaluation: Evaluation) -> Floats:
    """Return (T, R, K) precision of all objects with the most predictions."""
    every = evaluation.precision[..., -1]
    return every.reshape(*every.shape[:3], -1)[..., 0]


def _line(curves: Floats, style: _Style) -> Floats:
    """Return one (R,) curve of (T, R)."""
    every = style.threshold is None
    chosen = curves if every else curves[iou_thresholds() == style.threshold]
    return np.asarray(chosen.mean(axis=0))


def _draw_main(
    canvas: Frame,
    mean: Sequence[Floats],
    pale: Sequence[Floats],
    summary: Mapping[str, float | None],
) -> None:
    """Draw the mean curves over those of the categories, with axes and legend."""
    axes = _Axes(_MARGIN + 44, 118, 980, _MAIN_HEIGHT - 238)
    _draw_grid(canvas, axes, 16, every=0.2)
    for line in pale:
        _polyline(canvas, axes, line, _PALE, 2)
    for style, line in zip(_STYLES, mean, strict=True):
        _polyline(canvas, axes, line, style.colour, style.line)
    middle = axes.left + (axes.width - text_width("recall", 17)) // 2
    write(canvas, "recall", middle, axes.top + axes.height + 54, 17, FADED)
    write(canvas, "precision", axes.left - 32, axes.top - 20, 17, FADED)
    entries = [(s.name, s.short, s.colour, s.line, summary[s.short]) for s in _STYLES]
    left, top = axes.left + axes.width + 48, axes.top + 16
    for number, (name, short, colour, width, value) in enumerate(entries):
        told = f"{short} {'-' if value is None else f'{value:.3f}'}"
        _draw_key(canvas, (left, top + 68 * number), (colour, width), name, told)
    told = f"{len(pale)} with ground truth"
    _draw_key(canvas, (left, top + 68 * len(entries)), (GREY, 2), "each category, mean", told)


def _draw_key(
    canvas: Frame, spot: tuple[int, int], stroke: tuple[Colour, int], name: str, told: str
) -> None:
    """Draw an entry of the legend: a stroke of some colour and width, its name, and a figure."""
    x, y = spot
    colour, width = stroke
    cv2.line(canvas, (x, y - 6), (x + 36, y - 6), colour, width, cv2.LINE_AA)
    write(canvas, name, x + 54, y, 18, INK)
    write(canvas, told, x + 54, y + 27, 18, FADED)


def _draw_cell(canvas: Frame, axes: _Axes, lines: Sequence[Floats], result: CategoryResult) -> None:
    """Draw the curves of one category with its name and AP above."""
    told = f"{result.values['AP'] or 0.0:.3f}"
    right = axes.left + axes.width - text_width(told, 15)
    write(canvas, told, right, axes.top - 9, 15, FADED)
    name = fitted(result.category.name, 15, right - axes.left - 10)
    write(canvas, name, axes.left, axes.top - 9, 15, INK)
    _draw_grid(canvas, axes, 0, every=0.5)
    for style, line in zip(_STYLES, lines, strict=True):
        _polyline(canvas, axes, line, style.colour, style.line - 1)


def _draw_grid(canvas: Frame, axes: _Axes, letter: int, *, every: float) -> None:
    """Draw the grid of a plot, with numbers of ``letter`` pixels at both axes unless that is 0."""
    right, bottom = axes.left + axes.width, axes.top + axes.height
    for n in range(round(1 / every) + 1):
        x, y = axes.left + round(n * every * axes.width), bottom - round(n * every * axes.height)
        cv2.line(canvas, (x, axes.top), (x, bottom), RULE, 1)
        cv2.line(canvas, (axes.left, y), (right, y), RULE, 1)
        if letter:
            told = f"{n * every:.1f}"
            size = text_width(told, letter)
            write(canvas, told, x - size // 2, bottom + 24, letter, FADED)
            write(canvas, told, axes.left - size - 12, y + letter // 3, letter, FADED)


def _polyline(canvas: Frame, axes: _Axes, precision: Floats, colour: Colour, line: int) -> None:
    """Draw one curve over the recall points."""
    points = axes.points(recall_points(), precision)
    cv2.polylines(canvas, [points], False, colour, line, cv2.LINE_AA, _SHIFT)
