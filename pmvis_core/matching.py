"""Which queries answer for which instances: IDOL's optimal-transport assignment.

SimOTA (Ge et al., YOLOX, 2021) as IDOL (Wu et al., 2022) uses it: every instance takes as many
queries as its best overlaps add up to, the cheapest ones, and no query serves two instances. All
decoder layers and images of a step are matched in one call; the ragged instances are padded.

Letters beyond the house's: G is the largest number of instances of a frame in the batch, and
``...`` stands for leading axes (none, or the decoder layers). Boxes here are cxcywh relative to
the unpadded frame; a query's centre is near an instance within 2.5/32 of either side of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pmvis_core.data.samples import Targets

FOCAL_ALPHA = 0.25
"""Weight of the positive class, in the costs and in the losses."""
FOCAL_GAMMA = 2.0
"""Exponent that plays easy examples down."""
_CENTRE_RADIUS = 2.5 / 32
"""Relative to the frame's sides (2.5 cells of a stride-32 grid on a unit frame, as published)."""
_GIOU_COST = 3.0
_OFF_CENTRE_COST = 100.0
_OUTSIDE_COST = 10000.0
_TAKEN_COST = 100000.0
_MAX_RETRIES = 8
"""One retry serves unless an image has fewer queries than its instances ask for."""


@dataclass(frozen=True)
class PaddedTargets:
    """The instances of a batch, padded to the frame with the most."""

    labels: Tensor
    """(B, G) int64 0-based category; 0 where absent."""
    boxes: Tensor
    """(B, G, 4) float32 cxcywh relative; zeros where padded."""
    present: Tensor
    """(B, G) bool: the row exists and its instance is visible in the frame."""

    @classmethod
    def of(cls, targets: Sequence[Targets], device: torch.device | None = None) -> PaddedTargets:
        """Pad the frames' targets, row g of a frame staying row g; at least one row."""
        labels = pad_sequence([t.labels for t in targets], True)
        boxes = pad_sequence([t.boxes for t in targets], True)
        present = pad_sequence([t.valid for t in targets], True)
        if labels.shape[1] == 0:
            labels, present = (F.pad(x, (0, 1)) for x in (labels, present))
            boxes = F.pad(boxes, (0, 0, 0, 1))
        labels = labels.masked_fill(~present, 0)  # an absent row's label may be out of range
        return cls(labels.to(device), boxes.to(device), present.to(device))

    def rows(self, start: int, stop: int | None) -> PaddedTargets:
        """Return some frames of the batch."""
        part = slice(start, stop)
        return PaddedTargets(self.labels[part], self.boxes[part], self.present[part])

    def where(self, condition: Tensor) -> PaddedTargets:
        """Return the same rows, present only where the (B, G) condition holds too."""
        return replace(self, present=self.present & condition)


@dataclass(frozen=True)
class Match:
    """Queries and the instances that they answer for, over decoder layers and frames."""

    selected: Tensor
    """(Ld, B, Q) bool: the query answers for an instance."""
    best: Tensor
    """(Ld, B, G) int64: the cheapest query of each instance, -1 where it has none."""
    layer: Tensor
    """(N,) int64 decoder layer of each selected query; sorted by layer, frame, query."""
    frame: Tensor
    """(N,) int64 frame of the batch."""
    query: Tensor
    """(N,) int64 query."""
    instance: Tensor
    """(N,) int64 row of the frame's targets."""


@dataclass(frozen=True)
class Contrast:
    """Queries of the reference frames that an instance should resemble, or not."""

    positives: Tensor
    """(B, G, Q) bool."""
    negatives: Tensor
    """(B, G, Q) bool: outside the instance's loosened set; none where it is absent."""


@dataclass(frozen=True)
class OptimalTransportMatcher:
    """SimOTA with IDOL's costs (which ignore the weights of its configuration)."""

    candidates: int = 10
    """Largest overlaps that an instance's number of queries is summed from."""
    loose_candidates: int = 100
    """The same for the set outside which contrastive negatives lie (a third of the queries)."""

    @torch.no_grad()
    def __call__(self, logits: Tensor, boxes: Tensor, targets: PaddedTargets) -> Match:
        """Match all decoder layers and frames at once.

        Args:
            logits: (Ld, B, Q, K) class logits.
            boxes: (Ld, B, Q, 4) cxcywh relative.
            targets: the instances of the B frames.
        """
        cost, overlap = _costs(logits, boxes, targets)
        taken, cost = _assign(cost, overlap, targets.present, self.candidates)
        best = cost.masked_fill(~taken, torch.inf).argmin(-1)
        selected = taken.any(-2)
        layer, frame, query = selected.nonzero(as_tuple=True)
        # Where two left-over instances had to share a query, the first one is its target.
        instance = taken.byte().argmax(-2)[layer, frame, query]
        best = best.masked_fill(~taken.any(-1), -1)
        return Match(selected, best, layer, frame, query, instance)

    @torch.no_grad()
    def contrast(self, logits: Tensor, boxes: Tensor, targets: PaddedTargets) -> Contrast:
        """Choose positives and negatives on the reference frames (IDOL, section 3.2).

        Args:
            logits: (B, Q, K) of the last layer.
            boxes: (B, Q, 4) of the last layer.
            targets: the instances that both frames of the pairs show.
        """
        cost, overlap = _costs(logits, boxes, targets)
        # The second call sees the costs as the first one's retries left them, as published.
        positives, cost = _assign(cost, overlap, targets.present, self.candidates)
        loosened, _ = _assign(cost, overlap, targets.present, self.loose_candidates)
        return Contrast(positives, ~loosened & targets.present[..., None])


def to_xyxy(boxes: Tensor) -> Tensor:
    """Return (..., 4) cxcywh boxes as xyxy."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def pairwise_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and generalised IoU of all pairs (Rezatofighi et al., 2019).

    Args:
        a: (..., M, 4) xyxy.
        b: (..., N, 4) xyxy.

    Returns:
        Two (..., M, N) tensors; the IoU of two boxes without area is 0.
    """
    ax1, ay1, ax2, ay2 = (c[..., :, None] for c in a.unbind(-1))
    bx1, by1, bx2, by2 = (c[..., None, :] for c in b.unbind(-1))
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp_min(0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp_min(0)
    intersection = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
    iou = intersection / union.clamp_min(torch.finfo(union.dtype).tiny)
    hull = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)) * (
        torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    )
    return iou, iou - (hull - union) / (hull + 1e-7)


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalised IoU of (N, 4) xyxy boxes row by row, (N,)."""
    low, high = torch.minimum(a[:, :2], b[:, :2]), torch.maximum(a[:, 2:], b[:, 2:])
    shared = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
    intersection = shared.clamp_min(0).prod(-1)
    union = (a[:, 2:] - a[:, :2]).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1) - intersection
    hull = (high - low).prod(-1)
    # Unlike the matcher's, this one is smoothed in both quotients, as published.
    return intersection / (union + 1e-7) - (hull - union) / (hull + 1e-7)


def _costs(logits: Tensor, boxes: Tensor, targets: PaddedTargets) -> tuple[Tensor, Tensor]:
    """Return the (..., B, G, Q) costs, infinite at absent instances, and IoUs, 0 there."""
    logits, boxes = (x if x.dtype == torch.float64 else x.float() for x in (logits, boxes))
    absent = ~targets.present[..., None]
    labels = targets.labels.unsqueeze(-2).expand(*logits.shape[:-1], targets.labels.shape[-1])
    cost = _class_cost(logits.gather(-1, labels).transpose(-1, -2).contiguous())
    iou, giou = pairwise_iou(to_xyxy(targets.boxes), to_xyxy(boxes))
    inside, near = _centred(boxes, targets.boxes)
    outside = ~((inside | near) & ~absent).any(-2, keepdim=True)
    cost = cost - _GIOU_COST * giou + _OFF_CENTRE_COST * ~(inside & near)
    cost = cost + _OUTSIDE_COST * outside
    return cost.masked_fill(absent, torch.inf), iou.masked_fill(absent, 0)


def _class_cost(logits: Tensor) -> Tensor:
    """Return the focal loss of saying yes less that of saying no."""
    p = logits.sigmoid()
    yes = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * -(p + 1e-8).log()
    no = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * -(1 - p + 1e-8).log()
    return yes - no


def _centred(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether centres lie inside the targets' boxes, and near their centres.

    Args:
        boxes: (..., B, Q, 4) cxcywh.
        targets: (B, G, 4) cxcywh.

    Returns:
        Two (..., B, G, Q) bool tensors.
    """
    x, y = boxes[..., None, :, 0], boxes[..., None, :, 1]
    x1, y1, x2, y2 = (c[..., None] for c in to_xyxy(targets).unbind(-1))
    cx, cy = targets[..., 0, None], targets[..., 1, None]
    r = _CENTRE_RADIUS
    inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)
    near = (x > cx - r) & (x < cx + r) & (y > cy - r) & (y < cy + r)
    return inside, near


def _assign(
    cost: Tensor, overlap: Tensor, present: Tensor, candidates: int
) -> tuple[Tensor, Tensor]:
    """Give every instance its cheapest queries, as many as its overlaps add up to.

    Args:
        cost: (..., B, G, Q), infinite at absent instances.
        overlap: (..., B, G, Q) IoU.
        present: (B, G) bool.
        candidates: how many overlaps are added up.

    Returns:
        (..., B, G, Q) bool, and the costs with what the retries added.
    """
    k = min(candidates, cost.shape[-1])
    wanted = overlap.topk(k, -1).values.sum(-1).int().clamp_min(1) * present
    order = torch.arange(k, device=cost.device)
    cheapest = cost.topk(k, -1, largest=False).indices
    taken = torch.zeros_like(cost, dtype=torch.bool)
    taken.scatter_(-1, cheapest, order < wanted[..., None])
    contested = taken.sum(-2, keepdim=True) > 1
    taken = _settle(taken, cost, contested)
    for _ in range(_MAX_RETRIES):
        missing = present & ~taken.any(-1)
        if not missing.any():
            break
        taken, cost = _retry(taken, cost, contested, missing)
    return taken, cost


def _settle(taken: Tensor, cost: Tensor, contested: Tensor) -> Tensor:
    """Leave contested queries (..., 1, Q) to the instance that they are cheapest for."""
    rows = torch.arange(cost.shape[-2], device=cost.device)[:, None]
    return torch.where(contested, rows == cost.argmin(-2, keepdim=True), taken)


def _retry(
    taken: Tensor, cost: Tensor, contested: Tensor, missing: Tensor
) -> tuple[Tensor, Tensor]:
    """Give the (..., B, G) missing instances their cheapest query that is not taken yet.

    As published, only the queries contested in the first place are settled again, and only in
    images where some query has two instances: two missing instances may end up sharing a query.
    """
    retrying = missing.any(-1)[..., None, None]
    cost = cost + _TAKEN_COST * (taken.any(-2, keepdim=True) & retrying)
    queries = torch.arange(cost.shape[-1], device=cost.device)
    chosen = queries == cost.argmin(-1, keepdim=True)
    taken = taken | (chosen & missing[..., None])
    shared = (taken.sum(-2, keepdim=True) > 1).any(-1, keepdim=True)
    return _settle(taken, cost, contested & shared), cost
