"""Training with a compiled backbone: the same losses, one code for all sizes, exact resuming."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pmvis_core.checkpoint import MODEL_FILE
from pmvis_core.errors import ResourceError
from pmvis_core.nn.base import Backbone
from pmvis_core.systems.pmvis import ImageStage
from pmvis_core.systems.presets import IMAGE_PRESETS
from pmvis_core.train import train
from pmvis_core.training.compiling import compile_backbone
from pmvis_core.training.metrics_log import read_metrics
from pmvis_core.training.run_folder import TrainJob
from tests.tiny_data import draw_tiny

COMPILER = shutil.which("g++") or shutil.which("clang++")
SIZES = (96, 128, 160)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def counted() -> Iterator[dict[str, dict[str, int]]]:
    """Return what torch counts while it compiles, from zero."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield counters
    torch.compiler.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let modules be traced, forward and backward, but the code run as it is: it takes seconds."""
    whole = nn.Module.compile

    def compile_module(self: nn.Module, **options: Any) -> None:
        whole(self, backend="aot_eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile_module)


class Interrupted(Exception):
    """Stands for whatever stops a run."""


def stopping_after(steps: int) -> Callable[..., Iterator[Any]]:
    """Return a progress that stops a run when so many steps are done."""

    def progress(items: Any, what: str, total: int | None = None) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == steps:
                raise Interrupted
            yield item

    return progress


def job_of(data: Path, out: Path, *, compiled: bool, **settings: Any) -> TrainJob:
    """Return a short run at sizes that differ."""
    preset = IMAGE_PRESETS["tiny"]
    config = replace(
        preset,
        model=replace(preset.model, dropout=0.0),
        augment=replace(preset.augment, min_sizes=SIZES),
        train=replace(preset.train, pairs_per_batch=2, log_every=1, compile=compiled, **settings),
    )
    return TrainJob(ImageStage(data / "maps/train_image.json", box_loss=True), config, out)


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


def weights_of(run: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(run / MODEL_FILE)


def test_a_traced_backbone_learns_the_same(
    data: Path, tmp_path: Path, traced: None, counted: dict[str, dict[str, int]]
) -> None:
    for out, compiled in ((tmp_path / "plain", False), (tmp_path / "compiled", True)):
        train(job_of(data, out, compiled=compiled, steps=3))
    assert losses_of(tmp_path / "compiled") == pytest.approx(losses_of(tmp_path / "plain"), 1e-4)
    plain, compiled = weights_of(tmp_path / "plain"), weights_of(tmp_path / "compiled")
    assert plain.keys() == compiled.keys()
    # Nothing of the frames that the compiler was shown is learnt.
    assert all((plain[name] - compiled[name]).abs().max() < 1e-4 for name in plain)
    # One code for every size, in one piece.
    assert counted["stats"]["unique_graphs"] == 1
    assert not counted["graph_break"]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif(
    "PMVIS_TEST_COMPILE" not in os.environ,
    reason="compiling takes minutes; PMVIS_TEST_COMPILE=1 tests it",
)
def test_a_compiled_run_learns_the_same_and_goes_on_exactly(data: Path, tmp_path: Path) -> None:
    make = partial(job_of, data, steps=4, save_every=2)
    for name, compiled in (("plain", False), ("whole", True)):
        train(make(tmp_path / name, compiled=compiled))
    losses = [losses_of(tmp_path / name)[:2] for name in ("plain", "whole")]
    assert losses[1] == pytest.approx(losses[0], 1e-4)
    with pytest.raises(Interrupted):
        train(make(tmp_path / "broken", compiled=True), stopping_after(3))
    torch.compiler.reset()  # as another process would begin
    train(make(tmp_path / "broken", compiled=True))
    for name in (MODEL_FILE, "metrics.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class Smallest(Backbone):
    """A convolution that gives three maps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, 8, 1)

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.layer(image).relu()
        return [x, x[:, :, ::2, ::2], x[:, :, ::4, ::4]]


@pytest.mark.usefixtures("counted")
def test_without_a_compiler_it_is_said() -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("absent",)}), pytest.raises(ResourceError) as caught:
        compile_backbone(Smallest(), 2, torch.device("cpu"), half=False, channels_last=False)
    assert caught.value.message.startswith("`torch.compile` cannot compile the backbone on `cpu`: ")
    assert "leave `--compile` out" in str(caught.value.hint)


@pytest.mark.parametrize("kind", ["plain", "half", "frozen", "last"])
def test_names_and_gradients_stay(kind: str, traced: None, counted: dict[str, Any]) -> None:
    backbone = Smallest()
    before = dict(backbone.state_dict())
    backbone.requires_grad_(kind != "frozen")
    last = kind == "last"
    compile_backbone(backbone, 2, torch.device("cpu"), half=kind == "half", channels_last=last)
    assert backbone.state_dict().keys() == before.keys()
    images = torch.randn(2, 3, 64, 96)
    if last:
        images = images.to(memory_format=torch.channels_last)
    backbone.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "half"):
        found, expected = backbone(images), Smallest.forward(backbone, images)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert counted["stats"]["unique_graphs"] == 1
