"""Files appear whole or not at all; the same value gives the same bytes; bad JSON is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmvis_core import files
from pmvis_core.errors import DataError, ResourceError

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abcdeß", max_size=4), inner),
    max_leaves=12,
)


@given(JSON_VALUES)
def test_canonical_json_round_trips_on_one_line(value: Any) -> None:
    text = files.canonical_json(value)
    assert "\n" not in text
    assert files.parse_json(text, "here") == value
    assert files.canonical_json(files.parse_json(text, "here")) == text


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert files.canonical_json({"b": 1, "a": 2}) == files.canonical_json({"a": 2, "b": 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_canonical_json_refuses_what_is_no_number(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.canonical_json({"score": value})


def test_atomic_write_leaves_no_part_behind(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "a.json"
    files.write_json(target, {"a": 1})
    assert target.read_text() == '{"a":1}\n'
    assert [path.name for path in target.parent.iterdir()] == ["a.json"]


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), files.atomic_write(target) as stream:
        stream.write("half of the new")
        raise RuntimeError
    assert target.read_text() == "old"
    assert files.part_path(target).read_text() == "half of the new"


@pytest.mark.parametrize("name", ["file/inside", "folder"])
def test_a_place_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError, match="cannot write"):
        files.write_json(tmp_path / name, {})
    assert not (tmp_path / "folder.part").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b'{"a": 1', "line 1, column"),
        (b'{"a": NaN}', "holds `NaN`"),
        (b'{"a": -Infinity}', "holds `-Infinity`"),
        (b"\xff\xfe", "cannot be read as text"),
        (b"[" * 100_000, "no JSON that a program can hold"),
        (b"1" * 10_000, "no JSON that a program can hold"),
    ],
)
def test_read_json_names_the_fault(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "gt.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        files.read_json(path, "ground truth")
    assert "ground truth" in caught.value.message
    assert str(path) in caught.value.message


def test_read_json_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        files.read_json(tmp_path / "none.json", "ground truth")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_significant_is_idempotent_and_near(value: float) -> None:
    once = files.significant(value)
    assert files.significant(once) == once
    assert abs(once - value) <= 5.1e-6 * abs(value) + 1e-320


def test_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    data = json.dumps(list(range(300_000))).encode()
    (tmp_path / "big").write_bytes(data)
    assert files.digest_file(tmp_path / "big") == files.digest_bytes(data)
    assert len(files.digest_bytes(b"")) == 16
