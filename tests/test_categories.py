"""Vocabularies, the paper's maps and counts (Table I), matching by name, and the merged file."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pmvis_core import categories as cat
from pmvis_core import image_sets
from pmvis_core.errors import DataError, UsageError
from pmvis_core.formats.coco import as_coco, from_coco, segmentation_value
from pmvis_core.types import Category

TABLE_ONE = {
    "ytvis2019": (40, (21, 19), (21, 21)),
    "ytvis2021": (40, (23, 21), (19, 19)),
    "ovis": (25, (17, 15), (12, 10)),
}
"""Target -> categories, COCO classes, ImageNet-bbox classes, as the paper's Table I has them."""


def vocabulary(*names: str) -> list[Category]:
    return [Category(number, name) for number, name in enumerate(names, start=1)]


@pytest.mark.parametrize("name", cat.BUILTIN_TARGETS)
def test_class_counts_are_those_of_table_one(name: str) -> None:
    size, coco_counts, imagenet_counts = TABLE_ONE[name]
    target = cat.load_target(name)
    assert [category.id for category in target.categories] == list(range(1, size + 1))
    reached: set[int] = set()
    for source, counts in ((cat.COCO, coco_counts), (cat.IMAGENET, imagenet_counts)):
        everything = vocabulary(*target.maps[source], "toothbrush", "n99999999")
        matched = cat.match_source(target, source, everything)
        assert (matched.classes, matched.targets) == counts
        assert [u.category.name for u in matched.unmatched] == ["toothbrush", "n99999999"]
        assert not reached & set(matched.target_ids.values())
        reached |= set(matched.target_ids.values())
    assert cat.without_source(target, reached) == ()


@pytest.mark.parametrize("name", cat.BUILTIN_TARGETS)
def test_tables_equal_the_facts(shared: Path, name: str) -> None:
    facts = json.loads((shared / "facts" / "category_maps.json").read_text())[name]
    target = cat.load_target(name)
    assert [{"id": c.id, "name": c.name} for c in target.categories] == facts["categories"]
    assert target.maps == {"coco": facts["coco"], "imagenet": facts["imagenet"]}
    ids = {wordnet_id: target.id_of(n) for wordnet_id, n in target.maps["imagenet"].items()}
    assert ids == facts["imagenet_ids"]


def test_coco_ids_equal_the_facts(shared: Path) -> None:
    facts = json.loads((shared / "facts" / "category_maps.json").read_text())
    rows = json.loads((shared / "real" / "images" / "instances_train.json").read_text())
    coco = [Category(row["id"], row["name"]) for row in rows["categories"]]
    for name in cat.BUILTIN_TARGETS:
        matched = cat.match_source(cat.load_target(name), cat.COCO, coco)
        wanted = {int(key): value for key, value in facts[name]["coco_ids"].items()}
        assert matched.target_ids == wanted
        assert len(matched.unmatched) == 80 - len(wanted)


def test_many_to_one_is_named() -> None:
    target = cat.load_target("ytvis2019")
    matched = cat.match_source(target, cat.COCO, vocabulary("skis", "dog", "snowboard"))
    assert matched.many_to_one == {"snowboard": ("skis", "snowboard")}


def test_builtin_maps_go_by_name_and_not_by_id() -> None:
    matched = cat.match_source(cat.load_target("ytvis2019"), cat.COCO, [Category(1, "cat")])
    assert matched.target_ids == {1: 14}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("tennis_racket", "Tennis Rackets"),
        ("giant-panda", "GIANT  panda"),
        ("person", "people"),
        ("mouse", "Mice"),
        ("fox", "foxes"),
        ("pony", "ponies"),
        ("bus", "buses"),
        ("giraffe", "giraffes"),
        ("glass", "glasses"),
    ],
)
def test_names_that_are_the_same(one: str, other: str) -> None:
    assert cat.normalised(one) == cat.normalised(other)


@given(st.text(max_size=12))
@example("0:S")
def test_normalising_never_fails_and_has_no_case(name: str) -> None:
    text = cat.normalised(name)
    assert text == text.strip()
    assert "_" not in text


def test_matching_by_name_with_suggestions() -> None:
    target = cat.Target("mine", tuple(vocabulary("giant_panda", "Tennis Racket", "motorbike")))
    source = vocabulary("giant panda", "tennis_rackets", "panda", "motorcycle", "girafe")
    matched = cat.match_source(target, cat.COCO, source)
    assert matched.target_ids == {1: 1, 2: 2}
    near = {u.category.name: u.suggestions for u in matched.unmatched}
    assert near == {"panda": ("giant_panda",), "motorcycle": ("motorbike",), "girafe": ()}


def test_wordnet_ids_are_compared_by_their_names() -> None:
    target = cat.Target("mine", tuple(vocabulary("fox", "panda")))
    matched = cat.match_source(target, cat.IMAGENET, vocabulary("n02118333", "n02510455", "fox"))
    assert matched.target_ids == {1: 1, 3: 1}
    assert matched.unmatched[0].suggestions == ("panda",)


def test_custom_overrides_the_builtin_maps() -> None:
    target = cat.load_target("ytvis2019")
    source = vocabulary("giant panda", "car")
    assert cat.match_source(target, cat.COCO, source).target_ids == {2: 6}
    assert cat.match_source(target, cat.COCO, source, by_name=True).target_ids == {1: 2}


def test_names_that_cannot_be_told_apart() -> None:
    target = cat.Target("mine", tuple(vocabulary("bird", "Birds")))
    with pytest.raises(DataError, match="only in case, spaces or plural"):
        cat.match_source(target, cat.COCO, vocabulary("bird"))


JSON_TARGET = {
    "name": "farm",
    "categories": ["cow", {"id": 5, "name": "hen"}],
    "coco": {"cow": "cow", "16": "hen", "Wild Bull": "cow"},
}
TOML_TARGET = """
name = "farm"
categories = ["cow", {id = 5, name = "hen"}]
[coco]
cow = "cow"
16 = "hen"
"Wild Bull" = "cow"
"""


@pytest.mark.parametrize(
    ("name", "text"), [("t.json", json.dumps(JSON_TARGET)), ("t.toml", TOML_TARGET)]
)
def test_a_vocabulary_of_ones_own(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    target = cat.load_target(str(tmp_path / name))
    assert target.name == "farm"
    assert target.categories == (Category(1, "cow"), Category(5, "hen"))
    source = [
        Category(21, "cow"),
        Category(16, "bird"),
        Category(3, "wild_bulls"),
        Category(9, "x"),
    ]
    matched = cat.match_source(target, cat.COCO, source)
    assert matched.target_ids == {21: 1, 16: 5, 3: 1}
    assert matched.many_to_one == {"cow": ("cow", "wild_bulls")}
    # there is no map for this source, so its names are compared
    assert cat.match_source(target, cat.IMAGENET, vocabulary("Hens")).target_ids == {1: 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("[]", "expected a list `categories`"),
        ('{"categories": []}', "expected a list `categories`"),
        ('{"categories": [3]}', r"categories\[0\]: 3, expected a name"),
        ('{"categories": [{"id": 0, "name": "a"}]}', "a positive id and a name"),
        ('{"categories": ["a", "a"]}', "occurs twice"),
        ('{"categories": ["a", {"id": 1, "name": "b"}]}', "occurs twice"),
        ('{"categories": ["a"], "coco": ["b"]}', "coco: expected an object"),
        ('{"categories": ["tiger"], "coco": {"b": "tigre"}}', "`b` maps to `tigre`"),
    ],
)
def test_broken_vocabularies(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DataError, match=message):
        cat.load_target(str(tmp_path / "t.json"))


def test_broken_toml(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text("categories = [")
    with pytest.raises(DataError, match="not valid TOML"):
        cat.load_target(str(tmp_path / "t.toml"))


def test_an_unknown_target_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean `ytvis2019`"):
        cat.load_target("ytvis19")


# ---- the merged training file


POLYGON = [[1.0, 1.0, 6.0, 1.0, 6.0, 6.0]]


def coco_json() -> dict[str, Any]:
    """Return three pictures, of which the second is left empty by mapping and crowds."""

    def row(number: int, image: int, category: int, **more: Any) -> dict[str, Any]:
        base = {"id": number, "image_id": image, "category_id": category, "bbox": [1, 1, 5, 5]}
        return {**base, "area": 12.5, "iscrowd": 0, "segmentation": POLYGON, **more}

    return {
        "categories": [{"id": 18, "name": "dog"}, {"id": 90, "name": "toothbrush"}],
        "images": [
            {"id": i, "file_name": f"{i:04}.jpg", "height": 10, "width": 12} for i in (9, 5, 7)
        ],
        "annotations": [
            row(4, 9, 18),
            row(3, 5, 18),
            row(1, 7, 90),
            row(2, 7, 18, iscrowd=1),
            row(6, 5, 18, bbox=[1, 1, 0, 5]),
        ],
    }


def write_source(folder: Path, value: dict[str, Any], images: str = "train2017") -> Path:
    """Write COCO JSON into ``folder/annotations`` and (empty) pictures beside it."""
    path = folder / "annotations" / "instances.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(value))
    (folder / images).mkdir()
    for image in value["images"]:
        (folder / images / image["file_name"]).write_bytes(b"")
    return path


def merge(out: Path, *sources: image_sets.ImageSource, target: str = "ytvis2019") -> Any:
    """Merge sources and return the data set and the reports."""
    return image_sets.merge_sources(cat.load_target(target), sources, out)


def test_merging_remaps_drops_and_renumbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_source(tmp_path / "coco", coco_json())
    with caplog.at_level(logging.WARNING):
        dataset, reports = merge(tmp_path / "out", image_sets.read_source(cat.COCO, path))
    assert [(i.id, i.file_name, i.source) for i in dataset.images] == [
        (1, "../coco/train2017/0005.jpg", "coco"),
        (2, "../coco/train2017/0009.jpg", "coco"),
    ]
    assert [(a.id, a.image_id, a.category_id) for a in dataset.annotations] == [
        (1, 1, 8),
        (2, 2, 8),
    ]
    assert segmentation_value(dataset.annotations[0].segmentation) == POLYGON
    assert (reports[0].images, reports[0].annotations, reports[0].missing) == (2, 2, ())
    assert "1 boxes without area" in caplog.text


def test_boxes_only_sources_lose_their_masks(tmp_path: Path) -> None:
    path = write_source(tmp_path / "boxes", coco_json())
    source = image_sets.read_source(cat.IMAGENET, path)
    target = cat.Target("t", (Category(1, "dog"),))
    dataset, _ = image_sets.merge_sources(target, [source], tmp_path / "out")
    rows = as_coco(dataset)["annotations"]
    assert [("segmentation" in row, row["area"]) for row in rows] == [(False, 25), (False, 25)]


def test_ids_go_on_over_the_sources(tmp_path: Path) -> None:
    sources = [
        image_sets.read_source(cat.COCO, write_source(tmp_path / name, coco_json()))
        for name in ("a", "b")
    ]
    dataset, reports = merge(tmp_path / "out", *sources)
    assert [i.id for i in dataset.images] == [1, 2, 3, 4]
    assert [a.image_id for a in dataset.annotations] == [1, 2, 3, 4]
    value = as_coco(dataset)
    assert as_coco(from_coco(json.loads(json.dumps(value)), "x")) == value
    assert [report.images for report in reports] == [2, 2]


def test_missing_pictures_are_counted_named_and_skipped(tmp_path: Path) -> None:
    path = write_source(tmp_path / "coco", coco_json())
    (tmp_path / "coco" / "train2017" / "0005.jpg").unlink()
    dataset, reports = merge(tmp_path / "out", image_sets.read_source(cat.COCO, path))
    assert [i.file_name for i in dataset.images] == ["../coco/train2017/0009.jpg"]
    assert reports[0].missing == ("0005.jpg",)


def test_no_picture_at_all_is_a_fault(tmp_path: Path) -> None:
    path = write_source(tmp_path / "coco", coco_json())
    with pytest.raises(DataError, match="no picture of") as caught:
        merge(tmp_path, image_sets.read_source(cat.COCO, path, tmp_path / "elsewhere"))
    assert "--coco-images" in str(caught.value.hint)


@pytest.mark.parametrize(
    "place", ["annotations", "train2017", "train", "images", "images/train2017"]
)
def test_usual_places_of_pictures(tmp_path: Path, place: str) -> None:
    path = write_source(tmp_path, coco_json(), images="somewhere")
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for image in (tmp_path / "somewhere").iterdir():
        image.rename(tmp_path / place / image.name)
    dataset, _ = merge(tmp_path / "out", image_sets.read_source(cat.COCO, path))
    assert dataset.images[0].file_name == f"../{place}/0005.jpg"


def test_file_names_hold_behind_a_linked_output_folder(tmp_path: Path) -> None:
    path = write_source(tmp_path / "coco", coco_json())
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "deep" / "er")
    dataset, _ = merge(tmp_path / "out", image_sets.read_source(cat.COCO, path))
    assert os.path.exists(tmp_path / "out" / dataset.images[0].file_name)


def voc_folder(folder: Path, count: int = 2) -> Path:
    """Write ImageNet-like XML and pictures, and return the folder of XML."""
    for number in range(count):
        place = folder / "Annotations" / "n02118333" / f"n02118333_{number}.xml"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(
            f"<annotation><folder>n02118333</folder><filename>n02118333_{number}</filename>"
            "<size><width>12</width><height>10</height></size><object><name>n02118333</name>"
            "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>5</xmax><ymax>10</ymax></bndbox>"
            "</object></annotation>"
        )
        image = folder / "images" / "n02118333" / f"n02118333_{number}.JPEG"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(b"")
    return folder / "Annotations"


def test_imagenet_xml_finds_its_pictures(tmp_path: Path) -> None:
    source = image_sets.read_source(cat.IMAGENET, voc_folder(tmp_path / "in"))
    dataset, reports = merge(tmp_path / "out", source)
    assert dataset.images[1].file_name == "../in/images/n02118333/n02118333_1.JPEG"
    assert dataset.annotations[0].bbox == (1.0, 2.0, 4.0, 8.0)
    assert dataset.annotations[0].category_id == 24
    assert reports[0].as_json()["classes"] == 1


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    folder = voc_folder(tmp_path / "a")
    before = image_sets.read_source(cat.IMAGENET, folder).digest
    assert image_sets.read_source(cat.IMAGENET, voc_folder(tmp_path / "b")).digest == before
    xml = next(folder.rglob("*.xml"))
    xml.write_text(xml.read_text().replace("<xmin>2", "<xmin>1"))
    assert image_sets.read_source(cat.IMAGENET, folder).digest != before


def test_reports_hold_no_absolute_path(tmp_path: Path) -> None:
    path = write_source(tmp_path / "coco", coco_json())
    _, reports = merge(tmp_path / "out", image_sets.read_source(cat.COCO, path))
    assert str(tmp_path) not in json.dumps(reports[0].as_json())
    assert reports[0].as_json()["unmatched"] == [{"id": 90, "name": "toothbrush"}]
