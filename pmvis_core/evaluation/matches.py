"""What remains of an evaluation once tracks are matched: columns over pairs of video and category.

Everything after the matching reads these columns only. A part of the videos is a selection of
them, shards of a cluster are their concatenation, and both give the bits of one whole run.

    matches.of_videos({3, 7}); Matches.joined([first, second])
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pmvis_core.evaluation.protocol import Flags, Floats, Groups, iou_thresholds

Ints = NDArray[np.int64]
PairKey = tuple[int, int]
"""Video id and category id."""


class Pair(NamedTuple):
    """What happened in one video under one category."""

    video_id: int
    category_id: int
    ious: Floats
    """(D, G) track IoUs; rows by falling score, columns in the ground truth's order."""
    scores: Floats
    """(D,) falling."""
    rows: Ints
    """(D,) ids of the predictions: places in their file, from 1."""
    matches: Ints
    """(D, S, T) id of the matched ground truth, 0 for none."""
    ignored: Flags
    """(D, S, T) predictions that count neither as hit nor as fault."""
    truth_ids: Ints
    """(G,) ids of the ground truths."""
    truth_ignored: Flags
    """(G, S) ground truths that are crowds or outside the group."""
    comparable: bool
    """False where a prediction and a ground truth share not one comparable or nonempty mask."""


@dataclass(frozen=True)
class Matches:
    """All pairs with any track, by category id, then video id: P pairs, N predictions, G truths."""

    groups: Groups
    """The S groups that were matched in."""
    video_ids: Ints
    """(P,)"""
    category_ids: Ints
    """(P,)"""
    comparable: Flags
    """(P,) as of `Pair`."""
    starts: Ints
    """(P + 1,) where the predictions of each pair begin."""
    scores: Floats
    """(N,) falling within a pair; at most 100 a pair."""
    rows: Ints
    """(N,) as of `Pair`."""
    matches: Ints
    """(N, S, T) as of `Pair`."""
    ignored: Flags
    """(N, S, T) as of `Pair`."""
    truth_starts: Ints
    """(P + 1,) where the ground truths of each pair begin."""
    truth_ids: Ints
    """(G,) as of `Pair`."""
    truth_ignored: Flags
    """(G, S) as of `Pair`."""
    iou_starts: Ints
    """(P + 1,) where the IoUs of each pair begin."""
    ious: Floats
    """The (D, G) matrices one after the other, in C order."""

    @classmethod
    def of_pairs(cls, pairs: Sequence[Pair], groups: Groups) -> Matches:
        """Put pairs together, in any order."""
        ordered = sorted(pairs, key=lambda pair: (pair.category_id, pair.video_id))
        none = Pair(
            video_id=0,
            category_id=0,
            ious=np.zeros((0, 0)),
            scores=np.zeros(0),
            rows=np.zeros(0, dtype=np.int64),
            matches=np.zeros((0, groups.number, len(iou_thresholds())), dtype=np.int64),
            ignored=np.zeros((0, groups.number, len(iou_thresholds())), dtype=bool),
            truth_ids=np.zeros(0, dtype=np.int64),
            truth_ignored=np.zeros((0, groups.number), dtype=bool),
            comparable=True,
        )
        # One empty pair at the end keeps the shapes where there is no other.
        filled = [*ordered, none]
        return cls(
            groups=groups,
            video_ids=np.array([pair.video_id for pair in ordered], dtype=np.int64),
            category_ids=np.array([pair.category_id for pair in ordered], dtype=np.int64),
            comparable=np.array([pair.comparable for pair in ordered], dtype=bool),
            starts=_starts([len(pair.scores) for pair in ordered]),
            scores=np.concatenate([pair.scores for pair in filled]),
            rows=np.concatenate([pair.rows for pair in filled]),
            matches=np.concatenate([pair.matches for pair in filled]),
            ignored=np.concatenate([pair.ignored for pair in filled]),
            truth_starts=_starts([len(pair.truth_ids) for pair in ordered]),
            truth_ids=np.concatenate([pair.truth_ids for pair in filled]),
            truth_ignored=np.concatenate([pair.truth_ignored for pair in filled]),
            iou_starts=_starts([pair.ious.size for pair in ordered]),
            ious=np.concatenate([pair.ious.ravel() for pair in filled]),
        )

    @classmethod
    def joined(cls, parts: Sequence[Matches]) -> Matches:
        """Join the matches of disjoint sets of videos, one or more, under the same groups."""
        return cls.of_pairs([pair for part in parts for pair in part], parts[0].groups)

    def of_videos(self, videos: Collection[int]) -> Matches:
        """Return the matches of some videos."""
        kept = set(videos)
        return Matches.of_pairs([pair for pair in self if pair.video_id in kept], self.groups)

    def __len__(self) -> int:
        """Return P."""
        return len(self.video_ids)

    def __iter__(self) -> Iterator[Pair]:
        """Yield the pairs, as views into the columns."""
        return (self[p] for p in range(len(self)))

    def __getitem__(self, p: int) -> Pair:
        """Return one pair, as views into the columns."""
        ours = slice(self.starts[p], self.starts[p + 1])
        theirs = slice(self.truth_starts[p], self.truth_starts[p + 1])
        shape = (ours.stop - ours.start, theirs.stop - theirs.start)
        return Pair(
            video_id=int(self.video_ids[p]),
            category_id=int(self.category_ids[p]),
            ious=self.ious[self.iou_starts[p] : self.iou_starts[p + 1]].reshape(shape),
            scores=self.scores[ours],
            rows=self.rows[ours],
            matches=self.matches[ours],
            ignored=self.ignored[ours],
            truth_ids=self.truth_ids[theirs],
            truth_ignored=self.truth_ignored[theirs],
            comparable=bool(self.comparable[p]),
        )

    def of_category(self, category_id: int) -> slice:
        """Return the range of pairs of a category."""
        first, last = np.searchsorted(self.category_ids, [category_id, category_id + 1])
        return slice(int(first), int(last))


def _starts(sizes: Sequence[int]) -> Ints:
    """Return (len(sizes) + 1,) where each of several blocks begins."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
