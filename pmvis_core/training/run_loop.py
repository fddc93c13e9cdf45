"""What every training run does, whatever it learns: start or resume, step, log, save, finish.

A run folder says how far a run came (`run_folder`), a `Learner` holds what changes, and `losses`
says what to learn from some samples. Batches, and everything random, depend on the seed, the step
and a sample's number in the step alone. So a run that was killed, at whatever instant, and goes on
from its last state equals an unbroken one; and process r of W sees the pairs that are the r-th
share of the batch of one process. SIGTERM ends a run behind the step in hand, with a state.

    start_run(job, partial(process, job, progress), partial(process, job, silent))
    take_steps(job, config, learner, source, Steps("train image", ...), share, progress)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol

import numpy as np
import torch
from torch import Tensor

from pmvis_core.checkpoint import MODEL_FILE
from pmvis_core.data.datasets import annotation_ledger
from pmvis_core.data.spares import (
    SKIP,
    STOP,
    BrokenSamples,
    Looked,
    OnError,
    SkippedSamples,
)
from pmvis_core.data.streams import Mixture, Sample, Source, batches, prefetch
from pmvis_core.errors import DataError, ResourceError, Terminated, UsageError
from pmvis_core.progress import Progress
from pmvis_core.training.learner import Learner
from pmvis_core.training.loss_curves import write_loss_curves
from pmvis_core.training.metrics_log import MetricsLog
from pmvis_core.training.nan_guard import GRADIENT, not_finite
from pmvis_core.training.processes import (
    Work,
    averaged,
    decided_by_first,
    gathered,
    launch,
    rank_and_world,
    under_torchrun,
)
from pmvis_core.training.run_folder import (
    BEST_FILE,
    BOARD_FOLDER,
    CURVES_FILE,
    FACTS_FILE,
    METRICS_FILE,
    Job,
    alone_in,
    check_run_folder,
    describe,
    write_config,
    write_facts,
)
from pmvis_core.training.states import (
    find_state,
    read_state,
    remove_states,
    room_for,
    save_state,
)
from pmvis_core.training.termination import Told, termination

logger = logging.getLogger(__name__)

Validate = Callable[[Mapping[str, Tensor]], dict[str, float]]
"""Takes weights as `Learner.weights` gives them, and returns numbers to log, the score among them.
"""


class Schedule(Protocol):
    """What the loop needs to know of a run's numbers."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        ...

    @property
    def accumulate(self) -> int:
        """Parts that a step's batch is taken in, one after the other."""
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
    losses: Callable[[list[Sample], int, int], dict[str, Tensor]]
    """Takes samples, the step, and the number of the first of them in the step's whole batch;
    returns scalars, always of the same names, and among them ``loss``, which is minimised."""
    rates: Callable[[int], list[float]]
    """Returns the learning rates of the learner's groups at a step."""
    save: Callable[[Path, Mapping[str, Tensor]], None]
    """Writes the weights as a model file."""
    name: Callable[[Sample], str]
    """Says what a sample was made from."""
    threads: int = 0
    """Samples made side by side, ahead of time; 0: in between."""
    on_error: OnError = STOP
    """What a sample that cannot be made does (`data.spares`)."""
    comparable_from: int = 0
    """Step from which losses mean the same, so that the best can be told."""
    validate: Validate | None = None
    """Scores the weights, in all processes at the same time; where there is none, the loss tells
    the best weights."""
    validate_every: int = 1
    """Steps between scores; the last step has one, too."""
    score: str = "val_AP"
    """Which of the numbers that `validate` returns is the highest for the best weights; >= 0."""


def start_run(job: Job, first: Work, other: Work) -> None:
    """Run a job on its processes, unless its folder holds the result already.

    Args:
        job: what to run.
        first: what this process does, under `torchrun` its first one.
        other: what each further process does; it is pickled.

    Raises:
        UsageError: the folder holds another run.
        PmvisError: any process raised it.
    """
    if under_torchrun():  # all processes stand here: the first one's look at the folder counts
        first, other = (partial(_unless_done, job, work) for work in (first, other))
    elif _is_done(job):
        return
    launch(first, other, job.device, job.processes)


def _unless_done(job: Job, work: Work, device: str) -> None:
    """Do the work of one process unless the first one finds that it is done."""
    if not decided_by_first(partial(_is_done, job)):
        work(device)


def _is_done(job: Job) -> bool:
    """Tell whether a run folder holds the result, and refuse another run's."""
    check_run_folder(job)
    done = (job.out / MODEL_FILE).exists()
    if done:
        logger.warning("`%s` is already trained; nothing to do", job.out)
    return done


def share_of_batch(batch: int, what: str, accumulate: int = 1) -> int:
    """Return how many samples of a batch this process looks at together.

    Args:
        batch: samples of all processes in a step.
        what: the samples by the name that a setting has for them (``pairs``).
        accumulate: parts that they are taken in, one after the other.

    Raises:
        UsageError: they do not divide.
    """
    _, world = rank_and_world()
    if batch % (world * accumulate):
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        raise UsageError(
            f"{batch} {what} a batch do not divide among {world} processes{parts}",
            f"set `train.{what}_per_batch` to a multiple of {world * accumulate}",
        )
    return batch // (world * accumulate)


def seed_torch(seed: int, step: int, first: int) -> None:
    """Seed what torch draws (dropout) for some samples of a step, on every device.

    Args:
        seed: the run's.
        step: the optimiser's.
        first: number of the first of the samples in the step's whole batch.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, first]).generate_state(1)[0]))


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
        share: samples that this process looks at together (`share_of_batch`).
        progress: shows how far it is.
    """
    with ExitStack() as held:
        told = held.enter_context(termination())
        decided_by_first(lambda: held.enter_context(alone_in(job.out)))
        _take_steps(job, schedule, learner, source, steps, share, progress, told)


def _take_steps(
    job: Job,
    schedule: Schedule,
    learner: Learner,
    source: Source[Sample] | Mixture[Sample],
    steps: Steps[Sample],
    share: int,
    progress: Progress,
    told: Told,
) -> None:
    """Train to the last step, or until ``told`` to end."""
    rank, world = rank_and_world()
    found = decided_by_first(partial(find_state, job.out))
    state = read_state(found) if found else {}
    start: int = state.get("step", 0)
    if state:
        learner.load(state.pop("learner"))  # its copy on the CPU can go
        logger.info("resumed at step %d", start)
    broken = BrokenSamples() if steps.on_error == SKIP else None
    first = start * schedule.accumulate
    stream = batches(source, share, job.seed, rank, world, first, steps.threads, broken)
    if steps.threads:
        stream = prefetch(stream)
    skipped = SkippedSamples(state.get("skipped"), aloud=rank == 0)
    record = None
    if rank == 0:
        facts = describe(job, annotation_ledger(source), world)
        record = _Record.open(job, schedule, learner, steps, skipped, facts, state)
    step = _Step(schedule.accumulate, share, learner, steps, stream, broken, skipped, told)
    remaining = range(start, schedule.steps)
    for number in progress(remaining, steps.title, len(remaining)):
        losses = step(number)
        done = number + 1
        if record is not None:
            record.add(number, losses)
        if (fault := skipped.verdict(at_end=done == schedule.steps)) is not None:
            if record is not None:
                record.tell()
            raise fault
        scores = _validated(steps, learner, done, schedule.steps)
        if record is not None:
            record.keep(done, scores, leave=told.agreed)
        if told.agreed and done < schedule.steps:
            raise Terminated(
                f"told to end (SIGTERM) after step {done}, which is saved",
                "the same command goes on from there",
            )
    if record is not None:
        skipped.tell(f"`{job.out / FACTS_FILE}`")
        record.finish()


def _validated(steps: Steps[Any], learner: Learner, done: int, last: int) -> dict[str, float]:
    """Score the weights after some steps if that is due; every process comes here."""
    if steps.validate is None or not _is_due(steps.validate_every, done, last):
        return {}
    _refuse_infinite(learner, done)
    scores = steps.validate(learner.weights())
    logger.info("step %d: %s %.4f", done, steps.score, scores[steps.score])
    return scores


def _is_due(every: int, done: int, last: int) -> bool:
    """Tell whether something is due after some steps: every so many, and at the end."""
    return done == last or done % every == 0


def _refuse_infinite(learner: Learner, done: int) -> None:
    """Stop before weights that are no numbers are used.

    Raises:
        DataError: see there.
    """
    if not learner.weights_are_finite():
        raise DataError(
            f"the weights are no longer finite after step {done}",
            "lower `train.learning_rate`; the last saved state is untouched",
        )


@dataclass(frozen=True)
class _Step(Generic[Sample]):
    """Takes optimiser steps on a stream of samples."""

    accumulate: int
    share: int
    learner: Learner
    steps: Steps[Sample]
    stream: Iterator[list[Sample]]
    broken: BrokenSamples | None
    skipped: SkippedSamples = field(default_factory=SkippedSamples)
    told: Told = field(default_factory=Told)

    def __call__(self, step: int) -> dict[str, float]:
        """Take a step and return its losses, the mean over processes and parts of the batch.

        Raises:
            DataError: a loss or the gradient is not finite; the weights stay as they were.
            ResourceError: the GPU's memory does not suffice.
        """
        try:
            return self._taken(step)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"step {step + 1}: out of memory on the GPU: {str(error).splitlines()[0]}",
                "`--accumulate 2` or `--checkpoint-activations` need less; the last saved state is "
                "untouched",
            ) from error

    def _taken(self, step: int) -> dict[str, float]:
        """Take a step; see `__call__`."""
        rank, world = rank_and_world()
        self.learner.start()
        parts: list[tuple[list[Sample], int]] = []
        total: Tensor | None = None
        for part in range(self.accumulate):
            first = (part * world + rank) * self.share
            parts.append((next(self.stream), first))
            losses = self.steps.losses(parts[-1][0], step, first)
            last = part == self.accumulate - 1
            self.learner.backward(losses["loss"] / self.accumulate, last=last)
            values = torch.stack([value.detach().float() for value in losses.values()])
            total = values if total is None else total + values
        assert total is not None
        norm = self.learner.gradient_norm()
        looked = self._looked(step)
        counts = total.new_tensor([looked.files, len(looked.faults), self.told.asked])
        shared = averaged(torch.cat([total / self.accumulate, counts]))
        *means, files, faults, asked, size = torch.cat([shared, norm[None].float()]).tolist()
        named = dict(zip([*losses, GRADIENT], [*means, size], strict=True))
        if not all(map(math.isfinite, named.values())):
            guard = self.steps.losses, self.steps.name, parts, step, named
            raise not_finite(self.learner, *guard)
        self.told.agreed = asked > 0
        count = self._add(step, looked, round(files * world), round(faults * world))
        self.learner.update(step, self.steps.rates(step))
        return named | ({"skipped_samples": float(count)} if count else {})

    def _looked(self, step: int) -> Looked:
        """Return what this process's samples of a step were made from, as far as it counts."""
        if self.broken is None:
            return Looked(0, ())
        return self.broken.taken(step * self.accumulate, self.accumulate)

    def _add(self, step: int, mine: Looked, files: int, faults: int) -> int:
        """Take note of what all processes met, given their sums; return the number of faults."""
        everywhere = [f for each in gathered(mine.faults) for f in each] if faults else ()
        self.skipped.add(step, Looked(files, everywhere))
        return faults


@dataclass
class _Record:
    """What the first process writes while a run goes on, and at its end."""

    job: Job
    schedule: Schedule
    learner: Learner
    steps: Steps[Any]
    skipped: SkippedSamples
    log: MetricsLog
    facts: dict[str, Any]
    """What ``run.json`` says from the beginning on."""
    best: dict[str, float]
    """Step and loss, or score, of the best weights so far."""
    recent: list[float]
    """The losses since weights were last compared."""

    @classmethod
    def open(
        cls,
        job: Job,
        schedule: Schedule,
        learner: Learner,
        steps: Steps[Any],
        skipped: SkippedSamples,
        facts: dict[str, Any],
        state: Mapping[str, Any],
    ) -> _Record:
        """Go on from what a state holds, or begin."""
        done = state.get("step", 0)
        log = MetricsLog(job.out / METRICS_FILE, done, schedule.log_every, state.get("log"))
        if job.tensorboard:
            log.show_on_board(job.out / BOARD_FOLDER, done)
        best, recent = dict(state.get("best", {})), list(state.get("recent", []))
        record = cls(job, schedule, learner, steps, skipped, log, facts, best, recent)
        write_config(job)
        record.tell()
        return record

    def add(self, step: int, losses: Mapping[str, float]) -> None:
        """Log a step, counted from 0."""
        self.log.add(step, losses, max(self.steps.rates(step)))
        if step >= self.steps.comparable_from:
            self.recent.append(losses["loss"])

    def tell(self) -> None:
        """Write ``run.json``."""
        found = {"best": self.best, "skipped": self.skipped.record()}
        with room_for(self.job.out / FACTS_FILE):
            write_facts(self.job.out, self.facts | found)

    def keep(self, done: int, scores: Mapping[str, float], *, leave: bool) -> None:
        """Log scores, if there are any, and save what is due after some steps.

        Args:
            done: how many.
            scores: of the weights.
            leave: the run ends here, to be resumed.
        """
        if scores:
            name = self.steps.score
            self.log.note(done, scores)
            better = scores[name] >= self.best.get(name, 0.0)  # of equals the last
            self._keep_best(done, name, scores[name], better)
        due = _is_due(self.schedule.save_every, done, self.schedule.steps)
        if not (due or leave):
            return
        _refuse_infinite(self.learner, done)
        if due and self.steps.validate is None:
            loss = sum(self.recent) / len(self.recent) if self.recent else math.inf
            self._keep_best(done, "loss", loss, loss < self.best.get("loss", math.inf))
        if due:
            self.recent = []
        if done < self.schedule.steps:
            about = {"step": done, "log": self.log.state(), "best": self.best}
            more = {"recent": self.recent, "skipped": self.skipped.state()}
            save_state(self.job.out, {**about, **more, "learner": self.learner.state()})
            self.tell()

    def _keep_best(self, done: int, measure: str, value: float, better: bool) -> None:
        """Keep the weights if they are better than all before."""
        if better:
            self.best = {"step": done, measure: value}
            self._save(BEST_FILE)

    def _save(self, name: str) -> None:
        """Write the weights as they are now into the run folder."""
        with room_for(self.job.out / name):
            self.steps.save(self.job.out / name, self.learner.weights())

    def finish(self) -> None:
        """Write the curves and the model, and remove what only an unfinished run needs."""
        out = self.job.out
        self.log.close()
        try:
            write_loss_curves(out / METRICS_FILE, out / CURVES_FILE, self.steps.title)
        except (OSError, ResourceError) as error:  # a picture is not worth the model
            logger.warning("`%s` cannot be drawn: %s", out / CURVES_FILE, error)
        if self.best.get("step") == self.schedule.steps:  # it is the model itself
            (out / BEST_FILE).unlink(missing_ok=True)
        self.tell()
        self._save(MODEL_FILE)
        remove_states(out)
