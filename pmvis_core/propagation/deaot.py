"""`refine --method deaot`: masks carried by DeAOT, any number of objects, features computed once.

A `Propagator` (see `flow`). Objects that start in the same frame travel together as a group
and compete for pixels, as in the paper; objects that overlap too much do not start in one group,
for a label map would cut the weaker one. A group of more than ten takes several passes of the
network, which are one batch; their probabilities are merged softly (the authors' evaluation code).

Memory is the published one: the reference frame for ever, the frame before, and every `memory_gap`
frames one more; `memory_limit` thins those out, never the reference, so that long videos fit.

    propagator = DeaotPropagator(build_deaot("deaott"), torch.device("cpu"))
    sweep = propagator.open(frames, video).sweep()
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pmvis_core.errors import UsageError
from pmvis_core.models.deaot import IDENTITIES, STRIDE_PX, DeAOT, Features, Memory
from pmvis_core.nn.backbones import fold_frozen_norms
from pmvis_core.nn.local_attention import Entry
from pmvis_core.propagation.flow import Prediction, Sweep
from pmvis_core.propagation.frame_cache import BoundedCache, Frames, ReadAhead
from pmvis_core.types import VideoInfo

Bytes = NDArray[np.uint8]
Float = NDArray[np.float32]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What a network may compute in, by the names of the option."""
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of RGB in [0, 1], as encoders trained on ImageNet expect them."""
_FLOOR = 1e-5
"""Smallest probability when several passes are merged."""


@dataclass(frozen=True)
class DeaotSettings:
    """How to run the network; the defaults are the published ones."""

    max_long_edge: int = 1040
    """Longest side of the network's input in pixels; larger frames are shrunk."""
    memory_gap: int | None = None
    """Frames between two entries of the long-term memory; None takes the variant's."""
    memory_limit: int | None = None
    """Most frames in the long-term memory, the reference among them; None keeps all."""
    joint: bool = True
    """Objects that start in one frame travel together; else each alone."""
    precision: str = "fp32"
    """A key of `PRECISIONS`; the lower ones are for a GPU, the results nearly the same."""
    arranged: bool = True
    """Fold the encoder's norms and lay memory out for speed: a third less time, and rounding other
    than the published code's, by which a pixel in a million that is a tie may fall otherwise."""
    duplicate_iou: float = 0.5
    """Objects that overlap more in their key frame do not travel in one group."""
    least_left: float = 0.5
    """Share of its mask that an object must keep beside better ones to travel with them."""
    cached_bytes: int = 1 << 30
    """Room for the features of frames that several passes share."""


class DeaotPropagator:
    """Carries masks with a network of `models.deaot`."""

    name = "deaot"
    patience: int | None = None
    """An object may come back: the network never gives up."""

    def __init__(
        self, network: DeAOT, device: torch.device, settings: DeaotSettings = DeaotSettings()
    ) -> None:
        """Arrange a network with its weights; it is changed for good, and not to be trained.

        Raises:
            UsageError: the precision is none of `PRECISIONS`.
        """
        if settings.precision not in PRECISIONS:
            raise UsageError(
                f"precision `{settings.precision}`, expected one of: {', '.join(PRECISIONS)}"
            )
        self.layout = torch.contiguous_format
        if settings.arranged:
            fold_frozen_norms(network.encoder)
            self.layout = torch.channels_last
        self.network: DeAOT = network.to(device, memory_format=self.layout).eval()  # type: ignore[call-overload]
        self.device = device
        self.settings = settings

    def open(self, frames: Frames, video: VideoInfo) -> DeaotVideo:
        """Prepare for one video."""
        return DeaotVideo(self, frames, video)


class DeaotVideo:
    """One video; its frames are encoded once, as long as there is room for their features."""

    def __init__(self, propagator: DeaotPropagator, frames: Frames, video: VideoInfo) -> None:
        """Choose the network's input size."""
        self.network, self.settings = propagator.network, propagator.settings
        self.size = (video.height, video.width)
        self.input_size = network_size(
            self.size, self.settings.max_long_edge, self.network.variant.align_corners
        )
        self._device, self._layout = propagator.device, propagator.layout
        prepare = partial(prepare_frame, size=self.input_size)
        self._images = ReadAhead(frames, video.length, prepare)
        self._cache: BoundedCache[Features] = BoundedCache(self.settings.cached_bytes, _bytes)

    def sweep(self) -> Sweep:
        """Return a new pass with an empty memory."""
        return DeaotSweep(self)

    def lowered(self) -> torch.autocast:
        """Return the context in which the network computes in the precision asked for."""
        precision = PRECISIONS[self.settings.precision]
        return torch.autocast(self._device.type, precision, precision != torch.float32)

    @torch.inference_mode()
    def features(self, t: int) -> Features:
        """Return the encoder's features of frame ``t``."""
        return self._cache.get(t, partial(self._encode, t))

    def _encode(self, t: int) -> Features:
        """Run the encoder on a frame."""
        image = self._images[t].to(self._device, memory_format=self._layout)
        with self.lowered():
            return self.network.encode(image)

    def identities(self, labels: Tensor, objects: int) -> Tensor:
        """Return one-hot identities (passes, up to 11, h, w) of a label map at the video's size.

        Each pass takes ten labels; to it the others are background.

        Args:
            labels: (H, W) of 0 and 1..``objects``.
            objects: their number.
        """
        small = F.interpolate(labels.to(self._device)[None, None].float(), size=self.input_size)[0]
        passes = -(-objects // IDENTITIES)
        own = small - IDENTITIES * torch.arange(passes, device=self._device)[:, None, None]
        own = torch.where((own > 0) & (own <= IDENTITIES), own, 0)
        channel = torch.arange(1 + min(objects, IDENTITIES), device=self._device)
        return (own[:, None] == channel[:, None, None]).float()


@dataclass
class _Group:
    """Objects that travel together."""

    numbers: list[int]
    """Label i + 1 is object ``numbers[i]``."""
    long: Memory
    short: Memory
    reference_tokens: int
    """Tokens at the head of the long-term memory that are never thinned out."""
    age: int = 0
    """Frames since the reference."""
    kept_at: list[int] = field(default_factory=list)
    """Ages at which the later entries of the long-term memory were made."""
    dropped: set[int] = field(default_factory=set)
    """Objects that nobody asks for any more; they go on competing for pixels."""

    @property
    def objects(self) -> list[int]:
        """Number of objects in each pass of the network."""
        full, rest = divmod(len(self.numbers), IDENTITIES)
        return [IDENTITIES] * full + ([rest] if rest else [])


@dataclass(frozen=True)
class _Share:
    """What one object got of a frame (a `Prediction`)."""

    labels: NDArray[Any]
    """(H, W) of the whole group."""
    label: int
    probabilities: Tensor
    """(1 + n, H, W) of the whole group."""
    confidence: float
    """Mean probability inside the mask, in [0, 1]; 0 where the mask is empty."""

    @property
    def mask(self) -> Bytes:
        """(H, W) uint8: 1 where no other object of the group is likelier."""
        return np.asarray(self.labels == self.label, np.uint8)

    @property
    def probability(self) -> Float:
        """(H, W) float32 in [0, 1]."""
        return np.asarray(self.probabilities[self.label].cpu().numpy(), np.float32)


class DeaotSweep:
    """One pass through a video in one direction."""

    def __init__(self, video: DeaotVideo) -> None:
        """Start with nothing to carry."""
        self._video = video
        self._groups: list[_Group] = []
        self._waiting: dict[int, Bytes] = {}
        self._t: int | None = None

    def add(self, number: int, mask: Bytes) -> None:
        """Start or restart object ``number`` from this frame's mask, (H, W), nonzero inside.

        Earlier ones win pixels that several ask for.
        """
        self.drop(number)
        self._waiting[number] = mask != 0

    def drop(self, number: int) -> None:
        """Forget object ``number``."""
        self._waiting.pop(number, None)
        for group in self._groups:
            if number in group.numbers:
                group.dropped.add(number)
        self._groups = [g for g in self._groups if g.dropped != set(g.numbers)]

    @torch.inference_mode()
    def advance(self, t: int) -> dict[int, Prediction]:
        """Go to frame ``t`` and predict every live object."""
        if self._t is not None and self._waiting:
            self._start()
        self._t = t
        found: dict[int, Prediction] = {}
        for group in self._groups:
            found.update(self._follow(group, t))
        return found

    def _start(self) -> None:
        """Form groups of the objects that wait at the frame before."""
        assert self._t is not None
        video = self._video
        features = video.features(self._t)
        for members in group_objects(self._waiting, video.settings):
            labels = np.zeros(video.size, np.int32)
            for label, number in reversed(list(enumerate(members, 1))):
                labels[self._waiting[number] != 0] = label
            identities = video.identities(torch.from_numpy(labels), len(members))
            with video.lowered():
                memory = video.network.refer(features, identities)
            tokens = memory[0].key.shape[1]
            self._groups.append(_Group(members, memory, memory, tokens))
        self._waiting = {}

    def _follow(self, group: _Group, t: int) -> dict[int, Prediction]:
        """Predict a group's objects and remember them."""
        video, objects = self._video, len(group.numbers)
        with video.lowered():
            logits, current = video.network.track(video.features(t), group.long, group.short)
        probabilities = self._probabilities(logits, group)
        likeliest, labels = probabilities.max(0)
        labels = labels.to(torch.uint8 if objects < 256 else torch.int32)
        identities = video.identities(labels, objects)
        with video.lowered():
            entry = video.network.remember(current, identities)
        self._remember(group, entry)
        return _shares(group, labels, likeliest, probabilities)

    def _probabilities(self, logits: Tensor, group: _Group) -> Tensor:
        """Return (1 + n, H, W) at the video's size of logits (passes, 11, h, w) at stride 4."""
        video, objects = self._video, group.objects
        # Identities that no pass uses would only add zeros.
        used = logits[:, : 1 + max(objects)].float()
        full = video.network.upsample(used, objects, video.size)
        return merge_passes(full.softmax(1), len(group.numbers))

    def _remember(self, group: _Group, entry: Memory) -> None:
        """Replace the short-term memory and extend the long-term one when it is time."""
        settings = self._video.settings
        group.short = entry
        group.age += 1
        gap = settings.memory_gap or self._video.network.variant.memory_gap
        limit = settings.memory_limit
        if group.age % gap or limit == 1:
            return
        group.long = [_joined(old, new) for old, new in zip(group.long, entry, strict=True)]
        group.kept_at.append(group.age)
        if limit is not None and len(group.kept_at) > limit - 1:
            self._thin(group)

    def _thin(self, group: _Group) -> None:
        """Take out one entry after the reference: that which leaves the evenest spacing."""
        ages = [0, *group.kept_at]
        # The gap that opens where entry i + 1 goes; the newest entry stays.
        gaps = [ages[i + 2] - ages[i] for i in range(len(ages) - 2)] or [0]
        victim = int(np.argmin(gaps))
        tokens = (group.long[0].key.shape[1] - group.reference_tokens) // len(group.kept_at)
        first = group.reference_tokens + victim * tokens
        group.long = [
            Entry(*(torch.cat([x[:, :first], x[:, first + tokens :]], 1) for x in entry))
            for entry in group.long
        ]
        del group.kept_at[victim]


def _shares(
    group: _Group, labels: Tensor, likeliest: Tensor, probabilities: Tensor
) -> dict[int, Prediction]:
    """Return what each object of a group got of a frame."""
    wanted = {n: label for label, n in enumerate(group.numbers, 1) if n not in group.dropped}
    sums = [
        torch.stack(
            [(inside := labels == i).sum(), torch.where(inside, likeliest, 0).double().sum()]
        )
        for i in wanted.values()
    ]
    areas, totals = torch.stack(sums).cpu().T.tolist()
    decided = labels.cpu().numpy()
    confidences = [total / area if area else 0.0 for area, total in zip(areas, totals, strict=True)]
    return {
        number: _Share(decided, label, probabilities, confidence)
        for (number, label), confidence in zip(wanted.items(), confidences, strict=True)
    }


def group_objects(waiting: dict[int, Bytes], settings: DeaotSettings) -> list[list[int]]:
    """Put objects that start in one frame into groups that can share a label map.

    Without ``joint`` each is a group of its own.

    Args:
        waiting: masks (H, W) by object, the better one first.
        settings: how much they may overlap.

    Returns:
        Groups of objects, each in the order of ``waiting``.
    """
    if not settings.joint:
        return [[number] for number in waiting]
    groups: list[list[int]] = []
    taken: list[NDArray[np.bool_]] = []
    for number, mask in waiting.items():
        inside = mask != 0
        area = max(int(inside.sum()), 1)
        for members, covered in zip(groups, taken, strict=True):
            left = int((inside & ~covered).sum())
            if left >= settings.least_left * area and not any(
                _iou(inside, waiting[other] != 0) > settings.duplicate_iou for other in members
            ):
                members.append(number)
                np.logical_or(covered, inside, out=covered)
                break
        else:
            groups.append([number])
            taken.append(inside.copy())
    return groups


def merge_passes(probability: Tensor, objects: int) -> Tensor:
    """Merge the probabilities of several passes over disjoint objects.

    Args:
        probability: (passes, 11, H, W), background first, of up to ten objects a pass.
        objects: number of objects in all.

    Returns:
        (1 + objects, H, W), sums being 1; a single pass stays as it is.
    """
    if len(probability) == 1:
        return probability[0, : 1 + objects]
    background = probability[:, 0].prod(0)[None]
    every = torch.cat([background, probability[:, 1:].flatten(0, 1)[:objects]])
    return torch.logit(every.clamp(_FLOOR, 1 - _FLOOR)).softmax(0)


def network_size(size: tuple[int, int], max_long_edge: int, align_corners: bool) -> tuple[int, int]:
    """Return the input size of the network for frames of (height, width).

    The long side shrinks to the limit; then each side goes to the nearest multiple of 16 (plus one
    if corners are aligned), halves to the even multiple.
    """
    extra = 1 if align_corners else 0
    longest = max(size)
    sides = [s if longest <= max_long_edge else int(s * max_long_edge / longest) for s in size]
    height, width = (round((s - extra) / STRIDE_PX) * STRIDE_PX + extra for s in sides)
    return max(height, STRIDE_PX + extra), max(width, STRIDE_PX + extra)


def prepare_frame(frame: Bytes, size: tuple[int, int]) -> Tensor:
    """Turn an (H, W, 3) uint8 RGB frame into the network's (1, 3, h, w) input.

    Cubic on floats without clipping, as published.
    """
    pixels: Any = frame.astype(np.float32)
    if pixels.shape[:2] != size:
        pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_CUBIC)
    pixels -= np.float32(255) * np.array(MEAN, np.float32)
    pixels *= np.float32(1 / 255) / np.array(STD, np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _joined(old: Entry, new: Entry) -> Entry:
    """Append an entry's tokens to a memory."""
    return Entry(torch.cat([old.key, new.key], 1), torch.cat([old.value, new.value], 1))


def _iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Return the IoU of two masks."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 0.0


def _bytes(features: Features) -> int:
    """Return how much room features take."""
    tensors = {id(x): x for x in (*features.shortcuts, features.tokens)}
    return sum(x.numel() * x.element_size() for x in tensors.values())
