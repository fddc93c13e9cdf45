"""Re-identification: the contrastive losses of IDOL's embeddings (IDOL, section 3.2).

An instance's embedding in the key frame should be like those of the queries that found it in the
reference frame, and unlike the others'. I instances are contrasted with Q queries each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_NEGATIVES_PER_POSITIVE = 10
"""Of the auxiliary loss."""


def contrastive_loss(dots: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Return log(1 + sum of exp(k.n - k.p) over positives p and negatives n) (IDOL, equation 5).

    The double sum is a product, so its logarithm is a sum of two.

    Args:
        dots: (I, Q) products of each instance's embedding with the reference frame's.
        positives: (I, Q) bool.
        negatives: (I, Q) bool.

    Returns:
        (I,); 0 without positives or without negatives.
    """
    floor = torch.finfo(dots.dtype).min / 4  # finite: -inf would give gradients of NaN
    away = dots.masked_fill(~negatives, floor).logsumexp(-1)
    close = (-dots).masked_fill(~positives, floor).logsumexp(-1)
    return F.softplus(away + close)


def cosine_loss(cosines: Tensor, positives: Tensor, sampled: Tensor) -> Tensor:
    """Return the mean squared error of cosines that should be 1 (positives) or 0 (sampled).

    Args:
        cosines: (I, Q).
        positives: (I, Q) bool.
        sampled: (I, Q) bool negatives.

    Returns:
        (I,).
    """
    chosen = positives | sampled
    errors = (cosines - positives.to(cosines.dtype)) ** 2
    return (errors * chosen).sum(-1) / chosen.sum(-1).clamp_min(1)


def draw_negatives(positives: Tensor, negatives: Tensor, keys: Tensor) -> Tensor:
    """Draw ten negatives a positive without replacement, or all where there are fewer.

    Args:
        positives: (I, Q) bool.
        negatives: (I, Q) bool.
        keys: (I, Q) random numbers in [0, 1); the smallest are drawn.

    Returns:
        (I, Q) bool.
    """
    ranks = keys.masked_fill(~negatives, 2).argsort(-1).argsort(-1)
    wanted = _NEGATIVES_PER_POSITIVE * positives.sum(-1, keepdim=True).clamp_min(1)
    return (ranks < wanted) & negatives


def negative_keys(shape: Sequence[int], seeds: tuple[int, int, int]) -> Tensor:
    """Return (B, G, Q) random numbers of the candidates for auxiliary negatives.

    Each pair has a generator of its own, and an instance's numbers do not depend on how many there
    are, nor on padding.

    Args:
        shape: B, G, Q.
        seeds: the criterion's, the step, and the number of the first pair.
    """
    seed, step, first = seeds
    keys = []
    for number in range(first, first + shape[0]):
        mixed = np.random.SeedSequence([seed, step, number]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(mixed) % 2**63)
        keys.append(torch.rand(shape[1:], generator=generator))
    return torch.stack(keys)


def euclidean_lengths(x: Tensor) -> Tensor:
    """Return the Euclidean lengths along the last axis, safe to divide and derive by at 0."""
    return (x * x).sum(-1).clamp_min(1e-24).sqrt()
