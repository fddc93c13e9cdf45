"""Masks: pycocotools' bytes, the compiled kernels against their twin, and malformed input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco

from pmvis_core import masks, native, rle_numpy
from pmvis_core.errors import DataError
from pmvis_core.types import RLE

COMPILED = native.mask_library()
BACKENDS = [
    "numpy",
    pytest.param(
        "compiled",
        marks=pytest.mark.skipif(
            COMPILED is None, reason=f"no compiled masks: {native.load_mask_library()[1]}"
        ),
    ),
]
PIXELS = arrays.arrays(
    np.uint8, st.tuples(st.integers(0, 9), st.integers(0, 140)), elements=st.integers(0, 2)
)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with the numpy twin and with the compiled kernels."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "mask_library", lambda: None)
    return request.param


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    """Return the reference data by file name, and all masks by their names."""
    folder = shared / "golden" / "rle"
    data = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    data["rles"] = {
        m["name"]: {"size": [m["h"], m["w"]], "counts": m["counts"]} for m in data["masks"]
    }
    return data


def test_golden_masks(golden: dict[str, Any], backend: str) -> None:
    for mask in golden["masks"]:
        rle = golden["rles"][mask["name"]]
        x, y, w, h = mask["bbox"]
        assert masks.from_uncompressed(mask["runs"], mask["h"], mask["w"]) == rle
        assert masks.encode(masks.decode(rle)) == rle
        assert masks.area(rle) == mask["area"]
        assert masks.to_box(rle) == (x, y, x + w, y + h)


def test_golden_decoding(golden: dict[str, Any], backend: str) -> None:
    for mask in golden["masks"]:
        expected = np.repeat(np.arange(len(mask["runs"])) % 2, mask["runs"])
        decoded = masks.decode(golden["rles"][mask["name"]])
        assert decoded.flags.c_contiguous
        assert np.array_equal(decoded.ravel(order="F"), expected)


def test_golden_merge(golden: dict[str, Any], backend: str) -> None:
    for case in golden["merge"]:
        operands = [golden["rles"][name] for name in case["names"]]
        if "note" in case:
            with pytest.raises(DataError, match="differ in size"):
                masks.merge(operands)
            continue
        for key, intersect in (("union", False), ("intersect", True)):
            assert masks.merge(operands, intersect)["counts"] == case[key]["counts"]


def test_golden_iou(golden: dict[str, Any], backend: str) -> None:
    for case in golden["iou"]:
        dts, gts = ([golden["rles"][name] for name in case[key]] for key in ("dt", "gt"))
        if "note" in case:
            with pytest.raises(DataError, match="differ in size"):
                masks.iou(dts, gts)
            continue
        assert masks.iou(dts, gts, case["iscrowd"]).tolist() == case["iou"]
        assert masks.iou(dts, gts).tolist() == case["iou_nocrowd"]


def test_golden_track_iou(golden: dict[str, Any], backend: str) -> None:
    for case in golden["track_iou"]:
        assert masks.track_overlap(case["dt"], case["gt"]) == (case["inter"], case["union"])
        assert masks.track_iou(case["dt"], case["gt"]) == case["iou"]


def test_golden_noncanonical(golden: dict[str, Any], backend: str) -> None:
    reference: RLE = {"size": [3, 4], "counts": golden["noncanonical"]["ref"]["counts"]}
    for case in golden["noncanonical"]["cases"]:
        rle: RLE = {"size": [case["h"], case["w"]], "counts": case["counts"]}
        if "merge_with_ref_union" not in case:
            with pytest.raises(DataError, match="runs cover"):
                masks.validate(rle, "here")
            continue
        assert masks.decode(rle).ravel(order="F").tolist() == case["decode_colmajor"]["ok"]
        assert masks.merge([rle, reference])["counts"] == case["merge_with_ref_union"]["ok"]
        crossed = masks.merge([rle, reference], intersect=True)["counts"]
        assert crossed == case["merge_with_ref_intersect"]["ok"]
        assert masks.iou([rle], [reference]).tolist() == case["iou_with_ref"]["ok"]
        assert masks.iou([rle], [reference], [1]).tolist() == case["iou_with_ref_crowd"]["ok"]
        x, y, w, h = case["bbox"]["ok"]
        # pycocotools wraps round where all foreground runs are empty; zeros are right there.
        expected = (x, y, x + w, y + h) if case["area"] else (0, 0, 0, 0)
        assert masks.to_box(rle) == expected


def test_golden_polygons(golden: dict[str, Any], backend: str) -> None:
    for case in golden["polygons"]["polygons"]:
        rle = masks.from_polygons(case["polygons"], case["h"], case["w"])
        assert rle["counts"] == case["merged"]
        assert masks.area(rle) == case["area"]


@given(PIXELS)
def test_round_trip_in_every_order_equals_pycocotools(pixels: np.ndarray) -> None:
    expected = coco.encode(np.asfortranarray(pixels != 0).astype(np.uint8, order="F"))
    text = expected["counts"].decode()
    for kernels in filter(None, (rle_numpy, COMPILED)):
        for laid in (pixels, np.asfortranarray(pixels), np.repeat(pixels, 2, axis=1)[:, ::2]):
            assert kernels.encode(laid[None]) == [text]
        for cleared in (True, False):
            out = np.full((1, *pixels.shape), 0 if cleared else 7, dtype=np.uint8)
            kernels.decode([text.encode()], out, cleared)
            assert np.array_equal(out[0], pixels != 0)


@given(st.data())
def test_compiled_kernels_equal_their_twin(data: st.DataObject) -> None:
    if COMPILED is None:
        pytest.skip("no compiled masks")
    height, width = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 70))
    stack = data.draw(arrays.arrays(np.bool_, (data.draw(st.integers(1, 4)), height, width)))
    texts = [text.encode() for text in rle_numpy.encode(stack.view(np.uint8))]
    for name, arguments in (
        ("areas", (texts, height, width)),
        ("boxes", (texts, height, width)),
        ("merge", (texts, height, width, False)),
        ("merge", (texts, height, width, True)),
        ("intersections", (texts, texts[:2], height, width)),
        ("track_overlap", (texts, texts[::-1], [height * width] * len(texts))),
    ):
        expected, got = (getattr(kernels, name)(*arguments) for kernels in (rle_numpy, COMPILED))
        assert np.array_equal(expected, got), name


@given(st.binary(max_size=12), st.integers(0, 40))
@settings(max_examples=300)
def test_any_bytes_decode_or_raise_the_same_error(text: bytes, height: int) -> None:
    if COMPILED is None:
        pytest.skip("no compiled masks")
    # Half of the examples use the alphabet, so that more of them get past the first check.
    if height % 2:
        text = bytes(48 + byte % 64 for byte in text)
    outcomes = []
    for kernels in (rle_numpy, COMPILED):
        try:
            outcomes.append(kernels.areas([text], height, 3).tolist())
        except DataError as error:
            outcomes.append(error.message)
    assert outcomes[0] == outcomes[1]


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
