"""What ends, or must not end, a run at its ninth hour: the loop alone, on a tiny network."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pmvis_core.checkpoint import MODEL_FILE
from pmvis_core.data.spares import SKIP, OnError
from pmvis_core.data.streams import Ledger
from pmvis_core.errors import DataError, ResourceError, Terminated, UsageError
from pmvis_core.files import atomic_write, digest_file
from pmvis_core.progress import silent
from pmvis_core.training.learner import Learner, ParameterGroup
from pmvis_core.training.metrics_log import read_metrics
from pmvis_core.training.run_folder import CURVES_FILE, TrainJob, alone_in, clear_run_folder
from pmvis_core.training.run_loop import Steps, take_steps
from pmvis_core.training.states import (
    PREVIOUS_FILE,
    STATE_FILE,
    find_state,
    read_state,
    save_state,
)
from pmvis_core.types import Category

WIDE = 3000
"""Weights of the layer; a state has some 60 kB."""


class Numbers:
    """A source of numbers, some of which cannot be read."""

    categories: tuple[Category, ...] = ()
    files_a_sample = 1

    def __init__(self, length: int, broken: set[int]) -> None:
        """Count ``length`` items."""
        self.length, self.broken = length, broken

    def __len__(self) -> int:
        """Return the number of items."""
        return self.length

    def sample(self, index: int, rng: np.random.Generator) -> float:
        """Return the item's place between 0 and 1, and a little noise."""
        if index in self.broken:
            raise DataError(f"item {index}: `/data/of/mine/{index}.jpg` is truncated")
        return index / self.length + 0.1 * float(rng.random())

    def ledger(self) -> Ledger:
        """Return how many there are."""
        return {"numbers": Counter(images=self.length)}


@dataclass(frozen=True)
class Schedule:
    """A run's numbers."""

    steps: int = 14
    accumulate: int = 2
    log_every: int = 3
    save_every: int = 4


@dataclass(frozen=True)
class Config:
    """What a run folder keeps."""

    train: Schedule = field(default_factory=Schedule)


class Stage:
    """A stage that learns from nothing."""

    name = "numbers"


def job_in(folder: Path, **more: Any) -> TrainJob:
    return TrainJob(Stage(), Config(Schedule(**more)), folder)  # type: ignore[arg-type]


SOUND = Numbers(60, set())
BAD = {7, 20, 33, 41, 50}
SOME_BROKEN = Numbers(60, BAD)


def losses_of(model: nn.Module) -> Callable[[list[float], int, int], dict[str, Tensor]]:
    def losses(samples: list[float], step: int, first: int) -> dict[str, Tensor]:
        loss = torch.stack([(model(torch.full((WIDE,), x)) - x).abs().sum() for x in samples])
        return {"loss_off": loss.mean(), "loss": loss.mean()}

    return losses


def save(path: Path, weights: Mapping[str, Tensor]) -> None:
    with atomic_write(path, "wb") as stream:
        for name in sorted(weights):
            stream.write(weights[name].numpy().tobytes())


def run(
    job: TrainJob,
    source: Numbers = SOUND,
    progress: Any = silent,
    on_error: OnError = SKIP,
    losses: Any = None,
    **more: Any,
) -> None:
    """Train from the same weights as always."""
    torch.manual_seed(0)
    model = nn.Linear(WIDE, 1)
    group = ParameterGroup(list(model.named_parameters()), 0.0)
    learner = Learner(model, [group], clip_norm=1.0, ema_decay=0.9)
    made = losses or losses_of(model)
    steps = Steps("numbers", made, lambda step: [0.01], save, str, on_error=on_error, **more)
    take_steps(job, job.config.train, learner, source, steps, 2, progress)  # type: ignore[arg-type]


def doing(step: int, what: Callable[[], Any]) -> Any:
    """Return a progress that does something before a step."""

    def progress(items: Any, title: str, total: int | None = None) -> Iterator[Any]:
        for number in items:
            if number == step:
                what()
            yield number

    return progress


class Interrupted(Exception):
    """Stands for a kill."""


def interrupt() -> None:
    raise Interrupted


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def facts_of(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return facts


@pytest.mark.parametrize("threads", [0, 2])
def test_what_was_skipped_is_in_the_run_folder_over_all_resumptions(
    tmp_path: Path, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    job = job_in(tmp_path / "broken")
    for step in (6, 11):
        with pytest.raises(Interrupted):
            run(job, SOME_BROKEN, doing(step, interrupt), threads=threads)
    assert facts_of(job.out)["skipped"]["samples"] > 0  # as of the last state
    caplog.clear()
    run(job, SOME_BROKEN, threads=threads)
    assert "samples could not be made" in caplog.messages[-1]
    assert "run.json` names them" in caplog.messages[-1]
    whole = job_in(tmp_path / "whole")
    run(whole, SOME_BROKEN)
    assert files_of(job.out) == files_of(whole.out)
    record = facts_of(job.out)["skipped"]
    lines = read_metrics(job.out / "metrics.jsonl")
    told = sum(3 * line.get("skipped_samples", 0) for line in lines)
    assert told <= record["samples"] == sum(record["faults"].values())
    assert record["files"] == 14 * 4 + record["samples"]
    assert record["faults"].keys() <= {f"item {i}: `{i}.jpg` is truncated" for i in BAD}
    assert record["different"] == len(record["faults"]) > 1


def test_a_clean_run_says_nothing_of_it(tmp_path: Path) -> None:
    run(job_in(tmp_path / "run"))
    assert "skipped" not in facts_of(tmp_path / "run")


def test_half_a_folder_of_broken_files_is_one_clear_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = job_in(tmp_path / "run", steps=30, accumulate=1, save_every=1000)
    with pytest.raises(DataError, match="more than 10%") as caught:
        run(job, Numbers(60, set(range(30))))
    assert "check-data" in str(caught.value.hint)
    assert len(caplog.messages) <= 6
    assert facts_of(job.out)["skipped"]["samples"] >= 10
    assert not (job.out / MODEL_FILE).exists()
    # Resumed on mended files, what was met is not forgotten, and does not end it.
    run(job, SOUND)


def test_what_is_remembered_counts_when_a_resumed_run_is_judged(tmp_path: Path) -> None:
    """Eight bad files before, four behind: neither part alone is too much."""
    job = job_in(tmp_path / "run", steps=10, accumulate=1, save_every=5)
    state = {"files": 20, "samples": 11, "faults": {"a": 6, "b": 5}}
    with pytest.raises(Interrupted):
        run(job, SOUND, doing(6, interrupt))
    known = read_state(job.out / STATE_FILE)
    save_state(job.out, known | {"skipped": state})
    with pytest.raises(DataError, match=r"of the 30 files .* 11 are broken"):
        run(job, SOUND)  # at the end: 11 > 0.1 * 30 + 5


def test_sigterm_saves_the_step_in_hand(tmp_path: Path) -> None:
    job = job_in(tmp_path / "asked", steps=15)
    usual = signal.getsignal(signal.SIGTERM)

    def ask() -> None:
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated, match="after step 7, which is saved") as caught:
        run(job, SOME_BROKEN, doing(6, ask))
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == usual
    assert read_state(job.out / STATE_FILE)["step"] == 7
    assert read_state(job.out / PREVIOUS_FILE)["step"] == 4
    with pytest.raises(Terminated, match="after step 10"):
        run(job, SOME_BROKEN, doing(9, ask))
    run(job, SOME_BROKEN, doing(14, ask))  # the last step is the end all the same
    run(replace(job, out=tmp_path / "whole"), SOME_BROKEN)
    assert files_of(job.out) == files_of(tmp_path / "whole")
    assert "best" in facts_of(job.out)


def test_somebody_elses_handler_of_sigterm_stays(tmp_path: Path) -> None:
    seen: list[int] = []
    usual = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        ask = doing(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(job_in(tmp_path / "run"), SOUND, ask)
    finally:
        signal.signal(signal.SIGTERM, usual)
    assert seen == [signal.SIGTERM]


@contextmanager
def full_disk(room: int = 20_000) -> Iterator[None]:
    """Let the system refuse files that are larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_no_state(tmp_path: Path) -> None:
    job = job_in(tmp_path / "full")
    with pytest.raises(Interrupted):
        run(job, SOUND, doing(9, interrupt))
    before = files_of(job.out)
    with full_disk(), pytest.raises(ResourceError, match=r"cannot write `.*state\.pt`") as caught:
        run(job)
    assert "make room" in str(caught.value.hint)
    after = files_of(job.out)
    kept = (STATE_FILE, PREVIOUS_FILE)
    assert [after[name] for name in kept] == [before[name] for name in kept]
    assert not list(job.out.glob("*.part"))
    with full_disk(10_000), pytest.raises(ResourceError, match="cannot write"):  # weights: 12 kB
        run(job)
    run(job)
    run(replace(job, out=tmp_path / "whole"))
    assert files_of(job.out) == files_of(tmp_path / "whole")


def test_a_picture_that_cannot_be_drawn_does_not_cost_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = job_in(tmp_path / "run")
    (job.out / f"{CURVES_FILE}.part").mkdir(parents=True)
    run(job)
    assert (job.out / MODEL_FILE).exists()
    assert f"{CURVES_FILE}` cannot be drawn" in caplog.text


def test_inputs_are_what_they_were_when_the_run_began(tmp_path: Path) -> None:
    init = tmp_path / "init.safetensors"
    init.write_bytes(b"weights")
    digest = digest_file(init)
    job = replace(job_in(tmp_path / "run"), init=init)
    run(job, SOUND, doing(9, init.unlink))
    assert facts_of(job.out)["inputs"]["init"] == digest


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    job = job_in(tmp_path / "run")

    def intrude() -> None:
        run(job)

    with pytest.raises(UsageError, match="another process trains in"):
        run(job, SOUND, doing(5, intrude))
    with alone_in(job.out):
        for begin in (run, clear_run_folder):
            with pytest.raises(UsageError, match="another process trains in"):
                begin(job)
    assert (job.out / "run.json").exists()
    run(job)
    before = files_of(job.out)
    clear_run_folder(job)
    run(job)
    assert files_of(job.out) == before


def test_too_little_memory_is_said_in_words(tmp_path: Path) -> None:
    def losses(samples: list[float], step: int, first: int) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    with pytest.raises(
        ResourceError, match=r"step 1: out of memory .* allocate 9 GiB\.$"
    ) as caught:
        run(job_in(tmp_path / "run"), losses=losses)
    assert "--accumulate" in str(caught.value.hint)


def test_a_disk_that_is_gone_is_said_in_words(tmp_path: Path) -> None:
    source = Numbers(60, set())
    job = job_in(tmp_path / "run")
    with pytest.raises(
        DataError, match=r"51 samples in a row .* `/data/of/mine/\d+\.jpg`"
    ) as caught:
        run(job, source, doing(9, lambda: source.broken.update(range(60))))
    assert "is the disk with the data still there?" in str(caught.value.hint)
    assert read_state(job.out / STATE_FILE)["step"] == 8


def test_a_log_that_a_crash_of_the_machine_spoilt(tmp_path: Path) -> None:
    job = job_in(tmp_path / "run")
    with pytest.raises(Interrupted):
        run(job, SOUND, doing(9, interrupt))
    with (job.out / "metrics.jsonl").open("ab") as stream:
        stream.write(b'\xff\xfe\0\0\0{"step"\n')
    run(job)
    run(replace(job, out=tmp_path / "whole"))
    assert files_of(job.out) == files_of(tmp_path / "whole")


def test_whatever_byte_of_a_state_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = torch.arange(5.0)
    save_state(tmp_path, {"step": 1, "weights": weights})
    save_state(tmp_path, {"step": 2, "weights": weights})
    newest, previous = tmp_path / STATE_FILE, tmp_path / PREVIOUS_FILE
    content, before = newest.read_bytes(), previous.read_bytes()
    caplog.set_level(logging.ERROR)
    damaged = [content[:end] for end in range(0, len(content), 31)]
    for place in range(0, len(content), 3):
        flipped = bytes([content[place] ^ (1 << place % 8)])
        damaged.append(content[:place] + flipped + content[place + 1 :])
    for bad in damaged:
        newest.write_bytes(bad)
        previous.write_bytes(before)
        found = find_state(tmp_path)
        assert found is not None
        state = read_state(found)
        assert state["step"] in (1, 2)
        assert torch.equal(state["weights"], weights)


def test_a_state_that_cannot_be_opened_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save_state(tmp_path, {"step": step})

    def refuse(self: Path, *mode: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(ResourceError, match=r"cannot read `.*state\.pt`: Permission denied"):
            find_state(tmp_path)
    assert find_state(tmp_path) == tmp_path / STATE_FILE
