"""Pseudo labels of thousands of videos: 3,000 videos of 30 frames and 6 tracks, about 400 MB.

Writes them as tracks.jsonl and as YouTube-VIS JSON, with frames of 1280x720 that all videos share
(a link a video), and measures how long `train-video` takes to start, its peak of memory, and the
drawing of items:

    python tests/benchmarks/video_scale.py /tmp/videos --videos 3000 --draws 100

A track is a blob that drifts, of some 600 characters a mask, and absent in one frame of five.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from pmvis_core import masks
from pmvis_core.categories import load_target
from pmvis_core.tracks_io import TracksHeader, TracksWriter
from pmvis_core.types import RLE, Track, VideoInfo, VideoTracks

HEIGHT, WIDTH = 720, 1280
LENGTH, TRACKS = 30, 6
SHAPES = 512
"""Different masks; the rest repeat them."""
LINES, OBJECT = "kept.tracks.jsonl", "kept.json"


def blobs(rng: np.random.Generator) -> list[RLE]:
    """Return masks with ragged edges."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    found = []
    for _ in range(SHAPES):
        y, x = rng.uniform(200, 520), rng.uniform(300, 980)
        angle = np.arctan2(rows - y, columns - x)
        edge = rng.uniform(80, 160) * (1 + 0.1 * np.sin(rng.integers(5, 30) * angle))
        found.append(masks.encode((np.hypot(rows - y, columns - x) < edge).astype(np.uint8)))
    return found


def write_tracks(folder: Path, videos: int) -> None:
    """Write a tracks file, the same as YouTube-VIS JSON, and the frames."""
    rng = np.random.default_rng(3000)
    shapes = blobs(rng)
    categories = load_target("ytvis2021").categories
    with TracksWriter(folder / LINES, TracksHeader(categories)) as out:
        for number in range(1, videos + 1):
            files = tuple(f"v{number:05d}/{t:05d}.jpg" for t in range(LENGTH))
            info = VideoInfo(number, f"v{number:05d}", HEIGHT, WIDTH, LENGTH, files)
            tracks = tuple(track(k, rng, shapes) for k in range(1, TRACKS + 1))
            out.write(VideoTracks(info, tracks))
    command = [sys.executable, "-m", "pmvis_cli", "convert", str(folder / LINES)]
    subprocess.run([*command, "--to", "dataset", "-o", str(folder / OBJECT)], check=True)
    shared = folder / "frames"
    shared.mkdir()
    for t in range(LENGTH):
        small = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
        cv2.imwrite(str(shared / f"{t:05d}.jpg"), cv2.resize(small, (WIDTH, HEIGHT)))
    for number in range(1, videos + 1):
        (folder / f"v{number:05d}").symlink_to("frames")


def track(number: int, rng: np.random.Generator, shapes: list[RLE]) -> Track:
    """Return a track of random shapes."""
    present = rng.random(LENGTH) < 0.8
    present[0] = True
    chosen = rng.integers(SHAPES, size=LENGTH).tolist()
    scores = rng.uniform(0.2, 1, LENGTH).round(4).tolist()
    return Track(
        id=number,
        category_id=int(rng.integers(1, 41)),
        score=round(float(rng.uniform(0.2, 1)), 4),
        frame_scores=tuple(s if p else None for s, p in zip(scores, present, strict=True)),
        rles=tuple(shapes[k] if p else None for k, p in zip(chosen, present, strict=True)),
        instance=number,
    )


def measure(title: str, command: list[str]) -> None:
    """Run a command and print its seconds and its peak of memory."""
    begin = time.perf_counter()
    done = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    told = done.stdout.read()
    _, status, used = os.wait4(done.pid, 0)
    seconds, cpu = time.perf_counter() - begin, used.ru_utime + used.ru_stime
    code = os.waitstatus_to_exitcode(status)
    said = told.strip() if "--draw-of" in command else ""
    peak = used.ru_maxrss / 2**20
    print(f"{title:42s} {seconds:6.1f} s, CPU {cpu:6.1f} s, {peak:.2f} GB, {code} {said}")


def draw(path: Path, draws: int) -> None:
    """Draw items of a file and print the median time of one."""
    from pmvis_core.data.augment import IDOL_VIDEOS
    from pmvis_core.data.datasets import PseudoVideos

    cv2.setNumThreads(1)
    begin = time.process_time()
    videos = PseudoVideos(path, path.parent, IDOL_VIDEOS)
    opened = time.process_time() - begin
    rng = np.random.default_rng(0)
    spent = []
    for index in rng.permutation(len(videos))[:draws].tolist():
        begin = time.process_time()
        videos.sample(index, rng)
        spent.append(time.process_time() - begin)
    print(f"opened in {opened:.2f} s CPU, an item in {1e3 * np.median(spent):.1f} ms CPU")


def main() -> None:
    """Write what is not there yet, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--videos", type=int, default=3000)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--draw-of", type=Path, help="only draw items of this file")
    options = parser.parse_args()
    folder = options.folder
    if options.draw_of is not None:
        draw(options.draw_of, options.draws)
        return
    if not (folder / LINES).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_tracks(folder, options.videos)
    for stale in folder.glob(".*.index"):
        stale.unlink()
    here = [sys.executable, __file__, str(folder), "--draws", str(options.draws), "--draw-of"]
    for name in (LINES, OBJECT):
        path = folder / name
        print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")
        plan = [sys.executable, "-m", "pmvis_cli", "train-video", "--dry-run", "--pseudo"]
        plan += [str(path), "--frames", str(folder), "-o", str(folder / "run")]
        measure("train-video --dry-run, first time", plan)
        measure("train-video --dry-run, again", plan)
        measure(f"{options.draws} items", [*here, str(path)])


if __name__ == "__main__":
    main()
