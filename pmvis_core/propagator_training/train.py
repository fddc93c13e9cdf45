"""The run loop of `train-propagator`: (De)AOT learns to carry masks, without annotated video.

The first stage of the authors' recipe (PRE): clips made from stills (`pseudo_clips`), the first
frame's masks are given, the others are found one after the other, each remembered with its true
masks. Identities are shuffled for every clip, so that no channel of the bank means anything. A
step's data and dropout depend on the seed, the step and the process alone, so that a resumed run
equals an unbroken one. Run folders are those of `run_folder`.

    train_propagator(PropagatorJob(ClipStage(Path("train_image.json")), PropagatorConfig(), out))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pmvis_core.config import ON_ERROR, check_choice
from pmvis_core.data.samples import PIXEL_MEAN, PIXEL_STD
from pmvis_core.data.spares import on_error_of
from pmvis_core.errors import UsageError
from pmvis_core.models.deaot import (
    IDENTITIES,
    STRIDE_PX,
    VARIANTS,
    DeAOT,
    Features,
    Memory,
    build_deaot,
)
from pmvis_core.nn.local_attention import Entry
from pmvis_core.progress import Progress, silent
from pmvis_core.propagator_training.losses import frame_loss, kept_share, reference_weight
from pmvis_core.propagator_training.pseudo_clips import ClipConfig, PseudoClip, StillClips
from pmvis_core.propagator_training.validation import SCORE, PropagatorValidator
from pmvis_core.training.clear_start import clear_start
from pmvis_core.training.learner import Learner, ParameterGroup
from pmvis_core.training.run_folder import Validation
from pmvis_core.training.run_loop import Steps, seed_torch, share_of_batch, start_run, take_steps
from pmvis_core.weights.deaot import Tell, initialise_propagator, save_deaot

_WITHOUT_DECAY = ("relative_emb_v", "relative_position_bias_table", "conv_out.")
"""Parts of names of parameters that are spared weight decay, besides biases and norms."""
_TRAINING_GAP = 2
"""Frames between long-term memories in training, for variants that have several of them."""


@dataclass(frozen=True)
class PropagatorTraining:
    """The schedule; the defaults are the authors' first stage."""

    steps: int = 100_000
    """Optimiser steps."""
    clips_per_batch: int = 16
    """Clips a step, over all processes and parts."""
    accumulate: int = 1
    """Parts that a step's batch is taken in, one after the other, where memory is short."""
    learning_rate: float = 4e-4
    """At its height."""
    least_rate: float = 2e-5
    """Where warm-up begins and decay ends."""
    encoder_rate_factor: float = 0.1
    """Times what ``learning_rate`` is above ``least_rate``, for the encoder."""
    clear_start: bool = True
    """New weights let identities pass (`clear_start`); the authors begin with random ones."""
    freeze_encoder: bool = False
    """The whole encoder stays as initialised; a third of the time less."""
    warmup: float = 0.05
    """Share of the steps in which the rate grows."""
    decay_power: float = 0.9
    """Of the polynomial by which it falls."""
    weight_decay: float = 0.03
    """AdamW's, on what is no bias, norm, table or last layer."""
    clip_norm: float = 5.0
    """L2 norm that the whole gradient is clipped to."""
    ema: float = 0.1
    """Share of the steps that the average of the weights reaches back; 0: no average."""
    memory_gap: int = 0
    """Frames between long-term memories; 0: as the variant was trained."""
    own_masks_from: float = 1.0
    """Share of the steps after which found masks are remembered in place of true ones."""
    threads: int = 0
    """Clips made side by side, ahead of time; 0: in between."""
    on_error: str = "skip"
    """What a clip whose image is broken does, ``skip`` or ``stop`` (`data.spares`)."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    save_every: int = 1000
    """Steps between resumable states."""

    def __post_init__(self) -> None:
        """Check what divides and what is a choice.

        Raises:
            UsageError: there is no part, or the setting is none of its choices.
        """
        check_choice("train.on_error", self.on_error, ON_ERROR)
        if self.accumulate < 1:
            raise UsageError(f"`train.accumulate` is {self.accumulate}, expected 1 or more")


@dataclass(frozen=True)
class PropagatorConfig:
    """Every number of a run; a run folder keeps it as ``config.toml``."""

    variant: str = "deaott"
    """Key of `models.deaot.VARIANTS`."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """How clips vary."""
    train: PropagatorTraining = field(default_factory=PropagatorTraining)
    """The schedule."""


@dataclass(frozen=True)
class ClipStage:
    """What a run learns from."""

    data: Path
    """COCO instances, such as ``train_image.json`` of `map-categories`."""
    images: Path | None = None
    """Folder of the images; None: that of ``data``."""

    name = "propagator"


@dataclass(frozen=True)
class PropagatorJob:
    """Everything that decides a run's result."""

    stage: ClipStage
    """Samples."""
    config: PropagatorConfig
    """Numbers."""
    out: Path
    """The run folder."""
    seed: int = 0
    """Of weights, clips and dropout."""
    init: Path | None = None
    """A propagator to start from, or classification weights of the encoder."""
    device: str = "cpu"
    """Torch device."""
    processes: int = 1
    """Processes to start on this machine; on a CPU one thread each."""
    tensorboard: bool = False
    """Write the losses for TensorBoard too, into the run folder."""
    validation: Validation | None = None
    """Stills to score propagation on; they decide which weights are the best, not what is learnt.
    """

    init_backbone = None


def _ignore(report: Any) -> None:
    """Say nothing."""


def train_propagator(job: PropagatorJob, progress: Progress = silent, tell: Tell = _ignore) -> None:
    """Train to the last step, resuming what the run folder holds; does nothing if it is done.

    Args:
        job: what to train, on what, where.
        progress: shows how far it is.
        tell: is told what became of the tensors of initial weights.

    Raises:
        DataError: a clip cannot be made, the loss is no longer finite, or what was held out cannot
            be scored on.
        ResourceError: initial weights are missing or do not fit.
        UsageError: the variant is unknown, the crop does not suit it, or clips do not divide
            among the processes.
    """
    check_job(job)
    first = partial(_train_process, job, progress, tell)
    start_run(job, first, partial(_train_process, job, silent, _ignore))


def check_job(job: PropagatorJob) -> None:
    """Refuse what no network could learn from."""
    config = job.config
    if config.variant not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise UsageError(f"no propagator `{config.variant}`", f"known: {known}")
    extra = int(VARIANTS[config.variant].align_corners)
    side = config.clip.crop
    if side % STRIDE_PX != extra:
        near = round((side - extra) / STRIDE_PX) * STRIDE_PX + extra
        raise UsageError(
            f"a crop of {side} pixels does not suit {config.variant}", f"take {near} instead"
        )


def _train_process(job: PropagatorJob, progress: Progress, tell: Tell, device: str) -> None:
    """Train as one process of possibly several."""
    job = replace(job, device=device)
    variant, config = job.config.variant, job.config.train
    share = share_of_batch(config.clips_per_batch, "clips", config.accumulate)
    on_error = on_error_of(config.on_error)
    clips = StillClips(job.stage.data, job.stage.images, job.config.clip, on_error)
    validator, every = None, 1
    if (told := job.validation) is not None:
        place = torch.device(device)
        validator = PropagatorValidator.open(told, variant, job.config.clip, place, on_error)
        every = told.every or config.save_every
    torch.manual_seed(job.seed)
    network = build_deaot(variant)
    if config.clear_start:
        clear_start(network)
    if job.init:
        tell(initialise_propagator(network, job.init))
    if config.freeze_encoder:
        network.encoder.requires_grad_(False)
    network.to(torch.device(device)).train()
    learner, factors = make_learner(network, config)
    rollout = Rollout(network, config, job.seed)

    def losses(batch: list[PseudoClip], step: int, first: int) -> dict[str, Tensor]:
        terms = rollout(batch, step, first)
        total = terms["loss_frames"]
        if "loss_reference" in terms:
            total = total + reference_weight(step, config.steps) * terms["loss_reference"]
        return {**terms, "loss": total}

    def save(path: Path, weights: Mapping[str, Tensor]) -> None:
        save_deaot(path, weights, variant)

    steps = Steps(
        title=f"train {variant}",
        losses=losses,
        rates=lambda step: [rate(config, step, factor) for factor in factors],
        save=save,
        name=attrgetter("name"),
        threads=config.threads,
        on_error=on_error,
        validate=validator,
        validate_every=every,
        score=SCORE,
    )
    take_steps(job, config, learner, clips, steps, share, progress)


class Rollout:
    """Runs a network through clips as it will run through videos, and says what it costs."""

    def __init__(self, network: DeAOT, config: PropagatorTraining, seed: int) -> None:
        """Take a network in training mode; the seed is that of shuffles and dropout."""
        self.network, self.config, self.seed = network, config, seed
        several = network.variant.memory_gap < 1000
        self._gap = config.memory_gap or (_TRAINING_GAP if several else network.variant.memory_gap)

    def __call__(self, clips: Sequence[PseudoClip], step: int, first: int = 0) -> dict[str, Tensor]:
        """Return ``loss_frames``, and ``loss_reference`` as long as it counts.

        Args:
            clips: of one size.
            step: decides dropout, shuffles and the schedule of the losses.
            first: number of the first clip in the step's whole batch; decides likewise.
        """
        seed_torch(self.seed, step, first)
        device = next(self.network.parameters()).device
        clips = [clip.to(device) for clip in clips]
        labels = torch.stack([clip.labels for clip in clips])
        run = _Clips(self.network, clips, shuffles(len(clips), device))
        kept = kept_share(step, self.config.steps)
        own_masks = step >= self.config.own_masks_from * self.config.steps
        losses = {}
        long = short = self.network.refer(run.features[0], run.identities(labels[:, 0]))
        if reference_weight(step, self.config.steps) > 0:
            logits, _ = run.track(0, long, short)
            losses["loss_reference"] = frame_loss(logits, labels[:, 0], kept)
        frames = []
        for t in range(1, labels.shape[1]):
            logits, current = run.track(t, long, short)
            frames.append(frame_loss(logits, labels[:, t], kept))
            seen = logits.detach().argmax(1) if own_masks else labels[:, t]
            short = self.network.remember(current, run.identities(seen))
            if t % self._gap == 0:
                long = [_extended(old, new) for old, new in zip(long, short, strict=True)]
        return {"loss_frames": torch.stack(frames).mean(), **losses}


class _Clips:
    """A batch of clips, encoded, with the identities that their objects got."""

    def __init__(self, network: DeAOT, clips: Sequence[PseudoClip], order: Tensor) -> None:
        """Encode all frames at once."""
        self._network, self._order = network, order
        self._objects = [clip.objects for clip in clips]
        images = torch.stack([clip.images for clip in clips])
        self._size = (images.shape[-2], images.shape[-1])
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
        whole = network.encode(((images - mean) / std).flatten(0, 1))
        shape = images.shape[:2]
        shortcuts = [x.unflatten(0, shape).unbind(1) for x in whole.shortcuts]
        tokens = whole.tokens.unflatten(0, shape).unbind(1)
        self.features = [
            Features((first, second, third), token, whole.grid)
            for first, second, third, token in zip(*shortcuts, tokens, strict=True)
        ]

    def identities(self, labels: Tensor) -> Tensor:
        """Return shuffled one-hot identities (B, 11, H, W); what nobody labelled has none."""
        channels = torch.arange(IDENTITIES + 1, device=labels.device)[:, None, None]
        return shuffled((labels[:, None] == channels).float(), self._order)

    def track(self, t: int, long: Memory, short: Memory) -> tuple[Tensor, list[Any]]:
        """Return logits (B, 11, H, W) by the labels' numbers, and what `remember` needs."""
        logits, current = self._network.track(self.features[t], long, short)
        plain = unshuffled(logits, self._order)
        return self._network.upsample(plain, self._objects, self._size).float(), current


def shuffles(number: int, device: torch.device) -> Tensor:
    """Return (B, 11) random orders of identities; the background stays first."""
    orders = [torch.randperm(IDENTITIES) + 1 for _ in range(number)]
    return F.pad(torch.stack(orders), (1, 0)).to(device)


def shuffled(x: Tensor, order: Tensor) -> Tensor:
    """Move channel k of (B, 11, H, W) to ``order[:, k]``."""
    return unshuffled(x, order.argsort(1))


def unshuffled(x: Tensor, order: Tensor) -> Tensor:
    """Undo `shuffled`."""
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def _extended(old: Entry, new: Entry) -> Entry:
    """Append a frame to a memory."""
    return Entry(torch.cat([old.key, new.key], 1), torch.cat([old.value, new.value], 1))


def make_learner(network: DeAOT, config: PropagatorTraining) -> tuple[Learner, list[float]]:
    """Build the optimiser, and the factor of the learning rate of each of its groups."""
    parts: dict[tuple[bool, bool], list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            spared = parameter.dim() <= 1 or any(part in name for part in _WITHOUT_DECAY)
            key = (name.startswith("encoder."), spared)
            parts.setdefault(key, []).append((name, parameter))
    groups, factors = [], []
    for (encoder, spared), named in parts.items():
        groups.append(ParameterGroup(named, 0.0 if spared else config.weight_decay))
        factors.append(config.encoder_rate_factor if encoder else 1.0)
    decay = max(0.0, 1 - 1 / max(1.0, config.ema * config.steps)) if config.ema else 0.0
    return Learner(network, groups, clip_norm=config.clip_norm, ema_decay=decay), factors


def rate(config: PropagatorTraining, step: int, factor: float = 1.0) -> float:
    """Return the learning rate of a step: linear up from the least one, then down to it again.

    Args:
        config: the schedule.
        step: the step.
        factor: times what the rate is above the least one.
    """
    warm = config.warmup * config.steps
    if step < warm:
        part = step / warm
    else:
        part = (1 - (step - warm) / max(1.0, config.steps - warm)) ** config.decay_power
    return config.least_rate + factor * part * (config.learning_rate - config.least_rate)
