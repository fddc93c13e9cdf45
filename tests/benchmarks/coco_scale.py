"""COCO 2017 train in size, not in content: 118,287 images, 860,001 annotations, about 450 MB.

Writes annotations and, beside them, an empty file for each image, to measure how long commands take
to start on them, and their peak of memory:

    python tests/benchmarks/coco_scale.py /tmp/coco/instances_train2017.json

The spread of instances over images, the length of polygons and the share of crowds (plain runs) are
those of COCO, the ids too large to be row numbers, and rows of an image lie far apart in the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from pmvis_core.categories import COCO, load_target

IMAGES, ANNOTATIONS = 118_287, 860_001
CROWDS = 10_059
SHAPES = 4096
"""Different polygons; the rest repeat them."""


def write_coco(path: Path, images: int = IMAGES, annotations: int = ANNOTATIONS) -> None:
    """Write a COCO instances file with the 80 category ids of COCO."""
    rng = np.random.default_rng(2017)
    ids = [i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]
    mapped = list(load_target("ytvis2019").maps[COCO])
    names = [*mapped, *(f"thing {k}" for k in range(len(ids) - len(mapped)))]
    sizes = np.where(rng.random(images)[:, None] < 0.7, [480, 640], [640, 480])
    image_ids = rng.permutation(581_921)[:images]
    shapes = [_polygon(rng) for _ in range(SHAPES)]
    owners = image_ids[rng.integers(images, size=annotations)]
    kinds = rng.choice(ids, annotations, p=_shares(len(ids)))
    crowd = np.zeros(annotations, bool)
    crowd[-CROWDS * annotations // ANNOTATIONS :] = True
    with path.open("w") as stream:
        stream.write('{"info": {"description": "COCO in size"}, "licenses": [], "images": [')
        for row, (number, (height, width)) in enumerate(zip(image_ids, sizes, strict=True)):
            name = f"{number:012d}.jpg"
            stream.write(
                (", " if row else "") + f'{{"license": 3, "file_name": "{name}", "coco_url": '
                f'"http://images.cocodataset.org/train2017/{name}", "height": {height}, '
                f'"width": {width}, "date_captured": "2013-11-14 11:18:45", "id": {number}}}'
            )
        stream.write('], "annotations": [')
        heights = dict(zip(image_ids.tolist(), sizes[:, 0].tolist(), strict=True))
        for row in range(annotations):
            owner = int(owners[row])
            height = heights[owner]
            text, box = shapes[row % SHAPES]
            if crowd[row]:
                runs = [1000, 50] * 100 + [480 * 640 - 105_000]
                text = json.dumps({"counts": runs, "size": [height, 1120 - height]})
            stream.write(
                (", " if row else "") + f'{{"segmentation": {text}, "area": 2765.1486500000005, '
                f'"iscrowd": {int(crowd[row])}, "image_id": {owner}, "bbox": {box}, '
                f'"category_id": {kinds[row]}, "id": {900_100_000 + row}}}'
            )
        pairs = zip(ids, names, strict=True)
        categories = [{"supercategory": "thing", "id": i, "name": name} for i, name in pairs]
        stream.write(f'], "categories": {json.dumps(categories)}}}')


def _shares(number: int) -> np.ndarray:
    """Return how often each category occurs: the first (person) in three of ten rows."""
    rest = 0.7 * np.arange(number - 1, 0, -1) / (number * (number - 1) / 2)
    return np.concatenate([[0.3], rest])


def _polygon(rng: np.random.Generator) -> tuple[str, str]:
    """Return the text of one polygon or two, and of their box."""
    low = rng.uniform(0, 300, 2)
    size = rng.uniform(20, 170, 2)
    parts = []
    for _ in range(1 + (rng.random() < 0.2)):
        points = low + size * rng.random((int(rng.integers(6, 28)), 2))
        parts.append([round(float(v), 2) for v in points.ravel()])
    return json.dumps(parts), json.dumps([round(float(v), 2) for v in (*low, *size)])


def touch_images(path: Path) -> None:
    """Make an empty file for each image of a file that `write_coco` wrote."""
    folder = path.parent / "train2017"
    folder.mkdir(exist_ok=True)
    for image in json.loads(path.read_text())["images"]:
        (folder / image["file_name"]).touch()


def measure(title: str, words: list[str]) -> None:
    """Run a command and print its seconds and its peak of memory."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "pmvis_cli", *words]
    done = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(done.pid, 0)
    seconds, cpu = time.perf_counter() - begin, used.ru_utime + used.ru_stime
    code = os.waitstatus_to_exitcode(status)
    print(
        f"{title:38s} {seconds:6.1f} s, CPU {cpu:6.1f} s, {used.ru_maxrss / 2**20:.2f} GB, {code}"
    )


def main() -> None:
    """Write what is not there yet, and measure."""
    path = Path(sys.argv[1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_coco(path)
        touch_images(path)
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")
    given, out = str(path), path.parent / "out"
    for stale in (*path.parent.glob(".*.index"), *out.glob("*")):
        stale.unlink()
    train = ["train-image", "--dry-run", "-o", str(path.parent / "run")]
    stills = ["--data", given, "--images", str(path.parent / "train2017")]
    measure("train-image --dry-run, first time", [*train, *stills])
    measure("train-image --dry-run, again", [*train, *stills])
    measure(
        "map-categories",
        ["map-categories", "--target", "ytvis2019", "--coco", given, "-o", str(out)],
    )
    mapped = ["--data", str(out / "train_image.json")]
    measure("train-image on what it wrote", [*train, *mapped])
    measure("train-image on it, again", [*train, *mapped])


if __name__ == "__main__":
    main()
