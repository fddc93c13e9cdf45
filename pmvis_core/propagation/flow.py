"""Carrying a mask from its key frame through a video: the protocol, and `flow`, without weights.

PM-VIS+ (Sec. III-C) tracks the best-scored mask of an instance to both ends of the video with
DeAOT. A `Propagator` is anything that can do so; the stage `pmvis_core.refine` drives it.
`FlowPropagator` is the one that needs no weights. It keeps DeAOT's idea, a long-term memory (the
key frame) beside a short-term one (the frame before) and a local search window, with features
made by hand: both memories are aligned with the current frame by DIS optical flow (Kroeger et
al., ECCV 2016), then every pixel takes a bilateral vote of the 25 remembered pixels around its
place; a colour model decides along the edge and a guided filter (He et al., ECCV 2010) settles it.

It is a working fallback, not a substitute for a trained network: it follows objects that move
moderately and loses them behind occluders. `tests/benchmarks/bench_refine.py` prints how well.

    propagation = FlowPropagator().open(frames, VideoInfo(1, "clip", 480, 854, 20))
    sweep = propagation.sweep()
    sweep.advance(4)
    sweep.add(0, mask)
    predictions = sweep.advance(5)  # {0: Prediction}
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from pmvis_core.propagation.bilateral import (
    Box,
    Bytes,
    Float,
    Memory,
    add_votes,
    colour_bins,
    colour_odds,
    guided_filter,
    remember,
    scaled,
    surrounding_box,
)
from pmvis_core.propagation.frame_cache import BoundedCache, Frames
from pmvis_core.types import VideoInfo


class Prediction(Protocol):
    """What a propagator believes of one object in one frame."""

    @property
    def mask(self) -> Bytes:
        """(H, W) uint8: 1 where the object is, at the video's size."""
        ...

    @property
    def probability(self) -> Float:
        """(H, W) float32 in [0, 1]; where objects compete, a likely pixel may be another's."""
        ...

    @property
    def confidence(self) -> float:
        """Mean probability inside the mask, in [0, 1]; 0 where the mask is empty."""
        ...


@dataclass(frozen=True)
class SoftMask:
    """A prediction of an object that competes with none: its mask is what is likelier than not."""

    probability: Float
    """(H, W) float32 in [0, 1] at the video's size."""

    @property
    def mask(self) -> Bytes:
        """(H, W) uint8: 1 where the object is."""
        return (self.probability > 0.5).astype(np.uint8)

    @property
    def confidence(self) -> float:
        """Mean probability inside the mask, in [0, 1]; 0 where the mask is empty."""
        inside = self.probability[self.mask != 0]
        return float(inside.mean(dtype=np.float64)) if inside.size else 0.0


class Sweep(Protocol):
    """One pass through a video in one direction, with fresh memory."""

    def advance(self, t: int) -> dict[int, Prediction]:
        """Go to frame ``t``, a neighbour of the frame before, and predict every live object."""
        ...

    def add(self, number: int, mask: Bytes) -> None:
        """Start or restart object ``number`` from this frame's ``mask`` (H, W), nonzero inside."""
        ...

    def drop(self, number: int) -> None:
        """Forget object ``number``."""
        ...


class Propagation(Protocol):
    """A video opened for propagation; what depends on frames alone is shared by its sweeps."""

    def sweep(self) -> Sweep:
        """Return a new pass."""
        ...


class Propagator(Protocol):
    """A method of propagation."""

    name: str
    """What the lineage of a track calls it."""
    patience: int | None
    """After so many empty frames in a row an object is given up; None never gives up."""

    def open(self, frames: Frames, video: VideoInfo) -> Propagation:
        """Prepare for one video."""
        ...


@dataclass(frozen=True)
class FlowSettings:
    """The numbers of `FlowPropagator`; lengths in pixels of the working size."""

    short_edge: int = 240
    """Frames are shrunk to this short edge, never enlarged (320: J +0.003, 1.6 times the time)."""
    colour_sigma: float = 8.0
    """Width of the vote in colour (8-bit Lab units)."""
    search_step: int = 2
    """The 25 remembered pixels lie at -2, -1, 0, 1, 2 times this step in x and in y."""
    key_weight: float = 2.0
    """Weight of the key frame's vote against that of the frame before."""
    reliability_scale: float = 30.0
    """Colour difference at which the flow to the key frame is believed by 1/e."""
    band: float = 20.0
    """Only pixels nearer than this to the expected edge may change sides."""
    colour_weight: float = 1.5
    """Weight of the colour model's log odds."""
    neighbourhood: int = 61
    """Side of the square around object pixels whose colours count as its background."""
    filter_radius: int = 3
    """Radius of the guided filter."""
    filter_eps: float = 1e-3
    """Regularisation of the guided filter (grey values in [0, 1])."""
    contrast: float = 8.0
    """Slope of the sigmoid that keeps probabilities from diffusing frame by frame."""
    cache_bytes: int = 256 << 20
    """Bound of the memory that holds shrunk frames and flows of the open video."""


class FlowPropagator:
    """Two-memory colour-bilateral propagation on optical flow; needs no weights."""

    name = "flow"
    patience: int | None = 5

    def __init__(self, settings: FlowSettings | None = None) -> None:
        """Keep the settings (the measured defaults if None)."""
        self.settings = settings or FlowSettings()

    def open(self, frames: Frames, video: VideoInfo) -> FlowPropagation:
        """Prepare for one video; frames are read when a sweep reaches them."""
        return FlowPropagation(frames, video, self.settings)


@dataclass(frozen=True)
class _View:
    """A frame at working size."""

    grey: Bytes
    """(h, w) for the flow and the guided filter."""
    lab: Bytes
    """(h, w, 3) 8-bit CIE Lab."""

    @property
    def nbytes(self) -> int:
        """Size in the cache."""
        return self.grey.nbytes + self.lab.nbytes


@dataclass(frozen=True)
class _Link:
    """How a frame looks back at its neighbour."""

    flow: Float
    """(h, w, 2) xy displacement from a pixel of the frame to its place in the neighbour."""
    confidence: Float
    """(h, w) in [0, 1]: 1 where the flow there and the flow back agree."""

    @property
    def nbytes(self) -> int:
        """Size in the cache."""
        return self.flow.nbytes + self.confidence.nbytes


class FlowPropagation:
    """One video at working size: frames and flows shared by all objects and both directions.

    Memory: at most ``settings.cache_bytes``, plus a few working-size maps for each live object.
    """

    def __init__(self, frames: Frames, video: VideoInfo, settings: FlowSettings) -> None:
        """Fix the working size; reads nothing yet."""
        self.settings = settings
        self.size = (video.height, video.width)
        scale = min(1.0, settings.short_edge / min(self.size))
        self.working = (max(1, round(video.height * scale)), max(1, round(video.width * scale)))
        self._frames = frames
        self._stream = frames.frames()
        self._next = 0
        third = settings.cache_bytes // 3
        self._views: BoundedCache[_View] = BoundedCache(third, _nbytes)
        self._links: BoundedCache[_Link] = BoundedCache(2 * third, _nbytes)
        self._dis: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        # half the preset's iterations: a quarter less time, and the same J was measured
        self._dis.setGradientDescentIterations(12)
        self._dis.setVariationalRefinementIterations(2)
        rows, columns = np.indices(self.working, dtype=np.float32)
        self._columns, self._rows = columns, rows

    def sweep(self) -> FlowSweep:
        """Return a new pass."""
        return FlowSweep(self)

    def shrink(self, image: NDArray[Any]) -> NDArray[Any]:
        """Bring an image or a float mask to working size, averaging areas."""
        if image.shape[:2] == self.working:
            return image
        return np.asarray(
            cv2.resize(image, self.working[::-1], interpolation=cv2.INTER_AREA), image.dtype
        )

    def enlarge(self, probability: Float) -> Float:
        """Bring a probability map back to the video's size."""
        if self.size == self.working:
            return probability
        return np.asarray(
            cv2.resize(probability, self.size[::-1], interpolation=cv2.INTER_LINEAR), np.float32
        )

    def view(self, t: int) -> _View:
        """Return frame ``t`` at working size.

        Frames are read in order as far as possible, since seeking in a video file is slow; only
        frames that the cache has forgotten are sought.
        """
        while self._next <= t:
            self._views.put(self._next, self._shrunk(next(self._stream)))
            self._next += 1
        return self._views.get(t, lambda: self._shrunk(self._frames[t]))

    def _shrunk(self, frame: Bytes) -> _View:
        """Bring a frame to working size and to the two forms in which it is read."""
        image = self.shrink(frame)
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
        return _View(np.asarray(grey, np.uint8), np.asarray(lab, np.uint8))

    def flow(self, source: int, target: int, guess: Float | None = None) -> Float:
        """Return the flow (h, w, 2) from frame ``source`` to frame ``target``."""
        images = self.view(source).grey, self.view(target).grey
        with one_thread():
            flow = self._dis.calc(*images, None if guess is None else guess.copy())
        return np.asarray(flow, np.float32)

    def link(self, t: int, neighbour: int) -> _Link:
        """Return how frame ``t`` looks at ``neighbour``, with the two-way consistency."""

        def make() -> _Link:
            there = self.flow(t, neighbour)
            back = self.warp(self.flow(neighbour, t), there)
            error = np.square(there + back).sum(-1)
            return _Link(there, np.exp(-error / 4.0))

        return self._links.get((t, neighbour), make)

    def warp(self, image: NDArray[Any], flow: Float) -> NDArray[Any]:
        """Fetch ``image`` along ``flow``: the result at p is the image at p + flow(p)."""
        columns, rows = self._columns + flow[..., 0], self._rows + flow[..., 1]
        warped = cv2.remap(image, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return np.asarray(warped, image.dtype)


@dataclass
class _Object:
    """What a sweep remembers of one object."""

    key: int
    """Frame of the long memory."""
    key_probability: Float
    """(h, w) in the key frame."""
    probability: Float
    """(h, w) in the frame before."""
    colour_odds: Float
    """(24^3,) log odds of each colour bin in the key frame: object against surroundings."""


@dataclass
class _KeyMemory:
    """A key frame aligned with the current frame; shared by the objects that start from it."""

    key: int
    """The frame."""
    accumulated: Float | None = None
    """(h, w, 2) flow from the current frame to the key frame, carried along; None at the start."""
    flow: Float | None = None
    """(h, w, 2) the same, refined; None while the key frame is the frame before."""
    memory: Memory | None = None
    """The key frame as the vote reads it."""


@dataclass(frozen=True)
class _Now:
    """The current frame, as all objects read it."""

    grey: Float
    """(h, w) in [0, 1]."""
    colour: Float
    """(3, h, w); see `bilateral.scaled`."""
    bins: NDArray[np.intp]
    """(h, w) colour bin of each pixel."""
    link: _Link
    """Its look at the frame before."""
    before: Memory
    """The frame before, aligned."""


class FlowSweep:
    """One pass of `FlowPropagator` in one direction."""

    def __init__(self, propagation: FlowPropagation) -> None:
        """Start without objects."""
        self._video = propagation
        self._set = propagation.settings
        self._t: int | None = None
        self._objects: dict[int, _Object] = {}
        self._keys: dict[int, _KeyMemory] = {}

    def add(self, number: int, mask: Bytes) -> None:
        """Start or restart object ``number`` from this frame's ``mask`` (H, W), nonzero inside."""
        assert self._t is not None, "advance to a frame before adding an object"
        soft = self._video.shrink((mask != 0).astype(np.float32))
        odds = colour_odds(self._video.view(self._t).lab, soft, self._set.neighbourhood)
        self._objects[number] = _Object(self._t, soft, soft, odds)
        self._keys.setdefault(self._t, _KeyMemory(self._t))

    def drop(self, number: int) -> None:
        """Forget object ``number``."""
        self._objects.pop(number, None)

    def advance(self, t: int) -> dict[int, Prediction]:
        """Go to frame ``t``, a neighbour of the frame before, and predict every live object."""
        before, self._t = self._t, t
        if not self._objects or before is None:
            return {}
        now = self._look(t, before)
        used = {item.key for item in self._objects.values()}
        self._keys = {key: memory for key, memory in self._keys.items() if key in used}
        for memory in self._keys.values():
            self._align(memory, now, t)
        return {
            number: SoftMask(self._video.enlarge(self._follow(item, now)))
            for number, item in self._objects.items()
        }

    def _look(self, t: int, before: int) -> _Now:
        """Prepare what all objects need of frame ``t``."""
        view, link = self._video.view(t), self._video.link(t, before)
        aligned = self._video.warp(self._video.view(before).lab, link.flow)
        return _Now(
            grey=view.grey.astype(np.float32) / np.float32(255),
            colour=scaled(view.lab, self._set.colour_sigma),
            bins=colour_bins(view.lab),
            link=link,
            before=self._remember(aligned, link.confidence),
        )

    def _remember(self, lab: Bytes, trust: Float, weight: float = 1.0) -> Memory:
        """Make an aligned frame ready for the vote."""
        return remember(lab, trust, weight, self._set.colour_sigma, self._set.search_step)

    def _align(self, memory: _KeyMemory, now: _Now, t: int) -> None:
        """Carry the flow to a key frame one frame further and refine it."""
        step = now.link.flow
        if memory.accumulated is None:
            memory.accumulated = step
            return
        carried = step + self._video.warp(memory.accumulated, step)
        refined = self._video.flow(t, memory.key, carried)
        lab = self._video.warp(self._video.view(memory.key).lab, refined)
        sigma = self._set.colour_sigma
        difference = np.sqrt(np.square(scaled(lab, sigma) - now.colour).sum(0))
        unlike = np.asarray(cv2.blur(difference, (5, 5)), np.float32)
        trust = np.exp(-np.square(unlike * np.float32(sigma / self._set.reliability_scale)))
        memory.accumulated = carried + 0.5 * trust[..., None] * (refined - carried)
        memory.flow = refined
        memory.memory = self._remember(lab, trust, self._set.key_weight)

    def _follow(self, item: _Object, now: _Now) -> Float:
        """Return the object's probability (h, w) in the current frame and remember it."""
        expected = self._video.warp(item.probability, now.link.flow)
        out = np.zeros_like(expected)
        margin = int(self._set.band) + self._set.filter_radius + 1
        box = surrounding_box(expected > 0.5, margin)
        if box is not None:
            vote = self._vote(item, expected, now, box)
            crop = self._decide(vote, expected[box], item, now, box)
            crop = guided_filter(now.grey[box], crop, self._set.filter_radius, self._set.filter_eps)
            out[box] = 1 / (1 + np.exp(self._set.contrast * (0.5 - crop)))
            out[out < 0.01] = 0
        item.probability = out
        return out

    def _vote(self, item: _Object, expected: Float, now: _Now, box: Box) -> Float:
        """Ask both memories; return the share (crop) of their weight that lies on the object."""
        votes = [(now.before, expected)]
        key = self._keys[item.key]
        if key.memory is not None and key.flow is not None:
            votes.append((key.memory, self._video.warp(item.key_probability, key.flow)))
        # where no remembered pixel is alike, the expectation stands
        top, bottom = 1e-6 * expected[box], np.full_like(expected[box], 1e-6)
        for memory, probability in votes:
            add_votes(top, bottom, now.colour, memory, probability, box)
        return top / bottom

    def _decide(self, vote: Float, expected: Float, item: _Object, now: _Now, box: Box) -> Float:
        """Weigh the vote with the colours near the expected edge; keep inside and outside."""
        inside = (expected > 0.5).astype(np.uint8)
        depth = np.asarray(cv2.distanceTransform(inside, cv2.DIST_L2, 3))
        height = np.asarray(cv2.distanceTransform(1 - inside, cv2.DIST_L2, 3))
        share = np.clip(vote, 1e-3, 1 - 1e-3)
        odds = np.log(share / (1 - share)) * (0.6 + 0.4 * now.link.confidence[box])
        odds += self._set.colour_weight * item.colour_odds[now.bins[box]]
        decided = 1 / (1 + np.exp(-odds))
        decided = np.where(depth > self._set.band, np.maximum(vote, 0.9), decided)
        return np.where(height > self._set.band, 0, decided).astype(np.float32)


def _nbytes(item: _View | _Link) -> int:
    """Return the size of an item in the cache."""
    return item.nbytes


@contextmanager
def one_thread() -> Iterator[None]:
    """Run OpenCV on one thread: the stripes of DIS, hence its flow, depend on their number."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)
