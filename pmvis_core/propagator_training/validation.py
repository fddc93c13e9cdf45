"""How well a propagator carries masks while it is trained: J on clips of stills that were held out.

Whoever trains here has stills with masks and no annotated video, so the score is made of what there
is: clips of other stills, made as those of training are (`pseudo_clips`), the same ones each time.
The network runs through them as `refine` will let it run, from the first frame's masks on, and J is
the mean IoU (Perazzi et al., CVPR 2016, section 4) of an object over the later frames, then over
all objects. A network of its own is built for it, and random numbers are put back, so that a run
learns the same with it and without.

    validator = PropagatorValidator.open(Validation(Path("val.json")), "deaott", clip, device)
    validator(learner.weights())["val_J"]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pmvis_core.data.spares import SKIP, STOP, BrokenSamples, OnError
from pmvis_core.data.streams import batches
from pmvis_core.errors import DataError
from pmvis_core.files import significant
from pmvis_core.models.deaot import build_deaot
from pmvis_core.propagation.deaot import DeaotPropagator
from pmvis_core.propagator_training.pseudo_clips import (
    IGNORED,
    ClipConfig,
    PseudoClip,
    StillClips,
)
from pmvis_core.training.processes import (
    Group,
    decided_by_first,
    gathered,
    patient_group,
    rank_and_world,
)
from pmvis_core.training.run_folder import Validation
from pmvis_core.training.validation import undisturbed
from pmvis_core.types import VideoInfo

SCORE = "val_J"
CLIPS = 64
"""Clips that a score is made of; each still is used once before any is used twice."""
_SEED = 0
"""Of the clips; no run's seed, so that runs can be compared."""


class Pictures:
    """The frames of a clip, as propagators take them."""

    def __init__(self, clip: PseudoClip) -> None:
        """Round the pixels."""
        images = clip.images.round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        self._images: NDArray[np.uint8] = images.numpy()

    def __getitem__(self, t: int) -> NDArray[np.uint8]:
        """Return frame ``t``, (H, W, 3) uint8 RGB."""
        return np.asarray(self._images[t])

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """Yield all frames in order."""
        yield from self._images


@dataclass(frozen=True)
class PropagatorValidator:
    """Scores a propagator's weights."""

    clips: StillClips
    """What was held out."""
    variant: str
    """Key of `models.deaot.VARIANTS`."""
    device: torch.device
    """Where the network runs."""
    on_error: OnError
    """What a still leads to that breaks in the meantime."""
    group: Group
    """In which the processes wait for each other."""

    @classmethod
    def open(
        cls,
        validation: Validation,
        variant: str,
        config: ClipConfig,
        device: torch.device,
        on_error: OnError = STOP,
    ) -> PropagatorValidator:
        """Check what there is; all processes have to come here.

        Args:
            validation: stills with masks; all their files have to be there.
            variant: of the network.
            config: how clips vary.
            device: of the network.
            on_error: `SKIP` draws another clip in the place of one that breaks later.

        Raises:
            DataError: the stills are not fit, or none of their clips shows an object.
        """
        clips = StillClips(validation.truth, validation.frames, config)
        decided_by_first(partial(check_clips, clips, validation))
        return cls(clips, variant, device, on_error, patient_group())

    def __call__(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return ``val_J``; all processes have to come here.

        Args:
            weights: the network's state dict, the same in every process; it is not changed.

        Raises:
            DataError: a still cannot be read, where the run stops at broken samples.
        """
        with undisturbed(self.device):
            mine = list(self._scored(weights))
        rows = gathered(mine, self.group)
        # By clip, whichever process had it: a sum of floats depends on the order.
        clips = chain.from_iterable(zip(*rows, strict=True))
        return {SCORE: significant(float(np.mean(list(chain.from_iterable(clips)))))}

    def _scored(self, weights: Mapping[str, Tensor]) -> Iterator[list[float]]:
        """Yield the J of each object of this process's clips."""
        network = build_deaot(self.variant)
        network.load_state_dict(weights)
        propagator = DeaotPropagator(network, self.device)
        rank, world = rank_and_world()
        for number, clip in enumerate(held_out_clips(self.clips, self.on_error, rank, world)):
            counts = number * world + rank < CLIPS
            yield carried(propagator, clip) if counts else []


def check_clips(clips: StillClips, validation: Validation) -> None:
    """Refuse stills that nothing can be scored on.

    Raises:
        DataError: one that is needed to tell is broken, or no clip shows an object.
    """
    if not any(clip.objects for clip in held_out_clips(clips, STOP)):
        raise DataError(
            f"none of {CLIPS} clips of `{validation.truth}` shows an object to carry",
            "its objects are too small for `clip.least_area` or `clip.crop`",
        )


def held_out_clips(
    clips: StillClips, on_error: OnError, rank: int = 0, world: int = 1
) -> Iterator[PseudoClip]:
    """Yield a process's clips, in as many rounds of all processes as make `CLIPS` or more."""
    broken = BrokenSamples() if on_error == SKIP else None
    stream = batches(clips, 1, _SEED, rank, world, broken=broken)
    return (clip for batch in islice(stream, -(-CLIPS // world)) for clip in batch)


def carried(propagator: DeaotPropagator, clip: PseudoClip) -> list[float]:
    """Return the J of each object of a clip over the frames behind the first.

    Pixels that are ignored count neither way; a frame in which an object is not, and is not found,
    has a J of 1.
    """
    labels = clip.labels.numpy()
    count, height, width = labels.shape
    info = VideoInfo(1, clip.name, height, width, count)
    sweep = propagator.open(Pictures(clip), info).sweep()
    sweep.advance(0)
    numbers = range(1, clip.objects + 1)
    for number in numbers:
        sweep.add(number, np.asarray(labels[0] == number, np.uint8))
    overlaps: list[list[float]] = [[] for _ in numbers]
    for t in range(1, count if clip.objects else 1):
        found = sweep.advance(t)
        counted = labels[t] != IGNORED
        for number, row in zip(numbers, overlaps, strict=True):
            true, ours = labels[t] == number, (found[number].mask > 0) & counted
            union = int((true | ours).sum())
            row.append(int((true & ours).sum()) / union if union else 1.0)
    return [float(np.mean(row)) for row in overlaps]
