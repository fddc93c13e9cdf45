"""`pmvis refine`: tracks in, mended tracks out, video by video."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pmvis_cli.console import get_console
from pmvis_cli.options import STDIO_PATH, FramesPath, InputTracks, OutputPath, Resume

if TYPE_CHECKING:
    from pmvis_core.refine import RefineCounts


Snap = Annotated[
    float,
    typer.Option(
        "--snap",
        metavar="IOU",
        help="Keep the track's own mask where its IoU with the propagated one is above this, "
        "and restart from it (departs from the paper); 1 never does.",
    ),
]
Overlap = Annotated[
    str,
    typer.Option(
        "--overlap",
        metavar="independent|argmax|score",
        help="Whom a pixel belongs to that several instances claim: all of them, the most "
        "probable, or the best-scored.",
    ),
]
Cycle = Annotated[
    float,
    typer.Option(
        "--cycle",
        metavar="IOU",
        help="Take out frames from which the way back finds the start with less than this; "
        "0 checks none. Twice the time, and rarely worth it with `flow`.",
    ),
]


def refine(
    tracks: InputTracks = STDIO_PATH,
    *,
    frames: FramesPath,
    output: OutputPath = STDIO_PATH,
    method: Annotated[
        str,
        typer.Option("--method", metavar="flow|deaot", help="`flow` needs no weights."),
    ] = "flow",
    snap: Snap = 0.5,
    overlap: Overlap = "independent",
    min_area: Annotated[
        int, typer.Option("--min-area", metavar="PIXELS", help="A smaller mask counts as none.")
    ] = 16,
    area_jump: Annotated[
        float,
        typer.Option(
            "--area-jump",
            metavar="FACTOR",
            help="Take out frames whose area jumps by more than this; 0 takes out none.",
        ),
    ] = 4.0,
    cycle: Cycle = 0.0,
    short_edge: Annotated[
        int,
        typer.Option(
            "--short-edge",
            min=32,
            metavar="PIXELS",
            help="Working size of `flow`; 320 is a little better and slower.",
        ),
    ] = 240,
    resume: Resume = False,
) -> None:
    """Mend tracks: propagate each one's best mask to both ends of its video.

    The frame with the highest score is the key frame. Its mask is carried to the first and to the
    last frame and replaces the masks there. Categories and scores stay as they are, so that
    `pmvis filter` means the same before and after; filtering before is faster.

    Reads tracks or YouTube-VIS JSON and the frames; writes tracks. Examples:

        pmvis refine raw.tracks.jsonl --frames videos/ -o refined.tracks.jsonl
        pmvis infer --weights RUN --frames a.mp4 | pmvis refine --frames a.mp4 -o a.tracks.jsonl

    Next: `pmvis filter refined.tracks.jsonl --topk 4 --pscore 0.2`.
    """
    from dataclasses import asdict

    from pmvis_core import refine as stage
    from pmvis_core.formats.ytvis import open_tracks
    from pmvis_core.tracks_io import TracksWriter
    from pmvis_core.video import find_frames

    options = stage.RefineOptions(
        min_area=min_area, snap=snap, overlap=overlap, area_jump=area_jump, cycle=cycle
    )
    propagator = stage.make_propagator(method, short_edge)
    console = get_console()
    counts = stage.RefineCounts()
    source = open_tracks(tracks)
    facts = {**asdict(options), "method": method, "short_edge": short_edge}
    with TracksWriter(output, source.header.extended("refine", **facts), resume=resume) as out:
        videos = stage.refine(
            source,
            lambda video: find_frames(video, frames),
            propagator,
            options,
            counts,
            done=out.done_ids,
            progress=console.progress,
        )
        for video in videos:
            out.write(video)
    console.say(_summary(counts, method))


def _summary(counts: RefineCounts, method: str) -> str:
    """Return what happened in one line."""
    kept = counts.tracks - counts.dropped
    parts = [
        f"refined {kept} of {counts.tracks} tracks in {counts.videos} videos by {method}",
        f"{counts.snapped} of {counts.frames} frames kept their own mask",
    ]
    if counts.gated:
        parts.append(f"{counts.gated} taken out by the gates")
    if counts.dropped:
        parts.append(f"{counts.dropped} tracks dropped for want of a mask")
    return "; ".join(parts)
