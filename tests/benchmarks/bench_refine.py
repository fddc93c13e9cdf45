"""How well and how fast `refine` is. Run by hand: minutes, not seconds.

    python tests/benchmarks/bench_refine.py real [--root ../shared/real/videos] [--short-edge 240]
    python tests/benchmarks/bench_refine.py real --features ../shared/real/weights/FILE
    python tests/benchmarks/bench_refine.py real --file annotations.json
    python tests/benchmarks/bench_refine.py real --weights RUN [--max-long-edge 433]
    python tests/benchmarks/bench_refine.py tiny [--videos 40] [--seed 1]

`real`, by `flow`, or by DeAOT where weights are given: the ground-truth mask of the middle frame is
propagated to both ends of each video; mean IoU with the ground truth (J) over all other frames in
which the object is annotated, next to the J of copying the mask. `tiny`: drawn videos whose true
masks are spoilt as an image model spoils them (ragged edges, halves, swaps with a neighbour, gaps),
refined with each option; mean track IoU and the share of tracks above IoU 0.5 and 0.75.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from pmvis_core import masks
from pmvis_core.formats.ytvis import read_dataset
from pmvis_core.propagation.deaot import DeaotPropagator, DeaotSettings
from pmvis_core.propagation.flow import FlowPropagator, Propagator
from pmvis_core.propagation.propagators import Choice, choose_propagator
from pmvis_core.refine import RefineCounts, RefineOptions, refine
from pmvis_core.synthetic import benchmark as synthetic
from pmvis_core.types import RLE, Track, VideoTracks
from pmvis_core.video.frames import find_frames
from pmvis_core.weights.deaot import load_deaot

Mask = NDArray[np.uint8]

OPTIONS = {
    "default": RefineOptions(),
    "no snapping": RefineOptions(snap=1.0),
    "snap 0.3": RefineOptions(snap=0.3),
    "no gates": RefineOptions(area_jump=0.0),
    "cycle 0.5": RefineOptions(cycle=0.5),
    "no snapping, cycle 0.5": RefineOptions(snap=1.0, cycle=0.5),
    "overlap argmax": RefineOptions(overlap="argmax"),
    "overlap score": RefineOptions(overlap="score"),
}
"""The variants that `tiny` compares."""


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("what", choices=("real", "tiny"))
    default_root = Path(__file__).resolve().parents[3] / "shared/real/videos"
    parser.add_argument("--root", type=Path, default=default_root)
    parser.add_argument("--short-edge", type=int, default=240)
    parser.add_argument("--file", default="annotations_clean.json")
    parser.add_argument("--features", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--max-long-edge", type=int, default=1040)
    parser.add_argument("--videos", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.what == "real":
        if options.weights:
            settings = DeaotSettings(max_long_edge=options.max_long_edge)
            network = load_deaot(options.weights)
            propagator: Propagator = DeaotPropagator(network, torch.device("cpu"), settings)
        else:
            edge, features = options.short_edge, options.features
            propagator = choose_propagator(Choice(short_edge=edge, features=features)).propagator
        real(options.root, options.file, propagator)
    else:
        tiny(options.videos, options.seed)


def real(root: Path, file: str, propagator: Propagator) -> None:
    """Print J per video of an annotation file."""
    print(f"{'video':28}{'tracks':>7}{'frames':>7}{'copy':>7}{'J':>7}{'ms/step':>9}")
    table = []
    for truth in read_dataset(root / file):
        keyed = truth.with_tracks(tuple(middle_only(track) for track in truth.tracks))
        start = time.process_time()
        (result,) = refine(
            [keyed],
            lambda video: find_frames(video, root),
            propagator,
            RefineOptions(area_jump=0.0),
            RefineCounts(),
        )
        spent = time.process_time() - start
        pairs = list(zip(result.tracks, truth.tracks, strict=True))
        j = float(np.mean([off_key_iou(r.rles, t.rles, r.keyframe) for r, t in pairs]))
        copies = [((r.rles[r.keyframe or 0],) * len(r.rles), t.rles, r.keyframe) for r, t in pairs]
        copy = float(np.mean([off_key_iou(*row) for row in copies]))
        steps = len(pairs) * (truth.video.length - 1)
        name = Path(truth.video.file_names[0]).parent.name
        table.append((copy, j))
        print(
            f"{name:28}{len(pairs):7}{truth.video.length:7}{copy:7.3f}{j:7.3f}"
            f"{1e3 * spent / steps:9.1f}",
            flush=True,
        )
    copy, j = np.mean(table, axis=0)
    print(f"{'mean':42}{copy:7.3f}{j:7.3f}")


def middle_only(track: Track) -> Track:
    """Keep a track's mask in the annotated frame nearest to the middle that holds 100 pixels."""
    large = [t for t in track.present if masks.area(track.rles[t] or masks.empty(1, 1)) >= 100]
    key = min(large, key=lambda t: abs(t - len(track.rles) // 2))
    rles = tuple(rle if t == key else None for t, rle in enumerate(track.rles))
    return replace(track, rles=rles, frame_scores=tuple(None if r is None else 1.0 for r in rles))


def off_key_iou(found: Sequence[RLE | None], truth: Sequence[RLE | None], key: int | None) -> float:
    """Return the mean IoU over the frames in which the truth is present, the key frame apart."""
    pairs = [(a, b) for t, (a, b) in enumerate(zip(found, truth, strict=True)) if t != key and b]
    return float(np.mean([masks.iou([a], [b])[0, 0] if a else 0.0 for a, b in pairs]))


def tiny(count: int, seed: int) -> None:
    """Print how each variant of `OPTIONS` mends spoilt tracks of drawn videos."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "synth"
        few = {"mask_stills": 1, "box_stills": 1, "val_stills": 1, "valid_videos": 1}
        synthetic.draw(folder, seed, synthetic.SynthConfig(train_videos=count, **few))
        truth = list(read_dataset(folder / "videos/train_truth.json"))
        rng = np.random.default_rng([seed, 1])
        frames_of = partial(find_frames, root=folder / "videos/train")
        raw = [video.with_tracks(tuple(spoilt(video, rng))) for video in truth]
        heads = f"{'track IoU':>10}{'> .5':>7}{'> .75':>7}{'snapped':>9}{'gated':>7}{'s/video':>9}"
        print(" " * 26 + heads)
        print(f"{'raw':26}" + quality(raw, truth))
        for label, options in OPTIONS.items():
            counts = RefineCounts()
            start = time.process_time()
            propagator = FlowPropagator()
            mended = list(refine(raw, frames_of, propagator, options, counts))
            spent = (time.process_time() - start) / count
            print(
                f"{label:26}{quality(mended, truth)}{counts.snapped:9}{counts.gated:7}{spent:9.3f}",
                flush=True,
            )


def quality(found: Iterable[VideoTracks], truth: Iterable[VideoTracks]) -> str:
    """Return mean track IoU and the shares above 0.5 and 0.75, tracks paired by id."""
    overlaps = []
    for a, b in zip(found, truth, strict=True):
        true = {track.id: track.rles for track in b.tracks}
        overlaps += [masks.track_iou(track.rles, true[track.id]) for track in a.tracks]
    values = np.array(overlaps)
    return f"{values.mean():10.3f}{(values > 0.5).mean():7.3f}{(values > 0.75).mean():7.3f}"


def spoilt(video: VideoTracks, rng: np.random.Generator) -> Iterable[Track]:
    """Yield the tracks of a video as an image model might have seen them."""
    for track in video.tracks:
        share = 0.45 if rng.random() < 0.5 else 0.12
        frames = [spoilt_frame(video, track, t, share, rng) for t in range(len(track.rles))]
        scores = [score for _, score in frames if score is not None]
        if scores:
            rles, frame_scores = zip(*frames, strict=True)
            yield replace(track, rles=rles, frame_scores=frame_scores, score=float(np.mean(scores)))


def spoilt_frame(
    video: VideoTracks, track: Track, t: int, share: float, rng: np.random.Generator
) -> tuple[RLE | None, float | None]:
    """Return mask and score of one frame: a gap, a half or a swap with probability ``share``."""
    rle, fault = track.rles[t], rng.integers(3) if rng.random() < share else -1
    if rle is None or fault == 0:
        return None, None
    mask = masks.decode(rle)
    other = video.tracks[int(rng.integers(len(video.tracks)))].rles[t]
    if fault == 1 and other is not None:
        mask = masks.decode(other)
    elif fault == 2:
        mask[:, : int(np.median(np.nonzero(mask)[1]))] = 0
    mask = ragged(mask, rng)
    score = float(np.clip(rng.normal(0.5 if fault < 0 else 0.4, 0.12), 0.05, 0.99))
    return (masks.encode(mask), score) if mask.any() else (None, None)


def ragged(mask: Mask, rng: np.random.Generator) -> Mask:
    """Return the mask with an edge that wanders by a pixel or two."""
    noise = cv2.GaussianBlur(rng.normal(0, 1, mask.shape).astype(np.float32), (0, 0), 3)
    depth = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
    depth -= cv2.distanceTransform(1 - mask, cv2.DIST_L2, 3)
    return (depth + 1.5 * noise / noise.std() + rng.normal(0, 1) > 0).astype(np.uint8)


if __name__ == "__main__":
    main()
