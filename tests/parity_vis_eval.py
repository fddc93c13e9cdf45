"""Golden cases of the official evaluators: every number, array, IoU and match, without tolerance.

A folder of cases, each with ``gt.json``, ``pred.json`` and ``expected.json``. Each is evaluated
from its files and in memory, natively where the library is built, and by the twin in numpy.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from pmvis_core.evaluation import compiled
from pmvis_core.evaluation.average_precision import evaluate
from pmvis_core.evaluation.curves import Evaluation
from pmvis_core.evaluation.files import evaluate_files
from pmvis_core.evaluation.protocol import iou_thresholds, recall_points
from pmvis_core.formats.predictions import read_predictions
from pmvis_core.formats.ytvis import read_dataset

_NAMES = ("small", "medium", "large", "so", "mo", "ho")
_SHORT = ("s", "m", "l", "so", "mo", "ho")
SHORT_NAMES = {
    f"{what}_{name}": f"{what}{short}"
    for what in ("AP", "AR")
    for name, short in zip(_NAMES, _SHORT, strict=True)
}
Quantity = tuple[str, bool, str]


def check(golden: Path) -> Iterator[Quantity]:
    """Yield (quantity, equal, detail) for every case of a folder."""
    for folder in sorted(path.parent for path in golden.glob("*/expected.json")):
        expected = json.loads((folder / "expected.json").read_text())
        protocol = "ovis" if expected["evaluator"] == "ovis" else "ytvis"
        for way, found in evaluations(folder, protocol):
            for name, equal, detail in compare(found, expected):
                yield f"{folder.name} {way} {name}", equal, detail


def evaluations(folder: Path, protocol: str) -> Iterator[tuple[str, Evaluation]]:
    """Yield the evaluations of a case, each the way a user may come to it."""
    files = folder / "gt.json", folder / "pred.json"
    for threads in (1, 3):
        found = evaluate_files(*files, protocol, exact=True, threads=threads)
        yield f"from files on {threads} threads", found
    truth = read_dataset(files[0])
    predictions = read_predictions(files[1], truth)
    yield "in memory", evaluate(truth, predictions, protocol)
    with patch.object(compiled, "load_library", return_value=(None, "not wanted")):
        yield "in numpy", evaluate(truth, predictions, protocol)


def compare(found: Evaluation, expected: dict[str, Any]) -> Iterator[Quantity]:
    """Yield (quantity, equal, detail) of one evaluation."""
    for name, value in expected["stats"].items():
        ours = found.summary[SHORT_NAMES.get(name, name)]
        yield name, ours == _absent(value), f"{ours!r} against {value!r}"
    order = [SHORT_NAMES.get(name, name) for name in expected["stats"]]
    yield "order of the numbers", list(found.summary) == order, ""
    rows = [{"category_id": row.category.id, **row.values} for row in found.per_category]
    wanted = [{k: _absent(v) for k, v in row.items()} for row in expected["per_category"]]
    yield "per category", rows == wanted, f"{len(rows)} categories"
    yield "IoU thresholds", iou_thresholds().tolist() == expected["iouThrs"], ""
    yield "recall points", _hash(recall_points()) == expected["recThrs_sha256"], ""
    for name in ("precision", "recall", "scores"):
        values, wanted = getattr(found, name), expected[name]
        equal = list(values.shape) == wanted["shape"] and _hash(values) == wanted["sha256"]
        yield name, equal, "x".join(map(str, values.shape))
    yield from _compare_pairs(found, expected)


def _compare_pairs(found: Evaluation, expected: dict[str, Any]) -> Iterator[Quantity]:
    """Yield what concerns single videos: IoUs, matches, warnings."""
    ious = {(p.video_id, p.category_id): p.ious.tolist() for p in found.pairs if p.ious.size}
    wanted = {(e["video_id"], e["category_id"]): e["iou"] for e in expected["ious"]}
    yield "IoU matrices", ious == wanted, f"{len(wanted)} matrices"
    number, digest = _match_hash(found)
    same = (number, digest) == (expected["matches"]["n"], expected["matches"]["sha256"])
    yield "matches", same, f"{number} tables"
    lines = {
        f"Mask sizes in video {v} and category {c} may not match!" for v, c in found.without_union
    }
    yield "warnings", lines == set(expected["warnings"]), f"{len(lines)} lines"


def _match_hash(found: Evaluation) -> tuple[int, str]:
    """Hash all matches in the order that the golden files state."""
    digest = hashlib.sha256()
    count = 0
    for row in found.per_category:
        pairs = [pair for pair in found.pairs if pair.category_id == row.category.id]
        for group in range(math.prod(found.matches.groups.shape)):
            for pair in pairs:
                matches, ignored = pair.matches[:, group].T, pair.ignored[:, group].T
                digest.update(np.ascontiguousarray(matches, dtype="<f8").tobytes())
                digest.update(np.ascontiguousarray(ignored, dtype="u1").tobytes())
                count += 1
    return count, digest.hexdigest()


def _hash(values: Any) -> str:
    """Hash an array as the golden files do."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<f8").tobytes()).hexdigest()


def _absent(value: Any) -> Any:
    """Return the golden files' -1 as our None."""
    return None if value == -1.0 else value
