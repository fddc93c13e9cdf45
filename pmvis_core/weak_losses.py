"""Mask losses that need no mask: BoxInst's projection and pairwise colour terms.

Tian et al., "BoxInst: High-Performance Instance Segmentation with Box Annotations" (2021). The
projection term makes a mask as wide and as high as its box (section 3.1); the pairwise term makes
neighbours of similar colour agree (section 3.2). Everything happens at stride 4, where mask
logits live: h and w are a quarter of the padded batch's sides.

The eight neighbours of the paper come in opposite pairs with one and the same term, so four
offsets are kept and a pair counts once for either end that asks for it. Pairs that nobody asks
for (most of them: outside the box, or of different colour) are never evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

STRIDE = 4
"""Pixels of the padded batch between two mask logits."""
_HALF = STRIDE // 2
"""Offset of a logit's pixel in its cell, as in the mask targets' ``[2::4]``."""
_OFFSETS = ((0, 1), (1, -1), (1, 0), (1, 1))
"""(dy, dx) of half of the eight neighbours, in units of the dilation."""
_BOX_SLACK_PX = 1e-3
"""Relative float32 boxes must not lose a whole pixel when they are truncated to pixels again."""


@dataclass(frozen=True)
class Affinity:
    """Which neighbouring pixels of some frames look alike."""

    similar: Tensor
    """(F, 4, h, w) bool: the pixel and its neighbour at each offset are of similar colour."""
    valid: Tensor
    """(F, h, w) bool: neither padding nor in the bottom strip."""


@dataclass(frozen=True)
class BoxInst:
    """The settings of BoxInst's losses; the defaults are the published ones."""

    threshold: float = 0.3
    """Least similarity exp(-distance / 2) of two colours in LAB that makes them one object's."""
    dilation: int = 2
    """Distance of neighbours, in logits."""
    warmup_steps: int = 10000
    """Steps over which the pairwise term grows to its weight."""
    bottom_rows: int = 10
    """Rows of the original image at its bottom that are ignored (COCO's have black rims)."""
    channel_order: Literal["rgb", "bgr"] = "rgb"
    """How RGB frames are read as colours. ``bgr`` swaps red and blue, as the authors' PM-VIS+
    code does by feeding RGB frames to a conversion that expects BGR; use it to compare only."""

    def warmup(self, step: int) -> float:
        """Return the factor of the pairwise term in the ``step``-th step, counted from 0."""
        return min((step + 1) / max(self.warmup_steps, 1), 1.0)

    @torch.no_grad()
    def affinity(
        self, images: Sequence[Tensor], original_heights: Sequence[int], height: int, width: int
    ) -> Affinity:
        """Compare the colours of neighbouring pixels.

        Args:
            images: F of (3, H, W), RGB, 0..255, augmented and not padded.
            original_heights: F heights in pixels before augmentation.
            height: h.
            width: w.
        """
        sides = (width * STRIDE, height * STRIDE)
        padded = [F.pad(i, (0, sides[0] - i.shape[2], 0, sides[1] - i.shape[1])) for i in images]
        # As published, the means lose their fraction before the conversion.
        means = F.avg_pool2d(torch.stack(padded).float(), STRIDE).floor()
        lab = rgb_to_lab(means if self.channel_order == "rgb" else means.flip(1))
        differences = lab[:, None] - neighbours(lab, self.dilation)
        distances = (differences * differences).sum(2).sqrt()
        ends = [
            (i.shape[1] - int(self.bottom_rows * i.shape[1] / original), i.shape[2])
            for i, original in zip(images, original_heights, strict=True)
        ]
        y, x = _sampled_pixels(height, width, lab.device)
        end = torch.tensor(ends, device=lab.device)
        valid = (y < end[:, :1])[:, :, None] & (x < end[:, 1:])[:, None, :]
        return Affinity((-distances / 2).exp() >= self.threshold, valid)

    def pair_weights(self, affinity: Affinity, frame: Tensor, inside: Tensor) -> Tensor:
        """Count for every pair of neighbours how many of its ends ask for their agreement.

        A pixel inside the box asks for the agreement of a neighbour of similar colour that is
        valid; it need be neither inside the box nor does the pixel itself have to be valid.

        Args:
            affinity: of F frames.
            frame: (N,) the frame of each instance.
            inside: (N, h, w) bool, from ``box_masks``.

        Returns:
            (N, 4, h, w) uint8 in 0..2.
        """
        valid = affinity.valid[frame]
        asks = (inside[:, None] & neighbours(valid, self.dilation)).byte()
        asked = (neighbours(inside, self.dilation) & valid[:, None]).byte()
        return (asks + asked) * affinity.similar[frame]

    def pairwise_loss(self, logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the disagreement of neighbours and the number of edges, per instance.

        With p and q the foreground probabilities of a pair (logits a and b), the term is
        -log(p q + (1 - p)(1 - q)) = softplus(a) + softplus(b) - softplus(a + b).

        Args:
            logits: (N, h, w).
            weights: (N, 4, h, w) from ``pair_weights``.

        Returns:
            (N,) weighted sums of the terms and (N,) sums of the weights.
        """
        width = logits.shape[-1]
        here, there, weight = [], [], []
        for offset, (dy, dx) in enumerate(_OFFSETS):
            of_offset = weights[:, offset].flatten()
            pixels = of_offset.nonzero()[:, 0]
            here.append(pixels)
            there.append(pixels + (dy * width + dx) * self.dilation)
            weight.append(of_offset[pixels])
        pixels, flat = torch.cat(here), logits.flatten()
        a, b = flat[pixels], flat[torch.cat(there)]
        edges = torch.cat(weight).to(logits.dtype)
        terms = F.logsigmoid(-a - b) - F.logsigmoid(-a) - F.logsigmoid(-b)
        instance = pixels // (width * logits.shape[-2])
        zeros = logits.new_zeros(len(logits))
        return zeros.index_add(0, instance, terms * edges), zeros.index_add(0, instance, edges)


def projection_loss(logits: Tensor, inside: Tensor) -> Tensor:
    """Return how badly a mask's projections on the two axes cover its box's.

    Args:
        logits: (N, h, w).
        inside: (N, h, w) bool, from ``box_masks``.

    Returns:
        (N,) sum of the axes' dice losses, in [0, 2].
    """
    # The sigmoid is monotonous: the largest probability is that of the largest logit.
    rows, columns = (
        _squared_dice(logits.amax(axis).sigmoid(), inside.any(axis)) for axis in (-1, -2)
    )
    return rows + columns


def box_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Fill boxes, sampled where mask logits lie.

    Args:
        boxes: (N, 4) xyxy in pixels; the pixels of both corners are filled, as published.
        height: h.
        width: w.

    Returns:
        (N, h, w) bool.
    """
    x1, y1, x2, y2 = (boxes + _BOX_SLACK_PX).floor()[..., None].unbind(-2)
    y, x = _sampled_pixels(height, width, boxes.device)
    return ((y >= y1) & (y <= y2))[:, :, None] & ((x >= x1) & (x <= x2))[:, None, :]


def neighbours(x: Tensor, dilation: int) -> Tensor:
    """Return what lies at the four offsets of every pixel, zeros beyond the border.

    Args:
        x: (N, ..., h, w).
        dilation: distance of neighbours.

    Returns:
        (N, 4, ..., h, w).
    """
    h, w = x.shape[-2:]
    padded = F.pad(x, (dilation, dilation, 0, dilation))
    return torch.stack(
        [
            padded[..., dy * dilation : dy * dilation + h, (1 + dx) * dilation :][..., :w]
            for dy, dx in _OFFSETS
        ],
        1,
    )


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


def _squared_dice(p: Tensor, target: Tensor) -> Tensor:
    """Return the dice loss with squared denominators of (N, P) profiles."""
    t = target.to(p.dtype)
    return 1 - 2 * (p * t).sum(-1) / ((p * p).sum(-1) + t.sum(-1) + 1e-5)


def _sampled_pixels(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the (h,) rows and (w,) columns of the padded batch at which logits lie."""
    sides = (torch.arange(side, device=device) * STRIDE + _HALF for side in (height, width))
    y, x = sides
    return y, x
