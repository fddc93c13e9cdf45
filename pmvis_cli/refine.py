"""`pmvis refine`: tracks in, mended tracks out, video by video."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmvis_cli.console import get_console
from pmvis_cli.options import STDIO_PATH, FramesPath, InputTracks, OutputPath, Resume

if TYPE_CHECKING:
    from pmvis_core.refine import RefineCounts


Method = Annotated[
    str,
    typer.Option("--method", metavar="flow|deaot|sam2", help="`flow` needs no weights."),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="RUN|FILE",
        help="Of `deaot`: a run of `train-propagator` or a published checkpoint; "
        "of `sam2`: a model's folder.",
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        "--variant", metavar="NAME", help="Of `deaot`, where the file leaves it open: `deaotl`."
    ),
]
RefineDevice = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="auto|cpu|cuda[:i]", help="Where `deaot` or `sam2` runs; auto."
    ),
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", metavar="fp32|bf16|fp16", help="Numbers of the network; fp32."),
]
MemoryGap = Annotated[
    int | None,
    typer.Option(
        "--memory-gap",
        min=1,
        metavar="N",
        help="`deaot` remembers each N-th frame; default: as the variant was published.",
    ),
]
MemoryLimit = Annotated[
    int | None,
    typer.Option(
        "--memory-limit",
        min=1,
        metavar="N",
        help="Most frames that `deaot` remembers, the key frame always among them; default: all.",
    ),
]
MaxLongEdge = Annotated[
    int | None,
    typer.Option(
        "--max-long-edge", min=64, metavar="PIXELS", help="`deaot` sees larger frames shrunk; 1040."
    ),
]
Joint = Annotated[
    bool | None,
    typer.Option(
        "--joint/--separate",
        help="Whether objects of one key frame compete for pixels in one pass of `deaot`; joint.",
        show_default=False,
    ),
]
ShortEdge = Annotated[
    int | None,
    typer.Option(
        "--short-edge",
        min=32,
        metavar="PIXELS",
        help="Working size of `flow`, 240; 320 is a little better and slower.",
    ),
]
Features = Annotated[
    Path | None,
    typer.Option(
        "--features",
        metavar="FILE",
        help="ImageNet weights of a MobileNetV2, whose features help `flow`; slower.",
    ),
]
TopK = Annotated[
    int,
    typer.Option(
        "--topk", min=0, metavar="K", help="Refine the K best of a video only; 0 refines all."
    ),
]
PScore = Annotated[
    float,
    typer.Option(
        "--pscore", min=0.0, max=1.0, metavar="TAU", help="Refine tracks of this score or more."
    ),
]
Snap = Annotated[
    float | None,
    typer.Option(
        "--snap",
        metavar="IOU",
        help="Keep the track's own mask where its IoU with the propagated one is above this, "
        "and restart from it (departs from the paper); 1 never does. `flow`: 0.5, others: 1.",
    ),
]
AreaJump = Annotated[
    float | None,
    typer.Option(
        "--area-jump",
        metavar="FACTOR",
        help="Take out frames whose area jumps by more than this; 0 takes out none. `flow`: 4, "
        "others: 0.",
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
    method: Method = "flow",
    weights: Weights = None,
    variant: Variant = None,
    device: RefineDevice = None,
    precision: Precision = None,
    topk: TopK = 0,
    pscore: PScore = 0.0,
    snap: Snap = None,
    overlap: Overlap = "independent",
    joint: Joint = None,
    min_area: Annotated[
        int, typer.Option("--min-area", metavar="PIXELS", help="A smaller mask counts as none.")
    ] = 16,
    area_jump: AreaJump = None,
    cycle: Cycle = 0.0,
    memory_gap: MemoryGap = None,
    memory_limit: MemoryLimit = None,
    max_long_edge: MaxLongEdge = None,
    short_edge: ShortEdge = None,
    features: Features = None,
    resume: Resume = False,
) -> None:
    """Mend tracks: propagate each one's best mask to both ends of its video.

    The frame with the highest score is the key frame. Its mask is carried to the first and to the
    last frame and replaces the masks there. Categories and scores stay as they are, so that
    `pmvis filter` means the same before and after; `--topk` and `--pscore` filter before, which
    saves the work.

    Examples:
      pmvis refine raw.tracks.jsonl --frames videos/ -o refined.tracks.jsonl
      pmvis refine raw.tracks.jsonl --frames videos/ --method deaot --weights deaot.pth --topk 4
      pmvis infer --weights RUN --frames a.mp4 | pmvis refine --frames a.mp4 -o a.tracks.jsonl

    Reads: a tracks file or YouTube-VIS JSON, the frames, and for `deaot` and `sam2` weights.
    Writes: a tracks file.

    next: `pmvis filter refined.tracks.jsonl --topk 4 --pscore 0.2`
    """
    from pmvis_core import refine as stage
    from pmvis_core.filter import FilterRule
    from pmvis_core.formats.ytvis import open_tracks
    from pmvis_core.propagation.propagators import Choice, choose_propagator
    from pmvis_core.tracks_io import TracksWriter
    from pmvis_core.video.frames import find_frames

    options = stage.RefineOptions.of(
        method,
        min_area=min_area,
        snap=snap,
        overlap=overlap,
        area_jump=area_jump,
        cycle=cycle,
        keep=FilterRule(topk, pscore),
    )
    chosen = choose_propagator(
        Choice(
            method=method,
            weights=weights,
            variant=variant,
            device=device,
            precision=precision,
            memory_gap=memory_gap,
            memory_limit=memory_limit,
            max_long_edge=max_long_edge,
            joint=joint,
            short_edge=short_edge,
            features=features,
        )
    )
    console = get_console()
    counts = stage.RefineCounts()
    source = open_tracks(tracks)
    header = source.header.extended("refine", **options.as_json(), **chosen.facts)
    with TracksWriter(output, header, resume=resume) as out:
        videos = stage.refine(
            source,
            lambda video: find_frames(video, frames),
            chosen.propagator,
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
    ]
    if counts.snapped:
        parts.append(f"{counts.snapped} of {counts.frames} frames kept their own mask")
    if counts.filtered:
        parts.append(f"{counts.filtered} filtered before")
    if counts.gated:
        parts.append(f"{counts.gated} taken out by the gates")
    if counts.dropped:
        parts.append(f"{counts.dropped} tracks dropped for want of a mask")
    return "; ".join(parts)
