"""Views: image, boxes, masks and polygons agree; IDOL's sizes; reproducibility."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pmvis_core import masks
from pmvis_core.data.augment import (
    IDOL_STILLS,
    IDOL_VIDEOS,
    SMALL_FRAMES,
    AugmentConfig,
    Axis,
    Colour,
    View,
    Zoom,
    draw_clip,
    draw_still,
    shortest_edge,
)
from pmvis_core.errors import UsageError

CONFIGS = pytest.mark.parametrize("config", [IDOL_STILLS, IDOL_VIDEOS, SMALL_FRAMES])


def rectangle(size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    out = np.zeros((1, *size), np.uint8)
    x1, y1, x2, y2 = box
    out[0, y1:y2, x1:x2] = 1
    return out


def tight(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)


@CONFIGS
@pytest.mark.parametrize("seed", range(12))
def test_box_of_the_seen_mask_lies_in_the_seen_box(config: AugmentConfig, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, box = (210, 260), (70, 50, 190, 160)
    view = draw_still(size, config, rng)
    seen = view.masks(rectangle(size, box))[0]
    found = view.boxes(np.array([box], float))[0]
    assert seen.shape == view.size
    assert seen.any()
    # Every nearest-neighbour step may move an edge by half a pixel of its own grid.
    scale = max(view.rows.scale, abs(view.columns.scale))
    tolerance = 0.5 + (0.5 * scale if view.enlarged else 0) + 0.5
    assert np.abs(tight(seen) - found).max() <= tolerance


@CONFIGS
@pytest.mark.parametrize("seed", range(4))
def test_polygons_are_seen_like_masks(config: AugmentConfig, seed: int) -> None:
    size = (200, 240)
    polygon = np.array([30.0, 40, 200, 60, 150, 180, 60, 150])
    view = draw_still(size, config, np.random.default_rng(seed))
    bitmap = masks.decode(masks.from_polygons([polygon.tolist()], *size))
    as_mask = view.masks(bitmap[None])[0]
    height, width = view.size
    as_polygon = masks.decode(masks.from_polygons([view.polygon(polygon).tolist()], height, width))
    union = (as_mask | as_polygon).sum()
    assert (as_mask & as_polygon).sum() / union > 0.95


@CONFIGS
def test_the_image_moves_with_its_mask(config: AugmentConfig) -> None:
    # Too far from the border for its reflection to show a second piece.
    size, box = (200, 240), (90, 75, 150, 125)
    mask = rectangle(size, box)
    image = np.repeat(mask[0, :, :, None] * np.uint8(200), 3, axis=2)
    for seed in range(8):
        view = draw_still(size, config, np.random.default_rng(seed))
        seen = view.image(image).mean(axis=2)
        inside = view.masks(mask)[0] > 0
        assert seen.shape == inside.shape
        bright = seen > seen[inside].mean() / 2
        assert (bright & inside).sum() / (bright | inside).sum() > 0.93


def test_flipping_twice_is_the_identity() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (7, 11, 3), dtype=np.uint8)
    mask = rng.integers(0, 2, (3, 7, 11), dtype=np.uint8)
    boxes = np.array([[1.0, 2, 5, 6], [0, 0, 11, 7]])
    view = View((7, 11), flip=True)
    once = view.image(image).astype(np.uint8)
    np.testing.assert_array_equal(view.image(once), image)
    np.testing.assert_array_equal(once, image[:, ::-1])
    np.testing.assert_array_equal(view.masks(view.masks(mask)), mask)
    np.testing.assert_array_equal(view.boxes(view.boxes(boxes)), boxes)
    np.testing.assert_array_equal(view.boxes(boxes)[0], [6, 2, 10, 6])


def test_boxes_are_clipped_and_may_become_empty() -> None:
    view = View((100, 100), crop=(20, 30, 40, 50))
    found = view.boxes(np.array([[0.0, 0, 50, 50], [0, 0, 10, 10], [90, 30, 99, 40]]))
    np.testing.assert_array_equal(found, [[0, 0, 20, 30], [0, 0, 0, 0], [50, 10, 50, 20]])


@pytest.mark.parametrize(
    ("source", "short", "longest", "expected"),
    [
        ((480, 640), 480, 768, (480, 640)),
        ((480, 640), 640, 768, (576, 768)),
        ((720, 1280), 480, 768, (432, 768)),
        ((1280, 720), 480, 768, (768, 432)),
        ((720, 1280), 480, 1333, (480, 853)),
        ((333, 500), 320, 1333, (320, 480)),
        ((427, 640), 352, 1333, (352, 528)),
        ((500, 500), 400, None, (400, 400)),
        ((100, 5000), 600, None, (600, 30000)),
        ((10, 20000), 640, 768, (1, 768)),
    ],
)
def test_sizes_follow_detectron2(
    source: tuple[int, int], short: int, longest: int | None, expected: tuple[int, int]
) -> None:
    assert shortest_edge(source, short, longest) == expected


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 800), st.integers(1, 1333))
def test_sizes_keep_their_cap(height: int, width: int, short: int, longest: int) -> None:
    found = shortest_edge((height, width), short, longest)
    assert 1 <= max(found) <= max(longest, 1)
    assert min(found) <= short


@settings(max_examples=200)
@given(st.integers(1, 300), st.integers(1, 300))
def test_masks_are_resized_like_pil_nearest(old: int, new: int) -> None:
    line = np.arange(old, dtype=np.int32)[None]
    by_pil = np.asarray(Image.fromarray(line).resize((new, 1), Image.Resampling.NEAREST))[0]
    np.testing.assert_array_equal(Axis.identity(old).resized(new).index, by_pil)


def test_crops_and_sizes_of_stills_are_those_of_idol() -> None:
    views = [draw_still((480, 640), IDOL_STILLS, np.random.default_rng(s)) for s in range(400)]
    cropped = [view for view in views if view.crop is not None]
    assert 150 < len(cropped) < 250
    assert 150 < sum(view.flip for view in views) < 250
    assert {min(v.enlarged) for v in cropped if v.enlarged} == {400, 500, 600}
    for view in cropped:
        assert view.crop is not None and view.enlarged is not None
        top, left, height, width = view.crop
        assert min(384, view.enlarged[0]) <= height <= min(600, view.enlarged[0])
        assert min(384, view.enlarged[1]) <= width <= min(600, view.enlarged[1])
        assert 0 <= top <= view.enlarged[0] - height and 0 <= left <= view.enlarged[1] - width
    assert {min(view.size) for view in views} == set(IDOL_STILLS.min_sizes)


def test_frames_of_a_clip_share_size_and_flip_but_not_the_crop() -> None:
    differing = 0
    for seed in range(40):
        first, second = draw_clip([(720, 1280)] * 2, IDOL_VIDEOS, np.random.default_rng(seed))
        assert first.flip == second.flip
        assert first.enlarged is None and second.enlarged is None
        assert (first.crop is None) == (second.crop is None)
        assert max(*first.size, *second.size) <= 768
        if first.crop is None:
            assert first.size == second.size
        differing += first.crop != second.crop
    assert differing > 10


def test_small_crops_take_what_there_is() -> None:
    config = AugmentConfig(crop_probability=1.0, min_sizes=(), crop_resize=())
    view = draw_still((96, 128), config, np.random.default_rng(0))
    assert view.crop == (0, 0, 96, 128)
    assert view.size == (96, 128)


def test_zoom_keeps_the_size_and_shows_nothing_outside() -> None:
    view = View((40, 60), zoom=Zoom(0.5, (0.0, 10.0)))
    mask = np.ones((1, 40, 60), np.uint8)
    seen = view.masks(mask)[0]
    np.testing.assert_array_equal(tight(seen), [25, 10, 55, 30])
    np.testing.assert_array_equal(view.boxes(np.array([[0.0, 0, 60, 40]]))[0], [25, 10, 55, 30])
    image = np.full((40, 60, 3), 77, np.uint8)
    assert (view.image(image) == 77).all()


def test_zoom_by_two_is_exact_on_pixel_blocks() -> None:
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, (1, 8, 8), dtype=np.uint8)
    seen = View((8, 8), zoom=Zoom(2.0, (0.0, 0.0))).masks(mask)
    np.testing.assert_array_equal(seen[0], mask[0, 2:6, 2:6].repeat(2, 0).repeat(2, 1))


def test_colour_is_neutral_at_one_and_clips() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    np.testing.assert_allclose(Colour(1.0, (1.0, 1.0, 1.0)).apply(image), image, atol=1e-4)
    bright = Colour(1.0, (10.0, 1.0, 0.0)).apply(image)
    assert bright[..., 0].max() == 255 and bright[..., 2].max() == 0
    expected = (image - image.mean()) * 0.5 + image.mean()
    np.testing.assert_allclose(Colour(0.5, (1.0, 1.0, 1.0)).apply(image), expected, atol=1e-3)


def test_resizing_is_antialiased_as_in_pil() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    seen = View((64, 80), resized=(16, 20)).image(image)
    expected = np.asarray(Image.fromarray(image).resize((20, 16), Image.Resampling.BILINEAR))
    # torch's kernel rounds a few values the other way.
    assert np.abs(seen - expected).max() <= 1
    assert np.mean(seen != expected) < 0.01


@CONFIGS
def test_the_same_seed_draws_the_same_view(config: AugmentConfig) -> None:
    first, second = (draw_still((90, 70), config, np.random.default_rng(5)) for _ in range(2))
    assert first == second
    assert any(
        draw_still((90, 70), config, np.random.default_rng(s)) != first for s in range(6, 12)
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flip_probability", 1.5),
        ("crop_range", (600, 384)),
        ("min_sizes", (0,)),
        ("max_size", 0),
        ("scale_range", (0.0, 1.0)),
        ("shift", -0.1),
        ("contrast", 1.0),
    ],
)
def test_impossible_numbers_are_refused(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        AugmentConfig(**{field: value})  # type: ignore[arg-type]
