"""The demo's plan and the little scheduler that runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pmvis_cli import demo
from pmvis_cli.console import Console
from pmvis_core.errors import PmvisError, UsageError

RECIPE = demo.Recipe(seed=0, gap=1.0, image_steps=2, video_steps=1, topk=3, pscore=0.3, processes=2)


def test_every_step_needs_only_what_an_earlier_one_makes(tmp_path: Path) -> None:
    made: set[Path] = set()
    for step in demo.plan(tmp_path / "with space", RECIPE):
        assert set(step.needs) <= made
        made.add(step.product)
    commands = {step.arguments[0] for step in demo.plan(tmp_path, RECIPE)}
    assert commands == {
        "synth",
        "map-categories",
        "train-image",
        "infer",
        "refine",
        "filter",
        "train-video",
        "eval",
    }


def test_the_control_gets_the_video_stage_s_steps_and_schedule(tmp_path: Path) -> None:
    from pmvis_core.config import layer, parse_settings
    from pmvis_core.systems.presets import IMAGE_PRESETS, VIDEO_PRESETS

    (control,) = (
        step.arguments
        for step in demo.plan(tmp_path, RECIPE)
        if step.product == tmp_path / "control" / demo.MODEL_FILE
    )
    settings = [control[i + 1] for i, word in enumerate(control) if word == "--set"]
    ours, _ = layer(IMAGE_PRESETS["tiny"], [("control", parse_settings(settings))])
    theirs = VIDEO_PRESETS["tiny"].train
    assert control[control.index("--steps") + 1] == str(RECIPE.video_steps)
    assert ours.train.learning_rate == theirs.learning_rate
    assert ours.train.warmup_steps == theirs.warmup_steps
    assert ours.train.pairs_per_batch == theirs.pairs_per_batch


def fake_start(log: Path):  # type: ignore[no-untyped-def]
    """Make a `start` whose processes touch their product and note begin and end."""

    def start(step: demo.Step, quiet: bool, console: Console) -> subprocess.Popen[bytes]:
        code = (
            "import pathlib, sys, time\n"
            "log, product, name = sys.argv[1:]\n"
            "open(log, 'a').write(f'+{name}\\n')\n"
            "time.sleep(0.2)\n"
            "if name == 'bad': sys.exit(3)\n"
            "pathlib.Path(product).touch()\n"
            "open(log, 'a').write(f'-{name}\\n')\n"
        )
        arguments = [str(log), str(step.product), step.arguments[0]]
        return subprocess.Popen([sys.executable, "-c", code, *arguments])

    return start


def test_steps_wait_for_what_they_need_and_workers_are_capped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c, d = (tmp_path / name for name in "abcd")
    d.touch()
    steps = [
        demo.Step(("a",), a),
        demo.Step(("b",), b, (a,)),
        demo.Step(("c",), c),
        demo.Step(("d",), d),
    ]
    log = tmp_path / "log"
    monkeypatch.setattr(demo, "start", fake_start(log))
    demo.run(steps, 2, Console())
    lines = log.read_text().split()
    assert lines.index("-a") < lines.index("+b")
    assert "+d" not in lines
    running = 0
    for line in lines:
        running += 1 if line[0] == "+" else -1
        assert running <= 2


def test_a_failing_step_ends_the_demo_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "start", fake_start(tmp_path / "log"))
    steps = [demo.Step(("bad",), tmp_path / "x"), demo.Step(("y",), tmp_path / "y")]
    with pytest.raises(PmvisError, match="`pmvis bad` failed") as caught:
        demo.run(steps, 1, Console())
    assert caught.value.exit_code == 3


def test_a_folder_with_other_options_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    demo.open_folder(tmp_path / "demo", RECIPE, overwrite=False)
    demo.open_folder(tmp_path / "demo", RECIPE, overwrite=False)
    with pytest.raises(UsageError, match="with other options"):
        demo.open_folder(tmp_path / "demo", replace(RECIPE, seed=1), overwrite=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    with pytest.raises(UsageError, match="was not made by `pmvis demo`"):
        demo.open_folder(tmp_path / "mine", RECIPE, overwrite=True)
    assert (tmp_path / "mine/file").exists()
