"""Masks: golden numbers, layouts, batches, unusual and malformed input, by library and twin."""

from __future__ import annotations

import json
from collections import UserDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from pmvis_core import masks, native
from pmvis_core.errors import DataError
from tests.parity_rle import check

needs_library = pytest.mark.skipif(
    native.mask_library() is None, reason=f"no compiled masks: {native.load_mask_library()[1]}"
)


@pytest.fixture(params=["numpy", pytest.param("compiled", marks=needs_library)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with the numpy twin and with the compiled library."""
    if request.param == "numpy":
        monkeypatch.setattr(masks, "_COMPILED", None)
    return request.param


def test_every_golden_number(shared: Path, backend: str) -> None:
    lines = list(check(shared / "golden" / "rle"))
    assert [line for line in lines if not line[1]] == []
    assert {name.split()[0] for name, _, _ in lines} == {
        "masks", "merge", "iou", "track_iou", "noncanonical", "polygons"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ("5", "runs cover 5 pixels"),
        ("=", "runs cover 13 pixels"),
        ("", "runs cover 0 pixels"),
        ("P", "middle of a run"),
        ("o" * 6 + "P", "middle of a run"),
        ("o" * 20 + "0", "more than 7 characters"),
        ("ooooooO", "negative or does not fit"),
        ("I", "negative or does not fit"),
        ("0oooooo?", "negative or does not fit"),
        ("5 7", "outside COCO's alphabet"),
        ("\u00e9", "outside COCO's alphabet"),
        ("8\0" + "4", "outside COCO's alphabet"),
        (b"5\xff", "outside COCO's alphabet"),
        (None, "expected text"),
        ([5, 7], "expected text"),
    ],
)
def test_malformed_counts(counts: Any, problem: str, backend: str) -> None:
    bad: Any = {"size": [3, 4], "counts": counts}
    good = masks.encode(np.eye(3, 4, dtype=bool))
    with pytest.raises(DataError, match=f"video 1: .*{problem}"):
        masks.validate(bad, "video 1")
    for use in (
        lambda: masks.area(bad),
        lambda: masks.decode(bad),
        lambda: masks.to_box(bad),
        lambda: masks.merge([good, bad]),
        lambda: masks.iou([good], [good, bad]),
        lambda: masks.iou([good, bad], [good]),
        lambda: masks.track_overlap([good, bad], [good, good]),
        lambda: masks.track_overlap([None, good], [None, bad]),
    ):
        with pytest.raises(DataError, match=problem):
            use()


@pytest.mark.parametrize(
    "size", [None, [3], [3, 4, 5], ["3", "4"], [-3, -4], [3.0, 4.0], [True, 4], [2**20, 2**20]]
)
def test_malformed_size(size: Any) -> None:
    bad: Any = {"size": size, "counts": "<"}
    with pytest.raises(DataError, match="size is"):
        masks.area(bad)


@pytest.mark.parametrize("value", [None, 3, "text", [], {}, {"size": [3, 4]}])
def test_validate_refuses_what_is_no_rle(value: Any) -> None:
    with pytest.raises(DataError, match="frame 3: is no RLE"):
        masks.validate(value, "frame 3")


def test_bytes_and_text_are_the_same_counts(backend: str) -> None:
    rle = masks.encode(np.eye(5, dtype=np.uint8))
    as_bytes: Any = {"size": rle["size"], "counts": rle["counts"].encode()}
    assert masks.merge([as_bytes, rle]) == rle
    masks.validate(as_bytes, "here")
    assert json.loads(json.dumps(rle)) == rle


def test_many_masks_at_once(backend: str) -> None:
    stack = np.random.default_rng([0, 1]).random((5, 33, 70)) < 0.3
    rles = masks.encode_many(stack)
    assert rles == [masks.encode(mask) for mask in stack]
    assert np.array_equal(masks.decode_many(rles), stack)
    assert masks.encode_many(np.zeros((0, 4, 5), bool)) == []


def test_decode_into_an_array_that_is_given(backend: str) -> None:
    mask = np.random.default_rng([0, 2]).random((20, 31)) < 0.5
    out = np.full(mask.shape, 9, dtype=np.uint8)
    assert masks.decode(masks.encode(mask), out) is out
    assert np.array_equal(out, mask)
    for wrong in (np.zeros((31, 20), np.uint8), np.zeros((20, 31)), np.asfortranarray(out)):
        with pytest.raises(DataError, match="`out` is"):
            masks.decode(masks.encode(mask), wrong)


def test_decode_a_box_and_a_stack_into_arrays(backend: str) -> None:
    stack = np.random.default_rng([0, 4]).random((3, 20, 31)) < 0.5
    rles = masks.encode_many(stack)
    out = np.full((3, 6, 9), 5, dtype=np.uint8)
    box = (4.0, 3.0, 13.0, 9.0)
    assert masks.decode_many(rles, out, box) is out
    assert np.array_equal(out, stack[:, 3:9, 4:13])
    truth = np.zeros((20, 31), dtype=bool)
    assert np.array_equal(masks.decode(rles[1], truth), stack[1])
    assert masks.decode(rles[0], box=masks.to_box(masks.empty(20, 31))).shape == (0, 0)
    with pytest.raises(DataError, match=r"expected uint8 or bool of shape \(3, 6, 9\)"):
        masks.decode_many(rles, out[:2], box)
    wrong = [
        (0, 0, 32, 5),
        (-1, 0, 3, 5),
        (3, 0, 2, 5),
        (0, 0, 2.5, 5),
        (0, 0, 2),
        (0, 0, 9, np.nan),
    ]
    for box in wrong:
        with pytest.raises(DataError, match="`box` is"):
            masks.decode(rles[0], box=box)


@pytest.mark.parametrize("array", [np.zeros((2, 3, 4), bool), np.zeros((2, 3))])
def test_encode_refuses_other_arrays(array: np.ndarray) -> None:
    with pytest.raises(DataError, match="expected"):
        masks.encode(array)


def test_what_pycocotools_writes_is_read_and_the_other_way_round(backend: str) -> None:
    stack = (np.random.default_rng([0, 3]).random((6, 40, 50)) < 0.5).astype(np.uint8)
    theirs = coco.encode(np.asfortranarray(stack.transpose(1, 2, 0)))
    ours = masks.encode_many(stack)
    assert [rle["counts"].decode() for rle in theirs] == [rle["counts"] for rle in ours]
    assert np.array_equal(coco.decode(ours), stack.transpose(1, 2, 0))
    assert np.array_equal(masks.decode_many(theirs), stack)
    crowd = [0, 1, 0]
    assert np.array_equal(masks.iou(ours, ours[:3], crowd), coco.iou(theirs, theirs[:3], crowd))
    assert masks.merge(ours)["counts"] == coco.merge(theirs)["counts"].decode()


def test_fortran_stacks_of_pycocotools_are_encoded_in_place(backend: str) -> None:
    stack = (np.random.default_rng([0, 5]).random((40, 50, 6)) < 0.5).astype(np.uint8)
    theirs = coco.encode(np.asfortranarray(stack))
    ours = masks.encode_many(np.asfortranarray(stack).transpose(2, 0, 1))
    assert [rle["counts"] for rle in ours] == [rle["counts"].decode() for rle in theirs]
    assert masks.encode(np.asfortranarray(stack)[:, :, 2]) == ours[2]
    assert masks.encode_many(stack.transpose(2, 0, 1)[::2]) == ours[::2]


@needs_library
def test_the_library_answers_whatever_is_usual() -> None:
    library = native.mask_library()
    assert library is not None
    assert library.instructions in {"avx2", "base"}
    stack = np.random.default_rng([0, 6]).random((3, 20, 30)) < 0.5
    for laid in (stack, stack.view(np.uint8), np.asfortranarray(stack.T).T, stack[::-1], stack[0]):
        assert library.encode(laid) is not None
    rles = masks.encode_many(stack)
    theirs: Any = [{"size": tuple(r["size"]), "counts": r["counts"].encode()} for r in rles]
    wide = np.zeros((3, 20, 30), dtype=np.uint8)
    inter, union = np.zeros((2, 2, 1), dtype=np.int64)
    for usual in (rles, theirs, tuple(rles)):
        answers = (
            library.decode(usual, wide, 20, 30, 0, 0, 30, 20),
            library.area(usual[0]),
            library.box(usual[0]),
            library.areas([*usual, None]),
            library.boxes([*usual, None]),
            library.merge(usual, False),
            library.iou(usual, usual[:1], b"\1", np.zeros((3, 1))),
            library.track_overlaps([usual, usual[:1]], [[None, *usual]], inter, union),
            library.to_runs(usual[0]),
        )
        assert None not in answers
        assert library.faulty([None, *usual], 0) == -1
    assert library.from_polygons([(1, 2.5, 8, np.float64(3), 4, 15)], 20, 30) is not None
    assert library.from_runs([5, 595], 20, 30) is not None


def test_unusual_but_right_values_are_taken(backend: str) -> None:
    rle = masks.encode(np.eye(4, 5, dtype=bool))
    odd: Any = UserDict({"size": (np.int64(4), np.int32(5)), "counts": rle["counts"]})
    assert masks.area(odd) == masks.areas([odd, rle])[1] == 4
    assert masks.to_box(odd) == masks.track_boxes([None, odd])[1] == (0, 0, 4, 4)
    assert masks.merge([odd, rle]) == rle
    assert np.array_equal(masks.decode_many([rle, odd]), np.stack([np.eye(4, 5)] * 2))
    assert masks.iou([odd], [rle], np.array([True])).tolist() == [[1.0]]
    assert masks.track_overlap([odd, {}], [rle, rle]) == (4, 8)  # type: ignore[list-item]
    assert masks.from_uncompressed(np.array([0, 20]), 4, 5) == masks.from_uncompressed(
        (0, 20), 4, 5
    )
    masks.validate_track([rle, None, dict(odd)], "here")


def test_many_threads_at_once(backend: str) -> None:
    stack = np.random.default_rng([0, 7]).random((12, 300, 400)) < 0.5
    expected = [masks.encode(mask) for mask in stack]

    def work(mask: np.ndarray) -> bool:
        rle = masks.encode(mask)
        return bool((masks.decode(rle) == mask).all()) and rle in expected

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, [mask for mask in stack for _ in range(4)]))


def test_measures_of_a_track(backend: str) -> None:
    rle = masks.encode(np.eye(4, 5, dtype=bool))
    bad: Any = {"size": [4, 5], "counts": "5"}
    assert masks.track_areas([rle, None, rle]) == (4, None, 4)
    assert masks.track_boxes([None, rle]) == (None, (0.0, 0.0, 4.0, 4.0))
    masks.validate_track([None, rle], "track 1")
    for use in (masks.track_areas, masks.track_boxes, masks.validate_track):
        with pytest.raises(DataError, match="track 1, frame 2: malformed RLE: the runs cover"):
            use([rle, None, bad], "track 1")
    with pytest.raises(DataError, match=r"^malformed RLE"):
        masks.track_areas([bad])
    for measure in (masks.areas, masks.to_boxes):
        with pytest.raises(DataError, match="a mask is None"):
            measure([rle, None])  # type: ignore[list-item]
    for value in ({}, [], "text", 3):
        with pytest.raises(DataError, match="track 1, frame 0: is no RLE"):
            masks.validate_track([value], "track 1")


def test_no_masks_at_all(backend: str) -> None:
    rle = masks.empty(4, 5)
    assert masks.iou([], [rle]).shape == (0, 1)
    assert masks.iou([rle], []).shape == (1, 0)
    assert masks.track_overlap([], []) == (0, 0)
    assert masks.track_iou([None, None], [None]) == 0.0
    for use in (lambda: masks.merge([]), lambda: masks.decode_many([])):
        with pytest.raises(DataError, match="at least one"):
            use()


def test_iscrowd_needs_an_entry_for_each_ground_truth() -> None:
    with pytest.raises(DataError, match="iscrowd"):
        masks.iou([masks.empty(2, 2)], [masks.empty(2, 2)], [0, 1])


def test_boxes_are_pycocotools(backend: str) -> None:
    boxes = [(-3, 2, 8.5, 9.25), (0, 0, 20, 10), (5, 5, 5, 9), (30, 3, 40, 5)]
    corners = np.array([[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes], dtype=float)
    theirs = [rle["counts"].decode() for rle in coco.frPyObjects(corners, 10, 20)]
    assert [rle["counts"] for rle in masks.from_boxes(boxes, 10, 20)] == theirs


@pytest.mark.parametrize(
    ("polygon", "problem"),
    [
        ([0, 0, 5, 5], "has 4 numbers"),
        ([0, 0, 5, 5, 3, 1, 2], "has 7 numbers"),
        ([0, 0, 5, 5, 3, float("nan")], "not a finite pixel"),
        ([0, 0, 5, 5, 3, 1e12], "not a finite pixel"),
    ],
)
def test_malformed_polygons(polygon: list[float], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        masks.from_polygons([polygon], 10, 10)


def test_no_polygon_is_an_empty_mask() -> None:
    assert masks.from_polygons([], 3, 4) == masks.empty(3, 4)


@pytest.mark.parametrize("runs", [[5, 6], [13], [-1, 13], [6.5, 5.5], []])
def test_malformed_runs(runs: list[Any]) -> None:
    with pytest.raises(DataError, match="uncompressed RLE"):
        masks.from_uncompressed(runs, 3, 4)
