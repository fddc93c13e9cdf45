"""Real processes in real shells: pipes, broken at either end, and commands that are killed."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pmvis_core.tracks_io import read_tracks

Run = Callable[..., Any]
PMVIS = [sys.executable, "-m", "pmvis_cli.app"]


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Wait until something is so, or fail."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def test_a_pipe_equals_the_run_by_files(shell: Run, tracks_file: Run, tmp_path: Path) -> None:
    tracks_file()
    done = shell(
        """
        pmvis filter raw.tracks.jsonl --pscore 0.4 -o one.tracks.jsonl
        pmvis filter one.tracks.jsonl --topk 1 -o files.tracks.jsonl
        pmvis filter raw.tracks.jsonl --pscore 0.4 | pmvis filter --topk 1 > pipe.tracks.jsonl
        cmp files.tracks.jsonl pipe.tracks.jsonl
        """
    )
    assert done.code == 0, done.err
    assert len(list(read_tracks(tmp_path / "pipe.tracks.jsonl"))) == 3


def test_convert_joins_the_pipe(shell: Run, tracks_file: Run, tmp_path: Path) -> None:
    tracks_file()
    done = shell(
        "pmvis convert raw.tracks.jsonl --to dataset | pmvis convert --to tracks"
        " | pmvis filter --topk 2 > x.tracks.jsonl"
    )
    assert done.code == 0, done.err
    assert [len(video.tracks) for video in read_tracks(tmp_path / "x.tracks.jsonl")] == [2, 2, 2]


def test_an_upstream_that_stops_early(shell: Run, tracks_file: Run, tmp_path: Path) -> None:
    tracks_file()
    done = shell("head -3 raw.tracks.jsonl | pmvis filter -o x.tracks.jsonl")
    assert done.code == 3
    assert "ended after 2 videos without its end record" in done.err
    assert not (tmp_path / "x.tracks.jsonl").exists()
    assert len((tmp_path / "x.tracks.jsonl.part").read_text().splitlines()) == 3


def test_a_failure_runs_down_the_whole_pipe(shell: Run, tracks_file: Run, tmp_path: Path) -> None:
    tracks_file()
    done = shell(
        "head -2 raw.tracks.jsonl | pmvis filter | pmvis filter > x.tracks.jsonl; "
        'echo "${PIPESTATUS[@]}"'
    )
    assert done.out.strip() == "0 3 3"
    assert '"end"' not in (tmp_path / "x.tracks.jsonl").read_text()


def test_an_upstream_that_is_killed(
    tracks_file: Run, tmp_path: Path, environment: dict[str, str]
) -> None:
    lines = tracks_file().read_bytes().splitlines(keepends=True)
    reading, writing = os.pipe()
    out = tmp_path / "x.tracks.jsonl"
    part = tmp_path / "x.tracks.jsonl.part"
    first = subprocess.Popen(
        [*PMVIS, "filter"], env=environment, stdin=reading, stdout=subprocess.PIPE
    )
    second = subprocess.Popen(
        [*PMVIS, "filter", "-o", str(out)],
        env=environment,
        stdin=first.stdout,
        stderr=subprocess.PIPE,
    )
    assert first.stdout is not None
    first.stdout.close()
    os.close(reading)
    os.write(writing, b"".join(lines[:3]))
    # streaming: both videos have come through before the input has ended
    wait_for(lambda: part.exists() and part.read_bytes().count(b"\n") == 3, "two videos")
    first.send_signal(signal.SIGKILL)
    _, err = second.communicate(timeout=20)
    first.wait(timeout=20)
    os.close(writing)
    assert second.returncode == 3
    assert b"without its end record" in err
    assert not out.exists()


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_is_killed_leaves_no_output(
    tracks_file: Run, tmp_path: Path, environment: dict[str, str], kill: signal.Signals
) -> None:
    source = tracks_file()
    lines = source.read_bytes().splitlines(keepends=True)
    out, part = tmp_path / "x.tracks.jsonl", tmp_path / "x.tracks.jsonl.part"
    words = [*PMVIS, "filter", "--topk", "1", "-o", str(out), "--explain", str(tmp_path / "why")]
    process = subprocess.Popen(
        words, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(b"".join(lines[:2]))
    process.stdin.flush()
    wait_for(lambda: part.exists() and part.read_bytes().count(b"\n") == 2, "one video")
    process.send_signal(kill)
    assert process.wait(timeout=20) == (-kill if kill == signal.SIGKILL else 130)
    process.stdin.close()
    assert not out.exists()
    assert not (tmp_path / "why").exists()
    whole = subprocess.run(
        words, env=environment, input=source.read_bytes(), check=True, capture_output=True
    )
    assert whole.stdout == b""
    assert len(list(read_tracks(out))) == 3
    assert not part.exists()


def test_a_killed_map_categories_leaves_nothing_half_written(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    source = tmp_path / "instances.json"
    os.mkfifo(source)
    out = tmp_path / "out"
    words = [*PMVIS, "map-categories", "--target", "ovis", "--coco", str(source), "-o", str(out)]
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE)
    with source.open("w") as stream:
        stream.write('{"categories": [')
        stream.flush()
        process.kill()
        process.wait(timeout=20)
    assert not out.exists()


def test_a_closed_pipe_is_no_error_and_no_noise(shell: Run, tracks_file: Run) -> None:
    tracks_file(videos=600, frames=20)
    done = shell('pmvis -q filter raw.tracks.jsonl | head -1 >/dev/null; echo "${PIPESTATUS[@]}"')
    assert done.out.strip() == "141 0"
    assert done.err == ""


def test_a_closed_pipe_that_is_noticed_at_the_end_only(shell: Run, tracks_file: Run) -> None:
    tracks_file(videos=1)
    done = shell(
        "pmvis -q filter raw.tracks.jsonl --sweep --json | { exec 0<&-; sleep 1; }; "
        'echo "${PIPESTATUS[0]}"'
    )
    assert done.out.strip() in {"0", "141"}  # whoever is first
    assert done.err == ""


def test_a_full_disk(shell: Run, tracks_file: Run) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    tracks_file()
    done = shell("pmvis filter raw.tracks.jsonl > /dev/full")
    assert done.code == 4
    assert "No space left on device" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("words", "terminal", "message"),
    [
        (["filter"], "stdin", b"standard input is a terminal"),
        (["filter", "-"], "stdin", b"standard input is a terminal"),
        (["filter", "raw.tracks.jsonl"], "stdout", b"output is a terminal; use `-o FILE` or pipe"),
        (["convert", "raw.tracks.jsonl", "--to", "tracks"], "stdout", b"output is a terminal"),
    ],
)
def test_terminals_are_refused(
    tracks_file: Run,
    tmp_path: Path,
    environment: dict[str, str],
    words: list[str],
    terminal: str,
    message: bytes,
) -> None:
    tracks_file()
    leader, follower = pty.openpty()
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    streams[terminal] = follower
    done = subprocess.run(
        [*PMVIS, *words],
        cwd=tmp_path,
        env=environment,
        **streams,
        stderr=subprocess.PIPE,
        timeout=30,
        check=False,
    )
    os.close(leader)
    os.close(follower)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_sweep_may_go_to_a_terminal(
    tracks_file: Run, tmp_path: Path, environment: dict[str, str]
) -> None:
    tracks_file()
    leader, follower = pty.openpty()
    done = subprocess.run(
        [*PMVIS, "filter", "raw.tracks.jsonl", "--sweep"],
        cwd=tmp_path,
        env=environment,
        stdin=follower,
        stdout=follower,
        stderr=subprocess.PIPE,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"topk" in os.read(leader, 4096)
    os.close(leader)
    os.close(follower)


def test_a_bar_is_drawn_on_a_terminal_only(
    tracks_file: Run, tmp_path: Path, environment: dict[str, str]
) -> None:
    tracks_file()
    leader, follower = pty.openpty()
    words = [*PMVIS, "filter", "raw.tracks.jsonl", "-o", "x.tracks.jsonl"]
    shown = {**environment, "TERM": "xterm"}
    subprocess.run(words, cwd=tmp_path, env=shown, stderr=follower, timeout=30, check=True)
    os.close(follower)
    text = b""
    try:
        while block := os.read(leader, 4096):
            text += block
    except OSError:  # Linux says EIO when the other side has gone
        pass
    os.close(leader)
    assert b"filter" in text
    assert b"\x1b[" in text
    plain = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert b"\x1b[" not in plain.stderr
    assert b"filter: 3 in" in plain.stderr
