"""How many threads make samples where nobody says."""

from __future__ import annotations

import os

import pytest
import torch

from pmvis_core.devices import MOST_WORKERS, usual_workers


@pytest.mark.parametrize(
    ("cores", "device", "processes", "workers"),
    [
        (16, "cpu", 1, 0),
        (16, "cuda", 1, MOST_WORKERS),
        (16, "cuda:1", 4, 3),
        (2, "cuda", 8, 1),
        (None, "cuda", 1, 1),
    ],
)
def test_usual_workers(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, device: str, processes: int, workers: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert usual_workers(torch.device(device), processes) == workers
