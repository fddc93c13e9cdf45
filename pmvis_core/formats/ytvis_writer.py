"""Tracks as YouTube-VIS JSON: pseudo labels that other code bases train on, or a submission.

The dataset form keeps everything: what YouTube-VIS has no key for stands under ``pmvis`` in `info`
and in the annotations, so tracks -> dataset -> tracks gives the same tracks. The results form holds
what the challenge servers read, and no more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pmvis_core import masks
from pmvis_core.formats.ytvis import TrackSource
from pmvis_core.formats.ytvis_annotation import BLOCK, boxes_xywh
from pmvis_core.types import Supervision, Track, VideoInfo, VideoTracks


def as_dataset(source: TrackSource) -> dict[str, Any]:
    """Return tracks in the dataset form: xywh boxes, areas and RLE a frame, null where absent.

    Ignored tracks become crowds, which VIS code leaves out of training. Annotation ids are the
    track ids if these are positive and unique over all videos, else 1, 2, ... in order.
    """
    videos = list(source)
    rows = [
        (video.video, track, crowd)
        for video in videos
        for crowd, group in ((False, video.tracks), (True, video.ignored))
        for track in group
    ]
    ids = [track.id for _, track, _ in rows]
    if len(set(ids)) != len(ids) or min(ids, default=1) < 1:
        ids = list(range(1, len(rows) + 1))
    lineage = [dict(entry) for entry in source.header.lineage]
    return {
        "info": {BLOCK: {"lineage": lineage}} if lineage else {},
        "licenses": [],
        "videos": [_video(video.video) for video in videos],
        "categories": [
            {"id": c.id, "name": c.name, "supercategory": "object"}
            for c in source.header.categories
        ],
        "annotations": [_annotation(*row, number) for row, number in zip(rows, ids, strict=True)],
    }


def as_results(videos: Iterable[VideoTracks]) -> list[dict[str, Any]]:
    """Return tracks in the results form, ready for the challenge servers."""
    return [
        {
            "video_id": video.video.id,
            "category_id": track.category_id,
            "score": track.score,
            "segmentations": list(track.rles),
        }
        for video in videos
        for track in video.tracks
    ]


def _video(info: VideoInfo) -> dict[str, Any]:
    """Return one of the ``videos``; ``name`` is ours, readers of the format ignore it."""
    return {
        "id": info.id,
        "name": info.name,
        "height": info.height,
        "width": info.width,
        "length": info.length,
        "file_names": list(info.file_names),
    }


def _annotation(video: VideoInfo, track: Track, crowd: bool, number: int) -> dict[str, Any]:
    """Return one of the ``annotations``."""
    row: dict[str, Any] = {
        "id": number,
        "video_id": video.id,
        "category_id": track.category_id,
        "iscrowd": int(crowd),
        "height": video.height,
        "width": video.width,
        "length": video.length,
        "segmentations": list(track.rles),
        "bboxes": boxes_xywh(track.rles),
        "areas": list(masks.track_areas(track.rles)),
    }
    if not _is_human(track):
        row["score"] = track.score
    if _is_untouched(track):
        row |= track.lineage["ytvis"]
    if block := _block(track, number):
        row[BLOCK] = block
    return row


def _is_human(track: Track) -> bool:
    """Tell whether a track is an annotation without a score."""
    return track.supervision is not Supervision.PSEUDO and track.score == 1.0


def _is_untouched(track: Track) -> bool:
    """Tell whether a track comes from a dataset and no stage changed it since."""
    return set(track.lineage) == {"ytvis"}


def _block(track: Track, number: int) -> dict[str, Any]:
    """Return what YouTube-VIS has no key for and a reader could not infer."""
    usual = tuple(track.score if area else None for area in masks.track_areas(track.rles))
    implied = Supervision.MASK if _is_human(track) else Supervision.PSEUDO
    facts: tuple[tuple[str, Any, bool], ...] = (
        ("track_id", track.id, track.id != number),
        ("frame_scores", list(track.frame_scores), track.frame_scores != usual),
        ("instance", track.instance, track.instance is not None),
        ("keyframe", track.keyframe, track.keyframe is not None),
        ("quality", track.quality, track.quality is not None),
        ("supervision", track.supervision.value, track.supervision is not implied),
        ("lineage", dict(track.lineage), bool(track.lineage) and not _is_untouched(track)),
    )
    return {key: value for key, value, needed in facts if needed}
