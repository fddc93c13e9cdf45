"""Where the time of `infer` goes, stage by stage, on any device.

The real pipeline runs on a drawn video; modules and functions are timed from outside, so the stages
are those of the program. Decoding and resizing happen in a thread of their own. With `--compile`
only whole stages can be seen. The last line is a second run without any timing inside.

    python tests/benchmarks/infer.py --size 360 640 --threads 2
    python tests/benchmarks/infer.py --device cuda --precision bf16 --size 480 854 --frames 400
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pmvis_core import infer, masks
from pmvis_core.association import OnlineTracker
from pmvis_core.checkpoint import Checkpoint, load_model
from pmvis_core.config import TrackerConfig
from pmvis_core.devices import find_device
from pmvis_core.infer import VideoInference
from pmvis_core.inference.segmenter import PRECISIONS, FrameSegmenter
from pmvis_core.models.idol import IDOL, IdolPredictions, build_idol
from pmvis_core.systems.presets import IMAGE_PRESETS
from pmvis_core.types import Category
from pmvis_core.video.frames import open_videos, write_video
from pmvis_core.video.image_files import Frame

WARM_UP = 3
STAGES = (
    "decode,resize,backbone,projections,encoder,mask branch,decoder,heads,network in all,"
    "candidates,dynamic masks,tracker,upsample,run lengths"
).split(",")


class Clock:
    """Seconds by stage."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.device = device
        self._started: dict[int, float] = {}

    def now(self) -> float:
        """Return the time when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time counted."""

        def timed(*words: Any, **options: Any) -> Any:
            start = self.now()
            result = function(*words, **options)
            self.seconds[stage] += self.now() - start
            return result

        return timed

    def watch(self, stage: str, module: torch.nn.Module) -> None:
        """Count the time of a module's calls."""

        def begin(module: torch.nn.Module, _: Any) -> None:
            self._started[id(module)] = self.now()

        def end(module: torch.nn.Module, *_: Any) -> None:
            self.seconds[stage] += self.now() - self._started[id(module)]

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)


def watch_network(clock: Clock, model: IDOL) -> None:
    """Time the parts of the network."""
    parts: dict[str, list[torch.nn.Module]] = {
        "backbone": [model.backbone],
        "projections": list(model.input_proj),
        "encoder": list(model.transformer.encoder.layers),
        "mask branch": [model.mask_head],
        "decoder": list(model.transformer.decoder.layers),
        "heads": [*model.class_embed, *model.bbox_embed, model.reid_embed_head, model.controller],
    }
    for stage, modules in parts.items():
        for module in modules:
            clock.watch(stage, module)


def watch_rest(clock: Clock) -> None:
    """Time what comes before and behind the network."""
    patches: list[tuple[Any, str, str]] = [
        (infer, "prepare_image", "resize"),
        (infer, "select_candidates", "candidates"),
        (infer, "full_size_masks", "upsample"),
        (masks, "encode_many", "run lengths"),
        (IdolPredictions, "mask_logits", "dynamic masks"),
        (OnlineTracker, "update", "tracker"),
        (FrameSegmenter, "__call__", "network in all"),
    ]
    for owner, name, stage in patches:
        setattr(owner, name, clock.around(stage, getattr(owner, name)))


def demo_model(preset: str) -> Checkpoint:
    """Build a model with random weights whose class heads give some candidates in each frame."""
    torch.manual_seed(0)
    model = build_idol(IMAGE_PRESETS[preset].model, 40).eval()
    for head in model.class_embed:
        torch.nn.init.normal_(head.weight, std=0.1)  # type: ignore[arg-type]
    categories = tuple(Category(k + 1, f"c{k}") for k in range(40))
    return Checkpoint(model, categories, TrackerConfig(short_side=0))


def drawn(frames: int, height: int, width: int) -> Iterator[Frame]:
    """Yield coloured noise that drifts."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3), np.uint8)
    full = coarse.repeat(16, 0).repeat(16, 1)[:height, :width]
    return (np.roll(full, 3 * t, axis=1) for t in range(frames))


def measure(words: argparse.Namespace, clock: Clock | None, folder: Path) -> float:
    """Label the video; return the frames a second behind the warm-up."""
    checkpoint = load_model(words.weights) if words.weights else demo_model(words.preset)
    source = open_videos(folder / "clip.mp4")[0]
    device = find_device(words.device)
    segmenter = FrameSegmenter(checkpoint.model, device, words.precision, words.compile)
    if clock is not None:
        watch_network(clock, checkpoint.model)
    start, done = 0.0, 0
    with VideoInference(segmenter, checkpoint, source) as run:
        for done in run:
            if done == WARM_UP:
                start = time.perf_counter()
                if clock is not None:
                    clock.seconds.clear()
        elapsed = time.perf_counter() - start
        for _ in run.pieces():
            pass
    return (done - WARM_UP) / elapsed


def main() -> None:
    """Print the stages, then the whole."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=list(PRECISIONS))
    parser.add_argument("--size", nargs=2, type=int, default=(360, 640), metavar=("H", "W"))
    parser.add_argument("--frames", type=int, default=13)
    parser.add_argument("--preset", default="resnet50")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true")
    words = parser.parse_args()
    if words.threads:
        torch.set_num_threads(words.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_video(folder / "clip.mp4", drawn(words.frames, *words.size))
        speed = measure(words, None, folder)
        clock = Clock(find_device(words.device))
        watch_rest(clock)
        measure(words, clock, folder)
        frames = words.frames - WARM_UP
        start = time.perf_counter()
        decoded = sum(1 for _ in open_videos(folder / "clip.mp4")[0].frames())
        clock.seconds["decode"] = (time.perf_counter() - start) * frames / decoded
    lines = ["| stage | ms a frame |", "|---|---:|"]
    lines += [f"| {stage} | {clock.seconds[stage] / frames * 1e3:.1f} |" for stage in STAGES]
    lines.append(f"| end to end, untimed inside | {1e3 / speed:.1f} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
