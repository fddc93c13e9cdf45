"""Parts of an evaluation: the videos that a file lists, and the group of all objects alone.

A subset costs no new IoU, because matches are made video by video (YouTube-VIS 2022 scores its
long videos so):

    chosen = read_subset(Path("long.txt"), truth.videos)
    accumulate(truth.categories, evaluation.matches.of_videos(chosen))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pmvis_core.doubts import Doubts
from pmvis_core.errors import DataError
from pmvis_core.evaluation.matches import Matches
from pmvis_core.evaluation.protocol import Groups
from pmvis_core.files import parse_json
from pmvis_core.formats.predictions import match_videos
from pmvis_core.formats.ytvis import dataset_of
from pmvis_core.types import VideoInfo

_COMMENT = "#"
_SHOWN = 3


def read_subset(
    path: Path, videos: Sequence[VideoInfo], doubts: Doubts | None = None
) -> frozenset[int]:
    """Read which videos of the ground truth are meant.

    Args:
        path: one id or name a line (blank lines and ``#`` comments do not count), a JSON list of
            ids and names, or a YouTube-VIS JSON whose ``videos`` are meant. What is both a name
            and another video's id is refused.
        videos: those of the ground truth.
        doubts: takes the case that a JSON's videos could be told by id only; by default it is
            warned of at once.

    Returns:
        Video ids, at least one.

    Raises:
        DataError: the file cannot be read, lists nothing, or lists what is no video of the ground
            truth; the message names the first few.
    """
    noted = Doubts() if doubts is None else doubts
    text = _read(path)
    if text.startswith("{"):
        stated = dataset_of(_videos_only(parse_json(text, f"subset `{path}`")), f"subset `{path}`")
        chosen = frozenset(match_videos(stated.videos, videos, stated.name, noted).values())
    elif text.startswith("["):
        chosen = _resolved(parse_json(text, f"subset `{path}`"), videos, path)
    else:
        lines = (line.partition(_COMMENT)[0].strip() for line in text.splitlines())
        chosen = _resolved([line for line in lines if line], videos, path)
    if not chosen:
        raise DataError(f"subset `{path}` lists no video", "list one video id or name a line")
    if doubts is None:
        noted.settle(strict=False)
    return chosen


def of_all_objects(matches: Matches) -> Matches:
    """Return the matches in the first group alone, which holds objects of every size.

    The curves of the other groups cost four or sixteen times as much; AP, AP50, AP75 and AR of
    all objects are the same bits without them.
    """
    groups = matches.groups
    return replace(
        matches,
        groups=Groups(groups.areas[:1], groups.occlusions[:1]),
        matches=np.ascontiguousarray(matches.matches[:, :1]),
        ignored=np.ascontiguousarray(matches.ignored[:, :1]),
        truth_ignored=np.ascontiguousarray(matches.truth_ignored[:, :1]),
    )


def _read(path: Path) -> str:
    """Return the text of the file without space around it; a pipe can be read only once."""
    try:
        return path.read_bytes().decode("utf-8-sig").strip()
    except FileNotFoundError as error:
        raise DataError(f"subset `{path}` does not exist", "check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"subset `{path}` is not UTF-8 text", "list one video id or name a line"
        ) from error
    except OSError as error:
        raise DataError(f"subset `{path}` cannot be read: {error.strerror}") from error


def _videos_only(document: Any) -> Any:
    """Return a YouTube-VIS document without what may be large and does not matter here."""
    return {**document, "annotations": None, "categories": []}


def _resolved(entries: Iterable[Any], videos: Sequence[VideoInfo], path: Path) -> frozenset[int]:
    """Return the ids of listed videos."""
    by_name: dict[str, list[int]] = {}
    for video in videos:
        by_name.setdefault(video.name, []).append(video.id)
    ids = {video.id for video in videos}
    chosen: set[int] = set()
    unknown: list[str] = []
    for entry in entries:
        found = _candidates(entry, ids, by_name)
        if len(found) > 1:
            raise DataError(
                f"subset `{path}`: `{entry}` means videos {sorted(found)}, expected one",
                "list ids as whole numbers in a JSON list such as `[3, 7]`",
            )
        chosen |= found
        unknown += [] if found else [f"`{entry}`"]
    if unknown:
        told = ", ".join(unknown[:_SHOWN])
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise DataError(
            f"subset `{path}` lists {told}{more}, expected ids or names of videos in the ground "
            "truth",
            f"its videos are such as {videos[0].id} `{videos[0].name}`" if videos else None,
        )
    return frozenset(chosen)


def _candidates(entry: Any, ids: set[int], by_name: dict[str, list[int]]) -> set[int]:
    """Return the videos that an entry may mean: a number is an id, a text a name or an id."""
    if isinstance(entry, int) and not isinstance(entry, bool):
        return {entry} & ids
    if not isinstance(entry, str):
        return set()
    found = set(by_name.get(entry, ()))
    return found | ({int(entry)} & ids if entry.isascii() and entry.isdigit() else set())
