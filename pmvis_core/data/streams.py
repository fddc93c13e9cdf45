"""Endless streams of training batches that can start at any step.

What step `k` yields depends on the seed, `k` and the process only, so a resumed run sees the data
it would have seen, also where broken samples are replaced (`spares`). `Mixture` draws from several
sources, each in shuffled epochs of its own.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pmvis_core.data.spares import BrokenSamples, Looked
from pmvis_core.errors import DataError, UsageError
from pmvis_core.types import Category

T = TypeVar("T")
Sample = TypeVar("Sample")
"""What a source yields, such as a key/reference pair."""
Sample_co = TypeVar("Sample_co", covariant=True)
Ledger = dict[str, Counter[str]]
"""Per source: how many ``images`` or ``videos``, and annotations by kind of supervision."""

_DRAW_BLOCK = 4096
_CHOICE, _ORDER, _SAMPLE, _SPARE = range(4)
_MOST_SPARES = 50
_Made = tuple[Sample, list[DataError]]
"""A sample, and why those before it could not be made."""


class Source(Protocol[Sample_co]):
    """Something that samples are drawn from."""

    categories: tuple[Category, ...]
    """The vocabulary by ascending id; label ``k`` is ``categories[k]``."""
    files_a_sample: int
    """Image files that a sample is made from."""

    def __len__(self) -> int:
        """Return the number of stills or videos."""
        ...

    def sample(self, index: int, rng: np.random.Generator) -> Sample_co:
        """Return a random sample of the ``index``-th of them."""
        ...

    def ledger(self) -> Ledger:
        """Return what human and machine labels it holds."""
        ...


class Mixture(Generic[Sample]):
    """Several sources, each drawn with its share of the probability."""

    def __init__(
        self, sources: Sequence[Source[Sample] | Mixture[Sample]], shares: Sequence[float]
    ) -> None:
        """Keep the sources; a mixture within a mixture is taken apart.

        Args:
            sources: what to draw from; all with the same vocabulary.
            shares: their weights, >= 0, in any unit.

        Raises:
            UsageError: the shares do not fit the sources.
            DataError: the vocabularies differ, or a source with a share is empty.
        """
        weights = np.asarray(shares, np.float64)
        if len(weights) != len(sources) or not len(weights) or weights.min() < 0:
            raise UsageError(f"shares {list(shares)}, expected {len(sources)} numbers >= 0")
        if not 0 < weights.sum() < np.inf:
            raise UsageError(f"shares {list(shares)} leave nothing to draw from")
        flat: list[tuple[Source[Sample], float]] = []
        for source, weight in zip(sources, (weights / weights.sum()).tolist(), strict=True):
            if isinstance(source, Mixture):
                parts = zip(source.sources, source.probabilities.tolist(), strict=True)
                flat += [(part, weight * share) for part, share in parts]
            else:
                flat.append((source, weight))
        self.sources: tuple[Source[Sample], ...] = tuple(source for source, _ in flat)
        self.probabilities: NDArray[np.float64] = np.array([weight for _, weight in flat])
        self.categories = self.sources[0].categories
        self._check()

    def _check(self) -> None:
        """Refuse empty sources and mixed vocabularies."""
        for source, weight in zip(self.sources, self.probabilities, strict=True):
            if weight > 0 and not len(source):
                raise DataError("a source of training data is empty, so it cannot have a share")
            if source.categories != self.categories:
                raise DataError(
                    "two sources of training data have different vocabularies",
                    "make images and tracks with the same `categories.json`",
                )

    def draws(self, seed: int, start: int = 0) -> Iterator[tuple[Source[Sample], int]]:
        """Yield (source, index) without end, each source in shuffled epochs of its own.

        Args:
            seed: of choice and order.
            start: draws to skip, at almost no cost.
        """
        drawn = [0] * len(self.sources)
        epochs = [(-1, np.empty(0, np.intp))] * len(self.sources)
        for block in itertools.count():
            rng = np.random.default_rng([seed, _CHOICE, block])
            chosen = rng.choice(len(self.sources), _DRAW_BLOCK, p=self.probabilities)
            skipped = min(max(start - block * _DRAW_BLOCK, 0), _DRAW_BLOCK)
            for which, number in enumerate(np.bincount(chosen[:skipped]).tolist()):
                drawn[which] += number
            for which in chosen[skipped:].tolist():
                source = self.sources[which]
                epoch, place = divmod(drawn[which], len(source))
                drawn[which] += 1
                if epochs[which][0] != epoch:
                    order = np.random.default_rng([seed, _ORDER, which, epoch])
                    epochs[which] = epoch, order.permutation(len(source))
                yield source, int(epochs[which][1][place])

    def ledger(self) -> Ledger:
        """Return the sum of the sources' ledgers."""
        out: Ledger = {}
        for source in self.sources:
            for name, row in source.ledger().items():
                out.setdefault(name, Counter()).update(row)
        return out


def batches(
    source: Source[Sample] | Mixture[Sample],
    share: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    threads: int = 0,
    broken: BrokenSamples | None = None,
) -> Iterator[list[Sample]]:
    """Yield this process's batches without end.

    Args:
        source: what to draw from.
        share: samples of this process in one step.
        seed: the same seed gives the same data.
        rank: this process's number; the processes share the epochs out among them.
        world: number of processes.
        start_step: step to begin with.
        threads: samples made side by side; 0 makes them in the caller's thread.
        broken: collects the samples that cannot be made, in whose place others are drawn from the
            same source; None stops at the first.

    Raises:
        DataError: a sample cannot be made, or with ``broken`` too many in a row cannot.
    """
    mixture = source if isinstance(source, Mixture) else Mixture([source], [1.0])
    whole = world * share
    draws = mixture.draws(seed, start_step * whole)

    def make(drawn: tuple[Source[Sample], int], number: int) -> _Made[Sample]:
        return _make(drawn[0], drawn[1], seed, number, spares=_MOST_SPARES if broken else 0)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        for step in itertools.count(start_step):
            first = rank * share
            drawn = list(itertools.islice(draws, whole))[first : first + share]
            begin = step * whole + first
            numbers = range(begin, begin + share)
            made = list((pool.map if threads else map)(make, drawn, numbers))
            if broken is not None:
                broken.add(step, _looked(drawn, made))
            yield [sample for sample, _ in made]


def _looked(drawn: Sequence[tuple[Source[Sample], int]], made: Sequence[_Made[Sample]]) -> Looked:
    """Return what samples were made from; of one that is broken a single file is known."""
    faults = [error.message for _, errors in made for error in errors]
    return Looked(sum(source.files_a_sample for source, _ in drawn) + len(faults), faults)


def _make(source: Source[Sample], index: int, seed: int, number: int, spares: int) -> _Made[Sample]:
    """Make a sample, or one of up to ``spares`` others of its source if it is broken.

    Raises:
        DataError: none of them can be made.
    """
    errors: list[DataError] = []
    rng = np.random.default_rng([seed, _SAMPLE, number])
    while True:
        try:
            return source.sample(index, rng), errors
        except DataError as error:
            if not spares:
                raise
            if len(errors) == spares:
                raise DataError(
                    f"{spares + 1} samples in a row could not be made; the last: {error.message}",
                    "is the disk with the data still there? the same command goes on from the last "
                    "saved state",
                ) from error
            rng = np.random.default_rng([seed, _SPARE, number, len(errors)])
            index = int(rng.integers(len(source)))
            errors.append(error)


def prefetch(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """Yield the items in order while a thread makes up to ``depth`` of them ahead.

    An error in the thread is raised here, at the item that failed.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: T | None, error: BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item, None)
                if stopped.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()
