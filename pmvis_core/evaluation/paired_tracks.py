"""Tracks in memory as the columns that the compiled evaluator takes.

compiled.match_tracks(columns(tracks, groups, stated_area, occlusion), groups)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pmvis_core.errors import DataError
from pmvis_core.evaluation import compiled
from pmvis_core.evaluation.matches import Ints, PairKey
from pmvis_core.evaluation.protocol import Groups
from pmvis_core.formats.ytvis_annotation import Annotation
from pmvis_core.types import RLE, VideoInfo

_NO_SIZE = (-1, -1)


class Tracks(NamedTuple):
    """Both sides of one video and category."""

    key: PairKey
    """Video id and category id."""
    video: VideoInfo
    """The video."""
    gts: tuple[Annotation, ...]
    """Ground truths, in the official order."""
    dts: tuple[Annotation, ...]
    """Predictions, by falling score."""


def columns(
    tracks: Sequence[Tracks],
    groups: Groups,
    stated_area: Callable[[Annotation], float],
    occlusion: Callable[[Annotation], float],
) -> compiled.PairedTracks | None:
    """Return tracks as columns.

    Args:
        tracks: by category id, then video id.
        groups: of the protocol.
        stated_area: returns the mean area that an annotation states, NaN if it states none.
        occlusion: returns the occlusion of an annotation, or raises `DataError`.

    Returns:
        None if the library is absent, or something is not of the type that an annotation promises;
        the evaluator in Python then says what is wrong.
    """
    if compiled.load_library()[0] is None:
        return None
    gts = [row for pair in tracks for row in pair.gts]
    dts = [row for pair in tracks for row in pair.dts]
    rles = list(chain.from_iterable(row.rles for row in chain(gts, dts)))
    hidden = occlusion if groups.by_occlusion else _not_needed
    try:
        lengths, text = _texts(rles)
        return compiled.PairedTracks(
            video_ids=_ints(pair.key[0] for pair in tracks),
            category_ids=_ints(pair.key[1] for pair in tracks),
            shapes=_ints(
                chain.from_iterable((v.height, v.width, v.length) for _, v, _, _ in tracks)
            ),
            truth_starts=_starts(len(pair.gts) for pair in tracks),
            starts=_starts(len(pair.dts) for pair in tracks),
            ids=_ints(row.id for row in chain(gts, dts)),
            scores=np.array([row.score for row in dts], dtype=np.float64),
            areas=np.array([stated_area(row) for row in gts], dtype=np.float64),
            occlusions=np.array([hidden(row) for row in gts], dtype=np.float64),
            crowd=np.array([row.iscrowd for row in gts], dtype=bool),
            mask_starts=_starts(len(row.rles) for row in chain(gts, dts)),
            sizes=_sizes(rles),
            text_starts=_starts(lengths),
            text=text,
        )
    except (DataError, AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None


def _not_needed(row: Annotation) -> float:
    """Return the occlusion where the protocol does not group by it."""
    return float("nan")


def _texts(rles: Sequence[RLE | None]) -> tuple[list[int], NDArray[np.uint8]]:
    """Return the length of each text, and all in one.

    Raises:
        UnicodeEncodeError: a text is no ASCII.
        TypeError: one is no text.
    """
    counts = [rle["counts"] if rle else "" for rle in rles]
    texts = [c.decode("latin-1") if isinstance(c, bytes) else c for c in counts]
    joined = "".join(texts).encode("ascii")
    return list(map(len, texts)), np.frombuffer(joined or b"\0", dtype=np.uint8)


def _sizes(rles: Sequence[RLE | None]) -> Ints:
    """Return (F, 2) height and width, -1 where there is no mask.

    Raises:
        ValueError: a size is not two whole numbers.
    """
    sizes = np.array([rle["size"] if rle else _NO_SIZE for rle in rles]).reshape(-1, 2)
    if len(rles) != len(sizes) or (len(rles) and sizes.dtype.kind != "i"):
        raise ValueError("sizes are no whole numbers")
    return sizes.astype(np.int64)


def _ints(values: Iterable[int]) -> Ints:
    """Return whole numbers as an array."""
    return np.array(list(values), dtype=np.int64)


def _starts(sizes: Iterable[int]) -> Ints:
    """Return where each of several blocks begins, and where the last ends."""
    return np.array([0, *accumulate(sizes)], dtype=np.int64)
