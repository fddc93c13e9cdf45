"""The score of a propagator while it is trained: what it measures, and what it leaves alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pmvis_core.checkpoint import MODEL_FILE
from pmvis_core.data.spares import SKIP, STOP
from pmvis_core.errors import DataError, UsageError
from pmvis_core.files import significant
from pmvis_core.models.deaot import build_deaot
from pmvis_core.propagator_training import validation
from pmvis_core.propagator_training.pseudo_clips import ClipConfig, PseudoClip, StillClips
from pmvis_core.propagator_training.train import (
    ClipStage,
    PropagatorConfig,
    PropagatorJob,
    PropagatorTraining,
    train_propagator,
)
from pmvis_core.propagator_training.validation import (
    PropagatorValidator,
    carried,
    held_out_clips,
)
from pmvis_core.training.metrics_log import read_metrics
from pmvis_core.training.run_folder import BEST_FILE, Validation
from pmvis_core.weights.deaot import load_deaot
from tests.flat_stills import draw_stills

CLIP = ClipConfig(crop=33, frames=3, least_area=3000, objects=2, zoom=(1.2, 1.6))
SCHEDULE = PropagatorTraining(steps=4, clips_per_batch=1, log_every=1, save_every=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with stills to train on, and others in ``held``."""
    folder = tmp_path_factory.mktemp("stills")
    draw_stills(folder)
    (folder / "held").mkdir()
    draw_stills(folder / "held", 5)
    return folder


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score on five clips."""
    monkeypatch.setattr(validation, "CLIPS", 5)


def job_of(data: Path, out: Path, every: int | None = None) -> PropagatorJob:
    config = PropagatorConfig(clip=CLIP, train=SCHEDULE)
    told = Validation(data / "held/stills.json", None, every)
    return PropagatorJob(ClipStage(data / "stills.json"), config, out, validation=told)


def scores(run: Path) -> dict[int, float]:
    lines = read_metrics(run / "metrics.jsonl")
    return {int(line["step"]): line["val_J"] for line in lines if "val_J" in line}


class Interrupted(Exception):
    """Stands for whatever stops a run."""


def stop_at_three(items: Any, what: str, total: int | None = None) -> Iterator[Any]:
    """Break off before the fourth step."""
    for number, item in enumerate(items):
        if number == 3:
            raise Interrupted
        yield item


def test_a_run_learns_the_same_with_it_and_keeps_the_best(data: Path, tmp_path: Path) -> None:
    watched = job_of(data, tmp_path / "watched", 2)
    plain = replace(watched, out=tmp_path / "plain", validation=None)
    with pytest.raises(Interrupted):
        train_propagator(watched, stop_at_three)
    for job in (plain, watched):
        train_propagator(job)
    assert (plain.out / MODEL_FILE).read_bytes() == (watched.out / MODEL_FILE).read_bytes()
    texts = [(job.out / "metrics.jsonl").read_text().splitlines() for job in (plain, watched)]
    assert texts[0] == [text for text in texts[1] if "val_J" not in text]
    found = scores(watched.out)
    assert list(found) == [2, 4]
    assert all(0 < score < 1 for score in found.values())
    best = json.loads((watched.out / "run.json").read_text())["best"]
    assert best == {"step": max(found, key=lambda step: (found[step], step))} | {
        "val_J": max(found.values())
    }
    assert (watched.out / BEST_FILE).exists() == (best["step"] == 2)
    # What is scored is what is saved, as `refine` will run it.
    told = watched.validation
    assert told is not None
    device = torch.device("cpu")
    validator = PropagatorValidator.open(told, "deaott", CLIP, device)
    assert validator(load_deaot(watched.out).state_dict()) == {"val_J": found[4]}
    whole = replace(watched, out=tmp_path / "whole")
    train_propagator(whole)
    for name in ("metrics.jsonl", "run.json"):
        assert (watched.out / name).read_bytes() == (whole.out / name).read_bytes()
    with pytest.raises(UsageError, match="val_every 2 there, 3 here"):
        train_propagator(replace(watched, validation=replace(told, every=3)))


def test_the_best_weights_are_those_of_the_highest_j(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, seen = iter([0.2, 0.6, 0.6, 0.5]), list[dict[str, Tensor]]()

    def score(self: PropagatorValidator, weights: dict[str, Tensor]) -> dict[str, float]:
        seen.append({name: tensor.clone() for name, tensor in weights.items()})
        return {"val_J": next(left)}

    monkeypatch.setattr(PropagatorValidator, "__call__", score)
    job = job_of(data, tmp_path / "run", 1)
    train_propagator(job)
    assert json.loads((job.out / "run.json").read_text())["best"] == {"step": 3, "val_J": 0.6}
    kept = load_file(job.out / BEST_FILE)
    assert all(torch.equal(kept[name], seen[2][name]) for name in kept)


class Fixed:
    """A propagator that answers what it is given: by frame, the masks of its objects."""

    def __init__(self, answers: dict[int, dict[int, Any]]) -> None:
        """Keep the answers."""
        self.answers = answers
        self.begun: dict[int, Any] = {}

    def open(self, frames: Any, info: Any) -> Fixed:
        """Answer for any video."""
        assert frames[0].dtype == np.uint8
        assert frames[0].shape == (info.height, info.width, 3)
        return self

    def sweep(self) -> Fixed:
        """Begin."""
        return self

    def add(self, number: int, mask: Any) -> None:
        """Note what is given."""
        self.begun[number] = mask

    def advance(self, t: int) -> Any:
        """Answer."""
        return {n: Answer(mask) for n, mask in self.answers.get(t, {}).items()}


class Answer:
    """A prediction."""

    def __init__(self, mask: Any) -> None:
        """Keep the mask."""
        self.mask = np.asarray(mask, np.uint8)


def test_the_score_is_the_mean_overlap_behind_the_first_frame() -> None:
    labels = torch.tensor(
        [
            [[1, 1, 2, 2]],
            [[1, 1, 2, 255]],  # the last pixel counts for nobody
            [[0, 1, 1, 0]],  # the second object is gone
        ],
        dtype=torch.uint8,
    )
    clip = PseudoClip(torch.zeros(3, 3, 1, 4), labels, 2)
    answers = {
        1: {1: [[1, 0, 0, 1]], 2: [[0, 0, 1, 1]]},  # 1/2 and 1/1
        2: {1: [[1, 1, 0, 0]], 2: [[0, 0, 0, 0]]},  # 1/3 and, rightly, nothing
    }
    fixed = Fixed(answers)
    assert carried(fixed, clip) == pytest.approx([(1 / 2 + 1 / 3) / 2, 1.0])  # type: ignore[arg-type]
    assert fixed.begun[1].tolist() == [[1, 1, 0, 0]]
    assert fixed.begun[2].tolist() == [[0, 0, 1, 1]]
    assert carried(fixed, replace(clip, objects=0)) == []  # type: ignore[arg-type]


def test_processes_share_the_clips_out(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Validation(data / "held/stills.json")
    torch.manual_seed(1)
    weights = build_deaot("deaott").state_dict()
    validator = PropagatorValidator.open(told, "deaott", CLIP, torch.device("cpu"))
    random = torch.get_rng_state()
    alone = validator(weights)
    assert torch.equal(torch.get_rng_state(), random)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(validation, "rank_and_world", lambda rank=rank: (rank, 2))
        parts.append(list(validator._scored(weights)))
    assert [len(part) for part in parts] == [3, 3]
    assert parts[1][2] == []  # five clips, not six
    monkeypatch.setattr(validation, "gathered", lambda mine, group: parts)
    assert validator(weights) == alone
    flat = [j for part in parts for row in part for j in row]
    assert alone["val_J"] == significant(float(np.mean(flat)))


def test_a_still_that_breaks_later_ends_only_a_run_that_asks_for_it(tmp_path: Path) -> None:
    clips = StillClips(draw_stills(tmp_path, 4), None, CLIP)
    (tmp_path / "2.png").unlink()
    assert len(list(held_out_clips(clips, SKIP))) == 5
    with pytest.raises(DataError, match=r"2\.png` does not exist"):
        list(held_out_clips(clips, STOP))


def boxes_only(truth: dict[str, Any]) -> None:
    for row in truth["annotations"]:
        del row["segmentation"]


def lost_image(truth: dict[str, Any]) -> None:
    truth["images"][0]["file_name"] = "nowhere.png"


def videos(truth: dict[str, Any]) -> None:
    truth["videos"] = truth.pop("images")


@pytest.mark.parametrize(
    ("spoil", "clip", "message"),
    [
        (boxes_only, CLIP, "has boxes but no masks"),
        (lost_image, CLIP, r"1 of 5 training images are missing, first `.*nowhere\.png`"),
        (videos, CLIP, "images"),
        (None, replace(CLIP, least_area=10**6), "none of 5 clips of .* shows an object to carry"),
    ],
)
def test_what_cannot_be_scored_on_is_refused_at_once(
    data: Path, tmp_path: Path, spoil: Any, clip: ClipConfig, message: str
) -> None:
    truth = json.loads((data / "held/stills.json").read_text())
    if spoil is not None:
        spoil(truth)
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(truth))
    job = replace(job_of(data, tmp_path / "run"), validation=Validation(file, data / "held"))
    config = replace(job.config, clip=clip)
    with pytest.raises(DataError, match=message):
        train_propagator(replace(job, config=config))
    assert not job.out.exists()
