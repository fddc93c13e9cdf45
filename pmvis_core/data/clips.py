"""Labelled videos as training reads them: which of their tracks count, and where their frames lie.

Of several rows of one instance the best scored counts; a video in which none holds a mask is left
out. What a filter set aside, and crowds, are ignored regions, unless a row of the same instance
counts. A video's tables are mapped from the file's index (`formats.tracks_index`), its masks read
when a frame is drawn, so that processes share both and the number of videos does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmvis_core.errors import DataError
from pmvis_core.formats.tracks_index import TracksIndex
from pmvis_core.formats.tracks_tables import SUPERVISIONS
from pmvis_core.types import RLE, Supervision, VideoInfo
from pmvis_core.video.frames import FrameSource, ImageFrames, find_frames


@dataclass(frozen=True)
class Clip:
    """One video."""

    info: VideoInfo
    """The video."""
    frames: FrameSource
    """Its frames."""
    tracks: NDArray[np.intp]
    """(N,) rows of the index that count, by ascending track id."""
    ignored: NDArray[np.intp]
    """(M,) rows that are ignored regions."""
    _index: TracksIndex

    def seen(self, times: Sequence[int]) -> NDArray[np.intp]:
        """Return the tracks that have a mask in one of the frames."""
        shown = [self._index.shown(self.tracks, time) for time in times]
        return self.tracks[np.any(shown, axis=0)]

    def rles(self, rows: NDArray[np.intp], time: int) -> list[RLE | None]:
        """Return the masks of some tracks in a frame, None where one is absent.

        Raises:
            DataError: the tracks were changed since they were opened.
        """
        return [self._index.rle(row, time, self.info) for row in rows.tolist()]

    def labels(self, rows: NDArray[np.intp]) -> list[int]:
        """Return the 0-based categories of some tracks."""
        labels: list[int] = self._index.tables.tracks["label"][rows].tolist()
        return labels

    def supervision(self, rows: NDArray[np.intp]) -> tuple[Supervision, ...]:
        """Return what is known of some tracks."""
        kinds = self._index.tables.tracks["supervision"][rows].tolist()
        return tuple(SUPERVISIONS[kind] for kind in kinds)


class Clips:
    """The videos of a file that hold a mask to learn from, each made when it is asked for."""

    def __init__(self, index: TracksIndex, *, without_dropped: bool) -> None:
        """Choose what counts.

        Args:
            index: of the file.
            without_dropped: tracks that `filter` set aside are background, no ignored regions.
        """
        self._index = index
        tables = index.tables
        aside = tables.tracks["ignored"] > 0
        self.any_aside = bool(aside.any())
        """Whether the file holds tracks that were set aside, or crowds."""
        kept = _best_rows(index, ~aside)
        if without_dropped:
            aside = aside & (tables.tracks["dropped"] == 0)
        ignored = _best_rows(index, aside)
        objects = tables.tracks["object"]
        ignored = ignored[~np.isin(objects[ignored], objects[kept])]
        self._kept, self._first_kept = kept, np.searchsorted(kept, tables.first)
        self._rows = np.flatnonzero(np.diff(self._first_kept))
        owners = np.searchsorted(tables.first, ignored, side="right") - 1
        self._ignored = ignored[np.isin(owners, self._rows)]
        self._first_ignored = np.searchsorted(self._ignored, tables.first)
        self.left_out = tables.bare + len(tables.videos) - len(self._rows)
        """Number of videos without a track that counts."""
        self._frames: list[Path | FrameSource] = []

    def __len__(self) -> int:
        """Return the number of videos."""
        return len(self._rows)

    def find_frames(self, root: Path) -> list[DataError]:
        """Look for the videos' frames, once; return why those are missing that are.

        Args:
            root: where; see `video.frames.find_frames`.
        """
        missing = []
        folders: dict[Path, Path] = {}
        for row in self._rows.tolist():
            try:
                found = find_frames(self._index.info(row), root)
            except DataError as error:
                missing.append(error)
                self._frames.append(root)
                continue
            if isinstance(found, ImageFrames):  # its files' names are many: the index has them
                self._frames.append(folders.setdefault(found.root, found.root))
            else:
                self._frames.append(found)
        return missing

    def __getitem__(self, place: int) -> Clip:
        """Return a video; where `find_frames` missed its frames, reading one says so again."""
        row = int(self._rows[place])
        info, frames = self._index.info(row), self._frames[place]
        return Clip(
            info,
            ImageFrames(frames, info, found=info) if isinstance(frames, Path) else frames,
            self._kept[self._first_kept[row] : self._first_kept[row + 1]],
            self._ignored[self._first_ignored[row] : self._first_ignored[row + 1]],
            self._index,
        )

    def counts(self) -> Counter[str]:
        """Return the number of videos, of tracks by what is known of them, and of ignored ones."""
        kinds = np.bincount(self._index.tables.tracks["supervision"][self._kept])
        found = Counter(videos=len(self), ignored=len(self._ignored))
        found.update({SUPERVISIONS[k].value: int(n) for k, n in enumerate(kinds) if n})
        return found


def _best_rows(index: TracksIndex, chosen: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return the best scored row with a mask of each object, ascending; ties go to the lower id.

    Args:
        index: of a file; a video's rows are sorted by track id.
        chosen: (N,) the rows that take part.
    """
    tracks = index.tables.tracks
    rows = np.flatnonzero(chosen & (tracks["present"] > 0))
    order = rows[np.argsort(-tracks["score"][rows], kind="stable")]
    _, first = np.unique(tracks["object"][order], return_index=True)
    return np.sort(order[first])
