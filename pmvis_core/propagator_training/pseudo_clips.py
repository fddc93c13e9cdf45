"""Clips made of stills: what a propagator learns from where no video is annotated.

The first stage of AOT and DeAOT trains on such clips. A still is seen by a moving camera, some of
its objects move on their own, and those of a second still are laid over it; every layer follows an
affine map and a thin plate (`layer_motion`), so the masks of all frames are known from those of the
stills. Where an object leaves its place, what is behind it is a smooth guess from around.

Objects are numbered 1..n in order of drawing, without gaps, and all of them are visible in frame 0;
anything else is background, and crowds are 255, which no loss looks at.

    clips = StillClips(Path("train_image.json"), None, ClipConfig(crop=193))
    clip = clips.sample(0, np.random.default_rng(0))
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pmvis_core import masks
from pmvis_core.data.spares import STOP, OnError
from pmvis_core.data.stills import Instance, Still, read_picture, read_stills
from pmvis_core.data.streams import Ledger
from pmvis_core.errors import DataError, UsageError
from pmvis_core.propagator_training.layer_motion import (
    Motion,
    Points,
    Reach,
    colour_map,
    draw_motion,
)
from pmvis_core.types import RLE, Supervision

logger = logging.getLogger(__name__)

Image = NDArray[np.uint8]
Labels = NDArray[np.uint8]

MOST_OBJECTS = 10
"""Identities of the network."""
IGNORED = 255
"""Label of pixels that no loss looks at."""
_FILL = (124, 116, 104)
"""RGB outside of a still: ImageNet's mean."""
_PUBLISHED_CROP = 465
_ATTEMPTS = 5
"""Clips that are drawn until one shows an object."""


@dataclass(frozen=True)
class ClipConfig:
    """How clips vary; the defaults are the published ones where those are known."""

    frames: int = 5
    """Length of a clip; the first frame is the reference."""
    crop: int = _PUBLISHED_CROP
    """Side of the frames in pixels."""
    zoom: tuple[float, float] = (0.7, 1.3)
    """A still's short side, as a factor of 480 pixels in 465."""
    flip: float = 0.5
    """Probability of a mirror left to right, of each still."""
    merge: float = 1.0
    """Probability of objects of a second still on top."""
    objects: int = 5
    """Most objects taken from a still."""
    least_area: int = 100
    """Pixels, at a crop of 465, that an object must show in the reference frame."""
    own_motion: float = 0.5
    """Probability that an object moves on its own, besides the camera."""
    rotate_deg: float = 20.0
    """Largest turn of a layer within a clip, degrees."""
    shift: float = 0.1
    """Largest shift, as a fraction of the frame."""
    scale: float = 0.1
    """Largest change of size, as a fraction."""
    shear_deg: float = 10.0
    """Largest shear, degrees."""
    bend: float = 0.03
    """Largest displacement of a thin plate's points, as a fraction of the frame."""
    jitter: tuple[float, ...] = (0.4, 0.4, 0.2, 0.1)
    """Of brightness, contrast, saturation (factors from 1 - j to 1 + j) and hue (turns)."""
    jitter_probability: float = 0.8
    """Of a jitter of colours, the same for all frames of a clip."""
    flicker: float = 0.05
    """Largest change of brightness from frame to frame."""
    grey_probability: float = 0.2
    """Of a clip without colours."""
    blur_probability: float = 0.3
    """Of a blur, each frame by itself."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Its width in pixels at a crop of 465."""

    def __post_init__(self) -> None:
        """Refuse numbers that no clip could be drawn from."""
        chances = (
            *(self.flip, self.merge, self.own_motion),
            *(self.jitter_probability, self.grey_probability, self.blur_probability),
        )
        amounts = (self.rotate_deg, self.shift, self.scale, self.shear_deg, self.bend)
        checks = (
            ("frames", self.frames >= 2, "at least 2"),
            ("crop", self.crop >= 32, "at least 32 pixels"),
            ("zoom", 0 < self.zoom[0] <= self.zoom[-1], "two positive numbers in order"),
            ("objects", 1 <= self.objects <= MOST_OBJECTS // 2, "1 to 5"),
            ("least_area", self.least_area >= 1, "at least 1 pixel"),
            ("jitter", len(self.jitter) == 4 and min(self.jitter) >= 0, "four numbers >= 0"),
            ("blur_sigma", 0 < self.blur_sigma[0] <= self.blur_sigma[-1], "two numbers in order"),
        )
        wrong = [
            f"`{name}` is {getattr(self, name)}, expected {wanted}"
            for name, fine, wanted in checks
            if not fine
        ]
        if not all(0 <= p <= 1 for p in chances):
            wrong.append("a probability is not between 0 and 1")
        if not all(a >= 0 for a in amounts) or self.scale >= 1:
            wrong.append("a reach of the motion is negative, or `scale` is 1 or more")
        if wrong:
            raise UsageError(f"pseudo-clips: {wrong[0]}")

    @property
    def camera(self) -> Reach:
        """How far a layer moves."""
        return Reach(self.rotate_deg, self.shift, self.scale, self.shear_deg, self.bend)


@dataclass(frozen=True)
class PseudoClip:
    """Frames and the objects in them."""

    images: Tensor
    """(T, 3, H, W) float32 RGB, 0..255."""
    labels: Tensor
    """(T, H, W) uint8: 0 background, 1..n objects, 255 ignored."""
    objects: int
    """n, at most ten."""
    name: str = ""
    """The still that it was made from, for messages."""

    def to(self, device: torch.device) -> PseudoClip:
        """Return the clip on ``device``."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


class StillClips:
    """Pseudo-clips from the stills of a COCO instances file that have masks."""

    files_a_sample = 2

    def __init__(
        self, json: Path, images: Path | None, config: ClipConfig, on_error: OnError = STOP
    ) -> None:
        """Read and check the annotations.

        Args:
            json: COCO instances; images that have boxes only are left out.
            images: folder that `file_name` is relative to; None for the folder of ``json``.
            config: how clips vary.
            on_error: whether missing images are an error, or a warning as long as they are few.

        Raises:
            DataError: the file is malformed, an image is missing, or none has a mask.
        """
        self.config = config
        self.categories, stills = read_stills(json, images, on_error)
        self._stills = stills.where(stills.has_mask)
        self.left_out = len(stills) - len(self._stills)
        """Number of images without any mask."""
        if not self._stills:
            raise DataError(
                f"`{json}` has boxes but no masks in its {len(stills)} images",
                "a propagator learns from masks: give stills with `segmentation`",
            )
        if self.left_out:
            logger.warning("%d of %d images have boxes only: left out", self.left_out, len(stills))

    def __len__(self) -> int:
        """Return the number of stills with masks."""
        return len(self._stills)

    def ledger(self) -> Ledger:
        """Return the images and the masks by the image's `source`."""
        out = self._stills.ledger()
        for row in out.values():
            row.pop(Supervision.BOX.value, None)
        return out

    def sample(self, index: int, rng: np.random.Generator) -> PseudoClip:
        """Return a random clip of a still, with objects of another one on top.

        A clip shows no object only if several attempts showed none.

        Raises:
            DataError: an image cannot be read or has another size than the annotations say.
        """
        for _ in range(_ATTEMPTS):
            layers = _take_apart(self._stills[index], self.config, rng)
            if rng.random() < self.config.merge:
                other = self._stills[int(rng.integers(len(self._stills)))]
                apart = _take_apart(other, self.config, rng)
                layers += [replace(x, painted=True) for x in apart if x.is_object]
            clip = _film(layers, self.config, rng)
            if clip.objects:
                break
        still = self._stills[index]
        return replace(clip, name=f"image {still.id}, `{still.path}`")


@dataclass(frozen=True)
class _Layer:
    """Something flat that moves as a whole."""

    image: Image
    """(h, w, 3)."""
    alpha: Image | None
    """(h, w), 255 inside; None covers everything."""
    is_object: bool
    """It is to be propagated; else it is background, or a crowd if it has an outline."""
    painted: bool
    """Its pixels are not in the layers below already."""
    camera: Motion
    """Of the still that it comes from."""
    own: Motion | None
    """Besides the camera's."""
    offset: tuple[int, int]
    """x y of its upper left corner in the frame, at rest."""
    flip: bool
    """Mirrored left to right."""

    def origin(self, t: int, seen: Points) -> Points:
        """Return which of its pixels lie where the camera sees places at rest, (H, W, 2) x y."""
        points = seen if self.own is None else self.own.origin(t, seen)
        points = points - np.asarray(self.offset, np.float32)
        if self.flip:
            points[..., 0] = self.image.shape[1] - 1 - points[..., 0]
        return points


def _take_apart(still: Still, config: ClipConfig, rng: np.random.Generator) -> list[_Layer]:
    """Return a still's layers in order of drawing: the background, crowds and some objects."""
    published = config.crop / _PUBLISHED_CROP
    factor = 480 * published * float(rng.uniform(*config.zoom)) / min(still.size)
    whole = [_bitmap(instance, still.size) for instance in _masked(still)]
    enough = config.least_area * (published / factor) ** 2
    chosen = _chosen(whole, enough, config.objects, rng)
    image = _resized(read_picture(still), factor)
    alphas = [_resized(mask * np.uint8(255), factor) for mask in chosen]
    flip = bool(rng.random() < config.flip)
    offset = _placed(image.shape[:2], alphas[:1], config.crop, flip, rng)
    middle = (config.crop - 1) / 2
    reach, draw = config.camera, (config.frames, config.crop)
    camera = draw_motion(rng, reach, *draw, (middle, middle))
    own: list[Motion | None] = []
    for alpha in alphas:
        x, y = _middle(alpha, flip)
        alone = draw_motion(rng, reach, *draw, (x + offset[0], y + offset[1]))
        own.append(alone if rng.random() < config.own_motion else None)
    hole = [alpha for alpha, motion in zip(alphas, own, strict=True) if motion is not None]
    behind = filled(image, np.max(hole, axis=0)) if hole else image
    place = (offset, flip)
    layers = [_Layer(behind, None, False, True, camera, None, *place)]
    for crowd in still.crowds:
        alpha = _resized(masks.decode(crowd) * np.uint8(255), factor)
        layers.append(_Layer(image, alpha, False, False, camera, None, *place))
    # Large ones first, so that what lies on them stays visible.
    for i in sorted(range(len(alphas)), key=lambda i: -int(alphas[i].sum(dtype=np.int64))):
        motion = own[i]
        layers.append(_Layer(image, alphas[i], True, motion is not None, camera, motion, *place))
    return layers


def _film(layers: Sequence[_Layer], config: ClipConfig, rng: np.random.Generator) -> PseudoClip:
    """Draw the layers in every frame and number what is visible in the first one."""
    side = config.crop
    grid = np.stack(np.meshgrid(*2 * [np.arange(side, dtype=np.float32)]), -1)
    labels = np.zeros((config.frames, side, side), np.uint8)
    images = np.empty((config.frames, 3, side, side), np.float32)
    colours = _draw_colours(layers[0].image, config, rng)
    for t in range(config.frames):
        frame = _draw_frame(layers, t, grid, labels[t])
        frame = np.asarray(cv2.transform(frame, colours[t]), np.float32)
        if rng.random() < config.blur_probability:
            sigma = float(rng.uniform(*config.blur_sigma)) * side / _PUBLISHED_CROP
            frame = np.asarray(cv2.GaussianBlur(frame, (0, 0), sigma), np.float32)
        images[t] = np.clip(frame, 0, 255).transpose(2, 0, 1)
    least = max(1.0, config.least_area * (side / _PUBLISHED_CROP) ** 2)
    compact, objects = _renumbered(labels, least)
    return PseudoClip(torch.from_numpy(images), torch.from_numpy(compact), objects)


def _draw_frame(layers: Sequence[_Layer], t: int, grid: Points, labels: Labels) -> Points:
    """Return the picture of a frame, (H, W, 3) float32, and fill in its labels."""
    canvas = np.empty((*grid.shape[:2], 3), np.float32)
    seen: dict[int, Points] = {}
    number = 0
    for layer in layers:
        if id(layer.camera) not in seen:
            seen[id(layer.camera)] = layer.camera.origin(t, grid)
        origin = layer.origin(t, seen[id(layer.camera)])
        if layer.alpha is None:
            canvas[:] = _looked_up(layer.image, origin, _FILL)
            continue
        alpha = _looked_up(layer.alpha, origin, (0,))
        number += layer.is_object
        labels[alpha > 127] = number if layer.is_object else IGNORED
        if layer.painted:
            colours = _looked_up(layer.image, origin, _FILL)
            canvas += (alpha[..., None] * np.float32(1 / 255)) * (colours - canvas)
    return canvas


def _renumbered(labels: Labels, least: float) -> tuple[Labels, int]:
    """Return labels without what frame 0 hardly shows, 1..n without gaps, and n."""
    areas = np.bincount(labels[0].ravel(), minlength=256)
    table = np.zeros(256, np.uint8)
    visible = [i for i in range(1, IGNORED) if areas[i] >= least]
    table[visible] = np.arange(1, len(visible) + 1)
    table[IGNORED] = IGNORED
    return table[labels], len(visible)


def _draw_colours(
    image: Image, config: ClipConfig, rng: np.random.Generator
) -> list[NDArray[np.float64]]:
    """Return the affine map of colours of each frame."""
    factors = [1.0, 1.0, 1.0]
    hue = 0.0
    if rng.random() < config.jitter_probability:
        factors = [float(rng.uniform(max(0, 1 - j), 1 + j)) for j in config.jitter[:3]]
        hue = float(rng.uniform(-config.jitter[3], config.jitter[3]))
    if rng.random() < config.grey_probability:
        factors[2] = 0.0
    mean = cv2.mean(image)[:3]
    light = rng.uniform(1 - config.flicker, 1 + config.flicker, config.frames)
    bright, contrast, saturation = factors
    return [colour_map(bright * float(f), contrast, saturation, hue, mean) for f in light]


def _masked(still: Still) -> list[Instance]:
    """Return the instances that have a mask."""
    return [one for one in still.instances if one.supervision is Supervision.MASK]


def _bitmap(instance: Instance, size: tuple[int, int]) -> RLE:
    """Return an instance's mask at the still's size."""
    if instance.rle is not None:
        return instance.rle
    return masks.from_polygons([polygon.tolist() for polygon in instance.polygons], *size)


def _chosen(rles: Sequence[RLE], least: float, most: int, rng: np.random.Generator) -> list[Image]:
    """Return up to ``most`` random masks, (h, w) of 0 and 1, among those that are large enough."""
    large = [rle for rle in rles if masks.area(rle) >= least]
    order = rng.permutation(len(large))[:most]
    return [masks.decode(large[i]) for i in order.tolist()]


def _resized(image: Image, factor: float) -> Image:
    """Resize an image or a mask; both the same way, so that they keep fitting."""
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=how), np.uint8)


def _placed(
    size: tuple[int, int],
    anchor: Sequence[Image],
    crop: int,
    flip: bool,
    rng: np.random.Generator,
) -> tuple[int, int]:
    """Draw where a still's corner lies in the frame, x y, so that the anchor's middle is seen."""
    height, width = size
    x, y = _middle(anchor[0], flip) if anchor else ((width - 1) / 2, (height - 1) / 2)
    corner = []
    for middle, length in ((x, width), (y, height)):
        wanted = round(float(rng.uniform(0.2, 0.8)) * crop - middle)
        low, high = min(0, crop - length), max(0, crop - length)
        corner.append(min(max(wanted, low), high))
    return corner[0], corner[1]


def _middle(alpha: Image, flip: bool) -> tuple[float, float]:
    """Return the middle x y of a mask's box, mirrored if the still is."""
    columns, rows = np.flatnonzero(alpha.any(0)), np.flatnonzero(alpha.any(1))
    if not len(columns):
        return (alpha.shape[1] - 1) / 2, (alpha.shape[0] - 1) / 2
    x = (columns[0] + columns[-1]) / 2
    return float(alpha.shape[1] - 1 - x if flip else x), float((rows[0] + rows[-1]) / 2)


def _looked_up(image: Image, origin: Points, outside: Sequence[int]) -> Points:
    """Return an image's values at places between pixels, float32."""
    unused: Any = None
    found = cv2.remap(
        image.astype(np.float32),
        origin,
        unused,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=outside,
    )
    return np.asarray(found, np.float32)


def filled(image: Image, hole: Image) -> Image:
    """Return an image whose hole is a smooth guess from around (push and pull in a pyramid).

    Args:
        image: (h, w, 3).
        hole: (h, w), not zero where the image is to be guessed; its rim is guessed too.
    """
    around = np.ones((5, 5), np.uint8)
    known = (cv2.dilate(hole, around) == 0).astype(np.float32)
    levels: list[Any] = [(image * known[..., None], known)]
    while max(levels[-1][1].shape) > 1:
        half = [-(-side // 2) for side in levels[-1][1].shape]
        levels.append([cv2.resize(x, half[::-1], interpolation=cv2.INTER_AREA) for x in levels[-1]])
    guess: Any = np.full((1, 1, 3), _FILL, np.float32)
    for colours, weight in reversed(levels):
        guess = cv2.resize(guess, weight.shape[::-1], interpolation=cv2.INTER_LINEAR)
        guess = colours + (1 - weight[..., None]) * guess
    return np.asarray(np.clip(guess + 0.5, 0, 255), np.uint8)
