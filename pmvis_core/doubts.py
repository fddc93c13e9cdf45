"""What is odd about an input without being wrong: collected, and told once a kind.

doubts = Doubts()
doubts.add("annotation ids occur more than once", "id 7")
doubts.settle(strict=False)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from pmvis_core.errors import DataError

logger = logging.getLogger(__name__)

UNKNOWN_CATEGORY = "predictions of categories that the ground truth lacks count for nothing"
"""The kind of doubt that both the readers of predictions and the evaluators may have."""

_EXAMPLES_SHOWN = 3


class Doubts:
    """Collects what is odd about an evaluation's input, so that each kind is told once."""

    def __init__(self) -> None:
        """Start without any."""
        self._examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: str = "") -> None:
        """Note one case of a kind of oddity."""
        self._examples.setdefault(kind, []).append(example)

    @property
    def examples(self) -> Mapping[str, Sequence[str]]:
        """All examples of each kind."""
        return self._examples

    @property
    def texts(self) -> tuple[str, ...]:
        """One text a kind, with its first examples."""
        return tuple(_told(kind, examples) for kind, examples in self._examples.items())

    def settle(self, *, strict: bool) -> None:
        """Warn of everything collected.

        Raises:
            DataError: ``strict``, and there is something.
        """
        texts = self.texts
        if not texts:
            return
        if strict:
            raise DataError(
                "odd input:" + _joined(texts), "without `--strict` this is only a warning"
            )
        logger.warning("odd input, counted as the official evaluator does:%s", _joined(texts))


def _joined(texts: Sequence[str]) -> str:
    """Return one text as it is, several as a list."""
    return f" {texts[0]}" if len(texts) == 1 else "".join(f"\n  - {text}" for text in texts)


def _told(kind: str, examples: Sequence[str]) -> str:
    """Return the text of one kind of doubt."""
    distinct = list(dict.fromkeys(example for example in examples if example))
    if not distinct:
        return kind
    more = len(distinct) - _EXAMPLES_SHOWN
    told = "; ".join(distinct[:_EXAMPLES_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    return f"{kind}: {told}"
