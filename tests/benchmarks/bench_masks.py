"""Time mask operations against pycocotools: `python tests/benchmarks/bench_masks.py`.

Masks are seeded blobs of 720x1280 (`--size H W`); times are medians of process CPU time, one
thread, peers timed alternately in one run. Ratios above 1 mean that we are faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from pycocotools import mask as coco
from timing import compare

from pmvis_core import masks, native

NUMBER = 24


def blobs(height: int, width: int) -> np.ndarray:
    """Return (24, H, W) uint8 masks: wavy ellipses of about a twentieth of the frame."""
    rng = np.random.default_rng([0, 24])
    y, x = np.mgrid[:height, :width].astype(np.float32)
    stack = []
    for _ in range(NUMBER):
        cy, cx = rng.uniform(0.25, 0.75, 2) * (height, width)
        angle = np.arctan2(y - cy, x - cx)
        radius = (
            0.14 * width * rng.uniform(0.6, 1.2) * (1 + 0.2 * np.sin(5 * angle + rng.uniform()))
        )
        stack.append(np.hypot(1.6 * (y - cy), x - cx) < radius)
    return np.stack(stack).astype(np.uint8)


def theirs_track_iou(a: list[Any], b: list[Any]) -> float:
    """Return the track IoU as the official evaluator computes it."""
    inter = union = 0
    for one, other in zip(a, b, strict=True):
        inter += int(coco.area(coco.merge([one, other], True)))
        union += int(coco.area(coco.merge([one, other], False)))
    return inter / union


def repeated(function: Callable[[], Any], times: int) -> Callable[[], None]:
    """Return a function that calls another several times, for clocks that are too coarse."""

    def many() -> None:
        for _ in range(times):
            function()

    return many


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(720, 1280), metavar=("H", "W"))
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    rows = blobs(*options.size)
    columns = np.asfortranarray(rows.transpose(1, 2, 0))
    by_column = np.ascontiguousarray(rows.transpose(0, 2, 1)).transpose(0, 2, 1)
    ours = masks.encode_many(rows)
    theirs = coco.encode(columns)
    assert [rle["counts"].decode() for rle in theirs] == [rle["counts"] for rle in ours]
    out = np.zeros(rows.shape, np.uint8)
    cases: list[tuple[str, int, Callable[[], Any], Callable[[], Any]]] = [
        (
            "encode, C order",
            NUMBER,
            lambda: masks.encode_many(rows),
            lambda: coco.encode(np.asfortranarray(rows.transpose(1, 2, 0))),
        ),
        (
            "encode, column order",
            NUMBER,
            lambda: masks.encode_many(by_column),
            lambda: coco.encode(columns),
        ),
        ("decode, new array", NUMBER, lambda: masks.decode_many(ours), lambda: coco.decode(theirs)),
        (
            "decode, given array",
            NUMBER,
            lambda: [masks.decode(rle, row) for rle, row in zip(ours, out, strict=True)],
            lambda: [coco.decode(rle) for rle in theirs],
        ),
        (
            "area, one by one",
            NUMBER,
            lambda: [masks.area(rle) for rle in ours],
            lambda: [coco.area(rle) for rle in theirs],
        ),
        (
            "box, one by one",
            NUMBER,
            lambda: [masks.to_box(rle) for rle in ours],
            lambda: [coco.toBbox(rle) for rle in theirs],
        ),
        ("merge of 24", 1, lambda: masks.merge(ours), lambda: coco.merge(theirs)),
        (
            "iou 24 x 24, a pair",
            NUMBER**2,
            lambda: masks.iou(ours, ours),
            lambda: coco.iou(theirs, theirs, [0] * NUMBER),
        ),
        (
            "track IoU, a frame",
            NUMBER,
            lambda: masks.track_iou(ours, ours[::-1]),
            lambda: theirs_track_iou(theirs, theirs[::-1]),
        ),
    ]
    print(f"{options.size[0]}x{options.size[1]}, {'native' if native.mask_library() else 'numpy'}")
    print(f"{'operation':24} {'pmvis us':>10} {'pycocotools us':>15} {'ratio':>7}")
    for name, units, mine, other in cases:
        mine_s, other_s = compare(options.runs, repeated(mine, 5), repeated(other, 5))
        scale = 1e6 / units / 5
        ratio = other_s / mine_s
        print(f"{name:24} {mine_s * scale:10.2f} {other_s * scale:15.2f} {ratio:7.1f}")


if __name__ == "__main__":
    main()
