"""Published checkpoints in miniature: all names and shapes, hardly any bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmvis_core.config import ModelConfig
from pmvis_core.models.idol import build_idol
from pmvis_core.weights.official import to_official

SMALL = ModelConfig(
    hidden_dim=32,
    feedforward_dim=64,
    encoder_layers=1,
    decoder_layers=2,
    queries=5,
    reid_dim=16,
)
"""An IDOL on ResNet-50 that is small behind its backbone."""


def empty(shape: Any, dtype: str = "float32") -> Tensor:
    """Return zeros of any shape that take a few bytes, in memory and in torch's files."""
    return torch.zeros((), dtype=getattr(torch, dtype)).expand(tuple(shape))


def small_file(
    file: Path, classes: int = 25, backbone: str = "resnet50", **changes: Tensor | None
) -> Path:
    """Write an official file of the small IDOL, some tensors replaced or left out (None)."""
    config = replace(SMALL, backbone=backbone)
    with torch.device("meta"):
        state = build_idol(config, classes).state_dict()
    tensors = to_official({name: empty(t.shape) for name, t in state.items()}, config)
    tensors = {**tensors, **changes}  # type: ignore[dict-item]
    torch.save({"model": {n: t for n, t in tensors.items() if t is not None}}, file)
    return file
