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

Picks = tuple[Tensor, Tensor]
"""(P,) rows and (Q,) columns of an upsampled map, int64."""
_AT_ONCE = 1 << 24
"""Pixels laid out at a time."""
_STRIP = 32
"""Rows of a word of bits (csrc/ops/mask_runs/runs.cuh)."""
_MOST = 2**31 - 1
"""Pixels of a mask, and of its logits, that the kernels can count."""


def logits_to_rle(
    logits: Tensor,
    size: tuple[int, int],
    threshold: float = 0.0,
    *,
    picks: Picks | None = None,
    backend: Backend | None = None,
) -> list[RLE]:
    """Return the masks of the pixels whose upsampled logits are above a threshold.

    Args:
        logits: (N, h, w) float; half types are computed in float32. No gradient flows.
        size: (H, W) in pixels to which logits are upsampled: that of the masks without ``picks``.
        threshold: what a foreground pixel's logit exceeds; NaN is background.
        picks: (P,) rows and (Q,) columns of the upsampled logits, int64 within ``size``, of which
            masks of (P, Q) pixels are made, as cropping and resizing to the nearest pixel do.
        backend: what carries the call; None for the best.

    Returns:
        N encodings, as `masks.encode_many` gives them. The kernels of GPUs round as torch does on a
        CPU that fuses multiplication and addition; with another backend a pixel whose logit equals
        the threshold but for rounding may fall on the other side.

    Raises:
        ValueError: the logits have another shape or type, a side is not positive, or there are no
            such rows or columns.
        ResourceError: the wished backend cannot carry this call.
    """
    check_logits(logits, size, picks)
    logits = logits.detach()
    place = logits.device.type
    carrier = choose("logits_to_rle", backend, place, obstacle(logits, size), cpu=MASKS)
    if carrier == "torch":
        return logits_to_rle_reference(logits, size, threshold, picks)
    if place == "cpu":
        rles: list[RLE] = []
        for part in logits.split(_masks_at_once(size)):
            rles += masks.encode_many((upsampled(part, size, picks) > threshold).numpy())
        return rles
    return _through_events(logits.float().contiguous(), size, threshold, picks)


def logits_to_rle_reference(
    logits: Tensor, size: tuple[int, int], threshold: float = 0.0, picks: Picks | None = None
) -> list[RLE]:
    """Do the same in plain torch, on any device: the twin and oracle of the kernels."""
    rles: list[RLE] = []
    for part in logits.detach().split(_masks_at_once(size)) if len(logits) else ():
        columns = (upsampled(part, size, picks) > threshold).transpose(1, 2).flatten(1)
        events = columns.clone()
        events[:, 1:] ^= columns[:, :-1]
        mask, places = events.nonzero().T.cpu().numpy()
        ends = np.cumsum(np.bincount(mask, minlength=len(part)))
        rles += _rles(places, ends, mask_size(size, picks))
    return rles


def _through_events(
    logits: Tensor, size: tuple[int, int], threshold: float, picks: Picks | None = None
) -> list[RLE]:
    """Do the same by the kernels of a GPU."""
    if not len(logits):
        return []
    words, counts = operator("mask_events")(
        logits, *pick_tensors(logits, picks), *size, threshold, True
    )
    ends = counts.flatten().cumsum(0, dtype=torch.int64)
    starts = (ends - counts.flatten()).view_as(counts)
    last = ends.view(len(logits), -1)[:, -1].cpu().numpy()
    size = mask_size(size, picks)
    places = operator("mask_places")(words, starts, int(last[-1]), size[0])
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


def upsampled(logits: Tensor, size: tuple[int, int], picks: Picks | None) -> Tensor:
    """Return (N, H, W) float32 or float64, or of its rows and columns those that are picked."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    full = F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return full if picks is None else full[:, picks[0][:, None], picks[1]]


def mask_size(size: tuple[int, int], picks: Picks | None) -> tuple[int, int]:
    """Return (height, width) of masks."""
    return size if picks is None else (len(picks[0]), len(picks[1]))


def pick_tensors(like: Tensor, picks: Picks | None) -> list[Tensor]:
    """Return rows and columns as kernels take them, nothing for all."""
    if picks is None:
        return [like.new_empty(0, dtype=torch.int32)] * 2
    return [places.to(like.device, torch.int32).contiguous() for places in picks]


def check_logits(logits: Tensor, size: tuple[int, int], picks: Picks | None) -> None:
    """Check what is to become masks.

    Raises:
        ValueError: see `logits_to_rle`.
    """
    height, width = size
    if logits.ndim != 3 or not logits.is_floating_point() or min(logits.shape[1:]) < 1:
        raise ValueError(
            f"logits are {logits.dtype} of shape {tuple(logits.shape)}, expected float (N, h, w)"
        )
    if height < 1 or width < 1:
        raise ValueError(f"the size is {height}x{width}, expected positive pixels")
    for places in picks or ():
        if places.ndim != 1 or not len(places) or places.dtype != torch.int64:
            raise ValueError(
                f"picks are {places.dtype} of shape {tuple(places.shape)}, expected int64 rows "
                "(P,) and columns (Q,), at least one of each"
            )


def _masks_at_once(size: tuple[int, int]) -> int:
    """Return how many masks are laid out together."""
    return max(1, _AT_ONCE // (size[0] * size[1]))


def obstacle(logits: Tensor, size: tuple[int, int]) -> str:
    """Say why no kernel of a GPU can serve this call."""
    if logits.device.type == "cpu":
        return ""
    if size[0] * size[1] > _MOST or logits.shape[1] * logits.shape[2] > _MOST:
        return "the masks are too large"
    if len(logits) > 65535:
        return "there are more than 65535 masks"
    return ""


def _shape_events(
    logits: Tensor,
    rows: Tensor,
    columns: Tensor,
    height: int,
    width: int,
    threshold: float,
    changes: bool,
) -> tuple[Tensor, Tensor]:
    """Return empty tensors like words and counts."""
    high, wide = (len(rows), len(columns)) if rows.numel() else (height, width)
    shape = (len(logits), wide, (high + _STRIP - 1) // _STRIP)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.int32)


def _shape_places(words: Tensor, starts: Tensor, number: int, height: int) -> Tensor:
    """Return an empty tensor like the places."""
    return words.new_empty(number)


torch.library.register_fake("pmvis::mask_events", _shape_events)
torch.library.register_fake("pmvis::mask_places", _shape_places)
