"""Videos shared out among processes that know only their number, and their files joined again.

Process ``i`` of ``n`` takes every n-th video and writes a tracks file of its own; as the videos go
round, so does the merge, and the result is the file that one process would have written. The
processes do not talk: a launcher (`torchrun`) numbers them through the environment, and the first
one waits for the others' files to appear.

    launch = Launch.of(os.environ)
    part = launch.part(Path("out.tracks.jsonl"))
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from pmvis_core.errors import DataError, UsageError
from pmvis_core.tracks_io import TracksHeader, TracksReader, TracksWriter

START_SKEW_S = 120.0
"""Most seconds between the starts of two processes of one launch."""
POLL_S = 0.2
"""Seconds between two looks for a file."""


@dataclass(frozen=True)
class Launch:
    """This process among those that a launcher started."""

    rank: int = 0
    """Its number, from 0."""
    world: int = 1
    """How many there are."""
    local_rank: int = 0
    """Its number on this machine, which is also its GPU's."""
    started: float = 0.0
    """When it was started, in seconds since 1970."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launch:
        """Read RANK, WORLD_SIZE and LOCAL_RANK; without them this process is alone.

        Raises:
            UsageError: they are no numbers, or do not fit together.
        """
        texts = [environment.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
        rank, world, local = texts
        if rank is None or world is None:
            return cls(started=time.time())
        try:
            found = cls(int(rank), int(world), int(local or rank), time.time())
        except ValueError as error:
            raise UsageError(f"RANK, WORLD_SIZE and LOCAL_RANK are {texts}") from error
        if not 0 <= found.rank < found.world or found.local_rank < 0:
            raise UsageError(f"RANK {found.rank} of WORLD_SIZE {found.world}")
        return found

    def part(self, output: Path, rank: int | None = None) -> Path:
        """Return the file that a process (default: this one) writes on the way to ``output``."""
        if self.world == 1:
            return output
        number = (self.rank if rank is None else rank) + 1
        stem, dot, suffix = output.name.partition(".")
        return output.with_name(f"{stem}.{number}-of-{self.world}{dot}{suffix}")

    def parts(self, output: Path) -> list[Path]:
        """Return the files of all processes, in their order."""
        return [self.part(output, rank) for rank in range(self.world)]

    def wait(self, output: Path, sleep: Callable[[float], None] = time.sleep) -> list[Path]:
        """Return the files of all processes when each has finished its own in this launch."""
        parts = self.parts(output)
        while not all(self._is_fresh(part) for part in parts):
            sleep(POLL_S)
        return parts

    def _is_fresh(self, part: Path) -> bool:
        """Tell whether a file was finished since the launch, not by an earlier one."""
        try:
            return part.stat().st_mtime >= self.started - START_SKEW_S
        except FileNotFoundError:
            return False


def is_finished(part: Path, header: TracksHeader) -> bool:
    """Tell whether an earlier run with these options has finished a file; mark it as of now."""
    try:
        same = TracksReader(part).header == header
    except DataError:
        return False
    if same:
        os.utime(part)
    return same


def merge_shards(parts: Sequence[Path], output: Path) -> None:
    """Write the tracks file that one process would have written.

    Args:
        parts: the files of shards 1/n to n/n, in that order.
        output: where to write; ``-`` is standard output.

    Raises:
        DataError: a file is malformed or incomplete, headers differ, or the numbers of videos are
            not those of shards in this order.
    """
    readers = [TracksReader(part) for part in parts]
    for part, reader in zip(parts, readers, strict=True):
        if reader.header != readers[0].header:
            raise DataError(
                f"`{part}` was made from other inputs or options than `{parts[0]}`",
                "merge only the shards of one run",
            )
    ended = -1
    with TracksWriter(output, readers[0].header) as writer:
        videos = [iter(reader) for reader in readers]
        for turn, source in cycle(enumerate(videos)):
            video = next(source, None)
            if video is None and ended < 0:
                ended = turn
            elif video is None and turn == ended:
                return
            elif video is not None and ended >= 0:
                raise DataError(
                    f"`{parts[turn]}` holds more videos than its place among the shards allows",
                    "give the shards 1/n to n/n, all of them and in that order",
                )
            elif video is not None:
                writer.write(video)
