"""Endless batches: resume, sharing out, shares, prefetching."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pmvis_core.data.samples import Frame, KeyReferencePair, Targets
from pmvis_core.data.streams import Ledger, Mixture, Source, batches, prefetch
from pmvis_core.errors import DataError, UsageError
from pmvis_core.types import Category


class Numbers:
    """A source whose samples hold their index and a random number."""

    files_a_sample = 1

    def __init__(self, length: int, first: int = 0, categories: tuple[Category, ...] = ()) -> None:
        """Count ``length`` samples from ``first`` on."""
        self.length, self.first, self.categories = length, first, categories

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.length

    def sample(self, index: int, rng: np.random.Generator) -> KeyReferencePair:
        """Return a pair whose image is the index and a random number."""
        none = torch.zeros(0)
        targets = Targets(none, none, none, (), none, none)
        values = torch.tensor([float(self.first + index), float(rng.random())])
        frame = Frame(values, targets, 1)
        return KeyReferencePair(frame, frame)

    def ledger(self) -> Ledger:
        """Return how many there are."""
        return {"numbers": Counter(images=self.length)}


def taken(stream: Iterator[list[KeyReferencePair]], steps: int) -> list[list[float]]:
    """Return index and random number of every pair, a row a step."""
    return [
        [value for pair in batch for value in pair.key.image.tolist()]
        for batch in itertools.islice(stream, steps)
    ]


def mixture() -> Mixture:
    return Mixture([Numbers(5), Numbers(7, first=100)], [1.0, 0.75])


@pytest.mark.parametrize("source", [Numbers(11), mixture()])
@pytest.mark.parametrize("start", [0, 1, 37, 1500])
def test_a_resumed_stream_continues_the_same_data(source: Source | Mixture, start: int) -> None:
    whole = taken(batches(source, 3, seed=4), start + 3)
    assert taken(batches(source, 3, seed=4, start_step=start), 3) == whole[start:]


def test_seeds_differ() -> None:
    assert taken(batches(mixture(), 3, seed=1), 5) != taken(batches(mixture(), 3, seed=2), 5)


def test_threads_and_prefetching_keep_the_order() -> None:
    plain = taken(batches(mixture(), 4, seed=0), 20)
    assert taken(batches(mixture(), 4, seed=0, threads=3), 20) == plain
    assert taken(prefetch(batches(mixture(), 4, seed=0, threads=2), 3), 20) == plain


def test_every_epoch_visits_everything_once() -> None:
    indices = [row[0] for row in taken(batches(Numbers(10), 1, seed=0), 30)]
    epochs = [indices[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_processes_share_an_epoch_out() -> None:
    parts = [taken(batches(Numbers(12), 2, seed=0, rank=r, world=3), 2) for r in range(3)]
    indices = [value for part in parts for row in part for value in row[::2]]
    assert sorted(indices) == list(range(12))
    # Together they see what one process would have seen.
    alone = taken(batches(Numbers(12), 6, seed=0), 2)
    together = [list(itertools.chain(*(part[step] for part in parts))) for step in range(2)]
    assert together == alone


def test_shares_are_kept() -> None:
    source = Mixture([Numbers(5), Numbers(7, first=100), Numbers(2, first=200)], [2, 1, 0])
    indices = np.array([row[::2] for row in taken(batches(source, 10, seed=0), 600)]).ravel()
    assert abs((indices < 100).mean() - 2 / 3) < 0.02
    assert not (indices >= 200).any()
    for low, high in ((0, 5), (100, 107)):
        counts = Counter(indices[(indices >= low) & (indices < high)].tolist())
        assert max(counts.values()) - min(counts.values()) <= 1


def test_a_mixture_of_mixtures_is_taken_apart() -> None:
    source = Mixture([Numbers(3), mixture()], [0.3, 0.7])
    np.testing.assert_allclose(source.probabilities, [0.3, 0.4, 0.3])
    assert source.ledger() == {"numbers": Counter(images=15)}


def test_impossible_mixtures_are_refused() -> None:
    with pytest.raises(UsageError, match="expected 1 numbers"):
        Mixture([Numbers(1)], [1.0, 2.0])
    with pytest.raises(UsageError, match="nothing to draw"):
        Mixture([Numbers(1)], [0.0])
    with pytest.raises(UsageError, match="numbers >= 0"):
        Mixture([Numbers(1), Numbers(1)], [1.0, -1.0])
    with pytest.raises(DataError, match="empty"):
        Mixture([Numbers(0), Numbers(1)], [1.0, 1.0])
    with pytest.raises(DataError, match="vocabularies"):
        Mixture([Numbers(1), Numbers(1, categories=(Category(1, "cat"),))], [1.0, 1.0])


def test_prefetching_ends_with_its_items() -> None:
    assert list(prefetch(iter(range(7)), 2)) == list(range(7))


def test_an_error_shows_at_the_item_that_failed() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise DataError("image 2 is broken")

    stream = prefetch(items())
    assert next(stream) == 1
    with pytest.raises(DataError, match="image 2 is broken"):
        next(stream)


def test_prefetching_stops_with_its_reader() -> None:
    stream = prefetch(itertools.count(), 2)
    assert next(stream) == 0
    assert any(thread.name == "prefetch" for thread in threading.enumerate())
    stream.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
