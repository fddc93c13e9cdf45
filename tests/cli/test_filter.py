"""`pmvis filter`: its output, reasons, sweep and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pmvis_core.tracks_io import read_tracks

Run = Callable[..., Any]


def ids(path: Path) -> list[list[int]]:
    return [[track.id for track in video.tracks] for video in read_tracks(path)]


def test_topk_and_pscore(pmvis: Run, tracks_file: Run, tmp_path: Path) -> None:
    out = tmp_path / "kept.tracks.jsonl"
    done = pmvis("filter", tracks_file(), "--topk", 2, "--pscore", 0.4, "-o", out)
    assert (done.code, done.out) == (0, "")
    assert "kept 6 of 12 tracks" in done.err
    assert ids(out) == [[1, 2]] * 3
    lineage = read_tracks(out).header.lineage
    assert lineage == ({"stage": "infer"}, {"stage": "filter", "topk": 2, "pscore": 0.4})


def test_the_default_keeps_all(pmvis: Run, tracks_file: Run, tmp_path: Path) -> None:
    source = tracks_file()
    assert pmvis("filter", source, "-o", tmp_path / "all.jsonl").code == 0
    assert list(read_tracks(tmp_path / "all.jsonl")) == list(read_tracks(source))


def test_stdin_and_stdout_by_default(pmvis: Run, tracks_file: Run, tmp_path: Path) -> None:
    source = tracks_file()
    pmvis("filter", source, "--topk", 1, "-o", tmp_path / "a.jsonl")
    done = pmvis("-q", "filter", "--topk", 1, stdin=source.read_bytes())
    assert (done.code, done.err) == (0, "")
    assert done.out == (tmp_path / "a.jsonl").read_text()


def test_explain(pmvis: Run, tracks_file: Run, tmp_path: Path) -> None:
    why = tmp_path / "why.jsonl"
    done = pmvis(
        "filter",
        tracks_file(videos=1),
        "--topk",
        1,
        "--pscore",
        0.4,
        "--explain",
        why,
        "-o",
        tmp_path / "x.jsonl",
    )
    assert done.code == 0
    rows = [json.loads(line) for line in why.read_text().splitlines()]
    assert [(row["track"], row["rule"]) for row in rows] == [
        (2, "topk"),
        (3, "topk"),
        (4, "pscore"),
    ]
    assert rows[2] == {
        "video_id": 1,
        "video": "clip1",
        "track": 4,
        "category": "owl",
        "score": 0.3,
        "rule": "pscore",
        "reason": "score 0.3 is below 0.4",
    }


def test_overlap_and_keep_ignored(pmvis: Run, tracks_file: Run, tmp_path: Path) -> None:
    out = tmp_path / "x.jsonl"
    done = pmvis("filter", tracks_file(videos=1), "--overlap", 0.2, "--keep-ignored", "-o", out)
    assert done.code == 0
    (video,) = read_tracks(out)
    assert [track.id for track in video.tracks] == [1, 4]
    assert [track.id for track in video.ignored] == [2, 3]
    assert read_tracks(out).header.lineage[-1]["overlap"] == 0.2


def test_sweep(pmvis: Run, tracks_file: Run) -> None:
    source = tracks_file()
    done = pmvis("filter", source, "--sweep", "--topk", "0:2", "--pscore", "0,.5,1", "--json")
    cells = json.loads(done.out)["cells"]
    assert len(cells) == 9
    heads = ("topk", "pscore", "quality", "tracks", "videos", "categories")
    rows = [tuple(cell[head] for head in heads) for cell in cells]
    assert rows[0] == (0, 0.0, 0.0, 12, 3, 2)
    assert rows[4] == (1, 0.5, 0.0, 3, 3, 1)
    assert cells[2]["videos"] == 0
    table = pmvis("filter", source, "--sweep", "--topk", "0:2", "--pscore", "0,.5,1").out
    assert len([line for line in table.splitlines() if line.startswith("│")]) == 9


def test_quality_needs_what_refine_measures(pmvis: Run, tracks_file: Run, tmp_path: Path) -> None:
    out, source = tmp_path / "x.jsonl", tracks_file(videos=1)
    for sweep in ([], ["--sweep"]):
        done = pmvis("filter", source, "--quality", 0.5, "-o", out, *sweep)
        assert done.code == 3
        assert "video 1 `clip1`: track 1 has no quality to filter by" in done.err
        assert "`pmvis refine` measures it" in done.err
    assert not out.exists()


def test_quality(pmvis: Run, tracks_file: Run, tmp_path: Path) -> None:
    from pmvis_core.tracks_io import TracksWriter

    source, measured = read_tracks(tracks_file(videos=1)), tmp_path / "measured.jsonl"
    with TracksWriter(measured, source.header) as file:
        for video in source:
            rows = zip(video.tracks, (0.2, 0.5, 0.8, 0.9), strict=True)
            file.write(video.with_tracks(tuple(replace(t, quality=q) for t, q in rows)))
    out, why = tmp_path / "x.jsonl", tmp_path / "why.jsonl"
    words = ["--quality", 0.5, "--topk", 2, "--explain", why, "-o", out]
    assert pmvis("filter", measured, *words).code == 0
    assert ids(out) == [[2, 3]]
    assert read_tracks(out).header.lineage[-1]["quality"] == 0.5
    reasons = [json.loads(line) for line in why.read_text().splitlines()]
    assert [(row["rule"], row["reason"]) for row in reasons] == [
        ("quality", "quality 0.2 is below 0.5"),
        ("topk", "2 better tracks are kept already"),
    ]
    done = pmvis("filter", measured, "--sweep", "--quality", "0:1:.5", "--json")
    assert [cell["tracks"] for cell in json.loads(done.out)["cells"]] == [4, 3, 0]


def test_fail_empty(pmvis: Run, tracks_file: Run, tmp_path: Path) -> None:
    words = ["filter", tracks_file(), "--pscore", "0.95", "-o", tmp_path / "x.jsonl"]
    assert pmvis(*words).code == 0
    done = pmvis(*words, "--fail-empty")
    assert (done.code, "no track is kept of 12" in done.err) == (1, True)
    assert ids(tmp_path / "x.jsonl") == [[], [], []]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topk", "1:3"], "add `--sweep`"),
        (["--pscore", "0,.1"], "add `--sweep`"),
        (["--topk", "-1"], "expected 0 (keep all) or more"),
        (["--pscore", "1.5"], "expected a number from 0 to 1"),
        (["--quality", "0,.5"], "add `--sweep`"),
        (["--quality", "-.1"], "quality is -0.1, expected a number from 0 to 1"),
        (["--pscore", "high"], "--pscore is `high`"),
        (["--json"], "`--json` is for `--sweep`"),
    ],
)
def test_bad_options(
    pmvis: Run, tracks_file: Run, tmp_path: Path, words: Any, message: str
) -> None:
    done = pmvis("filter", tracks_file(), *words, "-o", tmp_path / "x.jsonl")
    assert done.code == 2
    assert message in done.out + done.err
    assert not (tmp_path / "x.jsonl").exists()


def test_bad_data(pmvis: Run, tracks_file: Run, tmp_path: Path) -> None:
    text = tracks_file(videos=1).read_text()
    for old, new, message in (
        ('"score":0.9', '"score":NaN', "holds `NaN`"),
        ('"score":0.9', '"score":7', "has score 7"),
        ('"category_id":1', '"category_id":5', "category id 5"),
        ('"length":3', '"length":4', "has 3 masks, the video has 4 frames"),
    ):
        assert old in text
        done = pmvis("filter", "-o", tmp_path / "x.jsonl", stdin=text.replace(old, new).encode())
        assert (done.code, message in done.err) == (3, True), done.err
    done = pmvis("filter", tmp_path / "none.jsonl", "-o", tmp_path / "x.jsonl")
    assert (done.code, "does not exist" in done.err) == (3, True)
    assert pmvis("filter", "-o", tmp_path / "x.jsonl", stdin=b"").code == 3
    assert not (tmp_path / "x.jsonl").exists()


def test_youtube_vis_json_is_read_directly(pmvis: Run, shared: Path, tmp_path: Path) -> None:
    source = shared / "real" / "videos" / "annotations_clean.json"
    done = pmvis("filter", source, "--topk", 1, "-o", tmp_path / "x.jsonl")
    assert done.code == 0, done.err
    assert [len(found) for found in ids(tmp_path / "x.jsonl")] == [1] * 12
