"""Images a second that a worker makes at the published sizes, and where its time goes.

    python tests/benchmarks/bench_loader.py JSON [IMAGES]            # real stills with masks
    python tests/benchmarks/bench_loader.py JSON IMAGES --threads 1 2 4

Draws IDOL's key/reference pairs of stills (two views of one decoded image) and of videos (two
decoded frames), as training does, one after the other, and prints CPU seconds of one worker; then
the same through `batches` with threads, in seconds of the wall clock. ``--v2`` compares the resize
and flip of a view with torchvision's `transforms.v2` on tv_tensors, for the same views.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from timing import compare

from pmvis_core import masks
from pmvis_core.data import datasets, stills
from pmvis_core.data.augment import IDOL_STILLS, IDOL_VIDEOS, View, draw_still
from pmvis_core.data.datasets import CocoImages, PseudoVideos, batches, prefetch


class Clock:
    """CPU seconds spent in functions, without those of functions inside them."""

    def __init__(self) -> None:
        """Start at zero."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[float] = []

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Time a function or method from now on."""
        inner = getattr(owner, name)

        def timed(*words: Any, **named: Any) -> Any:
            begin = time.thread_time()
            self._open.append(0.0)
            try:
                return inner(*words, **named)
            finally:
                spent = time.thread_time() - begin
                self.seconds[label] += spent - self._open.pop()
                if self._open:
                    self._open[-1] += spent

        setattr(owner, name, timed)


def watched() -> Clock:
    """Return a clock on the parts of a sample."""
    clock = Clock()
    clock.watch(datasets, "read_picture", "read and decode")
    clock.watch(View, "image", "resize, crop, flip")
    clock.watch(View, "masks", "masks seen through the view")
    clock.watch(datasets, "_still_frame", "targets")
    clock.watch(datasets, "_clip_frame", "targets")
    clock.watch(datasets, "_frame", "tensors")
    clock.watch(masks, "from_polygons", "polygons to masks")
    clock.watch(masks, "decode", "polygons to masks")
    clock.watch(stills.Stills, "__getitem__", "annotations read")
    return clock


def one_worker(source: Any, samples: int, clock: Clock) -> None:
    """Print images a second of one worker and the parts of its time."""
    for number in range(4):
        source.sample(number % len(source), np.random.default_rng(number))
    clock.seconds.clear()
    begin = time.thread_time()
    pixels = 0
    for number in range(samples):
        pair = source.sample(number % len(source), np.random.default_rng([1, number]))
        pixels += pair.key.image[0].numel() + pair.reference.image[0].numel()
    spent = time.thread_time() - begin
    print(
        f"  one worker: {2 * samples / spent:.1f} images/s of CPU, "
        f"{500 * spent / samples:.1f} ms and {pixels / samples / 2e6:.2f} MP an image"
    )
    rest = spent - sum(clock.seconds.values())
    for label, seconds in sorted([*clock.seconds.items(), ("rest", rest)], key=lambda x: -x[1]):
        print(f"    {label:30s} {500 * seconds / samples:7.2f} ms {seconds / spent:6.1%}")


def many_workers(source: Any, threads: int, steps: int) -> None:
    """Print images a second of the wall clock with some threads, batches of 8 pairs."""
    stream = prefetch(batches(source, 8, 0, threads=threads))
    next(stream)
    begin = time.perf_counter()
    for _ in itertools.islice(stream, steps):
        pass
    rate = 16 * steps / (time.perf_counter() - begin)
    print(
        f"  {threads} threads: {rate:.1f} images/s of the wall clock, {rate / threads:.1f} a thread"
    )


def against_v2(source: CocoImages) -> None:
    """Print times of one view of one image: ours, and `transforms.v2` on tv_tensors."""
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional as F

    still = source._stills[0]
    pixels = stills.read_picture(still)
    views = [draw_still(still.size, IDOL_STILLS, np.random.default_rng(k)) for k in range(12)]
    tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    count = len(still.instances)
    bitmaps = tv_tensors.Mask(torch.zeros(count, *still.size, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([one.box for one in still.instances]),
        format=tv_tensors.BoundingBoxFormat.XYXY,
        canvas_size=still.size,
    )

    def seen(value: Any, view: View) -> Any:
        if view.enlarged is not None:
            value = F.resize(value, list(view.enlarged), antialias=True)
        if view.crop is not None:
            value = F.crop(value, *view.crop)
        if view.resized is not None:
            value = F.resize(value, list(view.resized), antialias=True)
        if view.flip:
            value = F.horizontal_flip(value)
        image = isinstance(value, tv_tensors.Image)
        return F.to_dtype(value, torch.float32).contiguous() if image else value

    def theirs(*values: Any) -> None:
        for view in views:
            for value in values:
                seen(value, view)

    def image() -> None:
        for view in views:
            np.ascontiguousarray(view.image(pixels).transpose(2, 0, 1))

    def targets() -> None:
        for view in views:
            datasets._still_frame(still, pixels, np.zeros((0, 0, 0), np.uint8), view)

    rows: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "image": (image, lambda: theirs(tv_tensors.Image(tensor))),
        f"image, {count} masks and boxes": (
            targets, lambda: theirs(tv_tensors.Image(tensor), bitmaps, boxes)
        ),
    }  # fmt: skip
    print("view: ours against transforms.v2, ms CPU an image")
    for name, pair in rows.items():
        ours, other = compare(7, *pair)
        print(f"  {name:34s} {1e3 * ours / 12:7.2f} {1e3 * other / 12:7.2f} ({other / ours:.2f}x)")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--videos", type=Path, help="YouTube-VIS JSON beside its frames")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--v2", action="store_true")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    augmented = CocoImages(options.json, options.images, IDOL_STILLS)
    print(f"stills: short side {IDOL_STILLS.min_sizes}, long side up to {IDOL_STILLS.max_size}")
    if options.v2:
        against_v2(augmented)
    for threads in options.threads:
        many_workers(augmented, threads, max(1, options.samples // 8))
    clock = watched()
    one_worker(augmented, options.samples, clock)
    if options.videos is not None:
        print(f"videos: short side as above, long side up to {IDOL_VIDEOS.max_size}")
        one_worker(PseudoVideos(options.videos, None, IDOL_VIDEOS), options.samples, clock)


if __name__ == "__main__":
    main()
