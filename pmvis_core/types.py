"""The nouns of the house: a video, a track, and what supervises an instance.

Axes, fixed once for every docstring of pmvis: B batch, N instances, Q queries, T frames,
C channels, H and W pixels, K classes, L feature levels, M attention heads, P sampling points.
Boxes are ``xyxy`` in absolute pixels with an exclusive far edge unless a name says otherwise;
masks live as run-length encodings (``RLE``) outside the network and as tensors inside it.
Category ids are those of the target vocabulary (1-based); training labels are ``id - 1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, TypedDict


class RLE(TypedDict):
    """COCO's compressed run-length encoding: column-major runs, background first."""

    size: list[int]
    """``[height, width]`` in pixels."""
    counts: str
    """Runs as COCO's printable 6-bit variable-length code."""


Box = tuple[float, float, float, float]
"""``(x1, y1, x2, y2)`` in absolute pixels, far edge exclusive."""


class Supervision(str, Enum):
    """What is known of an instance, which decides the losses that it takes part in."""

    MASK = "mask"
    """A human mask: class, box, mask and re-identification losses."""
    BOX = "box"
    """A human box only: the same without mask losses (or with BoxInst's, by option)."""
    POINT = "point"
    """A human point only."""
    PSEUDO = "pseudo"
    """A mask labelled by a model: mask and BoxInst losses together."""


@dataclass(frozen=True)
class Category:
    """One entry of a target vocabulary."""

    id: int
    """Positive, unique in its vocabulary."""
    name: str
    """As the data set spells it (``giant_panda``)."""


@dataclass(frozen=True)
class VideoInfo:
    """A video's identity and geometry."""

    id: int
    """Unique in its file."""
    name: str
    """Folder or file name relative to the frames' root, without its suffix."""
    height: int
    """Pixels of the original frames."""
    width: int
    """Pixels of the original frames."""
    length: int
    """Number of frames."""
    file_names: tuple[str, ...] = ()
    """Frame files relative to the frames' root; empty for a video file."""


@dataclass(frozen=True)
class Track:
    """One object through one video under one category."""

    id: int
    """Unique in its video; rows of one instance under several categories have ids of their own."""
    category_id: int
    """Of the header's vocabulary."""
    score: float
    """Mean of the frame scores over the frames in which the track is present, in [0, 1]."""
    frame_scores: tuple[float | None, ...]
    """(T,) score of this category in each frame; None where the track is absent."""
    rles: tuple[RLE | None, ...]
    """(T,) mask of each frame at the video's size; None where the track is absent."""
    instance: int | None = None
    """The tracker's id: rows that share it are one object under several categories. `infer` gives
    them the same masks; `refine` may start each from a key frame of its own."""
    keyframe: int | None = None
    """Frame from which `refine` propagated; None before that stage."""
    supervision: Supervision = Supervision.PSEUDO
    """Where the masks come from."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """What the stages did to this track, by stage name."""
    quality: float | None = None
    """Agreement of the image model's masks with the propagated ones, in [0, 1], as `refine`
    measured it (`mending.Mended.quality`); None where nobody did."""

    @property
    def present(self) -> tuple[int, ...]:
        """Indices of the frames that hold a mask."""
        return tuple(t for t, rle in enumerate(self.rles) if rle is not None)


@dataclass(frozen=True)
class VideoTracks:
    """A video and all its tracks: one line of a tracks file, the unit every stage maps over."""

    video: VideoInfo
    """The video."""
    tracks: tuple[Track, ...]
    """In the order of their creation."""
    ignored: tuple[Track, ...] = ()
    """Tracks that `filter --keep-ignored` set aside: neither object nor background in training."""

    def with_tracks(self, tracks: tuple[Track, ...]) -> VideoTracks:
        """Return the same video with other tracks."""
        return replace(self, tracks=tracks)
