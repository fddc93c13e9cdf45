"""How much of the exchange of gradients hides behind the backward pass, on several processes.

    python tests/benchmarks/bench_processes.py                          # two on a CPU, gloo
    python tests/benchmarks/bench_processes.py --stand-in               # two that only wait
    python tests/benchmarks/bench_processes.py --device cuda --processes 8 --pairs 4 --size 480

A step is forward, losses and gradient of IDOL's R50, taken in turns in one run: without any
exchange, with one after the backward pass, and with one while it goes on, which is what training
does. Hidden is the share of the exchange's time that the last saves against the second. Times are
medians of the wall clock of the first process. On a CPU that has no core to spare an exchange takes
from the backward pass what it hides behind it; ``--stand-in`` is a network of R50's weight whose
backward pass sleeps, as a CPU does that waits for its GPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_train import HEIGHT, WIDTH, draw_stills
from torch import Tensor, nn

from pmvis_core.data.datasets import batches
from pmvis_core.systems.pmvis import ImageStage
from pmvis_core.systems.presets import IMAGE_PRESETS
from pmvis_core.train import Run
from pmvis_core.training.learner import Learner, ParameterGroup
from pmvis_core.training.processes import launch, rank_and_world, summed
from pmvis_core.training.run_folder import TrainJob

WAYS = ("none", "after", "during")
"""When gradients are exchanged."""
STAND_IN_LAYERS = 40
"""Of 4 MiB each, as R50 with its transformer has 160 MiB that learn."""


class Sleep(torch.autograd.Function):
    """Lets the backward pass take its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        """Return x."""
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Wait."""
        time.sleep(ctx.seconds)
        return grads[0], None


def stand_in(seconds: float) -> tuple[Learner, Callable[[], Tensor]]:
    """Return a network that sleeps for so long, and its loss."""
    model = nn.Sequential(*(nn.Linear(1024, 1023) for _ in range(STAND_IN_LAYERS)))
    group = ParameterGroup(list(model.named_parameters()), weight_decay=0.0)
    x = torch.ones(1, 1023)

    def loss() -> Tensor:
        y = x
        for layer in model:
            y = layer(nn.functional.pad(Sleep.apply(y, seconds / STAND_IN_LAYERS), (0, 1)))
        return y.sum()

    return Learner(model, [group], clip_norm=1.0, ema_decay=0.0), loss


def resnet50(
    options: argparse.Namespace, data: Path, device: str
) -> tuple[Learner, Callable[[], Tensor]]:
    """Return IDOL's R50, and its loss on pairs that stay the same."""
    preset = IMAGE_PRESETS["resnet50"]
    train = replace(preset.train, pairs_per_batch=options.pairs, precision=options.precision)
    sizes = {"min_sizes": (options.size,), "max_size": options.size * WIDTH // HEIGHT}
    augment = replace(preset.augment, **sizes, crop_probability=0.0)
    config = replace(preset, train=train, augment=augment)
    job = TrainJob(ImageStage(data, box_loss=True), config, data.parent / "run", device=device)
    samples = job.stage.samples(config)
    run = Run.start(job, samples.categories)
    pairs = next(batches(samples.source, options.pairs, 0, *rank_and_world()))
    return run.learner, lambda: run.losses(pairs, 0, 0)["loss"]


def seconds_of(learner: Learner, loss: Callable[[], Tensor], way: str, device: str) -> float:
    """Return what the gradient of a step takes when all processes begin it together."""
    summed(torch.zeros(1, device=device)).item()
    begin = time.perf_counter()
    learner.start()
    learner.backward(loss(), last=way == "during")
    if way == "none":
        for flat in learner._flats:
            flat.gradient.norm().item()
    else:
        learner.gradient_norm().item()
    return time.perf_counter() - begin


def process(options: argparse.Namespace, data: Path, device: str) -> None:
    """Measure as one of the processes; the first one prints."""
    if options.stand_in:
        learner, loss = stand_in(options.stand_in)
    else:
        learner, loss = resnet50(options, data, device)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for step in range(options.steps + 1):
        for way, kept in times.items():
            seconds = seconds_of(learner, loss, way, device)
            if step:
                kept.append(seconds)
    rank, world = rank_and_world()
    if rank:
        return
    medians = {way: statistics.median(kept) for way, kept in times.items()}
    whole = sum(flat.gradient.numel() * 4 for flat in learner._flats) / 2**20
    what = "stand-in" if options.stand_in else f"R50, {options.pairs} pairs, {options.size} px"
    print(f"{what}, {whole:.0f} MiB of gradients, {world} processes on {device}")
    for way, seconds in medians.items():
        print(f"  exchange {way:>6}: {seconds:.3f} s a step")
    exchange = medians["after"] - medians["none"]
    hidden = (medians["after"] - medians["during"]) / exchange
    print(f"  exchange {exchange:.3f} s, hidden {hidden:.0%}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5, help="of each, after one that warms up")
    parser.add_argument("--pairs", type=int, default=1, help="of each process")
    parser.add_argument("--size", type=int, default=192, help="shorter side of the frames")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--precision", default="float32")
    parser.add_argument(
        "--stand-in", type=float, nargs="?", const=0.5, metavar="SECONDS", help="default 0.5"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = partial(process, options, draw_stills(Path(folder)))
        launch(work, work, options.device, options.processes)


if __name__ == "__main__":
    main()
