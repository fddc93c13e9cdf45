"""Data sets as they are published: each layout is found without a word about its folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmvis_core import categories, image_sets
from pmvis_core.data.augment import SMALL_FRAMES
from pmvis_core.data.datasets import CocoImages, PseudoVideos
from pmvis_core.data_check import check_stills, check_videos
from pmvis_core.errors import DataError
from pmvis_core.formats.coco import write_coco
from pmvis_core.types import Category
from tests.test_datasets import CATEGORIES, HEIGHT, WIDTH, rectangle, write_image

SIZE = {"height": HEIGHT, "width": WIDTH}


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def ytvis(names: list[str]) -> dict[str, Any]:
    """Return a YouTube-VIS data set of one video."""
    video = {"id": 1, "file_names": names, "length": len(names), **SIZE}
    mask = dict(rectangle(5, 5, 30, 20))
    row = {"id": 1, "video_id": 1, "category_id": 3, "iscrowd": 0, **SIZE, "length": len(names)}
    row |= {"segmentations": [mask, None], "bboxes": [[5, 5, 25, 15], None], "areas": [375, None]}
    return {"info": {}, "videos": [video], "categories": CATEGORIES, "annotations": [row]}


@pytest.mark.parametrize(
    ("file", "frames"),
    [
        ("train.json", "train/JPEGImages"),  # YouTube-VIS 2019
        ("train/instances.json", "train/JPEGImages"),  # 2021
        ("annotations/instances_train_sub.json", "train/JPEGImages"),  # as IDOL names them
        ("annotations_train.json", "train"),  # OVIS
        ("mine.json", ""),
        ("mine.json", "JPEGImages"),
    ],
)
def test_layouts_of_videos(tmp_path: Path, file: str, frames: str) -> None:
    names = [f"0043f083b5/{t:05d}.png" for t in (0, 5)]
    path = write_json(tmp_path / file, ytvis(names))
    for t, name in enumerate(names):
        write_image(tmp_path / frames / name, t)
    videos = PseudoVideos(path, None, SMALL_FRAMES)
    pair = videos.sample(0, np.random.default_rng(0))
    assert pair.key.image.shape[1:] == (HEIGHT, WIDTH)
    report = check_videos(path, None)
    assert (report.findings, report.counts["file"]) == ((), 2)


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("train_image.json", ""),
        ("mine.json", "images"),
    ],
)
def test_layouts_of_stills(tmp_path: Path, file: str, images: str) -> None:
    write_image(tmp_path / images / "000000000009.png")
    image = {"id": 9, "file_name": "000000000009.png", **SIZE}
    row = {"id": 1, "image_id": 9, "category_id": 3, "bbox": [5, 5, 20, 10]}
    value = {"images": [image], "annotations": [row], "categories": CATEGORIES}
    path = write_json(tmp_path / file, value)
    stills = CocoImages(path, None, SMALL_FRAMES)
    assert stills.sample(0, np.random.default_rng(0)).key.image.shape[1:] == (HEIGHT, WIDTH)
    report = check_stills(path, None)
    assert (report.findings, report.counts["file"]) == ((), 1)
    (tmp_path / images / "000000000009.png").unlink()
    with pytest.raises(DataError, match="1 of 1 training images are missing"):
        CocoImages(path, None, SMALL_FRAMES)


XML = """<annotation><folder>n01</folder><filename>n01_7</filename><size><width>60</width>
<height>40</height><depth>3</depth></size><object><name>n01</name><bndbox><xmin>6</xmin>
<ymin>6</ymin><xmax>25</xmax><ymax>15</ymax></bndbox></object></annotation>"""


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("Annotations/CLS-LOC/train", "Data/CLS-LOC/train"),  # ILSVRC
        ("Annotations", "images"),
        ("Annotations", "train"),
        ("Annotations", "Annotations"),
    ],
)
def test_layouts_of_imagenet(tmp_path: Path, annotations: str, images: str) -> None:
    xml = tmp_path / annotations / "n01/n01_7.xml"
    xml.parent.mkdir(parents=True)
    xml.write_text(XML)
    write_image(tmp_path / images / "n01/n01_7.png")
    (tmp_path / images / "n01/n01_7.png").rename(tmp_path / images / "n01/n01_7.JPEG")
    source = image_sets.read_source(categories.IMAGENET, tmp_path / annotations)
    target = categories.Target("mine", (Category(1, "fish"),), {"imagenet": {"n01": "fish"}})
    dataset, (report,) = image_sets.merge_sources(target, [source], tmp_path / "out")
    assert (report.images, report.missing) == (1, ())
    path = tmp_path / "out/train_image.json"
    write_coco(path, dataset)
    stills = CocoImages(path, None, SMALL_FRAMES)
    assert stills.sample(0, np.random.default_rng(0)).key.targets.supervision[0].value == "box"
    assert check_stills(path, None).findings == ()
