"""A track while `refine` mends it: masks before and after, their agreement, contested pixels.

The image model and the propagation see an object independently: one frame by frame, the other from
the key frame outwards, to both ends of the video. Where they tell the same story, the track can be
trusted; `Mended.quality` says how far they do. This goes beyond PM-VIS+, whose filters (PScore,
TopK; section III-D) know the image model's scores only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pmvis_core import masks
from pmvis_core.propagation.bilateral import Box
from pmvis_core.types import RLE, VideoInfo

Patch = tuple[Box, NDArray[np.uint8]]
"""A probability map cut to its mask: the place, and probability times 254 (own masks count 255)."""


@dataclass
class Mended:
    """What is propagated once: a key frame and the masks that rows share."""

    key: int
    """Key frame."""
    own: tuple[RLE | None, ...]
    """(T,) masks before refinement."""
    instance: object
    """Equal for objects that are the same thing and so never compete for pixels."""
    score: float = 0.0
    """Highest score of its rows."""
    rles: list[RLE | None] = field(default_factory=list)
    """(T,) result."""
    confidence: list[float | None] = field(default_factory=list)
    """(T,) mean probability inside the mask; 1 where the mask is the track's own."""
    patches: dict[int, Patch] = field(default_factory=dict)
    """Probabilities by frame; kept only where pixels are contested by `argmax`."""
    agreement: dict[int, float] = field(default_factory=dict)
    """IoU of the propagated with the own mask, by frame, before snapping."""
    propagated: set[int] = field(default_factory=set)
    """Frames that propagation reached with a mask, before snapping and gates."""
    snapped: set[int] = field(default_factory=set)
    """Frames that kept the own mask."""
    gated: set[int] = field(default_factory=set)
    """Frames that a gate took out."""

    def __post_init__(self) -> None:
        """Put the key mask, verbatim, into an otherwise empty result."""
        self.rles = [None] * len(self.own)
        self.confidence = [None] * len(self.own)
        self.keep_own(self.key)

    def keep_own(self, t: int) -> RLE:
        """Take and return the own mask of frame ``t``."""
        rle = self.own[t]
        assert rle is not None, "only frames with an own mask are kept"
        self.rles[t], self.confidence[t] = rle, 1.0
        return rle

    def take_out(self, t: int) -> None:
        """Make the object absent in frame ``t``."""
        self.rles[t] = self.confidence[t] = None

    def gate(self, t: int) -> None:
        """Take out a doubtful frame, which holds a mask."""
        self.take_out(t)
        self.gated.add(t)

    def gate_area_jumps(self, factor: float) -> None:
        """Walk away from the key frame and take out frames whose area jumps."""
        for order in (range(self.key, len(self.rles)), range(self.key, -1, -1)):
            last = 0
            for t in order:
                rle = self.rles[t]
                area = 0 if rle is None else masks.area(rle)
                if t == self.key or t in self.snapped or last / factor <= area <= last * factor:
                    last = area
                elif rle is not None:
                    self.gate(t)

    def quality(self) -> float:
        """Return how far own and propagated masks agree, in [0, 1], to both sides of the key frame.

        On each side the mean IoU over the frames in which either is present, 0 where one alone is;
        then the mean over the sides that have such a frame, so that a long side does not hide a
        short one. With neither (the object is seen in its key frame and leaves at once) nothing
        speaks for the track but one mask: 0, unless the video has no other frame: 1.
        """
        sides = [
            [self.agreement.get(t, 0.0) for t in side if t in self.propagated or self.own[t]]
            for side in (range(self.key), range(self.key + 1, len(self.own)))
        ]
        means = [sum(side) / len(side) for side in sides if side]
        return sum(means) / len(means) if means else float(len(self.own) == 1)


def separate(objects: Sequence[Mended], video: VideoInfo, overlap: str, min_area: int) -> None:
    """Give each contested pixel to one instance.

    `argmax`: to the largest probability (own masks are certain), ties to the higher score;
    `score`: to the higher score. Then ties go to the earlier row.
    """
    order = sorted(range(len(objects)), key=lambda i: (objects[i].score, -i))
    names: dict[object, int] = {}
    instance = [names.setdefault(item.instance, len(names) + 1) for item in objects]
    for t in range(video.length):
        strongest = np.zeros((video.height, video.width), np.uint8)
        winner = np.zeros((video.height, video.width), np.int32)
        shapes: dict[int, NDArray[np.uint8]] = {}
        for i in order:
            rle = objects[i].rles[t]
            if rle is not None:
                shapes[i] = masks.decode(rle)
                strength = _strength(objects[i], t, shapes[i], overlap)
                wins = (shapes[i] != 0) & (strength >= strongest)
                strongest[wins], winner[wins] = strength[wins], instance[i]
        for i, shape in shapes.items():
            left = shape * (winner == instance[i])
            if int(left.sum()) < min_area:
                objects[i].take_out(t)
            elif int(left.sum()) < int(shape.sum()):
                objects[i].rles[t] = masks.encode(left)


def _strength(item: Mended, t: int, shape: NDArray[np.uint8], overlap: str) -> NDArray[np.uint8]:
    """Return how strongly (H, W) an object claims the pixels of its mask in frame ``t``."""
    out = np.full(shape.shape, 255, np.uint8)
    if overlap == "argmax" and t in item.patches:
        place, values = item.patches[t]
        out[place] = values
    return out
