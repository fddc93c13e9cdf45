"""Parts of one evaluation in files: a cluster's jobs each match some videos, one job adds them up.

Each job reads the same two files and matches the videos of its shard. What it writes are the
columns of `Matches`, so that the merged numbers are, bit for bit, those of one process.

    mine = videos_of_shard((video.id for video in truth.videos), 3, 8)
    save_part(Path("run.3.part"), part)                                  # in each job
    whole = merge([load_part(path) for path in paths])                   # once
    accumulate(whole.categories, whole.matches)

A file is safetensors: arrays only, and one JSON header, under ``pmvis_evaluation``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_bytes

from pmvis_core.errors import DataError, UsageError
from pmvis_core.evaluation.matches import Ints, Matches
from pmvis_core.evaluation.protocol import PROTOCOLS, groups_of, iou_thresholds
from pmvis_core.files import atomic_write, canonical_json
from pmvis_core.types import Category

Kinds = Mapping[str, Collection[str]]
"""Kinds of doubts with their examples, as `formats.predictions.Doubts` collects them."""

_KEY = "pmvis_evaluation"
_VERSION = 1
_VIDEOS = "videos"
_COLUMNS = tuple(column.name for column in fields(Matches) if column.name != "groups")
_SAME = (
    ("protocol", "protocol"),
    ("truth", "ground truth"),
    ("predictions", "predictions"),
    ("categories", "categories"),
)


@dataclass(frozen=True)
class Part:
    """What one job found in its videos; shard 1 of 1 is a whole evaluation."""

    protocol: str
    """``ytvis`` or ``ovis``."""
    truth: str
    """Digest of the ground truth's bytes (`files.digest_file`)."""
    predictions: str
    """Digest of the predictions' bytes."""
    shard: tuple[int, int]
    """Which part of how many, from 1."""
    categories: tuple[Category, ...]
    """The vocabulary."""
    videos: Ints
    """(V,) ids of the videos that were worked on, ascending, also those without any track."""
    matches: Matches
    """Of these videos."""
    doubts: Kinds = field(default_factory=dict)
    """What was odd about the input."""
    name: str = ""
    """How messages call it."""


def videos_of_shard(video_ids: Iterable[int], index: int, count: int) -> Ints:
    """Return (V,) the videos of a shard, ascending: every ``count``-th id.

    Args:
        video_ids: all of the ground truth, in any order; one that is listed twice counts once.
        index: which shard, from 1.
        count: of how many.

    Raises:
        UsageError: there is no such shard.
    """
    if not 1 <= index <= count:
        raise UsageError(f"shard {index}/{count} cannot be, expected `i/n` with 1 <= i <= n")
    return np.array(sorted(set(video_ids))[index - 1 :: count], dtype=np.int64)


def save_part(path: Path, part: Part) -> None:
    """Write a part; the file appears when it is complete, and the same part gives the same bytes.

    Raises:
        ResourceError: the place cannot be written.
    """
    columns = {name: np.ascontiguousarray(getattr(part.matches, name)) for name in _COLUMNS}
    header = {
        "version": _VERSION,
        "protocol": part.protocol,
        "truth": part.truth,
        "predictions": part.predictions,
        "shard": list(part.shard),
        "categories": [[category.id, category.name] for category in part.categories],
        "doubts": [[kind, list(dict.fromkeys(told))] for kind, told in part.doubts.items()],
    }
    data = save_bytes({**columns, _VIDEOS: part.videos}, {_KEY: canonical_json(header)})
    with atomic_write(path, "wb") as stream:
        stream.write(data)


def load_part(path: Path) -> Part:
    """Read a part.

    Raises:
        DataError: the file is missing, cut off, something else, or of another version of pmvis.
    """
    name = f"partial evaluation `{path}`"
    if not path.is_file():
        raise DataError(f"{name} does not exist", "check the path, or run its shard first")
    try:
        with safe_open(path, "numpy") as stream:
            arrays = {key: stream.get_tensor(key) for key in stream.keys()}
            text = (stream.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError) as error:
        raise _malformed(name, f"not a safetensors file ({error})") from error
    if text is None:
        raise _malformed(name, "safetensors of something else")
    header = _header(text, name)
    matches = _matches(arrays, header["protocol"], name)
    videos = arrays[_VIDEOS]
    if not np.isin(matches.video_ids, videos).all():
        raise _malformed(name, "its matches are of videos that it does not list")
    return Part(
        protocol=header["protocol"],
        truth=header["truth"],
        predictions=header["predictions"],
        shard=(header["shard"][0], header["shard"][1]),
        categories=tuple(Category(number, called) for number, called in header["categories"]),
        videos=videos,
        matches=matches,
        doubts={kind: tuple(told) for kind, told in header["doubts"]},
        name=name,
    )


def merge(parts: Sequence[Part]) -> Part:
    """Put all shards of one run together.

    Args:
        parts: every shard once, in any order.

    Returns:
        The whole, shard 1 of 1, with the doubts of all parts.

    Raises:
        DataError: shards are missing or there twice, or they are not of one run.
    """
    if not parts:
        raise DataError("there is no partial evaluation to merge", "name the files of all shards")
    ordered = sorted(parts, key=lambda part: part.shard)
    _check_one_run(ordered)
    matches = Matches.joined([part.matches for part in ordered])
    told: dict[str, dict[str, None]] = {}
    for part in ordered:
        for kind, examples in part.doubts.items():
            told.setdefault(kind, {}).update(dict.fromkeys(examples))
    doubts: dict[str, tuple[str, ...]] = {kind: tuple(examples) for kind, examples in told.items()}
    first = ordered[0]
    return Part(
        protocol=first.protocol,
        truth=first.truth,
        predictions=first.predictions,
        shard=(1, 1),
        categories=first.categories,
        videos=np.sort(np.concatenate([part.videos for part in ordered])),
        matches=matches,
        doubts=doubts,
    )


def _check_one_run(parts: Sequence[Part]) -> None:
    """Check that sorted parts are the shards of one run, each once.

    Raises:
        DataError: see `merge`.
    """
    first, count = parts[0], parts[0].shard[1]
    for part in parts[1:]:
        for name, what in _SAME:
            if getattr(part, name) != getattr(first, name):
                raise DataError(
                    f"{_called(part)} was made with another {what} than {_called(first)}",
                    "merge the shards of one run only",
                )
    if any(part.shard[1] != count for part in parts):
        others = sorted({part.shard[1] for part in parts})
        raise DataError(
            f"the parts are of runs in {' and '.join(map(str, others))} shards, expected one run",
            "merge the shards of one run only",
        )
    numbers = [part.shard[0] for part in parts]
    for one, other in pairwise(parts):
        if one.shard == other.shard:
            raise DataError(
                f"{_called(one)} and {_called(other)} are both shard {one.shard[0]}/{count}",
                "name each shard once",
            )
    missing = [f"{i}/{count}" for i in range(1, count + 1) if i not in set(numbers)]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(
            f"shard {', '.join(missing[:5])}{more} is missing: {len(numbers)} of {count} parts "
            "are given",
            f"run `--shard {missing[0]}`, or name its file",
        )
    ids, times = np.unique(np.concatenate([part.videos for part in parts]), return_counts=True)
    if (times > 1).any():
        raise DataError(
            f"video {ids[times > 1][0]} is in more than one part, expected disjoint shards",
            "make the parts again with one version of pmvis",
        )


def _called(part: Part) -> str:
    """Return how a message calls a part."""
    return part.name or f"shard {part.shard[0]}/{part.shard[1]}"


def _malformed(name: str, reason: str) -> DataError:
    """Return the error for a file that is no part."""
    return DataError(
        f"{name} is no partial evaluation: {reason}",
        "make it with `pmvis eval --shard i/n -o FILE`",
    )


def _header(text: str, name: str) -> dict[str, Any]:
    """Return the JSON header, checked.

    Raises:
        DataError: it is malformed or of another version.
    """
    try:
        header = json.loads(text)
        version = header["version"]
        index, count = header["shard"]
        fits = (
            all(isinstance(header[key], str) for key in ("truth", "predictions"))
            and header["protocol"] in PROTOCOLS
            and all(type(value) is int for value in (index, count))
            and 1 <= index <= count
            and all(type(n) is int and isinstance(told, str) for n, told in header["categories"])
            and all(
                isinstance(kind, str) and all(isinstance(one, str) for one in told)
                for kind, told in header["doubts"]
            )
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _malformed(name, "its header is damaged") from error
    if version != _VERSION:
        raise DataError(
            f"{name} is of version {version}, this pmvis reads {_VERSION}",
            "run and merge the shards with one version of pmvis",
        )
    if not fits:
        raise _malformed(name, "its header is damaged")
    return dict(header)


def _matches(arrays: Mapping[str, NDArray[Any]], protocol: str, name: str) -> Matches:
    """Return the columns, checked, so that nothing later reads beyond one.

    Raises:
        DataError: one is missing, or has another type or shape than its neighbours imply.
    """
    for key in (*_COLUMNS, _VIDEOS):
        if key not in arrays or arrays[key].ndim == 0:
            raise _malformed(name, f"it lacks `{key}`")
    groups = groups_of(protocol)
    pairs, number, truths = (len(arrays[key]) for key in ("video_ids", "scores", "truth_ids"))
    by_group = (number, groups.number, len(iou_thresholds()))
    expected: dict[str, tuple[type, tuple[int, ...]]] = {
        "video_ids": (np.int64, (pairs,)),
        "category_ids": (np.int64, (pairs,)),
        "comparable": (np.bool_, (pairs,)),
        "starts": (np.int64, (pairs + 1,)),
        "scores": (np.float64, (number,)),
        "rows": (np.int64, (number,)),
        "matches": (np.int64, by_group),
        "ignored": (np.bool_, by_group),
        "truth_starts": (np.int64, (pairs + 1,)),
        "truth_ids": (np.int64, (truths,)),
        "truth_ignored": (np.bool_, (truths, groups.number)),
        "iou_starts": (np.int64, (pairs + 1,)),
        "ious": (np.float64, (len(arrays["ious"]),)),
        _VIDEOS: (np.int64, (len(arrays[_VIDEOS]),)),
    }
    for key, (kind, shape) in expected.items():
        if arrays[key].dtype != kind or arrays[key].shape != shape:
            raise _malformed(
                name, f"`{key}` is {arrays[key].dtype} {arrays[key].shape}, expected {shape}"
            )
    sizes = np.diff(arrays["starts"]), np.diff(arrays["truth_starts"])
    for key, steps, total in (
        ("starts", sizes[0], number),
        ("truth_starts", sizes[1], truths),
        ("iou_starts", sizes[0] * sizes[1], len(arrays["ious"])),
    ):
        starts = arrays[key]
        fits = starts[0] == 0 and starts[-1] == total
        if not fits or (steps < 0).any() or (np.diff(starts) != steps).any():
            raise _malformed(name, f"`{key}` does not fit its column")
    return Matches(groups=groups, **{key: arrays[key] for key in _COLUMNS})
