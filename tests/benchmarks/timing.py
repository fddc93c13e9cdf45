"""Timing that the benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def compare(
    runs: int,
    *functions: Callable[[], Any],
    clock: Callable[[], float] = time.process_time,
) -> list[float]:
    """Return the median CPU seconds of each function, called in turns after one warm-up.

    With ``clock=time.perf_counter`` they are seconds of the wall clock.
    """
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(runs + 1):
        for function, kept in zip(functions, times, strict=True):
            start = clock()
            function()
            if turn:
                kept.append(clock() - start)
    return [statistics.median(kept) for kept in times]
