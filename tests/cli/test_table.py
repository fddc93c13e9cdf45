"""`pmvis table`: the paper's tables from metrics files, and the Make targets that make them."""

from __future__ import annotations

import json
import os
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


OWN = "TRAIN_JSON=t.json FRAMES=f VALID=v.json VALID_FRAMES=vf PRESET=swin-l-ovis INIT=coco.pth"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("data", ["", "DATA=real", OWN])
def test_make_targets_are_commands_that_pmvis_understands(tmp_path: Path, data: str) -> None:
    (tmp_path / "ready").touch()
    (tmp_path / "coco.pth").touch()
    words = [f"VENV={tmp_path}", f"TABLES={tmp_path}/tables", "SEEDS=0 7", "PMVIS=pmvis"]
    given = data.replace("=coco.pth", f"={tmp_path}/coco.pth").split()
    for name in ("TRAIN_JSON=t.json", "VALID=v.json"):
        given = [w.replace(name, f"{name.split('=')[0]}={tmp_path}/coco.pth") for w in given]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "-n", "-C", PROJECT, *words, *given, "tables"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if "No rule to make target" in done.stderr:
        pytest.skip("the real pictures are not here")
    assert done.returncode == 0, done.stderr
    assert "overriding" not in done.stderr
    text = done.stdout.replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith("pmvis ")]
    asked = " ".join(commands)
    for flag in ("--no-mask-loss --box-loss-all", "--freeze-mask-head", "--no-box-loss"):
        assert flag in asked
    assert "--topk 0 --pscore 0 --fail-empty" in " ".join(asked.split())
    assert ("--init-backbone" in asked) == (data == "DATA=real")
    assert ("pretrain" in asked) == ("INIT" not in data)
    for command in commands:
        name, *arguments = shlex.split(command)[1:]
        load_command(name).make_context(name, arguments)
    for table in ("2", "3", "tau", "5", "6"):
        assert f"--paper {table} " in asked
