"""Predictions in any of their forms, brought to the ids of the ground truth they are for.

A results list already speaks those ids. A tracks file or a dataset carries a vocabulary and video
names of its own: ids are trusted where the names agree, names decide where they do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from pmvis_core import masks
from pmvis_core.categories import normalised
from pmvis_core.doubts import UNKNOWN_CATEGORY, Doubts
from pmvis_core.errors import DataError
from pmvis_core.formats.ytvis import (
    Dataset,
    read_dataset,
    read_results,
    shown,
    sniff,
)
from pmvis_core.formats.ytvis_annotation import Annotation
from pmvis_core.tracks_io import TracksReader
from pmvis_core.types import Category, Track, VideoInfo

_NAMES_SHOWN = 8


def read_predictions(
    path: Path, truth: Dataset, doubts: Doubts | None = None
) -> tuple[Annotation, ...]:
    """Read a tracks file, a results list or a dataset whose annotations are the predictions.

    Args:
        path: the file; gzip or ``-`` will do.
        truth: the ground truth they are for.
        doubts: where to note oddities; by default they are warned of at once.

    Returns:
        Predictions under ``truth``'s video and category ids. Categories that ``truth`` lacks are
        left out. Annotations without a score get 1; crowds and ignored tracks predict nothing.

    Raises:
        DataError: the file is malformed, or its vocabulary or videos are not those of ``truth``.
    """
    noted = Doubts() if doubts is None else doubts
    kind = sniff(path)
    if kind == "results":
        found = read_results(path, truth)
    elif kind == "dataset":
        dataset = read_dataset(path)
        rows = [row for row in dataset.annotations if not row.iscrowd]
        found = _translated(rows, dataset, truth, noted)
    else:
        reader = TracksReader(path)
        videos: list[VideoInfo] = []
        rows = []
        for video in reader:
            videos.append(video.video)
            rows += [as_prediction(track, video.video.id) for track in video.tracks]
        stated = Dataset(shown(path), reader.header.categories, tuple(videos), ())
        found = _translated(rows, stated, truth, noted)
    if doubts is None:
        noted.settle(strict=False)
    return found


def as_prediction(track: Track, video_id: int) -> Annotation:
    """Return a track as a prediction."""
    return Annotation(
        id=track.id,
        video_id=video_id,
        category_id=track.category_id,
        rles=track.rles,
        mask_areas=masks.track_areas(track.rles),
        score=track.score,
    )


def match_categories(
    categories: Sequence[Category], truth: Sequence[Category], name: str
) -> dict[int, int | None]:
    """Return for each category id the id in the ground truth, None where it has no such category.

    Ids are kept if the categories that share an id share their name, and no name stands under
    another id; otherwise the names decide, as `categories.normalised` compares them.

    Raises:
        DataError: the vocabularies have no name in common, or a name is ambiguous.
    """
    by_id = {category.id: normalised(category.name) for category in truth}
    ids: dict[str, int] = {}
    for category in truth:
        ids.setdefault(normalised(category.name), category.id)
    names = [normalised(category.name) for category in categories]
    if all(
        by_id[c.id] == own if c.id in by_id else own not in ids
        for c, own in zip(categories, names, strict=True)
    ) and any(c.id in by_id for c in categories):
        return {c.id: c.id if c.id in by_id else None for c in categories}
    if not set(names) & set(ids) and categories and truth:
        raise DataError(
            f"{name} speaks of {_listed(categories)}; the ground truth of {_listed(truth)}: no "
            "name in common",
            "evaluate with the vocabulary of the ground truth, see `pmvis map-categories`",
        )
    if len(set(by_id.values())) < len(by_id) or len(set(names)) < len(names):
        raise DataError(
            f"{name} speaks of {_listed(categories)}; the ground truth of {_listed(truth)}: ids "
            "disagree and two categories share a name",
            "give the categories the ids of the ground truth",
        )
    return {c.id: ids.get(own) for c, own in zip(categories, names, strict=True)}


def match_videos(
    videos: Sequence[VideoInfo], truth: Iterable[VideoInfo], name: str, doubts: Doubts
) -> dict[int, int]:
    """Return for each video id the id of the same video in the ground truth.

    Raises:
        DataError: a video is found neither by name nor by id and geometry.
    """
    by_id = {video.id: video for video in truth}
    named: dict[str, list[int]] = {}
    for video in by_id.values():
        named.setdefault(video.name, []).append(video.id)
    if all(v.id in by_id and by_id[v.id].name == v.name for v in videos):
        return {v.id: v.id for v in videos}
    if all(len(named.get(v.name, ())) == 1 for v in videos):
        return {v.id: named[v.name][0] for v in videos}
    unnamed = [v for v in videos if v.name not in named]
    astray = [v for v in unnamed if v.id not in by_id or _shape(by_id[v.id]) != _shape(v)]
    if astray or len(unnamed) < len(videos):
        video = (astray or unnamed or videos)[0]
        other = by_id.get(video.id)
        there = "no such video" if other is None else f"`{other.name}` {_shape(other)}"
        raise DataError(
            f"{name} holds video {video.id} `{video.name}` {_shape(video)}, the ground truth "
            f"has {there} under that id",
            "evaluate against the file whose videos were labelled",
        )
    doubts.add(
        f"the video names of {name} are not the ground truth's, so videos are matched by id",
        f"`{videos[0].name}` with `{by_id[videos[0].id].name}`",
    )
    return {v.id: v.id for v in videos}


def _translated(
    rows: Sequence[Annotation], stated: Dataset, truth: Dataset, doubts: Doubts
) -> tuple[Annotation, ...]:
    """Return predictions under the ground truth's ids, numbered from 1.

    Args:
        rows: the predictions.
        stated: the videos and categories that their file states.
        truth: the ground truth.
        doubts: takes predictions of categories that the ground truth lacks.
    """
    to_video = match_videos(stated.videos, truth.videos, stated.name, doubts)
    to_category = match_categories(stated.categories, truth.categories, stated.name)
    names = {category.id: category.name for category in stated.categories}
    kept: list[Annotation] = []
    for row in rows:
        if row.video_id not in to_video:
            raise DataError(
                f"{stated.name}: annotation {row.id} is of video {row.video_id}, which the file "
                "does not list"
            )
        category_id = to_category.get(row.category_id)
        if category_id is None:
            doubts.add(UNKNOWN_CATEGORY, f"`{names.get(row.category_id, row.category_id)}`")
            continue
        kept.append(
            replace(
                row,
                id=len(kept) + 1,
                video_id=to_video[row.video_id],
                category_id=category_id,
                score=1.0 if row.score is None else row.score,
                iscrowd=False,
            )
        )
    return tuple(kept)


def _listed(categories: Sequence[Category]) -> str:
    """Return a vocabulary for a message, the beginning of a long one."""
    told = ", ".join(f"{c.id} `{c.name}`" for c in categories[:_NAMES_SHOWN])
    more = len(categories) - _NAMES_SHOWN
    return told + (f" and {more} more" if more > 0 else "")


def _shape(video: VideoInfo) -> str:
    """Return a video's geometry for comparing and telling."""
    return f"({video.height}x{video.width}, {video.length} frames)"
