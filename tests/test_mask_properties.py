"""Masks against pixels, pycocotools and themselves without their library, on drawn examples.

Without the compiled library both sides of `with_both` are the twin in numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco

from pmvis_core import masks
from pmvis_core.errors import DataError

PIXELS = arrays.arrays(
    np.uint8,
    st.tuples(st.integers(0, 9), st.integers(0, 300)),
    elements=st.sampled_from([0, 1, 2, 255]),
)
COORDINATES = st.one_of(
    st.floats(-30, 60),
    st.integers(-20, 50).map(float),
    st.integers(-100, 250).map(lambda fifth: fifth / 5 + 0.1),
    st.floats(-20000, 20000),
)


@contextmanager
def twin() -> Iterator[None]:
    """Let `masks` work without its library."""
    compiled, masks._COMPILED = masks._COMPILED, None
    try:
        yield
    finally:
        masks._COMPILED = compiled


def with_both(function: Callable[[], Any]) -> Any:
    """Return what a function does, checked to be the same with the library and without."""
    outcomes = []
    for attempt in (function, twin()(function)):
        try:
            outcomes.append(attempt())
        except DataError as error:
            outcomes.append((error.message, error.hint))
    found, expected = outcomes
    assert str(found) == str(expected)
    return found


def blocks(rng: np.random.Generator, number: int, height: int, width: int) -> np.ndarray:
    """Return (N, H, W) masks of a few blocks each, so that runs are long and short."""
    stack = np.zeros((number, height, width), dtype=bool)
    for mask in stack:
        for _ in range(rng.integers(0, 6)):
            y, x = rng.integers(0, height), rng.integers(0, width)
            mask[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] ^= True
    return stack


@given(PIXELS)
@settings(deadline=None)
def test_round_trip_in_every_order_equals_pycocotools(pixels: np.ndarray) -> None:
    height, width = pixels.shape
    theirs = coco.encode(np.asfortranarray(pixels != 0).astype(np.uint8, order="F"))
    expected = {"size": [height, width], "counts": theirs["counts"].decode()}
    with_gaps = np.repeat(pixels, 2, axis=1)[:, ::2]
    for laid in (pixels, np.asfortranarray(pixels), with_gaps, pixels[::-1][::-1], pixels != 0):
        assert with_both(lambda laid=laid: masks.encode(laid)) == expected
        stack = np.stack([laid, ~laid])[::-1]
        assert with_both(lambda stack=stack: masks.encode_many(stack))[1] == expected
    out = np.full((height, width), 7, dtype=np.uint8)
    with_both(lambda: masks.decode(expected, out).tolist())
    assert np.array_equal(out, pixels != 0)


@given(PIXELS, st.data())
@settings(deadline=None)
def test_a_crop_is_a_part_of_the_whole(pixels: np.ndarray, data: st.DataObject) -> None:
    height, width = pixels.shape
    x1, x2 = sorted(data.draw(st.tuples(st.integers(0, width), st.integers(0, width))))
    y1, y2 = sorted(data.draw(st.tuples(st.integers(0, height), st.integers(0, height))))
    rle = masks.encode(pixels)
    found = with_both(lambda: masks.decode(rle, box=(x1, y1, x2, y2)))
    assert np.array_equal(found, pixels[y1:y2, x1:x2] != 0)


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 90), st.integers(1, 400))
@settings(deadline=None)
def test_measures_are_those_of_the_pixels(seed: int, number: int, height: int, width: int) -> None:
    stack = blocks(np.random.default_rng(seed), number, height, width)
    rles = masks.encode_many(stack)
    flat = stack.reshape(number, -1)
    inter, sums = flat.astype(int) @ flat.T.astype(int), flat.sum(1)
    assert with_both(lambda: masks.areas(rles)).tolist() == sums.tolist()
    for mask, box in zip(stack, with_both(lambda: masks.to_boxes(rles)).tolist(), strict=True):
        x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        assert box == ([x[0], y[0], x[-1] + 1, y[-1] + 1] if x.size else [0, 0, 0, 0])
    union = np.add.outer(sums, sums) - inter
    expected = np.where(inter > 0, inter / np.maximum(union, 1), 0)
    assert np.array_equal(with_both(lambda: masks.iou(rles, rles)), expected)
    crowd = [bool(k % 2) for k in range(number)]
    expected[:, crowd] = np.where(inter > 0, inter / np.maximum(sums, 1)[:, None], 0)[:, crowd]
    assert np.array_equal(with_both(lambda: masks.iou(rles, rles, crowd)), expected)
    for intersect, joined in ((False, stack.any(0)), (True, stack.all(0))):
        assert with_both(lambda i=intersect: masks.merge(rles, i)) == masks.encode(joined)


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=5))
@settings(deadline=None)
def test_empty_runs_survive_a_merge_as_in_pycocotools(runs: list[list[int]]) -> None:
    # Wide enough: pycocotools writes out of bounds if a merge has more runs than pixels.
    width = max(map(sum, runs)) + 60
    rles = [masks.from_uncompressed([*row, width - sum(row)], 1, width) for row in runs]
    for intersect in (False, True):
        merged = rles[0]
        for rle in rles[1:]:
            theirs = coco.merge([merged, rle], intersect)
            merged = masks.merge([merged, rle], intersect)
            # It stops too early where both masks come to an empty run at once.
            if is_mask(theirs):
                assert merged["counts"] == theirs["counts"].decode()
        assert with_both(lambda i=intersect: masks.merge(rles, i)) == merged


def is_mask(rle: Any) -> bool:
    """Tell whether runs cover their mask."""
    try:
        masks.validate(rle, "here")
    except DataError:
        return False
    return True


@given(st.data())
@settings(deadline=None)
def test_tracks_are_compared_frame_by_frame(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    frames = data.draw(st.integers(0, 5))

    def track() -> list[np.ndarray | None]:
        sizes = [
            (8, 9) if rng.random() < 0.8 else (9, 8) for _ in range(rng.integers(0, frames + 1))
        ]
        return [rng.random(size) < 0.5 if rng.random() < 0.7 else None for size in sizes]

    dts, gts = ([track() for _ in range(rng.integers(0, 4))] for _ in range(2))
    rles = [[[None if m is None else masks.encode(m) for m in t] for t in ts] for ts in (dts, gts)]
    inter, union = with_both(lambda: masks.track_overlaps(*rles))
    for d, dt in enumerate(dts):
        for g, gt in enumerate(gts):
            both = list(zip(dt, gt, strict=False))
            same = [(a, b) for a, b in both if a is not None and b is not None]
            same = [(a, b) for a, b in same if a.shape == b.shape]
            alone = [
                m for pair in both for m in pair if m is not None and any(m is None for m in pair)
            ]
            assert inter[d, g] == sum(int((a & b).sum()) for a, b in same)
            assert union[d, g] == sum(int((a | b).sum()) for a, b in same) + sum(
                int(m.sum()) for m in alone
            )
    ious = masks.track_ious(*rles)
    assert ious.tolist() == [[masks.track_iou(d, g) for g in rles[1]] for d in rles[0]]


@given(st.binary(max_size=80), st.integers(0, 40))
@settings(max_examples=400, deadline=None)
def test_any_bytes_mean_the_same_or_raise_the_same_error(text: bytes, height: int) -> None:
    # Half of the examples use the alphabet, so that more of them get past the first check.
    if height % 2:
        text = bytes(48 + byte % 64 for byte in text)
    check_text(text, height, 3)


@given(st.integers(0, 2**32), st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_texts_mean_the_same_or_raise_the_same_error(
    seed: int, data: st.DataObject
) -> None:
    pixels = blocks(np.random.default_rng(seed), 1, 60, 90)[0]
    text = bytearray(masks.encode(pixels)["counts"].encode())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 1))] = data.draw(st.binary(max_size=2))
        text = text or bytearray(b"0")
    check_text(bytes(text), 60, 90)


def check_text(text: bytes, height: int, width: int) -> None:
    """Do everything with a text that may be malformed."""
    rle: Any = {"size": [height, width], "counts": text}
    other = masks.encode(np.eye(height, width, dtype=bool))
    for use in (
        lambda: masks.area(rle),
        lambda: masks.to_box(rle),
        lambda: masks.to_uncompressed(rle),
        lambda: masks.decode(rle).tolist(),
        lambda: masks.merge([other, rle]),
        lambda: masks.iou([rle], [other]).tolist(),
        lambda: masks.track_overlap([rle, None], [other, rle]),
        lambda: masks.validate_track([None, other, rle], "track 1"),
    ):
        with_both(use)


@given(
    st.lists(st.tuples(COORDINATES, COORDINATES), min_size=3, max_size=8),
    st.lists(st.integers(0, 7), max_size=2),
    st.integers(1, 33),
    st.integers(1, 40),
)
@settings(max_examples=300, deadline=None)
def test_polygons_are_pycocotools(
    points: list[tuple[float, float]], doubled: list[int], height: int, width: int
) -> None:
    for k in doubled:
        points.insert(k % len(points), points[k % len(points)])
    polygon = [value for point in points for value in point]
    rest = [value + 3 for value in polygon[2:]] + polygon[:2]
    parts = coco.frPyObjects([polygon, rest], height, width)
    found = with_both(lambda: masks.from_polygons([polygon], height, width))
    assert found["counts"] == parts[0]["counts"].decode()
    found = with_both(lambda: masks.from_polygons([polygon, rest], height, width))
    assert found["counts"] == coco.merge(parts)["counts"].decode()
