"""From two files to matches: the fast way where it can be gone, the readable one elsewhere.

Ground truth in the dataset form and a results list, both plain files, are matched from their bytes
by the compiled library. Everything else (gzip, standard input, tracks files, and whatever is
malformed) goes through the readers in `formats`, with the same numbers and messages.

    evaluate_files(Path("valid.json"), Path("results.json")).summary["AP"]
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pmvis_core.doubts import Doubts
from pmvis_core.evaluation import compiled
from pmvis_core.evaluation.curves import Evaluation, accumulate
from pmvis_core.evaluation.matches import Ints, Matches
from pmvis_core.evaluation.oddities import note
from pmvis_core.evaluation.protocol import groups_of
from pmvis_core.progress import Progress, silent
from pmvis_core.types import Category

_SPACE = b" \t\n\r"


@dataclass(frozen=True)
class Work:
    """What is to be matched."""

    truth: Path
    """Ground truth in the dataset form; gzip or ``-`` will do."""
    predictions: Path
    """A results list, tracks file or dataset; gzip or ``-`` will do."""
    protocol: str = "ytvis"
    """``ytvis`` or ``ovis``."""
    exact: bool = False
    """Compute IoUs below 0.5, too, which match nothing; else they are 0."""
    threads: int = 0
    """How many work natively; 0 for one a processor."""
    shard: tuple[int, int] = (1, 1)
    """Which videos, ``(i, n)``: every n-th by ascending id, from the i-th on."""


class Matched(NamedTuple):
    """What was found."""

    categories: tuple[Category, ...]
    """The vocabulary of the ground truth."""
    video_ids: Ints
    """(V,) all that the ground truth lists, in its order."""
    matches: Matches
    """Of the shard's videos."""


def match_files(work: Work, doubts: Doubts, progress: Progress = silent) -> Matched:
    """Match predictions with ground truth.

    Args:
        work: which files, and how.
        doubts: where to note what is odd.
        progress: tells how many videos and categories are done, where that takes time.

    Raises:
        DataError: a file is missing or malformed, or they do not belong together.
    """
    found = _match_bytes(work)
    if found is None:
        return _match_read(work, doubts, progress)
    for kind, numbers in found.doubts:
        note(doubts, kind, *numbers)
    return Matched(_categories(found.vocabulary), found.video_ids, found.matches)


def evaluate_files(
    truth: Path,
    predictions: Path,
    protocol: str = "ytvis",
    *,
    strict: bool = False,
    exact: bool = False,
    threads: int = 0,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate a file of predictions; for the arguments see `Work`.

    Raises:
        DataError: a file is missing or malformed, they do not belong together, or anything is odd
            with ``strict``.
    """
    doubts = Doubts()
    work = Work(truth, predictions, protocol, exact=exact, threads=threads)
    found = match_files(work, doubts, progress)
    doubts.settle(strict=strict)
    return accumulate(found.categories, found.matches)


def _match_bytes(work: Work) -> compiled.Found | None:
    """Match two plain files natively; None where that cannot be."""
    groups = groups_of(work.protocol)
    if compiled.load_library()[0] is None:
        return None
    truth, predictions = _bytes_of(work.truth, b"{"), _bytes_of(work.predictions, b"[")
    if truth is None or predictions is None:
        return None
    return compiled.match_files(
        truth, predictions, groups, shard=work.shard, exact=work.exact, threads=work.threads
    )


def _bytes_of(path: Path, opening: bytes) -> NDArray[np.uint8] | None:
    """Map a plain file that opens with a bracket; None if it is something else."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # unreadable, or empty
        return None
    if not data[:64].lstrip(_SPACE).startswith(opening):
        return None
    return np.frombuffer(data, dtype=np.uint8)


def _categories(vocabulary: bytes) -> tuple[Category, ...]:
    """Return the vocabulary as `formats.ytvis` reads it; the library has checked the ids."""
    return tuple(
        Category(int(entry["id"]), str(entry.get("name", int(entry["id"]))))
        for entry in json.loads(vocabulary)
    )


def _match_read(work: Work, doubts: Doubts, progress: Progress) -> Matched:
    """Match what the readers give."""
    from pmvis_core.evaluation.average_precision import check_annotated, match
    from pmvis_core.formats.predictions import read_predictions
    from pmvis_core.formats.ytvis import read_dataset

    truth = read_dataset(work.truth)
    check_annotated(truth)
    matches = match(
        truth,
        read_predictions(work.predictions, truth, doubts),
        work.protocol,
        doubts,
        shard=work.shard,
        exact=work.exact,
        threads=work.threads,
        progress=progress,
    )
    video_ids = np.array([video.id for video in truth.videos], dtype=np.int64)
    return Matched(truth.categories, video_ids, matches)
