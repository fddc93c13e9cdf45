"""Validation: AP while a run goes on, which must not change what the run learns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pmvis_core.checkpoint import MODEL_FILE, Checkpoint, load_model
from pmvis_core.errors import DataError, UsageError
from pmvis_core.evaluation.files import evaluate_files
from pmvis_core.files import significant
from pmvis_core.formats.ytvis_writer import as_dataset
from pmvis_core.infer import infer_video
from pmvis_core.systems.pmvis import ImageStage
from pmvis_core.systems.presets import IMAGE_PRESETS
from pmvis_core.tracks_io import TracksHeader, TracksReader, TracksWriter
from pmvis_core.train import plan, train
from pmvis_core.training.loss_curves import draw_losses
from pmvis_core.training.metrics_log import read_metrics
from pmvis_core.training.run_folder import BEST_FILE, CURVES_FILE, TrainJob, Validation
from pmvis_core.training.validation import NAMES, Validator
from pmvis_core.video.frames import open_videos
from tests.tiny_data import draw_tiny

EASY = {"select_score": 0.0, "init_score": 0.0, "new_score": 1.0, "row_score": 0.02}
"""Thresholds under which a model that has learnt little has tracks."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny benchmark, a model ``start``, and what that finds as ``own.json``.

    Against its own findings a model that has learnt nothing has an AP above 0.
    """
    folder = draw_tiny(tmp_path_factory.mktemp("tiny"))
    train(image_job(folder, folder / "start", steps=1))
    label(folder / "start", folder / "synth/videos/valid.json", folder / "start.tracks.jsonl")
    found = as_dataset(TracksReader(folder / "start.tracks.jsonl"))
    (folder / "synth/videos/own.json").write_text(json.dumps(found))
    return folder


def image_job(data: Path, out: Path, **settings: Any) -> TrainJob:
    """Return a short run, from ``start`` on where that is there."""
    preset = IMAGE_PRESETS["tiny"]
    given = {"steps": 4, "pairs_per_batch": 2, "log_every": 1, "save_every": 2, "ema_decay": 0.5}
    config = replace(
        preset,
        model=replace(preset.model, dropout=0.1),
        train=replace(preset.train, **(given | {"learning_rate": 1e-4} | settings)),
        tracker=replace(preset.tracker, match_score=0.1, **EASY),  # type: ignore[arg-type]
    )
    start = data / "start"
    init = start if (start / MODEL_FILE).exists() else None
    return TrainJob(ImageStage(data / "maps/train_image.json"), config, out, init=init)


def validated(job: TrainJob, data: Path, every: int | None = None) -> TrainJob:
    """Return the job with AP on the held-out videos."""
    videos = data / "synth/videos"
    return replace(job, validation=Validation(videos / "own.json", videos / "valid", every))


def lines_of(run: Path, scored: bool) -> list[dict[str, float]]:
    """Return the lines of the log that hold scores, or the others."""
    lines = read_metrics(run / "metrics.jsonl")
    return [line for line in lines if ("val_AP" in line) == scored]


def label(run: Path, videos: Path, tracks: Path) -> None:
    """Label videos as `infer` does."""
    checkpoint = load_model(run)
    with TracksWriter(tracks, TracksHeader(checkpoint.categories)) as writer:
        for source in open_videos(videos):
            writer.write(infer_video(checkpoint, source, torch.device("cpu")))


def labelled_and_evaluated(run: Path, data: Path, folder: Path) -> dict[str, float]:
    """Return what `infer` and `eval` say of a model."""
    label(run, data / "synth/videos/valid.json", folder / "out.tracks.jsonl")
    summary = evaluate_files(data / "synth/videos/own.json", folder / "out.tracks.jsonl").summary
    return {f"val_{name}": significant(summary[name] or 0.0) for name in NAMES}


def test_a_run_learns_the_same_with_it(data: Path, tmp_path: Path) -> None:
    plain = image_job(data, tmp_path / "plain")
    watched = validated(replace(plain, out=tmp_path / "watched"), data, every=1)
    for job in (plain, watched):
        train(job)
    assert (plain.out / MODEL_FILE).read_bytes() == (watched.out / MODEL_FILE).read_bytes()
    texts = [(job.out / "metrics.jsonl").read_text().splitlines() for job in (plain, watched)]
    assert texts[0] == [text for text in texts[1] if "val_AP" not in text]
    scores = lines_of(watched.out, scored=True)
    assert [line["step"] for line in scores] == [1, 2, 3, 4]
    assert scores[-1]["val_AP"] > 0


def test_the_numbers_are_those_of_infer_and_eval(data: Path, tmp_path: Path) -> None:
    job = validated(image_job(data, tmp_path / "run", steps=4), data)
    train(job)
    scores = lines_of(job.out, scored=True)
    assert [line["step"] for line in scores] == [2, 4]  # as states are saved
    expected = labelled_and_evaluated(job.out, data, tmp_path)
    assert scores[-1] == {"step": 4, **expected}
    assert expected["val_AP"] > 0


class Interrupted(Exception):
    """Stands for whatever stops a run."""


def stopping_at(step: int) -> Any:
    """Return a progress that breaks off before a step."""

    def stop(items: Any, what: str, total: int | None = None) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == step:
                raise Interrupted
            yield item

    return stop


def test_a_resumed_run_equals_an_unbroken_one(data: Path, tmp_path: Path) -> None:
    job = validated(image_job(data, tmp_path / "broken", steps=5, save_every=3), data, every=2)
    with pytest.raises(Interrupted):
        train(job, stopping_at(4))  # behind a score, with the last state before it
    train(job)
    whole = replace(job, out=tmp_path / "whole")
    train(whole)
    for name in (MODEL_FILE, "metrics.jsonl", CURVES_FILE, "run.json"):
        assert (job.out / name).read_bytes() == (whole.out / name).read_bytes(), name
    assert [line["step"] for line in lines_of(job.out, scored=True)] == [2, 4, 5]


def test_two_processes_share_the_videos_out(data: Path, tmp_path: Path) -> None:
    job = replace(validated(image_job(data, tmp_path / "two", steps=2), data), processes=2)
    train(job)
    (line,) = lines_of(job.out, scored=True)
    assert line == {"step": 2, **labelled_and_evaluated(job.out, data, tmp_path)}
    assert line["val_AP"] > 0


def told_scores(monkeypatch: pytest.MonkeyPatch, *values: float) -> list[dict[str, Tensor]]:
    """Let the next measurements give these; return a list that fills with what was measured."""
    left, seen = iter(values), list[dict[str, Tensor]]()

    def score(self: Validator, weights: Mapping[str, Tensor]) -> dict[str, float]:
        seen.append({name: tensor.clone() for name, tensor in weights.items()})
        return {"val_AP": next(left)}

    monkeypatch.setattr(Validator, "__call__", score)
    return seen


def test_the_best_weights_are_those_of_the_highest_ap(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = validated(image_job(data, tmp_path / "run"), data, every=1)
    seen = told_scores(monkeypatch, 0.1, 0.3, 0.3, 0.2)
    train(job)
    assert json.loads((job.out / "run.json").read_text())["best"] == {"step": 3, "val_AP": 0.3}
    kept = load_file(job.out / BEST_FILE)
    assert all(torch.equal(kept[name], seen[2][name]) for name in kept)
    assert not all(torch.equal(kept[name], seen[1][name]) for name in kept)
    told_scores(monkeypatch, 0.1, 0.3, 0.2, 0.4)
    last = replace(job, out=tmp_path / "last")
    train(last)
    assert json.loads((last.out / "run.json").read_text())["best"]["step"] == 4
    assert not (last.out / BEST_FILE).exists()


def without_annotations(truth: dict[str, Any]) -> None:
    del truth["annotations"]


def crowds_only(truth: dict[str, Any]) -> None:
    for row in truth["annotations"]:
        row["iscrowd"] = 1


def other_names(truth: dict[str, Any]) -> None:
    for row in truth["categories"]:
        row["name"] = f"un{row['name']}"


def lost_frame(truth: dict[str, Any]) -> None:
    truth["videos"][1]["file_names"][2] = "nowhere.jpg"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_annotations, "holds no `annotations`"),
        (crowds_only, "holds no object to find"),
        (other_names, "no name in common"),
        (lost_frame, r"lacks 1 of its 4 frames, first `nowhere.jpg`"),
    ],
)
def test_what_cannot_be_validated_on_is_refused_at_once(
    data: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    videos = data / "synth/videos"
    truth = json.loads((videos / "valid.json").read_text())
    spoil(truth)
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(truth))
    validation = Validation(file, videos / "valid")
    job = replace(image_job(data, tmp_path / "run"), validation=validation)
    for begin in (train, plan):
        with pytest.raises(DataError, match=message):
            begin(job)
    assert not job.out.exists()


def test_a_run_is_not_resumed_on_other_videos(data: Path, tmp_path: Path) -> None:
    job = validated(image_job(data, tmp_path / "run", steps=1), data)
    train(job)
    with pytest.raises(UsageError, match="val "):
        train(replace(job, validation=None))
    with pytest.raises(UsageError, match="val_every"):
        train(validated(job, data, every=9))


def test_a_frame_that_breaks_later_ends_only_a_run_that_asks_for_it(tmp_path: Path) -> None:
    data = draw_tiny(tmp_path)
    frame = next((data / "synth/videos/valid").rglob("*.jpg"))
    frame.write_bytes(frame.read_bytes()[:200])
    told = Validation(data / "synth/videos/valid.json")
    job = replace(image_job(data, tmp_path / "run", steps=1), validation=told)
    train(job)
    assert len(lines_of(job.out, scored=True)) == 1
    strict = image_job(data, tmp_path / "strict", steps=1, on_error="stop")
    with pytest.raises(DataError, match=frame.name):
        train(replace(strict, validation=told))


def test_random_numbers_and_the_weights_stay(data: Path) -> None:
    job = image_job(data, data / "unused")
    checkpoint: Checkpoint = load_model(data / "start")
    told = Validation(data / "synth/videos/valid.json")
    validator = Validator.open(told, job.config, checkpoint.categories, torch.device("cpu"))
    weights = checkpoint.model.state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    state = torch.get_rng_state()
    first = validator(weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], weights[name]) for name in before)
    assert validator(weights) == first


def test_the_ap_is_drawn_beside_the_loss() -> None:
    losses = [{"step": float(step), "loss": 5.0 / step, "a": 1.0} for step in range(1, 9)]
    plain = draw_losses(losses, "run")
    scored = draw_losses([*losses, {"step": 8.0, "val_AP": 0.25}], "run")
    assert plain.shape == scored.shape
    halves = slice(None), slice(None, 440)
    assert np.array_equal(plain[halves], scored[halves])  # the loss stays where it was
    assert not np.array_equal(plain[:, 440:900], scored[:, 440:900])
    many = [{"step": float(s), "val_AP": s / 3000} for s in range(1, 3001)]
    assert draw_losses([*losses, *many], "run").shape == scored.shape
