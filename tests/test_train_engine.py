"""The engine of training: parts and processes, resuming after kills, memory, faulty numbers."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pmvis_core.checkpoint import MODEL_FILE, load_model
from pmvis_core.config import TrainConfig, scaled_schedule
from pmvis_core.data.datasets import CocoImages, batches
from pmvis_core.data.samples import KeyReferencePair
from pmvis_core.errors import DataError, ResourceError, UsageError
from pmvis_core.systems.pmvis import ImageStage
from pmvis_core.systems.presets import IMAGE_PRESETS
from pmvis_core.train import Run, train
from pmvis_core.training.estimate import PARTS, in_words, measured
from pmvis_core.training.loss_curves import draw_losses, write_loss_curves
from pmvis_core.training.metrics_log import MetricsLog, read_metrics
from pmvis_core.training.run_folder import BEST_FILE, CURVES_FILE, TrainJob, Validation
from pmvis_core.training.states import PREVIOUS_FILE, STATE_FILE, find_state, save_state
from tests.tiny_data import draw_tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tiny(tmp_path_factory.mktemp("tiny"))


def image_job(data: Path, out: Path, dropout: float = 0.1, **settings: Any) -> TrainJob:
    preset = IMAGE_PRESETS["tiny"]
    given: dict[str, Any] = {"steps": 6, "pairs_per_batch": 2, "log_every": 1} | settings
    config = replace(
        preset,
        model=replace(preset.model, dropout=dropout),
        train=replace(preset.train, **given),
    )
    return TrainJob(ImageStage(data / "maps/train_image.json", box_loss=True), config, out)


class Interrupted(Exception):
    """Stands for whatever stops a run."""


def stopping_after(steps: int) -> Callable[..., Iterator[Any]]:
    """Return a progress that stops a run when so many steps are done."""

    def progress(items: Any, what: str, total: int | None = None) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == steps:
                raise Interrupted
            yield item

    return progress


def result(run: Path) -> tuple[bytes, bytes]:
    return (run / MODEL_FILE).read_bytes(), (run / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("damage", ["none", "cut", "flipped", "both"])
def test_a_run_goes_on_from_the_newest_state_that_is_whole(
    data: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Lines of the log begin and end between states; dropout and accumulation take part.
    job = image_job(
        data, tmp_path / "broken", save_every=2, log_every=3, accumulate=2, ema_decay=0.9
    )
    with pytest.raises(Interrupted):
        train(job, stopping_after(5))
    newest = job.out / STATE_FILE
    assert newest.exists()
    assert (job.out / PREVIOUS_FILE).exists()
    content = newest.read_bytes()
    if damage == "cut":
        newest.write_bytes(content[: len(content) // 2])
    elif damage != "none":
        middle = len(content) // 2
        newest.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    if damage == "both":
        (job.out / PREVIOUS_FILE).write_bytes(b"PK")
        with pytest.raises(ResourceError, match="no state that pmvis wrote, or it is damaged"):
            train(job)
        return
    train(job)
    assert (damage != "none") == ("is damaged; going on from" in caplog.text)
    train(replace(job, out=tmp_path / "whole"))
    assert result(job.out) == result(tmp_path / "whole")
    assert not list(job.out.glob("state*"))


def test_states_are_kept_two_at_a_time(tmp_path: Path) -> None:
    assert find_state(tmp_path) is None
    for step in range(3):
        save_state(tmp_path, {"step": step, "weights": torch.full((5,), float(step))})
    found = [torch.load(tmp_path / name)["step"] for name in (STATE_FILE, PREVIOUS_FILE)]
    assert found == [2, 1]
    (tmp_path / STATE_FILE).unlink()  # killed between two renames
    assert find_state(tmp_path) == tmp_path / PREVIOUS_FILE


def test_parts_of_a_batch_add_up(data: Path, tmp_path: Path) -> None:
    job = image_job(data, tmp_path, dropout=0.0)
    source = job.stage.samples(job.config).source
    run = Run.start(job, source.categories)
    whole = next(batches(source, 4, 0))
    run.learner.start()
    for first in (0, 2):
        run.learner.backward(run.losses(whole[first : first + 2], 0, first)["loss"] / 2)
    norm = float(run.learner.gradient_norm())
    job = image_job(data, tmp_path / "run", dropout=0.0, steps=1, pairs_per_batch=4, accumulate=2)
    train(job)
    assert read_metrics(job.out / "metrics.jsonl")[0]["gradient_norm"] == pytest.approx(norm, 1e-5)


def test_a_pair_draws_the_same_negatives_wherever_it_is(data: Path, tmp_path: Path) -> None:
    job = image_job(data, tmp_path, dropout=0.0)
    source = job.stage.samples(job.config).source
    run = Run.start(job, source.categories)
    three = next(batches(source, 3, 0))

    def auxiliary(pairs: list[KeyReferencePair], first: int) -> float:
        return run.losses(pairs, 5, first)["loss_reid_aux"].item()

    def contrasted(pairs: list[KeyReferencePair], first: int) -> float:
        counts: list[float] = []

        def note(numbers: torch.Tensor) -> torch.Tensor:
            counts.append(float(numbers[-1]))
            return torch.ones_like(numbers)

        run.criterion = replace(run.criterion, divisors=note)
        return auxiliary(pairs, first)

    alone = sum(contrasted([pair], number) for number, pair in enumerate(three))
    assert contrasted(three, 0) == pytest.approx(alone, rel=1e-4)
    assert contrasted([three[2]], 2) != contrasted([three[2]], 1)


def poisoned(monkeypatch: pytest.MonkeyPatch, victim: int) -> None:
    """Let one image's pairs hold a pixel that is no number."""
    whole = CocoImages.sample

    def sample(self: CocoImages, index: int, rng: np.random.Generator) -> KeyReferencePair:
        pair = whole(self, index, rng)
        if f"image {victim}," in pair.name:
            pair.key.image[0, 0, 0] = math.nan
        return pair

    monkeypatch.setattr(CocoImages, "sample", sample)


def test_what_is_no_number_is_traced_to_its_sample(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = image_job(data, tmp_path / "run", save_every=1, steps=6, accumulate=2)
    source = job.stage.samples(job.config).source
    stream = batches(source, 1, 0)
    names = [next(stream)[0].name for _ in range(10)]
    victim = next(name for name in names[4:] if name not in names[:4])
    poisoned(monkeypatch, int(victim.split(",")[0].split()[1]))
    with pytest.raises(DataError) as caught:
        train(job)
    step = names.index(victim) // 2
    message = caught.value.message
    assert message.startswith(f"step {step + 1}: ")
    assert victim in message
    assert "loss_ce" in message
    assert "1 more" not in message
    assert not (job.out / MODEL_FILE).exists()
    assert [line["step"] for line in read_metrics(job.out / "metrics.jsonl")] == list(
        range(1, step + 1)
    )
    monkeypatch.undo()
    train(job)  # nothing bad was saved
    train(replace(job, out=tmp_path / "whole"))
    assert result(job.out) == result(tmp_path / "whole")


def test_a_rate_that_blows_up_is_told_as_such(data: Path, tmp_path: Path) -> None:
    job = image_job(data, tmp_path / "run", learning_rate=1e30, warmup_steps=0, clip_norm=1e9)
    with pytest.raises(DataError) as caught:
        train(job)
    assert "rate" in str(caught.value.hint)
    assert not (job.out / MODEL_FILE).exists()


def trained(data: Path, out: Path, **settings: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    job = image_job(data, out, steps=3, **settings)
    train(job)
    losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl")]
    return losses, load_model(out).model.state_dict()


def test_checkpointed_activations_change_no_bit(data: Path, tmp_path: Path) -> None:
    plain, weights = trained(data, tmp_path / "plain")
    saving, same = trained(data, tmp_path / "saving", checkpoint_activations=True)
    assert plain == saving
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    kept = [
        measured(image_job(data, tmp_path, checkpoint_activations=on))["activation_bytes"]
        for on in (False, True)
    ]
    assert kept[1] < 0.8 * kept[0]


def test_other_layouts_and_types_learn_nearly_the_same(data: Path, tmp_path: Path) -> None:
    plain, weights = trained(data, tmp_path / "plain")
    last, moved = trained(data, tmp_path / "last", channels_last=True)
    assert last == pytest.approx(plain, rel=1e-3)
    assert {name: w.shape for name, w in weights.items()} == {n: w.shape for n, w in moved.items()}
    half, _ = trained(data, tmp_path / "half", precision="bfloat16")
    assert half[0] == pytest.approx(plain[0], rel=0.05)
    assert half[0] != plain[0]


def test_the_best_weights_are_kept_unless_they_are_the_last(data: Path, tmp_path: Path) -> None:
    job = image_job(data, tmp_path / "run", steps=8, save_every=1, pairwise_warmup_steps=2)
    train(job)
    best = json.loads((job.out / "run.json").read_text())["best"]
    losses = [line["loss"] for line in read_metrics(job.out / "metrics.jsonl")]
    assert best["step"] == 1 + losses.index(min(losses[2:]))  # comparable from the third step on
    assert best["loss"] == pytest.approx(min(losses[2:]), rel=1e-5)
    assert (job.out / BEST_FILE).exists() == (best["step"] < 8)
    last = image_job(data, tmp_path / "last", steps=3, save_every=1, pairwise_warmup_steps=2)
    train(last)
    assert json.loads((last.out / "run.json").read_text())["best"]["step"] == 3
    assert not (last.out / BEST_FILE).exists()
    early = image_job(data, tmp_path / "early", steps=4, save_every=2, pairwise_warmup_steps=9)
    train(early)
    assert "best" not in json.loads((early.out / "run.json").read_text())


def test_a_schedule_follows_its_batch() -> None:
    preset = TrainConfig(warmup_steps=100, ema_decay=0.99)
    half = replace(preset, pairs_per_batch=16)
    found = scaled_schedule(preset, half, set())
    assert (found.steps, found.milestones) == (118400, (44400, 88800))
    assert (found.warmup_steps, found.pairwise_warmup_steps) == (200, 20000)
    assert found.learning_rate == pytest.approx(1e-4)
    assert found.ema_decay == pytest.approx(0.99**0.5)
    kept = scaled_schedule(preset, half, {"steps", "learning_rate"})
    assert (kept.steps, kept.learning_rate) == (59200, 2e-4)
    assert scaled_schedule(preset, preset, set()) == preset
    assert scaled_schedule(preset, replace(preset, accumulate=8), set()).steps == preset.steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "half"}, "`train.precision` is 'half'"),
        ({"normaliser": "gpu"}, "expected one of batch, process"),
        ({"accumulate": 0}, "expected 1 or more"),
    ],
)
def test_settings_that_are_no_choice(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(**settings)


def test_a_batch_that_does_not_divide(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 pairs a batch do not divide among 1 processes in 4"):
        train(image_job(data, tmp_path / "run", accumulate=4))


def test_an_estimate_is_of_the_job(data: Path, tmp_path: Path) -> None:
    job = image_job(data, tmp_path / "run", steps=3600)
    small, large = (
        measured(
            replace(
                job,
                config=replace(job.config, train=replace(job.config.train, pairs_per_batch=pairs)),
            )
        )
        for pairs in (1, 4)
    )
    model = Run.start(job, job.stage.samples(job.config).categories).model
    assert small["parameters"] == sum(p.numel() for p in model.parameters())
    assert small["weight_bytes"] == 4 * (small["parameters"] + 4 * small["learning_parameters"])
    assert 2 < large["activation_bytes"] / small["activation_bytes"] < 8
    assert small["hours"] == pytest.approx(small["seconds"])
    parts = [small[f"{name}_seconds"] for name in PARTS]
    assert min(parts) > 0
    assert small["seconds"] == pytest.approx(sum(parts))
    assert small["pairs_per_second"] == pytest.approx(1 / small["seconds"])
    assert small["data_share"] == pytest.approx(small["data_seconds"] / small["seconds"])
    assert (small["validations"], small["validation_share"]) == (0, 0)
    assert "M parameters" in in_words(small)
    assert "validation" not in in_words(small)
    assert not job.out.exists()


def test_an_estimate_counts_validation(data: Path, tmp_path: Path) -> None:
    job = image_job(data, tmp_path / "run", steps=10, pairs_per_batch=1)
    told = Validation(data / "synth/videos/valid.json", every=4)
    found = measured(replace(job, validation=told))
    assert found["validations"] == 3  # after 4, 8 and 10 steps
    assert found["validation_seconds"] > 0
    whole = 10 * found["seconds"] + 3 * found["validation_seconds"]
    assert found["hours"] == pytest.approx(whole / 3600)
    assert sum(found[f"{name}_share"] for name in [*PARTS, "validation"]) == pytest.approx(1)
    assert "validation (3 times" in in_words(found)
    waiting = measured(replace(job, workers=4))
    assert waiting["seconds"] >= waiting["forward_seconds"] + waiting["backward_seconds"]
    assert waiting["data_share"] < 1 - waiting["forward_share"]
    assert not job.out.exists()


def test_a_log_goes_on_within_a_line(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "broken"
    values = [{"loss": 0.1 * n} for n in range(7)]
    log = MetricsLog(whole, 0, 3)
    for step, losses in enumerate(values):
        log.add(step, losses, 1.0)
    log = MetricsLog(path, 0, 3)
    for step in range(4):
        log.add(step, values[step], 1.0)
    state = log.state()
    path.write_text(path.read_text() + '{"step":6,"loss":9}\n{"step":')  # killed while writing
    log = MetricsLog(path, 4, 3, json.loads(json.dumps(state)))
    for step in range(4, 7):
        log.add(step, values[step], 1.0)
    assert path.read_bytes() == whole.read_bytes()


def test_tensorboard_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 4, 2)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ResourceError, match="which is not installed") as caught:
        log.show_on_board(tmp_path / "board", 4)
    assert "pmvis[tensorboard]" in str(caught.value.hint)
    told: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            told.append((Path(folder).name, purge_step))

        def add_scalar(self, *scalar: Any) -> None:
            told.append(scalar)

        def close(self) -> None:
            told.append("closed")

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    log.show_on_board(tmp_path / "board", 4)
    log.add(4, {"loss": 1.0}, 0.5)
    log.add(5, {"loss": 3.0}, 0.5)
    log.close()
    scalars = [told[0], ("loss", 2.0, 6), ("learning_rate", 0.5, 6), "closed"]
    assert [row for row in scalars if row in told] == scalars
    assert told[0] == ("board", 5)


def test_the_picture_of_the_losses(tmp_path: Path) -> None:
    lines = [{"step": 10.0 * n, "loss": 100.0 / n, "rare": 1.0} for n in range(1, 40)]
    del lines[3]["rare"]
    picture = draw_losses(lines, "train image")
    assert picture.shape[1] == draw_losses(lines[:2], "").shape[1]
    blank = draw_losses([{"step": 1.0, "loss": 1.0}, {"step": 2.0, "loss": 1.0}], "train image")
    assert (picture != blank[: len(picture)]).any()
    metrics = tmp_path / "metrics.jsonl"
    write_loss_curves(metrics, tmp_path / CURVES_FILE, "x")
    metrics.write_text('{"step":1,"loss":1}\n')
    write_loss_curves(metrics, tmp_path / CURVES_FILE, "x")
    assert not (tmp_path / CURVES_FILE).exists()
    metrics.write_text('{"step":1,"loss":1}\n{"step":2,"loss":0}\n')
    write_loss_curves(metrics, tmp_path / CURVES_FILE, "x")
    assert (tmp_path / CURVES_FILE).read_bytes().startswith(b"\x89PNG")
