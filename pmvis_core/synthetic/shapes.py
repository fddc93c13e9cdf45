"""What the micro-benchmark draws with: shapes, textures, backgrounds, motion, and the video look.

Everything is numpy and OpenCV on small uint8 RGB frames (H, W, 3). A shape is an 80 x 80 coverage
sprite that an affine map carries into the frame, so that one drawing serves every size and angle;
its mask is where the coverage reaches one half. Positions are pixels, x to the right, y down, and
integers are pixel centres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Points = NDArray[np.float64]
"""(P, 2) xy."""

MASK_CATEGORIES = ("disc", "triangle", "star", "plus")
"""Categories whose still images carry masks."""
BOX_CATEGORIES = ("square", "ring", "crescent")
"""Categories whose still images carry boxes only."""
STRANGERS = ("bowtie", "ell", "tee", "arch", "half", "kite")
"""Shapes of no category, some of them near one: they stand about in cluttered videos."""
OCCLUDER = "bar"
"""A narrow thing in front of everything."""

SPRITE = 80
"""Side of a sprite in pixels."""
UNIT = 33.0
"""Sprite pixels that stand for one radius."""
_SUPERSAMPLE = 4
_REACH = 1.21
"""Farthest coverage from a sprite's centre, in radii."""


@dataclass(frozen=True)
class Pose:
    """Where a sprite lies in one frame."""

    x: float
    """Centre, pixels from the left; may lie outside the frame."""
    y: float
    """Centre, pixels from the top; may lie outside the frame."""
    radius: float
    """Pixels that one radius of the sprite takes."""
    angle: float
    """Rotation in radians."""
    aspect: float
    """Width over height before the rotation, at equal area."""


@dataclass(frozen=True)
class Look:
    """How a camera renders a video: the distance between the videos' look and the stills'."""

    gamma: float
    """Exponent on intensities in [0, 1]; above one darkens."""
    gains: tuple[float, float, float]
    """Factor of each RGB channel."""
    flicker: float
    """Standard deviation of a frame's brightness factor."""
    blur: float
    """Sigma of a Gaussian blur in pixels; 0 blurs nothing."""
    streak: float
    """Length of the motion blur in pixels; up to 1 blurs nothing."""
    streak_angle: float
    """Direction of the motion blur in radians."""
    noise: float
    """Standard deviation of the pixel noise in grey levels."""


def plain_look(noise: float) -> Look:
    """Return the look of the still images: sensor noise and nothing else."""
    return Look(1.0, (1.0, 1.0, 1.0), 0.0, 0.0, 1.0, 0.0, noise)


def random_look(rng: np.random.Generator, gap: float, noise: float) -> Look:
    """Draw the look of one video.

    Args:
        rng: source of randomness.
        gap: 0 gives the look of the stills; the measured design uses 1 to 2.
        noise: standard deviation of the stills' pixel noise in grey levels.
    """
    cast = rng.uniform(-0.32, 0.12, 3) + rng.uniform(-0.15, 0.05)
    gains = np.clip(1.0 + gap * cast, 0.15, 2.0)
    return Look(
        gamma=float(np.exp(gap * rng.uniform(-0.1, 0.75))),
        gains=(float(gains[0]), float(gains[1]), float(gains[2])),
        flicker=0.12 * gap,
        blur=gap * float(rng.uniform(0.4, 1.2)),
        streak=1.0 + gap * float(rng.uniform(0.0, 4.0)),
        streak_angle=float(rng.uniform(0.0, np.pi)),
        noise=noise + gap * float(rng.uniform(0.0, 8.0)),
    )


def render_look(rng: np.random.Generator, frame: Frame, look: Look) -> Frame:
    """Return the frame (H, W, 3) as the camera of ``look`` records it: blur, light, noise."""
    if look.streak > 1.0:
        frame = cv2.filter2D(frame, -1, _streak_kernel(look.streak, look.streak_angle))  # type: ignore[assignment]
    if look.blur > 0.0:
        frame = cv2.GaussianBlur(frame, (0, 0), look.blur)  # type: ignore[assignment]
    flicker = 1.0 + look.flicker * float(rng.uniform(-1.0, 1.0))
    levels = np.linspace(0.0, 1.0, 256)[:, None] ** look.gamma * np.array(look.gains) * flicker
    light: NDArray[np.float32] = cv2.LUT(frame, (255.0 * levels).astype(np.float32)[None])  # type: ignore[assignment]
    light += np.float32(look.noise) * rng.standard_normal(frame.shape, dtype=np.float32)
    return np.rint(np.clip(light, 0, 255, out=light), out=light).astype(np.uint8)


def _streak_kernel(length: float, angle: float) -> NDArray[np.float32]:
    """Return a normalised line kernel of the given length in pixels."""
    half = int(np.ceil(length / 2.0)) + 1
    offsets = np.linspace(-0.5, 0.5, 33) * (length - 1.0)
    kernel = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    columns = np.rint(offsets * np.cos(angle)).astype(int) + half
    rows = np.rint(offsets * np.sin(angle)).astype(int) + half
    np.add.at(kernel, (rows, columns), 1.0)
    kernel /= kernel.sum()
    return kernel


@cache
def coverage(category: str) -> NDArray[np.float32]:
    """Return the sprite of a category: (80, 80) coverage in [0, 1], read-only."""
    side = SPRITE * _SUPERSAMPLE
    canvas = np.zeros((side, side), np.uint8)
    for level, outline in _outlines(category):
        pixels = (outline * UNIT + SPRITE / 2) * _SUPERSAMPLE - 0.5
        cv2.fillPoly(canvas, [np.rint(pixels * 16).astype(np.int32)], level, shift=4)
    small = cv2.resize(canvas, (SPRITE, SPRITE), interpolation=cv2.INTER_AREA)
    alpha = small.astype(np.float32) / 255.0
    alpha.setflags(write=False)
    return alpha


def _outlines(category: str) -> list[tuple[int, Points]]:
    """Return the polygons of a shape in radii, each with what it paints: 255 adds, 0 cuts."""
    star = _polygon(10, 1.17)
    star[1::2] *= 0.42
    bar = np.array([(-1.1, -0.36), (1.1, -0.36), (1.1, 0.36), (-1.1, 0.36)])
    bite = _polygon(72, 0.8) + np.array([0.5, 0.0])
    below = np.array([(-1.2, 0.0), (1.2, 0.0), (1.2, 1.2), (-1.2, 1.2)])
    shapes: dict[str, list[tuple[int, Points]]] = {
        "disc": [(255, _polygon(72, 1.0))],
        "triangle": [(255, _polygon(3, 1.2) + np.array([0.0, 0.15]))],
        "star": [(255, star)],
        "plus": [(255, bar), (255, bar[:, ::-1])],
        "square": [(255, _polygon(4, 1.2) @ _rotation(np.pi / 4).T)],
        "ring": [(255, _polygon(72, 1.0)), (0, _polygon(72, 0.5))],
        "crescent": [(255, _polygon(72, 1.05)), (0, bite)],
        "bowtie": [(255, np.array([(-1.1, -0.8), (1.1, 0.8), (1.1, -0.8), (-1.1, 0.8)]))],
        "ell": [(255, bar + np.array([0.0, 0.74])), (255, bar[:, ::-1] + np.array([-0.74, 0.0]))],
        "tee": [(255, bar + np.array([0.0, -0.74])), (255, bar[:, ::-1])],
        "arch": [(255, _polygon(72, 1.1)), (0, _polygon(72, 0.45)), (0, below)],
        "half": [(255, _polygon(72, 1.15)), (0, below)],
        "kite": [(255, np.array([(0.0, -1.15), (0.6, -0.3), (0.0, 1.15), (-0.6, -0.3)]))],
        "bar": [(255, bar * np.array([1.0, 0.25]))],
    }
    return shapes[category]


def _polygon(corners: int, radius: float) -> Points:
    """Return the corners (P, 2) of a regular polygon, the first one at the top."""
    turn = 2.0 * np.pi * np.arange(corners) / corners - np.pi / 2
    return radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)


def _rotation(angle: float) -> NDArray[np.float64]:
    """Return the 2 x 2 matrix that turns x towards y."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def texture(rng: np.random.Generator, contrast: float) -> Frame:
    """Draw a sprite's surface (80, 80, 3): two near colours in stripes, checks, dots or blobs.

    Args:
        rng: source of randomness.
        contrast: standard deviation of the difference of the two colours in grey levels.
    """
    hsv = np.array([[[rng.integers(0, 180), rng.integers(110, 256), rng.integers(110, 256)]]])
    first = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB).reshape(3).astype(np.float32)
    second = np.clip(first + rng.normal(0.0, contrast, 3), 0, 255)
    weight = _pattern(rng)[..., None]
    return np.rint(first * (1.0 - weight) + second * weight).astype(np.uint8)


def _pattern(rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the share (80, 80) of the second colour."""
    kind = int(rng.integers(4))
    if kind == 3:
        coarse = rng.standard_normal((8, 8)).astype(np.float32)
        smooth = cv2.resize(coarse, (SPRITE, SPRITE), interpolation=cv2.INTER_CUBIC)
        return _soft_step(smooth.astype(np.float32, copy=False))
    period, turn = rng.uniform(10.0, 26.0), rng.uniform(0.0, np.pi)
    grid = np.mgrid[:SPRITE, :SPRITE].reshape(2, -1).astype(np.float64)
    u, v = np.sin(2.0 * np.pi / period * (_rotation(turn) @ grid)).reshape(2, SPRITE, SPRITE)
    return _soft_step((u, u * v, u + v - 0.8)[kind])


def _soft_step(value: NDArray[np.floating]) -> NDArray[np.float64]:
    """Map a field to [0, 1] with a steep slope at zero."""
    return np.clip(0.5 + 2.0 * value.astype(np.float64), 0.0, 1.0)


def background(rng: np.random.Generator, height: int, width: int, marks: int) -> Frame:
    """Draw a background (H, W, 3): a soft pale colour field, grain, and thin clutter.

    Args:
        rng: source of randomness.
        height: pixels.
        width: pixels.
        marks: number of lines, dots and arcs.
    """
    grid = rng.uniform(45.0, 210.0, (4, 5, 3)).astype(np.float32)
    field = cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    grey = field.mean(axis=2, keepdims=True)
    coarse = rng.normal(0.0, 12.0, (-(-height // 3), -(-width // 3))).astype(np.float32)
    grain = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)[..., None]
    canvas: Frame = np.clip(grey + 0.55 * (field - grey) + grain, 0, 255).astype(np.uint8)
    for _ in range(marks):
        _mark(rng, canvas)
    return canvas


def _mark(rng: np.random.Generator, canvas: Frame) -> None:
    """Draw one thin line, dot or arc of any colour."""
    height, width = canvas.shape[:2]
    colour = [int(c) for c in rng.integers(20, 236, 3)]
    x, y = int(rng.integers(width)), int(rng.integers(height))
    kind = int(rng.integers(3))
    if kind == 0:
        end = (int(rng.integers(width)), int(rng.integers(height)))
        cv2.line(canvas, (x, y), end, colour, 1, cv2.LINE_AA)
    elif kind == 1:
        cv2.circle(canvas, (x, y), int(rng.integers(1, 4)), colour, -1, cv2.LINE_AA)
    else:
        axes = (int(rng.integers(5, 20)), int(rng.integers(5, 20)))
        start = int(rng.integers(360))
        cv2.ellipse(canvas, (x, y), axes, 0, start, start + 120, colour, 1, cv2.LINE_AA)


def full_area(category: str, pose: Pose) -> float:
    """Return the pixels a shape would cover if nothing hid it and the frame had no border."""
    return float(coverage(category).sum()) * (pose.radius / UNIT) ** 2


def visible_masks(
    categories: Sequence[str], poses: Sequence[Pose], height: int, width: int
) -> list[Mask]:
    """Return the visible part (H, W) of each shape; a later shape lies in front of an earlier."""
    hidden = np.zeros((height, width), bool)
    masks: list[Mask] = []
    for category, pose in zip(reversed(categories), reversed(poses), strict=True):
        mask = np.zeros((height, width), bool)
        if placed := _place(coverage(category), pose, height, width):
            window, alpha = placed
            mask[window] = alpha >= 0.5
        masks.append(mask & ~hidden)
        hidden |= mask
    return masks[::-1]


def paint(canvas: Frame, category: str, surface: Frame, pose: Pose) -> None:
    """Blend a textured shape into the canvas (H, W, 3), in place."""
    height, width = canvas.shape[:2]
    placed = _place(coverage(category), pose, height, width)
    if placed is None:
        return
    window, alpha = placed
    colours = _warp(surface, pose, window, cv2.BORDER_REPLICATE)
    under = canvas[window].astype(np.float32)
    canvas[window] = np.rint(under + alpha[..., None] * (colours - under)).astype(np.uint8)


def _place(
    sprite: NDArray[np.float32], pose: Pose, height: int, width: int
) -> tuple[tuple[slice, slice], NDArray[np.float32]] | None:
    """Return the window of the frame that a sprite touches and its coverage there."""
    reach = _REACH * pose.radius * max(pose.aspect, 1.0 / pose.aspect) ** 0.5 + 2.0
    top, bottom = max(int(pose.y - reach), 0), min(int(np.ceil(pose.y + reach)) + 1, height)
    left, right = max(int(pose.x - reach), 0), min(int(np.ceil(pose.x + reach)) + 1, width)
    if top >= bottom or left >= right:
        return None
    window = (slice(top, bottom), slice(left, right))
    return window, _warp(sprite, pose, window, cv2.BORDER_CONSTANT)


def _warp(
    sprite: NDArray[np.uint8] | NDArray[np.float32],
    pose: Pose,
    window: tuple[slice, slice],
    border: int,
) -> NDArray[np.float32]:
    """Carry a sprite into a window of the frame."""
    stretch = np.array([pose.aspect**0.5, pose.aspect**-0.5])
    matrix = _rotation(pose.angle) * (stretch * pose.radius / UNIT)
    centre = np.array([pose.x - window[1].start, pose.y - window[0].start])
    offset = centre - matrix @ np.full(2, (SPRITE - 1) / 2)
    size = (window[1].stop - window[1].start, window[0].stop - window[0].start)
    affine = np.column_stack([matrix, offset])
    warped = cv2.warpAffine(sprite, affine, size, flags=cv2.INTER_LINEAR, borderMode=border)
    return warped.astype(np.float32, copy=False)
