"""The run loop of `train-image` and `train-video`, on one process or several.

A run folder holds ``config.toml`` (what was resolved), ``run.json`` (what went in and when),
``metrics.jsonl`` (the losses), ``state.pt`` (to resume) and, last, ``model.safetensors``. A step's
data depend on the seed, the step and the process alone, so a resumed run equals an unbroken one.
Several processes average their gradients after every step; under `torchrun` those it started are
used, with ``processes > 1`` this module starts them itself.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from pmvis_core.config import TrainConfig, read_toml, to_toml
from pmvis_core.datasets import annotation_ledger, batches
from pmvis_core.errors import DataError, PmvisError, UsageError
from pmvis_core.files import atomic_write, canonical_json, significant
from pmvis_core.losses import SetCriterion
from pmvis_core.models.idol import IDOL, build_idol
from pmvis_core.progress import Progress, silent
from pmvis_core.samples import ImageBatch, KeyReferencePair
from pmvis_core.systems.pmvis import RunConfig, Samples, Stage
from pmvis_core.types import Supervision

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"
CONFIG_FILE = "config.toml"
METRICS_FILE = "metrics.jsonl"
FACTS_FILE = "run.json"


@dataclass(frozen=True)
class TrainJob:
    """Everything that decides a run's result."""

    stage: Stage
    """Samples and losses."""
    config: RunConfig
    """Numbers."""
    out: Path
    """The run folder."""
    seed: int = 0
    """Of weights, samples and negatives."""
    init: Path | None = None
    """A pmvis model to start from."""
    init_backbone: Path | None = None
    """Classification weights for the backbone."""
    device: str = "cpu"
    """Torch device."""
    processes: int = 1
    """Processes to start on this machine; on a CPU one thread each."""


def train(job: TrainJob, progress: Progress = silent) -> None:
    """Train to the last step, resuming what the run folder holds; does nothing if it is done.

    Raises:
        DataError: a sample cannot be read, or the loss is no longer finite.
        ResourceError: initial weights are missing or do not fit, or a process failed.
    """
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
        except RuntimeError as error:
            if isinstance(error, PmvisError) or failures.empty():
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
    log = _Log(job.out / METRICS_FILE, run.step, rank, job.config.train.log_every)
    if rank == 0:
        _describe(job, samples, world)
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
    average: dict[str, Tensor]
    """Moving average of the weights; empty without one."""
    step: int = 0
    """Steps done."""
    trainable: list[torch.nn.Parameter] = field(default_factory=list)

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
        run = cls(
            model=model,
            criterion=job.stage.criterion(_scaled_reid(job.config), job.seed + rank),
            optimizer=_optimizer(model, config),
            config=config,
            device=device,
            average={n: p.detach().clone() for n, p in model.named_parameters()}
            if config.ema_decay
            else {},
        )
        run.trainable = [p for p in model.parameters() if p.requires_grad]
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
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self._average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, self.config.clip_norm)
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
        """Average the gradients of all processes, as one flat message."""
        _, world = _rank_and_world()
        if world == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trainable]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= world
        parts = flat.split([g.numel() for g in gradients])
        for parameter, part in zip(self.trainable, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def _update_average(self, step: int) -> None:
        """Move the average of the weights; early steps weigh more."""
        if not self.average:
            return
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        names, averages = zip(*self.average.items(), strict=True)
        current = dict(self.model.named_parameters())
        torch._foreach_lerp_(list(averages), [current[name].detach() for name in names], 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """Return what is saved: the averaged weights if there are any, and the buffers."""
        return {**self.model.state_dict(), **self.average}

    def save_state(self, path: Path) -> None:
        """Write what a resumed run needs."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_write(path, "wb") as stream:
            torch.save(state, stream)

    def load_state(self, path: Path) -> None:
        """Continue from a written state."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
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


def _optimizer(model: IDOL, config: TrainConfig) -> torch.optim.AdamW:
    """Build AdamW; names with ``backbone`` learn slower, nothing is spared weight decay."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if "backbone" not in n], "factor": 1.0},
        {
            "params": [p for n, p in named if "backbone" in n],
            "factor": config.backbone_rate_factor,
        },
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )


class _Log:
    """Writes the mean losses of every few steps; a resumed run drops lines after its state."""

    def __init__(self, path: Path, step: int, rank: int, every: int) -> None:
        """Keep the lines up to ``step``; only the first process writes, ``every`` so many steps."""
        self.path, self.rank, self.every = path, rank, every
        self.sums: dict[str, float] = {}
        self.count = 0
        if rank == 0 and path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            with atomic_write(path) as stream:
                stream.writelines(f"{line}\n" for line in kept)

    def add(self, step: int, losses: dict[str, float], rate: float) -> None:
        """Take in a step's losses and write a line when it is due."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1
        if self.rank or (step + 1) % self.every:
            return
        means = {name: significant(value / self.count) for name, value in self.sums.items()}
        with self.path.open("a") as stream:
            line = {"step": step + 1, "learning_rate": significant(rate), **means}
            stream.write(canonical_json(line) + "\n")
        self.sums, self.count = {}, 0


def _describe(job: TrainJob, samples: Samples, world: int) -> None:
    """Write what went into the run."""
    job.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(job.out / CONFIG_FILE) as stream:
        stream.write(to_toml(job.config))
    facts = {
        "stage": job.stage.name,
        "seed": job.seed,
        "processes": world,
        "device": job.device,
        "torch": torch.__version__,
        "annotations": annotation_ledger(samples.source),
        "parameters": sum(p.numel() for p in build_idol(job.config.model, 1).parameters()),
    }
    with atomic_write(job.out / FACTS_FILE) as stream:
        stream.write(json.dumps(facts, indent=1, sort_keys=True) + "\n")


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


def preset_of(run: Path) -> str:
    """Return the preset that a run folder was trained with, or the published one."""
    written = run / CONFIG_FILE
    return str(read_toml(written)["preset"]) if written.exists() else "resnet50"


def clear_run_folder(folder: Path) -> None:
    """Remove the files of a former run, and nothing else."""
    for name in (MODEL_FILE, CONFIG_FILE, STATE_FILE, METRICS_FILE, FACTS_FILE):
        (folder / name).unlink(missing_ok=True)


def check_run_folder(job: TrainJob) -> None:
    """Refuse to mix two runs in one folder.

    Raises:
        UsageError: the folder holds a run made with another config, or files of something else.
    """
    if not job.out.exists() or not any(job.out.iterdir()):
        return
    written = job.out / CONFIG_FILE
    if not written.exists():
        raise UsageError(f"`{job.out}` is not empty and holds no run", "give another `-o`")
    ours = to_toml(job.config)
    if written.read_text() != ours:
        theirs = dict(_settings(written.read_text()))
        changed = [
            f"{name} {theirs.get(name)} there, {value} here"
            for name, value in _settings(ours)
            if theirs.get(name) != value
        ]
        raise UsageError(
            f"`{job.out}` was made from other inputs ({CONFIG_FILE}: {'; '.join(changed[:3])})",
            "give another `-o`, or `--overwrite`; to continue that run repeat its own config",
        )


def _settings(toml: str) -> Iterator[tuple[str, str]]:
    """Yield the settings of our own flat TOML."""
    for line in toml.splitlines():
        name, equals, value = line.partition(" = ")
        if equals:
            yield name, value
