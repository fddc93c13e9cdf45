"""Submissions to challenge servers as files: read without being judged, and packed.

A results list is parsed entry by entry, so memory holds the text and one entry, and a list that
breaks off still shows the entries before that. Tracks files and datasets become results as
`pmvis convert --to results` makes them.

    expected = read_expected(Path("valid.json"))
    submission = open_submission(Path("results.json"), expected)

`check.check` judges, and `pack` writes what is sound.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmvis_core.doubts import Doubts
from pmvis_core.errors import AnswerIsNo, DataError
from pmvis_core.files import STDIO, atomic_write, canonical_json
from pmvis_core.formats.predictions import match_categories, match_videos
from pmvis_core.formats.ytvis import Dataset, TrackSource, dataset_of, read_document, shown, sniff
from pmvis_core.formats.ytvis_writer import as_results
from pmvis_core.submission.report import Report, brief, quoted
from pmvis_core.tracks_io import SUFFIXES, TracksReader

MEMBER = "results.json"
"""The one member of a packed submission, at the archive's root."""

_ZIP64_FROM = 1 << 30
_SPACE = re.compile(r"[ \t\n\r]*")
_PYTHON = re.compile(r"""b?'|b"|\(|None|True|False|array|tensor|nan|inf""")


@dataclass(frozen=True)
class Submission:
    """The entries of a results list, as a file or a pipe gave them: nothing is checked yet."""

    name: str
    """How messages call the file."""
    entries: Iterable[Any]
    """One JSON value a prediction; can be iterated over more than once. A list that does not parse
    to its end raises `NotJson` where it breaks."""
    notes: tuple[tuple[str, str], ...] = ()
    """What opening the file showed: pairs of a key of `KINDS` and a text."""


class NotJson(DataError):
    """A text stops being JSON; the message names line and column."""


def read_expected(path: Path) -> Dataset:
    """Read the videos and categories that a submission is for.

    Args:
        path: a YouTube-VIS dataset, with or without annotations (they are not read), or a folder
            with a folder of frames or a video file for each video. A folder's videos have ids from
            1 in natural order, as `infer` counts them, and no categories.

    Raises:
        DataError: it is missing, or neither.
    """
    if path.is_dir():
        from pmvis_core.video.frames import open_videos

        found = tuple(source.info for source in open_videos(path))
        return Dataset(shown(path), (), found, (), annotated=False)
    document = read_document(path, "videos")
    if isinstance(document, dict):
        document = {**document, "annotations": None}
    return dataset_of(document, shown(path))


def open_submission(path: Path, expected: Dataset) -> Submission:
    """Open a results list, or make one of a tracks file or dataset.

    Args:
        path: the file, plain or gzip, or ``-``.
        expected: what it is for. Tracks and datasets know the names of their videos and categories
            and come out under the ids of ``expected``; a results list is taken as it is.

    Raises:
        DataError: the file is missing; or it is a malformed tracks file or dataset, or one of
            other videos.
    """
    name = shown(path)
    if sniff(path) == "tracks":
        try:
            reader = TracksReader(path)
        except DataError:
            # It may be anything: a results list whose first byte is wrong, for one.
            if str(path) == STDIO or path.name.endswith(SUFFIXES):
                raise
        else:
            return _from_tracks(reader, name, expected)
    try:
        text = _read(path, name).decode()
    except UnicodeDecodeError as error:
        return Submission(name, (), (("json", f"byte {error.start} is not UTF-8 text"),))
    start = _space(text, 0)
    if text.startswith("[", start):
        return Submission(name, _ParsedList(text, start))
    try:
        document = _parsed(json.JSONDecoder().raw_decode, text, start)[0]
    except NotJson as error:
        return Submission(name, (), (("json", error.message),))
    if isinstance(document, dict) and "videos" in document:
        return _from_tracks(dataset_of(document, name), name, expected)
    return Submission(name, (), (("not-a-list", f"found {brief(document)}"),))


class RepeatedKeys(dict[str, Any]):
    """A JSON object in which a key stands twice; it holds the last value of each."""

    told = ""
    """Those keys, as a message quotes them."""


def is_absent(mask: Any) -> bool:
    """Tell whether a frame's entry says that the object is not there: null, ``[]`` or ``{}``."""
    return mask is None or mask in ([], {})


def pack(submission: Submission, report: Report, path: Path) -> int:
    """Write the zip that the servers take: `MEMBER`, deflated, and nothing else.

    The member is what `pmvis convert --to results` writes: canonical JSON of the format's four
    keys. The same predictions give the same bytes, whatever the spacing and the order of keys.

    Args:
        submission: what was checked.
        report: what `check` found in it.
        path: the archive; it appears whole or not at all.

    Returns:
        The size of the archive in bytes.

    Raises:
        AnswerIsNo: the submission is not sound.
        ResourceError: the place cannot be written.
    """
    if not report.sound:
        raise AnswerIsNo(f"{submission.name} is not sound, so it is not packed")
    info = zipfile.ZipInfo(MEMBER, date_time=(1980, 1, 1, 0, 0, 0))
    info.compress_type = zipfile.ZIP_DEFLATED
    info.create_system, info.external_attr = 3, 0o644 << 16  # Unix on every system
    large = report.characters > _ZIP64_FROM  # old programs cannot read zip64, so only then
    with (
        atomic_write(path, "wb") as stream,
        zipfile.ZipFile(stream, "w") as archive,
        archive.open(info, "w", force_zip64=large) as member,
    ):
        separator = "["
        for entry in submission.entries:
            member.write((separator + canonical_json(_plain(entry))).encode())
            separator = ","
        member.write(b"]\n")
    return path.stat().st_size


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sound entry with the format's keys only."""
    return {
        "video_id": int(entry["video_id"]),
        "category_id": int(entry["category_id"]),
        "score": float(entry["score"]),
        "segmentations": [
            None if is_absent(rle) else {"size": rle["size"], "counts": rle["counts"]}
            for rle in entry["segmentations"]
        ],
    }


def _from_tracks(source: TrackSource, name: str, expected: Dataset) -> Submission:
    """Return tracks as results, under the ids of the expected videos and categories."""
    doubts = Doubts()
    videos = list(source)
    categories = {category.id: category.name for category in source.header.categories}
    to_video = match_videos([v.video for v in videos], expected.videos, name, doubts)
    to_category: Mapping[int, int | None] = {number: number for number in categories}
    if expected.categories:
        to_category = match_categories(source.header.categories, expected.categories, name)
    entries: list[dict[str, Any]] = []
    notes = [("matched-by-id", text) for text in doubts.texts]
    for entry in as_results(videos):
        category = to_category[entry["category_id"]]
        if category is None:
            notes.append(("left-out", f"`{categories[entry['category_id']]}`"))
            continue
        moved = {"video_id": to_video[entry["video_id"]], "category_id": category}
        entries.append({**entry, **moved})
    return Submission(name, entries, tuple(notes))


def _read(path: Path, name: str) -> bytes:
    """Return the bytes of a plain or gzip file, or of standard input."""
    try:
        data = sys.stdin.buffer.read() if str(path) == STDIO else path.read_bytes()
        return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except FileNotFoundError as error:
        raise DataError(f"submission {name} does not exist", "check the path") from error
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"submission {name} cannot be read to its end: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, marked if a key stands twice."""
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    marked = RepeatedKeys(value)
    marked.told = quoted(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
    return marked


class _ParsedList:
    """The entries of a JSON list, parsed one by one: in memory are the text and one entry."""

    def __init__(self, text: str, start: int) -> None:
        """Keep the text and where the list opens."""
        self._text = text
        self._start = start

    def __iter__(self) -> Iterator[Any]:
        """Yield the entries.

        Raises:
            NotJson: the text is no list from here on.
        """
        text, decode = self._text, json.JSONDecoder(object_pairs_hook=_object).raw_decode
        at = _space(text, self._start + 1)
        ended = text.startswith("]", at)
        at += ended
        while not ended:
            value, at = _parsed(decode, text, at)
            yield value
            at = _space(text, at)
            ended = text.startswith("]", at)
            if not ended and not text.startswith(",", at):
                raise _not_json(text, at, "expected `,` or `]`")
            at = _space(text, at + 1)
        if _space(text, at) < len(text):
            raise _not_json(text, _space(text, at), "text behind the end of the list")


def _space(text: str, at: int) -> int:
    """Return the first place from ``at`` that is no white space."""
    found = _SPACE.match(text, at)
    return len(text) if found is None else found.end()


def _parsed(decode: Callable[[str, int], tuple[Any, int]], text: str, at: int) -> tuple[Any, int]:
    """Return the JSON value that begins at a place, and where it ends."""
    try:
        return decode(text, at)
    except json.JSONDecodeError as error:
        raise _not_json(text, error.pos, error.msg) from error
    except (RecursionError, ValueError) as error:  # nested too deep, or a number without end
        raise NotJson(f"no JSON that a program can hold: {error}") from error


def _not_json(text: str, at: int, problem: str) -> NotJson:
    """Return the error for a text that stops being JSON, with a guess at the reason."""
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    reason = ""
    if text.startswith("\ufeff"):
        reason = " (a byte order mark: save the file as UTF-8 without it)"
    elif not text[at:].strip() or problem.startswith("Unterminated"):
        reason = " (the file is cut off)" if text.strip() else " (the file is empty)"
    elif _PYTHON.match(text, at):
        reason = " (Python's notation, not JSON)"
    return NotJson(f"line {line}, column {column}: {problem}{reason}")
