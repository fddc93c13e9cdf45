"""What the official evaluators fix: thresholds, limits, and the groups of objects.

``ytvis`` is YTVOSeval of YouTube-VIS 2019 (Yang et al., Video Instance Segmentation, ICCV 2019);
``ovis`` adds groups by occlusion (Qi et al., Occluded Video Instance Segmentation, IJCV 2022).
The letters of array axes: T IoU thresholds, R recall points, K categories, A area groups,
O occlusion groups, S = A x O with areas slowest, M limits on the number of predictions.

    groups_of("ovis").shape == (4, 4)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pmvis_core.errors import UsageError

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

PROTOCOLS = ("ytvis", "ovis")
MAX_DETECTIONS = (1, 10, 100)


class Range(NamedTuple):
    """A group of objects, by mean area in pixels or by occlusion; both ends belong to it."""

    name: str
    low: float
    high: float


AREAS = (
    Range("all", 0.0, 1e5**2),
    Range("small", 0.0, 128.0**2),
    Range("medium", 128.0**2, 256.0**2),
    Range("large", 256.0**2, 1e5**2),
)
OCCLUSIONS = (
    Range("all", 0.0, 1.0),
    Range("light", 0.0, 0.25),
    Range("medium", 0.25, 0.5),
    Range("heavy", 0.5, 1.0),
)
OCCLUSION_LEVELS = (
    ("no_occlusion", 0.0),
    ("slight_occlusion", 0.25),
    ("severe_occlusion", 0.75),
)


class Groups(NamedTuple):
    """The area and occlusion groups of a protocol; S pairs of them, area slowest."""

    areas: tuple[Range, ...]
    occlusions: tuple[Range, ...]

    @property
    def number(self) -> int:
        """S."""
        return len(self.areas) * len(self.occlusions)

    @property
    def shape(self) -> tuple[int, ...]:
        """(A,) where there is but one occlusion group, else (A, O)."""
        both = (len(self.areas), len(self.occlusions))
        return both if self.by_occlusion else both[:1]

    @property
    def by_occlusion(self) -> bool:
        """Whether there are occlusion groups."""
        return len(self.occlusions) > 1

    def outside_areas(self, values: Floats) -> Flags:
        """Return (S, N): whether mean areas (N,) lie outside each group."""
        return np.repeat(_outside(self.areas, values), len(self.occlusions), axis=0)

    def outside_occlusions(self, values: Floats) -> Flags:
        """Return (S, N): whether occlusions (N,) lie outside each group."""
        return np.tile(_outside(self.occlusions, values), (len(self.areas), 1))


def groups_of(protocol: str) -> Groups:
    """Return the groups of a protocol.

    Raises:
        UsageError: there is no such protocol.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"protocol is `{protocol}`, expected `ytvis` or `ovis`")
    return Groups(AREAS, OCCLUSIONS if protocol == "ovis" else OCCLUSIONS[:1])


def iou_thresholds() -> Floats:
    """Return (T=10,) 0.50 to 0.95; computed as officially, so one of them is 0.8999999999999999."""
    return np.linspace(0.5, 0.95, 10)


def recall_points() -> Floats:
    """Return (R=101,) 0 to 1; some are not the double nearest to a hundredth."""
    return np.linspace(0.0, 1.0, 101)


def _outside(ranges: Sequence[Range], values: Floats) -> Flags:
    """Return (len(ranges), N): whether values (N,) lie outside each range, ends being inside."""
    return np.array([(values < r.low) | (values > r.high) for r in ranges], dtype=bool)
