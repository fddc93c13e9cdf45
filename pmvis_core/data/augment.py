"""Random views of training frames: IDOL's crops and sizes, and one small warp for small frames.

A `View` is drawn first (all randomness happens there) and then applied to the image, its boxes,
its masks and its polygons, so that these always agree. Every step of a view acts on rows and
columns apart, hence a view is two `Axis` maps: `new = scale * old + offset` for coordinates and an
index of source pixels for masks (nearest neighbour). Pixel `i` covers `[i, i + 1)`.

IDOL's published numbers are the defaults (`AugmentConfig`). Stills and videos differ in what is
shared by key and reference: the views of a still are independent (`draw_still`, called twice), the
frames of a video share size and flip and differ in the crop (`draw_clip`).

    view = draw_still(image.shape[:2], AugmentConfig(), np.random.default_rng(0))
    small, boxes = view.image(image), view.boxes(boxes)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pmvis_core.errors import UsageError

Size = tuple[int, int]
"""``(height, width)`` in pixels."""


@dataclass(frozen=True)
class AugmentConfig:
    """How training frames vary; the defaults are IDOL's for videos (YouTube-VIS, 2 x 32 frames).

    IDOL's recipe for stills is the same with ``max_size=1333``; `SMALL_FRAMES` is the recipe for
    frames that keep their size.
    """

    flip_probability: float = 0.5
    """Of a mirror left to right."""
    min_sizes: tuple[int, ...] = (320, 352, 392, 416, 448, 480, 512, 544, 576, 608, 640)
    """Pixels of the short side, one is drawn; empty keeps the size."""
    max_size: int = 768
    """Cap in pixels on the long side, applied after the short side is chosen."""
    crop_probability: float = 0.5
    """Of cropping before that resize."""
    crop_range: tuple[int, int] = (384, 600)
    """Smallest and largest side of a crop in pixels, both sides drawn apart, inclusive."""
    crop_resize: tuple[int, ...] = (400, 500, 600)
    """Stills only: pixels of the short side before the crop, one is drawn; empty keeps the size."""
    scale_range: tuple[float, float] = (1.0, 1.0)
    """Zoom about the centre at constant frame size, the border is reflected."""
    shift: float = 0.0
    """Largest shift of that zoom as a fraction of each side."""
    brightness: float = 0.0
    """Factor on all values, drawn from 1 - b to 1 + b."""
    contrast: float = 0.0
    """Factor on the distance from the frame's mean, drawn from 1 - c to 1 + c."""
    gain: float = 0.0
    """Factor on each channel, drawn from 1 - g to 1 + g."""

    def __post_init__(self) -> None:
        """Refuse numbers that no view could be drawn from."""
        low, high = self.crop_range
        smallest, largest = self.scale_range
        checks = (
            ("flip_probability", 0 <= self.flip_probability <= 1, "a number from 0 to 1"),
            ("crop_probability", 0 <= self.crop_probability <= 1, "a number from 0 to 1"),
            ("min_sizes", all(side > 0 for side in self.min_sizes), "positive pixels"),
            ("max_size", self.max_size > 0, "positive pixels"),
            ("crop_range", 0 < low <= high, "two positive numbers in order"),
            ("crop_resize", all(side > 0 for side in self.crop_resize), "positive pixels"),
            ("scale_range", 0 < smallest <= largest, "two positive numbers in order"),
            ("shift", 0 <= self.shift < 1, "a fraction below 1"),
            ("brightness", 0 <= self.brightness < 1, "a fraction below 1"),
            ("contrast", 0 <= self.contrast < 1, "a fraction below 1"),
            ("gain", 0 <= self.gain < 1, "a fraction below 1"),
        )
        for name, fine, expected in checks:
            if not fine:
                got = getattr(self, name)
                raise UsageError(f"augmentation `{name}` is {got}, expected {expected}")


IDOL_STILLS = AugmentConfig(max_size=1333)
"""IDOL's key/reference pairs from stills (r50_coco_sequence)."""

IDOL_VIDEOS = AugmentConfig()
"""IDOL's YouTube-VIS recipe."""

SMALL_FRAMES = AugmentConfig(
    min_sizes=(),
    crop_probability=0.0,
    scale_range=(0.75, 1.3),
    shift=0.12,
    brightness=0.2,
    contrast=0.2,
    gain=0.2,
)
"""For frames of about 100 pixels: a warp at constant size and a jitter of light and colour."""


@dataclass(frozen=True)
class Axis:
    """Where one axis of a view comes from."""

    index: NDArray[np.intp]
    """(n,) source pixel of each new pixel, -1 where it lies outside the source."""
    scale: float
    """Of coordinates: ``new = scale * old + offset``."""
    offset: float
    """Of coordinates, in new pixels."""

    @classmethod
    def identity(cls, length: int) -> Axis:
        """Return the axis of an unchanged source of ``length`` pixels."""
        return cls(np.arange(length), 1.0, 0.0)

    def __len__(self) -> int:
        """Return the number of new pixels."""
        return len(self.index)

    def map(self, coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return where source coordinates lie in the view (not clipped)."""
        return self.scale * coordinates + self.offset

    def resized(self, length: int) -> Axis:
        """Return the axis stretched to ``length`` pixels, nearest pixel centre.

        Where a centre falls on an edge PIL's running sum decides, so it is summed here too.
        """
        ratio = len(self) / length
        steps = np.full(length, ratio)
        steps[0] /= 2
        nearest = np.minimum(np.cumsum(steps).astype(np.intp), len(self) - 1)
        return Axis(self.index[nearest], self.scale / ratio, self.offset / ratio)

    def cropped(self, start: int, length: int) -> Axis:
        """Return ``length`` pixels from ``start`` on."""
        return Axis(self.index[start : start + length], self.scale, self.offset - start)

    def flipped(self) -> Axis:
        """Return the axis mirrored."""
        return Axis(self.index[::-1], -self.scale, len(self) - self.offset)

    def zoomed(self, scale: float, offset: float) -> Axis:
        """Return the axis under ``new = scale * old + offset`` at constant length."""
        nearest = np.floor((np.arange(len(self)) + 0.5 - offset) / scale).astype(np.intp)
        inside = (nearest >= 0) & (nearest < len(self))
        index = np.where(inside, self.index[np.clip(nearest, 0, len(self) - 1)], -1)
        return Axis(index, scale * self.scale, scale * self.offset + offset)


@dataclass(frozen=True)
class Zoom:
    """A scaling about the centre and a shift, at constant frame size."""

    scale: float
    """Above 1 enlarges."""
    shift: tuple[float, float]
    """Pixels down and to the right."""

    def offset(self, side: int, length: int) -> float:
        """Return the offset of coordinates on an axis (0 rows, 1 columns) of ``length`` pixels."""
        return (1 - self.scale) * length / 2 + self.shift[side]


@dataclass(frozen=True)
class Colour:
    """A jitter of light and colour: ``((x - mean) * contrast + mean) * gains``."""

    contrast: float
    """Factor on the distance from the frame's mean."""
    gains: tuple[float, float, float]
    """Factors on red, green and blue, brightness included."""

    def apply(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return a (H, W, 3) uint8 image with this jitter, float32, clipped to 0..255."""
        mean = float(np.mean(cv2.mean(image)[:3]))
        values = (np.arange(256.0) - mean) * self.contrast + mean
        table = np.clip(values[:, None, None] * np.array(self.gains), 0, 255).astype(np.float32)
        return np.asarray(cv2.LUT(image, table), dtype=np.float32)


@dataclass(frozen=True)
class View:
    """One way to look at a frame; the fields are the steps in their order."""

    source: Size
    """Of the frame it applies to."""
    enlarged: Size | None = None
    """Resize before the crop."""
    crop: tuple[int, int, int, int] | None = None
    """``(top, left, height, width)`` in pixels after that."""
    resized: Size | None = None
    """Resize after the crop."""
    flip: bool = False
    """Mirror left to right."""
    zoom: Zoom | None = None
    """Warp at constant size."""
    colour: Colour | None = None
    """Jitter of values."""

    @property
    def size(self) -> Size:
        """Size of the result."""
        return len(self.rows), len(self.columns)

    @cached_property
    def rows(self) -> Axis:
        """The vertical axis."""
        return self._axis(0, flip=False)

    @cached_property
    def columns(self) -> Axis:
        """The horizontal axis."""
        return self._axis(1, flip=self.flip)

    def _axis(self, side: int, flip: bool) -> Axis:
        """Return an axis (0 rows, 1 columns) after all steps."""
        axis = Axis.identity(self.source[side])
        if self.enlarged is not None:
            axis = axis.resized(self.enlarged[side])
        if self.crop is not None:
            axis = axis.cropped(self.crop[side], self.crop[2 + side])
        if self.resized is not None:
            axis = axis.resized(self.resized[side])
        if flip:
            axis = axis.flipped()
        if self.zoom is not None:
            axis = axis.zoomed(self.zoom.scale, self.zoom.offset(side, len(axis)))
        return axis

    def image(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the (H, W, 3) uint8 RGB image seen this way, (h, w, 3) float32 in 0..255.

        Resizing is PIL's bilinear on uint8 (antialiased), as in detectron2, by torch's kernel of
        it, which is three times as fast and differs by 1 in one value of 700; the zoom is OpenCV's
        bilinear warp with a reflected border. The result is stored by channels.
        """
        if self.enlarged is not None:
            image = _resize(image, self.enlarged)
        if self.crop is not None:
            top, left, height, width = self.crop
            image = image[top : top + height, left : left + width]
        if self.resized is not None:
            image = _resize(image, self.resized)
        if self.zoom is None and self.colour is None:
            return _by_channels(image, self.flip)
        if self.flip:
            image = np.asarray(cv2.flip(np.ascontiguousarray(image), 1), dtype=np.uint8)
        if self.zoom is not None:
            image = _warp(image, self.zoom)
        return _by_channels(image if self.colour is None else self.colour.apply(image))

    def boxes(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (N, 4) xyxy boxes in pixels, transformed and clipped to the view."""
        across = np.sort(self.columns.map(boxes[:, 0::2]), axis=1)
        down = np.sort(self.rows.map(boxes[:, 1::2]), axis=1)
        height, width = self.size
        out = np.empty_like(boxes)
        out[:, 0::2] = np.clip(across, 0, width)
        out[:, 1::2] = np.clip(down, 0, height)
        return out

    def masks(self, masks: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return (N, H, W) masks seen this way, (N, h, w), nearest neighbour, 0 outside."""
        rows, columns = self.rows.index, self.columns.index
        out = masks.take(np.maximum(rows, 0), axis=1).take(np.maximum(columns, 0), axis=2)
        if self.zoom is not None:
            out[:, rows < 0] = 0
            out[:, :, columns < 0] = 0
        return out

    def polygon(self, polygon: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return a polygon (2P,) x y x y ... in pixels, transformed and not clipped."""
        out = np.empty_like(polygon)
        out[0::2] = self.columns.map(polygon[0::2])
        out[1::2] = self.rows.map(polygon[1::2])
        return out


def draw_still(source: Size, config: AugmentConfig, rng: np.random.Generator) -> View:
    """Draw a view of a still; call it twice for key and reference (IDOL, `coco_clip`).

    Args:
        source: the image's size.
        config: what may vary.
        rng: its state is all that the result depends on.
    """
    return _draw(source, _draw_common(config, rng), config, rng, enlarge=True)


def draw_clip(
    sources: Sequence[Size], config: AugmentConfig, rng: np.random.Generator
) -> tuple[View, ...]:
    """Draw views of frames of one video: shared size and flip, crops and colours of their own.

    Args:
        sources: the frames' sizes.
        config: what may vary.
        rng: its state is all that the result depends on.
    """
    common = _draw_common(config, rng)
    return tuple(_draw(source, common, config, rng, enlarge=False) for source in sources)


def shortest_edge(source: Size, short: int, longest: int | None = None) -> Size:
    """Return a size with the given short side, or less so that the long side fits.

    The rule of detectron2's `ResizeShortestEdge`: the cap scales both sides after the short side
    is chosen, and each side is rounded by ``int(x + 0.5)``.

    Args:
        source: size in pixels.
        short: wanted short side in pixels.
        longest: cap on the long side in pixels; None for no cap.
    """
    scale = short / min(source)
    height, width = (
        (float(short), scale * source[1])
        if source[0] < source[1]
        else (scale * source[0], float(short))
    )
    if longest is not None and max(height, width) > longest:
        shrink = longest / max(height, width)
        height, width = height * shrink, width * shrink
    return max(1, int(height + 0.5)), max(1, int(width + 0.5))


@dataclass(frozen=True)
class _Common:
    """What the frames of a clip share."""

    short: int | None
    flip: bool
    crops: bool


def _draw_common(config: AugmentConfig, rng: np.random.Generator) -> _Common:
    """Draw size, flip and whether to crop."""
    short = int(rng.choice(config.min_sizes)) if config.min_sizes else None
    flip = bool(rng.random() < config.flip_probability)
    return _Common(short, flip, bool(rng.random() < config.crop_probability))


def _draw(
    source: Size,
    common: _Common,
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    enlarge: bool,
) -> View:
    """Draw what is a frame's own and put the view together."""
    size, enlarged, crop = source, None, None
    if common.crops:
        if enlarge and config.crop_resize:
            size = enlarged = shortest_edge(source, int(rng.choice(config.crop_resize)))
        crop = _draw_crop(size, config.crop_range, rng)
        size = crop[2], crop[3]
    resized = None
    if common.short is not None:
        size = resized = shortest_edge(size, common.short, config.max_size)
    zoom = _draw_zoom(size, config, rng)
    return View(source, enlarged, crop, resized, common.flip, zoom, _draw_colour(config, rng))


def _draw_crop(
    size: Size, limits: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a crop with both sides within ``limits`` (or the frame's side, if that is less)."""
    low, high = limits
    height, width = (int(rng.integers(min(s, low), min(s, high) + 1)) for s in size)
    top = int(rng.integers(size[0] - height + 1))
    left = int(rng.integers(size[1] - width + 1))
    return top, left, height, width


def _draw_zoom(size: Size, config: AugmentConfig, rng: np.random.Generator) -> Zoom | None:
    """Draw the warp of small frames; None if the configuration has none."""
    if config.scale_range == (1.0, 1.0) and config.shift == 0:
        return None
    scale = float(rng.uniform(*config.scale_range))
    down, right = rng.uniform(-config.shift, config.shift, 2) * size
    return Zoom(scale, (float(down), float(right)))


def _draw_colour(config: AugmentConfig, rng: np.random.Generator) -> Colour | None:
    """Draw the jitter of values; None if the configuration has none."""
    if config.brightness == config.contrast == config.gain == 0:
        return None
    contrast = float(rng.uniform(1 - config.contrast, 1 + config.contrast))
    brightness = float(rng.uniform(1 - config.brightness, 1 + config.brightness))
    red, green, blue = (
        brightness * float(g) for g in rng.uniform(1 - config.gain, 1 + config.gain, 3)
    )
    return Colour(contrast, (red, green, blue))


def _resize(image: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Resize a uint8 RGB image by PIL's antialiased bilinear filter, in the caller's thread."""
    if image.shape[:2] == size:
        return image
    whole = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = F.interpolate(whole, size=size, mode="bilinear", antialias=True)
    return np.asarray(resized[0].permute(1, 2, 0).numpy())


def _by_channels(
    image: NDArray[np.uint8] | NDArray[np.float32], flip: bool = False
) -> NDArray[np.float32]:
    """Return a (H, W, 3) image as float32 whose channels lie one after the other.

    What `_resize` returns is stored so already; OpenCV mirrors a plane faster than numpy.
    """
    out = np.empty((3, *image.shape[:2]), np.float32)
    for number, channel in enumerate(out):
        plane: NDArray[Any] = np.ascontiguousarray(image[:, :, number])
        channel[:] = cv2.flip(plane, 1) if flip else plane
    return out.transpose(1, 2, 0)


def _warp(image: NDArray[np.uint8], zoom: Zoom) -> NDArray[np.uint8]:
    """Zoom a uint8 image; OpenCV puts pixel centres on integers, hence the half pixels."""
    height, width = image.shape[:2]
    down, right = zoom.offset(0, height), zoom.offset(1, width)
    half = (zoom.scale - 1) / 2
    matrix = np.array([[zoom.scale, 0, right + half], [0, zoom.scale, down + half]])
    return np.asarray(
        cv2.warpAffine(
            image,
            matrix,
            (width, height),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT_101,
        ),
        dtype=np.uint8,
    )
