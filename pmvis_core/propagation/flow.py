"""Carrying a mask from its key frame through a video: the protocol, and `flow`, without weights.

PM-VIS+ (Sec. III-C) tracks the best-scored mask of an instance to both ends of the video with
DeAOT. A `Propagator` is anything that can do so; the stage `pmvis_core.refine` drives it.
`FlowPropagator` is the one that needs no weights. It keeps DeAOT's idea, a long-term memory (the
key frame) beside a short-term one (the frame before) and a local search window, with features
made by hand: both memories are aligned with the current frame by DIS optical flow (Kroeger et
al., ECCV 2016), then every pixel takes a bilateral vote of the 25 remembered pixels around its
place; a colour model decides along the edge and a guided filter (He et al., ECCV 2010) settles it.
An object whose motion the flow plainly missed is searched for by its colours (`leap`). Where the
features of a frozen network are at hand, both memories also vote by their likeness (`cells`).

It is a working fallback, not a substitute for a trained network: it follows objects that move
moderately and loses them behind occluders. `tests/benchmarks/bench_refine.py` prints how well.

    propagation = FlowPropagator().open(frames, VideoInfo(1, "clip", 480, 854, 20))
    sweep = propagation.sweep()
    sweep.advance(4)
    sweep.add(0, mask)
    predictions = sweep.advance(5)  # {0: Prediction}
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

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
from pmvis_core.propagation.cells import CellMemory, Cells, cell_odds
from pmvis_core.propagation.frame_cache import Frames
from pmvis_core.propagation.leap import best_shift, drawn_to, likeness
from pmvis_core.propagation.working_video import Embed, Link, WorkingVideo
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
    feature_weight: float = 2.0
    """Weight of the log odds by features, where there are any."""
    neighbourhood: int = 61
    """Side of the square around object pixels whose colours count as its background."""
    filter_radius: int = 3
    """Radius of the guided filter."""
    filter_eps: float = 1e-3
    """Regularisation of the guided filter (grey values in [0, 1])."""
    contrast: float = 8.0
    """Slope of the sigmoid that keeps probabilities from diffusing frame by frame."""
    leap_gain: float = 1.4
    """How many times as much of an object a shift must explain to be believed over the flow."""
    leap_least: float = 0.75
    """Share of the object that it must explain at least: what is occluded must not leap."""
    cache_bytes: int = 256 << 20
    """Bound of the memory that holds shrunk frames and flows of the open video."""


class FlowPropagator:
    """Two-memory colour-bilateral propagation on optical flow; needs no weights, may use some."""

    name = "flow"
    patience: int | None = 5

    def __init__(self, settings: FlowSettings | None = None, embed: Embed | None = None) -> None:
        """Keep the settings (the measured defaults if None) and what describes frames, if any."""
        self.settings = settings or FlowSettings()
        self.embed = embed

    def open(self, frames: Frames, video: VideoInfo) -> FlowPropagation:
        """Prepare for one video; frames are read when a sweep reaches them."""
        return FlowPropagation(frames, video, self.settings, self.embed)


class FlowPropagation:
    """One video at working size: frames and flows shared by all objects and both directions.

    Memory: at most ``settings.cache_bytes``, plus a few working-size maps for each live object.
    """

    def __init__(
        self, frames: Frames, video: VideoInfo, settings: FlowSettings, embed: Embed | None
    ) -> None:
        """Fix the working size; reads nothing yet."""
        self._settings = settings
        edge, room = settings.short_edge, settings.cache_bytes
        self._video = WorkingVideo(frames, video, edge, room, embed)

    def sweep(self) -> FlowSweep:
        """Return a new pass."""
        return FlowSweep(self._video, self._settings)


@dataclass
class _KeyMemory:
    """A key frame aligned with the current frame.

    Shared by the objects that start from it, until one of them leaps and goes on with its own.
    """

    key: int
    """The frame."""
    accumulated: Float | None = None
    """(h, w, 2) flow from the current frame to the key frame, carried along; None at the start."""
    flow: Float | None = None
    """(h, w, 2) the same, refined; None while the key frame is the frame before."""
    memory: Memory | None = None
    """The key frame as the vote reads it."""


@dataclass
class _Object:
    """What a sweep remembers of one object."""

    memory: _KeyMemory
    """The long memory."""
    key_probability: Float
    """(h, w) in the key frame."""
    probability: Float
    """(h, w) in the frame before."""
    colour_odds: Float
    """(24^3,) log odds of each colour bin in the key frame: object against surroundings."""


@dataclass(frozen=True)
class _Now:
    """The current frame, as all objects read it."""

    t: int
    """Its number."""
    neighbour: int
    """Number of the frame before."""
    grey: Float
    """(h, w) in [0, 1]."""
    colour: Float
    """(3, h, w); see `bilateral.scaled`."""
    cells: Cells | None
    """Its features, if there is a network."""
    bins: NDArray[np.intp]
    """(h, w) colour bin of each pixel."""
    link: Link
    """Its look at the frame before."""
    before: Memory
    """The frame before, aligned."""
    likeness: Float
    """(h, w) in [0, 1]: how well the aligned frame before explains the colour."""


class FlowSweep:
    """One pass of `FlowPropagator` in one direction."""

    def __init__(self, video: WorkingVideo, settings: FlowSettings) -> None:
        """Start without objects."""
        self._video = video
        self._set = settings
        self._t: int | None = None
        self._objects: dict[int, _Object] = {}
        self._newest: _KeyMemory | None = None

    def add(self, number: int, mask: Bytes) -> None:
        """Start or restart object ``number`` from this frame's ``mask`` (H, W), nonzero inside."""
        assert self._t is not None, "advance to a frame before adding an object"
        soft = self._video.shrink((mask != 0).astype(np.float32))
        odds = colour_odds(self._video.view(self._t).lab, soft, self._set.neighbourhood)
        self._newest = self._newest or _KeyMemory(self._t)
        self._objects[number] = _Object(self._newest, soft, soft, odds)

    def drop(self, number: int) -> None:
        """Forget object ``number``."""
        self._objects.pop(number, None)

    def advance(self, t: int) -> dict[int, Prediction]:
        """Go to frame ``t``, a neighbour of the frame before, and predict every live object."""
        before, self._t, self._newest = self._t, t, None
        if not self._objects or before is None:
            return {}
        now = self._look(t, before)
        looks = {number: self._leap(item, now) for number, item in self._objects.items()}
        memories = {id(item.memory): (item.memory, looks[n]) for n, item in self._objects.items()}
        for memory, look in memories.values():
            self._align(memory, look)
        return {
            number: SoftMask(self._video.enlarge(self._follow(item, looks[number])))
            for number, item in self._objects.items()
        }

    def _look(self, t: int, before: int) -> _Now:
        """Prepare what all objects need of frame ``t``."""
        view, link = self._video.view(t), self._video.link(t, before)
        aligned = self._video.warp(self._video.view(before).lab, link.flow)
        return _Now(
            t=t,
            neighbour=before,
            grey=view.grey.astype(np.float32) / np.float32(255),
            colour=scaled(view.lab, self._set.colour_sigma),
            cells=view.cells,
            bins=colour_bins(view.lab),
            link=link,
            before=self._remember(aligned, link.confidence),
            likeness=likeness(aligned, view.lab),
        )

    def _leap(self, item: _Object, now: _Now) -> _Now:
        """Return how the object sees the frame: as all do, or along a motion that the flow missed.

        The motion is a shift, refined by a flow that starts from it. An object that leaps goes on
        with a long memory of its own.
        """
        area = float(item.probability.sum())
        expected = self._video.warp(item.probability, now.link.flow)
        enough = self._set.leap_gain * float((expected * now.likeness).sum())
        if enough >= area:
            return now  # no shift can explain more than all of it
        there, here = self._video.view(now.neighbour).lab, self._video.view(now.t).lab
        shift = best_shift(there, here, item.probability)
        if shift is None:
            return now
        straight = np.broadcast_to(-np.array(shift, np.float32), now.link.flow.shape)
        place, reached = self._explained(item, there, here, straight)
        if reached < max(enough, self._set.leap_least * area):
            return now
        flow = drawn_to(now.link.flow, shift, place)
        refined = self._video.flow(now.t, now.neighbour, flow)
        if self._explained(item, there, here, refined)[1] >= reached:
            flow = refined
        aligned = self._video.warp(there, flow)
        trust = self._trust(aligned, now)
        item.memory = replace(item.memory)
        return replace(now, link=Link(flow, trust), before=self._remember(aligned, trust))

    def _explained(
        self, item: _Object, there: Bytes, here: Bytes, flow: Float
    ) -> tuple[Float, float]:
        """Return the object's mask (h, w) along a flow, and how much of it lands on its like."""
        place = self._video.warp(item.probability, flow)
        return place, float((place * likeness(self._video.warp(there, flow), here)).sum())

    def _trust(self, aligned: Bytes, now: _Now) -> Float:
        """Return how far (h, w) in [0, 1] the colours of an aligned frame confirm its flow."""
        sigma = self._set.colour_sigma
        difference = np.sqrt(np.square(scaled(aligned, sigma) - now.colour).sum(0))
        unlike = np.asarray(cv2.blur(difference, (5, 5)), np.float32)
        trust: Float = np.exp(-np.square(unlike * np.float32(sigma / self._set.reliability_scale)))
        return trust

    def _remember(self, lab: Bytes, trust: Float, weight: float = 1.0) -> Memory:
        """Make an aligned frame ready for the vote."""
        return remember(lab, trust, weight, self._set.colour_sigma, self._set.search_step)

    def _align(self, memory: _KeyMemory, now: _Now) -> None:
        """Carry the flow to a key frame one frame further and refine it."""
        step = now.link.flow
        if memory.accumulated is None:
            memory.accumulated = step
            return
        carried = step + self._video.warp(memory.accumulated, step)
        refined = self._video.flow(now.t, memory.key, carried)
        lab = self._video.warp(self._video.view(memory.key).lab, refined)
        trust = self._trust(lab, now)
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
        key = item.memory
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
        if now.cells is not None:
            odds += self._set.feature_weight * self._ask_cells(now.cells, item, now, box)
        decided = 1 / (1 + np.exp(-odds))
        decided = np.where(depth > self._set.band, np.maximum(vote, 0.9), decided)
        return np.where(height > self._set.band, 0, decided).astype(np.float32)

    def _ask_cells(self, cells: Cells, item: _Object, now: _Now, box: Box) -> Float:
        """Ask both memories by features; return the log odds (crop) of the object."""
        key = item.memory
        asked = (
            (now.neighbour, item.probability, now.link.flow),
            (key.key, item.key_probability, now.link.flow if key.flow is None else key.flow),
        )
        memories = []
        for t, probability, flow in asked:
            remembered = self._video.view(t).cells
            assert remembered is not None, "all frames of a video are described, or none"
            memories.append(CellMemory(remembered, probability, flow))
        return cell_odds(cells, memories, box)
