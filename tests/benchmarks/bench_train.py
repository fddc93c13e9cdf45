"""Training pairs a second of IDOL's R50 at the published size, against the reference formulation.

    python tests/benchmarks/bench_train.py                       # CPU, one thread, 480x640
    python tests/benchmarks/bench_train.py --threads 2 --steps 5
    python tests/benchmarks/bench_train.py --device cuda --pairs 4 --precision bfloat16

All train the same network on the same pairs, step by step in turns in one run. The reference is the
published formulation: deformable attention as `grid_sample` a level, BoxInst that unfolds the eight
neighbours of every pixel of every instance, torch's dropout, frozen batch norm as a multiplication
and an addition of its own, mask features of reference frames that no loss looks at. "kernels" has
the first two alone, and the rest as ours. Times are medians, on a CPU of its seconds. Losses are
those of the image stage with masks and BoxInst for the box-only half of the images. Then the share
of the time of each part, and on a GPU the memory. Images are drawn, JPEGs are decoded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import torch
from bench_pairwise import unfolded
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

from pmvis_core.data.datasets import batches
from pmvis_core.data.samples import ImageBatch
from pmvis_core.matching import OptimalTransportMatcher
from pmvis_core.models.idol import IDOL, IdolPredictions
from pmvis_core.nn.dropout import Dropout
from pmvis_core.ops import library
from pmvis_core.systems.pmvis import ImageStage
from pmvis_core.systems.presets import IMAGE_PRESETS
from pmvis_core.train import Run
from pmvis_core.training.run_folder import TrainJob
from pmvis_core.weak_losses import Affinity, BoxInst, box_masks

HEIGHT, WIDTH = 480, 640
OBJECTS = 5
IMAGES = 8
NAMES = ("ours", "kernels", "reference")
WATCHED = (
    (IDOL, "forward", "forward"),
    (OptimalTransportMatcher, "__call__", "matcher"),
    (OptimalTransportMatcher, "contrast", "matcher"),
)
"""Methods and the parts of a step that they are."""


def draw_stills(folder: Path) -> Path:
    """Write stills of ellipses on coarse noise, every second one with boxes only."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(1, IMAGES + 1):
        noise = rng.integers(0, 255, (15, 20, 3), np.uint8)
        picture = cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        for _ in range(OBJECTS):
            centre = int(rng.integers(100, WIDTH - 100)), int(rng.integers(80, HEIGHT - 80))
            axes = int(rng.integers(20, 95)), int(rng.integers(20, 75))
            outline = cv2.ellipse2Poly(centre, axes, 0, 0, 360, 10)
            cv2.fillPoly(picture, [outline], rng.integers(0, 255, 3).tolist())
            x, y, w, h = cv2.boundingRect(outline)
            annotation: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": int(rng.integers(1, 41)),
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
            }
            if number % 2:
                annotation["segmentation"] = [outline.flatten().tolist()]
            annotations.append(annotation)
        name = f"{number}.jpg"
        cv2.imwrite(str(folder / name), picture)
        images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
    categories = [{"id": n, "name": f"thing {n}"} for n in range(1, 41)]
    path = folder / "train_image.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return path


def unfolded_pairwise(
    self: BoxInst, logits: Tensor, affinity: Affinity, frame: Tensor, boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `BoxInst.pairwise_loss` does, every pair of every instance laid out."""
    x = logits[:, None]
    foreground, background = functional.logsigmoid(x), functional.logsigmoid(-x)
    both = foreground[:, :, None] + unfolded(foreground)
    neither = background[:, :, None] + unfolded(background)
    most = torch.max(both, neither)
    terms = -(torch.log(torch.exp(both - most) + torch.exp(neither - most)) + most)[:, 0]
    seen = unfolded(affinity.valid[:, None].float(), self.dilation)[:, 0]
    alike = (affinity.similarity >= self.threshold).float() * seen
    weights = alike[frame] * box_masks(boxes, *logits.shape[1:])[:, None]
    return (terms * weights).sum((1, 2, 3)), weights.sum((1, 2, 3))


def published_network(stack: ExitStack) -> None:
    """Let the network, too, compute what and as the published one does."""
    forward = IDOL.forward

    def whole(self: IDOL, images: ImageBatch, masked: int | None = None) -> IdolPredictions:
        """Make mask features of all frames."""
        return forward(self, images)

    def in_turn(x: Tensor, conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> Tensor:
        """Convolve, then normalise."""
        return norm(nn.Conv2d.forward(conv, x))

    stack.enter_context(patch.object(IDOL, "forward", whole))
    stack.enter_context(patch.object(Dropout, "_draws", return_value=False))
    stack.enter_context(patch("pmvis_core.nn.backbones.convolve_normed", in_turn))


def formulation(name: str, stack: ExitStack) -> None:
    """Compute as one of `NAMES` does until the stack is closed."""
    if name == "reference":
        published_network(stack)
    if name != "ours":
        stack.enter_context(patch.object(library, "WISH", "torch"))
        stack.enter_context(patch.object(BoxInst, "pairwise_loss", unfolded_pairwise))


class Parts:
    """Seconds spent in the parts of a step, without those of parts inside them."""

    def __init__(self, device: torch.device) -> None:
        """Start at zero."""
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what happens."""
        begin = self.now()
        self._inside.append(0.0)
        yield
        spent = self.now() - begin
        self.seconds[name] += spent - self._inside.pop()
        if self._inside:
            self._inside[-1] += spent

    def now(self) -> float:
        """Return CPU seconds; of a GPU the wall clock when it has done what it was given."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def watched(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return a function whose calls are timed."""

        def timed(*words: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*words, **named)

        return timed


def train_step(run: Run, stream: Iterator[Any], step: int, parts: Parts) -> None:
    """Take a step as the run loop does."""
    with parts.part("data"):
        pairs = next(stream)
    run.learner.start()
    with parts.part("losses"):
        loss = run.losses(pairs, step, 0)["loss"]
    with parts.part("backward"):
        run.learner.backward(loss)
    with parts.part("optimiser"):
        float(run.learner.gradient_norm())
        run.learner.update(step, run.rates(step))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4, help="of each, after one that warms up")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", default="resnet50")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure(draw_stills(Path(folder)), Path(folder) / "run", options)


def measure(data: Path, out: Path, options: argparse.Namespace) -> None:
    """Train with both formulations in turns."""
    preset = IMAGE_PRESETS[options.preset]
    train = replace(
        preset.train,
        pairs_per_batch=options.pairs,
        precision=options.precision,
        channels_last=options.channels_last,
        checkpoint_activations=options.checkpoint_activations,
        compile=options.compile,
        pairwise_warmup_steps=1,
    )
    augment = replace(preset.augment, min_sizes=(HEIGHT,), max_size=WIDTH, crop_probability=0.0)
    config = replace(preset, train=train, augment=augment)
    job = TrainJob(ImageStage(data, box_loss=True), config, out, device=options.device)
    samples = job.stage.samples(config)
    run = Run.start(job, samples.categories)
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    parts = {name: Parts(run.device) for name in times}
    streams = {name: batches(samples.source, options.pairs, 0) for name in times}
    for step in range(options.steps + 1):
        for name, kept in times.items():
            with ExitStack() as stack:
                formulation(name, stack)
                for owner, method, part in WATCHED:
                    watched = parts[name].watched(getattr(owner, method), part)
                    stack.enter_context(patch.object(owner, method, watched))
                begin = parts[name].now()
                train_step(run, streams[name], step, parts[name])
            if step:
                kept.append(parts[name].now() - begin)
            else:
                parts[name].seconds.clear()
    report(times, parts, options)


def report(
    times: dict[str, list[float]], parts: dict[str, Parts], options: argparse.Namespace
) -> None:
    """Print what was found."""
    medians = {name: statistics.median(kept) for name, kept in times.items()}
    print(
        f"{options.preset}, {HEIGHT}x{WIDTH}, {options.pairs} pairs a step, {options.device}, "
        f"{options.threads} threads, {options.precision}, {options.steps} steps of each in turns"
    )
    for name, seconds in medians.items():
        print(f"{name:>10}: {seconds:.3f} s a step, {options.pairs / seconds:.3f} pairs/s")
    for name in NAMES[1:]:
        print(f"{name:>10}: {medians[name] / medians['ours']:.2f} times as long as ours")
    for name, kept in parts.items():
        whole = sum(kept.seconds.values())
        told = [f"{part} {s / whole:.1%}" for part, s in sorted(kept.seconds.items())]
        print(f"{name:>10}: {', '.join(told)}")
    if options.device.startswith("cuda"):
        print(f"at most {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU")


if __name__ == "__main__":
    main()
