"""How long jobs tell their progress without knowing the terminal.

A stage wraps its loop, ``for video in progress(videos, "infer", total)``; the command line passes
a bar on stderr, a library user passes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Something that passes items through and tells a person how far it is."""

    def __call__(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield every item of ``items`` unchanged.

        Args:
            items: what is worked through.
            what: the name of the work (``infer``).
            total: how many items there are, if known.
        """
        ...


def silent(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and tell nothing."""
    return iter(items)
