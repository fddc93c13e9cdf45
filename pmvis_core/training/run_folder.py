"""A run folder: what it holds, and that two runs never mix in one.

``config.toml`` is what was resolved, ``run.json`` what went in and what was skipped of it,
``metrics.jsonl`` the losses and ``losses.png`` their picture, ``state.pt`` and
``state.previous.pt`` what resumes an unfinished run, ``best.safetensors`` the weights of the lowest
loss, or of the best score where a run validates, and ``model.safetensors``, which appears last, the
result.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from pmvis_core.checkpoint import MODEL_FILE
from pmvis_core.config import read_toml, to_toml
from pmvis_core.errors import UsageError
from pmvis_core.files import atomic_write, cannot_write, digest_file, read_json
from pmvis_core.systems.pmvis import RunConfig, Stage
from pmvis_core.training.states import remove_states

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.toml"
METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "losses.png"
BEST_FILE = "best.safetensors"
BOARD_FOLDER = "tensorboard"
FACTS_FILE = "run.json"


class Named(Protocol):
    """A stage, whose fields are a run's inputs."""

    name: str


class Job(Protocol):
    """What a run folder needs to know of a run."""

    @property
    def stage(self) -> Named:
        """Samples and losses."""
        ...

    @property
    def config(self) -> Any:
        """Numbers: a dataclass that `to_toml` takes."""
        ...

    @property
    def out(self) -> Path:
        """The run folder."""
        ...

    @property
    def seed(self) -> int:
        """Of everything random."""
        ...

    @property
    def init(self) -> Path | None:
        """Weights to start from."""
        ...

    @property
    def init_backbone(self) -> Path | None:
        """Classification weights to start from."""
        ...

    @property
    def device(self) -> str:
        """Torch device."""
        ...

    @property
    def processes(self) -> int:
        """Processes on this machine."""
        ...

    @property
    def tensorboard(self) -> bool:
        """Write the losses for TensorBoard too."""
        ...

    @property
    def validation(self) -> Validation | None:
        """What to score the weights on."""
        ...


@dataclass(frozen=True)
class Validation:
    """What to score the weights on in the course of a run, and when."""

    truth: Path
    """Ground truth: of videos as YouTube-VIS JSON, of a propagator's stills as COCO instances."""
    frames: Path | None = None
    """Where its frames or images lie; None: beside it."""
    every: int | None = None
    """Steps between measurements; None: ``train.save_every``. The last step is always measured."""


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
    workers: int = 0
    """Threads of each process that make samples ahead of time; 0: they are made in between. They
    change the speed only, so another number of them continues a run."""
    tensorboard: bool = False
    """Write the losses for TensorBoard too, into the run folder."""
    validation: Validation | None = None
    """Videos to measure AP on; they decide which weights are the best, not what is learnt."""


def preset_of(run: Path) -> str:
    """Return the preset that a run folder was trained with, or the published one."""
    written = run / CONFIG_FILE
    return str(read_toml(written)["preset"]) if written.exists() else "resnet50"


def clear_run_folder(job: Job) -> None:
    """Remove the files of a former run, and nothing else; the folder is this run's from then on.

    Raises:
        UsageError: see `check_run_folder` and `alone_in`; then nothing is removed.
    """
    if not _holds_run(job.out):
        return
    with alone_in(job.out):
        remove_states(job.out)
        for name in (MODEL_FILE, BEST_FILE, CURVES_FILE, METRICS_FILE, FACTS_FILE):
            (job.out / name).unlink(missing_ok=True)
        for events in (job.out / BOARD_FOLDER).glob("events.out.tfevents.*"):
            events.unlink()
        write_config(job)


def check_run_folder(job: Job) -> None:
    """Refuse to mix two runs in one folder.

    Raises:
        UsageError: the folder holds a run made with another config or from other inputs, or only
            something else.
    """
    if not _holds_run(job.out):
        return
    written = (job.out / CONFIG_FILE).read_text()
    changed = _changes(dict(_settings(written)), dict(_settings(to_toml(job.config))))
    where = CONFIG_FILE
    if not changed and (job.out / FACTS_FILE).exists():
        facts = read_json(job.out / FACTS_FILE, "run record")
        changed, where = _changes(facts.get("inputs", {}), inputs_of(job)), FACTS_FILE
    if changed:
        raise UsageError(
            f"`{job.out}` was made from other inputs ({where}: {'; '.join(changed[:3])})",
            "give another `-o`, or `--overwrite`; to continue that run repeat its own config",
        )


def inputs_of(job: Job) -> dict[str, Any]:
    """Return what goes into a run besides its config: the seed, options, and digests of files."""
    facts: dict[str, Any] = {"stage": job.stage.name, "seed": job.seed}
    given = {**vars(job.stage), "init": job.init, "init_backbone": job.init_backbone}
    for name, value in given.items():
        if not isinstance(value, Path):
            facts[name] = value
        elif name not in ("frames", "images"):
            file = value / MODEL_FILE if value.is_dir() else value
            facts[name] = digest_file(file) if file.is_file() else "absent"
    told = job.validation
    facts["val"] = digest_file(told.truth) if told and told.truth.is_file() else None
    facts["val_every"] = told.every if told else None
    return facts


def _changes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return what differs, in words."""
    return [
        f"{name} {theirs.get(name)} there, {value} here"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]


def _holds_run(folder: Path) -> bool:
    """Tell a folder with a run from an empty or absent one, and refuse anything else."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`{folder}` is a file, expected a run folder", "give another `-o`")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / CONFIG_FILE).exists():
        raise UsageError(f"`{folder}` is not empty and holds no run", "give another `-o`")
    return True


def _settings(toml: str) -> Iterator[tuple[str, str]]:
    """Yield the settings of our own flat TOML."""
    for line in toml.splitlines():
        name, equals, value = line.partition(" = ")
        if equals:
            yield name, value


def describe(job: Job, ledger: Mapping[str, Any], world: int) -> dict[str, Any]:
    """Return what ``run.json`` says of a run that begins.

    The inputs are looked at here and never again: a file that changes later did not go in.

    Args:
        job: the run.
        ledger: the annotations that go into it (`annotation_ledger`).
        world: number of processes.
    """
    return {
        "inputs": inputs_of(job),
        "annotations": ledger,
        "processes": world,
        "device": job.device,
        "torch": torch.__version__,
    }


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``run.json``; what is empty is left out."""
    told = {name: value for name, value in facts.items() if value != {}}
    with atomic_write(folder / FACTS_FILE) as stream:
        stream.write(json.dumps(told, indent=1, sort_keys=True) + "\n")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a run folder, and keep other processes from training in it for a while.

    A job that a scheduler starts anew may meet the one that it has not ended yet. The lock goes
    with the process, however that ends; a file system without locks has none.

    Raises:
        UsageError: another process trains there.
        ResourceError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another process trains in `{folder}`", "wait for its end, or give another `-o`"
            ) from error
        except OSError as error:
            logger.info("`%s` cannot be locked: %s", folder, error)
        yield
    finally:
        os.close(descriptor)


def write_config(job: Job) -> None:
    """Write ``config.toml``, which marks a folder as this run's."""
    with atomic_write(job.out / CONFIG_FILE) as stream:
        stream.write(to_toml(job.config))
