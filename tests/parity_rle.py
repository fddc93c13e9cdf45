"""Golden mask files: every text byte for byte, every number without tolerance.

A folder with any of ``masks.json``, ``merge.json``, ``iou.json``, ``track_iou.json``,
``noncanonical.json`` and ``polygons.json``, laid out like ../shared/golden/rle; names, sizes and
numbers of entries are free. Two answers of pycocotools are not imitated, and a line says so: masks
of different sizes are refused (it gives an empty mask or -1), and the box of foreground runs that
are all empty is zeros (it wraps round 2^32). Texts that do not cover their mask must be refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pmvis_core import masks
from pmvis_core.errors import DataError
from pmvis_core.types import RLE

Quantity = tuple[str, bool, str]
Pair = tuple[str, Any, Any]


def check(golden: Path) -> Iterator[Quantity]:
    """Yield (quantity, equal, detail) for all files of a folder."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(golden.glob("*.json"))}
    named = {entry["name"]: as_rle(entry) for entry in files.get("masks", [])}
    if "masks" in files:
        yield from check_masks(files["masks"])
    if "merge" in files:
        yield from check_merge(files["merge"], named)
    if "iou" in files:
        yield from check_iou(files["iou"], named)
    if "track_iou" in files:
        yield from check_track_iou(files["track_iou"])
    if "noncanonical" in files:
        yield from check_noncanonical(files["noncanonical"])
    if "polygons" in files:
        yield from check_polygons(files["polygons"])


def as_rle(entry: dict[str, Any]) -> RLE:
    """Return the mask of an entry with h, w and counts."""
    return {"size": [entry["h"], entry["w"]], "counts": entry["counts"]}


def compare(quantity: str, pairs: Iterable[Pair]) -> Iterator[Quantity]:
    """Yield one line for many (name, ours, expected), or none if there is none."""
    total, different = 0, []
    for name, ours, expected in pairs:
        total += 1
        if ours != expected:
            different.append(f"{name}: {str(ours)[:60]} against {str(expected)[:60]}")
    if total:
        first = f", {len(different)} differ, first {different[0]}" if different else ""
        yield quantity, not different, f"{total} compared{first}"


def refused(function: Callable[[], Any]) -> bool:
    """Tell whether a call raises a data error."""
    try:
        function()
    except DataError:
        return True
    return False


def xyxy(bbox: list[float], area: int) -> tuple[float, ...]:
    """Return COCO's x, y, width, height as our box, zeros where there is no foreground."""
    x, y, w, h = bbox
    return (x, y, x + w, y + h) if area else (0.0, 0.0, 0.0, 0.0)


def pixels_of(entry: dict[str, Any]) -> np.ndarray:
    """Return the (H, W) bool mask of an entry's runs."""
    flat = np.repeat(np.arange(len(entry["runs"])) % 2 == 1, entry["runs"])
    return flat.reshape(entry["w"], entry["h"]).T


def check_masks(entries: list[dict[str, Any]]) -> Iterator[Quantity]:
    """Yield what a single mask has."""
    all_ = [(entry["name"], entry, as_rle(entry)) for entry in entries]
    yield from compare(
        "masks counts, from runs",
        (
            (name, masks.from_uncompressed(e["runs"], e["h"], e["w"])["counts"], e["counts"])
            for name, e, _ in all_
        ),
    )
    layouts: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "C order": np.ascontiguousarray,
        "Fortran order": np.asfortranarray,
        "0 and 255": lambda mask: mask.astype(np.uint8) * np.uint8(255),
    }
    for layout, laid in layouts.items():
        yield from compare(
            f"masks counts, from pixels in {layout}",
            (
                (name, masks.encode(laid(pixels_of(e)))["counts"], e["counts"])
                for name, e, _ in all_
            ),
        )
    yield from compare(
        "masks runs", ((name, masks.to_uncompressed(rle), e["runs"]) for name, e, rle in all_)
    )
    yield from compare(
        "masks pixels",
        ((name, bool((masks.decode(rle) == pixels_of(e)).all()), True) for name, e, rle in all_),
    )
    areas = masks.areas([rle for *_, rle in all_]).tolist()
    yield from compare(
        "masks area",
        (
            (name, (masks.area(rle), n), (e["area"],) * 2)
            for (name, e, rle), n in zip(all_, areas, strict=True)
        ),
    )
    yield from compare(
        "masks box",
        ((name, masks.to_box(rle), xyxy(e["bbox"], e["area"])) for name, e, rle in all_),
    )


def check_merge(entries: list[dict[str, Any]], named: dict[str, RLE]) -> Iterator[Quantity]:
    """Yield unions and intersections."""
    fit, unfit = split(entries, lambda entry: [named[name] for name in entry["names"]])
    for key, intersect in (("union", False), ("intersect", True)):
        merged = [(", ".join(e["names"]), masks.merge(rles, intersect), e[key]) for e, rles in fit]
        yield from compare(
            f"merge {key}, counts and size",
            ((name, rle, {k: e[k] for k in ("size", "counts")}) for name, rle, e in merged),
        )
        yield from compare(
            f"merge {key}, area", ((name, masks.area(rle), e["area"]) for name, rle, e in merged)
        )
    yield from compare(
        "merge refuses sizes that differ",
        ((str(e["names"]), refused(lambda r=rles: masks.merge(r)), True) for e, rles in unfit),
    )


def check_iou(entries: list[dict[str, Any]], named: dict[str, RLE]) -> Iterator[Quantity]:
    """Yield IoU matrices."""
    fit, unfit = split(entries, lambda entry: [named[n] for n in [*entry["dt"], *entry["gt"]]])
    for quantity, key, with_crowd in (
        ("iou with crowds", "iou", True),
        ("iou without crowds", "iou_nocrowd", False),
    ):
        pairs: list[Pair] = []
        for entry, rles in fit:
            dts, gts = rles[: len(entry["dt"])], rles[len(entry["dt"]) :]
            ours = masks.iou(dts, gts, entry["iscrowd"] if with_crowd else None)
            pairs.append((str(entry["dt"]), ours.tolist(), entry[key]))
        yield from compare(quantity, pairs)
    yield from compare(
        "iou refuses sizes that differ",
        ((str(e["dt"]), refused(lambda r=rles: masks.iou(r, r)), True) for e, rles in unfit),
    )


def split(
    entries: list[dict[str, Any]], operands: Callable[[dict[str, Any]], list[RLE]]
) -> tuple[list[tuple[dict[str, Any], list[RLE]]], list[tuple[dict[str, Any], list[RLE]]]]:
    """Return the entries whose masks have one size, and the others, each with its masks."""
    fit, unfit = [], []
    for entry in entries:
        rles = operands(entry)
        (fit if len({tuple(rle["size"]) for rle in rles}) <= 1 else unfit).append((entry, rles))
    return fit, unfit


def check_track_iou(entries: list[dict[str, Any]]) -> Iterator[Quantity]:
    """Yield what pairs of tracks share."""
    numbered = [(f"entry {k}", entry) for k, entry in enumerate(entries)]
    yield from compare(
        "track_iou intersection and union",
        (
            (name, masks.track_overlap(e["dt"], e["gt"]), (e["inter"], e["union"]))
            for name, e in numbered
        ),
    )
    yield from compare(
        "track_iou iou",
        ((name, masks.track_iou(e["dt"], e["gt"]), e["iou"]) for name, e in numbered),
    )
    inter, union = masks.track_overlaps([e["dt"] for e in entries], [e["gt"] for e in entries])
    yield from compare(
        "track_iou in one batch",
        (
            (name, (inter[k, k], union[k, k]), (e["inter"], e["union"]))
            for k, (name, e) in enumerate(numbered)
        ),
    )


def check_noncanonical(golden: dict[str, Any]) -> Iterator[Quantity]:
    """Yield texts that no encoder writes."""
    good = [case for case in golden["cases"] if sum(case["runs"]) == case["h"] * case["w"]]
    ref = golden["ref"]
    other: RLE = as_rle(ref)
    recorded: dict[str, Callable[[RLE], Any]] = {
        "decode_colmajor": lambda rle: masks.decode(rle).ravel(order="F").tolist(),
        "merge_with_ref_union": lambda rle: masks.merge([rle, other])["counts"],
        "merge_with_ref_intersect": lambda rle: masks.merge([rle, other], True)["counts"],
        "iou_with_ref": lambda rle: masks.iou([rle], [other]).tolist(),
        "iou_with_ref_crowd": lambda rle: masks.iou([rle], [other], [1]).tolist(),
    }
    for key, function in recorded.items():
        with_key = [c for c in good if "ok" in c.get(key, {})]
        with_key = [c for c in with_key if "ref" not in key or (c["h"], c["w"]) == size_of(ref)]
        yield from compare(
            f"noncanonical {key}",
            ((c["name"], function(as_rle(c)), c[key]["ok"]) for c in with_key),
        )
    yield from compare(
        "noncanonical area", ((c["name"], masks.area(as_rle(c)), c["area"]) for c in good)
    )
    yield from compare(
        "noncanonical box, zeros without foreground",
        (
            (c["name"], masks.to_box(as_rle(c)), xyxy(c["bbox"]["ok"], c["area"]))
            for c in good
            if "ok" in c["bbox"]
        ),
    )
    yield from compare(
        "noncanonical sums that do not fit are refused",
        (
            (c["name"], refused(lambda c=c: masks.validate(as_rle(c), "here")), True)
            for c in golden["cases"]
            if c not in good
        ),
    )


def size_of(entry: dict[str, Any]) -> tuple[int, int]:
    """Return height and width."""
    return entry["h"], entry["w"]


def check_polygons(golden: dict[str, Any]) -> Iterator[Quantity]:
    """Yield rasterised polygons and boxes."""
    drawn = [
        (e, size_of(e), masks.from_polygons(e["polygons"], *size_of(e)))
        for e in golden.get("polygons", [])
    ]
    yield from compare(
        "polygons parts",
        (
            (
                e["name"],
                [masks.from_polygons([p], *size)["counts"] for p in e["polygons"]],
                e["parts"],
            )
            for e, size, _ in drawn
        ),
    )
    yield from compare(
        "polygons merged", ((e["name"], rle["counts"], e["merged"]) for e, _, rle in drawn)
    )
    yield from compare(
        "polygons area", ((e["name"], masks.area(rle), e["area"]) for e, _, rle in drawn)
    )
    yield from compare(
        "polygons box",
        ((e["name"], masks.to_box(rle), xyxy(e["bbox"], e["area"])) for e, _, rle in drawn),
    )
    if "boxes" in golden:
        boxes = golden["boxes"]
        corners = [(x, y, x + w, y + h) for x, y, w, h in boxes["boxes"]]
        ours = [rle["counts"] for rle in masks.from_boxes(corners, *size_of(boxes))]
        yield from compare(
            "polygons of boxes", zip(map(str, corners), ours, boxes["counts"], strict=True)
        )
