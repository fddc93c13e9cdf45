"""`pmvis table`: the paper's tables from metrics files, and the Make targets that make them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pmvis_cli.app import load_command
from pmvis_core.report.paper_tables import METRICS, TABLES

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make")
PROJECT = Path(__file__).resolve().parents[2]
Run = Callable[..., Any]


def _folders(root: Path, aps: Mapping[str, list[float]]) -> list[Path]:
    """Write metrics files: rows of AP in percent, one a seed."""
    for name, values in aps.items():
        for seed, value in enumerate(values):
            folder = root / f"seed{seed}"
            folder.mkdir(exist_ok=True)
            metrics = dict.fromkeys(METRICS, value / 100) | {"per_category": [], "APs": None}
            (folder / f"{name}.metrics.json").write_text(json.dumps(metrics))
    return sorted(root.glob("seed*"))


K4, K0, IMAGE, CONTROL = [24.0, 26.0, 25.5], [23.0, 25.9, 24.0], [22.0, 25.0, 26.0], [25.0] * 3


def test_a_table_of_the_paper(pmvis: Run, tmp_path: Path) -> None:
    rows = {"masks": IMAGE, "c": CONTROL, "0": K0, "k4": K4}
    folders = _folders(tmp_path, rows)
    names = [word for row in ("image=masks", "control=c", "4=k4") for word in ("--row", row)]
    done = pmvis("table", *folders, "--paper", "3", *names, "-o", tmp_path / "t.md")
    assert done.code == 0, done.err
    assert done.out == (tmp_path / "t.md").read_text()
    lines = {line.split(" | ")[0].strip("| "): line for line in done.out.splitlines()}
    assert "| 41.2 | 24.3 [" in lines["K = 0"]
    assert "K = 1" not in done.out

    result = json.loads(pmvis("table", *folders, "--paper", "3", *names, "--json").out)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(K4), scale=stats.sem(K4))
    found = next(row for row in result["rows"] if row["key"] == "4")["AP"]
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-5)
    verdicts = {(c["better"], c["worse"]): c for c in result["claims"]}
    assert set(verdicts) == {("4", "0"), ("4", "image"), ("image", "0"), ("4", "control")}
    assert verdicts["4", "0"]["verdict"] == "holds in the mean, within the noise"
    assert verdicts["4", "0"]["wins"] == 3
    assert verdicts["4", "control"]["of_paper"] is False
    assert verdicts["image", "0"]["verdict"] == "holds in the mean, within the noise"
    difference = [a - b for a, b in zip(K4, K0, strict=True)]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(difference), scale=stats.sem(difference))
    claim = verdicts["4", "0"]
    assert (claim["low"], claim["high"]) == pytest.approx((low, high), rel=1e-5)


@pytest.mark.parametrize(
    "better, worse, verdict",
    [
        ([3.0, 4.0, 5.0], [1.0, 2.0, 3.1], "holds"),
        ([1.0, 2.0, 3.0], [2.0, 3.0, 3.0], "does not hold"),
        ([2.0], [1.0], "holds on this seed"),
    ],
)
def test_verdicts(
    pmvis: Run, tmp_path: Path, better: list[float], worse: list[float], verdict: str
) -> None:
    folders = _folders(tmp_path, {"masks": better, "boxinst": worse})
    result = json.loads(pmvis("table", *folders, "--paper", "2", "--json").out)
    assert [claim["verdict"] for claim in result["claims"]] == [verdict]


def test_any_metrics_make_a_plain_table(pmvis: Run, tmp_path: Path) -> None:
    (folder,) = _folders(tmp_path, {"b": [2.0], "a": [10.0]})
    done = pmvis("table", folder)
    assert done.code == 0, done.err
    assert "| a | 10.0 | 10.0 | 10.0 | 10.0 | 10.0 |\n| b | 2.0 |" in done.out
    assert "paper" not in done.out


@pytest.mark.parametrize(
    "words, code, message",
    [
        (("--paper", "9"), 2, "no table `9`"),
        (("--row", "x"), 2, "has no `=`"),
        (("--paper", "5"), 3, "holds no file of this table"),
        (("--paper", "2"), 3, "1 of 2 seeds have it"),
        (("--paper", "2", "--row", "masks=broken"), 3, "has no `AP`"),
    ],
)
def test_bad_input(pmvis: Run, tmp_path: Path, words: Any, code: int, message: str) -> None:
    folders = _folders(tmp_path, {"x": [1.0, 2.0], "frozen": [1.0]})
    for folder in folders:
        (folder / "broken.metrics.json").write_text("[]")
    done = pmvis("table", *folders, *words)
    assert done.code == code
    assert message in done.err


def test_an_empty_folder_is_told(pmvis: Run, tmp_path: Path) -> None:
    done = pmvis("table", tmp_path)
    assert done.code == 3
    assert "no `*.metrics.json`" in done.err


def test_claims_name_rows() -> None:
    for table in TABLES.values():
        keys = [row.key for row in table.rows]
        assert len(set(keys)) == len(keys)
        assert all({claim.better, claim.worse} <= set(keys) for claim in table.claims)


def test_a_row_without_a_model_is_told(pmvis: Run, tmp_path: Path) -> None:
    folders = _folders(tmp_path, {"masks": IMAGE, "0": K0, "4": K4})
    (folders[1] / "4.metrics.json").write_text(json.dumps({"none": "the filter kept no track"}))
    words = ("table", *folders, "--paper", "3", "--row", "image=masks")
    done = pmvis(*words)
    assert done.code == 0, done.err
    assert "No figures for `K = 4`: the filter kept no track (seed1).\n" in done.out
    assert not any(line.startswith("| K = 4") for line in done.out.splitlines())
    result = json.loads(pmvis(*words, "--json").out)
    assert [row["key"] for row in result["rows"]] == ["image", "0"]
    assert [row["key"] for row in result["without"]] == ["4"]
    assert {(c["better"], c["worse"]) for c in result["claims"]} == {("image", "0")}


def _make(goal: str, *words: str, ready: Path) -> subprocess.CompletedProcess[str]:
    """Run make in the project as if its environment were set up."""
    (ready / "ready").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "-C", PROJECT, f"VENV={ready}", f"TABLES={ready}/tables", *words, goal],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def _own_data(root: Path) -> list[str]:
    """Name data of the user's own, of which only what make looks for is there."""
    for name in ("t.json", "valid.json", "coco.pth"):
        (root / name).touch()
    return [f"TRAIN_JSON={root}/t.json", f"FRAMES={root}/train", f"VALID={root}/valid.json"]


def _data_words(data: str, root: Path) -> list[str]:
    """Return make's variables for a kind of data; ``pictures`` is that of `make real`."""
    if data == "own":
        more = ["VALID_FRAMES=vf", "PRESET=swin-l-ovis", f"INIT={root}/coco.pth", "SEEDS=0 7"]
        return [*_own_data(root), *more]
    if data in ("real", "pictures"):
        (root / "images").mkdir()
        for name in ("instances_train.json", "instances_val.json", "boxonly.json"):
            (root / "images" / name).touch()
        return ["DATA=real", f"REAL={root}", f"R={root}/tables/real", "SEEDS=0 7"]
    return ["SEEDS=0 7"]


def _commands(text: str) -> list[list[str]]:
    """Return the words of the pmvis commands of a dry run, without the shell's part."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [re.findall(r"(?:^|\| )pmvis ([^|]*)", line) for line in lines]
    return [shlex.split(words) for line in found for words in line]


@needs_make
@pytest.mark.parametrize("data", ["synth", "real", "own"])
def test_make_targets_are_commands_that_pmvis_understands(tmp_path: Path, data: str) -> None:
    words = _data_words(data, tmp_path)
    done = _make("tables", "-n", "PMVIS=pmvis", *words, ready=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "overriding" not in done.stderr
    commands = _commands(done.stdout)
    asked = [" ".join(words) for words in commands]
    for (name, *arguments), line in zip(commands, asked, strict=True):
        if "--seed 7" not in line and "seed7" not in line:
            load_command(name).make_context(name, arguments)
    text = "\n".join(asked)
    for flag in ("--no-mask-loss --box-loss-all", "--freeze-mask-head", "--no-box-loss"):
        assert flag in text
    assert "--topk 0 --pscore 0 --fail-empty" in text
    assert ("--init-backbone" in text) == (data == "real")
    assert ("pretrain" in text) == (data != "own")
    for table in ("2", "3", "tau", "5", "6"):
        assert f"--paper {table} " in text
    if data == "own":
        trained = [line for line in asked if line.startswith("train-")]
        assert all("--preset swin-l-ovis" in line for line in trained)
        assert all("--steps" not in line for line in trained if "/early" not in line)
        unlabelled = [line for line in asked if f"--frames {tmp_path}/train " in line]
        assert {line.split()[0] for line in unlabelled} == {"infer", "refine", "train-video"}
        measured = [line for line in asked if f"--frames {tmp_path}/valid.json --root vf" in line]
        assert len(measured) == sum(line.startswith("eval ") for line in asked)


@needs_make
@pytest.mark.parametrize("data", ["synth", "real", "own", "pictures"])
def test_make_targets_use_only_what_was_made_before(tmp_path: Path, data: str) -> None:
    goal = "real" if data == "pictures" else "tables"
    done = _make(goal, "-n", "PMVIS=pmvis", *_data_words(data, tmp_path), ready=tmp_path)
    assert done.returncode == 0, done.stderr
    tables = tmp_path / "tables"
    made: set[Path] = set()
    for name, *arguments in _commands(done.stdout):
        pipe = "-o" not in arguments
        output = tmp_path if pipe else Path(arguments[arguments.index("-o") + 1])
        assert output not in made
        used = [Path(word) for word in arguments if word.startswith(str(tables))]
        if name == "table":
            names = [a.split("=")[1] for a in arguments if "=" in a] or ["masks", "boxinst"]
            seeds = [path for path in used if path != output]
            assert [path.name for path in seeds] == ["seed0", "seed7"]
            used = [output, *(s / f"{name}.metrics.json" for s in seeds for name in names)]
        for path in used:
            assert path == output or made & {path, *path.parents}, (name, path)
        if not pipe:
            made.add(output)
    assert len(made) > 10


@needs_make
def test_make_real_runs_the_seven_commands(tmp_path: Path) -> None:
    words = _data_words("pictures", tmp_path)
    done = _make("real", "-n", "PMVIS=pmvis", *words, "STEPS=7", ready=tmp_path)
    commands = _commands(done.stdout)
    for name, *arguments in commands:
        load_command(name).make_context(name, arguments)
    order = dict.fromkeys(name for name, *_ in commands)
    chain = "map-categories train-image infer refine filter train-video eval".split()
    assert sorted(order) == sorted([*chain, "convert", "view"])
    assert [name for name in order if name in chain[:6]] == chain[:6]
    assert sum(name == "eval" for name, *_ in commands) == 4


@needs_make
@pytest.mark.parametrize("absent", ["FRAMES", "VALID"])
def test_make_asks_for_what_only_the_user_knows(tmp_path: Path, absent: str) -> None:
    words = [word for word in _own_data(tmp_path) if not word.startswith(f"{absent}=")]
    done = _make("table3", "-n", "PMVIS=pmvis", *words, ready=tmp_path)
    assert done.returncode != 0
    assert f"give {absent}=" in done.stderr


STAND_IN = """#!/bin/bash
for last; do :; done
case $1 in
train-*) mkdir -p "$last" && echo weights > "$last/model.safetensors" ;;
filter) echo header > "$last"; [[ $* != *"--topk 1 "* ]] || exit ${CODE:-1} ;;
eval) echo '{"AP": 0.1, "AP50": 0.1, "AP75": 0.1, "AR1": 0.1, "AR10": 0.1}' > "$last" ;;
*) echo made > "$last" ;;
esac
"""


@needs_make
def test_labels_that_a_filter_empties_cost_their_row_only(pmvis: Run, tmp_path: Path) -> None:
    stand_in = tmp_path / "pmvis"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    words = [f"PMVIS={stand_in}", *_own_data(tmp_path), "SEEDS=0"]
    done = _make("table3", *words, ready=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tables/seed0"
    emptied = "masks.k1-t0.2"
    assert "none" in json.loads((folder / f"{emptied}.metrics.json").read_text())
    assert not (folder / f"{emptied}.out.tracks.jsonl").exists()
    assert f"{stand_in} train-video" in done.stdout
    drawn = pmvis("table", folder, "--paper", "3", "--row", f"1={emptied}", "--row", "image=masks")
    assert "No figures for `K = 1`: filter kept no track" in drawn.out
    assert "Nothing to be done" in _make("table3", *words, ready=tmp_path).stdout

    (folder / "masks.k1-t0.2.kept.tracks.jsonl").unlink()
    done = _make("table3", *words, "CODE=3", ready=tmp_path)
    assert done.returncode != 0, "another exit code is an error"


BEYOND = ("table-dropped", "table-rounds")


@needs_make
@pytest.mark.parametrize("data", ["synth", "real", "own"])
def test_tables_beyond_the_paper_are_made_of_commands_too(tmp_path: Path, data: str) -> None:
    words = ["-n", "PMVIS=pmvis", *_data_words(data, tmp_path)]
    done = _make(BEYOND[0], BEYOND[1], *words, ready=tmp_path)
    assert done.returncode == 0, done.stderr
    commands = _commands(done.stdout)
    for name, *arguments in commands:
        load_command(name).make_context(name, arguments)
    asked = [" ".join(words) for words in commands]
    for seed in ("seed0", "seed7"):
        folder = f"{tmp_path}/tables/{seed}"
        of_seed = [line for line in asked if f"-o {folder}/" in line]
        (aside,) = (line for line in of_seed if "--keep-ignored" in line)
        (ignoring,) = (line for line in of_seed if "--dropped ignore" in line)
        assert f"--pseudo {aside.split()[-1]} " in ignoring
        (rounds,) = (line for line in of_seed if line.startswith("self-train "))
        assert "--rounds 3 --patience 3" in rounds
        assert ("--gt-frames vf" in rounds) == (data == "own")
        long_control = [line for line in of_seed if line.endswith("/masks.control3")]
        assert len(long_control) == (data != "own")
    rows = {"image", "control", "ignore", "background", "control-all", "1", "2", "3"}
    drawn = " ".join(line for line in asked if line.startswith("table "))
    assert "--paper dropped " in drawn and "--paper rounds " in drawn
    named = set(re.findall(r"--row (\S+)=", drawn))
    assert named == rows - ({"control-all"} if data == "own" else set())


ROUNDS_STAND_IN = """#!/bin/bash
for last; do :; done
case $1 in
self-train) [ ! $CODE ] || exit $CODE
  mkdir -p "$last/round-1" && echo done > "$last/result.json"
  echo '{"AP": 0.2, "AP50": 0.2, "AP75": 0.2, "AR1": 0.2, "AR10": 0.2}' \\
    > "$last/round-1/valid.metrics.json" ;;
*) source STAND_IN "$@" ;;
esac
"""


@needs_make
def test_rounds_without_labels_cost_their_rows_only(tmp_path: Path) -> None:
    (tmp_path / "first").write_text(STAND_IN)
    stand_in = tmp_path / "pmvis"
    stand_in.write_text(ROUNDS_STAND_IN.replace("STAND_IN", str(tmp_path / "first")))
    stand_in.chmod(0o755)
    words = [f"PMVIS={stand_in}", *_own_data(tmp_path), "SEEDS=0"]
    assert _make("table-rounds", *words, "CODE=3", ready=tmp_path).returncode != 0
    done = _make("table-rounds", *words, ready=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tables/seed0/masks.rounds"
    found = [json.loads((folder / f"round-{i}/valid.metrics.json").read_text()) for i in (1, 2, 3)]
    assert ["none" in metrics for metrics in found] == [False, True, True]
    assert "Nothing to be done" in _make("table-rounds", *words, ready=tmp_path).stdout
