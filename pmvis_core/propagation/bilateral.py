"""Array arithmetic of the `flow` propagator: votes by colour and place, colour odds, guided filter.

Everything works on crops of single frames at working size. Colours are 8-bit CIE Lab, brought to
units of the vote's colour sigma by `scaled`. A remembered pixel b of weight w speaks to a pixel a
of like colour with exp(-|a - b|^2 / 2) w. Written as exp(a.b + bias(a) + bias(b)), with
bias(a) = -|a|^2 / 2 and bias(b) = log w - |b|^2 / 2, its inner loop needs no difference and no
square, which is what makes the vote affordable in numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Box = tuple[slice, slice]
"""Rows and columns of a crop."""

BINS = 24
"""Bins of each Lab channel in a colour histogram."""
REACH_STEPS = 2
"""A pixel asks the remembered pixels up to this many steps away: 5 x 5 of them."""
_DISTRUST = np.float32(0.05)
"""What is left of a remembered pixel's weight where its alignment is not trusted at all."""


@dataclass(frozen=True)
class Memory:
    """A remembered frame, aligned with the current one and padded by the vote's reach."""

    colour: Float
    """(3, h + 2 reach, w + 2 reach); see `scaled`."""
    bias: Float
    """(h + 2 reach, w + 2 reach): log weight - |colour|^2 / 2."""
    step: int
    """Pixels between the remembered pixels that are asked; the reach is twice that."""


def scaled(lab: Bytes, sigma: float) -> Float:
    """Return 8-bit Lab (h, w, 3) as (3, h, w) about zero, in units of ``sigma``."""
    planes = np.ascontiguousarray(lab.transpose(2, 0, 1)).astype(np.float32)
    planes -= np.float32(128)
    planes *= np.float32(1 / sigma)
    return planes


def remember(lab: Bytes, trust: Float, weight: float, sigma: float, step: int) -> Memory:
    """Make a frame ready to be asked.

    Args:
        lab: (h, w, 3) 8-bit Lab, aligned with the frame that will ask.
        trust: (h, w) in [0, 1], how good the alignment is.
        weight: of this memory against others.
        sigma: width of the vote in colour.
        step: pixels between the remembered pixels that are asked.
    """
    reach = REACH_STEPS * step
    colour = scaled(_padded(lab, reach), sigma)
    log_weight = np.log(np.float32(weight) * (_DISTRUST + (1 - _DISTRUST) * trust))
    bias: Float = _padded(log_weight, reach) - _half_square(colour)
    return Memory(colour, bias, step)


def add_votes(
    top: Float, bottom: Float, colour: Float, memory: Memory, probability: Float, box: Box
) -> None:
    """Let each pixel of ``box`` ask 25 remembered pixels of like colour whether it is object.

    Args:
        top: (crop) gains the sum of weight times probability.
        bottom: (crop) gains the sum of weights.
        colour: (3, h, w) of the current frame; see `scaled`.
        memory: the remembered frame.
        probability: (h, w) of the object in the remembered frame, aligned.
        box: the crop.
    """
    rows, columns = box
    step, reach = memory.step, REACH_STEPS * memory.step
    tall = slice(rows.start, rows.stop + 2 * reach)
    wide = slice(columns.start, columns.stop + 2 * reach)
    remembered = _padded(probability, reach)[tall, wide]
    planes, bias = memory.colour[:, tall, wide], memory.bias[tall, wide]
    here = colour[:, rows, columns]
    own_bias = -_half_square(here)
    height, width = own_bias.shape
    weight, product = np.empty_like(own_bias), np.empty_like(own_bias)
    steps = range(2 * REACH_STEPS + 1)
    for i, j in ((i, j) for i in steps for j in steps):
        at = (slice(i * step, i * step + height), slice(j * step, j * step + width))
        np.add(own_bias, bias[at], out=weight)
        weight -= _distance_penalty(i, j)
        for channel in range(3):
            np.multiply(here[channel], planes[channel][at], out=product)
            weight += product
        cv2.exp(weight, weight)  # twice as fast as numpy's, and half of all the time here
        bottom += weight
        weight *= remembered[at]
        top += weight


def surrounding_box(mask: NDArray[np.bool_], margin: int) -> Box | None:
    """Return the rows and columns of a mask (h, w) and ``margin`` pixels more, None if empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return None
    height, width = mask.shape
    return (
        slice(max(0, int(rows[0]) - margin), min(height, int(rows[-1]) + margin + 1)),
        slice(max(0, int(columns[0]) - margin), min(width, int(columns[-1]) + margin + 1)),
    )


def colour_bins(lab: Bytes) -> NDArray[np.intp]:
    """Return the bin (h, w) in [0, 24^3) of each 8-bit Lab pixel (h, w, 3)."""
    parts = (lab.astype(np.intp) * BINS) >> 8
    bins: NDArray[np.intp] = (parts[..., 0] * BINS + parts[..., 1]) * BINS + parts[..., 2]
    return bins


def colour_odds(lab: Bytes, probability: Float, neighbourhood: int) -> Float:
    """Learn how much each colour speaks for an object, from its mask and what surrounds it.

    Args:
        lab: (h, w, 3) 8-bit Lab of the key frame.
        probability: (h, w) of the object.
        neighbourhood: side of the square around object pixels that counts as surroundings.

    Returns:
        (24^3,) log p(colour bin | object) / p(colour bin | surroundings).
    """
    square = np.ones((neighbourhood, neighbourhood), np.uint8)
    near = cv2.dilate((probability > 0.5).astype(np.uint8), square)
    bins = colour_bins(lab)
    inside = _histogram(bins, probability)
    outside = _histogram(bins, (1 - probability) * np.asarray(near, np.float32))
    floor = np.float32(1e-4)
    odds: Float = np.log((inside + floor) / (outside + floor))
    return odds


def guided_filter(guide: Float, image: Float, radius: int, eps: float) -> Float:
    """Smooth ``image`` (h, w) without crossing the edges of ``guide`` (h, w) in [0, 1].

    He, Sun and Tang, ECCV 2010, Eqs. 5, 6 and 8, with a grey guide and windows of side
    2 ``radius`` + 1.
    """
    side = (2 * radius + 1, 2 * radius + 1)

    def mean(values: Float) -> Float:
        return np.asarray(
            cv2.boxFilter(values, -1, side, borderType=cv2.BORDER_REFLECT), np.float32
        )

    mean_guide, mean_image = mean(guide), mean(image)
    variance = mean(guide * guide) - mean_guide * mean_guide
    covariance: Float = mean(guide * image) - mean_guide * mean_image
    slope = np.asarray(covariance / (variance + np.float32(eps)), np.float32)
    return mean(slope) * guide + mean(mean_image - slope * mean_guide)


def _distance_penalty(i: int, j: int) -> np.float32:
    """Return minus the log weight of the place (i, j) of 5 x 5: a Gaussian of 0.7 reach."""
    squared = (i - REACH_STEPS) ** 2 + (j - REACH_STEPS) ** 2
    return np.float32(squared / (2 * (0.7 * REACH_STEPS) ** 2))


def _histogram(bins: NDArray[np.intp], weights: Float) -> Float:
    """Return the colour histogram (24^3,), smoothed [1 2 1], summing to 1 unless weightless."""
    cube: Float = np.bincount(bins.ravel(), weights.ravel(), BINS**3).astype(np.float32)
    for shape in ((1, BINS, BINS**2), (BINS, BINS, BINS), (BINS**2, BINS, 1)):
        rough = cube.reshape(shape)
        smooth: Float = 2 * rough
        smooth[:, 1:] += rough[:, :-1]
        smooth[:, :-1] += rough[:, 1:]
        cube = smooth.ravel()
    total = cube.sum()
    return cube / total if total > 0 else cube


def _padded(image: NDArray[Any], reach: int) -> NDArray[Any]:
    """Repeat the border of an image ``reach`` times."""
    return np.asarray(
        cv2.copyMakeBorder(image, reach, reach, reach, reach, cv2.BORDER_REPLICATE), image.dtype
    )


def _half_square(colour: Float) -> Float:
    """Return |colour|^2 / 2 (h, w) of (3, h, w)."""
    half: Float = np.float32(0.5) * np.square(colour).sum(0)
    return half
