"""Which filter of pseudo labels is the best: precision at equal recall. Run by hand: minutes.

    python tests/benchmarks/bench_label_filters.py FOLDER [--steps 600] [--shard 1/1] [--seed 0]

Draws the micro-benchmark into FOLDER, trains a tiny image model on it, labels the unlabelled videos
and refines the labels, by the same commands as `pmvis demo`; what is there already stays. Then all
settings of K, tau and quality are tried against the truth of those videos. A label is right if it
takes an object of its category by track IoU 0.5 or more. The setting of a row is the one with
the highest precision among those that reach the recall on one half of the videos (even places); the
figures are those of the other half, so a filter with two numbers gains nothing by being tried more
often.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pmvis_core.evaluation.label_quality import ComparedVideo, compare
from pmvis_core.formats.ytvis import open_tracks, read_dataset

SHARES = [round(0.04 * i, 2) for i in range(25)]
"""Values of tau and of quality."""
FAMILIES = {
    "tau": ([0], SHARES, [0.0]),
    "K": (range(1, 13), [0.0], [0.0]),
    "quality": ([0], [0.0], SHARES),
    "tau, K": (range(1, 13), SHARES, [0.0]),
    "tau, quality": ([0], SHARES, SHARES),
    "K, quality": (range(1, 13), [0.0], SHARES),
}
"""Name of a filter -> values of K, tau and quality."""
RECALLS = (0.1, 0.2, 0.3, 0.4, 0.5)
Setting = tuple[int, float, float]


def main() -> None:
    """Make the labels and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--shard", default="1/1")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_labels(options.folder, options.steps, options.seed, options.shard)
    truth = read_dataset(options.folder / "data/videos/train_truth.json")
    objects = {video.video.id: len(video.tracks) for video in truth}
    labels = list(open_tracks(options.folder / "refined.tracks.jsonl"))
    videos = list(compare(labels, truth))
    counts = [objects[video.video.id] for video in labels]
    print(
        f"{len(labels)} videos, {sum(counts)} objects, {sum(len(v.tracks) for v in videos)} labels"
    )
    print(f"unfiltered: {row(measure(videos, counts, (0, 0.0, 0.0)))}")
    report(videos, counts)


def make_labels(folder: Path, steps: int, seed: int, shard: str) -> None:
    """Run the commands whose products are not there yet."""
    data, image = folder / "data", folder / "image"
    stills, videos = folder / "maps/train_image.json", data / "videos/train.json"
    raw, refined = folder / "raw.tracks.jsonl", folder / "refined.tracks.jsonl"
    sources = f"--coco {data}/coco/instances_train.json --imagenet-bbox {data}/imagenet/Annotations"
    train = f"--data {stills} --preset tiny --steps {steps} --seed {seed} --device cpu"
    for product, command in (
        (data / "synth.json", f"synth -o {data} --seed {seed} --gap 1.75"),
        (stills, f"map-categories --target {data}/target.json {sources} -o {folder}/maps"),
        (image / "model.safetensors", f"train-image {train} -o {image}"),
        (
            raw,
            f"infer --weights {image} --frames {videos} --set row_score=0.1 --shard {shard} "
            f"--resume -o {raw}",
        ),
        (refined, f"refine {raw} --frames {videos} --resume -o {refined}"),
    ):
        if not product.exists():
            subprocess.run([sys.executable, "-m", "pmvis_cli.app", *command.split()], check=True)


def report(videos: Sequence[ComparedVideo], counts: Sequence[int]) -> None:
    """Print a line for each recall and filter."""
    print(f"{'recall >=':10}{'filter':14}{'setting (K, tau, quality)':28}{'on the other half'}")
    tried = {
        setting: measure(videos[::2], counts[::2], setting)
        for values in FAMILIES.values()
        for setting in itertools.product(*values)
    }
    for wanted in RECALLS:
        for name, values in FAMILIES.items():
            enough = [s for s in itertools.product(*values) if tried[s][1] >= wanted]
            if enough:
                setting = max(enough, key=lambda s: tried[s][0])
                found = row(measure(videos[1::2], counts[1::2], setting))
                print(f"{wanted:<10}{name:14}{setting!s:28}{found}")
            else:
                print(f"{wanted:<10}{name:14}not reached")


def measure(
    videos: Sequence[ComparedVideo], counts: Sequence[int], setting: Setting
) -> tuple[float, float, float]:
    """Return precision, recall and F1 of what a setting keeps."""
    topk, tau, quality = setting
    kept = matched = 0
    for video in videos:
        rows = [
            i
            for i, track in enumerate(video.tracks)
            if track.score >= tau and (track.quality or 0.0) >= quality
        ][: topk or None]
        kept += len(rows)
        matched += video.matched(rows)
    precision, recall = matched / kept if kept else 0.0, matched / sum(counts)
    both = precision + recall
    return precision, recall, 2 * precision * recall / both if both else 0.0


def row(figures: tuple[float, float, float]) -> str:
    """Return precision, recall and F1 in percent."""
    return "precision {:5.1f}  recall {:5.1f}  F1 {:5.1f}".format(*(100 * f for f in figures))


if __name__ == "__main__":
    main()
