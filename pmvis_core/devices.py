"""Choosing where networks run."""

from __future__ import annotations

import os

import torch

from pmvis_core.errors import ResourceError

MOST_WORKERS = 8
"""Threads that make samples for one GPU unless more are asked for."""


def find_device(name: str) -> torch.device:
    """Return the device called ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.

    Raises:
        ResourceError: it is not on this machine, or the name is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ResourceError(f"no device `{name}`", "use auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            f"device `{name}` is not here: {torch.cuda.device_count()} GPUs are usable",
            "use `--device cpu`, or look at `pmvis doctor`",
        )
    return device


def usual_workers(device: torch.device, processes: int) -> int:
    """Return how many threads should make training samples for each of some processes.

    None on a CPU, where they would take the network's own cores.
    """
    if device.type == "cpu":
        return 0
    return max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // processes - 1))
