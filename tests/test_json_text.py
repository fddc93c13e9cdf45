"""Walking through JSON: the same values as `json.loads`, at their places, whatever the window."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmvis_core.formats.json_text import JsonText, is_utf8

LEAF = st.none() | st.booleans() | st.integers() | st.text(max_size=9)
LEAF |= st.floats(allow_nan=False, allow_infinity=False)
LEAF |= st.sampled_from(['a"b\\', "é", "\U0001f600", "\ud800", 1e-7, -1.5e300, 0.0, -0.0])
VALUE = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)
WINDOW = st.none() | st.integers(1, 40)


def text_of(data: bytes, window: int | None = None) -> JsonText:
    return JsonText(lambda begin, end: data[begin:end], len(data), window_bytes=window)


def taken_apart(text: JsonText, data: bytes) -> Any:
    """Return the value at the cursor, read item by item, its places checked."""
    if text.peek() == "{":
        return {key: taken_apart(text, data) for key in text.members()}
    if text.peek() == "[":
        return [taken_apart(text, data) for _ in text.items()]
    begin = text.at
    value = text.value()
    assert repr(json.loads(data[begin : text.at])) == repr(value)
    return value


@settings(max_examples=100, deadline=None)
@given(VALUE, WINDOW, st.sampled_from([None, 2]))
def test_values_in_windows(value: Any, window: int | None, indent: int | None) -> None:
    data = json.dumps(value, indent=indent).encode()
    whole = text_of(data, window)
    assert repr(whole.value()) == repr(json.loads(data))
    assert whole.at_end()
    apart = text_of(data, window)
    assert repr(taken_apart(apart, data)) == repr(json.loads(data))
    assert apart.at_end()


@settings(max_examples=100, deadline=None)
@given(VALUE, WINDOW, st.data())
def test_what_is_no_json(value: Any, window: int | None, draw: st.DataObject) -> None:
    """A text is refused by whoever walks through it where `json.loads` refuses it."""
    sound = json.dumps(value)
    place = draw.draw(st.integers(0, len(sound)))
    length = draw.draw(st.integers(0, 3))
    put = draw.draw(st.text(alphabet='{}[]",:\\ 1.e-ntrue\n', max_size=2))
    data = (sound[:place] + put + sound[place + length :]).encode()
    try:
        json.loads(data)
        fine = True
    except ValueError:
        fine = False
    for walk in (lambda text: text.skip(), lambda text: taken_apart(text, data)):
        text = text_of(data, window)
        try:
            walk(text)
            assert text.at_end() == fine
        except ValueError:
            assert not fine


def test_text_beyond_ascii() -> None:
    data = json.dumps({"a": ["é", "\U0001f600"], "b": 1}, ensure_ascii=False).encode()
    assert text_of(data, 5).value() == {"a": ["é", "\U0001f600"], "b": 1}
    text = text_of(data, 5)
    assert [text.value() for _ in text.members()] == [["é", "\U0001f600"], 1]
    text.go(data.index(b"["))
    places = []
    for begin in text.items():
        text.skip()
        places.append(data[begin : text.at].decode())
    assert places == ['"é"', '"\U0001f600"']


def test_numbers_that_are_none() -> None:
    for token in (b"NaN", b"[Infinity]", b'{"a": -Infinity}'):
        with pytest.raises(ValueError, match="is no number"):
            text_of(token).value()


@settings(deadline=None)
@given(st.binary(max_size=30) | st.text(max_size=20).map(str.encode))
def test_utf8(data: bytes) -> None:
    try:
        data.decode()
        expected = True
    except UnicodeDecodeError:
        expected = False
    assert is_utf8(lambda begin, end: data[begin:end], len(data)) == expected


def test_utf8_across_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmvis_core.formats.json_text.WINDOW_BYTES", 3)
    data = "aé\U0001f600é".encode()
    assert is_utf8(lambda begin, end: data[begin:end], len(data))
    assert not is_utf8(lambda begin, end: data[begin:end], len(data) - 1)
