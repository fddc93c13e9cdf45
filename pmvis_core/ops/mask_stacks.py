"""Areas, boxes and overlaps of stacks of masks where they lie, on a GPU or not.

A stack keeps one bit a pixel, 32 rows of a column in a word, as the kernels of `mask_runs` write
them: what crosses to the host are a few numbers a mask. On a CPU plain torch does the work; who has
encodings there already had better ask `pmvis_core.masks`.

    stack = mask_stack(logits, (720, 1280))
    areas, boxes = mask_extents(stack)
    ious = mask_iou(stack, mask_stack(other_masks))
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pmvis_core.ops.library import Backend, choose, operator
from pmvis_core.ops.mask_runs import (
    Picks,
    check_logits,
    mask_size,
    obstacle,
    pick_tensors,
    upsampled,
)

_STRIP = 32
"""Rows of a word."""
_MOST_MASKS = 65535
"""Masks that a GPU's kernels take at once."""


class MaskStack(NamedTuple):
    """N masks of one size, as bits."""

    words: Tensor
    """(N, W, strips) int32: bit r of word s of a column is its pixel in row 32 s + r."""
    size: tuple[int, int]
    """(H, W) in pixels."""


def mask_stack(
    source: Tensor,
    size: tuple[int, int] | None = None,
    threshold: float = 0.0,
    *,
    picks: Picks | None = None,
    backend: Backend | None = None,
) -> MaskStack:
    """Return masks as bits, on the device where they are.

    Args:
        source: (N, H, W) bool masks; or (N, h, w) float logits, upsampled (bilinear, corners not
            aligned) to ``size`` and compared with ``threshold``, as by `logits_to_rle`.
        size: (H, W) of masks from logits, in pixels; None for masks.
        threshold: what a foreground pixel's logit exceeds; NaN is background.
        picks: rows and columns of the upsampled logits that are taken; see `logits_to_rle`.
        backend: what carries the call; None for the best.

    Raises:
        ValueError: the source has another shape or type.
        ResourceError: the wished backend cannot carry this call.
    """
    if size is None:
        return _from_masks(source, backend)
    check_logits(source, size, picks)
    logits = source.detach()
    problem = _no_kernel(logits) or obstacle(logits, size)
    if choose("mask_stack", backend, logits.device.type, problem) == "torch":
        return MaskStack(_pack(upsampled(logits, size, picks) > threshold), mask_size(size, picks))
    words, _ = operator("mask_events")(
        logits.float().contiguous(), *pick_tensors(logits, picks), *size, threshold, False
    )
    return MaskStack(words, mask_size(size, picks))


def mask_extents(stack: MaskStack, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Return foreground pixels and boxes.

    Args:
        stack: N masks.
        backend: what carries the call; None for the best.

    Returns:
        (N,) int64 areas, and (N, 4) int64 boxes xyxy in pixels, far edge exclusive, 0 0 0 0 for
        an empty mask, as `masks.to_box` tells them.

    Raises:
        ResourceError: the wished backend cannot carry this call.
    """
    words = stack.words
    if choose("mask_extents", backend, words.device.type, _no_kernel(words)) != "torch":
        extents: Tensor = operator("mask_extents")(words.contiguous())
        return extents[:, 0], extents[:, 1:]
    spans = []
    columns = words.ne(0).any(2)
    rows = _unpack(words).any(1)
    for line in (columns, rows):
        first = line.int().argmax(1)
        last = line.shape[1] - line.flip(1).int().argmax(1)
        spans.append((first, torch.where(line.any(1), last, 0)))
    (x0, x1), (y0, y1) = spans
    return _bits(words).sum((1, 2)), torch.stack([x0, y0, x1, y1], 1)


def mask_iou(first: MaskStack, second: MaskStack, *, backend: Backend | None = None) -> Tensor:
    """Return the intersection over union of each mask of one stack with each of another.

    Args:
        first: N masks.
        second: M masks of the same size.
        backend: what carries the call; None for the best.

    Returns:
        (N, M) float64, 0 where both masks are empty.

    Raises:
        ValueError: the stacks have different sizes.
        ResourceError: the wished backend cannot carry this call.
    """
    if first.size != second.size:
        raise ValueError(
            f"masks of {first.size[0]}x{first.size[1]} pixels cannot be compared with masks of "
            f"{second.size[0]}x{second.size[1]}"
        )
    words, others = first.words, second.words
    problem = _no_kernel(words) or _no_kernel(others)
    if choose("mask_iou", backend, words.device.type, problem) != "torch":
        common = operator("mask_overlaps")(words.contiguous(), others.contiguous())
    else:
        rows = [_bits(one & others).sum((1, 2)) for one in words]
        common = torch.stack(rows) if rows else words.new_zeros((0, len(others)), dtype=torch.int64)
    mine, theirs = (mask_extents(stack, backend=backend)[0] for stack in (first, second))
    union = mine[:, None] + theirs - common
    ious: Tensor = common.double() / union.clamp_min(1)
    return ious


def _from_masks(masks: Tensor, backend: Backend | None) -> MaskStack:
    """Pack masks."""
    if masks.ndim != 3 or masks.dtype != torch.bool or min(masks.shape[1:]) < 1:
        raise ValueError(
            f"masks are {masks.dtype} of shape {tuple(masks.shape)}, expected bool (N, H, W) "
            "with pixels, or float logits and a size"
        )
    size = (masks.shape[1], masks.shape[2])
    problem = _no_kernel(masks) or obstacle(masks, size)
    if choose("mask_stack", backend, masks.device.type, problem) == "torch":
        return MaskStack(_pack(masks), size)
    return MaskStack(operator("mask_pack")(masks.contiguous()), size)


def _no_kernel(tensor: Tensor) -> str:
    """Say why no kernel can serve masks where they are."""
    if tensor.device.type == "cpu":
        return "there is no such kernel for CPUs"
    return f"there are more than {_MOST_MASKS} masks" if len(tensor) > _MOST_MASKS else ""


def _pack(masks: Tensor) -> Tensor:
    """Return (N, W, strips) int32 words of (N, H, W) bool masks."""
    height = masks.shape[1]
    strips = (height + _STRIP - 1) // _STRIP
    rows = F.pad(masks, (0, 0, 0, strips * _STRIP - height)).transpose(1, 2)
    places = torch.arange(_STRIP, device=masks.device)
    words: Tensor = (rows.unflatten(2, (strips, _STRIP)).long() << places).sum(-1)
    return words.to(torch.int32)  # the last row's bit becomes the sign


def _unpack(words: Tensor) -> Tensor:
    """Return (N, W, 32 strips) bool."""
    places = torch.arange(_STRIP, device=words.device, dtype=torch.int32)
    return (words[..., None] >> places & 1).bool().flatten(2)


def _bits(words: Tensor) -> Tensor:
    """Return how many bits of each word are set, int64."""
    x = words.long() & 0xFFFFFFFF
    x = x - (x >> 1 & 0x55555555)
    x = (x & 0x33333333) + (x >> 2 & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101 & 0xFFFFFFFF) >> 24


def _shape_pack(masks: Tensor) -> Tensor:
    """Return an empty tensor like the words."""
    number, height, width = masks.shape
    return masks.new_empty((number, width, (height + 31) // _STRIP), dtype=torch.int32)


def _shape_extents(words: Tensor) -> Tensor:
    """Return an empty tensor like the extents."""
    return words.new_empty((len(words), 5), dtype=torch.int64)


def _shape_overlaps(words: Tensor, others: Tensor) -> Tensor:
    """Return an empty tensor like the overlaps."""
    return words.new_empty((len(words), len(others)), dtype=torch.int64)


torch.library.register_fake("pmvis::mask_pack", _shape_pack)
torch.library.register_fake("pmvis::mask_extents", _shape_extents)
torch.library.register_fake("pmvis::mask_overlaps", _shape_overlaps)
