"""`pmvis view`: tracks as a video or a contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmvis_cli.console import get_console
from pmvis_cli.options import STDIO_PATH, FramesPath, InputTracks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pmvis_core.report.page import SheetGroup
    from pmvis_core.types import VideoTracks


def view(
    tracks: InputTracks = STDIO_PATH,
    *,
    frames: FramesPath,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="`.mp4`, or `.png` or `.jpg`.")
    ],
    videos: Annotated[
        str,
        typer.Option(
            "--videos", metavar="N|IDS|all", help="The first N, or ids or names: `3,` or `3,7,9`."
        ),
    ] = "8",
    gt: Annotated[
        Path | None,
        typer.Option("--gt", metavar="FILE", help="Truth to be shown beside, of the same videos."),
    ] = None,
    min_score: Annotated[
        float, typer.Option("--min-score", min=0.0, max=1.0, help="Leave out tracks below.")
    ] = 0.3,
    columns: Annotated[
        int, typer.Option("--columns", min=1, max=32, help="Frames of a video on a sheet.")
    ] = 6,
    fps: Annotated[
        float, typer.Option("--fps", min=0.1, max=240.0, help="Frames a second of the mp4.")
    ] = 6.0,
    title: Annotated[str, typer.Option("--title", help="Headline of the sheet.")] = "",
) -> None:
    """Draw tracks over their frames: an overlay video (.mp4) or a contact sheet (.png).

    Each track keeps its colour; with --gt a track has the colour of the true one that it overlaps,
    and grey if there is none. Where an instance has several categories, the best is drawn.

    Reads tracks or YouTube-VIS JSON and the frames; writes one file. Examples:

        pmvis view out.tracks.jsonl --frames videos/ -o sheet.png
        pmvis view out.tracks.jsonl --frames valid.json --gt valid.json --videos 3,7 -o out.mp4
        pmvis infer --weights RUN --frames clip.mp4 | pmvis view --frames clip.mp4 -o out.mp4
    """
    from pmvis_core.errors import UsageError
    from pmvis_core.formats.ytvis import open_tracks
    from pmvis_core.report.page import PICTURE_SUFFIXES, contact_sheet, overlay_video, write_picture
    from pmvis_core.video.frames import write_video

    suffix = output.suffix.lower()
    if suffix not in (".mp4", *PICTURE_SUFFIXES):
        raise UsageError(
            f"cannot draw `{output}`", "name a video `.mp4` or a contact sheet `.png` with `-o`"
        )
    console = get_console()
    source = open_tracks(tracks)
    names = {category.id: category.name for category in source.header.categories}
    truth, names = (None, names) if gt is None else _read_truth(gt, names)
    chosen = choose(console.progress(source, "draw"), videos)
    groups = (_group(video, frames, truth, min_score) for video in chosen)
    if suffix in PICTURE_SUFFIXES:
        write_picture(output, contact_sheet(list(groups), names, columns=columns, title=title))
    else:
        write_video(output, overlay_video(groups, names), fps)
    console.say(f"drew `{output}`")


def choose(videos: Iterable[VideoTracks], wanted: str) -> Iterator[VideoTracks]:
    """Yield the videos that ``wanted`` names, reading to the end so that a cut file is noticed.

    Args:
        videos: all videos.
        wanted: ``all``, how many from the first on, or ids or names parted by commas.

    Raises:
        UsageError: an id or name does not occur, or ``wanted`` is none of these.
    """
    from pmvis_core.errors import UsageError

    keys = {key.strip() for key in wanted.split(",") if key.strip()}
    by_count = "," not in wanted and wanted.strip().isdecimal()
    limit = int(wanted) if by_count else None
    missing = set() if by_count or wanted == "all" else set(keys)
    for number, video in enumerate(videos):
        own = {str(video.video.id), video.video.name} & keys
        missing -= own
        if wanted == "all" or (number < limit if limit is not None else own):
            yield video
    if missing:
        raise UsageError(
            f"no video `{min(missing)}` in the tracks",
            "`--videos` takes a number, `all`, or ids or names parted by commas (`3,`)",
        )


def _read_truth(path: Path, names: dict[int, str]) -> tuple[dict[int, VideoTracks], dict[int, str]]:
    """Return the truth by video id, and the names of its categories and of the tracks'.

    Raises:
        DataError: an id means one category here and another there.
    """
    from pmvis_core.errors import DataError
    from pmvis_core.formats.ytvis import open_tracks

    source = open_tracks(path)
    own = {category.id: category.name for category in source.header.categories}
    for number in sorted({*own} & {*names}):
        if own[number] != names[number]:
            raise DataError(
                f"`{path}` has another vocabulary: category {number} is `{own[number]}` there and "
                f"`{names[number]}` in the tracks"
            )
    return {video.video.id: video for video in source}, {**own, **names}


def _group(
    video: VideoTracks, frames: Path, truth: dict[int, VideoTracks] | None, min_score: float
) -> SheetGroup:
    """Return what is drawn of one video."""
    from pmvis_core.errors import DataError
    from pmvis_core.report.page import SheetGroup, found_strip, truth_strip
    from pmvis_core.video.frames import find_frames

    info = video.video
    source = find_frames(info, frames)
    if truth is None:
        strips = (found_strip("tracks", video.tracks, min_score),)
        return SheetGroup(info.name, source, strips)
    true = truth.get(info.id)
    if true is None or true.video.length != info.length:
        found = "is not there" if true is None else f"has {true.video.length} frames there"
        raise DataError(
            f"video {info.id} `{info.name}` with {info.length} frames {found} (`--gt`)",
            "give the truth of the videos that the tracks were made from",
        )
    reference = truth_strip("truth", true.tracks)
    found_row = found_strip("tracks", video.tracks, min_score, reference)
    return SheetGroup(info.name, source, (reference, found_row))
