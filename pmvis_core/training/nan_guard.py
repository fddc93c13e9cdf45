"""Which sample made a loss or a gradient that is no finite number.

A step is looked at before the weights follow it: nothing bad is ever learnt, averaged or saved, and
the last state stays. To find the cause, the step's samples are looked at one by one with the
weights that the step began with; all processes do so together and tell each other.

    raise not_finite(learner, losses, name, parts, step, numbers)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from pmvis_core.errors import DataError
from pmvis_core.training.learner import Learner
from pmvis_core.training.processes import gathered

Sample = TypeVar("Sample")
Losses = Callable[[list[Sample], int, int], dict[str, Tensor]]
"""Takes samples, the step, and the number of the first of them in the step's whole batch; returns
scalars, ``loss`` among them, which is what the weights follow."""
_NAMED = 3
GRADIENT = "gradient_norm"
"""What the norm of the gradient is called among the losses."""


def not_finite(
    learner: Learner,
    losses: Losses[Sample],
    name: Callable[[Sample], str],
    parts: Sequence[tuple[list[Sample], int]],
    step: int,
    numbers: Mapping[str, float],
) -> DataError:
    """Return the error that names the samples; every process has to call this at the same step.

    Args:
        learner: with the weights that the step began with; its gradient is overwritten.
        losses: makes the losses of some samples.
        name: says what a sample was made from.
        parts: this process's samples of the step, each list with the number of its first one.
        step: where it happened, counted from 0.
        numbers: the step's losses and the norm of its gradient, as logged.
    """
    found: list[str] = []
    count = 0
    for samples, first in parts:
        for number, sample in enumerate(samples, start=first):
            count += 1
            terms = _bad_terms(learner, losses([sample], step, number))
            if terms:
                found.append(f"{', '.join(terms)} of {name(sample)}")
    everywhere = [line for lines in gathered(found) for line in lines]
    total = sum(gathered(count))
    bad = ", ".join(f"{term} is {value}" for term, value in numbers.items() if _is_bad(value))
    message = f"step {step + 1}: {bad}"
    if not everywhere:
        return DataError(
            f"{message}; each sample of the step alone is fine",
            "lower `train.learning_rate` or `train.clip_norm`; the last saved state is untouched",
        )
    more = f"; and {len(everywhere) - _NAMED} more" if len(everywhere) > _NAMED else ""
    if len(everywhere) == total:
        hint = "every sample is affected: lower `train.learning_rate`, or look at initial weights"
    else:
        hint = "look at this sample (`pmvis check-data`), or lower `train.learning_rate`"
    shown = "; ".join(everywhere[:_NAMED])
    return DataError(f"{message}; from {shown}{more}", f"{hint}; the last saved state is untouched")


def _bad_terms(learner: Learner, losses: Mapping[str, Tensor]) -> list[str]:
    """Return the losses of a sample that are not finite, or else whether its gradient is not."""
    bad = [term for term, value in losses.items() if _is_bad(value.item())]
    terms = [term for term in bad if term != "loss"] or bad
    if terms:
        return terms
    learner.start()
    learner.backward(losses["loss"])
    return [] if learner.own_gradient_is_finite() else ["the gradient"]


def _is_bad(value: float) -> bool:
    """Tell whether a number is infinite or none."""
    return not math.isfinite(value)
