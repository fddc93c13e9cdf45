"""The evaluator of ``_eval.so`` through ctypes: from the bytes of two files to `Matches`.

What `average_precision` and `curves` do in Python, ``csrc/evaluation`` does from the files' bytes:
nothing is parsed into objects, masks are read where they stand, and results are written into the
arrays that `Matches` keeps. The bits are the same, for any number of threads. What it does not
judge (malformed input above all) it leaves to the readers and evaluators in Python: every function
here returns None then, and where the library is absent.

    found = match_files(truth, results, groups_of("ytvis"))
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pmvis_core.evaluation.matches import Ints, Matches
from pmvis_core.evaluation.oddities import Oddity
from pmvis_core.evaluation.protocol import (
    MAX_DETECTIONS,
    Flags,
    Floats,
    Groups,
    iou_thresholds,
    recall_points,
)
from pmvis_core.native import find_library

VERSION = 1
"""Of the structures and functions below; csrc/evaluation/c_abi.cpp names the same."""
_REFUSED, _NO_MEMORY = 1, 2


class Found(NamedTuple):
    """What matching found."""

    matches: Matches
    """Of all pairs."""
    doubts: list[tuple[Oddity, list[int]]]
    """What was odd, in the order in which the twin notes it; numbers as `Oddity` states them."""
    vocabulary: bytes
    """The list of categories as JSON, where a file was read."""
    video_ids: Ints
    """(V,) as the ground truth lists them, where a file was read."""


class PairedTracks(NamedTuple):
    """Tracks in memory.

    P pairs by category id, then video id; G ground truths, then N predictions by falling score,
    both in the order of their pairs; F masks in the order of their tracks.
    """

    video_ids: Ints
    """(P,)"""
    category_ids: Ints
    """(P,)"""
    shapes: Ints
    """(P, 3) height, width and length of the video."""
    truth_starts: Ints
    """(P + 1,) where the ground truths of each pair begin."""
    starts: Ints
    """(P + 1,) where the predictions of each pair begin."""
    ids: Ints
    """(G + N,)"""
    scores: Floats
    """(N,)"""
    areas: Floats
    """(G,) mean stated area in pixels, NaN where none is stated."""
    occlusions: Floats
    """(G,) from 0 to 1, NaN if the protocol needs none."""
    crowd: Flags
    """(G,)"""
    mask_starts: Ints
    """(G + N + 1,) where the masks of each track begin."""
    sizes: Ints
    """(F, 2) height and width in pixels, -1 where there is no mask."""
    text_starts: Ints
    """(F + 1,) where the text of each mask begins."""
    text: NDArray[np.uint8]
    """The texts one after the other."""


_COLUMNS = (
    "video_ids category_ids comparable starts scores rows matches ignored truth_starts truth_ids "
    "truth_ignored iou_starts ious"
).split()
_MATCHED = "starts scores matches ignored truth_starts truth_ignored".split()


class _Sizes(ctypes.Structure):
    """How large a problem is, and where its vocabulary lies."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("pairs", "predictions", "truths", "ious")),
        *((name, ctypes.c_int64) for name in ("doubts", "videos")),
        ("vocabulary", ctypes.c_void_p),
        ("vocabulary_length", ctypes.c_int64),
    )


def _structure(name: str, *fields: tuple[str, Any] | str) -> type[ctypes.Structure]:
    """Return a structure as the C++ side declares it; a field without a type is a pointer."""
    typed = [(field, ctypes.c_void_p) if isinstance(field, str) else field for field in fields]
    return type(name, (ctypes.Structure,), {"_fields_": typed})


_Protocol = _structure(
    "_Protocol",
    "thresholds",
    ("threshold_number", ctypes.c_int64),
    "areas",
    ("area_number", ctypes.c_int64),
    "occlusions",
    ("occlusion_number", ctypes.c_int64),
    ("most", ctypes.c_int64),
    ("shard", ctypes.c_int64),
    ("shards", ctypes.c_int64),
    ("equal_lengths", ctypes.c_bool),
    ("exact", ctypes.c_bool),
)
_Tracks = _structure("_Tracks", ("pairs", ctypes.c_int64), *PairedTracks._fields)
_Columns = _structure("_Columns", *_COLUMNS)
_Matched = _structure(
    "_Matched",
    *((name, ctypes.c_int64) for name in "categories groups thresholds".split()),
    "pairs",
    *_MATCHED,
    "weights",
)
_Axes = _structure(
    "_Axes", "points", ("point_number", ctypes.c_int64), "limits", ("limit_number", ctypes.c_int64)
)
_Curves = _structure("_Curves", "precision", "recall", "scores")

_P, _N, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_FUNCTIONS: dict[str, list[Any]] = {
    "read": [_P, _N, _P, _N, _P, _I, _P],
    "take": [_P, _P, _I, _P],
    "sizes": [_P, _P],
    "match": [_P, _I, _P, _P],
    "doubts": [_P, _P],
    "videos": [_P, _P],
    "free": [_P],
    "curves": [_P, _P, _I, _P],
}


def match_files(
    truth: NDArray[np.uint8],
    results: NDArray[np.uint8],
    groups: Groups,
    *,
    shard: tuple[int, int] = (1, 1),
    exact: bool = False,
    threads: int = 0,
) -> Found | None:
    """Match the bytes of two files.

    Args:
        truth: ground truth in the dataset form.
        results: a results list.
        groups: of the protocol.
        shard: which videos, ``(i, n)``: every n-th by ascending id, from the i-th on.
        exact: compute IoUs below 0.5, too, which match nothing; else they are 0.
        threads: how many; 0 for one a processor.

    Returns:
        None if the library is absent or the input is for Python's readers to judge.
    """
    library = load_library()[0]
    if library is None:
        return None
    texts = (truth.ctypes.data, truth.size, results.ctypes.data, results.size)
    asked = _Asked(groups, shard, exact, _threads(threads))
    return _solve(library, library.pmvis_eval_read, texts, asked)


def match_tracks(
    tracks: PairedTracks, groups: Groups, *, exact: bool = True, threads: int = 0
) -> Found | None:
    """Match tracks that are in memory; arguments and result as of `match_files`."""
    library = load_library()[0]
    if library is None:
        return None
    columns = _Tracks(len(tracks.video_ids), *(_address(column) for column in tracks))
    given = (ctypes.byref(columns),)
    asked = _Asked(groups, (1, 1), exact, _threads(threads))
    return _solve(library, library.pmvis_eval_take, given, asked)


def curves(
    matches: Matches, category_ids: Sequence[int], weights: Ints | None, threads: int = 0
) -> tuple[Floats, Floats, Floats] | None:
    """Return precision (T, R, K, S, M), recall (T, K, S, M) and scores (T, R, K, S, M).

    Args:
        matches: of all videos.
        category_ids: (K,) ascending.
        weights: (P,) how often each pair counts; by default once.
        threads: how many; 0 for one a processor.

    Returns:
        None if the library is absent.
    """
    library = load_library()[0]
    if library is None:
        return None
    thresholds, points = len(iou_thresholds()), recall_points()
    limits = np.array(MAX_DETECTIONS, dtype=np.int64)
    shape = (len(category_ids), matches.groups.number, len(limits))
    bounds = [matches.category_ids.searchsorted(category_ids, side=s) for s in ("left", "right")]
    columns = [
        np.stack(bounds, axis=1).astype(np.int64),
        *(np.ascontiguousarray(getattr(matches, name)) for name in _MATCHED),
        None if weights is None else np.ascontiguousarray(weights, dtype=np.int64),
    ]
    matched = _Matched(shape[0], shape[1], thresholds, *map(_address, columns))
    axes = _Axes(_address(points), len(points), _address(limits), len(limits))
    # One block is large enough for the system's large pages.
    precision, scores = np.empty((2, thresholds, len(points), *shape))
    out = (precision, np.empty((thresholds, *shape)), scores)
    code = library.pmvis_eval_curves(
        ctypes.byref(matched),
        ctypes.byref(axes),
        _threads(threads),
        ctypes.byref(_Curves(*map(_address, out))),
    )
    _accepted(code)
    return out


@functools.cache
def load_library() -> tuple[ctypes.CDLL | None, str]:
    """Load ``_eval.so`` once; return it, or None, and where it lies or why not."""
    path, reason = find_library("_eval.so")
    if path is None:
        return None, reason
    try:
        library = ctypes.CDLL(str(path))
        # One that was built before it told its version is of another, too.
        version = getattr(library, "pmvis_eval_version", lambda: -1)()
        if version != VERSION:
            return None, f"`{path}` is of another version: install pmvis again"
        for name, arguments in _FUNCTIONS.items():
            function = getattr(library, f"pmvis_eval_{name}")
            function.argtypes, function.restype = arguments, ctypes.c_int64
    except (OSError, AttributeError) as error:
        return None, f"`{path}` does not load: {error}"
    return library, reason


class _Asked(NamedTuple):
    """How to match; see `match_files`."""

    groups: Groups
    shard: tuple[int, int]
    exact: bool
    threads: int


def _solve(
    library: ctypes.CDLL, begin: Callable[..., int], given: tuple[Any, ...], asked: _Asked
) -> Found | None:
    """Match what is given, the first arguments of a function that reads or takes tracks."""
    groups, threads = asked.groups, asked.threads
    thresholds = iou_thresholds()
    areas, occlusions = (
        np.array([(r.low, r.high) for r in ranges]) for ranges in (groups.areas, groups.occlusions)
    )
    protocol = _Protocol(
        _address(thresholds),
        len(thresholds),
        _address(areas),
        len(areas),
        _address(occlusions),
        len(occlusions),
        MAX_DETECTIONS[-1],
        *asked.shard,
        groups.by_occlusion,
        asked.exact,
    )
    problem = ctypes.c_void_p()
    done = begin(*given, ctypes.byref(protocol), threads, ctypes.byref(problem))
    if not _accepted(done):
        return None
    try:
        sizes = _sizes(library, problem)
        matches = _room(sizes, groups)
        columns = _Columns(*(_address(getattr(matches, name)) for name in _COLUMNS))
        done = library.pmvis_eval_match(
            ctypes.byref(protocol), threads, problem, ctypes.byref(columns)
        )
        if not _accepted(done):
            return None
        vocabulary = ctypes.string_at(sizes.vocabulary, sizes.vocabulary_length)
        video_ids = np.empty(sizes.videos, dtype=np.int64)
        library.pmvis_eval_videos(problem, video_ids.ctypes.data)
        return Found(matches, _doubts(library, problem), vocabulary, video_ids)
    finally:
        library.pmvis_eval_free(problem)


def _sizes(library: ctypes.CDLL, problem: ctypes.c_void_p) -> _Sizes:
    """Return how large a problem is."""
    sizes = _Sizes()
    library.pmvis_eval_sizes(problem, ctypes.byref(sizes))
    return sizes


def _room(sizes: _Sizes, groups: Groups) -> Matches:
    """Return columns of the right sizes."""
    pairs, number, truths = sizes.pairs, sizes.predictions, sizes.truths
    by_group = (number, groups.number, len(iou_thresholds()))
    return Matches(
        groups=groups,
        video_ids=np.empty(pairs, dtype=np.int64),
        category_ids=np.empty(pairs, dtype=np.int64),
        comparable=np.empty(pairs, dtype=bool),
        starts=np.empty(pairs + 1, dtype=np.int64),
        scores=np.empty(number),
        rows=np.empty(number, dtype=np.int64),
        matches=np.zeros(by_group, dtype=np.int64),
        ignored=np.zeros(by_group, dtype=bool),
        truth_starts=np.empty(pairs + 1, dtype=np.int64),
        truth_ids=np.empty(truths, dtype=np.int64),
        truth_ignored=np.empty((truths, groups.number), dtype=bool),
        iou_starts=np.empty(pairs + 1, dtype=np.int64),
        ious=np.zeros(sizes.ious),
    )


def _doubts(library: ctypes.CDLL, problem: ctypes.c_void_p) -> list[tuple[Oddity, list[int]]]:
    """Return what was odd."""
    rows = np.empty((_sizes(library, problem).doubts, 6), dtype=np.int64)
    library.pmvis_eval_doubts(problem, rows.ctypes.data)
    return [(Oddity(kind), numbers) for kind, *numbers in rows.tolist()]


def _threads(threads: int) -> int:
    """Return how many threads are meant."""
    if threads or not hasattr(os, "sched_getaffinity"):
        return threads or os.cpu_count() or 1
    return len(os.sched_getaffinity(0))


def _address(array: NDArray[Any] | None) -> int | None:
    """Return where an array lies."""
    return None if array is None else array.ctypes.data


def _accepted(code: int) -> bool:
    """Tell whether the library did what it was asked for.

    Raises:
        MemoryError: it ran out of memory.
    """
    if code == _NO_MEMORY:
        raise MemoryError("the compiled evaluator ran out of memory")
    return code != _REFUSED
