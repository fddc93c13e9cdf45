"""What a step's losses are divided by when its batch is spread over processes and in time.

A term of `SetCriterion` is a sum over matched queries (or pixels, edges, contrasted instances) and
is divided by their number N. With W processes and a batch in A parts (`train.accumulate`), N is

``batch``
    the number in the pairs that all W processes look at together: one part of the batch. So W
    processes equal one with W times the pairs to rounding, wherever frames need no other padding;
    it is the default because the result then does not depend on how many GPUs a user has.
``process``
    the number in this process's pairs alone, as in IDOL's code, which made the published figures:
    a pair beside crowded ones counts less.

At least 1 in both; a step's gradient is the mean over processes and parts. The numbers of the A
parts are never added up, because no part's gradient could begin before the last part's forward
pass: with ``process``, A parts on one GPU therefore equal A GPUs.
"""

from __future__ import annotations

from torch import Tensor

from pmvis_core.losses import Divisors, at_least_one
from pmvis_core.training.processes import rank_and_world, summed

BATCH, PROCESS = "batch", "process"
"""Values of ``train.normaliser``; `TrainConfig` refuses others."""


def divisors_of(normaliser: str) -> Divisors:
    """Return what divides the terms of a run."""
    return at_least_one if normaliser == PROCESS else shared_divisors


def shared_divisors(numbers: Tensor) -> Tensor:
    """Return what divides this process's terms so that their mean over processes is the batch's.

    Args:
        numbers: (D,) of this process.
    """
    _, world = rank_and_world()
    return summed(numbers.detach().clone()).clamp_min(1) / world
