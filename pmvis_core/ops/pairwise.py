"""BoxInst's colour affinity and pairwise loss (arXiv:2012.02310, section 3.2), fused.

Two neighbours of similar colour should both be foreground or both be background. A pixel inside an
instance's box *asks* for the agreement of each of its eight neighbours that is valid and alike;
the neighbour need not lie inside the box, nor the pixel itself be valid. A pair's term counts once
for either end that asks for it.

Terms and their slopes are computed in one pass, which stores nothing of the size of neighbours x
instances x pixels: the only large result is the gradient itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pmvis_core.ops.library import Backend, choose, operator

LOGIT_STRIDE = 4
"""Pixels of the padded batch between two mask logits, which lie in the middle: 2, 6, 10, ..."""
_BOX_SLACK_PX = 1e-3
"""Relative float32 boxes must not lose a whole pixel when they are truncated to pixels again."""
_OFFSETS = ((0, 1), (1, -1), (1, 0), (1, 1))
"""(dy, dx) of the later half of the eight neighbours, in units of the dilation."""
_MAX_DILATION = {"cpu": 16, "cuda": 8}
"""Of the kernels of the loss (kernels.h and kernels.cuh of csrc/ops/pairwise)."""
_MAX_REACH = {"cpu": 64, "cuda": 16}
"""Of the similarity's: radius x dilation in pixels."""
_MAX_BLOCKS = 65535
"""Images or instances that a GPU's kernels take at once."""


def lab_similarity(
    images: Tensor, kernel: int = 3, dilation: int = 2, *, backend: Backend | None = None
) -> Tensor:
    """Return exp(-distance / 2) of each pixel's colour to its neighbours', in CIE LAB.

    Neighbours beyond the image are black, as published: who needs it otherwise, says where pixels
    are valid.

    Args:
        images: (B, 3, H, W) uint8, RGB.
        kernel: odd side of the window of neighbours, at least 3.
        dilation: distance of neighbours in pixels.
        backend: what carries the call; None for the best.

    Returns:
        (B, kernel^2 - 1, H, W) float32: the window row by row, its centre left out.

    Raises:
        ValueError: the images have another shape or type, or there is no such window.
        ResourceError: the wished backend cannot carry this call.
    """
    check_images(images)
    if kernel < 3 or kernel % 2 == 0 or dilation < 1:
        raise ValueError(
            f"kernel and dilation are {kernel} and {dilation}, expected odd from 3 and positive"
        )
    device = images.device.type
    wide = kernel // 2 * dilation > _MAX_REACH.get(device, 0) or kernel > 64
    obstacle = "the window is too wide" if wide else _too_many(device, len(images))
    if choose("lab_similarity", backend, device, obstacle) == "torch":
        return lab_similarity_reference(images, kernel, dilation)
    similarity: Tensor = operator("lab_similarity")(images.contiguous(), kernel, dilation)
    return similarity


def lab_similarity_reference(images: Tensor, kernel: int = 3, dilation: int = 2) -> Tensor:
    """Do the same in plain torch, on any device: the twin and oracle of the kernels."""
    # In float32 a and b would lose five digits to cancellation; one kind of device has no other.
    wide = torch.float32 if images.device.type == "mps" else torch.float64
    lab = rgb_to_lab(images.to(wide)).float()
    height, width = lab.shape[-2:]
    reach = kernel // 2 * dilation
    padded = F.pad(lab, (reach,) * 4)
    planes = []
    for cell in range(kernel * kernel):
        if cell != kernel * kernel // 2:
            y, x = (place * dilation for place in divmod(cell, kernel))
            differences = lab - padded[..., y : y + height, x : x + width]
            planes.append((-(differences * differences).sum(1).sqrt() / 2).exp())
    return torch.stack(planes, 1)


def pairwise_loss(
    logits: Tensor,
    similarity: Tensor,
    image_index: Tensor,
    boxes: Tensor,
    threshold: float,
    *,
    valid: Tensor | None = None,
    dilation: int = 2,
    backend: Backend | None = None,
) -> Tensor:
    """Return the mean term over all edges of all instances, 0 where there is none.

    The arguments are those of `pairwise_terms`.

    Returns:
        A scalar, differentiable in ``logits``.
    """
    terms, edges = pairwise_terms(
        logits,
        similarity,
        image_index,
        boxes,
        threshold,
        valid=valid,
        dilation=dilation,
        backend=backend,
    )
    return terms.sum() / edges.sum().clamp_min(1)


def pairwise_terms(
    logits: Tensor,
    similarity: Tensor,
    image_index: Tensor,
    boxes: Tensor,
    threshold: float,
    *,
    valid: Tensor | None = None,
    dilation: int = 2,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the disagreement of neighbours that look alike, and the number of edges.

    With p and q the foreground probabilities of a pair (logits a and b), a term is
    -log(p q + (1 - p)(1 - q)) = softplus(a) + softplus(b) - softplus(a + b).

    Args:
        logits: (N, H, W) float; half types are computed in float32.
        similarity: (B, 8, H, W) float32 of each pixel to its neighbours, from `lab_similarity`.
        image_index: (N,) int64, the image of each instance.
        boxes: (N, 4) xyxy in pixels of the padded batch, four to a logit; see `box_cells`.
        threshold: least similarity of neighbours that should agree.
        valid: (B, H, W) bool, which neighbours' agreement may be asked for; None: all inside.
        dilation: distance of neighbours in logits, as ``similarity`` was made.
        backend: what carries the call; None for the best.

    Returns:
        (N,) sums of terms, differentiable in ``logits``, and (N,) numbers of edges of their type.

    Raises:
        ValueError: shapes do not fit together.
        ResourceError: the wished backend cannot carry this call.
    """
    _check(logits, similarity, image_index, boxes, valid)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    cells = box_cells(boxes, *logits.shape[1:])
    device = logits.device.type
    largest = _MAX_DILATION.get(device, 0)
    far = f"the dilation is more than {largest}" if dilation > largest else ""
    obstacle = far or _too_many(device, len(logits), len(similarity))
    if choose("pairwise_loss", backend, device, obstacle) == "torch":
        return pairwise_terms_reference(
            logits, similarity, image_index, cells, threshold, valid=valid, dilation=dilation
        )
    gate = similarity.new_empty(0, dtype=torch.bool) if valid is None else valid.contiguous()
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    terms, edges, _ = operator("pairwise_terms")(
        logits.contiguous(),
        similarity.contiguous(),
        image_index.contiguous(),
        cells.contiguous(),
        gate,
        threshold,
        dilation,
        with_gradient,
    )
    return terms, edges


def pairwise_terms_reference(
    logits: Tensor,
    similarity: Tensor,
    image_index: Tensor,
    cells: Tensor,
    threshold: float,
    *,
    valid: Tensor | None = None,
    dilation: int = 2,
) -> tuple[Tensor, Tensor]:
    """Do the same in plain torch, on any device, for boxes in ``cells`` (see `box_cells`).

    Pairs that nobody asks for (most of them: outside the box, or of different colour) are never
    evaluated.
    """
    height, width = logits.shape[1:]
    alike = similarity >= threshold
    if valid is not None:
        alike = alike & torch.stack([_moved(valid, *o, dilation) for o in _all_offsets()], 1)
    asks = alike[image_index] & cell_masks(cells, height, width)[:, None]
    flat, zeros = logits.flatten(), logits.new_zeros(len(logits))
    terms, edges = zeros, zeros
    for offset, (dy, dx) in enumerate(_OFFSETS):
        there = _moved(asks[:, 3 - offset], dy, dx, dilation)
        here = asks[:, 4 + offset] & _moved(torch.ones_like(there), dy, dx, dilation)
        weights = (here.byte() + there.byte()).flatten()
        pixels = weights.nonzero()[:, 0]
        a, b = flat[pixels], flat[pixels + (dy * width + dx) * dilation]
        weight = weights[pixels].to(logits.dtype)
        instance = pixels // (height * width)
        terms = terms + zeros.index_add(0, instance, pair_terms(a, b) * weight)
        edges = edges + zeros.index_add(0, instance, weight)
    return terms, edges


def pair_terms(a: Tensor, b: Tensor) -> Tensor:
    """Return -log(p q + (1 - p)(1 - q)) of the probabilities of logits a and b, elementwise."""
    return F.logsigmoid(-a - b) - F.logsigmoid(-a) - F.logsigmoid(-b)


def box_cells(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return which mask logits lie inside boxes.

    Logit i of an axis lies at pixel 4 i + 2 of the padded batch. Boxes are truncated to whole
    pixels, and the pixels of both corners belong to them, as published.

    Args:
        boxes: (N, 4) xyxy in pixels.
        height: of the map of logits.
        width: likewise.

    Returns:
        (N, 4) int64 first column, first row, and the column and row after the last.
    """
    half = LOGIT_STRIDE // 2
    corners = (boxes + _BOX_SLACK_PX).floor()
    shift = boxes.new_tensor([half - 1, half - 1, half, half])
    ends = boxes.new_tensor([width, height] * 2)
    return ((corners + shift) / LOGIT_STRIDE).floor().clamp_min(0).minimum(ends).long()


def cell_masks(cells: Tensor, height: int, width: int) -> Tensor:
    """Return (N, height, width) bool, True in the cells that `box_cells` found."""
    x0, y0, x1, y1 = cells[:, :, None].unbind(1)
    y = torch.arange(height, device=cells.device)
    x = torch.arange(width, device=cells.device)
    return ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None]


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """Convert sRGB to CIE LAB under illuminant D65 for the 2 degree observer.

    Args:
        rgb: (..., 3, h, w) float, 0..255.

    Returns:
        (..., 3, h, w): L in 0..100, a and b.
    """
    v = rgb / 255
    linear = torch.where(v > 0.04045, ((v + 0.055) / 1.055) ** 2.4, v / 12.92)
    # IEC 61966-2-1, each row divided by the white point's X, Y or Z.
    to_xyz = rgb.new_tensor(
        [
            [0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047],
            [0.212671, 0.715160, 0.072169],
            [0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883],
        ]
    )
    xyz = torch.einsum("ij,...jhw->...ihw", to_xyz, linear)
    f = torch.where(xyz > 0.008856, xyz.clamp_min(1e-8) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -3)


def check_images(images: Tensor) -> None:
    """Check that images are (B, 3, H, W) uint8, which every kernel of colours expects.

    Raises:
        ValueError: they are not.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}, expected uint8 (B, 3, H, W)"
        )


def _too_many(device: str, *numbers: int) -> str:
    """Say that a GPU's kernels cannot take so many images or instances."""
    many = device != "cpu" and max(numbers) > _MAX_BLOCKS
    return f"there are more than {_MAX_BLOCKS} images or instances" if many else ""


def _all_offsets() -> list[tuple[int, int]]:
    """Return (dy, dx) of all eight neighbours."""
    return [(-dy, -dx) for dy, dx in reversed(_OFFSETS)] + list(_OFFSETS)


def _moved(x: Tensor, dy: int, dx: int, dilation: int) -> Tensor:
    """Return what lies (dy, dx) dilations away from every pixel of (..., h, w), zeros beyond."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (dilation,) * 4)
    return padded[..., (1 + dy) * dilation :, (1 + dx) * dilation :][..., :height, :width]


def _check(
    logits: Tensor, similarity: Tensor, image_index: Tensor, boxes: Tensor, valid: Tensor | None
) -> None:
    """Check that the shapes fit together."""
    if logits.ndim != 3 or not logits.is_floating_point():
        raise ValueError(
            f"logits are {logits.dtype} of shape {tuple(logits.shape)}, expected float (N, H, W)"
        )
    number, height, width = logits.shape
    if similarity.ndim != 4 or similarity.shape[1:] != (8, height, width):
        raise ValueError(
            f"similarity has shape {tuple(similarity.shape)}, expected (B, 8, {height}, {width})"
        )
    if image_index.shape != (number,) or boxes.shape != (number, 4):
        raise ValueError(
            f"image indices and boxes have shapes {tuple(image_index.shape)} and "
            f"{tuple(boxes.shape)}, expected ({number},) and ({number}, 4)"
        )
    if valid is not None and valid.shape != (len(similarity), height, width):
        raise ValueError(
            f"valid has shape {tuple(valid.shape)}, expected {(len(similarity), height, width)}"
        )


def _shape_similarity(images: Tensor, kernel: int, dilation: int) -> Tensor:
    """Return an empty tensor like the similarity."""
    batch, _, height, width = images.shape
    size = (batch, kernel * kernel - 1, height, width)
    return images.new_empty(size, dtype=torch.float32)


def _shape_terms(
    logits: Tensor,
    similarity: Tensor,
    image_index: Tensor,
    cells: Tensor,
    valid: Tensor,
    threshold: float,
    dilation: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors like terms, edges and gradient."""
    gradient = torch.empty_like(logits) if with_gradient else logits.new_empty(0)
    return logits.new_empty(len(logits)), logits.new_empty(len(logits)), gradient


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep the slopes."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Scale the slopes of each instance's terms."""
    (slopes,) = ctx.saved_tensors
    return slopes * grad[:, None, None], *(None,) * 7


torch.library.register_fake("pmvis::lab_similarity", _shape_similarity)
torch.library.register_fake("pmvis::pairwise_terms", _shape_terms)
torch.library.register_autograd("pmvis::pairwise_terms", _backward, setup_context=_save)
