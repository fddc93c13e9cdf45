"""What becomes of samples that cannot be made: another is drawn in their place, or training stops.

An image that is missing, truncated or of another size than its annotations must not end a run at
its ninth hour, so `SKIP` is the default; that a broken data set goes unnoticed is prevented by a
limit instead: a run stops when more than a tenth of what it drew is broken, and says what it
skipped in ``metrics.jsonl``, on stderr and at the end. `STOP` is for data that must be whole, such
as a published result's. Which spare is drawn depends on the seed and the sample's number alone, so
neither a resumed run nor another number of workers sees other data.

    broken = BrokenSamples()
    for step, pairs in enumerate(batches(mixture, 4, seed=0, broken=broken)):
        skipped = broken.taken(step)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from pmvis_core.errors import DataError, UsageError

logger = logging.getLogger(__name__)

OnError = Literal["skip", "stop", "plan"]
"""What a sample that cannot be made leads to."""
SKIP: OnError = "skip"
STOP: OnError = "stop"
PLAN: OnError = "plan"
"""Nothing is read (``--dry-run``): missing files are told of, however many."""

MOST_BROKEN = 0.1
"""Share of the samples drawn so far above which training stops."""
ALWAYS_FORGIVEN = 20
"""Broken samples beyond that share that chance may bring; with 5 % broken it never brings them."""
NAMED = 5
"""Broken samples that are named before the rest are only counted."""


def on_error_of(word: str) -> OnError:
    """Return the policy of a setting.

    Raises:
        UsageError: it is none.
    """
    for policy in (SKIP, STOP, PLAN):
        if word == policy:
            return policy
    raise UsageError(f"`train.on_error` is `{word}`, expected `{SKIP}` or `{STOP}`")


def judge_missing(told: str, missing: int, whole: int, on_error: OnError, hint: str | None) -> None:
    """Refuse files that are missing before training, or warn of them.

    Args:
        told: how many there are, and the first.
        missing: how many.
        whole: of how many.
        on_error: the policy.
        hint: what to do about it.

    Raises:
        DataError: the policy forgives none, or not so many.
    """
    many = missing > MOST_BROKEN * whole
    if on_error == STOP or (many and on_error != PLAN):
        raise DataError(told, hint)
    logger.warning("%s; %s", told, f"training stops: {hint}" if many else "training skips them")


class BrokenSamples:
    """Counts the broken samples of one process."""

    def __init__(self) -> None:
        """Start with nothing drawn."""
        self.drawn = 0
        """Samples drawn, spares included."""
        self.skipped = 0
        """Those that could not be made."""
        self._by_step: dict[int, int] = {}
        self._seen: set[str] = set()

    def add(self, step: int, made: int, errors: Sequence[DataError]) -> None:
        """Take in a step's samples.

        Args:
            step: the batch's number.
            made: samples that could be made.
            errors: of those that could not, in the order of the samples.

        Raises:
            DataError: too many could not.
        """
        self.drawn += made + len(errors)
        self.skipped += len(errors)
        if errors:
            self._by_step[step] = len(errors)
        for error in errors:
            if error.message in self._seen:
                continue
            self._seen.add(error.message)
            if len(self._seen) <= NAMED:
                logger.warning("batch %d: skipped, another is drawn: %s", step, error.message)
            elif len(self._seen) == NAMED + 1:
                logger.warning("further broken samples are counted only")
        if self.skipped > MOST_BROKEN * self.drawn + ALWAYS_FORGIVEN:
            raise DataError(
                f"{self.skipped} of the {self.drawn} samples drawn so far could not be made, more "
                f"than {MOST_BROKEN:.0%}; the last: {errors[-1].message}",
                "`pmvis check-data` lists every fault of annotations and images",
            )

    def taken(self, step: int) -> int:
        """Return how many samples of a step were skipped, and forget it."""
        return self._by_step.pop(step, 0)

    def tell(self) -> None:
        """Sum up what was skipped, as a warning; say nothing if nothing was."""
        if self.skipped:
            logger.warning(
                "%d of %d samples could not be made and were replaced (%d different faults); "
                "`pmvis check-data` lists them",
                self.skipped,
                self.drawn,
                len(self._seen),
            )
