"""ImageNet-bbox XML: the pixel convention, clipping, layouts, and files that lie."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmvis_core.errors import DataError
from pmvis_core.formats.voc import corners_to_bbox, parse_voc, read_voc


def xml(
    box: tuple[object, ...] = (2, 3, 5, 9),
    *,
    name: str = "n02118333",
    size: tuple[object, object] = (12, 10),
    filename: str = "n02118333_7",
) -> str:
    """Return an annotation with one object."""
    edges = "".join(
        f"<{key}>{value}</{key}>"
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return (
        f"<annotation><folder>n02118333</folder><filename>{filename}</filename>"
        f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
        f"<object><name>{name}</name><bndbox>{edges}</bndbox></object></annotation>"
    )


@given(st.data(), st.integers(1, 40), st.integers(1, 40))
def test_corners_hold_their_pixels(data: st.DataObject, height: int, width: int) -> None:
    xmin, ymin = data.draw(st.integers(1, width)), data.draw(st.integers(1, height))
    xmax, ymax = data.draw(st.integers(xmin, width)), data.draw(st.integers(ymin, height))
    box = corners_to_bbox((xmin, ymin, xmax, ymax), height, width)
    assert box is not None
    x, y, w, h = box
    inside = {
        (i, j) for i in range(width) for j in range(height) if x <= i < x + w and y <= j < y + h
    }
    named = {(i - 1, j - 1) for i in range(xmin, xmax + 1) for j in range(ymin, ymax + 1)}
    assert inside == named


@pytest.mark.parametrize(
    ("corners", "expected"),
    [
        ((0, 0, 5, 5), (0, 0, 5, 5)),
        ((1, 1, 99, 99), (0, 0, 12, 10)),
        ((5, 5, 4, 9), None),
        ((13, 1, 20, 5), None),
        ((5, 5, 5, 5), (4, 4, 1, 1)),
    ],
)
def test_boxes_are_clipped_to_the_picture(
    corners: tuple[float, float, float, float], expected: object
) -> None:
    assert corners_to_bbox(corners, 10, 12) == expected


def test_a_folder_in_the_order_of_its_paths(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for place, text in {
        "b/2.xml": xml(name="n02", filename="2"),
        "a/1.xml": xml(name="n01", filename="1"),
        "flat.xml": xml((9, 9, 2, 2), name="n03", filename="flat.jpg"),
    }.items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(text)
    with caplog.at_level(logging.WARNING):
        dataset = read_voc(tmp_path)
    assert [image.file_name for image in dataset.images] == ["a/1", "b/2", "n02118333/flat.jpg"]
    assert [(c.id, c.name) for c in dataset.categories] == [(1, "n01"), (2, "n02"), (3, "n03")]
    assert [(a.image_id, a.category_id) for a in dataset.annotations] == [(1, 1), (2, 2)]
    assert dataset.annotations[0].segmentation is None
    assert dataset.annotations[0].area == 4 * 7
    assert "1 boxes without area" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid XML"),
        ("<annotation>", "not valid XML"),
        ("\x80\x04pickle", "not valid XML"),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "not valid XML"),
        ("<annotation/>", "<annotation> has no <filename>"),
        (xml().replace("<size>", "<dimensions>").replace("</size>", "</dimensions>"), "size/"),
        (xml(size=(0, 10)), "<size/width> is `0`"),
        (xml(size=("wide", 10)), "<size/width> is `wide`"),
        (xml((1, 2, "x", 4)), "<bndbox/xmax> is `x`"),
        (xml((1, 2, "inf", 4)), "<bndbox/xmax> is `inf`"),
        (xml((1, 2, "", 4)), "<object> has no <bndbox/xmax>"),
        (xml(name=""), "<object> has no <name>"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "declares a document type"),
    ],
)
def test_faults_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "n1_1.xml"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        parse_voc(path)
    assert str(path) in caught.value.message


def test_entities_never_expand(tmp_path: Path) -> None:
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    path = tmp_path / "laughs.xml"
    path.write_text(f'<!DOCTYPE a [<!ENTITY e0 "ha">{entities}]><annotation>&e11;</annotation>')
    with pytest.raises(DataError, match="declares a document type"):
        read_voc(tmp_path)


def test_a_folder_without_xml(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no"):
        read_voc(tmp_path)
