"""Whole inference against the reference's clips, and the rules of what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pmvis_core import masks
from pmvis_core.checkpoint import Checkpoint
from pmvis_core.config import TrackerConfig
from pmvis_core.errors import DataError, UsageError
from pmvis_core.infer import (
    InferOptions,
    VideoInference,
    full_size_masks,
    infer_video,
    network_size,
    prepare_image,
    with_thresholds,
)
from pmvis_core.inference.segmenter import FrameSegmenter
from pmvis_core.models.idol import build_idol
from pmvis_core.systems.presets import IMAGE_PRESETS
from pmvis_core.tracks_io import TracksHeader, TracksReader, TracksWriter
from pmvis_core.types import Category, VideoTracks
from tests.golden_idol import assert_equal
from tests.parity_idol import check
from tests.parity_idol_tracks import Clip

BLANK = InferOptions(on_error="blank")


def categories(count: int) -> tuple[Category, ...]:
    return tuple(Category(i + 1, f"c{i + 1}") for i in range(count))


@pytest.mark.parametrize("case", ["B2_video_120x200_short160", "V_assembly", "G_coco_inference"])
def test_videos_and_images_are_the_reference_ones_to_the_pixel(case: str, shared: Path) -> None:
    assert_equal(check(shared / "golden/idol", [case]))


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    """A model with random weights that finds something everywhere."""
    torch.manual_seed(1)
    model = build_idol(IMAGE_PRESETS["tiny"].model, 7).eval()
    for head in model.class_embed:
        torch.nn.init.normal_(head.weight, std=0.5)
    return Checkpoint(model, categories(7), TrackerConfig(short_side=0))


def run(
    checkpoint: Checkpoint, frames: NDArray[np.uint8], broken: Sequence[int] = (), **options: Any
) -> VideoTracks:
    cpu = torch.device("cpu")
    return infer_video(checkpoint, Clip(frames, broken), cpu, InferOptions(**options))


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


def test_the_batch_of_frames_changes_rounding_only(tiny: Checkpoint) -> None:
    frames = np.random.default_rng(2).integers(0, 255, (5, 96, 128, 3), np.uint8)
    one = run(with_thresholds(tiny, {"frames_per_batch": 1}), frames)
    many = run(with_thresholds(tiny, {"frames_per_batch": 4}), frames)
    assert [t.present for t in one.tracks] == [t.present for t in many.tracks]
    for a, b in zip(one.tracks, many.tracks, strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-4)
        for t in a.present:
            differ = masks.decode(a.rles[t]) != masks.decode(b.rles[t])
            assert differ.mean() < 1e-3


def test_one_label_a_track_is_its_best(tiny: Checkpoint) -> None:
    frames = np.random.default_rng(3).integers(0, 255, (4, 96, 128, 3), np.uint8)
    best = {}
    for track in run(with_thresholds(tiny, {"row_score": 0.0}), frames).tracks:
        if track.score > best.get(track.instance, track).score or track.instance not in best:
            best[track.instance] = track
    single = run(with_thresholds(tiny, {"row_score": 0.99}), frames, single_label=True).tracks
    assert {t.instance: (t.category_id, t.score, t.rles) for t in single} == {
        key: (t.category_id, t.score, t.rles) for key, t in best.items()
    }


def test_the_largest_score_of_a_track_may_stand_for_it(tiny: Checkpoint) -> None:
    frames = np.random.default_rng(8).integers(0, 255, (4, 96, 128, 3), np.uint8)
    rows = run(with_thresholds(tiny, {"score_type": "max"}), frames).tracks
    assert rows
    for track in rows:
        assert track.score == max(s for s in track.frame_scores if s is not None)
    with pytest.raises(UsageError, match="expected one of mean, max"):
        with_thresholds(tiny, {"score_type": "median"})


def test_a_skipped_frame_is_as_if_it_had_never_been(tiny: Checkpoint) -> None:
    frames = np.random.default_rng(4).integers(0, 255, (6, 96, 128, 3), np.uint8)
    checkpoint = with_thresholds(tiny, {"frames_per_batch": 1})
    skipped = run(checkpoint, frames, broken=(2, 5), on_error="skip")
    assert skipped.tracks == run(checkpoint, np.delete(frames, (2, 5), 0)).tracks
    assert skipped.video.file_names == ("00000.jpg", "00001.jpg", "00003.jpg", "00004.jpg")
    assert skipped.video.length == 4


def test_a_blank_frame_keeps_its_place_and_counts_as_a_gap(tiny: Checkpoint) -> None:
    frames = np.random.default_rng(5).integers(0, 255, (6, 96, 128, 3), np.uint8)
    checkpoint = with_thresholds(tiny, {"frames_per_batch": 1, "max_gap_frames": 1})
    blank = run(checkpoint, frames, broken=(3,), on_error="blank")
    assert blank.video == Clip(frames).info
    assert all(track.rles[3] is None for track in blank.tracks)
    before = {t.instance for t in blank.tracks if min(t.present) < 3}
    after = {t.instance for t in blank.tracks if max(t.present) > 3}
    assert before
    assert after
    assert not before & after


def test_a_broken_frame_ends_the_run_unless_told_otherwise(tiny: Checkpoint) -> None:
    frames = np.zeros((3, 96, 128, 3), np.uint8)
    with pytest.raises(DataError, match="frame 1 is torn"):
        run(tiny, frames, broken=(1,))
    with pytest.raises(DataError, match="none of its frames"):
        run(tiny, frames, broken=(0, 1, 2), on_error="skip")


def test_the_streamed_line_is_the_one_of_the_tracks_in_memory(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    frames = np.random.default_rng(6).integers(0, 255, (12, 96, 128, 3), np.uint8)
    checkpoint = with_thresholds(tiny, {"max_gap_frames": 1, "mask_nms": 0.3})
    segmenter = FrameSegmenter(tiny.model, torch.device("cpu"))
    header = TracksHeader(checkpoint.categories)
    with VideoInference(segmenter, checkpoint, Clip(frames, (4, 8)), BLANK) as video:
        assert list(video) == list(range(1, 13))
        with TracksWriter(tmp_path / "a.tracks.jsonl", header) as writer:
            writer.write_pieces(video.pieces(), video.rows_written)
        with TracksWriter(tmp_path / "b.tracks.jsonl", header) as writer:
            writer.write(video.tracks())
    assert (tmp_path / "a.tracks.jsonl").read_bytes() == (tmp_path / "b.tracks.jsonl").read_bytes()
    (read,) = TracksReader(tmp_path / "a.tracks.jsonl")
    assert len(read.tracks) > 20


class Script:
    """A tracker that answers what it is told to."""

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers = iter(answers)

    def update(self, detections: Any) -> tuple[torch.Tensor, list[int]]:
        ids = next(self.answers)
        return torch.arange(len(ids)), ids


def test_short_tracks_that_are_gone_leave_the_result_from_the_tenth_frame(
    tiny: Checkpoint,
) -> None:
    answers: list[list[int]] = [[0] for _ in range(16)]
    answers[1] = answers[2] = [0, 1]  # twice, gone before the rule begins
    answers[3] = answers[5] = answers[7] = [0, 2]  # three times
    answers[9] = [0, 3]  # once
    answers[12] = [0, 3]  # deleted, and back with its id
    answers[14] = answers[15] = [0, 4]  # twice, but not gone at the end
    checkpoint = with_thresholds(tiny, {"select_score": 0.0, "box_nms": 1.0, "row_score": 0.0})
    frames = np.random.default_rng(7).integers(0, 255, (16, 96, 128, 3), np.uint8)
    segmenter = FrameSegmenter(tiny.model, torch.device("cpu"))
    with VideoInference(segmenter, checkpoint, Clip(frames)) as video:
        video._tracker = Script(answers)  # type: ignore[assignment]
        for _ in video:
            pass
        present = {track.instance: track.present for track in video.tracks().tracks}
    assert present == {0: tuple(range(16)), 2: (3, 5, 7), 4: (14, 15)}


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 70), st.integers(1, 70), st.integers(0, 99)
)
def test_masks_by_parts_are_the_published_ones(
    h: int, w: int, high: int, wide: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 2 * h, 2 * w, generator=generator) - 1.5
    logits[1] = -1
    resized = (8 * h - seed % 7, 8 * w - seed % 5)
    full = F.interpolate(logits[:, None], scale_factor=4, mode="bilinear", align_corners=False)
    probability = full.double().sigmoid()[:, :, : resized[0], : resized[1]]
    expected = F.interpolate(probability, size=(high, wide))[:, 0] > 0.5
    assert torch.equal(full_size_masks(logits, resized, (high, wide)), expected)


def test_an_unknown_threshold_is_named_with_its_neighbour(tiny: Checkpoint) -> None:
    with pytest.raises(UsageError, match="mask_nsm") as caught:
        with_thresholds(tiny, {"mask_nsm": 0.3})
    assert caught.value.hint == "did you mean `mask_nms`?"


def test_frames_are_resized_by_the_short_side_and_capped() -> None:
    config = TrackerConfig(short_side=60, long_side=100)
    assert network_size((120, 200), config) == (60, 100)
    assert network_size((120, 400), config) == (30, 100)
    assert network_size((120, 200), config, max_side=50) == (30, 50)
    assert network_size((120, 200), TrackerConfig(short_side=0)) == (120, 200)
    assert network_size((120, 200), TrackerConfig(short_side=0), max_side=100) == (60, 100)
    assert network_size((60, 80), TrackerConfig(short_side=0), max_side=100) == (60, 80)
    assert prepare_image(np.zeros((120, 200, 3), np.uint8), (30, 50)).shape == (3, 30, 50)


def test_masks_come_back_at_the_original_size() -> None:
    logits = torch.full((1, 8, 8), -9.0)
    logits[:, :, :4] = 9.0
    mask = full_size_masks(logits, (30, 32), (60, 64))
    assert mask.shape == (1, 60, 64)
    assert mask[0, :, :30].all()
    assert not mask[0, :, 34:].any()
