"""Weights in and out: our safetensors, official IDOL names, backbone initialisation.

A model file is safetensors with the resolved config and the vocabulary in its metadata, so a run
folder or the single file is all that `infer` needs. Nothing here executes code from a file:
safetensors hold tensors only, and ``.pth`` files are read with torch's tensors-only unpickler.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_bytes
from torch import Tensor

from pmvis_core.config import ModelConfig, TrackerConfig, override
from pmvis_core.errors import DataError, ResourceError
from pmvis_core.files import atomic_write, canonical_json
from pmvis_core.models.idol import IDOL, build_idol
from pmvis_core.types import Category

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
"""A run folder's stamp: it appears last."""
_METADATA_KEY = "pmvis"
_OFFICIAL_PREFIXES = (
    ("backbone.", "detr.detr.backbone.0.backbone."),
    ("controller.", "detr.controller."),
    ("mask_head.", "detr.mask_head."),
    ("reid_embed_head.", "detr.reid_embed_head."),
    ("", "detr.detr."),
)


@dataclass(frozen=True)
class Checkpoint:
    """A trained model and what is needed to use it."""

    model: IDOL
    """In evaluation mode, on the CPU."""
    categories: tuple[Category, ...]
    """The vocabulary; label k is the k-th category."""
    tracker: TrackerConfig
    """Inference thresholds that the model was made for."""


def save_model(
    path: Path,
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    categories: tuple[Category, ...],
    tracker: TrackerConfig,
) -> None:
    """Write weights with everything needed to rebuild the model, atomically."""
    about = {
        "model": asdict(model),
        "tracker": asdict(tracker),
        "categories": [asdict(category) for category in categories],
    }
    # Clones: safetensors refuses tensors that share storage, as flat parameters do.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
    with atomic_write(path, "wb") as stream:
        stream.write(save_bytes(tensors, {_METADATA_KEY: canonical_json(about)}))


def load_model(path: Path) -> Checkpoint:
    """Rebuild a model from a run folder or its ``model.safetensors``.

    Raises:
        ResourceError: there is no such file, it is no pmvis model, or its tensors do not fit.
    """
    file = path / MODEL_FILE if path.is_dir() else path
    tensors, metadata = read_safetensors(file)
    if _METADATA_KEY not in metadata:
        raise ResourceError(
            f"`{file}` holds tensors but no pmvis model",
            "give a folder written by `pmvis train-image` or `pmvis train-video`",
        )
    about = json.loads(metadata[_METADATA_KEY])
    config = override(ModelConfig(), about["model"], str(file))
    tracker = override(TrackerConfig(), about["tracker"], str(file))
    categories = tuple(Category(**category) for category in about["categories"])
    model = build_idol(config, len(categories))
    load_weights(model, tensors, str(file))
    return Checkpoint(model.eval(), categories, tracker)


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        ResourceError: it is missing or is something else, such as a pickle.
    """
    if not file.is_file():
        raise ResourceError(
            f"weights `{file}` do not exist", "train them first, or check the path of `--weights`"
        )
    try:
        with safe_open(file, "pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}, (
                stream.metadata() or {}
            )
    except SafetensorError as error:
        raise ResourceError(
            f"`{file}` is not a safetensors file ({error})",
            "pmvis reads weights as safetensors and never runs code from a checkpoint",
        ) from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or ``.pth`` file without running code from it.

    Raises:
        ResourceError: the file is missing, is no checkpoint, or holds more than tensors.
    """
    if file.suffix == ".safetensors":
        return read_safetensors(file)[0]
    if not file.is_file():
        raise ResourceError(f"weights `{file}` do not exist", "check the path")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ResourceError(
            f"`{file}` is no checkpoint of plain tensors: {reason}",
            "convert it to safetensors where you trust it; pmvis never runs code from a checkpoint",
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ResourceError(f"`{file}` holds a {type(content).__name__}, expected named tensors")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def load_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load tensors that must fit exactly.

    Raises:
        ResourceError: naming how many keys do not fit and the first few.
    """
    own = model.state_dict()
    wrong = [
        f"`{name}` ({_shape(tensors.get(name))} there, {_shape(own.get(name))} here)"
        for name in sorted({*own, *tensors})
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    ]
    if wrong:
        listed = ", ".join(wrong[:3]) + (", …" if len(wrong) > 3 else "")
        raise ResourceError(f"{len(wrong)} of {len(own)} keys of `{where}` do not fit: {listed}")
    model.load_state_dict(dict(tensors))


def transfer_weights(model: IDOL, source: Checkpoint, categories: tuple[Category, ...]) -> None:
    """Initialise a model from another, keeping class heads only where vocabularies agree.

    Raises:
        ResourceError: anything but the class heads differs in shape.
    """
    tensors = source.model.state_dict()
    if source.categories != categories:
        logger.warning(
            "the vocabulary differs from the initial model's (%d categories, here %d): class "
            "heads start anew",
            len(source.categories),
            len(categories),
        )
        own = model.state_dict()
        heads = {name: own[name] for name in tensors if name.startswith("class_embed.")}
        tensors = {**tensors, **heads}
    load_weights(model, tensors, "the initial model")


def initialise_backbone(model: IDOL, file: Path) -> int:
    """Load a classification backbone into the model's.

    Accepts torchvision's names for ResNet and MobileNetV2, the flat layout of early MobileNetV2
    files (``conv.0`` .. ``conv.7``), and our own names.

    Returns:
        How many tensors were loaded.

    Raises:
        ResourceError: the file does not cover the backbone.
    """
    own = model.backbone.state_dict()
    tensors = read_tensors(file)
    flat = "features.1.conv.0.weight" in tensors
    found = {backbone_name(name, flat): tensor for name, tensor in tensors.items()}
    missing = [n for n, t in own.items() if n not in found or found[n].shape != t.shape]
    if missing:
        raise ResourceError(
            f"`{file}` lacks {len(missing)} of the {len(own)} tensors of backbone "
            f"`{model.config.backbone}`: {', '.join(missing[:3])}",
            "give classification weights of the same architecture",
        )
    model.backbone.load_state_dict({name: found[name] for name in own})
    return len(own)


def backbone_name(name: str, flat_mobilenet: bool = False) -> str:
    """Return our name of a tensor of a classification network.

    Args:
        name: its name in the file.
        flat_mobilenet: whether MobileNetV2's blocks are numbered ``conv.0`` .. ``conv.7``.
    """
    block = re.fullmatch(r"(features\.(\d+)\.conv)\.(\d)\.(\w+)", name)
    if flat_mobilenet and block:
        place = _FLAT_MOBILENET[block[2] == "1"][int(block[3])]
        return f"{block[1]}.{place}.{block[4]}"
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    name = re.sub(r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}.", name)
    name = re.sub(r"\bdownsample\.0\.", "shortcut.", name)
    name = re.sub(r"\bdownsample\.1\.", "shortcut.norm.", name)
    return re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name) if name[:3] in ("res", "ste") else name


_FLAT_MOBILENET = {
    True: {0: "0.0", 1: "0.1", 3: "1", 4: "2"},
    False: {0: "0.0", 1: "0.1", 3: "1.0", 4: "1.1", 6: "2", 7: "3"},
}
"""Index in the flat layout to torchvision's, for the first block (no expansion) and the others."""


def to_official_name(name: str) -> str:
    """Return the name that a tensor of ours has in a published IDOL checkpoint."""
    for ours, theirs in _OFFICIAL_PREFIXES:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise DataError(f"no official name for `{name}`")


def _shape(tensor: Tensor | None) -> str:
    """Return a tensor's shape for a message."""
    return "absent" if tensor is None else "x".join(map(str, tensor.shape)) or "scalar"
