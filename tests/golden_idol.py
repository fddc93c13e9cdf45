"""IDOL with the golden files' weights, and the words in which parity with those files is told.

The weights are a function of the tensors' official names (README of the golden files).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pmvis_core.config import ModelConfig
from pmvis_core.models.idol import IDOL, build_idol
from pmvis_core.weights.official import to_official_name

Quantity = tuple[str, bool, str]
"""(what was compared, whether it is equal, how far off it is)."""
SHARED = Path(__file__).resolve().parents[2] / "shared"
BACKBONES = {"r101": "resnet101", "swinl": "swin_l"}
"""Parts of file names -> backbones; without any it is ResNet-50."""


def load_recipe(shared: Path) -> Any:
    """Import the weight recipe from the reference material."""
    path = shared / "golden/idol/weights_recipe.py"
    spec = importlib.util.spec_from_file_location("weights_recipe", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def golden_model(shared: Path, backbone: str, classes: int = 40) -> IDOL:
    """Build IDOL in evaluation mode with the golden weights."""
    recipe = load_recipe(shared)
    model = build_idol(ModelConfig(backbone=backbone), classes).eval()
    state = model.state_dict()
    for name, tensor in state.items():
        values = recipe.values(to_official_name(name), tuple(tensor.shape))
        if values is not None:
            state[name] = torch.from_numpy(values)
    model.load_state_dict(state)
    return model


@lru_cache(maxsize=1)
def model_for(backbone: str, classes: int) -> IDOL:
    """Return the golden model, the same one for files in a row; it must be left as it is."""
    return golden_model(SHARED, backbone, classes)


def backbone_of(name: str) -> str:
    """Return the backbone that a golden file's name speaks of."""
    lower = name.lower()
    return next((b for part, b in BACKBONES.items() if part in lower), "resnet50")


def near(name: str, found: Any, expected: Any, tolerance: float) -> Quantity:
    """Compare numbers: the largest difference must not exceed the tolerance."""
    ours, theirs = np.asarray(found), np.asarray(expected)
    if ours.shape != theirs.shape:
        return name, False, f"shape {ours.shape} against {theirs.shape}"
    off = float(np.abs(ours.astype(np.float64) - theirs).max(initial=0))
    return name, off <= tolerance, f"off by {off:.1e} at most, {tolerance:.0e} allowed"


def same(name: str, found: Any, expected: Any) -> Quantity:
    """Compare whole numbers, flags or words, which must agree."""
    ours, theirs = np.asarray(found), np.asarray(expected)
    if ours.shape != theirs.shape:
        return name, False, f"shape {ours.shape} against {theirs.shape}"
    wrong = int((ours != theirs).sum())
    return name, not wrong, f"{wrong} of {ours.size} differ"


def assert_equal(quantities: Iterable[Quantity]) -> None:
    """Fail with the first quantity that differs, or if there is nothing to compare."""
    compared = 0
    for name, equal, detail in quantities:
        assert equal, f"{name}: {detail}"
        compared += 1
    assert compared


def unpacked(bits: Any, shape: tuple[int, ...]) -> Any:
    """Return (N, *shape) bool of (N, bytes) packed bits, row-major."""
    flat = np.unpackbits(bits, axis=-1)[..., : int(np.prod(shape))]
    return flat.reshape(*bits.shape[:-1], *shape).astype(bool)
