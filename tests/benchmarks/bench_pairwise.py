"""Time colour affinity and the pairwise loss against the published, unfolded form.

    python tests/benchmarks/bench_pairwise.py --threads 2

The published form (BoxInst) converts images to LAB in float64 one by one and unfolds the eight
neighbours of every pixel, of colours and of every instance's log probabilities; that of clips
(STPA of BoxVIS) lays out the seven neighbours of every pixel of every instance. Both are written
here from their descriptions. Times are medians of the wall clock, both forms in turns in one run;
ratios above 1 mean that pmvis is faster. Memory is what one call adds to the process at its peak.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timing import compare
from torch import Tensor

from pmvis_core import ops

IMAGES = {"480x854": (1, 480, 854), "120x214, 4 frames": (4, 120, 214)}
"""Name: batch, height, width."""
LOSSES = {
    "480x864, 30 small": (2, 120, 216, 30, 0.25),
    "480x864, 30 large": (2, 120, 216, 30, 0.7),
    "800x1216, 60 medium": (2, 200, 304, 60, 0.4),
}
"""Name: images, height and width of the logits, instances, mean side of a box."""
CLIPS = {
    "384x640, 8 instances": (3, 192, 320, 8, 0.3),
    "halved 480x864, 15": (3, 120, 216, 15, 0.4),
}
"""Name: frames, height and width of the grid, instances, mean side of a box."""
THRESHOLD = 0.3


def photos(batch: int, height: int, width: int) -> Tensor:
    """Return smooth images with noise: about half of the neighbours are alike."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, height // 16, width // 16, generator=random) * 255
    smooth = F.interpolate(coarse, (height, width), mode="bilinear")
    noise = torch.randn(smooth.shape, generator=random)
    return (smooth + noise).clamp(0, 255).byte()


def unfolded(x: Tensor, dilation: int = 2) -> Tensor:
    """Return the eight neighbours of (N, C, h, w), zeros outside, (N, C, 8, h, w)."""
    windows = F.unfold(x, 3, padding=dilation, dilation=dilation)
    windows = windows.view(*x.shape[:2], 9, *x.shape[2:])
    return torch.cat([windows[:, :, :4], windows[:, :, 5:]], 2)


def published_similarity(images: Tensor) -> Tensor:
    """Return exp(-distance / 2) of colours by way of unfolding."""
    maps = []
    for image in images:
        lab = ops.rgb_to_lab(image.double()).float()
        differences = lab[None, :, None] - unfolded(lab[None])
        maps.append(torch.exp(-torch.norm(differences, dim=1) * 0.5))
    return torch.cat(maps)


def published_loss(
    logits: Tensor, similarity: Tensor, index: Tensor, inside: Tensor, there: Tensor
) -> Tensor:
    """Return the mean term over the edges, every pair of every instance laid out."""
    x = logits[:, None]
    foreground, background = F.logsigmoid(x), F.logsigmoid(-x)
    both = foreground[:, :, None] + unfolded(foreground)
    neither = background[:, :, None] + unfolded(background)
    most = torch.max(both, neither)
    terms = -(torch.log(torch.exp(both - most) + torch.exp(neither - most)) + most)[:, 0]
    weights = ((similarity >= THRESHOLD).float() * there)[index] * inside[:, None]
    return (terms * weights).sum() / weights.sum().clamp(min=1)


def peak_mb(function: Callable[[], Any]) -> float:
    """Return what a call adds to the process's memory at its peak, NaN where it cannot be told."""
    status = Path("/proc/self/status")

    def read(key: str) -> float:
        line = next(row for row in status.read_text().splitlines() if row.startswith(key))
        return int(line.split()[1]) / 1024

    try:
        ctypes.CDLL(None).malloc_trim(
            0
        )  # gives free memory back, so that it counts when taken again
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    except (OSError, AttributeError):
        return float("nan")
    before = read("VmRSS")
    function()
    return max(read("VmHWM") - before, 0.0)


def report(name: str, runs: int, mine: Callable[[], Any], published: Callable[[], Any]) -> None:
    """Print one row."""
    memory = [peak_mb(mine), peak_mb(published)]
    fast, slow = compare(runs, mine, published, clock=time.perf_counter)
    print(
        f"{name:38} {1e3 * fast:9.2f} {1e3 * slow:12.1f} {slow / fast:7.1f} "
        f"{memory[0]:9.1f} {memory[1]:12.1f}"
    )


def loss_rows(runs: int) -> None:
    """Print forward with backward, and forward alone, of the loss."""
    random = torch.Generator().manual_seed(1)
    for name, (batch, height, width, number, side) in LOSSES.items():
        similarity = ops.lab_similarity(photos(batch, height, width))
        index = torch.randint(batch, (number,), generator=random)
        size = torch.tensor([4.0 * width, 4.0 * height])
        sides = (torch.rand(number, 2, generator=random) * 0.6 + 0.7) * side * size
        corner = torch.rand(number, 2, generator=random) * (size - sides).clamp_min(0)
        boxes = torch.cat([corner, corner + sides], 1)
        logits = torch.randn(number, height, width, generator=random, requires_grad=True)
        inside = ops.cell_masks(ops.box_cells(boxes, height, width), height, width)
        there = unfolded(torch.ones(1, 1, height, width))[0]

        def mine(s: Any = similarity, i: Any = index, b: Any = boxes, x: Any = logits) -> Tensor:
            return ops.pairwise_loss(x, s, i, b, THRESHOLD)

        def published(
            s: Any = similarity, i: Any = index, m: Any = inside, t: Any = there, x: Any = logits
        ) -> Tensor:
            return published_loss(x, s, i, m, t)

        torch.testing.assert_close(mine(), published())
        report(
            f"loss, {name}",
            runs,
            lambda f=mine, x=logits: torch.autograd.grad(f(), x),
            lambda f=published, x=logits: torch.autograd.grad(f(), x),
        )


def placed(x: Tensor, shifts: Tensor, step: tuple[int, int, int]) -> Tensor:
    """Return (N, C, T, h, w) maps with each neighbour at its pixel, zeros outside."""
    next_frame = x.roll(-step[0], 2)
    out = torch.zeros_like(x)
    for n, t in np.ndindex(*shifts.shape[:2]):
        dy, dx = ((shifts[n, t] * step[0]) + torch.tensor(step[1:])).tolist()
        height, width = x.shape[3:]
        y0, y1 = max(0, -dy), min(height, height - dy)
        x0, x1 = max(0, -dx), min(width, width - dx)
        if y0 < y1 and x0 < x1:
            there = next_frame[n, :, t, y0 + dy : y1 + dy, x0 + dx : x1 + dx]
            out[n, :, t, y0:y1, x0:x1] = there
    return out


def published_pairs(colours: Tensor, inside: Tensor, shifts: Tensor) -> Tensor:
    """Return (K, N, T, h, w) bool, every neighbour of every instance laid out."""
    lab = colours.transpose(1, 2).expand(len(shifts), -1, -1, -1, -1)
    pairs = []
    for step in ops.CLIP_STEPS:
        alike = torch.exp(-torch.norm(lab - placed(lab, shifts, step), dim=1) * 0.5) >= THRESHOLD
        there = placed(inside[:, None].float(), shifts, step)[:, 0] > 0
        whole = placed(torch.ones_like(inside)[:, None].float(), shifts, step)[:, 0] > 0
        pairs.append(alike & whole & (inside & there if step[0] else inside | there))
    return torch.stack(pairs)


def published_clip_loss(logits: Tensor, pairs: Tensor, shifts: Tensor) -> Tensor:
    """Return the mean term over all pairs, every pair of every instance laid out."""
    x = logits[:, None]
    foreground, background = F.logsigmoid(x), F.logsigmoid(-x)
    terms = []
    for step in ops.CLIP_STEPS:
        both = foreground + placed(foreground, shifts, step)
        neither = background + placed(background, shifts, step)
        most = torch.max(both, neither)
        terms.append(-(torch.log(torch.exp(both - most) + torch.exp(neither - most)) + most)[:, 0])
    return (torch.stack(terms) * pairs).sum() / pairs.sum().clamp(min=1)


def clip_rows(runs: int) -> None:
    """Print pairs, and forward with backward of the loss, of clips."""
    random = torch.Generator().manual_seed(2)
    for name, (frames, height, width, number, side) in CLIPS.items():
        images = photos(frames, 2 * height, 2 * width)
        colours = ops.lab_means(images, 2)[None]
        size = torch.tensor([2.0 * width, 2.0 * height])
        sides = (torch.rand(number, 1, 2, generator=random) * 0.6 + 0.7) * side * size
        corner = torch.rand(number, 1, 2, generator=random) * (size - sides).clamp_min(0)
        corner = corner + torch.randn(number, frames, 2, generator=random) * 8
        boxes = torch.cat([corner, corner + sides], 2).clamp_min(0).minimum(size.repeat(2))
        cells = ops.clip_cells(boxes, height, width, 2)
        shifts = ops.clip_shifts(boxes, (2 * height, 2 * width), (height, width))
        inside = ops.cell_masks(cells.flatten(0, 1), height, width)
        inside = inside.view(number, frames, height, width)
        index = torch.zeros(number, dtype=torch.long)
        logits = torch.randn(number, frames, height, width, generator=random, requires_grad=True)
        call = (colours, index, cells, shifts, ops.CLIP_STEPS, THRESHOLD)
        pairs, laid_out = ops.clip_pairs(*call), published_pairs(colours, inside, shifts)
        rest = (shifts, ops.CLIP_STEPS, index)
        torch.testing.assert_close(
            ops.clip_pairwise_loss(logits, pairs, *rest),
            published_clip_loss(logits, laid_out, shifts),
        )
        report(
            f"pairs of a clip, {name}",
            runs,
            lambda c=call: ops.clip_pairs(*c),
            lambda c=colours, i=inside, s=shifts: published_pairs(c, i, s),
        )

        def mine(x: Tensor = logits, p: Tensor = pairs, r: Any = rest) -> Any:
            return torch.autograd.grad(ops.clip_pairwise_loss(x, p, *r), x)

        def published(x: Tensor = logits, p: Tensor = laid_out, s: Tensor = shifts) -> Any:
            return torch.autograd.grad(published_clip_loss(x, p, s), x)

        report(f"loss of a clip, {name}", runs, mine, published)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, state, reason in ops.status():
        print(f"{name}: {state}, {reason}")
    print(f"{'case':38} {'pmvis ms':>9} {'published ms':>12} {'ratio':>7} {'MB':>9} {'MB':>12}")
    for name, size in IMAGES.items():
        images = photos(*size)
        torch.testing.assert_close(
            ops.lab_similarity(images), published_similarity(images), rtol=0, atol=1e-5
        )
        report(
            f"similarity, {name}",
            options.runs,
            lambda images=images: ops.lab_similarity(images),
            lambda images=images: published_similarity(images),
        )
    loss_rows(options.runs)
    clip_rows(options.runs)


if __name__ == "__main__":
    main()
