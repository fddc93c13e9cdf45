"""Training as real processes: under torchrun two equal one, and neither kill nor SIGTERM shows."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pmvis_core.checkpoint import MODEL_FILE, load_model
from pmvis_core.training.metrics_log import read_metrics
from pmvis_core.training.processes import launch, summed
from pmvis_core.training.states import STATE_FILE, read_state
from tests.tiny_data import draw_tiny

PROJECT = Path(__file__).resolve().parents[1]
STEPS = 6
# A low rate: AdamW's first steps make a sign out of the last bit of what is nearly zero.
SETTINGS = (
    f"steps={STEPS} log_every=1 save_every=2 pairs_per_batch=4 accumulate=2 learning_rate=1e-5 "
    "warmup_steps=0 ema_decay=0.9"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return the folders of unbroken runs by one process and by two under torchrun."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {ranks: folder / str(ranks) for ranks in (1, 2)}
    started = {ranks: begin(command(data, run), ranks) for ranks, run in runs.items()}
    assert [ended(process).count("wrote") for process in started.values()] == [1, 1]
    return runs


def command(data: Path, out: Path) -> list[str]:
    """Return the words of a short run that logs every step."""
    words = ["train-image", "--data", f"{data}/maps/train_image.json", "--preset", "tiny"]
    words += [word for setting in SETTINGS.split() for word in ("--set", f"train.{setting}")]
    return [*words, "--box-loss", "--device", "cpu", "-o", str(out)]


def begin(words: list[str], ranks: int = 1) -> subprocess.Popen[str]:
    """Start `pmvis WORDS...`, under torchrun if there are several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    start = [sys.executable, *(launcher if ranks > 1 else []), "-m", "pmvis_cli.app", *words]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        start,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    """Wait for a run's good end and return what was said."""
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    return said


def logged(run: Path) -> int:
    """Return how many steps a run has logged."""
    path = run / "metrics.jsonl"
    return len(read_metrics(path)) if path.exists() else 0


def kill_after(words: list[str], run: Path, steps: int) -> None:
    """Start a run and kill all its processes at once when it has logged so many steps."""
    process = begin(words)
    while process.poll() is None and logged(run) < steps:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_two_ranks_equal_one_with_the_whole_batch(whole: dict[int, Path]) -> None:
    lines = [read_metrics(run / "metrics.jsonl") for run in whole.values()]
    assert [line["step"] for line in lines[1]] == list(range(1, STEPS + 1))
    for alone, shared in zip(*lines, strict=True):
        assert shared == pytest.approx(alone, rel=1e-5)
    weights = [load_model(run).model.state_dict() for run in whole.values()]
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=1e-5, atol=1e-5, msg=name)


def test_killed_processes_leave_no_trace(
    data: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    # One process alone is killed in cli/test_chain.py.
    broken = tmp_path / "broken"
    words = [*command(data, broken), "--processes", "2"]
    kill_after(words, broken, random.Random(2).randrange(1, STEPS))  # the scheduler draws, too
    assert not (broken / MODEL_FILE).exists()
    ended(begin(words))
    for name in (MODEL_FILE, "metrics.jsonl", "losses.png"):
        assert (broken / name).read_bytes() == (whole[2] / name).read_bytes(), name
    assert not list(broken.glob("state*"))


def test_sigterm_ends_all_processes_behind_one_step(
    data: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    """As schedulers send it: to torchrun, or to the process that started the others."""
    for ranks, more in ((2, []), (1, ["--processes", "2"])):
        run = tmp_path / f"asked{ranks}"
        words = [*command(data, run), *more]
        process = begin(words, ranks)
        while process.poll() is None and not logged(run):
            time.sleep(0.01)
        process.terminate()
        said = process.communicate(timeout=300)[1]
        if "wrote" in said:  # on a busy machine the signal may come too late
            continue
        if ranks == 1:
            assert process.returncode == 143, said
        step = int(said.split("told to end (SIGTERM) after step ")[1].split(",")[0])
        assert [line["step"] for line in read_metrics(run / "metrics.jsonl")][-1] == step
        assert read_state(run / STATE_FILE)["step"] == step
        ended(begin(words, ranks))
        for name in (MODEL_FILE, "metrics.jsonl", "losses.png"):
            assert (run / name).read_bytes() == (whole[2] / name).read_bytes(), name


def add_up(device: str) -> None:
    assert float(summed(torch.ones((), device=device))) == 2


def test_a_group_that_could_not_be_founded_is_forgotten(tmp_path: Path) -> None:
    alone = {"init_method": f"file://{tmp_path}/meeting", "rank": 0, "world_size": 2}
    with pytest.raises(RuntimeError):
        dist.init_process_group("gloo", **alone, timeout=timedelta(seconds=0.2))  # type: ignore[arg-type]
    launch(add_up, add_up, "cpu", 2)
