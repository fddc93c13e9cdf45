"""The weight-free propagator on moving shapes whose masks are known exactly."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pmvis_core.propagation.bilateral import (
    add_votes,
    colour_bins,
    colour_odds,
    guided_filter,
    remember,
    scaled,
)
from pmvis_core.propagation.flow import FlowPropagator, FlowSettings, Prediction, one_thread
from pmvis_core.types import VideoInfo

HEIGHT, WIDTH = 72, 96


def texture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """Return a smooth random colour pattern (H, W, 3)."""
    noise = np.random.default_rng([7, seed]).normal(0, 1, (height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.5)
    return np.clip(128 + 40 * smooth / smooth.std(), 0, 255).astype(np.uint8)


class Clip:
    """A textured disc that moves over a textured ground: frames and exact masks."""

    def __init__(
        self, length: int = 7, speed: float = 2.0, start: float = 30.0, radius: float = 12.0
    ) -> None:
        """Draw all frames."""
        rows, columns = np.indices((HEIGHT, WIDTH))
        ground, skin = texture(1), texture(2, HEIGHT, 4 * WIDTH)
        ground = (ground * 0.5 + np.array([20, 90, 30])).astype(np.uint8)
        skin = (skin * 0.5 + np.array([120, 30, 60])).astype(np.uint8)
        self.images, self.masks = [], []
        for t in range(length):
            x = start + speed * t
            mask = (columns - x) ** 2 + (rows - 36) ** 2 < radius**2
            moved = np.roll(skin, round(speed * t), axis=1)[:, :WIDTH]
            self.images.append(np.where(mask[..., None], moved, ground))
            self.masks.append(mask.astype(np.uint8))
        self.info = VideoInfo(1, "clip", HEIGHT, WIDTH, length)
        self.read: list[int] = []

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the frames in order."""
        for t in range(len(self.images)):
            self.read.append(t)
            yield self.images[t]

    def __getitem__(self, t: int) -> NDArray[np.uint8]:
        """Return one frame."""
        self.read.append(t)
        return self.images[t]


def iou(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Return the IoU of two masks; 1 if both are empty."""
    union = np.logical_or(a, b).sum()
    return float(np.logical_and(a, b).sum() / union) if union else 1.0


def carry(
    clip: Clip, order: range, masks: list[NDArray[np.uint8]], settings: FlowSettings | None = None
) -> list[dict[int, Prediction]]:
    """Propagate masks of the first frame of ``order`` to the others."""
    sweep = FlowPropagator(settings).open(clip, clip.info).sweep()
    assert sweep.advance(order[0]) == {}
    for number, mask in enumerate(masks):
        sweep.add(number, mask)
    return [sweep.advance(t) for t in order[1:]]


@pytest.mark.parametrize("order", [range(7), range(6, -1, -1)], ids=["forward", "backward"])
def test_moving_disc_is_followed(order: range) -> None:
    clip = Clip()
    results = carry(clip, order, [clip.masks[order[0]]])
    overlaps = [iou(p[0].mask, clip.masks[t]) for p, t in zip(results, order[1:], strict=True)]
    assert min(overlaps) > 0.85
    assert all(0.5 <= p[0].confidence <= 1.0 for p in results)


def test_larger_frames_work_at_the_working_size() -> None:
    clip = Clip()
    settings = FlowSettings(short_edge=48)
    results = carry(clip, range(4), [clip.masks[0]], settings)
    assert results[-1][0].probability.shape == (HEIGHT, WIDTH)
    assert iou(results[-1][0].mask, clip.masks[3]) > 0.8


def test_time_reversal() -> None:
    clip = Clip()
    mirror = Clip()
    mirror.images, mirror.masks = clip.images[::-1], clip.masks[::-1]
    forward = carry(clip, range(3, 7), [clip.masks[3]])
    backward = carry(mirror, range(3, -1, -1), [mirror.masks[3]])
    for a, b in zip(forward, backward, strict=True):
        np.testing.assert_array_equal(a[0].probability, b[0].probability)


def test_objects_do_not_influence_each_other() -> None:
    clip = Clip()
    other = np.zeros((HEIGHT, WIDTH), np.uint8)
    other[5:20, 60:80] = 1
    alone = carry(clip, range(4), [clip.masks[0]])
    together = carry(clip, range(4), [other, clip.masks[0], clip.masks[0]])
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a[0].probability, b[1].probability)
        np.testing.assert_array_equal(a[0].probability, b[2].probability)


def test_object_that_leaves_the_image_ends_empty() -> None:
    clip = Clip(length=10, speed=7.0, start=66.0)
    results = carry(clip, range(10), [clip.masks[0]])
    assert not clip.masks[-1].any()
    assert results[-1][0].mask.sum() < 16
    assert results[-1][0].confidence == 0.0 or results[-1][0].mask.any()


def test_restart_replaces_the_memory() -> None:
    clip = Clip()
    wrong = np.zeros((HEIGHT, WIDTH), np.uint8)
    wrong[2:14, 2:14] = 1
    sweep = FlowPropagator().open(clip, clip.info).sweep()
    sweep.advance(0)
    sweep.add(0, wrong)
    sweep.advance(1)
    sweep.add(0, clip.masks[1])
    assert iou(sweep.advance(2)[0].mask, clip.masks[2]) > 0.85
    sweep.drop(0)
    assert sweep.advance(3) == {}


def test_empty_mask_stays_empty() -> None:
    clip = Clip()
    results = carry(clip, range(3), [np.zeros((HEIGHT, WIDTH), np.uint8)])
    assert not results[-1][0].mask.any()
    assert results[-1][0].confidence == 0.0


def test_threads_do_not_change_the_result() -> None:
    clip = Clip()
    before = cv2.getNumThreads()
    try:
        results = []
        for threads in (1, 4):
            cv2.setNumThreads(threads)
            results.append(carry(clip, range(4), [clip.masks[0]])[-1][0].probability)
            with one_thread():
                assert cv2.getNumThreads() == 1
            assert cv2.getNumThreads() == threads
    finally:
        cv2.setNumThreads(before)
    np.testing.assert_array_equal(*results)


def test_frames_are_read_once_while_they_fit_the_cache() -> None:
    clip = Clip()
    propagation = FlowPropagator().open(clip, clip.info)
    for order in (range(3, 7), range(3, -1, -1)):
        sweep = propagation.sweep()
        for t in order:
            sweep.advance(t)
            if t == 3:
                sweep.add(0, clip.masks[3])
    assert clip.read == list(range(7))


def test_a_small_cache_changes_nothing_but_time() -> None:
    clip = Clip()
    ample = carry(clip, range(6, -1, -1), [clip.masks[6]])
    tight = carry(clip, range(6, -1, -1), [clip.masks[6]], FlowSettings(cache_bytes=1))
    for a, b in zip(ample, tight, strict=True):
        np.testing.assert_array_equal(a[0].probability, b[0].probability)


def test_votes_equal_the_formula() -> None:
    """Against the double sum written down plainly in float64."""
    rng = np.random.default_rng(3)
    lab = rng.integers(100, 160, (12, 14, 3)).astype(np.uint8)
    remembered = np.clip(lab.astype(int) + rng.integers(-9, 10, lab.shape), 0, 255).astype(np.uint8)
    trust = rng.random((12, 14)).astype(np.float32)
    probability = rng.random((12, 14)).astype(np.float32)
    box = (slice(2, 11), slice(0, 14))
    top, bottom = np.zeros((9, 14), np.float32), np.zeros((9, 14), np.float32)
    memory = remember(remembered, trust, weight=2.0, sigma=8.0, step=2)
    add_votes(top, bottom, scaled(lab, 8.0), memory, probability, box)

    expected_top, expected_bottom = np.zeros((9, 14)), np.zeros((9, 14))
    for y in range(2, 11):
        for x in range(14):
            for dy in range(-4, 5, 2):
                for dx in range(-4, 5, 2):
                    at = (min(max(y + dy, 0), 11), min(max(x + dx, 0), 13))
                    colour = np.square(lab[y, x].astype(float) - remembered[at]).sum()
                    weight = 2.0 * (0.05 + 0.95 * float(trust[at])) * np.exp(-colour / 128)
                    weight *= np.exp(-(dx * dx + dy * dy) / (2 * 2.8**2))
                    expected_top[y - 2, x] += weight * float(probability[at])
                    expected_bottom[y - 2, x] += weight
    np.testing.assert_allclose(top, expected_top, rtol=1e-4)
    np.testing.assert_allclose(bottom, expected_bottom, rtol=1e-4)


def test_colour_odds_favour_the_object() -> None:
    clip = Clip()
    lab = cv2.cvtColor(clip.images[0], cv2.COLOR_RGB2LAB)
    odds = colour_odds(lab, clip.masks[0].astype(np.float32), 61)[colour_bins(lab)]
    inside = clip.masks[0] != 0
    assert odds[inside].mean() > 1 > -1 > odds[~inside].mean()
    assert np.isfinite(colour_odds(lab, np.zeros((HEIGHT, WIDTH), np.float32), 61)).all()


def test_guided_filter_keeps_edges_and_constants() -> None:
    guide = np.zeros((20, 30), np.float32)
    guide[:, 15:] = 1
    rng = np.random.default_rng(5)
    noisy = guide + rng.normal(0, 0.1, guide.shape).astype(np.float32)
    smooth = guided_filter(guide, noisy, 4, 1e-3)
    assert np.abs(smooth - guide).mean() < 0.4 * np.abs(noisy - guide).mean()
    flat = np.full((20, 30), 0.3, np.float32)
    np.testing.assert_allclose(guided_filter(guide, flat, 4, 1e-3), flat, atol=1e-5)
