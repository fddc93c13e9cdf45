"""Brushes of `page`: colours that tell tracks apart, text, masks with contours, and labels.

A canvas is an RGB uint8 array (H, W, 3) that is drawn on in place; sizes are in its pixels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
Colour = tuple[int, int, int]
"""Red, green, blue, 0 to 255."""
Spot = tuple[int, int, int, int]
"""``(x1, y1, x2, y2)`` in pixels of a canvas, far edge exclusive."""

INK: Colour = (33, 37, 41)
FADED: Colour = (134, 142, 150)
RULE: Colour = (222, 226, 230)
PAPER: Colour = (255, 255, 255)
ACCENT: Colour = (245, 159, 0)
GREY: Colour = (206, 212, 218)
NIGHT: Colour = (18, 20, 23)

_PALETTE: tuple[Colour, ...] = (
    (255, 107, 107),
    (77, 171, 247),
    (105, 219, 124),
    (255, 212, 59),
    (218, 119, 242),
    (56, 217, 169),
    (255, 169, 77),
    (151, 117, 250),
    (169, 227, 75),
    (247, 131, 172),
    (102, 217, 232),
    (224, 175, 130),
)
_FONT_HEIGHT = 30.0
"""Pixels of line height that OpenCV's font scale 1 stands for."""


def track_colour(number: int) -> Colour:
    """Return the colour of a track's number: a palette of 12 first, then ever new hues."""
    if 0 <= number < len(_PALETTE):
        return _PALETTE[number]
    hue = (number * 0.6180339887) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.6, 0.98)
    return round(red * 255), round(green * 255), round(blue * 255)


def blank(height: int, width: int, colour: Colour = PAPER) -> Frame:
    """Return a canvas (height, width, 3) of one colour."""
    return np.full((height, width, 3), colour, np.uint8)


def text_width(text: str, size: float, bold: bool = False) -> int:
    """Return the pixels that a line of text takes."""
    scale = size / _FONT_HEIGHT
    return int(cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 2 if bold else 1)[0][0])


def write(
    canvas: Frame, text: str, x: int, y: int, size: float, colour: Colour = INK, bold: bool = False
) -> None:
    """Write a line of text, ``x`` from the left and with its baseline at ``y``."""
    scale, weight = size / _FONT_HEIGHT, 2 if bold else 1
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(canvas, text, (x, y), font, scale, colour, weight, cv2.LINE_AA)


def fitted(text: str, size: float, width: int) -> str:
    """Shorten a text in its middle so that it takes at most ``width`` pixels."""
    if text_width(text, size) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        short = text[: (kept + 1) // 2] + ".." + text[len(text) - kept // 2 :]
        if text_width(short, size) <= width:
            return short
    return text[:1]


def enlarge(frame: Frame, height: int, width: int) -> Frame:
    """Resize a frame, smooth both ways."""
    shrinks = height < frame.shape[0]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(frame, (width, height), interpolation=method).astype(np.uint8, copy=False)


def enlarge_mask(mask: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize a mask (H, W) of zeros and ones; where it grows, the steps of its edge are rounded."""
    factor = height / mask.shape[0]
    method = cv2.INTER_AREA if factor < 1.0 else cv2.INTER_LINEAR
    soft = cv2.resize(mask.astype(np.float32), (width, height), interpolation=method)
    if factor > 1.0:
        soft = cv2.GaussianBlur(soft, (0, 0), 0.5 * factor)
    return (soft >= 0.5).astype(np.uint8)


def tint(
    canvas: Frame, mask: NDArray[np.uint8], colour: Colour, strength: float, line: int
) -> None:
    """Tint the pixels of a mask (H, W) of the canvas's size and draw its outline."""
    x, y, w, h = cv2.boundingRect(mask)
    part, inside = canvas[y : y + h, x : x + w], mask[y : y + h, x : x + w]
    mixed = cv2.addWeighted(part, 1.0 - strength, blank(h, w, colour), strength, 0.0)
    np.copyto(part, mixed.astype(np.uint8, copy=False), where=inside[..., None] > 0)
    outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, outlines, -1, colour, line, cv2.LINE_AA)


def frame_border(canvas: Frame, colour: Colour, line: int) -> None:
    """Draw a border along the inner edge of a canvas."""
    height, width = canvas.shape[:2]
    cv2.rectangle(canvas, (0, 0), (width - 1, height - 1), colour, 2 * line - 1)


@dataclass(frozen=True)
class Tag:
    """A label to be put beside an object."""

    text: str
    """What it says."""
    colour: Colour
    """Its background."""
    box: Spot
    """Of the object on the canvas."""


def place_tags(canvas: Frame, tags: Sequence[Tag], size: float) -> None:
    """Draw labels at their objects; one that finds no place of its own is left out.

    Args:
        canvas: drawn on in place.
        tags: the first one chooses its place first.
        size: of the text.
    """
    taken: list[Spot] = []
    for tag in tags:
        others = [other.box for other in tags if other is not tag]
        spot = _free_spot(canvas, tag, size, taken, others)
        if any(_common(spot, other) for other in taken):
            continue
        taken.append(spot)
        _draw_tag(canvas, tag, spot, size)


def _free_spot(
    canvas: Frame, tag: Tag, size: float, taken: Sequence[Spot], others: Sequence[Spot]
) -> Spot:
    """Return the place near the object that hides least: of labels, others, itself."""
    high, wide = canvas.shape[:2]
    pad = max(2, round(size * 0.3))
    width, height = text_width(tag.text, size) + 2 * pad, round(size) + pad
    x1, y1, x2, y2 = tag.box
    middle, centre = (x1 + x2 - width) // 2, (y1 + y2 - height) // 2
    corners = [(middle, y1 - height - 2), (middle, y2 + 2), (x1 - width - 2, centre)]
    corners += [(x2 + 2, centre), (middle, y1 + 2), (middle, y2 - height - 2), (middle, centre)]
    spots: list[Spot] = []
    for x, y in corners:
        left, top = min(max(x, 1), max(wide - width - 1, 1)), min(max(y, 1), high - height - 1)
        spots.append((left, top, left + width, top + height))
    prices = [(10, spot) for spot in taken] + [(2, spot) for spot in others] + [(1, tag.box)]
    costs = [sum(price * _common(spot, other) for price, other in prices) for spot in spots]
    return spots[costs.index(min(costs))]


def _common(a: Spot, b: Spot) -> int:
    """Return the pixels that two boxes share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _draw_tag(canvas: Frame, tag: Tag, spot: Spot, size: float) -> None:
    """Draw a label with rounded corners and a text that can be read on its colour."""
    x1, y1, x2, y2 = spot
    under = canvas[y1:y2, x1:x2]
    share = 0.92 * _rounded(under.shape[0], under.shape[1], max(2, round(size * 0.22)))[..., None]
    under[:] = np.rint(under * (1.0 - share) + np.array(tag.colour) * share).astype(np.uint8)
    pad = max(2, round(size * 0.3))
    luminance = float(np.dot(tag.colour, (0.299, 0.587, 0.114)))
    ink = INK if luminance > 120 else PAPER
    write(canvas, tag.text, x1 + pad, y2 - round(size * 0.32), size, ink)


def _rounded(height: int, width: int, radius: int) -> NDArray[np.float64]:
    """Return the coverage (height, width) of a rectangle with rounded corners."""
    shape = np.zeros((height, width), np.uint8)
    right, bottom = width - 1 - radius, height - 1 - radius
    cv2.rectangle(shape, (radius, 0), (right, height - 1), 255, -1)
    cv2.rectangle(shape, (0, radius), (width - 1, bottom), 255, -1)
    for x in (radius, right):
        for y in (radius, bottom):
            cv2.circle(shape, (x, y), radius, 255, -1, cv2.LINE_AA)
    return shape / 255.0
