"""`pmvis eval` as users and scripts meet it: outputs, exit codes, pipes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmvis_core import masks

Run = Callable[..., Any]
KEYS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
OVIS_KEYS = [*KEYS, "APso", "APmo", "APho", "ARso", "ARmo", "ARho"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with ground truth of two categories and predictions that find one object."""
    square = np.zeros((4, 5), np.uint8)
    square[1:3, 1:4] = 1
    rles = [masks.encode(square), None]
    row = {"video_id": 1, "segmentations": rles, "iscrowd": 0, "areas": [6, None]}
    truth = {
        "videos": [{"id": 1, "height": 4, "width": 5, "length": 2, "file_names": ["a/0", "a/1"]}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {**row, "id": 1, "category_id": 1},
            {**row, "id": 2, "category_id": 2},
        ],
    }
    results = [{"video_id": 1, "category_id": 1, "score": 0.75, "segmentations": rles}]
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "r.json").write_text(json.dumps(results))
    return tmp_path


def test_text_is_the_official_table_and_a_line_a_category(pmvis: Run, folder: Path) -> None:
    done = pmvis("eval", folder / "r.json", "--gt", folder / "gt.json")
    lines = done.out.splitlines()
    assert done.code == 0
    assert lines[0].endswith("IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.500")
    assert len([line for line in lines if line.startswith(" Average")]) == 12
    assert lines[-2].split() == ["1", "cat", "1.000", "1.000", "1.000", "1.000", "1.000"]
    assert "warning" not in done.err


def test_json_is_one_object(pmvis: Run, folder: Path) -> None:
    done = pmvis("eval", folder / "r.json", "--gt", folder / "gt.json", "--json")
    found = json.loads(done.out)
    assert set(found) == {*KEYS, "per_category"}
    assert found["APl"] is None
    assert [set(row) for row in found["per_category"]] == [
        {"id", "name", "AP", "AP50", "AP75", "AR1", "AR10"}
    ] * 2


def test_golden_case_through_the_door(pmvis: Run, shared: Path, tmp_path: Path) -> None:
    case = shared / "golden" / "vis_eval" / "case_08"
    out = tmp_path / "metrics.json"
    words = ("eval", case / "pred.json", "--gt", case / "gt.json", "--protocol", "ovis")
    done = pmvis(*words, "--json", "-o", out)
    found = json.loads(done.out)
    expected = json.loads((case / "expected.json").read_text())["stats"]
    assert set(found) == {*OVIS_KEYS, "per_category"}
    assert (found["AP"], found["APho"]) == (expected["AP"], expected["AP_ho"])
    assert json.loads(out.read_text()) == found


def test_fail_under_answers_no_with_exit_1(pmvis: Run, folder: Path) -> None:
    words = ("eval", folder / "r.json", "--gt", folder / "gt.json", "--fail-under")
    assert pmvis(*words, "0.4").code == 0
    done = pmvis(*words, "0.6")
    assert (done.code, "AP is 0.5000, `--fail-under` asks for 0.6" in done.err) == (1, True)
    as_json = pmvis(*words, "0.6", "--json")
    assert (as_json.code, json.loads(as_json.out)["AR1"]) == (1, 0.5)
    assert pmvis(*words, "26").code == 2


def test_real_pipe_of_tracks(shell: Run, folder: Path) -> None:
    """Tracks from a pipe, gzip from a file, and no torch anywhere."""
    done = shell(
        "pmvis convert r.json --gt gt.json --to tracks | tee t.tracks.jsonl"
        " | pmvis eval --gt gt.json --json > piped.json"
        " && gzip t.tracks.jsonl && pmvis eval t.tracks.jsonl.gz --gt gt.json --json > packed.json"
    )
    assert done.code == 0, done.err
    piped = (folder / "piped.json").read_text()
    assert json.loads(piped)["AP"] == pytest.approx(0.5)
    assert (folder / "packed.json").read_text() == piped


def test_cut_off_upstream_is_no_small_data_set(shell: Run, folder: Path) -> None:
    done = shell(
        "pmvis convert r.json --gt gt.json --to tracks | head -2 | pmvis eval --gt gt.json"
    )
    assert done.code == 3
    assert "without its end record" in done.err


def test_torch_is_not_imported(shell: Run, folder: Path) -> None:
    done = shell("export PYTHONPROFILEIMPORTTIME=1; pmvis eval r.json --gt gt.json")
    assert done.code == 0, done.err
    modules = {line.split("|")[-1].strip() for line in done.err.splitlines() if "|" in line}
    assert "pmvis_core.evaluation" in modules
    assert "torch" not in modules


def test_ground_truth_may_be_packed(pmvis: Run, folder: Path) -> None:
    (folder / "gt.json.gz").write_bytes(gzip.compress((folder / "gt.json").read_bytes()))
    done = pmvis("eval", folder / "gt.json", "--gt", folder / "gt.json.gz", "--json")
    assert json.loads(done.out)["AR1"] == 1.0


def test_strict_refuses_what_is_odd(pmvis: Run, folder: Path) -> None:
    (folder / "r.json").write_text("[]")
    words = ("eval", folder / "r.json", "--gt", folder / "gt.json")
    done = pmvis(*words)
    assert (done.code, "there is not one prediction" in done.err) == (0, True)
    assert pmvis(*words, "--strict").code == 3


BAD: list[tuple[str, str, str]] = [
    ("r.json", '[{"video_id": 1, "category_id": 1, "score": NaN, "segmentations": []}]', "`NaN`"),
    ("r.json", '[{"video_id": 7, "category_id": 1, "score": 1, "segmentations": []}]', "video 7"),
    (
        "r.json",
        '[{"video_id": 1, "category_id": 1, "score": 1, '
        '"segmentations": [{"size": [4, 5], "counts": "01"}]}]',
        "result 0, frame 0",
    ),
    ("r.json", "", "empty"),
    ("gt.json", "", "empty"),
    ("gt.json", '{"videos": [], "categories": []}', "holds no `annotations`"),
    ("gt.json", "[]", "no `videos`"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files_give_one_message_and_exit_3(
    pmvis: Run, folder: Path, name: str, content: str, message: str
) -> None:
    (folder / name).write_text(content)
    done = pmvis("eval", folder / "r.json", "--gt", folder / "gt.json")
    assert done.code == 3
    assert message in done.err
    assert done.err.count("error:") == 1
    assert done.out == ""


def test_usage_errors_exit_2(pmvis: Run, folder: Path) -> None:
    assert pmvis("eval", folder / "r.json").code == 2
    done = pmvis("eval", folder / "r.json", "--gt", folder / "gt.json", "--protocol", "coco")
    assert (done.code, "`ytvis` or `ovis`" in done.err) == (2, True)
    assert pmvis("eval", "-", "--gt", "-").code == 2
