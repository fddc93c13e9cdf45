"""Which propagator `refine` uses, from what a user says: method, weights, device, memory.

The only place that knows all methods. What a method does not use is refused rather than ignored,
and `Chosen.facts` is what the lineage of a tracks file says of it: weights by their digest.

    chosen = choose_propagator(Choice("deaot", weights=Path("runs/deaot")))
    refine_video(video, frames_of, chosen.propagator, options, counts)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pmvis_core.allocator import keep_freed_memory
from pmvis_core.errors import UsageError
from pmvis_core.files import digest_file
from pmvis_core.propagation.flow import FlowPropagator, FlowSettings, Propagator

METHODS = ("flow", "deaot", "sam2")
_USES = {
    "flow": {"short_edge", "features"},
    "deaot": {
        *("weights", "variant", "device", "precision"),
        *("memory_gap", "memory_limit", "max_long_edge", "joint"),
    },
    "sam2": {"weights", "device", "precision"},
}


@dataclass(frozen=True)
class Choice:
    """What a user asks for; None is left to the method."""

    method: str = "flow"
    """One of `METHODS`."""
    weights: Path | None = None
    """`deaot`: run folder of `train-propagator`, or a file; `sam2`: a model's folder."""
    variant: str | None = None
    """Of AOT or DeAOT, where a file leaves that open."""
    device: str | None = None
    """As `devices.find_device` takes it; ``auto`` by default."""
    precision: str | None = None
    """``fp32`` by default, ``bf16`` or ``fp16``."""
    memory_gap: int | None = None
    """Frames between two entries of the long-term memory."""
    memory_limit: int | None = None
    """Most frames in the long-term memory."""
    max_long_edge: int | None = None
    """Longest side of the network's input in pixels."""
    joint: bool | None = None
    """Whether objects of one key frame travel together."""
    short_edge: int | None = None
    """Working size of `flow` in pixels."""
    features: Path | None = None
    """`flow`: ImageNet weights of a MobileNetV2, whose features vote beside the colours."""


@dataclass(frozen=True)
class Chosen:
    """A propagator that is ready, and what there is to say of it."""

    propagator: Propagator
    facts: dict[str, Any]
    """For a file's lineage."""


def choose_propagator(choice: Choice) -> Chosen:
    """Make the propagator that a user asks for.

    Raises:
        UsageError: no such method, or something that it has no use for or cannot do without.
        ResourceError: weights or device are not there, or do not fit.
    """
    if choice.method not in METHODS:
        raise UsageError(f"method `{choice.method}`, expected one of: {', '.join(METHODS)}")
    _refuse_idle(choice)
    if choice.method == "flow":
        return _make_flow(choice)
    if choice.weights is None:
        raise UsageError(f"`--method {choice.method}` needs `--weights`", _WHERE[choice.method])
    keep_freed_memory()
    make = _make_deaot if choice.method == "deaot" else _make_sam2
    return make(choice, choice.weights)


_WHERE = {
    "deaot": "a run folder of `pmvis train-propagator`, or a published checkpoint; `--method flow` "
    "needs none",
    "sam2": "a folder with `config.json` and `model.safetensors`; `--method flow` needs none",
}


def _refuse_idle(choice: Choice) -> None:
    """Refuse what the method has no use for."""
    for field in fields(Choice):
        given = field.name != "method" and getattr(choice, field.name) not in (None, "")
        if given and field.name not in _USES[choice.method]:
            name = field.name.replace("_", "-")
            users = [f"`{m}`" for m, used in _USES.items() if field.name in used]
            raise UsageError(
                f"`--{name}` is for {' and '.join(users)}, not for `{choice.method}`",
                "leave it out, or choose another `--method`",
            )


def _make_flow(choice: Choice) -> Chosen:
    """Make `flow`; torch is loaded only for features."""
    settings = FlowSettings(short_edge=choice.short_edge or FlowSettings.short_edge)
    facts: dict[str, Any] = {"method": "flow", "short_edge": settings.short_edge}
    if choice.features is None:
        return Chosen(FlowPropagator(settings), facts)
    from pmvis_core.propagation.frozen_features import load_features

    embed = load_features(choice.features)
    keep_freed_memory()
    facts["features"] = digest_file(choice.features)
    return Chosen(FlowPropagator(settings, embed), facts)


def _make_deaot(choice: Choice, weights: Path) -> Chosen:
    """Load a network of AOT or DeAOT."""
    from pmvis_core.checkpoint import MODEL_FILE
    from pmvis_core.devices import find_device
    from pmvis_core.propagation.deaot import DeaotPropagator, DeaotSettings
    from pmvis_core.weights.deaot import read_deaot

    device = find_device(choice.device or "auto")
    loaded = read_deaot(weights, choice.variant or "")
    settings = DeaotSettings(
        max_long_edge=choice.max_long_edge or DeaotSettings.max_long_edge,
        memory_gap=choice.memory_gap or loaded.network.variant.memory_gap,
        memory_limit=choice.memory_limit,
        joint=choice.joint is not False,
        precision=choice.precision or DeaotSettings.precision,
    )
    facts = {
        "method": "deaot",
        "variant": loaded.variant,
        "weights": digest_file(weights / MODEL_FILE if weights.is_dir() else weights),
        "max_long_edge": settings.max_long_edge,
        "memory_gap": settings.memory_gap,
        "memory_limit": settings.memory_limit,
        "joint": settings.joint,
        "precision": settings.precision,
    }
    propagator = DeaotPropagator(loaded.network, device, settings)
    return Chosen(propagator, {name: value for name, value in facts.items() if value is not None})


def _make_sam2(choice: Choice, weights: Path) -> Chosen:
    """Load a model of SAM 2."""
    from pmvis_core.checkpoint import MODEL_FILE
    from pmvis_core.devices import find_device
    from pmvis_core.propagation.sam2 import Sam2Propagator, load_sam2

    device = find_device(choice.device or "auto")
    precision = choice.precision or "fp32"
    propagator = Sam2Propagator(load_sam2(weights), device, precision)
    facts = {
        "method": "sam2",
        "weights": digest_file(weights / MODEL_FILE),
        "precision": precision,
    }
    return Chosen(propagator, facts)
