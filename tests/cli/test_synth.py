"""`pmvis synth` as a command: its folder, its refusals, and the next command in the chain."""

from __future__ import annotations

import json

SMALL = ("--stills", 3, 3, "--train-videos", 1, "--valid-videos", 1)


def test_a_benchmark_is_drawn_and_recorded(pmvis, tmp_path):
    done = pmvis("synth", "-o", tmp_path / "set", "--seed", 4, "--gap", 0.5, *SMALL)
    assert done.code == 0, done.err
    assert done.out == ""
    stamp = json.loads((tmp_path / "set" / "synth.json").read_text())
    assert stamp["seed"] == 4
    assert stamp["config"]["gap"] == 0.5
    assert stamp["config"]["mask_stills"] == 3


def test_an_existing_benchmark_needs_overwrite(pmvis, tmp_path):
    folder = tmp_path / "set"
    assert pmvis("synth", "-o", folder, *SMALL).code == 0
    refused = pmvis("synth", "-o", folder, *SMALL)
    assert refused.code == 2
    assert "--overwrite" in refused.err
    assert pmvis("synth", "-o", folder, "--overwrite", *SMALL).code == 0


def test_a_foreign_folder_and_wrong_numbers_are_usage_errors(pmvis, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    assert pmvis("synth", "-o", tmp_path / "mine", "--overwrite", *SMALL).code == 2
    assert pmvis("synth", "-o", tmp_path / "x", "--gap", -1).code == 2
    assert pmvis("synth", "-o", tmp_path / "x", "--stills", -3, 3).code == 2
    assert not (tmp_path / "x").exists()


def test_a_place_that_cannot_be_written_is_a_missing_resource(pmvis, tmp_path):
    (tmp_path / "file").touch()
    done = pmvis("synth", "-o", tmp_path / "file" / "set", *SMALL)
    assert done.code == 4
    assert "cannot write" in done.err


def test_its_stills_go_through_map_categories(pmvis, tmp_path):
    folder = tmp_path / "set"
    assert pmvis("synth", "-o", folder, "--stills", 12, 12, *SMALL[3:]).code == 0
    words = ("--target", folder / "target.json", "--coco", folder / "coco/instances_train.json")
    boxes = ("--imagenet-bbox", folder / "imagenet/Annotations")
    done = pmvis("map-categories", *words, *boxes, "--strict", "-o", tmp_path / "data")
    assert done.code == 0, done.err
    data = json.loads((tmp_path / "data" / "train_image.json").read_text())
    assert len(data["images"]) == 24
    assert {"segmentation" in row for row in data["annotations"]} == {True, False}
