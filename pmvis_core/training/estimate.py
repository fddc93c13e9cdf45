"""What a run is going to take, from some of its own steps: time, and where memory goes.

The steps are real (data, forward, losses, gradient, update) and thrown away: nothing is written.
Activations are counted tensor by tensor as they are kept for the gradient, which is the same number
on every device; what a GPU's allocator reached at most is told beside it.

    facts = measured(job)
    print(in_words(facts))
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pmvis_core.data.spares import BrokenSamples
from pmvis_core.data.streams import batches
from pmvis_core.train import Run
from pmvis_core.training.run_folder import TrainJob

TIMED_STEPS = 3
"""After one that warms up; sizes of frames vary, so that the median of few is a rough figure."""


def measured(job: TrainJob) -> dict[str, float]:
    """Take some steps of a job and return what they took.

    The time of a process's share of the batch is measured in this process alone: with several
    processes the exchange of gradients is not in it.

    Returns:
        ``parameters`` and ``learning_parameters`` (numbers); ``weight_bytes`` of weights,
        gradients, optimiser and average; ``activation_bytes`` kept for the gradient of one part of
        the batch, at most; ``peak_bytes`` of the allocator, 0 on a CPU; ``data_seconds`` and
        ``seconds`` of a step, the second with the first in it unless workers make samples
        meanwhile; ``hours`` of the whole run.

    Raises:
        DataError: a sample cannot be read.
    """
    config = job.config.train
    samples = job.stage.samples(job.config)
    run = Run.start(job, samples.categories)
    share = max(1, config.pairs_per_batch // (config.accumulate * job.processes))
    stream = batches(samples.source, share, job.seed, broken=BrokenSamples())
    data, work, kept = [], [], 0
    for step in range(TIMED_STEPS + 1):
        start = time.perf_counter()
        pairs = [next(stream) for _ in range(config.accumulate)]
        made = time.perf_counter()
        run.learner.start()
        for part, batch in enumerate(pairs):
            with _kept_bytes(run) as counted:
                loss = run.losses(batch, step, part * share)["loss"]
            kept = max(kept, sum(counted.values()))
            run.learner.backward(loss / config.accumulate)
        run.learner.gradient_norm()
        run.learner.update(step, [0.0 for _ in run.factors])
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        data.append(made - start)
        work.append(time.perf_counter() - made)
    making, working = statistics.median(data[1:]), statistics.median(work[1:])
    seconds = max(working, making / job.workers) if job.workers else making + working
    return _sizes(run) | {
        "activation_bytes": kept,
        "peak_bytes": torch.cuda.max_memory_allocated() if run.device.type == "cuda" else 0,
        "data_seconds": making,
        "seconds": seconds,
        "hours": seconds * config.steps / 3600,
    }


def in_words(facts: Mapping[str, float]) -> str:
    """Return the facts in two lines."""
    weights, activations = (facts[f"{name}_bytes"] / 2**30 for name in ("weight", "activation"))
    peak = f", at most {facts['peak_bytes'] / 2**30:.2f} GiB on the GPU" * bool(facts["peak_bytes"])
    return (
        f"{facts['parameters'] / 1e6:.1f} M parameters; {weights:.2f} GiB for weights, gradients "
        f"and optimiser, {activations:.2f} GiB for activations{peak}\n"
        f"about {facts['seconds']:.3g} s a step ({facts['data_seconds']:.3g} s to make its samples "
        f"in one thread), {facts['hours']:.3g} hours in all"
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
