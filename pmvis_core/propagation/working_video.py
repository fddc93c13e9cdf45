"""A video at the size at which `flow` works: small frames, optical flow between them, warping.

Flow is DIS (Kroeger et al., ECCV 2016), on one thread, since its result depends on their number.

    video = WorkingVideo(frames, VideoInfo(1, "clip", 480, 854, 20), 240, 256 << 20)
    aligned = video.warp(video.view(4).lab, video.link(5, 4).flow)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pmvis_core.propagation.bilateral import Bytes, Float
from pmvis_core.propagation.cells import Cells
from pmvis_core.propagation.frame_cache import BoundedCache, Frames
from pmvis_core.types import VideoInfo

Embed = Callable[[Bytes], Cells]
"""Describes a frame (H, W, 3) uint8 RGB by the features of a network."""


@dataclass(frozen=True)
class View:
    """A frame at working size."""

    grey: Bytes
    """(h, w) for the flow and the guided filter."""
    lab: Bytes
    """(h, w, 3) 8-bit CIE Lab."""
    cells: Cells | None
    """What a network makes of it, if one is asked."""

    @property
    def nbytes(self) -> int:
        """Size in the cache."""
        cells = self.cells.nbytes if self.cells else 0
        return self.grey.nbytes + self.lab.nbytes + cells


@dataclass(frozen=True)
class Link:
    """How a frame looks back at its neighbour."""

    flow: Float
    """(h, w, 2) xy displacement from a pixel of the frame to its place in the neighbour."""
    confidence: Float
    """(h, w) in [0, 1]: 1 where the flow there and the flow back agree."""

    @property
    def nbytes(self) -> int:
        """Size in the cache."""
        return self.flow.nbytes + self.confidence.nbytes


class WorkingVideo:
    """One video at working size: frames and flows shared by all objects and both directions.

    Memory: at most ``cache_bytes``, and one frame more.
    """

    def __init__(
        self,
        frames: Frames,
        video: VideoInfo,
        short_edge: int,
        cache_bytes: int,
        embed: Embed | None = None,
    ) -> None:
        """Fix the working size (never above the video's); reads nothing yet."""
        self._embed = embed
        self.size = (video.height, video.width)
        scale = min(1.0, short_edge / min(self.size))
        self.working = (max(1, round(video.height * scale)), max(1, round(video.width * scale)))
        self._frames = frames
        self._stream = frames.frames()
        self._next = 0
        third = cache_bytes // 3
        self._views: BoundedCache[View] = BoundedCache(third, _nbytes)
        self._links: BoundedCache[Link] = BoundedCache(2 * third, _nbytes)
        # apart, for DIS without a guess starts from what a guess before it has left behind
        self._dis, self._guided_dis = _make_dis(), _make_dis()
        rows, columns = np.indices(self.working, dtype=np.float32)
        self._columns, self._rows = columns, rows

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

    def view(self, t: int) -> View:
        """Return frame ``t`` at working size.

        Frames are read in order as far as possible, since seeking in a video file is slow; only
        frames that the cache has forgotten are sought.
        """
        while self._next <= t:
            self._views.put(self._next, self._shrunk(next(self._stream)))
            self._next += 1
        return self._views.get(t, lambda: self._shrunk(self._frames[t]))

    def _shrunk(self, frame: Bytes) -> View:
        """Bring a frame to working size and to the two forms in which it is read."""
        image = self.shrink(frame)
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
        cells = self._embed(frame) if self._embed else None
        return View(np.asarray(grey, np.uint8), np.asarray(lab, np.uint8), cells)

    def flow(self, source: int, target: int, guess: Float | None = None) -> Float:
        """Return the flow (h, w, 2) from frame ``source`` to frame ``target``."""
        images = self.view(source).grey, self.view(target).grey
        with one_thread():
            if guess is None:
                flow = self._dis.calc(*images, None)
            else:
                flow = self._guided_dis.calc(*images, guess.copy())
        return np.asarray(flow, np.float32)

    def link(self, t: int, neighbour: int) -> Link:
        """Return how frame ``t`` looks at ``neighbour``, with the two-way consistency."""

        def make() -> Link:
            there = self.flow(t, neighbour)
            back = self.warp(self.flow(neighbour, t), there)
            error = np.square(there + back).sum(-1)
            return Link(there, np.exp(-error / 4.0))

        return self._links.get((t, neighbour), make)

    def warp(self, image: NDArray[Any], flow: Float) -> NDArray[Any]:
        """Fetch ``image`` along ``flow``: the result at p is the image at p + flow(p)."""
        columns, rows = self._columns + flow[..., 0], self._rows + flow[..., 1]
        warped = cv2.remap(image, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return np.asarray(warped, image.dtype)


def _make_dis() -> Any:
    """Make a DIS; half its preset's iterations: a quarter less time, the same J was measured."""
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setGradientDescentIterations(12)
    dis.setVariationalRefinementIterations(2)
    return dis


def _nbytes(item: View | Link) -> int:
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
