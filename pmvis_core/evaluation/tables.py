"""The numbers of an evaluation as text and as JSON."""

from __future__ import annotations

from typing import Any

from pmvis_core.evaluation.curves import Evaluation, table_rows
from pmvis_core.evaluation.protocol import MAX_DETECTIONS, iou_thresholds

_COLUMNS = ("AP", "AP50", "AP75", "AR1", "AR10")


def metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Return the numbers as one JSON object: the summary and ``per_category``."""
    rows = [
        {
            "id": row.category.id,
            "name": row.category.name,
            **{name: row.values[name] for name in _COLUMNS},
        }
        for row in evaluation.per_category
    ]
    return {**evaluation.summary, "per_category": rows}


def official_table(evaluation: Evaluation) -> str:
    """Return the table as the official evaluators print it, -1.000 for no ground truth."""
    thresholds = iou_thresholds()
    lines = []
    for name, row in table_rows(evaluation.matches.groups):
        title = "Average Precision  (AP)" if row.is_precision else "Average Recall     (AR)"
        span = f"{thresholds[0]:0.2f}:{thresholds[-1]:0.2f}"
        overlap = span if row.threshold is None else f"{row.threshold:0.2f}"
        occlusion = f" | occ={row.occlusion:>6s}" if evaluation.matches.groups.by_occlusion else ""
        value = evaluation.summary[name]
        lines.append(
            f" {title} @[ IoU={overlap:<9} | area={row.area:>6s}{occlusion} | "
            f"maxDets={MAX_DETECTIONS[row.limit]:>3d} ] = {-1 if value is None else value:0.3f}"
        )
    return "\n".join(lines)


def category_table(evaluation: Evaluation) -> str:
    """Return one line a category, ``-`` for no ground truth."""
    width = max([len("category"), *(len(row.category.name) for row in evaluation.per_category)])
    lines = [f" {'id':>5} {'category':<{width}}" + "".join(f" {name:>6}" for name in _COLUMNS)]
    for row in evaluation.per_category:
        values = [row.values[name] for name in _COLUMNS]
        cells = "".join(f" {'-' if v is None else f'{v:0.3f}':>6}" for v in values)
        lines.append(f" {row.category.id:>5} {row.category.name:<{width}}{cells}")
    return "\n".join(lines)
