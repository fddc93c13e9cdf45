"""What the demo shows at its end: three models, the labels at three stages, and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pmvis_core.evaluation.label_quality import label_quality
from pmvis_core.files import atomic_write, read_json
from pmvis_core.formats.ytvis import open_tracks, read_dataset
from pmvis_core.report.page import (
    ResultTable,
    SheetGroup,
    demo_picture,
    found_strip,
    overlay_video,
    truth_strip,
    write_picture,
)
from pmvis_core.video.frames import open_videos, write_video

MODELS = ("image", "video", "control")
LABELS = ("raw", "refined", "kept")
METRICS = ("AP", "AP50", "AP75", "AR1", "AR10")
SHOWN_SCORE = 0.3
"""Tracks below are not drawn."""
SHEET_VIDEOS = 3
OVERLAY_VIDEOS = 8


def measure(folder: Path) -> dict[str, Any]:
    """Collect the figures of a finished demo.

    Returns:
        ``models``: per model AP, AP50, AP75, AR1, AR10 in percent, AP over box-only and over mask
        categories; ``labels``: per stage precision and recall of the pseudo labels in percent.
    """
    box_only = _box_only_categories(folder / "maps/categories.json")
    models = {}
    for name in MODELS:
        metrics = read_json(folder / f"{name}.metrics.json", "metrics")
        models[name] = {m: _percent(metrics[m]) for m in METRICS}
        for key, wanted in (("AP_box_only", True), ("AP_masks", False)):
            values = [
                row["AP"]
                for row in metrics["per_category"]
                if (row["name"] in box_only) == wanted and row["AP"] is not None
            ]
            models[name][key] = _percent(sum(values) / len(values)) if values else None
    truth = read_dataset(folder / "data/videos/train_truth.json")
    labels = {}
    for name in LABELS:
        quality = label_quality(open_tracks(folder / f"{name}.tracks.jsonl"), truth)
        shares = ("precision", "class_agnostic_precision", "recall")
        labels[name] = {s: _percent(quality[s]) for s in shares} | {"tracks": quality["predicted"]}
    return {"models": models, "labels": labels}


def write_pictures(folder: Path, result: Mapping[str, Any]) -> None:
    """Write ``result.md``, ``sheet.png`` and ``overlay.mp4``."""
    models, labels = _model_table(result["models"]), _label_table(result["labels"])
    with atomic_write(folder / "result.md") as stream:
        stream.write(f"{_markdown(models)}\n{_markdown(labels)}")
    valid = folder / "data/videos/valid.json"
    truth = read_dataset(valid)
    names = {category.id: category.name for category in truth.categories}
    sources = {source.info.id: source for source in open_videos(valid)}
    found = {
        name: {video.video.id: video for video in open_tracks(folder / f"{name}.tracks.jsonl")}
        for name in ("image", "video")
    }
    rows = [
        (sources[video.video.id], video, {n: found[n][video.video.id] for n in found})
        for video in truth
    ]
    sheet = demo_picture(rows[:SHEET_VIDEOS], names, models, min_score=SHOWN_SCORE)
    write_picture(folder / "sheet.png", sheet)
    groups = [
        SheetGroup(
            source.info.name,
            source,
            (
                true := truth_strip("truth", video.tracks),
                *(found_strip(n, v.tracks, SHOWN_SCORE, true) for n, v in tracks.items()),
            ),
        )
        for source, video, tracks in rows[:OVERLAY_VIDEOS]
    ]
    write_video(folder / "overlay.mp4", overlay_video(groups, names), fps=6.0)


def _box_only_categories(path: Path) -> set[str]:
    """Return the names of the target categories that no mask was given for."""
    document = read_json(path, "category map")
    names = {c["id"]: c["name"] for c in document["categories"]}
    masked = {row["target_id"] for row in document["sources"]["coco"]["map"]}
    return {name for number, name in names.items() if number not in masked}


def _percent(share: float | None) -> float | None:
    """Return a share as percent with two decimals."""
    return None if share is None else round(100 * share, 2)


def _model_table(models: Mapping[str, Mapping[str, float]]) -> ResultTable:
    """Return the table of the three models; the best AP is set in bold."""
    captions = {
        "image": "image model",
        "video": "video model (pseudo labels)",
        "control": "control (same steps, images)",
    }
    keys = (*METRICS, "AP_masks", "AP_box_only")
    best = max(range(len(MODELS)), key=lambda index: models[MODELS[index]]["AP"] or 0.0)
    return ResultTable(
        ("on held-out videos", "AP", "AP50", "AP75", "AR1", "AR10", "AP masks", "AP box-only"),
        tuple((captions[name], *(_cell(models[name][key]) for key in keys)) for name in MODELS),
        best,
    )


def _label_table(labels: Mapping[str, Mapping[str, float]]) -> ResultTable:
    """Return the table of the pseudo labels' quality."""
    keys = ("precision", "class_agnostic_precision", "recall")
    rows = tuple(
        (name, *(_cell(labels[name][key]) for key in keys), str(labels[name]["tracks"]))
        for name in LABELS
    )
    heads = ("pseudo labels", "precision", "whatever the class", "recall", "tracks")
    return ResultTable(heads, rows)


def _cell(value: float | None) -> str:
    """Return a figure with one decimal."""
    return "-" if value is None else f"{value:.1f}"


def _markdown(table: ResultTable) -> str:
    """Return a table as Markdown."""
    lines = [table.columns, ("---", *("---:" for _ in table.columns[1:])), *table.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
