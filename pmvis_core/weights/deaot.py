"""Weights of (De)AOT in and out: our safetensors, the authors' files, encoders to start from.

Our file says which variant it is; the authors' do not, but names and shapes do, except for DeAOT-B
and -L (AOT-B and -L), which are one network with different memory: there the file's name decides.
Every tensor must fit; indices that a network computes by itself may be absent, and must be right
where they are there. No code from a file is ever executed (`files`).

    network = load_deaot(Path("R50_DeAOTL_PRE_YTB_DAV.pth"))
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as save_bytes
from torch import Tensor

from pmvis_core.checkpoint import MODEL_FILE, KeyReport
from pmvis_core.errors import ResourceError, UsageError
from pmvis_core.files import atomic_write, canonical_json
from pmvis_core.models.deaot import VARIANTS, DeAOT, build_deaot
from pmvis_core.weights.backbones import backbone_weights
from pmvis_core.weights.files import METADATA_KEY, read_file

Tell = Callable[[KeyReport], None]
"""Takes what became of the tensors of initial weights."""
_SHOWN_KEYS = 3
_DERIVED = "relative_position_index"
"""End of the names of what a network computes by itself."""
_NEW_NORMS = re.compile(r"norm\d\.(weight|bias)")
"""Of Swin: norms of the maps, which classifiers do not have."""


@dataclass(frozen=True)
class LoadedDeAOT:
    """A propagator, and where it comes from."""

    network: DeAOT
    """In evaluation mode, on the CPU."""
    variant: str
    """Key of `models.deaot.VARIANTS`."""
    report: KeyReport
    """What became of the file's tensors."""


def save_deaot(path: Path, weights: Mapping[str, Tensor], variant: str) -> None:
    """Write a propagator with its variant's name, atomically."""
    # Clones: safetensors refuses tensors that share storage, as flat parameters do.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
    about = canonical_json({"propagator": variant})
    with atomic_write(path, "wb") as stream:
        stream.write(save_bytes(tensors, {METADATA_KEY: about}))


def load_deaot(path: Path, variant: str = "") -> DeAOT:
    """Return the propagator of a run folder or a file; see `read_deaot`."""
    return read_deaot(path, variant).network


def read_deaot(path: Path, variant: str = "") -> LoadedDeAOT:
    """Read a run folder, its ``model.safetensors``, or a file of the authors'.

    Args:
        path: the folder or file.
        variant: which one the authors' file is, where names and shapes leave that open.

    Raises:
        ResourceError: there is no such file, or it holds no propagator that fits.
        DataError: it asks to run code.
        UsageError: it is another variant than the one asked for.
    """
    file = path / MODEL_FILE if path.is_dir() else path
    tensors, about = read_file(file)
    stated = _stated_variant(file, about) if about is not None else ""
    fitting = [stated] if stated else _fitting_variants(tensors, file)
    if variant and variant not in fitting:
        raise UsageError(f"`{file}` is {' or '.join(fitting)}, not {variant}", "leave it out")
    name = variant or _by_name(fitting, file)
    network = build_deaot(name)
    report = _load(network, tensors, file, f"`{file}`: {name}")
    return LoadedDeAOT(network.eval(), name, report)


def initialise_propagator(network: DeAOT, path: Path) -> KeyReport:
    """Start a network from a propagator like it, or its encoder from a classifier's weights.

    Args:
        network: what is to be trained.
        path: what `load_deaot` reads, or what `backbones` knows.

    Raises:
        ResourceError: the file is missing, or does not fit.
        DataError: it asks to run code.
    """
    file = path / MODEL_FILE if path.is_dir() else path
    tensors, about = read_file(file)
    if about is not None or _is_propagator(tensors):
        return _load(network, tensors, file, "")
    return _fill_encoder(network, tensors, file)


def _stated_variant(file: Path, about: str) -> str:
    """Return the variant that a file of ours names."""
    try:
        name = json.loads(about)["propagator"]
    except (ValueError, KeyError, TypeError) as error:
        raise ResourceError(
            f"`{file}` is a model of pmvis, but no propagator",
            "give a run folder of `train-propagator`, or a checkpoint of AOT or DeAOT",
        ) from error
    if name not in VARIANTS:
        raise ResourceError(f"`{file}` holds the propagator {name}, which this pmvis does not know")
    return str(name)


def _is_propagator(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether tensors are those of an AOT or DeAOT."""
    return "patch_wise_id_bank.weight" in tensors and "decoder.conv_out.weight" in tensors


def _fitting_variants(tensors: Mapping[str, Tensor], file: Path) -> list[str]:
    """Return the variants whose network has the parts that a file has."""
    if not _is_propagator(tensors):
        raise ResourceError(
            f"`{file}` holds tensors but no AOT and no DeAOT",
            "give a run folder of `train-propagator`, or a checkpoint of AOT or DeAOT",
        )
    blocks = _count(tensors, "LSTT.layers.")
    encoder = {0: "mobilenet_v2", 6: "resnet50", 23: "resnet101"}.get(
        _count(tensors, "encoder.layer3."), "unknown"
    )
    if "encoder.patch_embed.proj.weight" in tensors:
        encoder = "swin_b"
    decoupled = "id_norm.weight" in tensors
    found = [
        name
        for name, known in VARIANTS.items()
        if (known.encoder, known.blocks, known.decoupled) == (encoder, blocks, decoupled)
    ]
    if not found:
        kind = "DeAOT" if decoupled else "AOT"
        raise ResourceError(f"`{file}` holds {kind} on {encoder} with {blocks} blocks: not known")
    return found


def _count(names: Mapping[str, object], prefix: str) -> int:
    """Return how many numbers follow a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def _by_name(variants: list[str], file: Path) -> str:
    """Choose among variants that are one network: by the file's name, else the last one."""
    plain = file.name.lower().replace("_", "").replace("-", "")
    return next((name for name in variants if name in plain), variants[-1])


def _load(network: DeAOT, tensors: Mapping[str, Tensor], file: Path, title: str) -> KeyReport:
    """Load tensors that must fit exactly."""
    own = network.state_dict()
    derived = {name for name in own if name.endswith(_DERIVED)}
    absent = tuple(name for name in own if name in derived and name not in tensors)
    for name in derived & tensors.keys():
        if not torch.equal(tensors[name].long().view_as(own[name]), own[name]):
            raise ResourceError(f"`{file}` counts positions in a window in another order: {name}")
    wrong = [
        f"`{name}` ({_shape(tensors.get(name))} there, {_shape(own.get(name))} here)"
        for name in sorted(own.keys() | tensors.keys())
        if name not in derived
        and (name not in own or name not in tensors or own[name].shape != tensors[name].shape)
    ]
    if wrong:
        listed = ", ".join(wrong[:_SHOWN_KEYS]) + (", …" if len(wrong) > _SHOWN_KEYS else "")
        raise ResourceError(
            f"{len(wrong)} of {len(own)} keys of `{file}` do not fit: {listed}",
            "is it another variant?",
        )
    network.load_state_dict({n: own[n] if n in derived else tensors[n] for n in own})
    return KeyReport(title, tuple(n for n in own if n not in absent), missing=absent)


def _fill_encoder(network: DeAOT, tensors: Mapping[str, Tensor], file: Path) -> KeyReport:
    """Load a classifier's weights into the encoder."""
    own = network.encoder.state_dict()
    found = {_encoder_name(name): t for name, t in backbone_weights(tensors).items()}
    given = {n: found[n] for n, t in own.items() if n in found and found[n].shape == t.shape}
    lacking = [n for n in own if n not in given]
    if not all(n not in found and _NEW_NORMS.fullmatch(n) for n in lacking):
        shown = [f"{n} ({_shape(found.get(n))} there, {_shape(own[n])} here)" for n in lacking]
        raise ResourceError(
            f"`{file}` lacks {len(lacking)} of the {len(own)} tensors of the encoder "
            f"{network.variant.encoder}: {', '.join(shown[:_SHOWN_KEYS])}",
            "give a propagator of the same variant, or ImageNet weights of its encoder",
        )
    network.encoder.load_state_dict({**own, **given})
    unexpected = tuple(n for n in found if n not in own)
    return KeyReport("", tuple(given), missing=tuple(lacking), unexpected=unexpected)


def _encoder_name(name: str) -> str:
    """Turn our backbones' name of a ResNet's tensor into the encoders' (torchvision's)."""
    name = name.replace(".shortcut.norm.", ".downsample.1.").replace(".shortcut.", ".downsample.0.")
    name = re.sub(r"conv(\d)\.norm\.", r"bn\1.", name)
    name = re.sub(r"^res(\d)\.", lambda m: f"layer{int(m[1]) - 1}.", name)
    return name.removeprefix("stem.") if name.startswith(("stem.conv1", "stem.bn1")) else name


def _shape(tensor: Tensor | None) -> str:
    """Return a tensor's shape for a message."""
    return "absent" if tensor is None else "x".join(map(str, tensor.shape)) or "scalar"
