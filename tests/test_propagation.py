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
from pmvis_core.propagation.cells import (
    MOST_ALIKE,
    REACH,
    TEMPERATURE,
    CellMemory,
    Cells,
    cell_odds,
)
from pmvis_core.propagation.flow import FlowPropagator, FlowSettings, Prediction
from pmvis_core.propagation.leap import best_shift, drawn_to
from pmvis_core.propagation.working_video import WorkingVideo, one_thread
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


def test_flow_does_not_depend_on_what_was_asked_before() -> None:
    clip = Clip(length=5, speed=-15.0, start=80.0, radius=6.0)
    video = WorkingVideo(clip, clip.info, 72, 1 << 20)
    guess = np.random.default_rng(3).normal(0, 20, (HEIGHT, WIDTH, 2)).astype(np.float32)
    first = video.flow(3, 2), video.flow(3, 0, guess)
    video.flow(1, 4, -guess)
    np.testing.assert_array_equal(video.flow(3, 2), first[0])
    video.flow(4, 0)
    np.testing.assert_array_equal(video.flow(3, 0, guess), first[1])


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


def test_what_leaps_is_found_again() -> None:
    """Small and fast: it moves by twice its size and more, which the flow alone does not follow."""
    clip = Clip(length=3, speed=-30.0, start=88.0, radius=8.0)
    masks = [clip.masks[0]]
    found = [p[0].mask for p in carry(clip, range(3), masks)]
    lost = [p[0].mask for p in carry(clip, range(3), masks, FlowSettings(leap_gain=1e9))]
    assert min(iou(mask, clip.masks[t]) for t, mask in enumerate(found, 1)) > 0.8
    assert max(iou(mask, clip.masks[t]) for t, mask in enumerate(lost, 1)) < 0.2


def test_who_leaps_does_not_disturb_who_stays() -> None:
    """Two objects of one key frame, of which one goes on with a memory of its own."""
    clip = Clip(length=5, speed=-15.0, start=80.0, radius=6.0)
    stays = np.zeros((HEIGHT, WIDTH), np.uint8)
    stays[5:20, 5:25] = 1
    both = carry(clip, range(5), [clip.masks[0], stays])
    for number, mask in enumerate([clip.masks[0], stays]):
        alone = carry(clip, range(5), [mask])
        for a, b in zip(alone, both, strict=True):
            np.testing.assert_array_equal(a[0].probability, b[number].probability)


@pytest.mark.parametrize("way", [(0, 0), (9, -4), (-13, 11), (25, 0)])
def test_the_best_shift_is_the_way_that_was_gone(way: tuple[int, int]) -> None:
    before = texture(4)
    probability = np.zeros((HEIGHT, WIDTH), np.float32)
    probability[30:44, 40:52] = 1
    now = texture(5)
    now[30 + way[1] : 44 + way[1], 40 + way[0] : 52 + way[0]] = before[30:44, 40:52]
    assert best_shift(before, now, probability) == way
    assert best_shift(before, now, np.zeros_like(probability)) is None


def test_a_shift_may_lead_half_out_of_the_image_and_no_farther() -> None:
    before, now = texture(4), texture(5)
    probability = np.zeros((HEIGHT, WIDTH), np.float32)
    probability[30:44, 70:82] = 1
    now[30:44, 88:] = before[30:44, 70:78]
    assert best_shift(before, now, probability) == (18, 0)
    now = texture(5)
    now[30:44, 91:] = before[30:44, 70:75]
    shift = best_shift(before, now, probability)
    assert shift is not None
    assert shift[0] <= 20


def test_a_flow_is_drawn_to_a_shift_around_the_object_alone() -> None:
    place = np.zeros((HEIGHT, WIDTH), np.float32)
    place[30:40, 40:50] = 1
    flow = np.random.default_rng(2).normal(0, 1, (HEIGHT, WIDTH, 2)).astype(np.float32)
    drawn = drawn_to(flow, (7, -3), place)
    np.testing.assert_allclose(drawn[33:37, 43:47], np.broadcast_to([-7, 3], (4, 4, 2)), atol=0.1)
    np.testing.assert_array_equal(drawn[:15], flow[:15])


def test_cells_equal_the_formula() -> None:
    """Against loops over cells in float64, on a grid of the pixels themselves."""
    rng = np.random.default_rng(6)
    height, width = 10, 13
    size = (height, width)
    now, *frames = (unit_cells(rng, size) for _ in range(3))
    flows = [rng.integers(-3, 4, (*size, 2)).astype(np.float32) for _ in frames]
    labels = [rng.random(size).astype(np.float32) for _ in frames]
    box = (slice(2, 9), slice(0, width))
    memories = [CellMemory(*parts) for parts in zip(frames, labels, flows, strict=True)]
    found = cell_odds(now, memories, box)
    for y, x in np.ndindex(7, width):
        here = now.vectors[(y + 2) * width + x].astype(float)
        seen = []
        for memory in memories:
            dx, dy = memory.flow[y + 2, x]
            row = int(np.clip(y + 2 + dy, 0, height - 1))
            column = int(np.clip(x + dx, 0, width - 1))
            for r in range(max(0, row - REACH), min(height, row + REACH + 1)):
                for c in range(max(0, column - REACH), min(width, column + REACH + 1)):
                    alike = here @ memory.cells.vectors[r * width + c]
                    seen.append((alike, float(memory.probability[r, c])))
        best = np.array(sorted(seen)[-MOST_ALIKE:])
        weights = np.exp(best[:, 0] / TEMPERATURE)
        share, belief = weights @ best[:, ::-1] / weights.sum()
        share = np.clip(share, 0.02, 0.98)
        expected = np.clip(belief, 0, 1) * np.log(share / (1 - share))
        assert found[y, x] == pytest.approx(expected, abs=2e-3)


def unit_cells(rng: np.random.Generator, grid: tuple[int, int]) -> Cells:
    """Return random cells, somewhat alike."""
    vectors = rng.normal(0.3, 1, (grid[0] * grid[1], 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Cells(grid, vectors.astype(np.float32))


def test_features_help_where_colours_do_not() -> None:
    """Object and ground look alike, so nothing is seen to move; the given cells tell them apart."""
    clip = Clip(length=4)
    clip.images = [np.full((HEIGHT, WIDTH, 3), t, np.uint8) for t in range(4)]
    names = np.linalg.qr(np.random.default_rng(8).normal(0, 1, (16, 16)))[0].astype(np.float32)

    def embed(frame: NDArray[np.uint8]) -> Cells:
        small = clip.masks[int(frame[0, 0, 0])][::2, ::2]
        return Cells((HEIGHT // 2, WIDTH // 2), names[small.ravel()])

    overlaps = []
    for propagator in (FlowPropagator(), FlowPropagator(embed=embed)):
        sweep = propagator.open(clip, clip.info).sweep()
        sweep.advance(0)
        sweep.add(0, clip.masks[0])
        results = [sweep.advance(t)[0].mask for t in range(1, 4)]
        overlaps.append(iou(results[-1], clip.masks[3]))
    assert overlaps[1] > 0.75
    assert overlaps[0] < 0.65
