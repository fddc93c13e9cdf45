"""AOT and DeAOT against reference outputs: names and weights, every stage, every frame.

A folder with ``inputs.npz`` and, by variant, ``NAME.keys.json`` and, where there are any,
``NAME_outputs.npz`` and ``NAME_acts.npz``. Weights are a function of their names. Tracking is
teacher-forced: after each frame the memory takes the reference's mask, so that one frame's
rounding does not carry over.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pmvis_core.models.deaot import IDENTITIES, DeAOT, Memory, build_deaot
from pmvis_core.nn.local_attention import Entry
from pmvis_core.propagation.deaot import (
    DeaotPropagator,
    DeaotSettings,
    DeaotVideo,
    merge_passes,
    network_size,
    prepare_frame,
)
from pmvis_core.types import VideoInfo

LOGIT_TOLERANCE = 1e-4
ACTIVATION_TOLERANCE = 2e-5
"""Relative to the largest value of an array."""
HALF = 2e-3
"""Relative, where a golden array is stored in half precision."""
Quantity = tuple[str, bool, str]
GAPS = {"A": None, "B": 2, "C": 2}
"""Memory gap of each case; None is the variant's own."""


def check(golden: Path, names: Collection[str] | None = None) -> Iterator[Quantity]:
    """Yield (quantity, equal, detail) for every variant of a folder, or those of some names."""
    inputs = np.load(golden / "inputs.npz")
    for path in sorted(golden.glob("*.keys.json")):
        name = path.name.removesuffix(".keys.json")
        if names is not None and name not in names:
            continue
        network = golden_network(name)
        yield from check_names(name, network, json.loads(path.read_text()))
        outputs = golden / f"{name}_outputs.npz"
        activations = golden / f"{name}_acts.npz"
        if outputs.exists():
            yield from check_outputs(name, network, inputs, np.load(outputs))
        if activations.exists():
            yield from check_activations(name, network, inputs, np.load(activations))


class Stack:
    """Frames (T, H, W, 3) in memory."""

    def __init__(self, images: Any) -> None:
        """Keep them."""
        self._images = images

    def frames(self) -> Iterator[Any]:
        """Yield all frames."""
        return iter(self._images)

    def __getitem__(self, t: int) -> Any:
        """Return one frame."""
        return self._images[t]


def _opened(network: DeAOT, frames: Any, info: VideoInfo) -> DeaotVideo:
    """Open frames with the network as it is: arranged for speed, it rounds differently."""
    propagator = DeaotPropagator(network, torch.device("cpu"), DeaotSettings(arranged=False))
    return propagator.open(Stack(frames), info)


def golden_network(name: str) -> DeAOT:
    """Build a variant whose weights follow the recipe of the golden files."""
    network = build_deaot(name).eval()
    state = network.state_dict()
    for key, tensor in state.items():
        if tensor.is_floating_point():
            state[key] = torch.from_numpy(_values(key, tuple(tensor.shape)))
    network.load_state_dict(state)
    return network


def check_names(name: str, network: DeAOT, expected: dict[str, Any]) -> Iterator[Quantity]:
    """Compare names, shapes and the digest of all weights."""
    state = network.state_dict()
    shapes = {key: list(tensor.shape) for key, tensor in state.items()}
    wanted = {key: shape for key, shape, _ in expected["keys"]}
    yield f"{name} names and shapes", shapes == wanted, f"{len(wanted)} tensors"
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].numpy().tobytes())
    yield f"{name} weights", digest.hexdigest() == expected["sha256"], "sha256"


def check_outputs(name: str, network: DeAOT, inputs: Any, outputs: Any) -> Iterator[Quantity]:
    """Compare logits, probabilities and masks of every case and frame."""
    for case in sorted({key.split("_")[0] for key in outputs.files}):
        masks = outputs[f"{case}_mask"]
        frames = inputs[f"frames_{case}"][: 1 + len(masks)]
        worst, flips, shift = 0.0, 0, 0.0
        for t, (logits, probability) in enumerate(
            tracked(network, frames, inputs[f"mask_{case}"], masks, GAPS.get(case))
        ):
            golden = outputs[f"{case}_logits4x"][t]
            used = golden > -1e9
            worst = max(worst, float(np.abs(logits - golden)[used].max()))
            flips += int((probability.argmax(0) != masks[t]).sum())
            there = outputs[f"{case}_prob"][t].astype(np.float32)
            shift = max(shift, float(np.abs(probability - there[: len(probability)]).max()))
        yield f"{name} {case} logits", worst <= LOGIT_TOLERANCE, f"off by {worst:.1e} at most"
        yield f"{name} {case} probabilities", shift <= HALF, f"off by {shift:.1e} at most"
        yield f"{name} {case} masks", flips == 0, f"{flips} pixels differ"
        size = network_size(frames.shape[1:3], 1040, network.variant.align_corners)
        first = prepare_frame(frames[0], size)[0, :, ::8, ::8].numpy()
        off = float(np.abs(first - outputs[f"{case}_x0_sub"]).max())
        yield f"{name} {case} input", off <= 1e-5, f"off by {off:.1e} at most"


@torch.inference_mode()
def tracked(
    network: DeAOT, frames: Any, start: Any, masks: Any, gap: int | None
) -> Iterator[tuple[Any, Any]]:
    """Yield logits (passes, 11, h, w) and merged probabilities (1 + n, H, W), teacher-forced."""
    height, width = start.shape
    info = VideoInfo(1, "golden", height, width, len(frames))
    video = _opened(network, frames, info)
    number = int(start.max())
    passes = -(-number // IDENTITIES)
    objects = [min(IDENTITIES, number - IDENTITIES * i) for i in range(passes)]
    long = short = network.refer(
        video.features(0), video.identities(torch.from_numpy(start.astype(np.int32)), number)
    )
    for t in range(1, len(frames)):
        logits, current = network.track(video.features(t), long, short)
        full = network.upsample(logits, objects, (height, width))
        yield logits.numpy(), merge_passes(full.softmax(1), number).numpy()
        short = network.remember(
            current, video.identities(torch.from_numpy(masks[t - 1].astype(np.int32)), number)
        )
        if t % (gap or network.variant.memory_gap) == 0:
            long = _joined(short, long)


def check_activations(name: str, network: DeAOT, inputs: Any, golden: Any) -> Iterator[Quantity]:
    """Compare what the stages give for the first two frames of case A."""
    frames, start = inputs["frames_A"], inputs["mask_A"]
    height, width = start.shape
    info = VideoInfo(1, "golden", height, width, len(frames))
    video = _opened(network, frames, info)
    found: dict[str, Any] = {}
    hooks = _record_blocks(network, found)
    with torch.inference_mode():
        identities = video.identities(torch.from_numpy(start.astype(np.int32)), int(start.max()))
        for t in (0, 1):
            found["now"] = f"f{t}"
            features = video.features(t)
            found[f"f{t}_enc3"] = features.tokens[0].T.unflatten(1, features.grid)
            if t == 0:
                memory = network.refer(features, identities)
                found["f0_id_emb"] = network.embed(identities)[0]
                for layer, entry in enumerate(memory):
                    found[f"f0_mem{layer}_k"] = entry.key[0]
                    width_v = golden[f"f0_mem{layer}_v"].shape[-1]
                    found[f"f0_mem{layer}_v"] = entry.value[0][:, :width_v]
                    found[f"f0_mem{layer}_idv"] = entry.value[0][:, width_v:]
            else:
                network.track(features, memory, memory)
    for hook in hooks:
        hook.remove()
    for key in golden.files:
        if key in found:
            wanted = np.squeeze(golden[key].astype(np.float32))
            ours = np.squeeze(np.asarray(found[key], dtype=np.float32))
            if ours.shape != wanted.shape:
                yield f"{name} {key}", False, f"shape {ours.shape} against {wanted.shape}"
                continue
            off = float(np.abs(ours - wanted).max())
            half = golden[key].dtype == np.float16
            scale = max(float(np.abs(wanted).max()), 1.0)
            limit = (HALF if half else ACTIVATION_TOLERANCE) * scale
            yield f"{name} {key}", off <= limit, f"off by {off:.1e} at most"


def _record_blocks(network: DeAOT, found: dict[str, Any]) -> list[Any]:
    """Record what each block hands to the decoder: of DeAOT only the last is normalised."""
    layers, norms = network.LSTT.layers, network.LSTT.decoder_norms

    def recorder(index: int) -> Any:
        def record(module: Any, arguments: Any, state: Any) -> None:
            last = index == len(layers) - 1
            joined = torch.cat(state, -1)
            if last or not network.variant.decoupled:
                joined = norms[-1 if last else index](joined)
            found[f"{found['now']}_lstt{index}"] = joined[0]

        return record

    def record_maps(module: Any, arguments: Any, maps: Any) -> None:
        for level, shortcut in enumerate(maps[:3]):
            step = 4 if level < 2 else 1
            found[f"{found['now']}_enc{level}"] = shortcut[0, :, ::step, ::step]

    hooks = [layer.register_forward_hook(recorder(i)) for i, layer in enumerate(layers)]
    return [*hooks, network.encoder.register_forward_hook(record_maps)]


def _joined(new: Memory, old: Memory) -> Memory:
    """Append a memory to another."""
    return [
        Entry(torch.cat([b.key, a.key], 1), torch.cat([b.value, a.value], 1))
        for a, b in zip(new, old, strict=True)
    ]


def _values(key: str, shape: tuple[int, ...]) -> Any:
    """Return the weights of a tensor by the golden files' recipe."""
    generator = np.random.RandomState(zlib.crc32(key.encode()))
    normal = generator.standard_normal(size=shape)
    if key.endswith("running_var"):
        values = 0.75 + 0.5 * generator.random_sample(shape)
    elif len(shape) == 1 and key.endswith("weight"):
        values = 1 + 0.1 * normal
    elif key.endswith("bias"):
        values = 0.05 * normal
    elif len(shape) == 1 or key.endswith(
        ("relative_position_bias_table", "mask_token", "relative_emb_v")
    ):
        values = 0.1 * normal
    else:
        gain = 1.4 if key.startswith("encoder.features.") else 1.0
        gain = 3.0 if key == "decoder.conv_out.weight" else gain
        values = normal * gain / np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float32)
