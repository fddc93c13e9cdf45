"""Smooth motion of the layers of a pseudo-clip: affine maps and thin plates, and changes of colour.

A motion says, for each pixel of a frame, where it comes from at rest; it is the identity in frame
0. Bends are thin-plate splines through a grid of displaced points: they are linear in the
displacements, so one matrix serves all. A change of colour is one affine map of RGB, whatever it is
made of (brightness, contrast, saturation, hue).

    motion = draw_motion(rng, reach, frames=5, side_px=465, pivot=(232.0, 232.0))
    origin = motion.origin(3, at_rest)      # (H, W, 2) x y
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float32]
"""(H, W, 2) x y in pixels, centres on integers as OpenCV has them."""

_CONTROLS = 4
"""Points of the thin plate along a side."""
_FINE = 33
"""Points along a side at which it is computed; between them it is linear."""
_DRIFT = 0.7
"""Share of a motion's reach that is steady drift; the rest is drawn anew in every frame."""
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Reach:
    """How far a motion may go within a clip, to either side."""

    rotate_deg: float
    """Degrees."""
    shift: float
    """Fraction of the frame's side, along each axis."""
    scale: float
    """Enlarges or shrinks by up to this fraction."""
    shear_deg: float
    """Degrees."""
    bend: float
    """Displacement of a thin plate's points, as a fraction of the frame's side."""


@dataclass(frozen=True)
class Motion:
    """Where the pixels of a clip's frames come from."""

    matrices: NDArray[np.float64]
    """(T, 2, 2)."""
    shifts: NDArray[np.float64]
    """(T, 2) x y in pixels."""
    bends: NDArray[np.float64]
    """(T, points, 2) displacements of the thin plate in pixels."""
    pivot: tuple[float, float]
    """x y in pixels; what the matrices turn about."""

    def origin(self, t: int, points: Points) -> Points:
        """Return where the frame's pixels at ``points``, (H, W, 2), were at rest."""
        pivot = np.asarray(self.pivot)
        centred = points + _bent(self.bends[t], points.shape[:2]) - pivot
        moved = centred @ self.matrices[t].T + (self.shifts[t] + pivot)
        return np.asarray(moved, np.float32)


def draw_motion(
    rng: np.random.Generator,
    reach: Reach,
    frames: int,
    side_px: int,
    pivot: tuple[float, float],
) -> Motion:
    """Draw a motion that begins at rest.

    Args:
        rng: its state is all that the result depends on.
        reach: how far it may go.
        frames: T.
        side_px: side of the frames.
        pivot: x y in pixels.
    """
    path = _draw_path(rng, frames, 6 + 2 * _CONTROLS**2)
    angles = np.deg2rad(path[:, :2] * (reach.rotate_deg, reach.shear_deg))
    scales = (1 + reach.scale) ** path[:, 2]
    cos, sin, lean = np.cos(angles[:, 0]), np.sin(angles[:, 0]), np.tan(angles[:, 1])
    turned = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    sheared = np.eye(2) + lean[:, None, None] * np.array([[0.0, 1.0], [0.0, 0.0]])
    shifts = path[:, 3:5] * (reach.shift * side_px)
    bends = path[:, 6:].reshape(frames, -1, 2) * (reach.bend * side_px)
    return Motion(scales[:, None, None] * turned @ sheared, shifts, bends, pivot)


def _draw_path(rng: np.random.Generator, frames: int, numbers: int) -> NDArray[np.float64]:
    """Return (T, numbers) in -1..1, zero at first, then a drift with some unsteadiness."""
    drift = np.linspace(0, 1, frames)[:, None] * rng.uniform(-1, 1, numbers)
    unsteady = rng.uniform(-1, 1, (frames, numbers))
    unsteady[0] = 0
    return np.asarray(_DRIFT * drift + (1 - _DRIFT) * unsteady)


def _bent(displacements: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float32]:
    """Return the (H, W, 2) field of a thin plate through displaced points."""
    fine = (_thin_plate() @ displacements).astype(np.float32).reshape(_FINE, _FINE, 2)
    return np.asarray(cv2.resize(fine, size[::-1], interpolation=cv2.INTER_LINEAR))


@functools.lru_cache(maxsize=1)
def _thin_plate() -> NDArray[np.float64]:
    """Return the (fine points, points) matrix from displacements to the field (Bookstein, 1989)."""
    knots, fine = _grid(_CONTROLS), _grid(_FINE)
    system = np.zeros((len(knots) + 3, len(knots) + 3))
    system[: len(knots), : len(knots)] = _kernel(knots, knots)
    system[: len(knots), len(knots) :] = _plane(knots)
    system[len(knots) :, : len(knots)] = _plane(knots).T
    weights = np.linalg.inv(system)[:, : len(knots)]
    return np.asarray(np.concatenate([_kernel(fine, knots), _plane(fine)], 1) @ weights)


def _grid(side: int) -> NDArray[np.float64]:
    """Return (side^2, 2) points of the unit square."""
    steps = np.linspace(0, 1, side)
    return np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)


def _kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return r^2 log r^2 of all pairs of points."""
    squared = ((a[:, None] - b[None]) ** 2).sum(-1)
    return np.asarray(squared * np.log(np.maximum(squared, 1e-300)))


def _plane(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1, x, y of points."""
    return np.concatenate([np.ones((len(points), 1)), points], 1)


def colour_map(
    brightness: float, contrast: float, saturation: float, hue: float, mean: Sequence[float]
) -> NDArray[np.float64]:
    """Return the (3, 4) affine map of RGB that changes colours in this order.

    Args:
        brightness: factor on all values.
        contrast: factor on the distance from the mean's grey.
        saturation: factor on the distance from each pixel's grey; 0 leaves no colour.
        hue: turn about the grey axis, in turns.
        mean: mean RGB of the picture.
    """
    grey = np.tile(np.asarray(_LUMA), (3, 1))
    matrix = brightness * np.eye(3)
    offset = np.full(3, (1 - contrast) * brightness * float(np.dot(_LUMA, mean)))
    matrix = (saturation * np.eye(3) + (1 - saturation) * grey) @ (contrast * matrix)
    turn = _hue_turn(hue)
    # Grey is a fixed point of saturation and hue, and so is the offset.
    return np.concatenate([turn @ matrix, offset[:, None]], 1)


def _hue_turn(turns: float) -> NDArray[np.float64]:
    """Return the rotation of RGB about its grey axis."""
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    axis = np.full((3, 3), 1 / 3)
    across = np.array([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    return np.asarray(cos * np.eye(3) + (1 - cos) * axis + sin * across)
