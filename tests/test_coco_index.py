"""The index of a COCO file: compiled reader against twin, kept copies, faults, shared text."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmvis_core.errors import DataError
from pmvis_core.files import canonical_json, write_json
from pmvis_core.formats import coco, coco_index, coco_tables
from pmvis_core.formats.coco import as_coco, from_coco, segmentation_value, write_coco
from pmvis_core.formats.coco_index import (
    BOX,
    HOLLOW,
    POLYGONS,
    RUNS,
    CocoIndex,
    as_dataset,
    open_index,
)

POLYGON = [[1.0, 1, 4, 1, 4, 3.25], [0, 0, 1, 1]]
RLE = {"size": [4, 5], "counts": [3, 4, 13]}


@pytest.fixture(params=["compiled", "twin"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with each of the readers."""
    if request.param == "twin":
        monkeypatch.setattr(coco_tables, "load_library", lambda: (None, "off"))
    elif coco_tables.load_library()[0] is None:
        pytest.skip("`_data.so` was not built")
    return str(request.param)


def value(**changes: Any) -> dict[str, Any]:
    """Return a small file whose annotations jump between its images."""
    size = {"height": 4, "width": 5}
    rows = [
        {"image_id": 9, "segmentation": POLYGON},
        {"image_id": 7, "segmentation": RLE, "iscrowd": 1},
        {"image_id": 9, "segmentation": [[1, 2, 3, 4]], "area": 3},
        {"image_id": 9},
        {"image_id": 7, "segmentation": []},
    ]
    return {
        "info": {"x": [1, {"images": "]}"}]},
        "annotations": [
            {"id": 10 + i, "category_id": 3, "bbox": [0, 1, 2.5, 2], "iscrowd": 0, **row}
            for i, row in enumerate(rows)
        ],
        "images": [
            {"id": 7, "file_name": "é/\\u00fc.jpg", "source": "coco", **size},
            {"id": 9, "file_name": 'a "b".jpg', "extra": None, **size},
            {"id": 8, "file_name": "c.jpg", "source": None, **size},
        ],
        "categories": [{"id": 3, "name": "Käse"}],
        **changes,
    }


def write(folder: Path, document: Any, **how: Any) -> Path:
    path = folder / "x.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document, **how))
    return path


def assert_equal(a: CocoIndex, b: CocoIndex) -> None:
    for name in ("images", "annotations", "first"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.names, a.sources, a.categories) == (b.names, b.sources, b.categories)


@pytest.mark.parametrize("how", [{}, {"indent": 2}, {"ensure_ascii": False}])
def test_tables_and_places(reader: str, tmp_path: Path, how: dict[str, Any]) -> None:
    index = open_index(write(tmp_path, value(), **how))
    assert index.names == ("é/\\u00fc.jpg", 'a "b".jpg', "c.jpg")
    assert [index.source(row) for row in range(3)] == ["coco", None, None]
    assert index.first.tolist() == [0, 2, 5, 5]
    assert index.annotations["id"].tolist() == [11, 14, 10, 12, 13]
    assert index.annotations["kind"].tolist() == [RUNS, BOX, POLYGONS, HOLLOW, BOX]
    assert index.annotations["crowd"].tolist() == [True, False, False, False, False]
    assert index.annotations["area"].tolist() == [5, 5, 5, 3, 5]
    assert index.annotations["image_row"].tolist() == [0, 0, 1, 1, 1]
    found = [index.segmentation(row) for row in index.annotations]
    assert found == [RLE, None, POLYGON, [[1, 2, 3, 4]], None]


NUMBER = st.integers(-5, 700) | st.floats(-10, 700, allow_nan=False)
PART = st.lists(NUMBER, max_size=8)
ROW = st.fixed_dictionaries(
    {
        "image_id": st.sampled_from([7, 8, 9]),
        "category_id": st.just(3),
        "bbox": st.lists(NUMBER, min_size=4, max_size=4),
    },
    optional={
        "segmentation": st.none() | st.lists(PART | st.none(), max_size=3) | st.just(RLE),
        "area": NUMBER | st.none(),
        "iscrowd": st.sampled_from([0, 1, True, False, None]),
        "more": st.text(max_size=3) | st.just({"segmentation": [[1]]}),
    },
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(ROW, max_size=5))
def test_the_compiled_reader_equals_its_twin(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    if coco_tables.load_library()[0] is None:
        pytest.skip("`_data.so` was not built")
    numbered = [{**row, "id": i} for i, row in enumerate(rows)]
    path = write(tmp_path_factory.mktemp("x"), value(annotations=numbered))
    outcomes: list[CocoIndex | str] = []
    for twin in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if twin:
                patch.setattr(coco_tables, "load_library", lambda: (None, "off"))
            try:
                outcomes.append(open_index(path))
            except DataError as error:
                outcomes.append(error.message)
    one, other = outcomes
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
    else:
        assert_equal(one, other)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("", "is empty"),
        ("{", "not valid JSON at line 1, column 2"),
        ('{"info": [1, 2', "not valid JSON at line 1"),
        ('{"images": [] "x": 1}', "Expecting ',' delimiter"),
        ('{"images": []} x', "Extra data"),
        ("[" * 100_000, "no JSON that a program can hold|not valid JSON"),
        ('{"images": [], "annotations": [NaN]}', "holds `NaN`"),
        ("[]", "no COCO instances JSON"),
        ('{"images": {}, "annotations": [], "categories": []}', "no COCO instances JSON"),
        ('{"images": [], "annotations": []}', "no COCO instances JSON"),
        ('{"images": [], "images": []}', "has two lists called `images`"),
    ],
)
def test_what_is_no_coco_json(reader: str, tmp_path: Path, document: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_index(write(tmp_path, document))


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("images", {"id": "7"}, r"images\[0\]: id is '7'"),
        ("images", {"id": 1 << 70}, "more than 64 bits"),
        ("images", {"id": 9}, "image id 9 occurs a second time"),
        ("images", {"height": 0}, "expected positive"),
        ("images", {"file_name": "a\0b"}, "no file can be called"),
        ("images", {"file_name": "\ud800"}, "no file can be called"),
        ("annotations", {"id": 12}, "annotation id 12 occurs a second time"),
        ("annotations", {"image_id": 4}, "annotation 10 is of image 4, not listed"),
        ("annotations", {"category_id": 4}, "annotation 10 has category id 4, not listed"),
        ("annotations", {"bbox": [1, 2, 3]}, "bbox is"),
        ("annotations", {"bbox": [1, 2, 3, 1e999]}, "bbox is|holds"),
        ("annotations", {"segmentation": [[1, 2, 3, "x"]]}, "annotation 10: a malformed polygon"),
        ("annotations", {"segmentation": {"size": [4, 4], "counts": "0"}}, "size is"),
        ("categories", {"name": 3}, "name is 3"),
    ],
)
def test_faults_are_named(
    reader: str, tmp_path: Path, section: str, change: dict[str, Any], message: str
) -> None:
    document = value()
    document[section][0].update(change)
    with pytest.raises(DataError, match=message):
        open_index(write(tmp_path, document))
    with pytest.raises(DataError, match="does not exist"):
        open_index(tmp_path / "absent.json")


def test_what_is_no_utf8(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(json.dumps(value()).encode().replace(b"c.jpg", b"\xff.jpg"))
    with pytest.raises(DataError, match="cannot be read as text"):
        open_index(path)


def kept(path: Path) -> Path:
    return path.with_name(f".{path.name}.index")


def test_a_kept_index_is_used_and_shared(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, value())
    first = open_index(path, worth_keeping=1)
    assert kept(path).is_file()
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []
    monkeypatch.setattr(coco_index, "read_tables", lambda *_: pytest.fail("read again"))
    again = open_index(path, worth_keeping=1)
    assert_equal(first, again)
    assert not again.annotations.flags.writeable  # mapped, not copied
    assert again.segmentation(again.annotations[2]) == POLYGON
    copy = pickle.loads(pickle.dumps(again.text))
    row = again.annotations[2]
    assert copy.read(int(row["begin"]), int(row["end"])) == again.segmentation_text(row)


@pytest.mark.parametrize("damage", ["cut", "bit", "format", "empty", "other", "noise"])
def test_a_damaged_or_stale_index_is_made_again(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, value())
    expected = open_index(path, worth_keeping=1)
    sound = kept(path).read_bytes()
    changed = {
        "cut": sound[:-70],
        "bit": sound[:-70] + bytes([sound[-70] ^ 1]) + sound[-69:],
        "format": sound.replace(b'"format": 1', b'"format": 0'),
        "empty": b"",
        "other": sound.replace(expected.digest.encode(), b"0" * 16),
        "noise": os.urandom(1000),
    }[damage]
    assert changed != sound
    kept(path).unlink()  # it is mapped: a file that shrinks under a map ends the process
    kept(path).write_bytes(changed)
    assert_equal(open_index(path, worth_keeping=1), expected)
    assert kept(path).read_bytes() == sound
    state = path.stat()
    path.write_text(path.read_text().replace("c.jpg", "d.jpg"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # same size and time, other content
    assert open_index(path, worth_keeping=1).names[2] == "d.jpg"


@pytest.mark.parametrize(
    ("column", "number"), [("end", 1 << 40), ("begin", -1), ("image_row", 99), ("kind", 9)]
)
def test_an_index_that_was_not_made_of_the_file(tmp_path: Path, column: str, number: int) -> None:
    path = write(tmp_path, value())
    expected = open_index(path, worth_keeping=1)
    rows = expected.annotations.copy()
    rows[column][-1] = number
    kept(path).unlink()
    assert coco_index._keep(kept(path), dataclasses.replace(expected, annotations=rows))
    assert_equal(open_index(path, worth_keeping=1), expected)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path, value())
    kept(path).mkdir()  # also for root, to whom every folder is writable
    expected = open_index(path, worth_keeping=1)
    (place,) = (tmp_path / "cache/pmvis").iterdir()
    assert place.name.startswith("x.json-") and stat.S_IMODE(place.stat().st_mode) == 0o644
    assert_equal(open_index(path, worth_keeping=1), expected)
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file: nothing can be kept anywhere
    assert_equal(open_index(path, worth_keeping=1), expected)


def test_small_files_leave_nothing_behind(tmp_path: Path) -> None:
    path = write(tmp_path, value())
    open_index(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, value())
    index = open_index(path)
    path.write_text(" " + path.read_text())
    with pytest.raises(DataError, match="was changed while it was in use"):
        index.segmentation(index.annotations[2])
    opened_later = pickle.loads(pickle.dumps(index.text))
    with pytest.raises(DataError, match="was changed while it was in use"):
        opened_later.read(0, 1)


def test_a_data_set_with_masks_left_in_their_file(reader: str, tmp_path: Path) -> None:
    document = value()
    whole = from_coco(document, "x")
    dataset = as_dataset(open_index(write(tmp_path, document)))
    assert as_coco(dataset) == as_coco(whole)
    found = [row.segmentation for row in dataset.annotations]
    assert [None if x is None else segmentation_value(x) for x in found][:2] == [POLYGON, RLE]
    one, other, plain = (tmp_path / name for name in ("one.json", "other.json", "plain.json"))
    write_coco(one, dataset, "d")
    assert json.loads(one.read_text()) == as_coco(whole, "d")
    write_coco(other, whole, "d")
    write_json(plain, as_coco(whole, "d"))
    assert other.read_text() == plain.read_text()
    assert canonical_json(json.loads(one.read_text())) == canonical_json(as_coco(dataset, "d"))
    empty = coco.CocoDataset(whole.categories, (), ())
    write_coco(one, empty)
    assert json.loads(one.read_text()) == as_coco(empty)
