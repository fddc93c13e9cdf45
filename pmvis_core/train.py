"""The run loop of `train-image` and `train-video`, on one process or several.

A run folder holds ``config.toml`` (what was resolved), ``run.json`` (what went in),
``metrics.jsonl`` (the losses), ``state.pt`` (to resume) and, last, ``model.safetensors``. A step's
data depend on the seed, the step and the process alone, so a resumed run equals an unbroken one.
Several processes average their gradients after every step; under `torchrun` those it started are
used, with ``processes > 1`` this module starts them itself.
"""

from __future__ import annotations

import logging
import math
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from pmvis_core.checkpoint import (
    MODEL_FILE,
    initialise_backbone,
    load_model,
    save_model,
    transfer_weights,
)
from pmvis_core.config import TrainConfig
from pmvis_core.datasets import annotation_ledger, batches
from pmvis_core.errors import DataError, PmvisError, ResourceError, UsageError
from pmvis_core.files import atomic_write
from pmvis_core.flat_parameters import FlatParameters
from pmvis_core.losses import SetCriterion
from pmvis_core.models.idol import IDOL, build_idol
from pmvis_core.progress import Progress, silent
from pmvis_core.run_folder import (
    METRICS_FILE,
    STATE_FILE,
    MetricsLog,
    TrainJob,
    check_run_folder,
    describe,
)
from pmvis_core.samples import ImageBatch, KeyReferencePair
from pmvis_core.systems.pmvis import RunConfig, Samples
from pmvis_core.types import Supervision

logger = logging.getLogger(__name__)

FAREWELL_SECONDS = 10.0
"""How long a process that failed may take to hand its error over."""


def train(job: TrainJob, progress: Progress = silent) -> None:
    """Train to the last step, resuming what the run folder holds; does nothing if it is done.

    Raises:
        DataError: a sample cannot be read, or the loss is no longer finite.
        ResourceError: initial weights are missing or do not fit, or a process failed.
    """
    check_run_folder(job)
    if (job.out / MODEL_FILE).exists():
        logger.warning("`%s` is already trained; nothing to do", job.out)
        return
    if job.processes == 1 or dist.is_torchelastic_launched():
        with _torchrun():
            _train_process(job, progress)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        failures: Any = mp.get_context("spawn").SimpleQueue()
        others = spawn(
            _spawned, (job, meeting, failures), job.processes - 1, join=False, daemon=True
        )
        try:
            _join(job, meeting, 0, progress)
        except RuntimeError as error:  # gloo's, when another process has gone
            others.join(timeout=FAREWELL_SECONDS)
            if failures.empty():
                raise
            raise failures.get() from error
        while not others.join():
            pass


def _spawned(index: int, job: TrainJob, meeting: str, failures: Any) -> None:
    """Run one of the further processes; hand an error of the user's over to the first one."""
    try:
        _join(job, meeting, index + 1, silent)
    except PmvisError as error:
        failures.put(error)


def _join(job: TrainJob, meeting: str, rank: int, progress: Progress) -> None:
    """Run one process of a group that meets at a file."""
    torch.set_num_threads(1)
    backend = "nccl" if job.device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=job.processes)
    try:
        device = f"cuda:{rank}" if backend == "nccl" else job.device
        _train_process(replace(job, device=device), progress)
    finally:
        dist.destroy_process_group()


@contextmanager
def _torchrun() -> Iterator[None]:
    """Join the group that torchrun started, if it did."""
    if not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _rank_and_world() -> tuple[int, int]:
    """Return this process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _train_process(job: TrainJob, progress: Progress) -> None:
    """Train as one process of possibly several."""
    rank, world = _rank_and_world()
    if job.config.train.pairs_per_batch % world:
        raise UsageError(
            f"{job.config.train.pairs_per_batch} pairs a batch do not divide among {world} "
            "processes",
            "set `train.pairs_per_batch` to a multiple",
        )
    samples = job.stage.samples(job.config)
    run = _Run.start(job, samples)
    log = MetricsLog(job.out / METRICS_FILE, run.step, rank, job.config.train.log_every)
    if rank == 0:
        describe(job, annotation_ledger(samples.source), world)
    stream = batches(
        samples.source,
        job.config.train.pairs_per_batch // world,
        job.seed,
        rank=rank,
        world=world,
        start_step=run.step,
    )
    remaining = range(run.step, job.config.train.steps)
    for step in progress(remaining, f"train {job.stage.name}", len(remaining)):
        losses = run.advance(next(stream), step)
        log.add(step, losses, run.rate(step))
        last = step + 1 == job.config.train.steps
        if rank == 0 and not last and (step + 1) % job.config.train.save_every == 0:
            run.save_state(job.out / STATE_FILE)
    if rank == 0:
        run.save_model(job, samples)
        (job.out / STATE_FILE).unlink(missing_ok=True)


@dataclass
class _Run:
    """The moving parts of a run."""

    model: IDOL
    criterion: SetCriterion
    optimizer: torch.optim.AdamW
    config: TrainConfig
    device: torch.device
    flats: list[FlatParameters]
    """What learns: the backbone, and everything else."""
    averages: list[Tensor]
    """Moving average of each flat tensor; empty without one."""
    step: int = 0
    """Steps done."""

    @classmethod
    def start(cls, job: TrainJob, samples: Samples) -> _Run:
        """Build model and optimiser, initialised or resumed."""
        rank, _ = _rank_and_world()
        device = torch.device(job.device)
        torch.manual_seed(job.seed)
        model = build_idol(job.config.model, len(samples.categories))
        if job.init_backbone:
            initialise_backbone(model, job.init_backbone)
        if job.init:
            transfer_weights(model, load_model(job.init), samples.categories)
        frozen = job.stage.frozen()
        for name, parameter in model.named_parameters():
            if any(part in name for part in frozen):
                parameter.requires_grad_(False)
        model.to(device).train()
        config = job.config.train
        flats, optimizer = _optimizer(model, config)
        run = cls(
            model=model,
            criterion=job.stage.criterion(_scaled_reid(job.config), job.seed + rank),
            optimizer=optimizer,
            config=config,
            device=device,
            flats=flats,
            averages=[flat.value.detach().clone() for flat in flats if config.ema_decay],
        )
        state = job.out / STATE_FILE
        if state.exists():
            run.load_state(state)
        return run

    def advance(self, pairs: list[KeyReferencePair], step: int) -> dict[str, float]:
        """Take one optimiser step and return the unweighted losses of this process."""
        pairs = [pair.to(self.device) for pair in pairs]
        images = [pair.key.image for pair in pairs] + [pair.reference.image for pair in pairs]
        predictions = self.model(ImageBatch.of(images))
        count = len(pairs)
        losses = self.criterion(
            predictions.rows(0, count), predictions.rows(count, 2 * count), pairs, step
        )
        total = self.criterion.total(losses)
        self.optimizer.zero_grad(set_to_none=False)
        total.backward()
        self._average_gradients()
        flat = [flat.value for flat in self.flats]
        norm = torch.nn.utils.clip_grad_norm_(flat, self.config.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step) * group["factor"]
        self.optimizer.step()
        self._update_average(step)
        self.step = step + 1
        values = torch.stack([*(v.detach() for v in losses.values()), total.detach(), norm])
        names = (*losses, "loss", "gradient_norm")
        out = dict(zip(names, values.tolist(), strict=True))
        if not math.isfinite(out["loss"]):
            raise DataError(
                f"the loss is {out['loss']} at step {step}",
                "lower `train.learning_rate`, or look at the samples of this step",
            )
        return out

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

    def _average_gradients(self) -> None:
        """Average the gradients of all processes."""
        _, world = _rank_and_world()
        if world == 1:
            return
        for flat in self.flats:
            dist.all_reduce(flat.gradient)
            flat.gradient /= world

    def _update_average(self, step: int) -> None:
        """Move the average of the weights; early steps weigh more."""
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        for flat, average in zip(self.flats, self.averages, strict=False):
            average.lerp_(flat.value.detach(), 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """Return what is saved: the averaged weights if there are any, and the rest."""
        weights = dict(self.model.state_dict())
        for flat, average in zip(self.flats, self.averages, strict=False):
            weights.update(flat.views(average))
        return weights

    def save_state(self, path: Path) -> None:
        """Write what a resumed run needs."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_write(path, "wb") as stream:
            torch.save(state, stream)

    def load_state(self, path: Path) -> None:
        """Continue from a written state; whatever else the file may be, no code of it is run."""
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            message = f"`{path}` is no state that pmvis wrote"
            raise ResourceError(message, "remove it to begin the run anew") from error
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.averages = state["averages"]
        self.step = state["step"]
        logger.info("resumed at step %d", self.step)

    def save_model(self, job: TrainJob, samples: Samples) -> None:
        """Write the result."""
        save_model(
            job.out / MODEL_FILE,
            self.weights(),
            job.config.model,
            samples.categories,
            job.config.tracker,
        )


def _scaled_reid(config: RunConfig) -> RunConfig:
    """Return the config with the factor of the contrastive losses applied."""
    factor = config.train.reid_weight_factor
    loss = replace(
        config.loss, reid=config.loss.reid * factor, reid_aux=config.loss.reid_aux * factor
    )
    return replace(config, loss=loss)


def _optimizer(model: IDOL, config: TrainConfig) -> tuple[list[FlatParameters], torch.optim.AdamW]:
    """Build AdamW; names with ``backbone`` learn slower, nothing is spared weight decay."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        ([(n, p) for n, p in named if "backbone" not in n], 1.0),
        ([(n, p) for n, p in named if "backbone" in n], config.backbone_rate_factor),
    ]
    flats = [(FlatParameters(group), factor) for group, factor in groups if group]
    optimizer = torch.optim.AdamW(
        [{"params": [flat.value], "factor": factor} for flat, factor in flats],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    return [flat for flat, _ in flats], optimizer


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
