"""Broken samples: which others are drawn in their place, what is told, and when training stops."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scipy.optimize import brentq

from pmvis_core.config import TrainConfig
from pmvis_core.data.augment import SMALL_FRAMES
from pmvis_core.data.datasets import CocoImages, PseudoVideos, image_mixture
from pmvis_core.data.spares import (
    LUCK,
    NAMED,
    PLAN,
    RECORDED,
    SKIP,
    STOP,
    BrokenSamples,
    Looked,
    SkippedSamples,
    judge_missing,
    on_error_of,
)
from pmvis_core.data.streams import Ledger, Mixture, batches, prefetch
from pmvis_core.errors import DataError, UsageError
from pmvis_core.propagator_training.train import PropagatorTraining
from pmvis_core.types import Category, VideoTracks
from pmvis_core.video.frames import read_image
from tests.test_datasets import CATEGORIES, info, rectangle, track, write_image, write_videos


class Shelf:
    """A source some of whose items are broken."""

    categories: tuple[Category, ...] = ()
    files_a_sample = 1

    def __init__(self, length: int, broken: set[int], name: str = "") -> None:
        """Hold ``length`` items."""
        self.length, self.broken, self.name = length, broken, name

    def __len__(self) -> int:
        """Return the number of items."""
        return self.length

    def sample(self, index: int, rng: np.random.Generator) -> tuple[str, int, float]:
        """Return the item and a random number."""
        if index in self.broken:
            raise DataError(f"item {index} is broken")
        return self.name, index, float(rng.random())

    def ledger(self) -> Ledger:
        """Return nothing of interest."""
        return {"items": Counter(images=self.length)}


def shelves() -> Mixture[tuple[str, int, float]]:
    return Mixture([Shelf(40, {3, 17}, "a"), Shelf(60, {5, 6, 40}, "b")], [1, 2])


def drawn(threads: int, start: int = 0, steps: int = 60) -> list[list[tuple[str, int, float]]]:
    stream = batches(shelves(), 4, 1, start_step=start, threads=threads, broken=BrokenSamples())
    return list(itertools.islice(prefetch(stream), steps))


def test_spares_depend_on_neither_workers_nor_resumption() -> None:
    whole = drawn(0)
    assert drawn(3) == whole
    assert drawn(2, 20, 40) == whole[20:]
    items = [item for batch in whole for item in batch]
    assert not {("a", 3), ("a", 17), ("b", 5)} & {item[:2] for item in items}


def test_a_spare_comes_from_the_same_source_and_the_rest_stays() -> None:
    sound = Mixture([Shelf(40, set(), "a"), Shelf(60, set(), "b")], [1, 2])
    expected = [x for batch in itertools.islice(batches(sound, 4, 1), 60) for x in batch]
    found = [x for batch in drawn(0) for x in batch]
    assert [x[0] for x in found] == [x[0] for x in expected]
    changed = [old[:2] for old, new in zip(expected, found, strict=True) if old != new]
    assert changed
    assert set(changed) <= {("a", 3), ("a", 17), ("b", 5), ("b", 6), ("b", 40)}


def test_processes_share_what_one_draws_alone() -> None:
    alone = drawn(0, steps=5)
    parts = [
        list(itertools.islice(batches(shelves(), 2, 1, rank, 2, broken=BrokenSamples()), 5))
        for rank in range(2)
    ]
    assert [a + b for a, b in zip(*parts, strict=True)] == alone


def trained(
    stream: Iterator[Any],
    broken: BrokenSamples,
    steps: int,
    skipped: SkippedSamples | None = None,
    start: int = 0,
) -> SkippedSamples:
    """Do what the run loop does with what is skipped; raise what ends a run."""
    skipped = skipped or SkippedSamples()
    for step in range(start, steps):
        next(stream)
        skipped.add(step, broken.taken(step))
        fault = skipped.verdict(at_end=step + 1 == steps)
        if fault is not None:
            raise fault
    return skipped


def run_on(source: Any, share: int, steps: int, seed: int = 0) -> SkippedSamples:
    """Return what a run on a source skips."""
    broken = BrokenSamples()
    return trained(batches(source, share, seed, broken=broken), broken, steps)


def test_what_is_skipped_is_named_counted_and_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    broken = BrokenSamples()
    with caplog.at_level(logging.WARNING):
        stream = batches(Shelf(200, set(range(0, 200, 20))), 4, 0, broken=broken)
        skipped = trained(stream, broken, 100)
        assert broken.taken(0) == (0, [])
        skipped.tell("`run.json`")
    assert skipped.samples >= 20
    assert skipped.files == 400 + skipped.samples
    named = [line for line in caplog.messages if "skipped, another is drawn: item" in line]
    assert len(named) == NAMED
    assert "(10 different faults" in caplog.messages[-1]
    assert f"{skipped.samples} samples could not be made" in caplog.messages[-1]
    assert "`run.json` names them" in caplog.messages[-1]
    record = skipped.record()
    assert (record["samples"], record["different"]) == (skipped.samples, 10)
    assert record["faults"].keys() == {f"item {i} is broken" for i in range(0, 200, 20)}
    assert sum(record["faults"].values()) == skipped.samples


def test_silence_where_nothing_is_broken(caplog: pytest.LogCaptureFixture) -> None:
    skipped = run_on(Shelf(9, set()), 4, 5)
    skipped.tell("nothing")
    assert (skipped.files, skipped.record(), caplog.messages) == (20, {}, [])


def test_what_was_skipped_goes_on_after_a_resumption(caplog: pytest.LogCaptureFixture) -> None:
    source = Shelf(200, set(range(0, 200, 20)))
    whole = run_on(source, 4, 60)
    first, again = BrokenSamples(), BrokenSamples()
    state = trained(batches(source, 4, 0, broken=first), first, 25).state()
    caplog.clear()
    stream = batches(source, 4, 0, start_step=25, broken=again)
    resumed = trained(stream, again, 60, SkippedSamples(json.loads(json.dumps(state))), start=25)
    assert (resumed.state(), resumed.record()) == (whole.state(), whole.record())
    told = [line for line in caplog.messages if "another is drawn" in line]
    assert not any(fault in line for fault in state["faults"] for line in told)


def test_a_record_names_no_folder_and_not_everything() -> None:
    skipped = SkippedSamples(aloud=False)
    faults = [f"training image {i}: `/home/me/data/{i}.jpg` is truncated" for i in range(300)]
    skipped.add(0, Looked(9000, [*faults, faults[0]]))
    record = skipped.record()
    assert (record["samples"], record["different"], len(record["faults"])) == (301, 300, RECORDED)
    assert record["faults"]["training image 0: `0.jpg` is truncated"] == 2
    assert "/home" not in json.dumps(record)


def test_a_storm_of_five_percent_goes_through_and_one_of_a_fifth_stops() -> None:
    for seed in range(20):
        run_on(Shelf(400, set(range(20))), 2, 500, seed)
    with pytest.raises(DataError, match=r"of the \d+ files .* \d+ are broken \(\d+ different"):
        run_on(Shelf(400, set(range(80))), 2, 1000)
    with pytest.raises(DataError, match=r"51 samples in a row .* the last: item .* is broken"):
        run_on(Shelf(4, set(range(4))), 2, 1)


class Doubles(Shelf):
    """A source of samples that take two items each, as pairs of frames do."""

    files_a_sample = 2

    def sample(self, index: int, rng: np.random.Generator) -> tuple[str, int, float]:
        """Return the item if another one is whole, too."""
        super().sample(int(rng.integers(self.length)), rng)
        return super().sample(index, rng)


@pytest.mark.parametrize("kind", [Shelf, Doubles])
@pytest.mark.parametrize("share", [1, 2, 6])
def test_files_are_judged_however_many_a_sample_takes(kind: type[Shelf], share: int) -> None:
    for seed in range(5):
        run_on(kind(400, set(range(20))), share, 2000 // share, seed)
        for length in (20, 400):
            with pytest.raises(DataError, match="more than 10%"):
                run_on(kind(length, set(range(length // 2))), share, 30, seed)


def test_a_short_run_is_judged_at_its_end() -> None:
    for seed in range(20):
        with pytest.raises(DataError, match="more than 10%"):
            run_on(Shelf(40, set(range(26))), 2, 6, seed)  # two thirds
        run_on(Shelf(40, {3, 9}), 2, 6, seed)


def test_one_broken_file_alone_is_forgiven() -> None:
    assert run_on(Shelf(8, {3}), 2, 3000).samples > 600
    with pytest.raises(DataError, match="2 different faults"):
        run_on(Shelf(8, {3, 4}), 2, 3000)


@pytest.mark.parametrize(
    ("missing", "whole", "fine"),
    [(1, 8, True), (2, 8, False), (1, 2, True), (1, 1, False), (2, 20, True), (3, 20, False)],
)
def test_missing_files_are_judged_alike(missing: int, whole: int, fine: bool) -> None:
    with contextlib.nullcontext() if fine else pytest.raises(DataError, match="gone"):
        judge_missing("gone", missing, whole, SKIP, None)
    judge_missing("gone", missing, whole, PLAN, None)
    with pytest.raises(DataError, match="gone"):
        judge_missing("gone", missing, whole, STOP, None)


def test_the_luck_that_is_allowed_is_as_rare_as_it_is_said_to_be() -> None:
    r = brentq(lambda r: 0.05 * math.exp(0.9 * r) + 0.95 * math.exp(-0.1 * r) - 1, 0.5, 3)
    assert r == pytest.approx(1.37, abs=0.005)
    assert math.exp(-LUCK * r) < 2e-6


def test_without_the_policy_the_first_one_stops() -> None:
    with pytest.raises(DataError, match=r"^item 4 is broken$"):
        list(itertools.islice(batches(Shelf(10, {4}), 2, 0), 20))
    assert (on_error_of("stop"), on_error_of("skip")) == (STOP, SKIP)
    for word in ("skipp", "plan"):
        for schedule in (TrainConfig, PropagatorTraining):
            with pytest.raises(UsageError, match=f"`train.on_error` is '{word}', expected one of"):
                schedule(on_error=word)


def many_stills(folder: Path, number: int) -> Path:
    """Write a COCO file of small images with a box each."""
    rows = [{"image_id": i, "category_id": 7, "bbox": [5, 6, 20, 22]} for i in range(1, number + 1)]
    images = []
    for i in range(1, number + 1):
        write_image(folder / f"images/{i}.png", i)
        images.append({"id": i, "file_name": f"images/{i}.png", "height": 40, "width": 60})
    path = folder / "train_image.json"
    numbered = [{"id": row["image_id"], **row} for row in rows]
    data = {"categories": CATEGORIES, "images": images, "annotations": numbered}
    path.write_text(json.dumps(data))
    return path


def test_missing_images_are_told_and_skipped_while_they_are_few(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = many_stills(tmp_path, 20)
    (tmp_path / "images/3.png").unlink()
    (tmp_path / "images/4.png").write_bytes(b"\x89PNG no image")
    with pytest.raises(DataError, match="1 of 20 training images are missing"):
        CocoImages(path, None, SMALL_FRAMES)
    with caplog.at_level(logging.WARNING):
        stills = CocoImages(path, None, SMALL_FRAMES, on_error=SKIP)
    assert "1 of 20 training images are missing" in caplog.messages[0]
    skipped = run_on(image_mixture(stills), 4, 20)
    assert skipped.samples >= 8  # each is drawn in every one of four epochs
    assert skipped.record()["faults"].keys() == {
        "training image 3: `3.png` does not exist",
        "training image 4: `4.png` is truncated",
    }
    for number in range(5, 8):
        (tmp_path / f"images/{number}.png").unlink()
    with pytest.raises(DataError, match="4 of 20 training images are missing"):
        CocoImages(path, None, SMALL_FRAMES, on_error=SKIP)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tif"])
def test_whatever_is_wrong_with_an_image_can_be_skipped(tmp_path: Path, suffix: str) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    sound = cv2.imencode(suffix, pixels)[1].tobytes()
    path = tmp_path / f"x{suffix}"
    heads = [(100_000, 100_000), (2**31 - 1, 5), (0, 0)] if suffix == ".png" else []
    spoilt = [sound[:16] + struct.pack(">II", *size) + sound[24:] for size in heads]
    for _ in range(150):
        data = bytearray(sound)
        for _ in range(int(generator.integers(1, 5))):
            data[generator.integers(len(data))] = generator.integers(256)
        spoilt.append(bytes(data))
    for content in spoilt:
        path.write_bytes(content)
        with contextlib.suppress(DataError):  # any other error would end a run
            assert read_image(path).dtype == np.uint8


def test_videos_without_frames_are_skipped_while_they_are_few(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rles = [rectangle(1, 1, 20, 20)] * 2
    clips = [VideoTracks(info(n, 2), (track(1, rles),)) for n in range(1, 13)]
    path = write_videos(tmp_path, clips)
    for t in range(2):
        (tmp_path / f"v3/{t}.png").unlink()
    with pytest.raises(DataError, match="frames of video 3 `v3` not found"):
        PseudoVideos(path, None, SMALL_FRAMES)
    with caplog.at_level(logging.WARNING):
        videos = PseudoVideos(path, None, SMALL_FRAMES, on_error=SKIP)
    assert "1 of 12 videos are without their frames" in caplog.messages[0]
    assert len(videos) == 12
    assert run_on(videos, 4, 6).samples >= 2
