"""What a run is going to take, from some of its own steps: time, and where memory goes.

The steps are real (data, forward, losses, gradient, update) and thrown away: nothing is written.
What validation takes is scaled up from a few of its videos. Activations are counted tensor by
tensor as they are kept for the gradient, which is the same number on every device; what a GPU's
allocator reached at most is told beside it.

    facts = measured(job)
    print(in_words(facts))
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pmvis_core.data.spares import BrokenSamples
from pmvis_core.data.streams import batches
from pmvis_core.train import Run, open_validator
from pmvis_core.training.run_folder import TrainJob
from pmvis_core.types import Category

TIMED_STEPS = 3
"""After one that warms up; sizes of frames vary, so that the median of few is a rough figure."""
TIMED_VIDEOS = 2
"""Of those to validate on."""
PARTS = {
    "data": "samples",
    "forward": "forward pass and losses",
    "backward": "backward pass",
    "update": "update",
}
"""What a step consists of, and what a person is told of it."""


def measured(job: TrainJob) -> dict[str, float]:
    """Take some steps of a job and return what they took.

    The time of a process's share of the batch is measured in this process alone: with several
    processes the exchange of gradients is not in it.

    Returns:
        ``parameters`` and ``learning_parameters`` (numbers); ``weight_bytes`` of weights,
        gradients, optimiser and average; ``activation_bytes`` kept for the gradient of one part of
        the batch, at most; ``peak_bytes`` of the allocator, 0 on a CPU; ``seconds`` of a step,
        and ``NAME_seconds`` of its `PARTS`, which they are the sum of unless workers make samples
        meanwhile; ``pairs_per_second`` of all processes in steps; ``validations`` of the run and
        ``validation_seconds`` of one; ``hours`` of the whole run with them; ``NAME_share`` of each
        part in these, and ``validation_share``.

    Raises:
        DataError: a sample cannot be read.
    """
    config = job.config.train
    samples = job.stage.samples(job.config)
    run = Run.start(job, samples.categories)
    share = max(1, config.pairs_per_batch // (config.accumulate * job.processes))
    stream = batches(samples.source, share, job.seed, broken=BrokenSamples())
    rows, kept = [], 0
    for step in range(TIMED_STEPS + 1):
        clock = _Clock(run.device)
        pairs = [next(stream) for _ in range(config.accumulate)]
        clock.note("data")
        run.learner.start()
        for part, batch in enumerate(pairs):
            with _kept_bytes(run) as counted:
                loss = run.losses(batch, step, part * share)["loss"]
            kept = max(kept, sum(counted.values()))
            clock.note("forward")
            run.learner.backward(loss / config.accumulate)
            clock.note("backward")
        run.learner.gradient_norm()
        run.learner.update(step, [0.0 for _ in run.factors])
        clock.note("update")
        rows.append(clock.seconds)
    taken = {name: statistics.median(row[name] for row in rows[1:]) for name in PARTS}
    return _sizes(run) | {
        "activation_bytes": kept,
        "peak_bytes": torch.cuda.max_memory_allocated() if run.device.type == "cuda" else 0,
        **_times(job, taken, *_validation(job, run, samples.categories)),
    }


def _times(
    job: TrainJob, taken: Mapping[str, float], validations: int, each: float
) -> dict[str, float]:
    """Return what belongs to the time of a whole run.

    Args:
        job: the run.
        taken: seconds of a step's parts.
        validations: how often it validates.
        each: seconds of one.
    """
    config = job.config.train
    working = sum(taken.values()) - taken["data"]
    # Workers make samples meanwhile; what they are too slow for is waited for.
    waiting = max(0.0, taken["data"] / job.workers - working) if job.workers else taken["data"]
    seconds = working + waiting
    whole = seconds * config.steps + validations * each
    parts = {**taken, "data": waiting}
    return {
        **{f"{name}_seconds": value for name, value in taken.items()},
        "seconds": seconds,
        "pairs_per_second": config.pairs_per_batch / seconds,
        "validations": validations,
        "validation_seconds": each,
        "hours": whole / 3600,
        **{f"{name}_share": value * config.steps / whole for name, value in parts.items()},
        "validation_share": validations * each / whole,
    }


def _validation(job: TrainJob, run: Run, categories: tuple[Category, ...]) -> tuple[int, float]:
    """Return how often a run validates, and the seconds that one takes.

    What does not depend on the videos (the network, the ground truth) is measured without any;
    what the weights find is little, so that tracking and evaluation may come out too short.
    """
    validator, every = open_validator(job, categories)
    if validator is None:
        return 0, 0.0
    held_out, weights = validator.held_out, run.learner.weights()
    few = held_out.videos[:TIMED_VIDEOS]
    took = []
    for videos in ((), few):
        clock = _Clock(run.device)
        replace(validator, held_out=replace(held_out, videos=videos))(weights)
        clock.note("validation")
        took.append(clock.seconds["validation"])
    frames, timed = (sum(v.info.length for v in videos) for videos in (held_out.videos, few))
    each = took[0] + max(0.0, took[1] - took[0]) * frames / timed / job.processes
    return -(-job.config.train.steps // every), each


class _Clock:
    """Tells apart what the parts of some work take."""

    def __init__(self, device: torch.device) -> None:
        """Start to count."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._since = time.perf_counter()

    def note(self, part: str) -> None:
        """Count the time since the last part's end for this one."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[part] += now - self._since
        self._since = now


def in_words(facts: Mapping[str, float]) -> str:
    """Return the facts in three lines."""
    weights, activations = (facts[f"{name}_bytes"] / 2**30 for name in ("weight", "activation"))
    peak = f", at most {facts['peak_bytes'] / 2**30:.2f} GiB on the GPU" * bool(facts["peak_bytes"])
    shares = [f"{facts[f'{name}_share']:.0%} {told}" for name, told in PARTS.items()]
    if facts["validations"]:
        shares.append(
            f"{facts['validation_share']:.0%} validation ({facts['validations']:.0f} times "
            f"{facts['validation_seconds']:.3g} s)"
        )
    return (
        f"{facts['parameters'] / 1e6:.1f} M parameters; {weights:.2f} GiB for weights, gradients "
        f"and optimiser, {activations:.2f} GiB for activations{peak}\n"
        f"about {facts['seconds']:.3g} s a step ({facts['data_seconds']:.3g} s to make its samples "
        f"in one thread), {facts['pairs_per_second']:.3g} pairs/s, {facts['hours']:.3g} hours in "
        f"all\n{', '.join(shares)}"
    )


def _sizes(run: Run) -> dict[str, float]:
    """Return how many parameters there are, and what belongs to them in memory."""
    parameters = list(run.model.parameters())
    learning = sum(p.numel() for p in parameters if p.requires_grad)
    copies = 3 + bool(run.config.ema_decay)  # gradient, AdamW's two moments, the average
    stored = sum(p.numel() * p.element_size() for p in parameters)
    return {
        "parameters": sum(p.numel() for p in parameters),
        "learning_parameters": learning,
        "weight_bytes": stored + 4 * copies * learning,
    }


@contextmanager
def _kept_bytes(run: Run) -> Iterator[dict[int, int]]:
    """Count the storages that autograd keeps, once each, but for the model's own.

    Yields a dictionary that fills: the address of a storage, and its bytes.
    """
    found: dict[int, int] = {}
    own = [*run.model.parameters(), *run.model.buffers()]
    weights = {tensor.untyped_storage().data_ptr() for tensor in own}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.device.type == run.device.type and storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def give(tensor: Any) -> Any:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield found
