"""Self-training: which videos are held out, how consistent a round's labels are, which round wins.

PM-VIS+ labels the unlabelled videos once. Here each new model labels them again, until nothing is
gained. Without ground truth a round is judged on videos that no round trains on:

*own* is the mean track IoU of the model's filtered tracks there before and after `refine`, which
carries each one's best mask to both ends of the video: a model that sees the same in every frame
scores high. *kept on* compares the model's tracks with the filtered tracks of the model before it:
pairs of one category, greedily by track IoU, twice the sum of their IoUs over the number of tracks
of both. A round's *consistency* is the mean of the two.

The weakness: both measure agreement, not truth. A mistake that is made alike in every frame and by
both models counts as consistent, and *kept on* rises by itself as rounds change less and less. It
detects that labels have begun to drift or to vanish; it does not tell a good model from a stubborn
one. Where a few annotated videos exist, AP on them (``--gt``) is the better judge.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pmvis_core import masks
from pmvis_core.files import part_path
from pmvis_core.formats.ytvis import open_tracks
from pmvis_core.tracks_io import TracksWriter
from pmvis_core.types import Track, VideoTracks

RUN_FILES = ("config.toml", "run.json", "metrics.jsonl")
"""What the final model takes along from its run folder."""
MODEL_FILE = "model.safetensors"


@dataclass(frozen=True)
class Consistency:
    """How a round's labels of the held-out videos agree, each in [0, 1]."""

    own: float
    """Mean track IoU of a track before and after `refine`."""
    kept_on: float
    """Agreement with the tracks of the model before."""

    @property
    def mean(self) -> float:
        """Return what rounds are compared by."""
        return (self.own + self.kept_on) / 2


def held_out(ids: Iterable[int], share: float) -> frozenset[int]:
    """Return the videos that no round trains on: those whose id has the smallest digest.

    Args:
        ids: of all videos.
        share: in [0, 1); rounded up to whole videos, but one is always left to learn from.
    """
    order = sorted(set(ids), key=lambda number: hashlib.sha256(str(number).encode()).digest())
    return frozenset(order[: max(0, min(math.ceil(share * len(order)), len(order) - 1))])


def write_part(source: Path, target: Path, held: Collection[int]) -> int:
    """Copy the videos that are not held out; return the number of their tracks."""
    reader, count = open_tracks(source), 0
    with TracksWriter(target, reader.header) as out:
        for video in reader:
            if video.video.id not in held:
                out.write(video)
                count += len(video.tracks)
    return count


def consistency(raw: Path, kept: Path, before: Path, held: Collection[int]) -> Consistency:
    """Judge a round by its labels of the held-out videos.

    Args:
        raw: tracks of the round's model.
        kept: the same refined and filtered; ids are those of ``raw``.
        before: refined and filtered tracks of the model before.
        held: ids of the videos to look at.
    """
    mended, earlier = (_videos(path, held) for path in (kept, before))
    seen = {
        number: _those_of(video, mended[number]) for number, video in _videos(raw, held).items()
    }
    pairs = [
        masks.track_iou(first.rles, second.rles)
        for number, tracks in seen.items()
        for first, second in zip(tracks, _by_id(mended[number].tracks), strict=True)
    ]
    return Consistency(
        own=sum(pairs) / len(pairs) if pairs else 0.0,
        kept_on=agreement([(tracks, earlier[number].tracks) for number, tracks in seen.items()]),
    )


def agreement(pairs: Iterable[tuple[Sequence[Track], Sequence[Track]]]) -> float:
    """Return how far two labellings of videos agree, in [0, 1]; 0 if neither holds a track.

    Args:
        pairs: the tracks of one video by each.
    """
    shared, count = 0.0, 0
    for first, second in pairs:
        count += len(first) + len(second)
        if not first or not second:
            continue
        ious = masks.track_ious([t.rles for t in first], [t.rles for t in second])
        same = [[a.category_id == b.category_id for b in second] for a in first]
        ious = np.where(same, ious, 0.0)
        while ious.size and (best := float(ious.max())) > 0.0:
            row, column = np.unravel_index(int(ious.argmax()), ious.shape)
            shared += best
            ious = np.delete(np.delete(ious, row, 0), column, 1)
    return 2 * shared / count if count else 0.0


def best_round(values: Sequence[float]) -> int:
    """Return the number, from 1, of the round with the highest value; of equals the first."""
    return 1 + max(range(len(values)), key=lambda i: (values[i], -i))


def should_stop(values: Sequence[float]) -> bool:
    """Tell whether the last of some rounds' values is no better than the best before it."""
    return len(values) > 1 and values[-1] <= max(values[:-1])


def adopt(run: Path, folder: Path) -> None:
    """Copy a finished run into ``folder``, which so becomes a run folder; the model comes last."""
    for name in (*RUN_FILES, MODEL_FILE):
        if (run / name).exists():
            part = part_path(folder / name)
            shutil.copyfile(run / name, part)
            part.replace(folder / name)


def _videos(path: Path, held: Collection[int]) -> Mapping[int, VideoTracks]:
    """Return the held-out videos of a file by id."""
    return {video.video.id: video for video in open_tracks(path) if video.video.id in held}


def _by_id(tracks: Iterable[Track]) -> list[Track]:
    """Return tracks in the order of their ids."""
    return sorted(tracks, key=lambda track: track.id)


def _those_of(video: VideoTracks, kept: VideoTracks) -> list[Track]:
    """Return the tracks, in the order of ids, that are in ``kept`` as well."""
    ids = {track.id for track in kept.tracks}
    return _by_id(track for track in video.tracks if track.id in ids)
