"""Commands as processes of their own: their exit codes, and that none outlives its parent."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pmvis_cli.children import run_command

LONG = "synth --train-videos 1000000 -o"


def only_child(pid: int) -> int:
    """Return the id of a process's child, of which there is one."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def ended(pid: int, within_s: float = 20.0) -> None:
    """Wait until a process is gone, or waits for nothing but to be collected."""
    status = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if status.read_text().rpartition(")")[2].split()[0] in "ZX":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} lives on")


def test_the_exit_code_is_handed_on(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"]) == 0
    assert run_command(["synth", "--seed", "-1"]) == 2
    out, err = capfd.readouterr()
    assert (out, "error:" in err) == ("", True)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_child_outlives_its_parent(
    tmp_path: Path, environment: dict[str, str], how: signal.Signals
) -> None:
    words = [*LONG.split(), str(tmp_path / "out")]
    code = f"from pmvis_cli.children import run_command; run_command({words!r})"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL
    ) as parent:
        while not any(tmp_path.iterdir()) and parent.poll() is None:
            time.sleep(0.02)
        child = only_child(parent.pid)
        parent.send_signal(how)
        assert parent.wait(20) != 0
    ended(child)
