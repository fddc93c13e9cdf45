"""From the mask logits of a network to run-length encodings, without full-size maps on the way.

Logits are upsampled (bilinear, corners not aligned) and compared with a threshold. On a GPU the
kernels keep one bit for each pixel, whether it differs from the one before it in its column, and
only the places of those that do cross to the host; on the CPU a few masks are laid out at a time
and handed to `masks`.

    rles = logits_to_rle(logits, (720, 1280), threshold=0.0)
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pmvis_core import masks, rle_numpy
from pmvis_core.ops.library import MASKS, Backend, choose, operator
from pmvis_core.types import RLE

_AT_ONCE = 1 << 24
"""Pixels laid out at a time."""
_STRIP = 32
"""Rows of a word of bits (csrc/mask_runs.cuh)."""
_MOST = 2**31 - 1
"""Pixels of a mask, and of its logits, that the kernels can count."""


def logits_to_rle(
    logits: Tensor, size: tuple[int, int], threshold: float = 0.0, *, backend: Backend | None = None
) -> list[RLE]:
    """Return the masks of the pixels whose upsampled logits are above a threshold.

    Args:
        logits: (N, h, w) float; half types are computed in float32. No gradient flows.
        size: (H, W) of the masks in pixels.
        threshold: what a foreground pixel's logit exceeds; NaN is background.
        backend: what carries the call; None for the best.

    Returns:
        N encodings, as `masks.encode_many` gives them. A pixel whose logit equals the threshold but
        for rounding may fall on either side, depending on the backend.

    Raises:
        ValueError: the logits have another shape or type, or a side is not positive.
        ResourceError: the wished backend cannot carry this call.
    """
    height, width = size
    if logits.ndim != 3 or not logits.is_floating_point() or min(logits.shape[1:]) < 1:
        raise ValueError(
            f"logits are {logits.dtype} of shape {tuple(logits.shape)}, expected float (N, h, w)"
        )
    if height < 1 or width < 1:
        raise ValueError(f"the size is {height}x{width}, expected positive pixels")
    logits = logits.detach()
    place = logits.device.type
    carrier = choose("logits_to_rle", backend, place, _obstacle(logits, size), cpu=MASKS)
    if carrier == "torch":
        return logits_to_rle_reference(logits, size, threshold)
    if place == "cpu":
        rles: list[RLE] = []
        for part in logits.split(_masks_at_once(size)):
            rles += masks.encode_many((_upsampled(part, size) > threshold).numpy())
        return rles
    return _through_events(logits.float().contiguous(), size, threshold)


def logits_to_rle_reference(
    logits: Tensor, size: tuple[int, int], threshold: float = 0.0
) -> list[RLE]:
    """Do the same in plain torch, on any device: the twin and oracle of the kernels."""
    rles: list[RLE] = []
    for part in logits.detach().split(_masks_at_once(size)) if len(logits) else ():
        columns = (_upsampled(part, size) > threshold).transpose(1, 2).flatten(1)
        events = columns.clone()
        events[:, 1:] ^= columns[:, :-1]
        mask, places = events.nonzero().T.cpu().numpy()
        ends = np.cumsum(np.bincount(mask, minlength=len(part)))
        rles += _rles(places, ends, size)
    return rles


def _through_events(logits: Tensor, size: tuple[int, int], threshold: float) -> list[RLE]:
    """Do the same by the kernels of a GPU."""
    if not len(logits):
        return []
    height, width = size
    words, counts = operator("mask_events")(logits, height, width, threshold)
    ends = counts.flatten().cumsum(0, dtype=torch.int64)
    starts = (ends - counts.flatten()).view_as(counts)
    last = ends.view(len(logits), -1)[:, -1].cpu().numpy()
    places = operator("mask_places")(words, starts, int(last[-1]), height)
    return _rles(places.cpu().numpy(), last, size)


def _rles(
    places: NDArray[np.integer], ends: NDArray[np.integer], size: tuple[int, int]
) -> list[RLE]:
    """Encode masks whose pixels change at ``places``, mask after mask, up to ``ends``."""
    height, width = size
    rles: list[RLE] = []
    for part in np.split(places, ends[:-1]):
        runs = np.diff(part.astype(np.int64), prepend=0, append=height * width)
        rles.append({"size": [height, width], "counts": rle_numpy.runs_to_text(runs)})
    return rles


def _upsampled(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (N, H, W) float32 or float64."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _masks_at_once(size: tuple[int, int]) -> int:
    """Return how many masks are laid out together."""
    return max(1, _AT_ONCE // (size[0] * size[1]))


def _obstacle(logits: Tensor, size: tuple[int, int]) -> str:
    """Say why no kernel of a GPU can serve this call."""
    if logits.device.type == "cpu":
        return ""
    if size[0] * size[1] > _MOST or logits.shape[1] * logits.shape[2] > _MOST:
        return "the masks are too large"
    if len(logits) > 65535:
        return "there are more than 65535 masks"
    return ""


def _shape_events(
    logits: Tensor, height: int, width: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """Return empty tensors like words and counts."""
    shape = (len(logits), width, (height + _STRIP - 1) // _STRIP)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.int32)


def _shape_places(words: Tensor, starts: Tensor, number: int, height: int) -> Tensor:
    """Return an empty tensor like the places."""
    return words.new_empty(number)


torch.library.register_fake("pmvis::mask_events", _shape_events)
torch.library.register_fake("pmvis::mask_places", _shape_places)
