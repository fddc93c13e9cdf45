"""Mask losses that need no mask: BoxInst's projection and pairwise colour terms.

Tian et al., "BoxInst: High-Performance Instance Segmentation with Box Annotations" (2021). The
projection term makes a mask as wide and as high as its box (section 3.1); the pairwise term makes
neighbours of similar colour agree (section 3.2). Everything happens at stride 4, where mask
logits live: h and w are a quarter of the padded batch's sides. The work over neighbours is done by
`ops.lab_similarity` and `ops.pairwise_terms`; here is what they are asked.

For clips there is the spatio-temporal form (STPA of BoxVIS, arXiv:2303.14618): `SpatioTemporal`, on
every second pixel, by `ops.clip_pairs` and `ops.clip_pairwise_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pmvis_core import ops

STRIDE = ops.LOGIT_STRIDE
"""Pixels of the padded batch between two mask logits."""
_HALF = STRIDE // 2
"""Offset of a logit's pixel in its cell, as in the mask targets' ``[2::4]``."""


@dataclass(frozen=True)
class Affinity:
    """How alike neighbouring pixels of some frames look."""

    similarity: Tensor
    """(F, 8, h, w) float32 in 0..1, of each pixel to its neighbours."""
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
        means = F.avg_pool2d(torch.stack(padded).float(), STRIDE).byte()
        colours = means if self.channel_order == "rgb" else means.flip(1)
        ends = [
            (i.shape[1] - int(self.bottom_rows * i.shape[1] / original), i.shape[2])
            for i, original in zip(images, original_heights, strict=True)
        ]
        y, x = _sampled_pixels(height, width, means.device)
        end = torch.tensor(ends, device=means.device)
        valid = (y < end[:, :1])[:, :, None] & (x < end[:, 1:])[:, None, :]
        return Affinity(ops.lab_similarity(colours, dilation=self.dilation), valid)

    def pairwise_loss(
        self, logits: Tensor, affinity: Affinity, frame: Tensor, boxes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the disagreement of neighbours and the number of edges, per instance.

        Args:
            logits: (N, h, w).
            affinity: of F frames.
            frame: (N,) int64, the frame of each instance.
            boxes: (N, 4) xyxy in pixels of the padded batch.

        Returns:
            (N,) sums of the terms and (N,) numbers of edges; see `ops.pairwise_terms`.
        """
        return ops.pairwise_terms(
            logits,
            affinity.similarity,
            frame,
            boxes,
            self.threshold,
            valid=affinity.valid,
            dilation=self.dilation,
        )


@dataclass(frozen=True)
class ClipAffinity:
    """Which pixels of some clips' instances are pairs that should agree."""

    pairs: Tensor
    """(N, T, h, w) int16, a bit for each neighbour; see `ops.clip_pairs`."""
    shifts: Tensor
    """(N, T, 2) int64 rows and columns from each frame to the next."""
    video_index: Tensor
    """(N,) int64, the clip of each instance."""
    size: tuple[int, int]
    """(height, width) to which logits are enlarged before every second one is taken."""


@dataclass(frozen=True)
class SpatioTemporal:
    """The settings of BoxVIS' pairwise loss (STPA); the defaults are those of its code."""

    steps: tuple[tuple[int, int, int], ...] = ops.CLIP_STEPS
    """Neighbours as frames, rows and columns, in cells of two pixels; see `ops.clip_pairs`."""
    colour_threshold: float = 0.3
    """Least similarity exp(-distance / 2) of two colours in LAB."""
    patch_threshold: float = 0.9
    """Least mean cosine of the features around two pixels, where features are given."""
    patch_weight: float = 0.5
    """Weight of the cosine; a pair counts where the weighted sum of both similarities is not below
    that of the thresholds."""
    halved_above_px: int = 480
    """Longer side of the padded clip above which everything happens at half its size."""

    @torch.no_grad()
    def affinity(
        self,
        images: Tensor,
        boxes: Tensor,
        video_index: Tensor,
        features: Tensor | None = None,
    ) -> ClipAffinity:
        """Find the pairs of a step, for the outputs of all decoder layers.

        Args:
            images: (B, T, 3, H, W) uint8 RGB, augmented, padded with zeros to even sides.
            boxes: (N, T, 4) xyxy in pixels, 0 0 0 0 where an instance is absent.
            video_index: (N,) int64, the clip of each instance.
            features: (B, T, C, ., .) of any size, of the student; None: colours alone decide.

        Raises:
            ValueError: the images have another shape or type, or odd sides.
        """
        if images.ndim != 5 or images.shape[-1] % 2 or images.shape[-2] % 2:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected (B, T, 3, H, W), H and W even"
            )
        clips, padded = images.shape[:2], (images.shape[3], images.shape[4])
        block = 2 if max(padded) > self.halved_above_px else 1
        size = (padded[0] // block, padded[1] // block)
        colours = ops.lab_means(images.flatten(0, 1), 2 * block, block).unflatten(0, clips)
        height, width = colours.shape[-2:]
        cells = ops.clip_cells(boxes, height, width, 2 * block, block)
        shifts = ops.clip_shifts(boxes, padded, (height, width))
        threshold, patches = self.colour_threshold, None
        if features is not None:
            threshold += self.patch_weight * self.patch_threshold
            patches = _resized(features.flatten(0, 1), size).unflatten(0, clips)
        pairs = ops.clip_pairs(
            colours,
            video_index,
            cells,
            shifts,
            self.steps,
            threshold,
            patches=patches,
            patch_weight=self.patch_weight,
        )
        return ClipAffinity(pairs, shifts, video_index, size)

    def pairwise_loss(self, logits: Tensor, affinity: ClipAffinity) -> Tensor:
        """Return the mean disagreement of each clip's pairs, averaged over clips that have any.

        It is not divided by the number of instances: large ones dominate, as published.

        Args:
            logits: (N, T, ., .) of the padded clip at any stride.
            affinity: of the same instances.
        """
        grid = _resized(logits, affinity.size)[..., ::2, ::2]
        return ops.clip_pairwise_loss(
            grid, affinity.pairs, affinity.shifts, self.steps, affinity.video_index
        )


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
        boxes: (N, 4) xyxy in pixels; see `ops.box_cells`.
        height: h.
        width: w.

    Returns:
        (N, h, w) bool.
    """
    return ops.cell_masks(ops.box_cells(boxes, height, width), height, width)


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (N, C, ., .) maps."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _squared_dice(p: Tensor, target: Tensor) -> Tensor:
    """Return the dice loss with squared denominators of (N, P) profiles."""
    t = target.to(p.dtype)
    return 1 - 2 * (p * t).sum(-1) / ((p * p).sum(-1) + t.sum(-1) + 1e-5)


def _sampled_pixels(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the (h,) rows and (w,) columns of the padded batch at which logits lie."""
    sides = (torch.arange(side, device=device) * STRIDE + _HALF for side in (height, width))
    y, x = sides
    return y, x
