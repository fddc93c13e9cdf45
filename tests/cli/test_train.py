"""`pmvis train-image` and `pmvis train-video`: plans, settings and their origins, run folders."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pmvis_cli.app import load_command
from pmvis_core.checkpoint import load_model
from pmvis_core.config import override, read_toml
from pmvis_core.systems.pmvis import ImageStage, RunConfig
from pmvis_core.systems.presets import VIDEO_PRESETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Run = Callable[..., Any]
RUN_FILES = ["config.toml", "metrics.jsonl", "model.safetensors", "run.json"]


@pytest.fixture
def image(pmvis: Run, tiny: Path) -> Run:
    """Return a function that runs `train-image` on the tiny benchmark with a small batch."""

    def run(*more: Any) -> Any:
        data = ("--data", tiny / "maps/train_image.json", "--preset", "tiny", "--device", "cpu")
        return pmvis("train-image", *data, "--set", "train.pairs_per_batch=2", *more)

    return run


@pytest.fixture
def video(pmvis: Run, tiny: Path) -> Run:
    """Return a function that runs `train-video` on true tracks of the tiny benchmark."""

    def run(*more: Any) -> Any:
        videos = tiny / "synth/videos"
        data = ("--pseudo", videos / "train_truth.json", "--frames", videos / "train.json")
        words = ("train-video", *data, "--init", tiny / "run", "--device", "cpu")
        return pmvis(*words, "--set", "train.pairs_per_batch=2", *more)

    return run


@pytest.mark.parametrize("name", ["train-image", "train-video"])
def test_examples_in_the_help_use_options_that_exist(pmvis: Run, name: str) -> None:
    text = pmvis(name, "--help").out
    known = {option for param in load_command(name).params for option in param.opts}
    known |= {option for param in load_command(name).params for option in param.secondary_opts}
    examples = re.findall(rf"pmvis {name} (.*?)(?=pmvis|Reads:)", text, re.DOTALL)
    assert len(examples) >= 2
    used = {option for example in examples for option in re.findall(r"(?<!\w)--?[a-z-]+", example)}
    assert {"-o"} <= used <= known


def test_a_dry_run_says_what_learns_from_what_and_writes_nothing(
    image: Run, tmp_path: Path
) -> None:
    done = image("--dry-run", "--steps", "7", "-o", tmp_path / "run")
    assert done.code == 0, done.err
    rows = [line.split("│")[1:-1] for line in done.out.splitlines() if line.startswith("│")]
    cells = {row[1].strip(): (row[0].strip(), row[3].strip()) for row in rows}
    assert cells["mask"] == ("coco", "class, box, re-id, mask")
    assert cells["box"] == ("imagenet", "class, box, re-id")
    assert "7 steps of 2 pairs on cpu; video annotations: 0" in done.out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_as_json(image: Run, video: Run, tmp_path: Path) -> None:
    def losses(done: Any) -> dict[str, list[str]]:
        assert done.code == 0, done.err
        return {row["supervision"]: row["losses"] for row in json.loads(done.out)["rows"]}

    out = ("--dry-run", "--json", "-o", tmp_path / "run")
    assert losses(image(*out, "--box-loss")) == {
        "mask": ["class", "box", "re-id", "mask"],
        "box": ["class", "box", "re-id", "BoxInst"],
    }
    assert losses(image(*out, "--box-loss-all")) == {
        "mask": ["class", "box", "re-id", "mask", "BoxInst"],
        "box": ["class", "box", "re-id", "BoxInst"],
    }
    alike = ["class", "box", "re-id", "BoxInst"]
    found = losses(image(*out, "--no-mask-loss", "--box-loss-all"))
    assert found == {"mask": alike, "box": alike}
    assert losses(video(*out))["mask"][3:] == ["mask"]
    assert losses(video(*out, "--no-mask-loss"))["mask"][3:] == []
    assert json.loads(video(*out).out)["ledger"]["human"]["video_labels"] > 0


def test_settings_and_where_they_come_from(
    image: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[train]\nsteps = 9\nlog_every = 3\nsave_every = 4\n")
    monkeypatch.setenv("PMVIS_TRAIN_LOG_EVERY", "5")
    monkeypatch.setenv("PMVIS_TRAIN_STEPS", "8")
    done = image("--print-config", "--config", config, "--steps", "6", "-o", tmp_path / "run")
    assert done.code == 0, done.err
    found = tomllib.loads(done.out)
    assert found["preset"] == "tiny"
    chosen = [found["train"][name] for name in ("steps", "log_every", "save_every")]
    assert chosen == [6, 5, 4]
    assert "steps = 6  # command line\n" in done.out
    assert "log_every = 5  # environment\n" in done.out
    assert f"save_every = 4  # config {config}\n" in done.out
    assert re.search(r"^learning_rate = [\d.e-]+$", done.out, re.MULTILINE)
    assert not (tmp_path / "run").exists()
    config.write_text(done.out)
    again = image("--print-config", "--config", config, "-o", tmp_path / "run")
    assert tomllib.loads(again.out) == {**found, "train": {**found["train"], "steps": 8}}


def test_the_published_mistakes_are_made_on_request_only(image: Run, tmp_path: Path) -> None:
    mistakes = []
    for flags in ((), ("--reference-quirks",)):
        done = image(*flags, "--print-config", "-o", tmp_path / "run")
        assert done.code == 0, done.err
        values = tomllib.loads(done.out)
        config = override(RunConfig(), {"train": values["train"]}, "test")
        criterion = ImageStage(tmp_path).criterion(config, 0)
        mistakes.append((criterion.boxinst.channel_order, criterion.misplaced_boxes))
    assert mistakes == [("rgb", False), ("bgr", True)]


def test_a_run_folder_and_what_happens_to_it_the_second_time(image: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--steps", "1", "--set", "train.log_every=1", "-o", out)
    done = image(*words)
    assert (done.code, done.out) == (0, "")
    assert f"wrote {out}" in done.err
    assert sorted(path.name for path in out.iterdir()) == RUN_FILES
    assert tomllib.loads((out / "config.toml").read_text())["train"]["steps"] == 1
    facts = json.loads((out / "run.json").read_text())
    assert facts["annotations"]["human"]["video_labels"] == 0
    assert facts["inputs"]["stage"] == "image"
    before = (out / "model.safetensors").read_bytes()
    assert str(tmp_path).encode() not in before
    again = image(*words)
    assert (again.code, "already trained; nothing to do" in again.err) == (0, True)
    assert (out / "model.safetensors").read_bytes() == before
    other = image(*words, "--set", "train.learning_rate=0.5")
    assert other.code == 2
    assert "learning_rate 0.002 there, 0.5 here" in other.err
    assert "--overwrite" in other.err
    seeded = image(*words, "--seed", "1")
    assert (seeded.code, "seed 0 there, 1 here" in seeded.err) == (2, True)
    assert (out / "model.safetensors").read_bytes() == before


def test_overwrite_replaces_a_run_and_nothing_else(image: Run, tmp_path: Path) -> None:
    out, foreign = tmp_path / "run", tmp_path / "foreign"
    assert image("--steps", "1", "-o", out).code == 0
    first = (out / "model.safetensors").read_bytes()
    foreign.mkdir()
    for folder in (out, foreign):
        (folder / "notes.txt").write_text("mine")
    (foreign / "metrics.jsonl").write_text("mine, too")
    refused = image("--steps", "1", "--overwrite", "-o", foreign)
    assert (refused.code, "holds no run" in refused.err) == (2, True)
    assert (foreign / "metrics.jsonl").read_text() == "mine, too"
    done = image("--steps", "1", "--seed", "1", "--overwrite", "-o", out)
    assert done.code == 0, done.err
    assert (out / "model.safetensors").read_bytes() != first
    assert (out / "notes.txt").read_text() == "mine"


def test_the_video_stage_goes_on_from_a_model(video: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = video("--steps", "1", "--set", "train.log_every=1", "-o", out)
    assert done.code == 0, done.err
    config = read_toml(out / "config.toml")
    rate = VIDEO_PRESETS["tiny"].train.learning_rate
    assert (config["preset"], config["train"]["learning_rate"]) == ("tiny", rate)
    assert {"loss_mask", "loss_prj"} <= set(json.loads((out / "metrics.jsonl").read_text()))
    assert load_model(out).categories == load_model(tiny / "run").categories
    assert json.loads((out / "run.json").read_text())["inputs"]["stage"] == "video"


def test_stills_can_be_mixed_in(video: Run, tiny: Path, tmp_path: Path) -> None:
    stills = ("--data", tiny / "maps/train_image.json", "--set", "train.image_share=0.5")
    done = video("--dry-run", "--json", *stills, "-o", tmp_path / "run")
    assert done.code == 0, done.err
    assert {row["source"] for row in json.loads(done.out)["rows"]} == {"coco", "imagenet", "videos"}


def test_errors_as_json(image: Run, tmp_path: Path) -> None:
    done = image("--json", "--preset", "tinny", "-o", tmp_path / "run")
    assert done.code == 2
    assert json.loads(done.out) == {
        "error": "no preset `tinny`",
        "hint": "did you mean `tiny`?",
        "code": 2,
    }
    assert done.err == ""


def test_options_of_the_engine_are_settings(image: Run, tmp_path: Path) -> None:
    flags = ("--accumulate", "2", "--precision", "bfloat16", "--checkpoint-activations")
    done = image(*flags, "--compile", "--print-config", "-o", tmp_path / "run")
    assert done.code == 0, done.err
    train = tomllib.loads(done.out)["train"]
    names = ("accumulate", "precision", "checkpoint_activations", "compile", "normaliser")
    assert [train[name] for name in names] == [2, "bfloat16", True, True, "batch"]
    wrong = image("--precision", "half", "-o", tmp_path / "run")
    assert (wrong.code, "expected one of float32, bfloat16" in wrong.err) == (2, True)


def test_a_scaled_schedule_says_so(image: Run, tmp_path: Path) -> None:
    words = ("--scale-schedule", "--print-config", "-o", tmp_path / "run")
    done = image(*words, "--set", "train.warmup_steps=7")
    assert done.code == 0, done.err
    train = tomllib.loads(done.out)["train"]  # two pairs in place of the preset's six
    assert (train["steps"], train["warmup_steps"]) == (7200, 7)
    assert train["learning_rate"] == pytest.approx(2e-3 / 3)
    assert "steps = 7200  # --scale-schedule\n" in done.out
    assert "warmup_steps = 7  # command line\n" in done.out


def test_a_measured_plan(image: Run, tmp_path: Path) -> None:
    done = image("--measure", "--json", "-o", tmp_path / "run")
    assert done.code == 0, done.err
    facts = json.loads(done.out)["estimate"]
    assert facts["seconds"] > facts["data_seconds"] > 0
    assert facts["hours"] == pytest.approx(facts["seconds"] * 2400 / 3600)
    assert facts["activation_bytes"] > 0
    assert not (tmp_path / "run").exists()
    assert "M parameters" in image("--measure", "-o", tmp_path / "run").out


def test_tensorboard_is_an_extra(
    image: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    done = image("--steps", "1", "--tensorboard", "-o", tmp_path / "run")
    assert (done.code, "pmvis[tensorboard]" in done.err) == (4, True)


def test_videos_to_validate_on(image: Run, tiny: Path, tmp_path: Path) -> None:
    out, truth = tmp_path / "run", tiny / "synth/videos/valid.json"
    words = ("--steps", "2", "--set", "train.log_every=1", "-o", out)
    plan = image("--val", truth, "--dry-run", *words)
    assert "AP on 2 videos every 500 steps" in " ".join(plan.out.split())
    done = image("--val", truth, "--val-every", "1", *words)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_AP" in line] == [1, 2]
    assert "val_AP" in json.loads((out / "run.json").read_text())["best"]
    before = (out / "model.safetensors").read_bytes()
    for wrong, code in ((tmp_path / "none.json", 3), (tiny / "maps/train_image.json", 3)):
        refused = image("--val", wrong, *words, "--overwrite", "--seed", "1")
        assert (refused.code, wrong.name in refused.err) == (code, True), refused.err
    alone = image("--val-every", "1", *words)
    assert (alone.code, "`--val-every` is for `--val`" in alone.err) == (2, True)
    assert (out / "model.safetensors").read_bytes() == before
