"""Where an object went that moved farther than optical flow can follow.

A coarse-to-fine flow loses what moves by more than its own size: at the scales that could bridge
the way, the object is no longer there to be seen. Its colours, weighted by its mask, still fit one
place of the next frame better than any other. `best_shift` finds that place by exhaustive search,
for a few correlations of a shrunk crop; `likeness` and the mass of the mask that lands on its like
say whether the flow or the shift explains the object better. Settled by `FlowSweep`.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from pmvis_core.propagation.bilateral import Bytes, Float, surrounding_box

_LIKE = np.float32(30)
"""Colour difference (8-bit Lab units) at which a pixel counts exp(-1/2) as explained."""
_TEMPLATE_SIDE = 12
"""The search runs at a size at which the object's side is about so many pixels, or more."""
_LEAST_SCALE = 4
"""The search shrinks frames by at most this."""
_REACH, _REACH_PIXELS = 1.5, 16
"""The search goes this many sides of the object, and so many pixels more, in each direction."""
_DISTANCE_COST = np.float32(500)
"""Squared colour difference that a shift by the object's own side must save."""


def likeness(aligned: Bytes, now: Bytes) -> Float:
    """Return how much each pixel of two 8-bit Lab images (h, w, 3) is alike: (h, w) in [0, 1]."""
    difference = np.square(aligned.astype(np.float32) - now).sum(-1)
    like: Float = np.exp(difference / (-2 * _LIKE * _LIKE))
    return like


def best_shift(before: Bytes, now: Bytes, probability: Float) -> tuple[int, int] | None:
    """Return the displacement of an object from one frame to the next that fits its colours best.

    It minimises the mean squared colour difference, weighted by the mask, plus a cost that grows
    with the squared length of the way. At least half of the object has to stay in the frame.

    Args:
        before: (h, w, 3) 8-bit Lab of the frame that the object is known in.
        now: (h, w, 3) 8-bit Lab of the other frame.
        probability: (h, w) of the object in ``before``.

    Returns:
        (x, y) in pixels, in steps of the search's scale; None where no mask is left to search with.
    """
    side = float(np.sqrt(probability.sum()))
    scale = int(np.clip(side / _TEMPLATE_SIDE, 1, _LEAST_SCALE))
    weights = _shrunk(probability, scale)
    box = surrounding_box(weights > 0.3, 0)
    if box is None:
        return None
    reach = int((_REACH * side + _REACH_PIXELS) / scale)
    rows, columns = (slice(part.start, part.stop + 2 * reach) for part in box)
    template, weights = _shrunk(before, scale)[box], weights[box]
    seen = _shrunk(now, scale)
    image = _framed(seen, reach)[rows, columns]
    inside = _framed(np.ones(seen.shape[:2], np.float32), reach)[rows, columns]

    cost = _mean_difference(image, inside, template, weights)
    y, x = np.indices(cost.shape, dtype=np.float32) - np.float32(reach)
    cost += _DISTANCE_COST * np.float32((scale / side) ** 2) * (x * x + y * y)
    row, column = np.unravel_index(int(cost.argmin()), cost.shape)
    return (int(column) - reach) * scale, (int(row) - reach) * scale


def drawn_to(flow: Float, shift: tuple[int, int], place: Float) -> Float:
    """Return ``flow`` (h, w, 2), replaced by the way back of ``shift`` around ``place`` (h, w)."""
    square = np.ones((9, 9), np.uint8)
    near = cv2.dilate((place > 0.3).astype(np.float32), square)
    near = cv2.GaussianBlur(near, (0, 0), 2)[..., None]
    drawn: Float = flow * (1 - near) - np.array(shift, np.float32) * near
    return drawn


def _mean_difference(image: Float, inside: Float, template: Float, weights: Float) -> Float:
    """Return the weighted mean of |image - template|^2 over what lies inside, at every place.

    Infinite where less than half of the weights lie inside. With w for the weights, it is
    the correlation of |image|^2 with w, less twice that of the image with w template, plus that of
    the inside with w |template|^2.
    """

    def correlate(a: Float, b: Float) -> Float:
        return np.asarray(cv2.matchTemplate(a, b, cv2.TM_CCORR), np.float32)

    visible = correlate(inside, weights)
    planes = np.repeat(weights[..., None], 3, -1)
    cost = correlate(image * image, planes) - 2 * correlate(image, template * planes)
    cost += correlate(inside, weights * np.square(template).sum(-1))
    cost /= np.maximum(visible, np.float32(1e-3))
    cost[visible < 0.5 * weights.sum()] = np.inf
    return cost


def _shrunk(image: NDArray[np.uint8] | Float, scale: int) -> Float:
    """Shrink an image by averaging areas; colours are brought about zero."""
    height, width = image.shape[:2]
    size = (max(1, width // scale), max(1, height // scale))
    small = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.float32)
    return small - np.float32(128) if image.ndim == 3 else small


def _framed(image: Float, reach: int) -> Float:
    """Put zeros around an image."""
    framed = cv2.copyMakeBorder(image, reach, reach, reach, reach, cv2.BORDER_CONSTANT, value=0)
    return np.asarray(framed, np.float32)
