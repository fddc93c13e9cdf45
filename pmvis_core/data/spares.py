"""What becomes of samples that cannot be made: another is drawn in their place, or training stops.

An image that is missing, truncated or of another size than its annotations must not end a run at
its ninth hour, so `SKIP` is the default; that a broken data set goes unnoticed is prevented by a
limit instead: a run stops when more than a tenth of the files that it looked at are broken, and
says what it skipped in ``metrics.jsonl``, ``run.json``, on stderr and at the end. `STOP` is for
data that must be whole, such as a published result's. Which spare is drawn depends on the seed and
the sample's number alone, so neither a resumed run nor another number of workers sees other data.

`BrokenSamples` collects what one process meets, `SkippedSamples` adds up all processes and, with
its state, all resumptions, so that they judge alike.

    broken, skipped = BrokenSamples(), SkippedSamples()
    for number, pairs in enumerate(batches(mixture, 4, seed=0, broken=broken)):
        skipped.add(number, broken.taken(number))
        if (error := skipped.verdict()) is not None:
            raise error
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pmvis_core.errors import DataError

logger = logging.getLogger(__name__)

OnError = Literal["skip", "stop", "plan"]
"""What a sample that cannot be made leads to."""
SKIP: OnError = "skip"
STOP: OnError = "stop"
PLAN: OnError = "plan"
"""No setting: where nothing is read (``--dry-run``), missing files are told of, however many."""

MOST_BROKEN = 0.1
"""Share of broken files above which training stops: before it starts of all files that are listed,
later of those that it looked at. One broken file alone never stops it, unless there is no other."""
LUCK = 10
"""Broken files beyond that share that chance may bring. With one file of twenty broken it brings
them with a probability below 2e-6, however long the run (Lundberg's inequality: exp(-10 r) for the
r > 0 with 0.05 exp(0.9 r) + 0.95 exp(-0.1 r) = 1, which is 1.37). With every second one broken
they are there after some 25 files."""
LUCK_AT_END = 5
"""As `LUCK`, when a run ends: it is judged once only, and short ones should be judged, too."""
NAMED = 5
"""Broken samples that are named on stderr before the rest are only counted."""
RECORDED = 100
"""Broken samples that ``run.json`` names."""
_FOLDERS = re.compile(r"`[^`]*/([^`/]+)`")


def on_error_of(setting: str) -> OnError:
    """Return the policy of a setting, which is one of `config.ON_ERROR`."""
    return STOP if setting == STOP else SKIP


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
    many = missing > max(1, MOST_BROKEN * whole) or missing == whole
    if on_error == STOP or (many and on_error != PLAN):
        raise DataError(told, hint)
    logger.warning("%s; %s", told, f"training stops: {hint}" if many else "training skips them")


class Looked(NamedTuple):
    """What samples were made from."""

    files: int
    """Image files that were looked at, broken ones included."""
    faults: Sequence[str]
    """What was wrong with each sample that could not be made."""


class BrokenSamples:
    """Collects what one process met, until its steps ask for it."""

    def __init__(self) -> None:
        """Start with nothing drawn."""
        self._by_batch: dict[int, Looked] = {}

    def add(self, batch: int, looked: Looked) -> None:
        """Take in what a batch was made from."""
        self._by_batch[batch] = looked

    def taken(self, first: int, count: int = 1) -> Looked:
        """Return what some batches were made from, and forget it.

        Args:
            first: number of the first batch.
            count: how many follow each other.
        """
        rows = [self._by_batch.pop(first + i, Looked(0, ())) for i in range(count)]
        return Looked(sum(row.files for row in rows), [f for row in rows for f in row.faults])


class SkippedSamples:
    """What a run skipped, in all its processes and since its first step."""

    def __init__(self, state: Mapping[str, Any] | None = None, *, aloud: bool = True) -> None:
        """Go on from what `state` returned, or begin.

        Args:
            state: of the run that is resumed.
            aloud: name what is new on stderr, as one of several processes should.
        """
        before = state or {}
        self.files: int = before.get("files", 0)
        """Files looked at."""
        self.samples: int = before.get("samples", 0)
        """Samples that could not be made."""
        self._faults: Counter[str] = Counter(before.get("faults", {}))
        self._last = ""
        self._aloud = aloud

    def add(self, step: int, looked: Looked) -> None:
        """Take in what a step's samples were made from, in all processes."""
        self.files += looked.files
        self.samples += len(looked.faults)
        for fault in looked.faults:
            self._faults[fault] += 1
            self._last = fault
            new = self._faults[fault] == 1 and self._aloud
            if new and len(self._faults) <= NAMED:
                logger.warning("step %d: skipped, another is drawn: %s", step + 1, fault)
            elif new and len(self._faults) == NAMED + 1:
                logger.warning("further broken samples are counted only")

    def verdict(self, *, at_end: bool = False) -> DataError | None:
        """Return the error that ends the run, if too many files are broken.

        Args:
            at_end: no further samples come.
        """
        luck = LUCK_AT_END if at_end else LUCK
        if len(self._faults) < 2 or self.samples <= MOST_BROKEN * self.files + luck:
            return None
        return DataError(
            f"of the {self.files} files that training looked at so far {self.samples} are broken "
            f"({len(self._faults)} different faults), more than {MOST_BROKEN:.0%}; the last: "
            f"{self._last}",
            "`pmvis check-data` lists every fault of annotations and images",
        )

    def state(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        return {"files": self.files, "samples": self.samples, "faults": dict(self._faults)}

    def record(self) -> dict[str, Any]:
        """Return what ``run.json`` says, nothing if nothing was skipped.

        Returns:
            ``samples`` that were skipped, ``files`` looked at, ``different`` faults, and the first
            `RECORDED` of these as ``faults``: how often each was met. Of paths the file's name is
            left, since a record is the same wherever the data lie.
        """
        if not self.samples:
            return {}
        named: Counter[str] = Counter()
        for fault, times in list(self._faults.items())[:RECORDED]:
            named[_FOLDERS.sub(r"`\1`", fault)] += times
        counts = {"samples": self.samples, "files": self.files, "different": len(self._faults)}
        return {**counts, "faults": dict(named)}

    def tell(self, where: str) -> None:
        """Sum up what was skipped, as a warning; say nothing if nothing was.

        Args:
            where: what names the broken files.
        """
        if self.samples:
            logger.warning(
                "%d samples could not be made and were replaced (%d different faults, %d files "
                "looked at); %s names them",
                self.samples,
                len(self._faults),
                self.files,
                where,
            )
