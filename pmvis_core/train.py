"""The run loop of `train-image` and `train-video`, on one process or several.

A run folder is described in `training.run_folder`. Data, dropout and negatives depend on the seed,
the step and a pair's number in it alone, so that a resumed run equals an unbroken one, and several
processes equal one with the whole batch but for padding and dropout (`training.normalisers` says
what their losses are divided by). They average their gradients after every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmvis_core.allocator import keep_freed_memory
from pmvis_core.checkpoint import (
    KeyReport,
    Tell,
    initialise,
    initialise_backbone,
    save_model,
)
from pmvis_core.config import TrainConfig
from pmvis_core.data.datasets import annotation_ledger
from pmvis_core.data.samples import ImageBatch, KeyReferencePair
from pmvis_core.data.spares import on_error_of
from pmvis_core.losses import SetCriterion
from pmvis_core.models.idol import IDOL, IdolPredictions, build_idol
from pmvis_core.progress import Progress, silent
from pmvis_core.systems.pmvis import RunConfig
from pmvis_core.training.compiling import compile_backbone
from pmvis_core.training.learner import Learner, ParameterGroup
from pmvis_core.training.memory import checkpoint_activations
from pmvis_core.training.normalisers import divisors_of
from pmvis_core.training.processes import rank_and_world
from pmvis_core.training.run_folder import TrainJob
from pmvis_core.training.run_loop import Steps, seed_torch, share_of_batch, start_run, take_steps
from pmvis_core.training.validation import Validator
from pmvis_core.types import Category, Supervision


def _ignore(report: KeyReport) -> None:
    """Say nothing."""


def train(job: TrainJob, progress: Progress = silent, tell: Tell = _ignore) -> None:
    """Train to the last step, resuming what the run folder holds; does nothing if it is done.

    Args:
        job: what to train, on what, where.
        progress: shows how far it is.
        tell: is told what became of the tensors of initial weights.

    Raises:
        DataError: a sample cannot be read, the loss is no longer finite, or videos cannot be
            validated on.
        ResourceError: initial weights are missing or do not fit, or a process failed.
    """
    first = partial(_train_process, job, progress, tell)
    start_run(job, first, partial(_train_process, job, silent, _ignore))


def _train_process(job: TrainJob, progress: Progress, tell: Tell, device: str) -> None:
    """Train as one process of possibly several."""
    job = replace(job, device=device)
    config = job.config
    share = share_of_batch(config.train.pairs_per_batch, "pairs", config.train.accumulate)
    samples = job.stage.samples(config)
    validate, every = open_validator(job, samples.categories)
    run = Run.start(job, samples.categories, tell)

    def save(path: Path, weights: Mapping[str, Tensor]) -> None:
        save_model(path, weights, config.model, samples.categories, config.tracker)

    steps = Steps(
        title=f"train {job.stage.name}",
        losses=run.losses,
        rates=run.rates,
        save=save,
        name=attrgetter("name"),
        threads=job.workers,
        on_error=on_error_of(config.train.on_error),
        comparable_from=run.settled_from(),
        validate=validate,
        validate_every=every,
    )
    take_steps(job, config.train, run.learner, samples.source, steps, share, progress)


def open_validator(job: TrainJob, categories: tuple[Category, ...]) -> tuple[Validator | None, int]:
    """Return what scores weights, if anything does, and the steps between scores."""
    told = job.validation
    if told is None:
        return None, 1
    validator = Validator.open(told, job.config, categories, torch.device(job.device))
    return validator, told.every or job.config.train.save_every


@dataclass
class Run:
    """The moving parts of a run."""

    model: IDOL
    criterion: SetCriterion
    config: TrainConfig
    device: torch.device
    seed: int
    learner: Learner
    factors: list[float]
    """Of the learning rate, by the learner's groups."""

    @classmethod
    def start(cls, job: TrainJob, categories: tuple[Category, ...], tell: Tell = _ignore) -> Run:
        """Build model and optimiser with their initial weights."""
        device, config = torch.device(job.device), job.config.train
        keep_freed_memory()
        torch.manual_seed(job.seed)
        model = build_idol(job.config.model, len(categories))
        reports = []
        if job.init_backbone:
            reports.append(initialise_backbone(model, job.init_backbone))
        if job.init:
            reports.append(initialise(model, job.init, categories))
        for report in reports:
            tell(report)
        frozen = job.stage.frozen()
        for name, parameter in model.named_parameters():
            if any(part in name for part in frozen):
                parameter.requires_grad_(False)
        model.to(device).train()
        if config.channels_last:
            model.backbone.to(memory_format=torch.channels_last)
        if config.checkpoint_activations:
            checkpoint_activations(model)
        learner, factors = _learner(model, config)
        if config.compile:
            half, last = config.precision == "bfloat16", config.channels_last
            frames = _frames_at_once(config)
            compile_backbone(model.backbone, frames, device, half=half, channels_last=last)
            learner.start()
        criterion = job.stage.criterion(_scaled_reid(job.config), job.seed)
        criterion = replace(criterion, divisors=divisors_of(config.normaliser))
        return cls(model, criterion, config, device, job.seed, learner, factors)

    def losses(self, pairs: list[KeyReferencePair], step: int, first: int) -> dict[str, Tensor]:
        """Return the unweighted losses of some pairs and ``loss``, their weighted sum.

        Args:
            pairs: on any device.
            step: how many steps were taken before.
            first: number of the first pair in the step's whole batch.
        """
        seed_torch(self.seed, step, first)
        pairs = [pair.to(self.device) for pair in pairs]
        predictions = self.predict(pairs)
        count = len(pairs)
        views = predictions.rows(0, count), predictions.rows(count, 2 * count)
        losses = self.criterion(*views, pairs, step, first=first)
        return {**losses, "loss": self.criterion.total(losses)}

    def predict(self, pairs: Sequence[KeyReferencePair]) -> IdolPredictions:
        """Predict for the key frames, and behind them for the reference frames, in float32."""
        frames = [pair.key for pair in pairs] + [pair.reference for pair in pairs]
        batch = ImageBatch.of([frame.image for frame in frames])
        if self.config.channels_last:
            layout = batch.tensor.to(memory_format=torch.channels_last)
            batch = replace(batch, tensor=layout)
        # Reference frames without mask losses need no mask features.
        masked = None if self.criterion.supervise_reference else len(pairs)
        half = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            predictions: IdolPredictions = self.model(batch, masked)
        return predictions.in_float32() if half else predictions

    def rates(self, step: int) -> list[float]:
        """Return the learning rates of the learner's groups at a step."""
        return [self.rate(step) * factor for factor in self.factors]

    def settled_from(self) -> int:
        """Return the step from which every term of the loss has its full weight."""
        weak = self.criterion.box_loss != "none"
        return self.config.pairwise_warmup_steps if weak else 0

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, before a group's factor."""
        config = self.config
        warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
        if config.schedule == "cosine":
            done = step / max(1, config.steps)
            low = config.final_rate_factor
            factor = low + (1 - low) * (1 + math.cos(math.pi * done)) / 2
        else:
            factor = 0.1 ** sum(step >= milestone for milestone in config.milestones)
        return config.learning_rate * warm * factor


def _frames_at_once(config: TrainConfig) -> int:
    """Return how many frames this process looks at together."""
    _, world = rank_and_world()
    return 2 * max(1, config.pairs_per_batch // (world * config.accumulate))


def _scaled_reid(config: RunConfig) -> RunConfig:
    """Return the config with the factor of the contrastive losses applied."""
    factor = config.train.reid_weight_factor
    loss = replace(
        config.loss, reid=config.loss.reid * factor, reid_aux=config.loss.reid_aux * factor
    )
    return replace(config, loss=loss)


def _learner(model: IDOL, config: TrainConfig) -> tuple[Learner, list[float]]:
    """Build AdamW and its groups' factors; a backbone learns slower, nothing is spared decay."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        ([(n, p) for n, p in named if "backbone" not in n], 1.0),
        ([(n, p) for n, p in named if "backbone" in n], config.backbone_rate_factor),
    ]
    filled = [(ParameterGroup(group, config.weight_decay), f) for group, f in groups if group]
    learner = Learner(
        model,
        [group for group, _ in filled],
        clip_norm=config.clip_norm,
        ema_decay=config.ema_decay,
    )
    return learner, [factor for _, factor in filled]


def plan(job: TrainJob) -> dict[str, Any]:
    """Return what a job would train on and by which losses, without training.

    No image is read, and missing ones are only warned of; but for those to validate on.

    Returns:
        ``title``, ``caption``, ``ledger`` (see `annotation_ledger`) and ``rows`` with source,
        supervision, annotations and losses.
    """
    samples = job.stage.samples(job.config, planning=True)
    criterion = job.stage.criterion(job.config, job.seed)
    ledger = annotation_ledger(samples.source)
    rows = [
        {
            "source": source,
            "supervision": kind.value,
            "annotations": counts[kind.value],
            "losses": _terms(criterion, kind),
        }
        for source, counts in ledger["sources"].items()
        for kind in Supervision
        if counts.get(kind.value)
    ]
    train_config = job.config.train
    validator, every = open_validator(job, samples.categories)
    told = (
        f"; AP on {len(validator.held_out.videos)} videos every {every} steps" if validator else ""
    )
    return {
        "title": f"{job.stage.name} stage, {job.config.model.backbone}, "
        f"{len(samples.categories)} categories",
        "caption": f"{train_config.steps} steps of {train_config.pairs_per_batch} pairs on "
        f"{job.device}{told}; video annotations: {ledger['human']['video_labels']}",
        "ledger": ledger,
        "rows": rows,
    }


def _terms(criterion: SetCriterion, kind: Supervision) -> list[str]:
    """Return the losses that instances of a kind of supervision take part in."""
    terms = ["class", "box", "re-id"]
    if criterion.mask_loss and kind in (Supervision.MASK, Supervision.PSEUDO):
        half = kind is Supervision.PSEUDO
        terms.append(f"mask x {criterion.mask_weight_pseudo}" if half else "mask")
    if criterion.box_loss == "all" or (criterion.box_loss == "box" and kind != Supervision.MASK):
        terms.append("BoxInst")
    return terms
