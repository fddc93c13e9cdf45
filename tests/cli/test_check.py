"""`pmvis check` as users and scripts meet it: the report, exit codes, pipes, and the zip."""

from __future__ import annotations

import gzip
import json
import os
import pty
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pmvis_core.submission import files

Run = Callable[..., Any]


@pytest.fixture
def folder(tracks_file: Run, pmvis: Run, tmp_path: Path) -> Path:
    """Return a folder with ``raw.tracks.jsonl``, its ``results.json`` and the ``valid.json``."""
    raw = tracks_file()
    valid = tmp_path / "valid.json"
    assert pmvis("convert", raw, "--to", "dataset", "-o", valid).code == 0
    assert pmvis("convert", raw, "--to", "results", "-o", tmp_path / "results.json").code == 0
    value = json.loads(valid.read_text())
    del value["annotations"]
    valid.write_text(json.dumps(value))
    return tmp_path


def spoil(folder: Path, **keys: Any) -> Path:
    """Write results whose second entry has other values."""
    rows = json.loads((folder / "results.json").read_text())
    rows[1] |= keys
    path = folder / "bad.json"
    path.write_text(json.dumps(rows))
    return path


def small(folder: Path) -> list[Any]:
    """Return masks of half the videos' height and width."""
    rows = json.loads((folder / "results.json").read_text())
    return [{"size": [6, 8], "counts": "`1"}] * len(rows[1]["segmentations"])


def test_a_sound_submission(pmvis: Run, folder: Path) -> None:
    done = pmvis("check", folder / "results.json", "--videos", folder / "valid.json", "--strict")
    assert done.code == 0, done.out
    first, *_, last = done.out.splitlines()
    assert first.endswith("3 videos, 12 predictions, 36 masks")
    assert last == "sound: fit to be submitted"
    assert done.err.startswith("check: 12 in ")


def test_faults_are_told_with_places_and_what_to_do(pmvis: Run, folder: Path) -> None:
    bad = spoil(folder, segmentations=small(folder), category_id=0)
    packed = folder / "results.zip"
    done = pmvis("check", bad, "--gt", folder / "valid.json", "--pack", packed)
    assert done.code == 1
    text = done.out
    assert "fault: the mask has another size than its video: 3 masks in 1 video (mask-size)" in text
    assert "  entry 1, video 1 `clip1`, frame 0 and 2 more: 6x8, the video is 12x16" in text
    assert "  fix: it counts as a miss: resize masks to the height and width of the video" in text
    assert "category 0, expected one of 2 from 1 to 2" in text
    assert "error: " in done.err
    assert "is not sound: 2 kinds of faults" in done.err
    assert "results.zip` was not written" in done.err
    assert not packed.exists()


def test_json_is_one_object(pmvis: Run, folder: Path) -> None:
    bad = spoil(folder, score=2)
    done = pmvis("check", bad, "--gt", folder / "valid.json", "--json")
    value = json.loads(done.out)
    assert (done.code, value["sound"], value["packed"]) == (1, False, None)
    (row,) = value["findings"]
    assert (row["kind"], row["severity"], row["count"]) == ("score-range", "fault", 1)
    assert row["examples"][0]["entry"] == 1
    packed = folder / "r.zip"
    words = ("check", folder / "results.json", "--gt", folder / "valid.json", "--json")
    done = pmvis(*words, "--pack", packed)
    assert done.code == 0
    assert json.loads(done.out)["packed"] == {"file": str(packed), "bytes": packed.stat().st_size}


def test_strict_counts_warnings(pmvis: Run, folder: Path) -> None:
    rows = json.loads((folder / "results.json").read_text())
    (folder / "few.json").write_text(json.dumps(rows[:4]))
    words = ("check", folder / "few.json", "--videos", folder / "valid.json")
    done = pmvis(*words)
    assert done.code == 0
    assert "warning: the video has no prediction: 2 videos (video-without-prediction)" in done.out
    done = pmvis(*words, "--strict")
    assert done.code == 1
    assert "fault: the video has no prediction: 2 videos" in done.out


def test_the_zip_holds_what_convert_writes(pmvis: Run, folder: Path) -> None:
    words = ("--videos", folder / "valid.json", "--pack")
    assert pmvis("check", folder / "results.json", *words, folder / "a.zip").code == 0
    packed = gzip.compress((folder / "raw.tracks.jsonl").read_bytes())
    done = pmvis("check", "-", *words, folder / "b.zip", stdin=packed)
    assert done.code == 0, done.err
    assert "b.zip`: 0.0 MB" in done.err
    assert (folder / "a.zip").read_bytes() == (folder / "b.zip").read_bytes()
    with zipfile.ZipFile(folder / "a.zip") as archive:
        assert archive.namelist() == ["results.json"]
        assert archive.read("results.json") == (folder / "results.json").read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["results.json"], 2, "one of `--gt` and `--videos` is needed"),
        (["results.json", "--gt", "valid.json", "--videos", "valid.json"], 2, "one of `--gt`"),
        (["-", "--gt", "-"], 2, "cannot both come from standard input"),
        (["results.json", "--gt", "valid.json", "--pack", "results.json"], 2, "ends in `.zip`"),
        (["none.json", "--gt", "valid.json"], 3, "submission `none.json` does not exist"),
        (["results.json", "--gt", "none.json"], 3, "videos `none.json` does not exist"),
        (["results.json", "--gt", "results.json"], 3, "has no `videos`"),
        (["-", "--gt", "valid.json"], 3, "standard input is empty"),
        (["results.json", "--gt", "valid.json", "--pack", "no/x.zip"], 4, "cannot write"),
    ],
)  # fmt: skip
def test_what_is_no_question_about_a_submission(
    pmvis: Run,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    (folder / "no").write_text("a file")
    before = (folder / "results.json").read_bytes()
    done = pmvis("check", *words)
    assert (done.code, message in done.err) == (code, True), done.err
    assert (folder / "results.json").read_bytes() == before


def test_a_large_zip_is_warned_of(
    pmvis: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "pack", lambda *_: 312_000_000)
    words = ("--gt", folder / "valid.json", "--pack", folder / "x.zip")
    done = pmvis("check", folder / "results.json", *words)
    assert done.code == 0
    assert "has 312 MB; CodaLab takes 300 MB" in done.err


def test_processes_and_their_exit_codes(shell: Run, folder: Path) -> None:
    spoil(folder, video_id=99)
    done = shell(
        """
        pmvis check results.json --videos valid.json > good.txt; echo $?
        pmvis check bad.json --videos valid.json --json > bad.txt; echo $?
        pmvis -q check - --videos valid.json < bad.json > /dev/null; echo $?
        gzip results.json; pmvis check results.json.gz --videos valid.json > /dev/null; echo $?
        head -c 500 bad.json | pmvis check - --videos valid.json | head -4 | tail -1
        pmvis check results.json --videos nowhere.json --json; echo $?
        """
    )
    lines = done.out.splitlines()
    assert lines[:4] == ["0", "1", "1", "0"]
    assert "the file is cut off" in lines[4]
    assert (json.loads(lines[5])["code"], lines[6]) == (3, "3")
    assert json.loads((folder / "bad.txt").read_text())["findings"][0]["kind"] == "unknown-video"
    assert "\x1b" not in (folder / "good.txt").read_text()


def test_the_end_of_the_pipe(shell: Run, tiny: Path, tmp_path: Path) -> None:
    valid = tiny / "synth" / "videos" / "valid.json"
    done = shell(
        f"pmvis infer --weights '{tiny}/run' --frames '{valid}' --device cpu"
        f" | pmvis check - --videos '{valid}' --pack results.zip --json"
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["sound"]
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        assert len(json.loads(archive.read("results.json"))) == report["predictions"] > 0


def test_an_upstream_that_fails_is_no_submission(shell: Run, folder: Path) -> None:
    done = shell("head -2 raw.tracks.jsonl | pmvis check - --videos valid.json --pack results.zip")
    assert (done.code, "without its end record" in done.err) == (3, True)
    assert not (folder / "results.zip").exists()


def test_a_terminal_gets_colours(folder: Path, environment: dict[str, str]) -> None:
    master, slave = pty.openpty()
    words = [sys.executable, "-m", "pmvis_cli.app", "check", str(spoil(folder, score=2))]
    coloured = {name: value for name, value in environment.items() if name != "NO_COLOR"}
    done = subprocess.run(
        [*words, "--gt", str(folder / "valid.json")],
        env={**coloured, "TERM": "xterm-256color"},
        stdout=slave,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(slave)
    text = os.read(master, 1 << 16).decode()
    os.close(master)
    assert done.returncode == 1
    assert "\x1b[1;31mfault:\x1b[0m the score is not in [0, 1]" in text
