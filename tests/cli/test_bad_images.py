"""Training through a storm of broken images: counted, told, replaced, the same for all workers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def stormy(tiny: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny benchmark in which one image of 21 is truncated."""
    folder = tmp_path / "data"
    shutil.copytree(tiny / "synth", folder / "synth")
    shutil.copytree(tiny / "maps", folder / "maps")
    data = json.loads((folder / "maps/train_image.json").read_text())
    image = folder / "maps" / data["images"][2]["file_name"]
    image.write_bytes(image.read_bytes()[:-20])
    return folder


def train(pmvis: Run, folder: Path, run: Path, *more: Any) -> Any:
    data = ("--data", folder / "maps/train_image.json", "--preset", "tiny", "--device", "cpu")
    steps = ("--steps", "12", "--set", "train.pairs_per_batch=2", "--set", "train.log_every=4")
    return pmvis("train-image", *data, *steps, "-o", run, *more)


def test_a_broken_image_is_skipped_whatever_the_workers(
    pmvis: Run, stormy: Path, tmp_path: Path
) -> None:
    models = []
    for workers in (0, 2):
        run = tmp_path / f"run{workers}"
        done = train(pmvis, stormy, run, "--workers", workers)
        assert done.code == 0, done.err
        assert "skipped, another is drawn" in done.err and "is truncated" in done.err
        assert "samples could not be made and were replaced (1 different faults" in done.err
        assert f"`{run}/run.json` names them" in done.err
        skipped = json.loads((run / "run.json").read_text())["skipped"]
        assert skipped["samples"] > 0
        (fault,) = skipped["faults"]
        assert re.fullmatch(r"training image \d+: `[^/]*` is truncated", fault)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert any("skipped_samples" in line for line in lines)
        models.append((run / "model.safetensors").read_bytes())
    assert models[0] == models[1]


def test_on_error_stop(pmvis: Run, stormy: Path, tmp_path: Path) -> None:
    done = train(pmvis, stormy, tmp_path / "run", "--on-error", "stop")
    assert done.code == 3
    assert "is truncated" in done.err


@pytest.mark.parametrize("command", ["train-image", "train-propagator"])
@pytest.mark.parametrize("word", ["skipp", "plan"])
def test_a_policy_that_is_none_is_refused_before_anything_is_lost(
    pmvis: Run, tiny: Path, tmp_path: Path, command: str, word: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny / "run", run)
    model = (run / "model.safetensors").read_bytes()
    words = (command, "--data", tiny / "maps/train_image.json", "-o", run, "--device", "cpu")
    wrong = pmvis(*words, "--set", f"train.on_error={word}", "--overwrite")
    assert wrong.code == 2
    assert f"`train.on_error` is '{word}', expected one of skip, stop" in wrong.err
    assert (run / "model.safetensors").read_bytes() == model
    if command == "train-image":
        assert pmvis(*words, "--on-error", word, "--dry-run").code == 2


def test_half_of_the_files_broken_is_one_error(pmvis: Run, stormy: Path, tmp_path: Path) -> None:
    data = json.loads((stormy / "maps/train_image.json").read_text())
    for row in data["images"][::2]:
        image = stormy / "maps" / row["file_name"]
        image.write_bytes(image.read_bytes()[:-20])
    done = train(pmvis, stormy, tmp_path / "run", "--steps", "30")
    assert done.code == 3
    assert done.err.count("error:") == 1
    assert "are broken" in done.err
    assert "`pmvis check-data` lists every fault" in done.err
    assert not (tmp_path / "run/model.safetensors").exists()
    assert json.loads((tmp_path / "run/run.json").read_text())["skipped"]["different"] > 1


def test_a_dry_run_needs_no_images(pmvis: Run, tiny: Path, tmp_path: Path) -> None:
    """It plans; that training would stop is a warning."""
    alone = tmp_path / "train_image.json"
    alone.write_bytes((tiny / "maps/train_image.json").read_bytes())
    words = ("--data", alone, "--preset", "tiny", "--device", "cpu", "-o", tmp_path / "run")
    done = pmvis("train-image", *words, "--dry-run", "--on-error", "stop")
    assert done.code == 0, done.err
    assert "21 of 21 training images are missing" in done.err
    assert "training stops: the annotations name files relative to" in done.err
    refused = pmvis("train-image", *words)
    assert (refused.code, "give their folder with `--images`" in refused.err) == (3, True)
