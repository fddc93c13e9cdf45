"""The run loop: it learns, it resumes exactly, and processes agree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pmvis_core.checkpoint import MODEL_FILE, load_model
from pmvis_core.data.datasets import batches
from pmvis_core.errors import DataError, UsageError
from pmvis_core.systems.pmvis import ImageStage, RunConfig, VideoStage
from pmvis_core.systems.presets import IMAGE_PRESETS, VIDEO_PRESETS
from pmvis_core.train import plan, train
from pmvis_core.training.run_folder import TrainJob, check_run_folder, preset_of
from pmvis_core.training.states import STATE_FILE
from tests.tiny_data import draw_tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tiny(tmp_path_factory.mktemp("tiny"))


def image_job(data: Path, out: Path, **train_settings: object) -> TrainJob:
    preset = IMAGE_PRESETS["tiny"]
    settings = {"steps": 6, "pairs_per_batch": 2, "log_every": 2, **train_settings}
    config = replace(preset, train=replace(preset.train, **settings))  # type: ignore[arg-type]
    return TrainJob(ImageStage(data / "maps/train_image.json"), config, out)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls(data: Path, tmp_path: Path) -> None:
    train(image_job(data, tmp_path / "run", steps=60, log_every=10, warmup_steps=5))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    assert preset_of(tmp_path / "run") == "tiny"


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    data: Path, tmp_path: Path
) -> None:
    job = image_job(data, tmp_path / "a", steps=3)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(replace(job, out=tmp_path / name, seed=seed))
    first, same, other = ((tmp_path / n / MODEL_FILE).read_bytes() for n in "abc")
    assert first == same
    assert first != other


class Interrupted(Exception):
    """Stands for whatever stops a run."""


def test_a_resumed_run_equals_an_unbroken_one(data: Path, tmp_path: Path) -> None:
    def stop(items, what, total=None):  # type: ignore[no-untyped-def]
        for number, item in enumerate(items):
            if number == 5:
                raise Interrupted
            yield item

    job = image_job(data, tmp_path / "broken", save_every=4)
    with pytest.raises(Interrupted):
        train(job, stop)
    assert not (job.out / MODEL_FILE).exists()
    check_run_folder(job)
    train(job)
    train(replace(job, out=tmp_path / "whole"))
    assert (job.out / MODEL_FILE).read_bytes() == (tmp_path / "whole" / MODEL_FILE).read_bytes()
    assert metrics(job.out)[-1]["step"] == 6
    assert not (job.out / STATE_FILE).exists()


def test_two_processes_learn_one_model(data: Path, tmp_path: Path) -> None:
    train(replace(image_job(data, tmp_path / "two", steps=2), processes=2))
    assert load_model(tmp_path / "two").categories[0].name == "disc"
    with pytest.raises(UsageError, match="do not divide"):
        train(replace(image_job(data, tmp_path / "odd", pairs_per_batch=3), processes=2))


def test_a_frozen_mask_head_stays_as_it_was(data: Path, tmp_path: Path) -> None:
    job = image_job(data, tmp_path / "first", steps=1)
    train(job)
    stage = ImageStage(data / "maps/train_image.json", freeze_mask_head=True)
    further = replace(job, stage=stage, init=job.out, out=tmp_path / "second")
    train(further)
    before, after = (load_model(run).model.state_dict() for run in (job.out, further.out))
    for name in before:
        moved = not torch.equal(before[name], after[name])
        assert moved == ("mask_head" not in name), name


def test_the_video_stage_learns_from_tracks(data: Path, tmp_path: Path) -> None:
    train(image_job(data, tmp_path / "image", steps=1))
    preset = VIDEO_PRESETS["tiny"]
    config = replace(preset, train=replace(preset.train, steps=4, pairs_per_batch=2, log_every=2))
    videos = data / "synth/videos"
    stage = VideoStage(videos / "train_truth.json", videos / "train.json")
    job = TrainJob(stage, config, tmp_path / "video", init=tmp_path / "image")
    train(job)
    assert {"loss_mask", "loss_prj", "loss_pairwise"} <= set(metrics(job.out)[0])
    no_box = replace(stage, box_loss=False)
    assert "BoxInst" not in json.dumps(plan(replace(job, stage=no_box))["rows"])


def test_a_plan_says_which_losses_apply_to_what(data: Path, tmp_path: Path) -> None:
    rows = {row["supervision"]: row for row in plan(image_job(data, tmp_path / "x"))["rows"]}
    assert "mask" in rows["mask"]["losses"]
    assert "mask" not in rows["box"]["losses"]
    assert rows["mask"]["annotations"] > 0
    assert not (tmp_path / "x").exists()


def test_a_folder_of_another_run_is_refused(data: Path, tmp_path: Path) -> None:
    job = image_job(data, tmp_path / "run", steps=1)
    train(job)
    other: RunConfig = replace(job.config, train=replace(job.config.train, learning_rate=1.0))
    with pytest.raises(UsageError, match=r"learning_rate 0.002 there, 1.0 here"):
        check_run_folder(replace(job, config=other))
    with pytest.raises(UsageError, match=r"seed 0 there, 1 here"):
        check_run_folder(replace(job, seed=1))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no run"):
        check_run_folder(replace(job, out=tmp_path / "foreign"))


def test_an_error_in_any_process_reaches_the_user(tmp_path: Path) -> None:
    data = draw_tiny(tmp_path)
    job = image_job(data, tmp_path / "run", steps=500, on_error="stop")
    images = sorted((data / "synth/coco/train").iterdir())
    whole = {image: image.read_bytes() for image in images}
    for image, content in whole.items():  # one that the second process meets first
        image.write_bytes(content[: len(content) // 2])
        if first_failure(job, rank=1) < first_failure(job, rank=0):
            break
        image.write_bytes(content)
    else:
        pytest.fail("no picture is met by the second process first")
    with pytest.raises(DataError, match=image.name):
        train(replace(job, processes=2))
    assert not (job.out / MODEL_FILE).exists()


def first_failure(job: TrainJob, rank: int) -> int:
    """Return the first of a process's steps whose samples cannot be read."""
    stream = batches(job.stage.samples(job.config).source, 1, job.seed, rank=rank, world=2)
    for step in range(100):
        try:
            next(stream)
        except DataError:
            return step
    return 100
