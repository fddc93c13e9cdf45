"""COCO JSON: round trips, box-only annotations, segmentations to RLE, every fault named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as pycoco

from pmvis_core import masks
from pmvis_core.errors import DataError
from pmvis_core.formats.coco import (
    CocoAnnotation,
    CocoDataset,
    CocoImage,
    StillVideos,
    as_coco,
    from_coco,
    is_coco,
    read_coco,
    segmentation_to_rle,
)
from pmvis_core.types import Category, Supervision

VALUE: dict[str, Any] = {
    "categories": [{"id": 3, "name": "car"}],
    "images": [{"id": 7, "file_name": "a.jpg", "height": 4, "width": 5}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 1, 2, 2.5], "iscrowd": 1},
        {"id": 2, "image_id": 7, "category_id": 3, "bbox": [0, 1, 2, 2], "segmentation": []},
    ],
}
NUMBERS = st.floats(0, 1e6, allow_nan=False)


@st.composite
def datasets(draw: st.DrawFn) -> CocoDataset:
    """Draw a data set that is whole."""
    categories = tuple(Category(i * 2 + 1, f"c{i}") for i in range(draw(st.integers(1, 3))))
    images = tuple(
        CocoImage(
            i * 5, f"{i}.jpg", draw(st.integers(1, 99)), 7, draw(st.sampled_from([None, "x"]))
        )
        for i in range(draw(st.integers(1, 3)))
    )
    rows = tuple(
        CocoAnnotation(
            id=i,
            image_id=draw(st.sampled_from(images)).id,
            category_id=draw(st.sampled_from(categories)).id,
            bbox=tuple(draw(st.lists(NUMBERS, min_size=4, max_size=4))),
            area=draw(NUMBERS),
            segmentation=draw(
                st.none()
                | st.lists(st.lists(NUMBERS, min_size=6, max_size=6), min_size=1, max_size=2)
            ),
            is_crowd=draw(st.booleans()),
        )
        for i in range(draw(st.integers(0, 4)))
    )
    return CocoDataset(categories, images, rows)


@given(datasets())
def test_round_trip(dataset: CocoDataset) -> None:
    assert from_coco(json.loads(json.dumps(as_coco(dataset))), "x.json") == dataset


def test_an_empty_segmentation_is_none() -> None:
    dataset = from_coco(VALUE, "x.json")
    assert [row.segmentation for row in dataset.annotations] == [None, None]
    assert all("segmentation" not in row for row in as_coco(dataset)["annotations"])
    assert dataset.annotations[0].area == 5.0
    assert dataset.annotations[0].is_crowd


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (("images", 0), {"id": "7"}, r"images\[0\]: id is '7', expected an integer"),
        (("images", 0), {"height": 0}, "size 5x0, expected positive"),
        (("images", 0), {"height": None}, "height is None"),
        (("images", 0), {"file_name": ""}, "file_name is ''"),
        (("annotations", 0), {"image_id": 8}, "annotation 1 is of image 8, not listed"),
        (("annotations", 1), {"category_id": 4}, "annotation 2 has category id 4, not listed"),
        (("annotations", 1), {"id": 1}, "annotation id 1 occurs a second time"),
        (("annotations", 0), {"bbox": [1, 2, 3]}, r"annotations\[0\]: bbox is \[1, 2, 3\]"),
        (("annotations", 0), {"bbox": None}, "bbox is None"),
        (("annotations", 0), {"bbox": [1, 2, 3, float("inf")]}, "bbox is"),
        (("annotations", 0), {"bbox": [1, 2, 3, "4"]}, "bbox is"),
        (("annotations", 0), {"segmentation": "x"}, "segmentation is a str"),
        (("categories", 0), {"name": 3}, "name is 3, expected a name"),
    ],
)
def test_faults_are_named(place: tuple[str, int], change: dict[str, Any], message: str) -> None:
    value = copy.deepcopy(VALUE)
    value[place[0]][place[1]].update(change)
    with pytest.raises(DataError, match=message) as caught:
        from_coco(value, "x.json")
    assert caught.value.message.startswith("x.json: ")


@pytest.mark.parametrize("value", [[], 3, {}, {**VALUE, "images": {}}])
def test_what_is_no_coco_json(value: Any) -> None:
    with pytest.raises(DataError, match="no COCO instances JSON"):
        from_coco(value, "x.json")


def test_missing_fields_are_named() -> None:
    value = copy.deepcopy(VALUE)
    del value["annotations"][0]["bbox"]
    value["images"].append(3)
    with pytest.raises(DataError, match=r"images\[1\]: no `id`"):
        from_coco(value, "x.json")
    value["images"].pop()
    with pytest.raises(DataError, match=r"annotations\[0\]: no `bbox`"):
        from_coco(value, "x.json")


def test_a_duplicate_image(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**VALUE, "images": VALUE["images"] * 2}))
    with pytest.raises(DataError, match="image id 7 occurs a second time"):
        read_coco(path)


def test_all_forms_of_a_segmentation_are_one_mask() -> None:
    mask = np.zeros((4, 5), np.uint8)
    mask[1:3, 1:4] = 1
    rle = masks.encode(mask)
    runs = [5, 2, 2, 2, 2, 2, 5]
    polygon = [[1, 1, 4, 1, 4, 3, 1, 3]]
    forms = [rle, {**rle, "counts": rle["counts"].encode()}, {"size": [4, 5], "counts": runs}]
    for form in (*forms, polygon):
        found = segmentation_to_rle(form, 4, 5, "x")
        assert masks.decode(found).tolist() == mask.tolist()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [5, 4], "counts": "0"}, r"size is \[5, 4\], the image's \[4, 5\]"),
        ({"size": [4, 5], "counts": "0"}, "x: "),
        ({"size": [4, 5], "counts": [3, 4]}, "RLE"),
        ({"size": [4, 5]}, "x: "),
        ([[1, 1, 2, 2]], "a polygon of 4 numbers"),
        ([[1, 1, 2, 2, 3]], "a polygon of 5 numbers"),
        ([[1, 1, 2, 2, 3, float("nan")]], "a polygon of 6 numbers"),
    ],
)
def test_broken_segmentations(segmentation: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        segmentation_to_rle(segmentation, 4, 5, "x")


def test_real_files(shared: Path) -> None:
    images = shared / "real" / "images"
    train, boxes = (read_coco(images / f"{n}.json") for n in ("instances_train", "boxonly"))
    assert (len(train.images), len(train.annotations)) == (228, 1646)
    assert (len(boxes.images), len(boxes.annotations)) == (28, 188)
    assert all(row.segmentation is None for row in boxes.annotations)
    sizes = {image.id: image for image in train.images}
    for row in train.annotations[:300]:
        image = sizes[row.image_id]
        found = segmentation_to_rle(row.segmentation, image.height, image.width, "x")
        whole = image.height, image.width
        wanted = row.segmentation
        if isinstance(wanted, list) or isinstance(wanted["counts"], list):
            wanted = pycoco.frPyObjects(wanted, *whole)
        merged = pycoco.merge(wanted) if isinstance(wanted, list) else wanted
        counts = merged["counts"]
        assert found["counts"] == (counts.decode() if isinstance(counts, bytes) else counts)


def test_stills_become_videos_of_one_frame() -> None:
    square = [[0, 0, 2, 0, 2, 2, 0, 2]]
    rows = [
        {"id": 4, "image_id": 7, "category_id": 3, "bbox": [0, 0, 2, 2], "segmentation": square},
        {"id": 9, "image_id": 7, "category_id": 3, "bbox": [0, 0, 2, 2], "iscrowd": 1,
         "segmentation": {"size": [4, 5], "counts": [0, 20]}},
    ]  # fmt: skip
    images = [{"id": 8, "file_name": "b/c.png", "height": 2, "width": 2}, VALUE["images"][0]]
    value = {**VALUE, "images": images, "annotations": rows}
    stills = StillVideos("x", from_coco(value, "x"))
    empty, full = list(stills)
    assert stills.header.categories == (Category(3, "car"),)
    assert (empty.video.name, empty.video.file_names, empty.tracks) == ("c", ("b/c.png",), ())
    (track,), (crowd,) = full.tracks, full.ignored
    assert (full.video.id, full.video.length, track.id, crowd.id) == (7, 1, 4, 9)
    assert (track.score, track.supervision) == (1.0, Supervision.MASK)
    assert track.rles[0] is not None
    assert masks.decode(track.rles[0])[:2, :2].all()
    assert masks.area(track.rles[0]) == 4


def test_stills_without_masks_are_no_videos() -> None:
    with pytest.raises(DataError, match="x: annotation 1 has no mask"):
        list(StillVideos("x", from_coco(VALUE, "x")))


def test_coco_is_told_from_youtube_vis() -> None:
    assert is_coco(VALUE)
    assert not is_coco({**VALUE, "videos": []})
    assert not is_coco([])
