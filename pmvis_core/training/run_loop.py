"""What every training run does, whatever it learns: start or resume, step, log, save, finish.

A run folder says how far a run came (`run_folder`), a `Learner` holds what changes, and `advance`
takes a step. Batches depend on the seed, the step and the process alone, so a resumed run equals an
unbroken one.

    start_run(job, partial(process, job, progress), partial(process, job, silent))
    take_steps(job, config, learner, source, share, Steps("train image", advance, save), progress)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol

import torch
from torch import Tensor

from pmvis_core.checkpoint import MODEL_FILE
from pmvis_core.data.datasets import annotation_ledger
from pmvis_core.data.streams import Mixture, Sample, Source, batches, prefetch
from pmvis_core.errors import DataError, UsageError
from pmvis_core.progress import Progress
from pmvis_core.training.learner import Learner
from pmvis_core.training.processes import Work, launch, rank_and_world
from pmvis_core.training.run_folder import (
    METRICS_FILE,
    STATE_FILE,
    Job,
    MetricsLog,
    check_run_folder,
    describe,
)

logger = logging.getLogger(__name__)


class Schedule(Protocol):
    """What the loop needs to know of a run's numbers."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        ...

    @property
    def log_every(self) -> int:
        """Steps between lines of metrics.jsonl."""
        ...

    @property
    def save_every(self) -> int:
        """Steps between resumable states."""
        ...


@dataclass(frozen=True)
class Steps(Generic[Sample]):
    """What a run does in its own way."""

    title: str
    """Shown beside the progress."""
    advance: Callable[[list[Sample], int], tuple[dict[str, float], float]]
    """Takes this process's batch and the step; returns losses and the learning rate."""
    save: Callable[[Path, Mapping[str, Tensor]], None]
    """Writes the weights as a model file."""
    threads: int = 0
    """Samples made side by side, ahead of time; 0: in between."""


def start_run(job: Job, first: Work, other: Work) -> None:
    """Run a job on its processes, unless its folder holds the result already.

    Args:
        job: what to run.
        first: what this process does.
        other: what each further process does; it is pickled.

    Raises:
        UsageError: the folder holds another run.
        PmvisError: any process raised it.
    """
    check_run_folder(job)
    if (job.out / MODEL_FILE).exists():
        logger.warning("`%s` is already trained; nothing to do", job.out)
        return
    launch(first, other, job.device, job.processes)


def share_of_batch(batch: int, what: str) -> int:
    """Return how much of a batch is this process's.

    Args:
        batch: samples of all processes in a step.
        what: the samples by the name that a setting has for them (``pairs``).

    Raises:
        UsageError: they do not divide.
    """
    _, world = rank_and_world()
    if batch % world:
        raise UsageError(
            f"{batch} {what} a batch do not divide among {world} processes",
            f"set `train.{what}_per_batch` to a multiple",
        )
    return batch // world


def take_steps(
    job: Job,
    schedule: Schedule,
    learner: Learner,
    source: Source[Sample] | Mixture[Sample],
    steps: Steps[Sample],
    share: int,
    progress: Progress,
) -> None:
    """Train to the last step from the state in the run folder, and write the model.

    Args:
        job: the run.
        schedule: how long, and how often to write.
        learner: a new one; it takes over the state.
        source: what to draw samples from.
        steps: what a step is.
        share: samples of this process in a step.
        progress: shows how far it is.
    """
    rank, world = rank_and_world()
    state = job.out / STATE_FILE
    start = learner.load(state) if state.exists() else 0
    log = MetricsLog(job.out / METRICS_FILE, start, rank, schedule.log_every)
    if rank == 0:
        describe(job, annotation_ledger(source), world)
    stream = batches(source, share, job.seed, rank, world, start, steps.threads)
    if steps.threads:
        stream = prefetch(stream)
    remaining = range(start, schedule.steps)
    for step in progress(remaining, steps.title, len(remaining)):
        log.add(step, *steps.advance(next(stream), step))
        last = step + 1 == schedule.steps
        if rank == 0 and not last and (step + 1) % schedule.save_every == 0:
            learner.save(state, step + 1)
    if rank == 0:
        steps.save(job.out / MODEL_FILE, learner.weights())
        state.unlink(missing_ok=True)


def as_numbers(losses: Mapping[str, Tensor], step: int) -> dict[str, float]:
    """Return losses as numbers, in one go, and refuse to go on with what is none.

    Args:
        losses: ``loss`` among them, all on one device.
        step: for the message.

    Raises:
        DataError: the loss is not finite.
    """
    numbers = torch.stack([value.detach() for value in losses.values()]).tolist()
    named = dict(zip(losses, numbers, strict=True))
    if not math.isfinite(named["loss"]):
        raise DataError(
            f"the loss is {named['loss']} at step {step}",
            "lower `train.learning_rate`, or look at the samples of this step",
        )
    return named
