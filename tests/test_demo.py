"""The demo's figures and pictures, on tracks whose quality is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import pytest

from pmvis_core.demo import LABELS, MODELS, measure, write_pictures
from pmvis_core.evaluation.average_precision import evaluate
from pmvis_core.evaluation.tables import metrics
from pmvis_core.files import write_json
from pmvis_core.formats.predictions import read_predictions
from pmvis_core.formats.ytvis import open_tracks, read_dataset
from pmvis_core.tracks_io import TracksWriter
from pmvis_core.types import VideoTracks
from tests.tiny_data import draw_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo's folder in which the video model is perfect and the image model finds nothing."""
    folder = draw_tiny(tmp_path_factory.mktemp("demo"))
    (folder / "synth").rename(folder / "data")
    videos = folder / "data/videos"

    def copy(truth: Path, name: str, change: Callable[[VideoTracks], VideoTracks]) -> None:
        source = open_tracks(truth)
        with TracksWriter(folder / f"{name}.tracks.jsonl", source.header) as writer:
            for video in source:
                writer.write(change(video))

    for name in LABELS:
        found = {"raw": lambda v: v.with_tracks(v.tracks[:1]), "kept": lambda v: v}
        copy(videos / "train_truth.json", name, found.get(name, lambda v: v.with_tracks(())))
    truth = read_dataset(videos / "valid.json")
    for name in MODELS:
        share = {"image": 0, "control": 1, "video": None}[name]
        copy(videos / "valid.json", name, lambda v, n=share: v.with_tracks(v.tracks[:n]))
        found = read_predictions(folder / f"{name}.tracks.jsonl", truth)
        write_json(folder / f"{name}.metrics.json", metrics(evaluate(truth, found)))
    return folder


def test_models_and_labels_are_measured(folder: Path) -> None:
    result = measure(folder)
    assert result["models"]["video"]["AP"] == 100.0
    assert result["models"]["image"]["AP"] == 0.0
    assert 0.0 < result["models"]["control"]["AP"] < 100.0
    raw, refined, kept = (result["labels"][name] for name in LABELS)
    assert (raw["precision"], kept["precision"], kept["recall"]) == (100.0, 100.0, 100.0)
    assert raw["recall"] < kept["recall"]
    assert (refined["tracks"], refined["recall"]) == (0, 0.0)


def test_pictures_and_tables_are_written(folder: Path) -> None:
    result = measure(folder)
    write_pictures(folder, result)
    lines = (folder / "result.md").read_text().splitlines()
    assert any(line.startswith("| video model") and "100.0" in line for line in lines)
    assert any(line.startswith("| kept") for line in lines)
    assert cv2.imread(str(folder / "sheet.png")).shape[1] > 600
    frames = cv2.VideoCapture(str(folder / "overlay.mp4"))
    assert frames.get(cv2.CAP_PROP_FRAME_COUNT) >= 4
