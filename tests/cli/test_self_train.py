"""`pmvis self-train`: its plan, its refusals, its rounds on made-up labels, and rounds for real."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmvis_cli import self_train
from pmvis_cli.app import main
from pmvis_cli.console import get_console, set_console
from pmvis_core import masks
from pmvis_core.tracks_io import TracksHeader, TracksWriter
from pmvis_core.types import Category, Track, VideoInfo, VideoTracks
from tests.cli.conftest import EASY
from tests.cli.test_children import ended, only_child

Run = Callable[..., Any]
RECIPE = self_train.Recipe(
    init="image",
    model="0",
    frames="a b.json",
    held_out=0.2,
    seed=5,
    gt="valid.json",
    device="cpu",
    topk=4,
    overlap=None,
    infer=("--set", "row_score=0.1"),
    refine=("--method", "flow"),
    filter=("--quality", "0.5"),
    train=("--steps", "7"),
    measure=("--root", "valid"),
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
    assert labels[2].arguments[2:6] == ("--topk", "4", *RECIPE.filter)
    assert "--root" in labels[3].arguments and "--root" not in labels[0].arguments
    assert labels[0].arguments[3:5] == labels[3].arguments[3:5] == RECIPE.infer
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


@pytest.mark.parametrize(
    "words, message",
    [
        ("--dropped learn", "`--dropped learn`"),
        ("--dropped ignore --refine-pscore 0.1", "`--refine-pscore` leaves some out"),
    ],
)
def test_options_of_later_commands_are_checked_first(
    pmvis: Run, tmp_path: Path, words: str, message: str
) -> None:
    out = ["--frames", tmp_path, "-o", tmp_path / "out"]
    done = pmvis("self-train", "--init", tmp_path, *out, *words.split())
    assert (done.code, message in done.err) == (2, True)
    assert not (tmp_path / "out").exists()


def in_this_process(words: Sequence[str]) -> int:
    """Stand for `run_command`: run a command here, what it prints thrown away."""
    console = get_console()
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")):
        code = main(list(words))
    set_console(console)
    return code


class MadeUp:
    """Stands for `run_command`: each round's labels have a quality that is told beforehand."""

    videos = 10

    def __init__(self, qualities: Sequence[float], scores: Sequence[float] = ()) -> None:
        self.qualities = qualities
        self.scores = scores or [0.9] * len(qualities)
        self.commands: list[str] = []
        self.codes: dict[str, int] = {}
        """Of commands that fail."""
        self.spread = 0.0
        """How far the videos' quality is from that of a round from 1 on, to both sides in turn."""
        self.stop_at: int | None = None
        """Number of the command that is interrupted before it has made anything."""

    def __call__(self, words: Sequence[str]) -> int:
        self.commands.append(words[0])
        if self.stop_at == len(self.commands) - 1:
            raise KeyboardInterrupt
        target = Path(words[-1])
        if words[0] in self.codes:
            return self.codes[words[0]]
        if words[0] == "filter":
            return in_this_process(words)
        if words[0] == "train-video":
            target.mkdir(parents=True)
            (target / "config.toml").write_text(str(target))
            (target / "model.safetensors").write_text(f"trained in {target.parent.name}")
        elif words[0] == "convert-weights":
            target.write_text(f"converted {Path(words[1]).name}")
        elif words[0] == "eval":
            target.write_text('{"AP": 0.25}')
        else:
            self.label(target, int(target.parent.name.removeprefix("round-")))
        return 0

    def label(self, target: Path, number: int) -> None:
        """Write two tracks a video, of which the second is worthless."""
        mask = np.zeros((8, 16), np.uint8)
        mask[2:6, 1:5] = 1
        best = Track(1, 1, self.scores[number], (0.5,), (masks.encode(mask),))
        rest = replace(best, id=2, score=0.01, quality=0.0)
        with TracksWriter(target, TracksHeader((Category(1, "fox"),))) as out:
            for video in range(1, self.videos + 1):
                away = self.spread * (-1) ** video if number else 0.0
                rated = replace(best, quality=self.qualities[number] + away)
                out.write(VideoTracks(VideoInfo(video, f"v{video}", 8, 16, 1), (rated, rest)))


@pytest.fixture
def rounds(
    pmvis: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[MadeUp, str], Any]:
    """Return a function that runs `self-train` with made-up commands in ``tmp_path/out``."""
    image = tmp_path / "image"
    image.mkdir()
    (image / "model.safetensors").write_text("given")

    def run(commands: MadeUp, words: str = "", init: Path = image) -> Any:
        monkeypatch.setattr(self_train, "run_command", commands)
        start = ["self-train", "--init", init, "--frames", tmp_path, "--device", "cpu"]
        return pmvis(*start, "-o", tmp_path / "out", *words.split())

    return run


@pytest.mark.parametrize(
    "qualities, words, best, stopped",
    [
        ((0.5, 0.6, 0.7, 0.65), "--rounds 5", 2, True),
        ((0.5, 0.6, 0.7, 0.7), "--rounds 5", 2, True),
        ((0.5, 0.6, 0.7), "--rounds 2", 2, False),
        ((0.7, 0.6), "--rounds 3", 0, True),
        ((0.7, 0.6, 0.8, 0.7, 0.7), "--rounds 8 --patience 2", 2, True),
        ((0.7, 0.6, 0.5), "--rounds 2 --held-out 0", 2, False),
    ],
)
def test_the_most_consistent_round_wins(
    rounds: Any,
    tmp_path: Path,
    qualities: Sequence[float],
    words: str,
    best: int,
    stopped: bool,
) -> None:
    done = rounds(MadeUp(qualities), f"{words} --gt valid.json --json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result == json.loads((tmp_path / "out/result.json").read_text())
    assert (result["best"], result["stopped"]) == (best, stopped)
    assert [row["round"] for row in result["rounds"]] == list(range(len(qualities)))
    if "--held-out" in words:
        assert not any("consistency" in row for row in result["rounds"])
    else:
        assert [row["consistency"] for row in result["rounds"]] == pytest.approx(qualities)
        assert (len(result["held_out"]), result["labels"]) == (2, 2)
    assert all((row["tracks"], row["AP"]) == (10, 0.25) for row in result["rounds"])
    assert [row.get("kept_on") for row in result["rounds"]] == [None, *[1.0] * (len(qualities) - 1)]
    model = (tmp_path / "out/model.safetensors").read_text()
    assert model == (f"trained in round-{best}" if best else "given")
    assert (tmp_path / "out/config.toml").exists() == bool(best)


def test_a_gain_within_the_noise_ends_it_and_still_counts(rounds: Any) -> None:
    commands = MadeUp((0.5, 0.6, 0.9))
    commands.spread = 0.3
    result = json.loads(rounds(commands, "--rounds 2 --json").out)
    assert (result["best"], result["stopped"], len(result["rounds"])) == (1, True, 2)
    row = result["rounds"][1]
    assert 0 < row["gain"] < row["noise"]


def test_a_table_of_rounds_is_the_product(rounds: Any) -> None:
    done = rounds(MadeUp((0.7, 0.6)), "--gt valid.json")
    lines = [line.strip(" │┃").split() for line in done.out.splitlines()]
    head = "round ┃ tracks ┃ consistency ┃ gain ┃ noise ┃ kept on ┃ AP"
    assert head.split() in lines
    assert "1 │ 10 │ 0.600 │ -0.100 │ 0.000 │ 1.000 │ 0.250".split() in lines
    assert "round 0 (the one that was given) is the final model" in " ".join(done.out.split())


def test_more_rounds_continue_a_folder(rounds: Any, tmp_path: Path) -> None:
    commands = MadeUp((0.5, 0.6, 0.7))
    assert rounds(commands, "--rounds 1").code == 0
    assert "trained in round-1" in (tmp_path / "out/model.safetensors").read_text()
    made = len(commands.commands)
    assert rounds(commands, "--rounds 2").code == 0
    assert commands.commands[made:] == ["train-video", "infer", "refine", "filter"]
    assert "trained in round-2" in (tmp_path / "out/model.safetensors").read_text()


@pytest.mark.parametrize("words", ["--patience 3", "--held-out 0"])
def test_labels_that_vanish_end_it_and_the_model_before_counts(rounds: Any, words: str) -> None:
    done = rounds(MadeUp((0.5, 0.4), scores=(0.9, 0.1)), f"{words} --json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["stopped"], result["best"]) == (True, 0)
    assert [row["tracks"] for row in result["rounds"]] == [10, 0]
    assert ("the last round counts" in done.err) == (words == "--held-out 0")


def test_a_model_without_labels_is_told_before_it_trains(rounds: Any) -> None:
    commands = MadeUp((0.5,), scores=(0.1,))
    done = rounds(commands)
    assert (done.code, "holds no track to learn from" in done.err) == (1, True)
    assert "train-video" not in commands.commands


@pytest.mark.parametrize("code, told", [(4, 4), (-9, 137)])
def test_a_failing_command_ends_it_with_its_exit_code(
    rounds: Any, tmp_path: Path, code: int, told: int
) -> None:
    commands = MadeUp((0.5, 0.6))
    commands.codes["train-video"] = code
    done = rounds(commands)
    assert done.code == told
    assert f"`pmvis train-video` failed with exit code {code}" in done.err
    assert "the same `pmvis self-train` again continues from there" in done.err
    assert not (tmp_path / "out/model.safetensors").exists()


def test_a_given_file_that_no_round_beats_is_converted(rounds: Any, tmp_path: Path) -> None:
    (tmp_path / "idol.pth").touch()
    assert rounds(MadeUp((0.7, 0.6)), init=tmp_path / "idol.pth").code == 0
    assert (tmp_path / "out/model.safetensors").read_text() == "converted idol.pth"


def test_another_model_under_the_same_name_is_refused(rounds: Any, tmp_path: Path) -> None:
    assert rounds(MadeUp((0.5, 0.6)), "--rounds 1").code == 0
    (tmp_path / "image/model.safetensors").write_text("trained for longer")
    done = rounds(MadeUp((0.5, 0.6)), "--rounds 1")
    assert (done.code, "with other options" in done.err) == (2, True)


def test_interrupted_at_every_command_it_ends_alike(rounds: Any, tmp_path: Path) -> None:
    words, out = "--rounds 3 --gt valid.json --json", tmp_path / "out"
    commands = MadeUp((0.5, 0.6, 0.7, 0.6))
    whole = rounds(commands, words)
    assert whole.code == 0, whole.err
    files = {path.name: path.read_bytes() for path in out.rglob("*.*")}
    out.rename(tmp_path / "whole")
    codes = []
    commands.stop_at = 1
    for _ in commands.commands.copy():
        commands.commands.clear()
        done = rounds(commands, words)
        codes.append(done.code)
    assert codes == [130] * (len(codes) - 1) + [0]
    assert done.out == whole.out
    assert {path.name: path.read_bytes() for path in out.rglob("*.*")} == files


def test_killed_while_it_trains_and_resumed(
    tiny: Path,
    pmvis: Run,
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    videos = tiny / "synth/videos"
    words = ["self-train", "--init", tiny / "run", "--frames", videos / "train.json"]
    words += ["--rounds", "2", "--patience", "2", "--topk", "2", "--pscore", "0", "--device", "cpu"]
    words += ["--steps", "4", "--set", "train.pairs_per_batch=2", "--set", "train.save_every=1"]
    words += [word for setting in EASY.split() for word in ("--infer-set", setting)]
    words += ["--held-out", "0.3", "--dropped", "ignore", "--json"]

    out = tmp_path / "out"
    command = [sys.executable, "-m", "pmvis_cli.app", *map(str, words), "-o", str(out)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        while not (out / "round-1/model/config.toml").exists() and process.poll() is None:
            time.sleep(0.02)
        child = only_child(process.pid)
        process.send_signal(signal.SIGKILL)
        _, told = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, told.decode()
    ended(child)
    assert not (out / "round-1/model/model.safetensors").exists()
    made = {path: path.stat().st_mtime_ns for path in (out / "round-0").iterdir()}

    monkeypatch.setattr(self_train, "run_command", in_this_process)
    done = pmvis(*words, "-o", out)
    assert done.code == 0, done.err
    assert made == {path: path.stat().st_mtime_ns for path in made}
    commands = [line.split()[2] for line in done.err.splitlines() if line.startswith("$ pmvis")]
    labels = ["infer", "refine", "filter"]
    assert commands == ["train-video", *labels, "train-video", *labels]
    result = json.loads(done.out)
    assert [row["round"] for row in result["rounds"]] == [0, 1, 2]
    assert all(0 <= row["consistency"] <= 1 for row in result["rounds"])
    again = pmvis(*words, "-o", out)
    assert json.loads(again.out) == result
    assert "$ pmvis" not in again.err

    unbroken = pmvis(*words, "-o", tmp_path / "unbroken")
    assert json.loads(unbroken.out) == result
    for path in (tmp_path / "unbroken").rglob("*.*"):
        if path.suffix in {".jsonl", ".safetensors", ".json"} and path.name != "self_train.json":
            assert path.read_bytes() == (out / path.relative_to(tmp_path / "unbroken")).read_bytes()
