"""Self-training: which videos are held out, how consistent a round's labels are, which round wins.

PM-VIS+ labels the unlabelled videos once. Here each new model labels them again, until nothing is
gained. Without ground truth a round is judged on videos that no round trains on, the image model
(round 0) like every other.

A round's *consistency* is the mean quality of its labels there: how far the model's own masks agree
with those that `refine` propagates from the track's best frame, both ways in time (`mending.
Mended.quality`). A model that sees the same object in every frame scores high. Every round is asked
for as many labels as round 0 kept, its best by score, and one that is missing counts 0: so neither
a model that keeps a few easy objects gains, nor one whose scores have risen. *Kept on*, how far the
labels are those of the model before, is told beside it and decides nothing: it rises by itself as
rounds change less and less. Rounds go on while each gains more than the *noise*, the standard error
of its gain over the best before, by videos; then the highest consistency wins.

The weakness: this is agreement, not truth. A mistake that is made alike in every frame counts as
consistent, and so does a wrong class, for masks alone are compared. It detects that labels have
begun to drift or to vanish; it does not tell a good model from a stubborn one. Where a few
annotated videos exist, AP on them (``--gt``) is the better judge.
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
from pmvis_core.filter import FilterRule, filter_tracks
from pmvis_core.formats.ytvis import open_tracks
from pmvis_core.tracks_io import TracksWriter
from pmvis_core.types import Track, VideoTracks

RUN_FILES = ("config.toml", "run.json", "metrics.jsonl")
"""What the final model takes along from its run folder."""
MODEL_FILE = "model.safetensors"


@dataclass(frozen=True)
class Judge:
    """What all rounds are judged by."""

    held: frozenset[int]
    """Ids of the videos that no round trains on."""
    rule: FilterRule
    """K and overlap, by which a video's labels are chosen."""
    labels: int
    """How many labels of the held-out videos count: as many as round 0 keeps there."""

    @classmethod
    def of(cls, kept: Path, share: float, rule: FilterRule) -> Judge:
        """Hold videos out.

        Args:
            kept: filtered tracks of round 0.
            share: of the videos, see `held_out`.
            rule: see `rule`.
        """
        counts = {video.video.id: len(video.tracks) for video in open_tracks(kept)}
        held = held_out(counts, share)
        return cls(held, rule, sum(counts[number] for number in held))

    def consistency(self, refined: Path) -> float:
        """Return the mean quality of a model's best labels of the held-out videos, in [0, 1].

        Args:
            refined: the model's tracks behind `refine`, which measured their quality. Those that
                the rule keeps are taken by their score, `labels` of them over all videos; ones
                that are missing count 0.
        """
        return sum(self._shares(refined).values())

    def noise(self, before: Path, refined: Path) -> float:
        """Return the standard error of the difference of two models' consistency.

        What other held-out videos would have changed: from the differences video by video.

        Args:
            before: refined tracks of one model.
            refined: the same of the other.
        """
        first, second = self._shares(before), self._shares(refined)
        differences = [second[number] - share for number, share in first.items()]
        count = len(differences)
        return math.sqrt(count * float(np.var(differences, ddof=1))) if count > 1 else 0.0

    def _shares(self, refined: Path) -> dict[int, float]:
        """Return what each held-out video adds to the consistency."""
        found: list[tuple[float, float, int]] = []
        for number, video in _videos(refined, self.held).items():
            kept = filter_tracks(video, self.rule).kept.tracks
            found += [(track.score, track.quality or 0.0, number) for track in kept]
        shares = dict.fromkeys(self.held, 0.0)
        for _, quality, number in sorted(found, reverse=True)[: self.labels]:
            shares[number] += quality / self.labels
        return shares

    def agreement(self, before: Path, kept: Path) -> float:
        """Return how far the labels of the held-out videos, or of all if there are none, are kept.

        Args:
            before: filtered tracks of one model.
            kept: the same of the next.
        """
        first, second = (_videos(path, self.held) for path in (before, kept))
        return agreement((first[n].tracks, video.tracks) for n, video in second.items())


def held_out(ids: Iterable[int], share: float) -> frozenset[int]:
    """Return the videos that no round trains on: those whose id has the smallest digest.

    Args:
        ids: of all videos.
        share: in [0, 1); rounded up to whole videos, but one is always left to learn from.
    """
    order = sorted(set(ids), key=lambda number: hashlib.sha256(str(number).encode()).digest())
    return frozenset(order[: max(0, min(math.ceil(share * len(order)), len(order) - 1))])


def write_part(source: Path, target: Path, held: Collection[int]) -> None:
    """Copy the videos that are not held out."""
    reader = open_tracks(source)
    with TracksWriter(target, reader.header) as out:
        for video in reader:
            if video.video.id not in held:
                out.write(video)


def count_tracks(path: Path) -> int:
    """Return the number of tracks in a file."""
    return sum(len(video.tracks) for video in open_tracks(path))


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
    """Return the number, from 0, of the round with the highest value; of equals the first."""
    return max(range(len(values)), key=lambda i: (values[i], -i))


def should_stop(gains: Sequence[tuple[float, float]], patience: int = 1) -> bool:
    """Tell whether the last so many rounds brought nothing that stands out of the noise.

    Args:
        gains: of the rounds from 1 on, each over the best round before it, and its standard error.
        patience: how many rounds may bring nothing before it is enough.
    """
    last = gains[-patience:]
    return len(last) == patience and all(gain <= noise for gain, noise in last)


def adopt(run: Path, folder: Path) -> None:
    """Copy a finished run into ``folder``, which so becomes a run folder; the model comes last."""
    for name in (*RUN_FILES, MODEL_FILE):
        if (run / name).exists():
            part = part_path(folder / name)
            shutil.copyfile(run / name, part)
            part.replace(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def _videos(path: Path, held: Collection[int]) -> Mapping[int, VideoTracks]:
    """Return the held-out videos of a file by id; all, where none is held out."""
    chosen = (video for video in open_tracks(path) if not held or video.video.id in held)
    return {video.video.id: video for video in chosen}
