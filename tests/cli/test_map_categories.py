"""`pmvis map-categories`: its two files, Table I, what it names on stderr, and its exit codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pmvis_core.formats.coco import read_coco

Run = Callable[..., Any]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Write a COCO-like data set: skis, a snowboard, a dog, a toothbrush."""
    names = {35: "skis", 36: "snowboard", 18: "dog", 90: "toothbrush"}
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    images, rows = [], []
    for number, category in enumerate(names, start=1):
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 10, "width": 12})
        (tmp_path / "coco" / "train2017" / f"{number}.jpg").write_bytes(b"")
        rows.append(
            {
                "id": number,
                "image_id": number,
                "category_id": category,
                "bbox": [1, 1, 5, 5],
                "area": 12.5,
                "iscrowd": 0,
                "segmentation": [[1, 1, 6, 1, 6, 6]],
            }
        )
    value = {
        "categories": [{"id": key, "name": name} for key, name in names.items()],
        "images": images,
        "annotations": rows,
    }
    path = tmp_path / "coco" / "instances.json"
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    """Write an ImageNet-like folder: one fox, one picture that is missing."""
    for number in (1, 2):
        place = tmp_path / "in" / "Annotations" / "n02118333" / f"n02118333_{number}.xml"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(
            f"<annotation><filename>n02118333_{number}</filename><size><width>12</width>"
            "<height>10</height></size><object><name>n02118333</name><bndbox><xmin>2</xmin>"
            "<ymin>3</ymin><xmax>5</xmax><ymax>9</ymax></bndbox></object></annotation>"
        )
    image = tmp_path / "in" / "images" / "n02118333" / "n02118333_1.JPEG"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"")
    return tmp_path / "in" / "Annotations"


def test_both_sources(pmvis: Run, tmp_path: Path, coco: Path, boxes: Path) -> None:
    out = tmp_path / "out"
    done = pmvis(
        "map-categories",
        "--target",
        "ytvis2019",
        "--coco",
        coco,
        "--imagenet-bbox",
        boxes,
        "-o",
        out,
    )
    assert done.code == 0, done.err
    rows = {
        cells[0]: cells[1:]
        for line in done.out.splitlines()
        if len(cells := [cell.strip() for cell in line.split("│")[1:-1]]) == 5
    }
    assert rows["COCO"] == ["3 / 2", "3", "3", "0"]
    assert rows["ImageNet-bbox"] == ["1 / 1", "1", "1", "1"]
    assert rows["total"] == ["4 / 3", "4", "4", "1"]
    for text in (
        "skis + snowboard -> snowboard (many to one)",
        "without a target: toothbrush",
        "1 images are missing",
        "n02118333/n02118333_2",
        "37 of 40 target categories",
    ):
        assert text in done.err
    dataset = read_coco(out / "train_image.json")
    assert [image.source for image in dataset.images] == ["coco"] * 3 + ["imagenet"]
    assert [row.segmentation is None for row in dataset.annotations] == [False] * 3 + [True]
    assert [row.category_id for row in dataset.annotations] == [33, 33, 8, 24]
    assert all((out / image.file_name).exists() for image in dataset.images)
    rows_json = json.loads((out / "train_image.json").read_text())["annotations"]
    assert "segmentation" not in rows_json[3]


def test_categories_file(pmvis: Run, tmp_path: Path, coco: Path, boxes: Path) -> None:
    out = tmp_path / "out"
    words = ["map-categories", "--target", "ytvis2019", "--coco", coco, "--imagenet-bbox", boxes]
    done = pmvis(*words, "-o", out, "--json")
    summary = json.loads((out / "categories.json").read_text())
    assert json.loads(done.out) == summary
    assert summary["target"] == "ytvis2019"
    assert len(summary["categories"]) == 40
    assert summary["sources"]["coco"]["many_to_one"] == {"snowboard": ["skis", "snowboard"]}
    assert summary["sources"]["coco"]["unmatched"] == [{"id": 90, "name": "toothbrush"}]
    assert summary["sources"]["imagenet"]["map"] == [
        {"id": 1, "name": "n02118333", "target_id": 24}
    ]
    assert len(summary["sources"]["imagenet"]["digest"]) == 16
    assert "fox" not in summary["without_source"]
    assert str(tmp_path) not in (out / "categories.json").read_text()


def test_the_same_inputs_give_the_same_bytes(pmvis: Run, tmp_path: Path, coco: Path) -> None:
    files = []
    for name in ("a", "b"):
        assert (
            pmvis("map-categories", "--target", "ovis", "--coco", coco, "-o", tmp_path / name).code
            == 0
        )
        files.append(
            [(tmp_path / name / f).read_bytes() for f in ("categories.json", "train_image.json")]
        )
    assert files[0] == files[1]


def test_hidden_masks(pmvis: Run, tmp_path: Path, coco: Path, boxes: Path) -> None:
    words = ["map-categories", "--target", "ytvis2019", "--coco", coco, "--imagenet-bbox", boxes]
    done = pmvis(*words, "--hide-masks", "2", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "1 images of COCO are box-only: their masks were hidden" in done.out
    rows = read_coco(tmp_path / "out" / "train_image.json").annotations
    # pictures 2 and 4 of four lose their masks, and the toothbrush of picture 4 has no target
    assert [row.segmentation is None for row in rows] == [False, True, False, True]
    assert [row.area for row in rows[:3]] == [12.5, 25, 12.5]
    sources = json.loads((tmp_path / "out" / "categories.json").read_text())["sources"]
    assert [sources[kind]["hidden_mask_images"] for kind in ("coco", "imagenet")] == [1, 0]
    plain = pmvis(*words, "-o", tmp_path / "plain")
    assert "hidden" not in plain.out


def test_strict(pmvis: Run, tmp_path: Path, coco: Path) -> None:
    words = ["map-categories", "--coco", coco, "--strict"]
    done = pmvis(*words, "--target", "ytvis2019", "-o", tmp_path / "a")
    assert done.code == 1
    assert "error: 38 of 40 target categories have no annotation: person" in done.err
    assert (tmp_path / "a" / "train_image.json").exists()
    target = tmp_path / "t.json"
    target.write_text(json.dumps({"categories": ["dog", "skis"]}))
    assert pmvis(*words, "--target", target, "-o", tmp_path / "b").code == 0


def test_custom_suggests(pmvis: Run, tmp_path: Path, coco: Path) -> None:
    target = tmp_path / "t.json"
    target.write_text(
        json.dumps({"categories": ["Dogs", "toothbrushs", "sea_ski"], "coco": {"dog": "Dogs"}})
    )
    done = pmvis(
        "map-categories", "--custom", "--target", target, "--coco", coco, "-o", tmp_path / "out"
    )
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "out" / "categories.json").read_text())
    assert {row["name"] for row in summary["sources"]["coco"]["map"]} == {"dog", "toothbrush"}
    plain = pmvis("map-categories", "--target", target, "--coco", coco, "-o", tmp_path / "two")
    assert "3 categories without a target" in plain.err
    assert "is near" not in plain.err


def test_a_source_that_maps_to_nothing(pmvis: Run, tmp_path: Path, coco: Path) -> None:
    done = pmvis(
        "map-categories", "--target", "ytvis2019", "--imagenet-bbox", coco, "-o", tmp_path / "out"
    )
    assert done.code == 0
    assert "not one category maps to the target; try `--custom`" in done.err


def test_outputs_are_not_overwritten_by_accident(pmvis: Run, tmp_path: Path, coco: Path) -> None:
    words = ["map-categories", "--target", "ovis", "--coco", coco, "-o", tmp_path / "out"]
    assert pmvis(*words).code == 0
    done = pmvis(*words)
    assert done.code == 2
    assert "already holds `categories.json`" in done.err
    assert "--overwrite" in done.err
    assert pmvis(*words, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--target", "ovis"], 2, "no source given"),
        (["--target", "ytvis20", "--coco", "x"], 2, "Did you mean `ytvis2021`"),
        (["--target", "ovis", "--coco", "none.json"], 3, "`none.json` does not exist"),
    ],
)
def test_bad_options(pmvis: Run, tmp_path: Path, words: list[str], code: int, message: str) -> None:
    done = pmvis("map-categories", *words, "-o", tmp_path / "out")
    assert done.code == code
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_bad_data(pmvis: Run, tmp_path: Path, coco: Path, boxes: Path) -> None:
    def run(*words: Any) -> Any:
        return pmvis("map-categories", "--target", "ytvis2019", "-o", tmp_path / "out", *words)

    value = json.loads(coco.read_text())
    value["annotations"][0]["category_id"] = 77
    coco.write_text(json.dumps(value))
    done = run("--coco", coco)
    assert (done.code, "annotation 1 has category id 77, not listed" in done.err) == (3, True)
    xml = next(boxes.rglob("*_2.xml"))
    xml.write_text("<annotation>")
    done = run("--imagenet-bbox", boxes)
    assert (done.code, f"`{xml}` is not valid XML" in done.err) == (3, True)
    xml.unlink()
    shutil.rmtree(boxes.parent / "images")
    done = run("--imagenet-bbox", boxes)
    assert (done.code, "give their folder with `--imagenet-images`" in done.err) == (3, True)
    assert not (tmp_path / "out").exists()


def test_real_images(pmvis: Run, shared: Path, tmp_path: Path) -> None:
    images = shared / "real" / "images"
    target = tmp_path / "coco.json"
    categories = json.loads((images / "instances_train.json").read_text())["categories"]
    target.write_text(json.dumps({"categories": categories}))
    done = pmvis(
        "map-categories",
        "--target",
        target,
        "--coco",
        images / "instances_train.json",
        "--imagenet-bbox",
        images / "boxonly.json",
        "-o",
        tmp_path / "out",
        "--json",
    )
    assert done.code == 0, done.err
    sources = json.loads(done.out)["sources"]
    assert (sources["coco"]["images"], sources["imagenet"]["images"]) == (
        226,
        28,
    )  # two pictures hold nothing
    assert sources["imagenet"]["annotations"] == 188
    dataset = read_coco(tmp_path / "out" / "train_image.json")
    assert all((tmp_path / "out" / image.file_name).is_file() for image in dataset.images)
