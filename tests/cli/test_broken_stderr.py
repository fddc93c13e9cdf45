"""What is said on stderr while nobody can read it: it ends no work, and stdout stays whole."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pmvis_cli.console import Console

Run = Callable[..., Any]


def test_a_reader_that_has_gone(
    tracks_file: Run, tmp_path: Path, environment: dict[str, str]
) -> None:
    tracks_file()
    reading, writing = os.pipe()
    os.close(reading)
    words = ["filter", "raw.tracks.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "pmvis_cli.app", *words],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=writing,
        check=False,
        timeout=60,
    )
    os.close(writing)
    assert done.returncode == 0
    assert '"end"' in done.stdout.decode().splitlines()[-1]


class Full(io.TextIOBase):
    """A log on a full disk."""

    def write(self, text: str) -> int:
        """Refuse."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_log_on_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", Full())
    console = Console()
    assert list(console.progress([1, 2], "count")) == [1, 2]
    console.warn("careful")
    console.error("broken", "mend it")
    console.emit_json({"fine": True})
    assert json.loads(capsys.readouterr().out) == {"fine": True}
