"""The picture of a run's losses: each name of ``metrics.jsonl`` over the steps, in its own plot.

The loss comes first, and behind it the score of runs that validate. A faint line is what was
logged, a strong one its running mean; the scale is logarithmic where all values are above zero and
differ tenfold.

    write_loss_curves(run / "metrics.jsonl", run / "losses.png", "train image")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pmvis_core.report.drawing import (
    FADED,
    INK,
    RULE,
    Colour,
    Frame,
    blank,
    fitted,
    text_width,
    write,
)
from pmvis_core.report.page import write_picture
from pmvis_core.training.metrics_log import read_metrics

Floats = NDArray[np.float64]
SCORES = ("val_AP", "val_J")
"""By which runs tell their best weights."""
_FAINT: Colour = (165, 216, 255)
_STRONG: Colour = (28, 126, 214)
_MARGIN, _HEAD, _GAP = 40, 96, 60
_COLUMNS, _CELL_WIDTH, _CELL_HEIGHT = 3, 400, 250
_SMOOTHED = 20
"""The running mean's length is this part of the curve, at least one line."""
_MOST_POINTS = 2000
"""Lines that are drawn; of a longer file every n-th."""
_MARKED = 40
"""Points up to which each has a dot, as scores have: they are few, and a line may have one only."""
_DECADES = 10.0
_SHIFT = 4
"""Binary digits of a pixel to which lines are placed."""


def write_loss_curves(metrics: Path, picture: Path, title: str) -> None:
    """Draw what a run logged; write nothing if it logged less than two lines.

    Args:
        metrics: ``metrics.jsonl``.
        picture: PNG to write, atomically.
        title: the headline.
    """
    lines = read_metrics(metrics) if metrics.exists() else []
    if len(lines) > 1:
        write_picture(picture, draw_losses(lines, title))


def draw_losses(lines: Sequence[dict[str, float]], title: str) -> Frame:
    """Draw the curves of two lines of ``metrics.jsonl`` or more.

    Returns:
        (H, W, 3) uint8 RGB; ``loss`` comes first, then the score, the others by name.
    """
    names = sorted({name for line in lines for name in line} - {"step"})
    names.sort(key=lambda name: (name != "loss", name not in SCORES))
    rows = -(-len(names) // _COLUMNS)
    width = 2 * _MARGIN + _COLUMNS * _CELL_WIDTH + (_COLUMNS - 1) * _GAP
    canvas = blank(_HEAD + rows * (_CELL_HEIGHT + _GAP), width)
    told = f"{title}: {int(lines[-1]['step'])} steps"
    write(canvas, fitted(told, 28, width - 2 * _MARGIN), _MARGIN, 52, 28, INK, bold=True)
    span = lines[0]["step"], lines[-1]["step"]
    for number, name in enumerate(names):
        row, column = divmod(number, _COLUMNS)
        left = _MARGIN + column * (_CELL_WIDTH + _GAP)
        top = _HEAD + row * (_CELL_HEIGHT + _GAP) + 24
        shown = [(line["step"], line[name]) for line in lines if name in line]
        points = np.array(shown, np.float64)[:: -(-len(shown) // _MOST_POINTS)]
        axes = _Axes(left, top, _CELL_WIDTH, _CELL_HEIGHT - 24, span)
        _draw_cell(canvas, axes, name, points)
    return canvas


class _Axes(NamedTuple):
    """Where a plot lies on the canvas, in pixels, and the steps that it reaches over."""

    left: int
    top: int
    width: int
    height: int
    span: tuple[float, float]


def _draw_cell(canvas: Frame, axes: _Axes, name: str, points: Floats) -> None:
    """Draw one curve of (N, 2) steps and values, with its name, last value and range."""
    steps, values = points[:, 0], points[:, 1]
    smooth = _running_mean(values, max(1, len(values) // _SMOOTHED))
    told = f"{smooth[-1]:.4g}"
    right = axes.left + axes.width
    write(canvas, told, right - text_width(told, 16), axes.top - 10, 16, FADED)
    shown = fitted(name, 16, axes.width - text_width(told, 16) - 12)
    write(canvas, shown, axes.left, axes.top - 10, 16, INK)
    corner = right, axes.top + axes.height
    cv2.rectangle(canvas, (axes.left, axes.top), corner, RULE, 1)
    logarithmic = bool(values.min() > 0 and values.max() > _DECADES * values.min())
    scale = np.log10 if logarithmic else np.asarray
    low, high = (float(v) for v in (scale(values.min()), scale(values.max())))
    reach = max(high - low, 1e-12)
    first, last = axes.span
    across = (steps - first) / max(last - first, 1e-12)
    for curve, colour, line in ((values, _FAINT, 1), (smooth, _STRONG, 2)):
        up = (scale(curve) - low) / reach
        places = np.stack([axes.left + across * axes.width, corner[1] - up * axes.height], -1)
        drawn = np.rint(places * 2**_SHIFT).astype(np.int32)[:, None]
        cv2.polylines(canvas, [drawn], False, colour, line, cv2.LINE_AA, _SHIFT)
        if len(drawn) <= _MARKED:
            for x, y in drawn[:, 0].tolist():
                cv2.circle(canvas, (x, y), 3 << _SHIFT, colour, -1, cv2.LINE_AA, _SHIFT)
    kind = " (log)" if logarithmic else ""
    label = f"{values.min():.3g} to {values.max():.3g}{kind}"
    write(canvas, label, axes.left, corner[1] + 20, 14, FADED)


def _running_mean(values: Floats, length: int) -> Floats:
    """Return the mean of each value and up to ``length - 1`` before it."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    begin = np.maximum(last - length, 0)
    return np.asarray((total[last] - total[begin]) / (last - begin))
