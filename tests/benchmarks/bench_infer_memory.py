"""Peak memory of `infer` against the length of the video, one process a length.

The video is drawn as it is read. Between two scenes of 50 frames one frame is broken and left
blank, and the tracker forgets at once, so that every scene's tracks die with it. The model is the
tiny preset with random heads, which finds something everywhere.

    python tests/benchmarks/bench_infer_memory.py 100 1000 10000
"""

from __future__ import annotations

import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pmvis_core.checkpoint import Checkpoint
from pmvis_core.config import TrackerConfig
from pmvis_core.errors import DataError
from pmvis_core.infer import InferOptions, VideoInference
from pmvis_core.inference.segmenter import FrameSegmenter
from pmvis_core.models.idol import build_idol
from pmvis_core.systems.presets import IMAGE_PRESETS
from pmvis_core.tracks_io import TracksHeader, TracksWriter
from pmvis_core.types import Category, VideoInfo
from pmvis_core.video.image_files import Frame
from pmvis_core.video.sources import FrameSource

HEIGHT, WIDTH = 96, 128
SCENE_FRAMES = 50
CLASSES = 7


class Scenes(FrameSource):
    """Noise that drifts, and is drawn anew with every scene."""

    def __init__(self, length: int) -> None:
        super().__init__(VideoInfo(1, "scenes", HEIGHT, WIDTH, length))

    def readings(self, which: range | None = None) -> Iterator[Frame | DataError]:
        for t in range(self.info.length) if which is None else which:
            yield self[t] if t % SCENE_FRAMES else DataError("the scene changes")

    def __getitem__(self, t: int) -> Frame:
        scene, moved = divmod(t, SCENE_FRAMES)
        coarse = np.random.default_rng(scene).integers(0, 256, (6, 8, 3), np.uint8)
        return np.roll(coarse.repeat(16, 0).repeat(16, 1), 2 * moved, axis=1)

    def _measure(self) -> VideoInfo:
        raise AssertionError


def run(length: int) -> None:
    """Label one video and print its peak memory, rows, tracks and speed."""
    torch.manual_seed(1)
    model = build_idol(IMAGE_PRESETS["tiny"].model, CLASSES).eval()
    for head in model.class_embed:
        torch.nn.init.normal_(head.weight, std=0.5)  # type: ignore[arg-type]
    with torch.no_grad():
        model.reid_embed_head.last.weight.mul_(50)  # else all look alike, and none is followed
    categories = tuple(Category(k + 1, f"c{k}") for k in range(CLASSES))
    tracker = TrackerConfig(short_side=0, row_score=0.1, max_gap_frames=1)
    checkpoint = Checkpoint(model, categories, tracker)
    segmenter = FrameSegmenter(model, torch.device("cpu"))
    logging.disable()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "x.tracks.jsonl"
        options = InferOptions(on_error="blank", spool=Path(folder))
        with (
            TracksWriter(out, TracksHeader(categories)) as writer,
            VideoInference(segmenter, checkpoint, Scenes(length), options) as video,
        ):
            done = sum(1 for _ in video)
            writer.write_pieces(video.pieces(), video.rows_written)
        size = out.stat().st_size
    speed = done / (time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(f"| {done} | {peak:.0f} | {video.rows} | {size / 1e6:.1f} | {speed:.0f} |\n")


def main() -> None:
    """Run each length in a process of its own."""
    if sys.argv[1:2] == ["--one"]:
        return run(int(sys.argv[2]))
    head = "| frames | peak MiB | rows | file MB | frames/s |"
    sys.stdout.write(f"{head}\n|---:|---:|---:|---:|---:|\n")
    for length in sys.argv[1:] or ["100", "1000", "10000"]:
        sys.stdout.flush()
        subprocess.run([sys.executable, __file__, "--one", length], check=True)
    return None


if __name__ == "__main__":
    main()
