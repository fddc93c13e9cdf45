"""SIGTERM, by which schedulers and `docker stop` end a job: the step in hand is finished and saved.

A training process that is asked to end takes note of it. The processes tell each other in every
step, so that all of them leave the loop at the same one; a second SIGTERM ends a process at once.
Processes that `launch` started keep the usual way: they are ended by the first one.

    with termination() as told:
        for step in steps:
            ...
            told.agreed = any(gathered(told.asked))
            if told.agreed:
                break
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from pmvis_core.training.processes import is_first, under_torchrun


@dataclass
class Told:
    """Whether a run was asked to end."""

    asked: bool = False
    """By a signal to this process, at any moment."""
    agreed: bool = False
    """By a signal to any process, as all of them know since the last step."""


@contextmanager
def termination() -> Iterator[Told]:
    """Note SIGTERM for a while, where nobody else handles it."""
    told = Told()

    def note(number: int, frame: FrameType | None) -> None:
        told.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    usual = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    here = threading.current_thread() is threading.main_thread()  # Python's condition
    if not (usual and here and (is_first() or under_torchrun())):
        yield told
        return
    signal.signal(signal.SIGTERM, note)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
