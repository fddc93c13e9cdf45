"""Training a propagator: it learns, it resumes exactly, identities are shuffled and put back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models import mobilenet_v2

from pmvis_core.checkpoint import MODEL_FILE
from pmvis_core.errors import UsageError
from pmvis_core.models.deaot import DeAOT, build_deaot
from pmvis_core.propagation.deaot import DeaotPropagator
from pmvis_core.propagator_training.pseudo_clips import ClipConfig, PseudoClip, StillClips
from pmvis_core.propagator_training.train import (
    ClipStage,
    PropagatorConfig,
    PropagatorJob,
    PropagatorTraining,
    Rollout,
    make_learner,
    rate,
    shuffled,
    shuffles,
    train_propagator,
    unshuffled,
)
from pmvis_core.training.clear_start import clear_start
from pmvis_core.training.states import STATE_FILE
from pmvis_core.types import VideoInfo
from pmvis_core.weights.deaot import initialise_propagator, load_deaot
from tests.flat_stills import draw_stills
from tests.tiny_data import draw_tiny

SMALL = ClipConfig(crop=49, frames=3, least_area=600)
FEW = PropagatorTraining(steps=5, clips_per_batch=2, log_every=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tiny(tmp_path_factory.mktemp("tiny"))


def write_encoder(clips: StillClips, path: Path) -> Path:
    """Write weights of an encoder that was never trained but whose norms know the pictures."""
    torch.manual_seed(0)
    network = mobilenet_v2()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        for i in range(12):
            images = clips.sample(i % len(clips), np.random.default_rng(i)).images
            network.features((images - 116) / 57)
    torch.save(network.state_dict(), path)
    return path


def job_of(data: Path, out: Path, **train: Any) -> PropagatorJob:
    config = PropagatorConfig(clip=SMALL, train=replace(FEW, **train))
    return PropagatorJob(ClipStage(data / "maps/train_image.json"), config, out)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Shown(list[Any]):
    """Frames of a clip as a source of frames."""

    def frames(self) -> Iterator[Any]:
        """Yield them in order."""
        return iter(self)


def propagated_j(network: DeAOT, clips: StillClips) -> float:
    """Return the mean IoU of all objects of a few clips, carried from the first frame on."""
    overlaps = []
    for i in range(8):
        clip = clips.sample(i % len(clips), np.random.default_rng(500 + i))
        frames = Shown(clip.images.byte().permute(0, 2, 3, 1).numpy())
        info = VideoInfo(1, "clip", *frames[0].shape[:2], len(frames))
        sweep = DeaotPropagator(network, torch.device("cpu")).open(frames, info).sweep()
        sweep.advance(0)
        for number in range(1, clip.objects + 1):
            sweep.add(number, (clip.labels[0] == number).numpy().astype(np.uint8))
        for t in range(1, len(frames)):
            found = sweep.advance(t)
            for number in range(1, clip.objects + 1):
                true = (clip.labels[t] == number).numpy()
                either = (true | (found[number].mask > 0)).sum()
                overlaps.append((true & (found[number].mask > 0)).sum() / max(1, either))
    return float(np.mean(overlaps))


def test_it_learns_to_carry_masks(tmp_path: Path) -> None:
    look = {"jitter_probability": 0, "grey_probability": 0, "blur_probability": 0}
    clip = ClipConfig(
        crop=97, frames=3, objects=2, merge=0, least_area=3000, zoom=(1.2, 1.6), **look
    )
    stage = ClipStage(draw_stills(tmp_path))
    clips = StillClips(stage.data, None, clip)
    train = replace(FEW, steps=40, learning_rate=3e-3, log_every=10, ema=0, freeze_encoder=True)
    encoder = write_encoder(clips, tmp_path / "encoder.pth")
    config = PropagatorConfig(clip=clip, train=train)
    job = PropagatorJob(stage, config, tmp_path / "run", init=encoder)
    train_propagator(job)
    lines = metrics(job.out)
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert lines[0]["loss_reference"] > 0
    fresh = build_deaot("deaott").eval()
    clear_start(fresh)
    initialise_propagator(fresh, encoder)
    before, after = propagated_j(fresh, clips), propagated_j(load_deaot(job.out), clips)
    assert after > before + 0.1
    costs = [held_out_loss(network, clips) for network in (fresh, load_deaot(job.out))]
    assert costs[1] < 0.8 * costs[0]


def held_out_loss(network: DeAOT, clips: StillClips) -> float:
    """Return the mean loss of clips that were not trained on, all pixels counted."""
    rollout = Rollout(network.eval(), FEW, 0)
    batch = [clips.sample(i % len(clips), np.random.default_rng(900 + i)) for i in range(6)]
    with torch.no_grad():
        return rollout(batch, 0)["loss_frames"].item()


class Interrupted(Exception):
    """Stands for whatever stops a run."""


def test_a_resumed_run_equals_an_unbroken_one(data: Path, tmp_path: Path) -> None:
    def stop(items: Any, what: str, total: Any = None) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == 4:
                raise Interrupted
            yield item

    job = job_of(data, tmp_path / "broken", save_every=3)
    with pytest.raises(Interrupted):
        train_propagator(job, stop)
    assert (job.out / STATE_FILE).exists()
    train_propagator(job)
    train_propagator(replace(job, out=tmp_path / "whole"))
    train_propagator(replace(job, out=tmp_path / "other", seed=1))
    broken, whole, other = (
        (tmp_path / name / MODEL_FILE).read_bytes() for name in ("broken", "whole", "other")
    )
    assert broken == whole
    assert broken != other
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    assert not (job.out / STATE_FILE).exists()
    with pytest.raises(UsageError, match="seed 0 there, 2 here"):
        train_propagator(replace(job, seed=2))


def test_two_processes_and_threads_learn_one_model(data: Path, tmp_path: Path) -> None:
    job = job_of(data, tmp_path / "two", steps=2, threads=2)
    train_propagator(replace(job, processes=2))
    assert load_deaot(job.out).variant == build_deaot("deaott").variant
    with pytest.raises(UsageError, match="3 clips a batch do not divide among 2"):
        train_propagator(replace(job_of(data, tmp_path / "odd", clips_per_batch=3), processes=2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"variant": "deaotx"}, "no propagator `deaotx`"),
        ({"clip": ClipConfig(crop=64)}, "crop of 64 pixels does not suit deaott"),
        ({"variant": "swinb_deaotl", "clip": ClipConfig(crop=65)}, "65 pixels does not suit swinb"),
    ],
)
def test_what_no_network_could_learn_from(
    data: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    job = job_of(data, tmp_path / "run")
    with pytest.raises(UsageError, match=message):
        train_propagator(replace(job, config=replace(job.config, **config)))
    assert not job.out.exists()


def test_shuffling_is_undone_exactly() -> None:
    torch.manual_seed(3)
    order = shuffles(4, torch.device("cpu"))
    assert (order[:, 0] == 0).all()
    assert (order.sort(1).values == torch.arange(11)).all()
    assert len({tuple(row) for row in order.tolist()}) == 4
    x = torch.randn(4, 11, 3, 5)
    moved = shuffled(x, order)
    assert torch.equal(unshuffled(moved, order), x)
    for b in range(4):
        for k in range(11):
            assert torch.equal(moved[b, order[b, k]], x[b, k])


def clip_of(objects: int, frames: int = 4, side: int = 33) -> PseudoClip:
    """Return a clip whose objects are stripes."""
    labels = (torch.arange(side) * (objects + 1) // side).to(torch.uint8).expand(side, side)
    images = torch.rand(frames, 3, side, side) * 255
    return PseudoClip(images, labels.expand(frames, -1, -1).contiguous(), objects)


def test_shuffles_cost_nothing_when_the_bank_does_not_tell_identities_apart() -> None:
    torch.manual_seed(0)
    network = build_deaot("deaott").eval()
    with torch.no_grad():
        bank, last = network.patch_wise_id_bank.weight, network.decoder.conv_out
        bank[:, 2:] = bank[:, 1:2]
        last.weight[2:] = last.weight[1:2]
        last.bias[2:] = last.bias[1:2]  # type: ignore[index]
        clip = clip_of(3)
        losses = [Rollout(network, FEW, seed)([clip], 4)["loss_frames"].item() for seed in (0, 1)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_long_memory_grows_by_the_gap_and_found_masks_can_be_fed_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = build_deaot("deaotl").eval()
    seen: list[tuple[int, int]] = []
    track = network.track

    def spy(features: Any, long: Any, short: Any) -> Any:
        seen.append((long[0].key.shape[1], short[0].key.shape[1]))
        return track(features, long, short)

    monkeypatch.setattr(network, "track", spy)
    clip = clip_of(2, frames=6)
    schedule = replace(FEW, steps=100)
    with torch.no_grad():
        taught = Rollout(network, schedule, 0)([clip], 50)
        assert seen == [(9, 9), (9, 9), (18, 9), (18, 9), (27, 9)]
        seen.clear()
        own = Rollout(network, replace(schedule, own_masks_from=0.5, memory_gap=1), 0)
        found = own([clip], 50)
        assert [long for long, _ in seen] == [9, 18, 27, 36, 45]
        assert "loss_reference" not in found
        assert found["loss_frames"] != taught["loss_frames"]


def test_who_learns_how() -> None:
    network = build_deaot("aott")
    config = replace(FEW, steps=100)
    learner, factors = make_learner(network, config)
    groups = learner.groups
    decay = {name: group.weight_decay for group in groups for name, _ in group.named}
    slow = {
        name for group, f in zip(groups, factors, strict=True) if f < 1 for name, _ in group.named
    }
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert decay.keys() == trained
    assert not any(name.startswith(f"encoder.features.{i}.") for i in range(4) for name in trained)
    assert slow == {name for name in trained if name.startswith("encoder.")}
    spared = {name for name, value in decay.items() if value == 0}
    assert {
        "decoder.conv_out.weight",
        "encoder_projector.bias",
        "LSTT.layers.0.norm1.weight",
    } <= spared
    assert "LSTT.layers.0.short_term_attn.relative_emb_v" in spared
    assert {"patch_wise_id_bank.weight", "LSTT.layers.0.linear_Q.weight"} <= decay.keys() - spared
    assert {decay[name] for name in decay.keys() - spared} == {0.03}


def test_rates_go_up_from_the_least_and_down_to_it() -> None:
    config = replace(FEW, steps=1000)
    assert rate(config, 0) == pytest.approx(2e-5)
    assert rate(config, 25) == pytest.approx((2e-5 + 4e-4) / 2)
    assert rate(config, 50) == pytest.approx(4e-4)
    assert rate(config, 525) == pytest.approx(2e-5 + 0.5**0.9 * 3.8e-4)
    assert rate(config, 999) == pytest.approx(2e-5, rel=0.05)
    assert rate(config, 50, 0.1) == pytest.approx(2e-5 + 0.1 * 3.8e-4)
