"""`pmvis self-train`: its plan, its refusals, and rounds by real processes, killed and resumed."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from pmvis_cli import self_train
from pmvis_cli.app import main
from pmvis_cli.console import get_console, set_console

Run = Callable[..., Any]
RECIPE = self_train.Recipe(
    init="image",
    frames="a b.json",
    rounds=2,
    held_out=0.2,
    seed=5,
    gt="valid.json",
    device="cpu",
    filter=("--topk", "4", "--quality", "0.5"),
    refine=("--method", "flow"),
    train=("--steps", "7"),
)


def test_rounds_start_from_the_model_and_labels_of_the_one_before(tmp_path: Path) -> None:
    labels = self_train.label_steps(tmp_path, RECIPE, 1)
    commands = [step.arguments[0] for step in labels]
    assert commands == ["infer", "refine", "filter", "infer", "eval"]
    for step in labels:
        assert str(step.product) == step.arguments[-1]
        assert step.product.parent == tmp_path / "round-1"
    assert labels[0].arguments[2] == str(tmp_path / "round-1/model")
    assert self_train.label_steps(tmp_path, RECIPE, 0)[0].arguments[2] == "image"
    assert labels[2].arguments[2:6] == RECIPE.filter
    first, second = (self_train.train_step(tmp_path, RECIPE, n).arguments for n in (1, 2))
    assert first[first.index("--init") + 1] == "image"
    assert second[second.index("--init") + 1] == str(tmp_path / "round-1/model")
    assert second[second.index("--pseudo") + 1] == str(tmp_path / "round-1/learn.tracks.jsonl")
    assert (first[first.index("--seed") + 1], second[second.index("--seed") + 1]) == ("5", "6")


def test_a_folder_with_other_options_is_refused(pmvis: Run, tmp_path: Path) -> None:
    words = ["self-train", "--init", tmp_path / "none", "--frames", tmp_path, "--device", "cpu"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    done = pmvis(*words, "--overwrite", "-o", tmp_path / "out")
    assert (done.code, "was not made by `pmvis self-train`" in done.err) == (2, True)
    (tmp_path / "out/file").rename(tmp_path / "out/self_train.json")
    done = pmvis(*words, "-o", tmp_path / "out")
    assert (done.code, "with other options" in done.err) == (2, True)


def test_options_of_later_commands_are_checked_first(pmvis: Run, tmp_path: Path) -> None:
    words = ["--frames", tmp_path, "--dropped", "learn", "-o", tmp_path / "out"]
    done = pmvis("self-train", "--init", tmp_path, *words)
    assert (done.code, "`--dropped learn`" in done.err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_failing_command_ends_it_with_its_exit_code(pmvis: Run, tmp_path: Path) -> None:
    words = ["--frames", tmp_path, "--device", "cpu", "-o", tmp_path / "out"]
    done = pmvis("self-train", "--init", tmp_path / "none", *words)
    assert done.code in (3, 4)
    assert "`pmvis infer` failed with exit code" in done.err
    assert not (tmp_path / "out/model.safetensors").exists()


def in_this_process(words: Sequence[str]) -> int:
    """Stand for `self_train._run`: run a command here, what it prints thrown away."""
    console = get_console()
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")):
        code = main(list(words))
    set_console(console)
    return code


def test_killed_and_resumed(
    tiny: Path,
    pmvis: Run,
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, videos = tmp_path / "out", tiny / "synth/videos"
    words = ["self-train", "--init", tiny / "run", "--frames", videos / "train.json", "-o", out]
    words += ["--rounds", "1", "--topk", "2", "--pscore", "0", "--quality", "0", "--device", "cpu"]
    words += ["--steps", "1", "--set", "train.pairs_per_batch=2", "--held-out", "0.3"]
    words += ["--dropped", "ignore", "--gt", videos / "valid.json", "--json"]
    command = [sys.executable, "-m", "pmvis_cli.app", *map(str, words)]
    raw, refined = (out / f"round-0/{name}.tracks.jsonl" for name in ("raw", "refined"))
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        while not refined.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told.decode()
    assert refined.exists() and not (out / "model.safetensors").exists()
    made = raw.stat().st_mtime_ns

    monkeypatch.setattr(self_train, "_run", in_this_process)
    done = pmvis(*words)
    assert done.code == 0, done.err
    assert raw.stat().st_mtime_ns == made
    commands = [line.split()[2] for line in done.err.splitlines() if line.startswith("$ pmvis")]
    labels = ["refine", "filter", "infer", "eval"]
    assert commands[-len(labels) - 2 :] == ["train-video", "infer", *labels]
    result = json.loads(done.out)
    assert (result["best"], result["stopped"], len(result["held_out"])) == (1, False, 1)
    assert [row["round"] for row in result["rounds"]] == [0, 1]
    assert all(0 <= row["AP"] <= 1 for row in result["rounds"])
    assert 0 <= result["rounds"][1]["consistency"] <= 1
    model = out / "model.safetensors"
    assert model.read_bytes() == (out / "round-1/model/model.safetensors").read_bytes()
    again = pmvis(*words)
    assert json.loads(again.out) == result
    assert "$ pmvis" not in again.err
