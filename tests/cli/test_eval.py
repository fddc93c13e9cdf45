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


def test_text_is_the_official_table(pmvis: Run, folder: Path) -> None:
    words = ("eval", folder / "r.json", "--gt", folder / "gt.json")
    done = pmvis(*words)
    lines = done.out.splitlines()
    assert done.code == 0
    assert lines[0].endswith("IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.500")
    assert [line.startswith(" Average") for line in lines] == [True] * 12
    lines = pmvis(*words, "--per-category").out.splitlines()
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
    assert pmvis(*words, "AR1=0.4", "--fail-under", "AP50=0.5").code == 0
    done = pmvis(*words, "AR1=0.4", "--fail-under", "AP75=0.51")
    assert (done.code, "AP75 is 0.5000" in done.err) == (1, True)
    assert pmvis(*words, "APl=0.1").code == 1, "no ground truth, no value"
    done = pmvis(*words, "mAP=0.4")
    assert (done.code, "there are AP, AP50" in done.err) == (2, True)


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


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Return a folder with six videos of two categories and predictions of mixed quality."""
    rng = np.random.default_rng(3)
    videos, annotations, results = [], [], []
    for number in range(1, 7):
        name = f"clip{number}"
        frames = [f"{name}/{t}.jpg" for t in range(3)]
        videos.append({"id": number, "height": 40, "width": 60, "length": 3, "file_names": frames})
        for category in (1, 2):
            y, x = rng.integers(0, 20), rng.integers(0, 40)
            rles = []
            for shift in (0, int(rng.integers(0, 6))):
                pixels = np.zeros((40, 60), np.uint8)
                pixels[y : y + 15, x + shift : x + shift + 14] = 1
                rles.append(masks.encode(pixels))
            row = {"video_id": number, "category_id": category}
            areas = [210, 210, None]
            annotations.append(
                {**row, "id": len(annotations) + 1, "iscrowd": 0, "areas": areas}
                | {"segmentations": [rles[0], rles[0], None]}
            )
            for score, found in ((0.9, [rles[1], rles[0], None]), (0.3, [rles[1], None, rles[1]])):
                results.append({**row, "score": score, "segmentations": found})
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    truth = {"videos": videos, "categories": categories, "annotations": annotations}
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "r.json").write_text(json.dumps(results))
    (tmp_path / "worse.json").write_text(json.dumps(results[1::2]))
    return tmp_path


def test_shards_add_up_to_the_bits_of_one_process(shell: Run, several: Path) -> None:
    done = shell(
        "pmvis eval r.json --gt gt.json -o whole.json > table.txt;"
        "for i in 1 2 3 4; do"
        " pmvis eval r.json --gt gt.json --shard $i/4 -o $i.part || exit 1; done;"
        "pmvis eval --merge 3.part 1.part 4.part 2.part -o merged.json | cmp - table.txt;"
        "cmp whole.json merged.json"
    )
    assert done.code == 0, done.err
    assert done.err == ""
    assert shell("pmvis eval --merge 1.part 2.part 3.part").code == 3
    assert shell("pmvis eval r.json --gt gt.json --shard 5/4 -o 5.part").code == 2
    assert shell("pmvis eval r.json --gt gt.json --shard 1/4").code == 2


def test_a_subset_is_what_its_videos_alone_would_give(pmvis: Run, several: Path) -> None:
    truth = json.loads((several / "gt.json").read_text())
    results = json.loads((several / "r.json").read_text())
    (several / "some.txt").write_text("2\nclip5\n")
    words = ("eval", several / "r.json", "--gt", several / "gt.json")
    some = pmvis(*words, "--subset", several / "some.txt", "--json")
    truth["videos"] = [video for video in truth["videos"] if video["id"] in {2, 5}]
    truth["annotations"] = [row for row in truth["annotations"] if row["video_id"] in {2, 5}]
    (several / "gt.json").write_text(json.dumps(truth))
    (several / "r.json").write_text(json.dumps([r for r in results if r["video_id"] in {2, 5}]))
    assert some.out == pmvis(*words, "--json").out
    (several / "some.txt").write_text("nobody")
    assert pmvis(*words, "--subset", several / "some.txt").code == 3


def test_what_users_ask_for_comes_in_one_report(pmvis: Run, several: Path) -> None:
    words = ("eval", several / "r.json", "--gt", several / "gt.json", "--errors", "--worst", "2")
    words += ("--against", several / "worse.json", "--samples", "20", "--hota", "--score", "0.5")
    words += ("--jf", "unsupervised", "--curves", several / "pr.npz")
    report = json.loads(pmvis(*words, "--json").out)
    assert report["errors"]["errors"]["duplicate"]["count"] >= 0
    assert len(report["worst"]["videos"]) == 2
    assert report["against"]["rows"]["AP"]["difference"] > 0
    assert 0 < report["HOTA"]["HOTA"] <= 1
    assert 0 < report["J&F"]["J&F-Mean"] <= 1
    with np.load(several / "pr.npz") as curves:
        assert curves["precision"].shape == (10, 101, 2, 4, 3)
    text = pmvis(*words).out
    assert all(word in text for word in ("background", "first better", "HOTA", "J&F-Mean", "clip"))
    assert pmvis(*words, "--fail-under", "HOTA=0.999").code == 1
    assert pmvis(*words, "--curves", several / "pr.png").code == 0
    assert (several / "pr.png").read_bytes().startswith(b"\x89PNG")
    assert pmvis(*words, "--curves", several / "pr.gif").code == 2


def test_folders_of_indices_give_j_and_f(pmvis: Run, several: Path) -> None:
    from pmvis_core.formats.davis import write_davis
    from pmvis_core.formats.ytvis import open_tracks

    write_davis(open_tracks(several / "gt.json"), several / "davis")
    same = pmvis("eval", several / "davis", "--gt", several / "davis", "--json")
    report = json.loads(same.out)
    assert (same.code, report["J&F"]["J&F-Mean"]) == (0, 1.0)
    other = pmvis("eval", several / "gt.json", "--gt", several / "davis", "--hota", "--json")
    assert json.loads(other.out)["HOTA"]["HOTA"] > 0.9, "painted objects hide each other"
    assert pmvis("eval", several / "davis", "--gt", several / "davis", "--errors").code == 2
