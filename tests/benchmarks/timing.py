"""Timing that the benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def compare(runs: int, *functions: Callable[[], Any]) -> list[float]:
    """Return the median CPU seconds of each function, called in turns after one warm-up."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(runs + 1):
        for function, kept in zip(functions, times, strict=True):
            start = time.process_time()
            function()
            if turn:
                kept.append(time.process_time() - start)
    return [statistics.median(kept) for kept in times]
