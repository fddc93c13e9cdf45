"""`pmvis convert-weights`, and published or foreign weights at the doors of the other commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import mobilenet_v2

from pmvis_core.checkpoint import load_model, save_official
from pmvis_core.models.idol import build_idol
from pmvis_core.weights.files import read_file
from pmvis_core.weights.official import find_vocabulary
from tests.official_files import SMALL, small_file

Run = Callable[..., Any]
ATTACK = b"cposix\nsystem\n(Vtouch exploded\ntR."


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small IDOL with random weights, as its authors would publish it."""
    torch.manual_seed(5)
    file = tmp_path_factory.mktemp("official") / "idol_ytvis21.pth"
    save_official(file, build_idol(SMALL, 40))
    return file


def test_both_ways_give_the_same_tensors(pmvis: Run, official: Path, tmp_path: Path) -> None:
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth"
    done = pmvis("convert-weights", official, ours)
    assert done.code == 0, done.err
    assert done.out == ""
    assert "IDOL on resnet50, 5 queries, 40 categories (ytvis2021: airplane, bear" in done.err
    assert "loaded:" not in done.err
    checkpoint = load_model(ours)
    assert checkpoint.categories == find_vocabulary("ytvis2021").categories
    assert pmvis("convert-weights", ours, back).code == 0
    assert back.read_bytes() == official.read_bytes()
    content = torch.load(back, weights_only=True)
    assert list(content) == ["model"]
    first, second = read_file(official)[0], content["model"]
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_verbose_lists_what_became_of_the_tensors(pmvis: Run, tmp_path: Path) -> None:
    extras = {"criterion._iter": torch.zeros(1)}
    file = small_file(tmp_path / "pmvis.pth", classes=25, **extras)
    done = pmvis("-v", "convert-weights", file, tmp_path / "m.safetensors")
    assert done.code == 0, done.err
    lines = [line.split(" (")[0] for line in done.err.splitlines()]
    assert "loaded: 383" in lines
    assert "aliased: 12" in lines
    assert "unexpected: 1" in lines
    done = pmvis("convert-weights", file, tmp_path / "m.safetensors")
    assert "383 tensors loaded; unexpected: 1 (criterion._iter)" in done.err


def test_our_own_model_is_copied_but_only_published_networks_leave(
    pmvis: Run, tiny: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.safetensors"
    assert pmvis("convert-weights", tiny / "run", copy).code == 0
    assert copy.read_bytes() == (tiny / "run/model.safetensors").read_bytes()
    done = pmvis("convert-weights", tiny / "run", tmp_path / "x.pth")
    assert done.code == 3
    assert "IDOL has no backbone `tiny`" in done.err
    assert not list(tmp_path.glob("x.pth*"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("{official} {out}/m.onnx", 2, "ends in neither `.safetensors` (pmvis) nor `.pth`"),
        ("{out}/absent.pth {out}/m.pth", 4, "absent.pth` do not exist"),
        ("{official} {out}/m.pth --categories ovis", 3, "40 categories apart, `ovis` names 25"),
        ("{official} {out}/m.pth --categories ovs", 2, "Did you mean `ovis`?"),
        ("{tiny}/run {out}/m.safetensors --categories ovis", 2, "is for files that name none"),
    ],
)
def test_what_cannot_be_converted(
    words: str, code: int, message: str, pmvis: Run, official: Path, tiny: Path, tmp_path: Path
) -> None:
    line = words.format(official=official, tiny=tiny, out=tmp_path)
    done = pmvis("convert-weights", *line.split())
    assert done.code == code, done.err
    assert message in done.err
    assert "hint:" in done.err
    assert not any(tmp_path.iterdir())


def test_an_official_file_labels_videos(
    pmvis: Run, official: Path, tiny: Path, tmp_path: Path
) -> None:
    assert pmvis("convert-weights", official, tmp_path / "m.safetensors").code == 0
    eager = "short_side=64 row_score=0 select_score=0 init_score=0".split()
    settings = [word for setting in eager for word in ("--set", setting)]
    lines = []
    for weights in (official, tmp_path / "m.safetensors"):
        out = tmp_path / f"{weights.stem}.tracks.jsonl"
        words = ("--frames", tiny / "synth/videos/train.json", "--shard", "1/3", *settings)
        done = pmvis("infer", "--weights", weights, *words, "--device", "cpu", "-o", out)
        assert done.code == 0, done.err
        assert ("IDOL on resnet50" in done.err) == (weights == official)
        lines.append(out.read_text().splitlines())
    first, second = lines
    assert [c["name"] for c in json.loads(first[0])["categories"]][:2] == ["airplane", "bear"]
    assert first[1:] == second[1:]
    assert len(json.loads(first[1])["tracks"]) > 0


def test_code_in_weights_never_runs_whatever_reads_them(
    pmvis: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(ATTACK)
    data = f"--data {tiny}/maps/train_image.json --preset tiny --device cpu --steps 1"
    for command in (
        "convert-weights evil.pth m.pth",
        f"infer --weights evil.pth --frames {tiny}/synth/videos/train.json -o t.tracks.jsonl",
        f"train-image {data} --init evil.pth -o run",
        f"train-image {data} --init-backbone evil.pth -o run",
        "train-video --pseudo x --frames x --init evil.pth -o run2",
    ):
        done = pmvis(*command.split())
        assert done.code == 3, done.err
        assert "`evil.pth` asks for `posix.system`, which no tensor needs; it was not" in done.err
        assert not (tmp_path / "exploded").exists()


def test_a_real_process_refuses_and_leaves_nothing(shell: Run, tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(ATTACK)
    done = shell("pmvis convert-weights evil.pth n.safetensors")
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("error: `evil.pth` asks for `posix.system`")
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]


def test_training_starts_from_a_classifier(pmvis: Run, tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = mobilenet_v2().state_dict()
    torch.save(weights, tmp_path / "mobilenet.pth")
    small = "hidden_dim=32 heads=4 feedforward_dim=32 encoder_layers=1 decoder_layers=1 queries=100"
    settings = [w for s in small.split() for w in ("--set", f"model.{s}")]
    data = ("--data", tiny / "maps/train_image.json", "--preset", "mobilenet_v2", "--steps", 1)
    done = pmvis(
        *("-v", "train-image", *data, "--device", "cpu", "--set", "train.pairs_per_batch=1"),
        *(*settings, "--init", tmp_path / "mobilenet.pth", "-o", tmp_path / "run"),
    )
    assert done.code == 0, done.err
    assert "tensors loaded; unexpected: " in done.err
    assert "loaded: " in done.err
    found = load_model(tmp_path / "run").model.backbone.state_dict()
    assert torch.equal(found["features.0.0.weight"], weights["features.0.0.weight"])


def test_the_second_stage_takes_its_preset_from_the_first_model(pmvis: Run, tmp_path: Path) -> None:
    for backbone, file in (("resnet101", "r101.pth"), ("swin_l", "swin.pth")):
        small_file(tmp_path / file, backbone=backbone)
        words = ("--pseudo", "x", "--init", tmp_path / file, "--print-config", "-o", tmp_path / "r")
        done = pmvis("train-video", *words)
        assert done.code == 0, done.err
        assert f'backbone = "{backbone}"' in done.out


def test_a_new_vocabulary_starts_a_new_class_head(pmvis: Run, tiny: Path, tmp_path: Path) -> None:
    file = small_file(tmp_path / "coco.pth", classes=80, backbone="resnet101")
    data = ("--data", tiny / "maps/train_image.json", "--steps", 1, "--device", "cpu")
    done = pmvis("train-image", *data, "--init", file, "-o", tmp_path / "run")
    assert done.code == 4
    assert "has the backbone resnet101, this run resnet50" in done.err
    assert "`--preset resnet101`" in done.err
