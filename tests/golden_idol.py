"""IDOL with the golden files' weights, which are a function of the tensors' official names."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from pmvis_core.config import ModelConfig
from pmvis_core.models.idol import IDOL, build_idol
from pmvis_core.official_weights import to_official_name


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
