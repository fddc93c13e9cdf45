"""What a propagator's logits cost: bootstrapped cross entropy and soft Jaccard, and their schedule.

The losses of AOT and DeAOT. Cross entropy counts only the hardest pixels of a frame, first all of
them, later 15 %; soft Jaccard treats every object alike, however small. Both leave out pixels that
nobody labelled. Identities that no object has must be silenced before (`DeAOT.upsample`).

    loss = frame_loss(logits, labels, kept=kept_share(step, steps))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = 255
"""Label of pixels without a loss."""
_LEAST_KEPT = 0.15
_KEPT_UNTIL = 0.5
"""Share of the steps after which the share of pixels is at its least."""
_REFERENCE_UNTIL = 0.1
"""Share of the steps after which the reference frame costs nothing."""
_EPSILON = 1e-6


def frame_loss(logits: Tensor, labels: Tensor, kept: float) -> Tensor:
    """Return the loss of frames, a number: half cross entropy, half Jaccard.

    Args:
        logits: (B, K, H, W), background first; classes that a sample has not are silent.
        labels: (B, H, W) integers below K, or 255.
        kept: share of each frame's pixels that cross entropy counts.
    """
    labels = labels.long()
    return 0.5 * (bootstrapped_cross_entropy(logits, labels, kept) + soft_jaccard(logits, labels))


def bootstrapped_cross_entropy(logits: Tensor, labels: Tensor, kept: float) -> Tensor:
    """Return the mean cross entropy of each frame's hardest pixels, averaged over frames.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64.
        kept: share of the labelled pixels, above 0, at most 1.
    """
    costs = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").flatten(1)
    labelled = (labels != IGNORED).flatten(1).sum(1)
    means = []
    for cost, pixels in zip(costs, labelled.tolist(), strict=True):
        # Pixels without a label cost 0, the least there is, so they come last.
        hardest = cost.topk(max(1, int(kept * pixels))).values if kept < 1 else cost
        means.append(hardest.sum() / max(1, min(len(hardest), pixels)))
    return torch.stack(means).mean()


def soft_jaccard(logits: Tensor, labels: Tensor) -> Tensor:
    """Return one minus the soft IoU, averaged over each frame's classes and then over frames.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64; classes that they do not show do not count.
    """
    classes = logits.shape[1]
    labelled = (labels != IGNORED).flatten(1)
    known = torch.where(labels == IGNORED, 0, labels).flatten(1)
    true = F.one_hot(known, classes).transpose(1, 2) * labelled[:, None]
    found = logits.softmax(1).flatten(2) * labelled[:, None]
    both = (found * true).sum(2)
    either = found.sum(2) + true.sum(2) - both
    there = true.any(2)
    apart = (1 - both / (either + _EPSILON)) * there
    return (apart.sum(1) / there.sum(1).clamp(min=1)).mean()


def kept_share(step: int, steps: int) -> float:
    """Return the share of pixels that cross entropy counts: from 1 to 0.15 in half of the steps."""
    done = min(1.0, step / max(1.0, _KEPT_UNTIL * steps))
    return 1 - (1 - _LEAST_KEPT) * done


def reference_weight(step: int, steps: int) -> float:
    """Return the weight of the reference frame's own loss: from 1 to 0 in a tenth of the steps."""
    return max(0.0, 1 - step / max(1.0, _REFERENCE_UNTIL * steps))
