"""The run loop of `train-image` and `train-video`, on one process or several.

A run folder holds ``config.toml`` (what was resolved), ``run.json`` (what went in),
``metrics.jsonl`` (the losses), ``state.pt`` (to resume) and, last, ``model.safetensors``. A step's
data depend on the seed, the step and the process alone, so a resumed run equals an unbroken one.
Several processes average their gradients after every step (`processes`, `learner`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from pmvis_core.losses import SetCriterion
from pmvis_core.models.idol import IDOL, build_idol
from pmvis_core.progress import Progress, silent
from pmvis_core.systems.pmvis import RunConfig, Samples
from pmvis_core.training.learner import Learner, ParameterGroup
from pmvis_core.training.processes import rank_and_world
from pmvis_core.training.run_folder import TrainJob
from pmvis_core.training.run_loop import Steps, as_numbers, share_of_batch, start_run, take_steps
from pmvis_core.types import Supervision


def _ignore(report: KeyReport) -> None:
    """Say nothing."""


def train(job: TrainJob, progress: Progress = silent, tell: Tell = _ignore) -> None:
    """Train to the last step, resuming what the run folder holds; does nothing if it is done.

    Args:
        job: what to train, on what, where.
        progress: shows how far it is.
        tell: is told what became of the tensors of initial weights.

    Raises:
        DataError: a sample cannot be read, or the loss is no longer finite.
        ResourceError: initial weights are missing or do not fit, or a process failed.
    """
    first = partial(_train_process, job, progress, tell)
    start_run(job, first, partial(_train_process, job, silent, _ignore))


def _train_process(job: TrainJob, progress: Progress, tell: Tell, device: str) -> None:
    """Train as one process of possibly several."""
    job = replace(job, device=device)
    config = job.config
    share = share_of_batch(config.train.pairs_per_batch, "pairs")
    samples = job.stage.samples(config)
    run = _Run.start(job, samples, tell)

    def save(path: Path, weights: Mapping[str, Tensor]) -> None:
        save_model(path, weights, config.model, samples.categories, config.tracker)

    steps = Steps(f"train {job.stage.name}", run.advance, save)
    take_steps(job, config.train, run.learner, samples.source, steps, share, progress)


@dataclass
class _Run:
    """The moving parts of a run."""

    model: IDOL
    criterion: SetCriterion
    config: TrainConfig
    device: torch.device
    learner: Learner
    factors: list[float]
    """Of the learning rate, by the learner's groups."""

    @classmethod
    def start(cls, job: TrainJob, samples: Samples, tell: Tell) -> _Run:
        """Build model and optimiser, initialised or resumed."""
        rank, _ = rank_and_world()
        device = torch.device(job.device)
        torch.manual_seed(job.seed)
        model = build_idol(job.config.model, len(samples.categories))
        reports = []
        if job.init_backbone:
            reports.append(initialise_backbone(model, job.init_backbone))
        if job.init:
            reports.append(initialise(model, job.init, samples.categories))
        for report in reports:
            tell(report)
        frozen = job.stage.frozen()
        for name, parameter in model.named_parameters():
            if any(part in name for part in frozen):
                parameter.requires_grad_(False)
        model.to(device).train()
        learner, factors = _learner(model, job.config.train)
        return cls(
            model=model,
            criterion=job.stage.criterion(_scaled_reid(job.config), job.seed + rank),
            config=job.config.train,
            device=device,
            learner=learner,
            factors=factors,
        )

    def advance(self, pairs: list[KeyReferencePair], step: int) -> tuple[dict[str, float], float]:
        """Take one optimiser step; return this process's unweighted losses and the rate."""
        pairs = [pair.to(self.device) for pair in pairs]
        images = [pair.key.image for pair in pairs] + [pair.reference.image for pair in pairs]
        predictions = self.model(ImageBatch.of(images))
        count = len(pairs)
        losses = self.criterion(
            predictions.rows(0, count), predictions.rows(count, 2 * count), pairs, step
        )
        total = self.criterion.total(losses)
        rate = self.rate(step)
        norm = self.learner.step(total, step, [rate * factor for factor in self.factors])
        return as_numbers({**losses, "loss": total, "gradient_norm": norm}, step), rate

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

    Returns:
        ``title``, ``caption``, ``ledger`` (see `annotation_ledger`) and ``rows`` with source,
        supervision, annotations and losses.
    """
    samples = job.stage.samples(job.config)
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
    return {
        "title": f"{job.stage.name} stage, {job.config.model.backbone}, "
        f"{len(samples.categories)} categories",
        "caption": f"{train_config.steps} steps of {train_config.pairs_per_batch} pairs on "
        f"{job.device}; video annotations: {ledger['human']['video_labels']}",
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
