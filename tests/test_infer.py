"""Whole inference against the reference's clips, and the rules of what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pmvis_core import masks
from pmvis_core.checkpoint import Checkpoint
from pmvis_core.config import TrackerConfig
from pmvis_core.errors import UsageError
from pmvis_core.infer import full_size_masks, infer_video, prepare_image, with_thresholds
from pmvis_core.models.idol import build_idol
from pmvis_core.systems.presets import IMAGE_PRESETS
from pmvis_core.types import Category, VideoInfo, VideoTracks
from tests.golden_idol import golden_model


class Clip:
    """Frames in memory, given one after the other."""

    def __init__(self, frames: NDArray[np.uint8]) -> None:
        self.images = frames
        self.info = VideoInfo(1, "clip", frames.shape[1], frames.shape[2], len(frames))
        self.alive = 0

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        yield from self.images


def categories(count: int) -> tuple[Category, ...]:
    return tuple(Category(i + 1, f"c{i + 1}") for i in range(count))


def test_a_clip_gives_the_reference_tracks_to_the_pixel(shared: Path) -> None:
    golden = np.load(shared / "golden/idol/B2_video_120x200_short160.npz")
    clip = Clip(golden["frames"])
    checkpoint = Checkpoint(
        golden_model(shared, "resnet50"), categories(40), TrackerConfig(short_side=160)
    )
    found = infer_video(checkpoint, clip, torch.device("cpu"))  # type: ignore[arg-type]
    assert [t.category_id - 1 for t in found.tracks] == golden["out_labels"].tolist()
    scores = [t.score for t in found.tracks]
    np.testing.assert_allclose(scores, golden["out_scores"], atol=1e-5, rtol=0)
    order = list(dict.fromkeys(t.instance for t in found.tracks))
    assert [order.index(t.instance) for t in found.tracks] == golden["out_track"].tolist()
    pixels = golden["frames"].shape[1:3]
    for track in found.tracks:
        row = order.index(track.instance)
        assert [r is not None for r in track.rles] == golden["track_present"][row].tolist()
        for t in track.present:
            bits = np.unpackbits(golden["track_masks_bits"][row, t])[: pixels[0] * pixels[1]]
            assert (masks.decode(track.rles[t]) == bits.reshape(pixels)).all()


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    """A model with random weights that finds something everywhere."""
    torch.manual_seed(1)
    model = build_idol(IMAGE_PRESETS["tiny"].model, 7).eval()
    for head in model.class_embed:
        torch.nn.init.normal_(head.weight, std=0.5)
    return Checkpoint(model, categories(7), TrackerConfig(short_side=0))


def run(checkpoint: Checkpoint, frames: NDArray[np.uint8]) -> VideoTracks:
    return infer_video(checkpoint, Clip(frames), torch.device("cpu"))  # type: ignore[arg-type]


def test_rows_follow_the_rules(tiny: Checkpoint) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (7, 96, 128, 3), np.uint8)
    found = run(tiny, frames)
    assert found.tracks
    assert len({t.id for t in found.tracks}) == len(found.tracks)
    for track in found.tracks:
        seen = [s for s in track.frame_scores if s is not None]
        assert len(track.rles) == len(track.frame_scores) == 7
        assert [s is None for s in track.frame_scores] == [r is None for r in track.rles]
        assert track.score == pytest.approx(np.mean(seen), abs=1e-5)
        assert track.score > tiny.tracker.row_score


def test_the_batch_of_frames_does_not_change_the_result(tiny: Checkpoint) -> None:
    frames = np.random.default_rng(2).integers(0, 255, (5, 96, 128, 3), np.uint8)
    one = run(with_thresholds(tiny, {"frames_per_batch": 1}), frames)
    many = run(with_thresholds(tiny, {"frames_per_batch": 4}), frames)
    assert [t.rles for t in one.tracks] == [t.rles for t in many.tracks]


def test_an_unknown_threshold_is_named_with_its_neighbour(tiny: Checkpoint) -> None:
    with pytest.raises(UsageError, match="mask_nsm") as caught:
        with_thresholds(tiny, {"mask_nsm": 0.3})
    assert caught.value.hint == "did you mean `mask_nms`?"


def test_frames_are_resized_by_the_short_side_and_capped() -> None:
    config = TrackerConfig(short_side=60, long_side=100)
    assert prepare_image(np.zeros((120, 200, 3), np.uint8), config).shape == (3, 60, 100)
    assert prepare_image(np.zeros((120, 400, 3), np.uint8), config).shape == (3, 30, 100)


def test_masks_come_back_at_the_original_size() -> None:
    logits = torch.full((1, 8, 8), -9.0)
    logits[:, :, :4] = 9.0
    mask = full_size_masks(logits, (30, 32), (60, 64))
    assert mask.shape == (1, 60, 64)
    assert mask[0, :, :30].all()
    assert not mask[0, :, 34:].any()
