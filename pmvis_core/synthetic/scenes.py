"""Scenes of the micro-benchmark: what stands where in a still, and how it moves in a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pmvis_core.errors import UsageError
from pmvis_core.synthetic.shapes import (
    OCCLUDER,
    STRANGERS,
    Frame,
    Look,
    Mask,
    Pose,
    background,
    full_area,
    paint,
    plain_look,
    random_look,
    render_look,
    texture,
    visible_masks,
)


@dataclass(frozen=True)
class SynthConfig:
    """How many of what, and how hard; the defaults are the measured design."""

    height: int = 96
    """Frame height in pixels."""
    width: int = 128
    """Frame width in pixels."""
    mask_stills: int = 400
    """Training stills with masks."""
    box_stills: int = 300
    """Training stills with boxes only."""
    val_stills: int = 60
    """Held-out stills."""
    train_videos: int = 200
    """Unlabelled videos."""
    valid_videos: int = 100
    """Held-out labelled videos."""
    frames: int = 10
    """Frames of a video."""
    gap: float = 1.75
    """How far the videos' look is from the stills'; 0 is the same look."""
    still_objects: tuple[int, int] = (1, 3)
    """Fewest and most objects of a still."""
    video_objects: tuple[int, int] = (2, 3)
    """Fewest and most objects of a video."""
    still_radius: tuple[float, float] = (14.0, 30.0)
    """Pixels."""
    video_radius: tuple[float, float] = (16.0, 26.0)
    """Pixels, before the change of scale over time."""
    aspect: tuple[float, float] = (0.8, 1.2)
    """Width over height of an object."""
    still_rotation: float = 0.5
    """Largest rotation of an object at rest, radians either way."""
    spin: float = 0.08
    """Largest rotation from frame to frame, radians either way."""
    swell: float = 0.3
    """Largest relative change of size over a video."""
    speed: tuple[float, float] = (0.8, 4.5)
    """Pixels from frame to frame."""
    pan: float = 2.0
    """Largest motion of the background from frame to frame and axis, pixels either way."""
    crossing: float = 0.25
    """Share of the video objects that enter or leave over the border."""
    spacing: float = 0.75
    """Least distance of two centres in sums of their radii, where they start."""
    visible_share: float = 0.25
    """Least visible part of an object in a still."""
    visible_pixels: int = 25
    """Least visible pixels of an object in a frame of a video; below it is absent."""
    contrast: float = 28.0
    """Standard deviation between the two colours of a texture, grey levels."""
    noise: float = 3.0
    """Standard deviation of the stills' pixel noise, grey levels."""
    clutter: tuple[int, int] = (5, 10)
    """Fewest and most lines, dots and arcs of a background."""
    video_clutter: float = 2.0
    """Most extra lines, dots and arcs of a video's background at gap 1."""
    strangers: float = 0.0
    """Things of no category in the videos, as real ones hold: at 1 a video has in the mean 1.5
    that move, 3 that stand in its background and half a bar in front of everything."""
    jpeg_quality: int = 95
    """Of all images."""

    def __post_init__(self) -> None:
        """Refuse sizes and counts that cannot be drawn."""
        sizes = (self.height, self.width, self.frames, self.still_objects[0], self.video_objects[0])
        counts = (self.mask_stills, self.box_stills, self.val_stills)
        if min(sizes) < 1 or min(*counts, self.train_videos, self.valid_videos) < 0:
            raise UsageError("the benchmark needs frames and objects, and no negative counts")
        if not 0.0 <= self.gap <= 5.0:
            raise UsageError(f"gap {self.gap}, expected a number from 0 to 5")
        if not 0.0 <= self.strangers <= 5.0:
            raise UsageError(f"strangers {self.strangers}, expected a number from 0 to 5")


@dataclass(frozen=True)
class Still:
    """A drawn still image."""

    image: Frame
    """(H, W, 3) uint8 RGB."""
    names: list[str]
    """Category of each object, the farthest first."""
    masks: list[Mask]
    """(H, W) bool each: the visible part."""


@dataclass(frozen=True)
class Clip:
    """A drawn video."""

    frames: list[Frame]
    """T of (H, W, 3) uint8 RGB."""
    names: list[str]
    """Category of each object, the farthest first."""
    masks: list[list[Mask | None]]
    """(N, T) of (H, W) bool: the visible parts, None where an object does not show."""


def draw_still(rng: np.random.Generator, config: SynthConfig, categories: Sequence[str]) -> Still:
    """Draw one still image with objects of the given categories."""
    lo, hi = config.still_objects
    names = [str(name) for name in rng.choice(categories, int(rng.integers(lo, hi + 1)))]
    poses, visible = _arrange(rng, config, names)
    names = names[: len(poses)]
    marks = int(rng.integers(config.clutter[0], config.clutter[1] + 1))
    canvas = background(rng, config.height, config.width, marks)
    for name, pose in zip(names, poses, strict=True):
        paint(canvas, name, texture(rng, config.contrast), pose)
    return Still(render_look(rng, canvas, plain_look(config.noise)), names, visible)


def draw_clip(rng: np.random.Generator, config: SynthConfig, categories: Sequence[str]) -> Clip:
    """Draw one video with objects of the given categories."""
    lo, hi = config.video_objects
    names = [str(name) for name in rng.choice(categories, int(rng.integers(lo, hi + 1)))]
    paths = _trajectories(rng, config, len(names))
    surfaces = [texture(rng, config.contrast) for _ in names]
    things = [_Thing(*thing) for thing in zip(names, surfaces, paths, strict=True)]
    look = random_look(rng, config.gap, config.noise)
    # Of their own: the same objects move in the same light with strangers and without.
    aside = rng.spawn(1)[0]
    scene = _panned_background(rng, config, aside)
    everything = _among_strangers(aside, config, things)
    objects = [i for i, thing in enumerate(everything) if thing in things]
    frames: list[Frame] = []
    visible: list[list[Mask | None]] = [[] for _ in names]
    for t in range(config.frames):
        frames.append(_video_frame(rng, scene[t], everything, t, look))
        poses = [thing.path[t] for thing in everything]
        kinds = [thing.name for thing in everything]
        shown = visible_masks(kinds, poses, config.height, config.width)
        for row, i in zip(visible, objects, strict=True):
            row.append(shown[i] if shown[i].sum() >= config.visible_pixels else None)
    return Clip(frames, names, visible)


@dataclass(frozen=True, eq=False)
class _Thing:
    """Something that moves through a video."""

    name: str
    """A category, a stranger or the occluder."""
    surface: Frame
    """Its texture."""
    path: list[Pose]
    """(T,) where it is in each frame."""


def _among_strangers(
    rng: np.random.Generator, config: SynthConfig, things: list[_Thing]
) -> list[_Thing]:
    """Return the objects in their order with strangers between them and bars in front."""
    out = list(things)
    for path in _trajectories(rng, config, int(rng.poisson(1.5 * config.strangers))):
        stranger = _Thing(str(rng.choice(STRANGERS)), texture(rng, config.contrast), path)
        out.insert(int(rng.integers(len(out) + 1)), stranger)
    for _ in range(int(rng.poisson(0.5 * config.strangers))):
        begin, step = rng.uniform(0, config.width), rng.uniform(-config.pan, config.pan)
        turn = np.pi / 2 + rng.uniform(-0.3, 0.3)
        path = [
            Pose(begin + t * step, config.height / 2, 0.6 * config.height, turn, 1.0)
            for t in range(config.frames)
        ]
        out.append(_Thing(OCCLUDER, texture(rng, config.contrast), path))
    return out


def _arrange(
    rng: np.random.Generator, config: SynthConfig, names: list[str]
) -> tuple[list[Pose], list[Mask]]:
    """Place objects so that each shows enough; after many failures with one object fewer."""
    for count in range(len(names), 0, -1):
        for _ in range(20):
            radii = rng.uniform(*config.still_radius, count)
            centres = _spread(rng, config, radii)
            turns = rng.uniform(-config.still_rotation, config.still_rotation, count)
            aspects = rng.uniform(*config.aspect, count)
            poses = [
                Pose(float(x), float(y), float(r), float(turn), float(aspect))
                for (x, y), r, turn, aspect in zip(centres, radii, turns, aspects, strict=True)
            ]
            visible = visible_masks(names[:count], poses, config.height, config.width)
            if all(
                mask.sum() >= config.visible_share * full_area(name, pose)
                for name, pose, mask in zip(names, poses, visible, strict=False)
            ):
                return poses, visible
    raise UsageError(
        f"no object of radius {config.still_radius} shows in {config.width} x {config.height}",
        "make the frames larger or the objects smaller",
    )


def _spread(
    rng: np.random.Generator, config: SynthConfig, radii: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return centres (N, 2) xy whose distances respect `spacing`, where that can be had."""
    room = np.array([config.width, config.height], np.float64)
    reach = config.spacing * (radii[:, None] + radii[None, :])
    np.fill_diagonal(reach, 0.0)
    centres = np.zeros((len(radii), 2))
    for _ in range(50):
        margin = np.minimum(0.6 * radii[:, None], room / 2.0)
        centres = rng.uniform(margin, room - margin)
        if (np.linalg.norm(centres[:, None] - centres[None], axis=-1) >= reach).all():
            break
    return centres


def _video_frame(
    rng: np.random.Generator, canvas: Frame, things: Sequence[_Thing], time: int, look: Look
) -> Frame:
    """Paint one frame's things back to front and record them with the video's camera."""
    for thing in things:
        paint(canvas, thing.name, thing.surface, thing.path[time])
    return render_look(rng, canvas, look)


def _panned_background(
    rng: np.random.Generator, config: SynthConfig, aside: np.random.Generator
) -> list[Frame]:
    """Return T crops (H, W, 3) of a background that moves steadily; ``aside`` draws strangers."""
    steps = rng.uniform(-config.pan, config.pan, 2)
    room = int(np.ceil(config.pan * (config.frames - 1))) + 1
    extra = round(config.gap * float(rng.uniform(0.0, config.video_clutter)))
    marks = int(rng.integers(config.clutter[0], config.clutter[1] + 1)) + extra
    wide = background(rng, config.height + room, config.width + room, marks)
    for _ in range(int(aside.poisson(3.0 * config.strangers))):
        x, y = aside.uniform(0, wide.shape[1]), aside.uniform(0, wide.shape[0])
        radius = aside.uniform(0.5, 1.0) * aside.uniform(*config.video_radius)
        turn, aspect = aside.uniform(0.0, 2.0 * np.pi), aside.uniform(*config.aspect)
        name = str(aside.choice(STRANGERS))
        paint(wide, name, texture(aside, config.contrast), Pose(x, y, radius, turn, aspect))
    frames: list[Frame] = []
    for t in range(config.frames):
        x, y = (round(t * float(s) if s >= 0 else room - 1 + t * float(s)) for s in steps)
        frames.append(wide[y : y + config.height, x : x + config.width].copy())
    return frames


def _trajectories(rng: np.random.Generator, config: SynthConfig, count: int) -> list[list[Pose]]:
    """Return the poses of each object in each frame, in order of depth."""
    radii = rng.uniform(*config.video_radius, count)
    starts = _spread(rng, config, radii)
    times = np.arange(config.frames)
    paths: list[list[Pose]] = []
    for radius, start in zip(radii, starts, strict=True):
        if rng.random() < config.crossing:
            centres = _crossing(rng, config, float(radius))
        else:
            centres = _bouncing(rng, config, float(radius), start)
        wave = np.sin(2.0 * np.pi * (rng.random() + rng.uniform(0.3, 1.0) * times / config.frames))
        sizes = radius * (1.0 + rng.uniform(0.0, config.swell) * wave)
        rest = rng.uniform(-config.still_rotation, config.still_rotation)
        turns = rest + rng.uniform(-config.spin, config.spin) * times
        aspect = float(rng.uniform(*config.aspect))
        paths.append(
            [
                Pose(float(x), float(y), float(size), float(turn), aspect)
                for (x, y), size, turn in zip(centres, sizes, turns, strict=True)
            ]
        )
    return paths


def _bouncing(
    rng: np.random.Generator, config: SynthConfig, radius: float, start: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return centres (T, 2) of an object that stays in the frame and bounces off its border."""
    angle = rng.uniform(0.0, 2.0 * np.pi)
    velocity = rng.uniform(*config.speed) * np.array([np.cos(angle), np.sin(angle)])
    room = np.array([config.width, config.height], np.float64)
    margin = np.minimum(0.6 * radius, room / 2.0 - 1.0)
    span = room - 2.0 * margin
    straight = start - margin + velocity * np.arange(config.frames)[:, None]
    return margin + span - np.abs(straight % (2.0 * span) - span)


def _crossing(rng: np.random.Generator, config: SynthConfig, radius: float) -> NDArray[np.float64]:
    """Return centres (T, 2) of an object that enters over a side, or backwards leaves over it."""
    room = np.array([config.width, config.height], np.float64)
    axis, far = int(rng.integers(2)), bool(rng.integers(2))
    begin = rng.uniform(0.3, 0.7) * room
    begin[axis] = -radius
    slant = rng.uniform(-0.5, 0.5)
    velocity = np.empty(2)
    velocity[axis], velocity[1 - axis] = np.cos(slant), np.sin(slant)
    velocity *= rng.uniform(0.7, 1.1) * config.speed[1]
    centres = begin + velocity * np.arange(config.frames)[:, None]
    if far:
        centres[:, axis] = room[axis] - 1.0 - centres[:, axis]
    return centres[::-1] if rng.integers(2) else centres
