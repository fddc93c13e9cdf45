"""Commands as processes of their own, none of which outlives the process that started it.

A child holds one end of a pipe, its parent alone the other. However the parent ends, by SIGKILL
too, the system closes its end, and the child, told so, ends itself. What it leaves behind is what
an interrupted command leaves: the same command again continues. (Linux could send a signal at a
parent's death, but only from code between fork and exec; a pipe does on every POSIX system.)

    code = run_command(["filter", "raw.tracks.jsonl", "--topk", "4", "-o", "kept.tracks.jsonl"])
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from pmvis_cli.app import main


def run_command(words: Sequence[str]) -> int:
    """Run ``pmvis WORDS...``, its standard output thrown away, and return its exit code.

    An interrupt or SIGTERM ends the child first, and is raised as KeyboardInterrupt.
    """
    theirs, ours = os.pipe()
    command = [sys.executable, "-m", "pmvis_cli.children", str(theirs), *words]
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, pass_fds=[theirs]) as process:
            try:
                return process.wait()
            except BaseException:
                process.terminate()
                raise
    finally:
        signal.signal(signal.SIGTERM, usual)
        os.close(theirs)
        os.close(ours)


def _end_with_parent(pipe: int) -> None:
    """End this process when the parent's end of a pipe is closed; nothing is ever sent."""
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, args=[int(sys.argv[1])], daemon=True).start()
    sys.exit(main(sys.argv[2:]))
