"""Pseudo-clips: masks go where pixels go, numbers are compact, nothing depends on chance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RBFInterpolator
from torchvision.transforms import functional as reference

from pmvis_core import masks
from pmvis_core.errors import DataError, UsageError
from pmvis_core.propagator_training.layer_motion import Motion, Reach, colour_map, draw_motion
from pmvis_core.propagator_training.pseudo_clips import (
    IGNORED,
    ClipConfig,
    PseudoClip,
    StillClips,
    filled,
)
from tests.flat_stills import COLOURS, draw_stills

PLAIN = ClipConfig(
    crop=97, jitter_probability=0, flicker=0, grey_probability=0, blur_probability=0, least_area=400
)
"""Colours stay as they are."""


def sample(clips: StillClips, seed: int) -> PseudoClip:
    return clips.sample(seed % len(clips), np.random.default_rng(seed))


def shrunk(mask: Any, by: int) -> Any:
    """Return a mask without a rim; beyond the frame there is nothing."""
    framed = np.pad(mask.astype(np.uint8), by)
    return cv2.erode(framed, np.ones((2 * by + 1,) * 2))[by:-by, by:-by] == 1


@pytest.fixture(scope="module")
def stills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_stills(tmp_path_factory.mktemp("stills"))


def test_masks_move_with_the_pixels(stills: Path) -> None:
    clips = StillClips(stills, None, PLAIN)
    moved = 0
    for seed in range(12):
        clip = sample(clips, seed)
        pictures = clip.images.permute(0, 2, 3, 1).numpy()
        labels = clip.labels.numpy()
        palette = np.array(COLOURS, np.float32)
        of_object = {}
        for label in range(1, clip.objects + 1):
            mean = np.median(pictures[0][labels[0] == label], 0)
            of_object[label] = int(np.abs(palette - mean).sum(1).argmin())
        for picture, label_map in zip(pictures, labels, strict=True):
            for label, colour in of_object.items():
                inside = shrunk(label_map == label, 2)
                off = np.abs(picture[inside] - palette[colour]).max(initial=0)
                assert off < 2, (seed, label)
            nothing = shrunk(label_map == 0, 4)
            vivid = np.ptp(picture, axis=-1) > 150
            # An object of a colour in the background is one that frame 0 hardly shows.
            assert (vivid & nothing).mean() < 0.02, seed
        moved += int((labels[0] != labels[-1]).mean() > 0.02)
    assert moved >= 10


def test_the_first_frame_is_at_rest_and_without_motion_so_are_all(stills: Path) -> None:
    still = ClipConfig(
        **{**vars(PLAIN), "rotate_deg": 0, "shift": 0, "scale": 0, "shear_deg": 0, "bend": 0}
    )
    clip = sample(StillClips(stills, None, still), 1)
    assert (clip.labels == clip.labels[0]).all()
    assert (clip.images - clip.images[0]).abs().max() < 1e-3


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_numbers_are_compact_and_all_visible_in_the_reference(stills: Path, seed: int) -> None:
    clip = sample(StillClips(stills, None, ClipConfig(crop=65, least_area=400)), seed)
    first = set(clip.labels[0].unique().tolist())
    assert first - {0} == set(range(1, clip.objects + 1))
    assert set(clip.labels.unique().tolist()) <= first | {0}
    assert clip.objects <= 10
    assert clip.images.shape == (5, 3, 65, 65)
    assert clip.labels.dtype == torch.uint8
    assert 0 <= clip.images.min() and clip.images.max() <= 255


def test_two_stills_give_up_to_ten_objects_and_one_gives_five(stills: Path) -> None:
    def most(**more: Any) -> int:
        config = ClipConfig(crop=161, least_area=50, zoom=(0.7, 0.8), **more)
        clips = StillClips(stills, None, config)
        return max(sample(clips, seed).objects for seed in range(15))

    assert 5 < most() <= 10
    assert most(merge=0.0) == 5
    assert most(merge=0.0, objects=2) == 2


def test_a_clip_depends_on_its_seed_alone(stills: Path) -> None:
    clips = StillClips(stills, None, ClipConfig(crop=65))
    first, again, other = (sample(clips, seed) for seed in (3, 3, 6))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)


def test_crowds_are_ignored_and_move_along(tmp_path: Path) -> None:
    crowd = np.zeros((120, 160), np.uint8)
    crowd[:, 80:] = 1
    row = {"id": 900, "image_id": 1, "category_id": 1, "bbox": [80, 0, 80, 120], "iscrowd": 1}
    rle = masks.encode(crowd)
    path = draw_stills(tmp_path, 1, annotations=[{**row, "segmentation": rle, "area": 9600}])
    config = ClipConfig(**{**vars(PLAIN), "merge": 0, "own_motion": 0, "flip": 0})
    clips = StillClips(path, None, config)
    seen = [sample(clips, seed).labels for seed in range(6)]
    for labels in seen:
        assert set(labels.unique().tolist()) <= {*range(11), IGNORED}
    assert sum(bool((labels[0] == IGNORED).any()) for labels in seen) >= 4
    assert any((labels[0] == IGNORED).sum() != (labels[-1] == IGNORED).sum() for labels in seen)
    assert clips.ledger()["images"]["mask"] == 5


def test_images_with_boxes_only_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cv2.imwrite(str(tmp_path / "box.png"), np.zeros((50, 50, 3), np.uint8))
    image = {"id": 50, "file_name": "box.png", "height": 50, "width": 50}
    box = {"id": 901, "image_id": 50, "category_id": 1, "bbox": [1, 1, 9, 9], "iscrowd": 0}
    path = draw_stills(tmp_path, 2, images=[image], annotations=[{**box, "area": 81}])
    clips = StillClips(path, None, PLAIN)
    assert (len(clips), clips.left_out) == (2, 1)
    assert "1 of 3 images have boxes only" in caplog.text
    data = json.loads(path.read_text())
    data["annotations"] = data["annotations"][-1:]
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match="boxes but no masks in its 1 images"):
        StillClips(path, None, PLAIN)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("frames", 1), ("objects", 6), ("zoom", (1.0, 0.5)), ("flip", 1.5), ("scale", 1.0)],
)
def test_numbers_that_mean_nothing_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(UsageError):
        ClipConfig(**{setting: value})


def test_a_thin_plate_is_the_one_that_scipy_knows() -> None:
    rng = np.random.default_rng(0)
    bends = rng.normal(0, 3, (2, 16, 2))
    motion = Motion(np.tile(np.eye(2), (2, 1, 1)), np.zeros((2, 2)), bends, (0.0, 0.0))
    # At this side the fine grid of the field lies on pixel centres, once edges are left out.
    side = 33
    rest = np.stack(np.meshgrid(*2 * [np.arange(side, dtype=np.float32)]), -1)
    knots = np.stack(np.meshgrid(*2 * [np.linspace(0, 1, 4)]), -1).reshape(-1, 2)
    places = np.stack(np.meshgrid(*2 * [np.linspace(0, 1, side)]), -1).reshape(-1, 2)
    for t in range(2):
        field = RBFInterpolator(knots, bends[t], kernel="thin_plate_spline")(places)
        got = motion.origin(t, rest) - rest
        np.testing.assert_allclose(got.reshape(-1, 2), field, atol=1e-4)


def test_motion_starts_at_rest_and_keeps_within_its_reach() -> None:
    rest = np.stack(np.meshgrid(*2 * [np.arange(101, dtype=np.float32)]), -1)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        motion = draw_motion(rng, Reach(20, 0.1, 0.1, 0, 0), 5, 101, (50.0, 50.0))
        np.testing.assert_allclose(motion.origin(0, rest), rest, atol=1e-5)
        for t in range(5):
            assert np.abs(motion.origin(t, rest)[50, 50] - 50).max() <= 10.1 + 1e-4
            size = np.sqrt(np.linalg.det(motion.matrices[t]))
            assert 1 / 1.1 - 1e-9 <= size <= 1.1 + 1e-9
            angle = np.degrees(np.arctan2(motion.matrices[t][1, 0], motion.matrices[t][0, 0]))
            assert abs(angle) <= 20 + 1e-9


def test_colours_change_as_torchvision_changes_them() -> None:
    picture = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.3
    expected = reference.adjust_brightness(picture, 1.2)
    expected = reference.adjust_contrast(expected, 0.7)
    expected = reference.adjust_saturation(expected, 1.3)
    matrix = colour_map(1.2, 0.7, 1.3, 0.0, picture.mean((1, 2)).tolist())
    got = np.einsum("ij,jhw->ihw", matrix[:, :3], picture.numpy()) + matrix[:, 3][:, None, None]
    np.testing.assert_allclose(got, expected.numpy(), atol=2e-4)


def test_hue_turns_about_grey() -> None:
    def turned(turns: float) -> Any:
        return colour_map(1, 1, 1, turns, (100, 120, 90))

    np.testing.assert_allclose(turned(0.0), np.eye(3, 4), atol=1e-12)
    np.testing.assert_allclose(turned(1 / 3)[:, :3] @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(turned(0.123)[:, :3] @ [7, 7, 7], [7, 7, 7], atol=1e-12)
    grey = colour_map(1, 1, 0, 0.2, (100, 120, 90))[:, :3] @ [30, 200, 90]
    np.testing.assert_allclose(grey, np.dot([0.299, 0.587, 0.114], [30, 200, 90]))


def test_a_hole_is_guessed_from_around() -> None:
    rows = np.linspace(0, 200, 64, dtype=np.float32)
    picture = np.repeat(np.tile(rows[:, None, None], (1, 48, 1)), 3, 2).astype(np.uint8)
    hole = np.zeros((64, 48), np.uint8)
    hole[20:44, 10:38] = 255
    spoilt = picture.copy()
    spoilt[hole > 0] = 255
    guess = filled(spoilt, hole)
    far = cv2.dilate(hole, np.ones((7, 7))) == 0
    np.testing.assert_array_equal(guess[far], picture[far])
    assert np.abs(guess.astype(int) - picture)[hole > 0].mean() < 25
    assert filled(picture, np.full((64, 48), 255, np.uint8)).shape == picture.shape
