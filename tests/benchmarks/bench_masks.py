"""Time mask operations against peers: `python tests/benchmarks/bench_masks.py`.

Peers are pycocotools and, where they are installed, hotcoco, ultrafast-pycocotools and
faster-coco-eval. Masks are 24 seeded blobs of 720x1280 (`--size H W`); times are medians of process
CPU time in microseconds a mask (a pair, a call), ours and the peers' in turns in one run. The last
column is the best peer's time over ours: above 1 we are faster.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from timing import compare

from pmvis_core import masks, native

NUMBER = 24
BLOCK = 4e-3  # seconds that a call is repeated for, so that one peer does not clear another's cache
PEERS = {
    "pycocotools": "pycocotools.mask",
    "hotcoco": "hotcoco.mask",
    "ultrafast": "ultrafast_pycocotools.mask",
    "faster": "faster_coco_eval.core.mask",
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    """What is done."""
    units: int
    """Masks or pairs of one call."""
    ours: Callable[[], Any]
    """Does it with pmvis."""
    theirs: Callable[[Any, Any], Callable[[], Any]]
    """Takes a peer's module and its RLEs of the blobs; returns what does it."""


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


def polygon(height: int, width: int) -> list[float]:
    """Return an ellipse of 72 vertices."""
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    points = np.stack([np.cos(angles) * width / 6 + width / 2, np.sin(angles) * height / 5], axis=1)
    points[:, 1] += height / 2
    return [float(v) for v in points.ravel()]


def track_iou_of(peer: Any, a: list[Any], b: list[Any]) -> float:
    """Return the track IoU as the official evaluator computes it."""
    inter = union = 0
    for one, other in zip(a, b, strict=True):
        inter += int(peer.area(peer.merge([one, other], True)))
        union += int(peer.area(peer.merge([one, other], False)))
    return inter / union


def microseconds(runs: int, calls: list[Callable[[], Any]]) -> list[float]:
    """Return the time of each call; each is repeated until clocks are fine enough for it."""

    def repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
        def many() -> None:
            for _ in range(times):
                call()

        return many

    single = [min(compare(2, call)) for call in calls]
    times = [max(1, min(2000, int(BLOCK / max(seconds, 1e-6)))) for seconds in single]
    blocks = compare(runs, *map(repeated, calls, times))
    return [seconds * 1e6 / number for seconds, number in zip(blocks, times, strict=True)]


def pixel_rows(stack: np.ndarray, ours: list[Any]) -> Iterator[Row]:
    """Yield what concerns pixels."""
    columns = np.asfortranarray(stack.transpose(1, 2, 0))
    one, one_f = stack[0], np.asfortranarray(stack[0])
    out = np.zeros(stack.shape, np.uint8)
    single, target = ours[0], np.zeros(stack.shape[1:], np.uint8)
    box = masks.to_box(single)
    yield Row(
        "encode, C order",
        1,
        lambda: masks.encode(one),
        lambda peer, _: lambda: peer.encode(np.asfortranarray(one)),
    )
    yield Row(
        "encode, Fortran order",
        1,
        lambda: masks.encode(one_f),
        lambda peer, _: lambda: peer.encode(one_f),
    )
    yield Row(
        "encode, C stack",
        NUMBER,
        lambda: masks.encode_many(stack),
        lambda peer, _: lambda: peer.encode(np.asfortranarray(stack.transpose(1, 2, 0))),
    )
    yield Row(
        "encode, (H,W,N) Fortran stack",
        NUMBER,
        lambda: masks.encode_many(columns.transpose(2, 0, 1)),
        lambda peer, _: lambda: peer.encode(columns),
    )

    def decode(peer: Any, theirs: Any) -> Callable[[], Any]:
        return lambda: peer.decode(theirs[0])

    yield Row("decode, new array", 1, lambda: masks.decode(single), decode)
    yield Row("decode, given array", 1, lambda: masks.decode(single, target), decode)
    yield Row("decode, box of the mask", 1, lambda: masks.decode(single, box=box), decode)
    for name, given in (("new", None), ("given", out)):
        yield Row(
            f"decode, stack, {name} array",
            NUMBER,
            lambda given=given: masks.decode_many(ours, given),
            lambda peer, theirs: lambda: peer.decode(theirs),
        )


def text_rows(ours: list[Any], xy: list[float], height: int, width: int) -> Iterator[Row]:
    """Yield what concerns runs only."""
    crowd = [0] * NUMBER
    one = ours[0]
    yield Row(
        "area, one", 1, lambda: masks.area(one), lambda peer, rles: lambda: peer.area(rles[0])
    )
    yield Row(
        "area, batch", NUMBER, lambda: masks.areas(ours), lambda peer, rles: lambda: peer.area(rles)
    )
    yield Row(
        "box, one", 1, lambda: masks.to_box(one), lambda peer, rles: lambda: peer.toBbox(rles[0])
    )
    yield Row(
        "box, batch",
        NUMBER,
        lambda: masks.to_boxes(ours),
        lambda peer, rles: lambda: peer.toBbox(rles),
    )
    for name, intersect in (("union", False), ("intersection", True)):
        yield Row(
            f"merge of 2, {name}",
            1,
            lambda intersect=intersect: masks.merge(ours[:2], intersect),
            lambda peer, rles, intersect=intersect: lambda: peer.merge(rles[:2], intersect),
        )
    yield Row(
        "merge of 24, union",
        1,
        lambda: masks.merge(ours),
        lambda peer, rles: lambda: peer.merge(rles),
    )
    yield Row(
        "iou 24 x 24, a pair",
        NUMBER**2,
        lambda: masks.iou(ours, ours, crowd),
        lambda peer, rles: lambda: peer.iou(rles, rles, crowd),
    )
    yield Row(
        "iou 1 x 1",
        1,
        lambda: masks.iou(ours[:1], ours[1:2], [0]),
        lambda peer, rles: lambda: peer.iou(rles[:1], rles[1:2], [0]),
    )
    yield Row(
        "track IoU, a frame",
        NUMBER,
        lambda: masks.track_iou(ours, ours[::-1]),
        lambda peer, rles: lambda: track_iou_of(peer, rles, rles[::-1]),
    )
    yield Row(
        "polygon of 72 vertices",
        1,
        lambda: masks.from_polygons([xy], height, width),
        lambda peer, _: lambda: peer.frPyObjects([xy], height, width),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(720, 1280), metavar=("H", "W"))
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    stack = blobs(*options.size)
    ours = masks.encode_many(stack)
    peers = {}
    for name, module in PEERS.items():
        try:
            peers[name] = importlib.import_module(module)
        except ImportError:
            print(f"{name} is not installed")
    columns = np.asfortranarray(stack.transpose(1, 2, 0))
    theirs = {name: peer.encode(columns) for name, peer in peers.items()}
    for name, rles in theirs.items():
        same = [rle["counts"].decode() for rle in rles] == [rle["counts"] for rle in ours]
        assert same, f"{name} encodes otherwise"
    library = native.mask_library()
    height, width = options.size
    print(f"{height}x{width}, us, pmvis: {library.instructions if library else 'numpy'}")
    print(f"{'operation':30} {'pmvis':>9}" + "".join(f"{name:>12}" for name in peers) + "   ratio")
    rows = [*pixel_rows(stack, ours), *text_rows(ours, polygon(height, width), height, width)]
    for row in rows:
        calls = [row.ours, *(row.theirs(peer, theirs[name]) for name, peer in peers.items())]
        mine, *others = (us / row.units for us in microseconds(options.runs, calls))
        ratio = f"{min(others) / mine:8.1f}" if others else ""
        print(f"{row.name:30} {mine:9.2f}" + "".join(f"{other:12.2f}" for other in others) + ratio)


if __name__ == "__main__":
    main()
