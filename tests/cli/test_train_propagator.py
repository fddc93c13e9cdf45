"""`pmvis train-propagator` as a real process, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pmvis_cli.app import load_command
from pmvis_core.config import read_toml
from pmvis_core.propagator_training import validation
from pmvis_core.weights.deaot import read_deaot
from tests.flat_stills import draw_stills

Run = Callable[..., Any]
SMALL = "--crop 49 --set clip.frames=3 --set clip.least_area=600 --set train.clips_per_batch=1"


def test_a_run_by_a_real_process_and_its_folder(
    shell: Run, pmvis: Run, tiny: Path, tmp_path: Path
) -> None:
    words = f"pmvis train-propagator --data {tiny}/maps/train_image.json {SMALL} --device cpu"
    done = shell(f"{words} --steps 2 --set train.log_every=1 --json -o run", timeout=120)
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"run": "run", "variant": "deaott"}
    assert re.search(r"\d+ of \d+ images have boxes only: left out", done.err)
    assert "wrote run" in done.err
    run = tmp_path / "run"
    names = ["config.toml", "losses.png", "metrics.jsonl", "model.safetensors", "run.json"]
    assert sorted(path.name for path in run.iterdir()) == names
    config = read_toml(run / "config.toml")
    assert (config["variant"], config["clip"]["crop"], config["train"]["steps"]) == (
        "deaott",
        49,
        2,
    )
    facts = json.loads((run / "run.json").read_text())
    assert facts["annotations"]["human"]["video_labels"] == 0
    assert facts["annotations"]["human"]["masks"] > 0
    assert facts["inputs"]["stage"] == "propagator"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "loss_frames", "gradient_norm", "learning_rate", "step"} <= lines[0].keys()
    assert read_deaot(run).variant == "deaott"
    further = pmvis(*words.split()[1:], "--steps", 1, "--init", run, "-o", tmp_path / "further")
    assert further.code == 0, further.err


@pytest.fixture
def train(pmvis: Run, tiny: Path, tmp_path: Path) -> Run:
    """Return a function that runs `train-propagator` in this process."""

    def run(*more: Any) -> Any:
        data = ("--data", tiny / "maps/train_image.json", "--device", "cpu")
        return pmvis("train-propagator", *data, *more, "-o", tmp_path / "run")

    return run


def test_stills_to_validate_on(
    pmvis: Run, train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "CLIPS", 3)
    held = draw_stills(tmp_path)
    words = (*SMALL.split(), "--steps", 2, "--set", "train.log_every=1")
    done = train(*words, "--val", held, "--val-images", tmp_path, "--val-every", 1)
    assert done.code == 0, done.err
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_J" in line] == [1, 2]
    assert "val_J" in json.loads((run / "run.json").read_text())["best"]
    before = (run / "model.safetensors").read_bytes()
    alone = train(*words, "--val-images", tmp_path)
    assert (alone.code, "`--val-images` is for `--val`" in alone.err) == (2, True)
    (tmp_path / "1.png").unlink()
    for wrong in (("--val", held), ("--val", tmp_path / "none.json"), ("--crop", 100)):
        refused = train(*words, *wrong, "--overwrite")
        assert refused.code in (2, 3), refused.err
    assert (run / "model.safetensors").read_bytes() == before


def test_settings_and_where_they_come_from(train: Run) -> None:
    done = train("--variant", "aott", "--crop", "97", "--steps", "9", "--print-config")
    assert done.code == 0, done.err
    assert 'variant = "aott"  # command line' in done.out
    assert "crop = 97  # command line" in done.out
    assert "steps = 9  # command line" in done.out
    assert "weight_decay = 0.03\n" in done.out


def test_what_cannot_be_trained(train: Run, tmp_path: Path) -> None:
    unknown = train("--variant", "deaot")
    assert (unknown.code, "no propagator `deaot`" in unknown.err) == (2, True)
    assert "deaott" in unknown.err
    odd = train("--crop", "100")
    assert (odd.code, "take 97 instead" in odd.err) == (2, True)
    lost = train("--crop", "49", "--init", tmp_path / "absent.pth")
    assert (lost.code, "do not exist" in lost.err) == (4, True)
    assert not (tmp_path / "run/model.safetensors").exists()


def test_examples_in_the_help_use_options_that_exist(pmvis: Run) -> None:
    text = pmvis("train-propagator", "--help").out
    known = {option for param in load_command("train-propagator").params for option in param.opts}
    examples = re.findall(r"pmvis train-propagator (.*?)(?=pmvis|Reads:)", text, re.DOTALL)
    used = {option for example in examples for option in re.findall(r"(?<!\w)--?[a-z-]+", example)}
    assert len(examples) >= 2
    assert {"-o", "--data"} <= used <= known
