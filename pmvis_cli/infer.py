"""`pmvis infer`: label videos with a trained model."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pmvis_cli.console import get_console
from pmvis_cli.options import (
    STDIO_PATH,
    Device,
    OutputPath,
    Resume,
    Settings,
    Shard,
    parsed_shard,
    refuse_terminal_input,
)

if TYPE_CHECKING:
    from pmvis_core.infer import InferOptions
    from pmvis_core.inference.shards import Launch
    from pmvis_core.video.sources import FrameSource

Video = TypeVar("Video")
UNSAID: dict[str, Any] = {"every": 1, "on_error": "stop", "precision": "fp32"}
"""Options that leave no trace in the file where they have these values."""
Weights = Annotated[
    Path,
    typer.Option("--weights", metavar="RUN|FILE", help="Run folder, or a file of pmvis or IDOL."),
]
Categories = Annotated[
    str,
    typer.Option(metavar="NAME|FILE", help="Vocabulary of an IDOL file; default: by its size."),
]
Frames = Annotated[
    Path,
    typer.Option(
        "--frames",
        metavar="PATH",
        help="Folder of frames or of videos, video file, YouTube-VIS JSON, `-` for a list of paths "
        "on standard input, or `webcam:0`.",
    ),
]
Start = Annotated[str, typer.Option(metavar="PLACE", help="First frame, from 0, or `2.5s`.")]
End = Annotated[str, typer.Option(metavar="PLACE", help="Frame behind the last, or `10s`.")]
Every = Annotated[int, typer.Option(min=1, metavar="N", help="Take each N-th frame only.")]
MaxSide = Annotated[
    int, typer.Option(min=0, metavar="PX", help="Cap of the longer side that the network sees.")
]
SingleLabel = Annotated[
    bool, typer.Option("--single-label", help="One row a track: its best category only.")
]
OnError = Annotated[
    str,
    typer.Option(metavar="stop|skip|blank", help="Broken frame: end, leave it out, or no masks."),
]
Precision = Annotated[
    str, typer.Option(metavar="fp32|bf16|fp16", help="Numbers of backbone and encoder.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Let torch write kernels; pays on long runs on a GPU.")
]


def infer(
    weights: Weights,
    frames: Frames,
    output: OutputPath = STDIO_PATH,
    root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where a JSON's frames are, if not beside it."),
    ] = None,
    categories: Categories = "",
    start: Start = "",
    end: End = "",
    every: Every = 1,
    max_side: MaxSide = 0,
    single_label: SingleLabel = False,
    on_error: OnError = "stop",
    settings: Settings = None,
    shard: Shard = "1/1",
    device: Device = "auto",
    precision: Precision = "fp32",
    compiled: Compile = False,
    resume: Resume = False,
) -> None:
    """Detect, segment and track the objects of videos, frame by frame.

    Examples:
      pmvis infer --weights runs/image --frames videos/ -o raw.tracks.jsonl
      pmvis infer --weights runs/image --frames clip.mp4 | pmvis filter --topk 4 > clip.tracks.jsonl
      pmvis infer --weights runs/image --frames ovis/train.json --set mask_nms=0.3 --resume -o F
      pmvis infer --weights idol.pth --frames webcam:0 --every 3 --single-label -o F
      torchrun --nproc-per-node 4 -m pmvis_cli infer --weights runs/image --frames videos/ -o F

    Reads: a model of `train-image` or `train-video`, or a checkpoint of IDOL or PM-VIS, whose
      vocabulary is coco, ytvis2019, ytvis2021, ovis or a file; frames from a folder, a folder of
      folders, a video file, a YouTube-VIS JSON, a list on standard input, or a camera (Ctrl-C ends
      the clip).
    Writes: a tracks file, one video a line; each row has its category's score in every frame.
      Masks have the size of the original frames; frames that were not taken are not of the video.

    next: `pmvis refine raw.tracks.jsonl --frames videos/`
    """
    from pmvis_core.checkpoint import MODEL_FILE, load_model
    from pmvis_core.config import parse_settings
    from pmvis_core.files import digest_file
    from pmvis_core.infer import InferOptions, with_thresholds
    from pmvis_core.inference.segmenter import FrameSegmenter
    from pmvis_core.inference.shards import Launch
    from pmvis_core.tracks_io import TracksHeader
    from pmvis_core.video.frames import open_videos
    from pmvis_core.video.sources import select_frames

    console = get_console()
    launch = Launch.of(os.environ)
    _check(frames, root, output, on_error, shard, launch)
    target = _device_of(device, launch)
    checkpoint = load_model(weights, categories)
    checkpoint.report.tell(console.say, console.detail)
    checkpoint = with_thresholds(checkpoint, parse_settings(settings or []))
    segmenter = FrameSegmenter(checkpoint.model, target, precision, compiled)
    videos = shard_of(open_videos(frames, root), shard)
    videos = shard_of(videos, f"{launch.rank + 1}/{launch.world}")
    videos = [select_frames(video, start, end, every) for video in videos]
    facts: dict[str, Any] = {"start": start, "end": end, "every": every, "max_side": max_side}
    facts |= {"single_label": single_label, "on_error": on_error, "precision": precision}
    file = weights / MODEL_FILE if weights.is_dir() else weights
    header = TracksHeader(checkpoint.categories).extended(
        "infer",
        weights=digest_file(file),
        settings=parse_settings(settings or []),
        **{name: value for name, value in facts.items() if value and value != UNSAID.get(name)},
    )
    console.say(f"{len(videos)} videos, {len(checkpoint.categories)} categories, on {target}")
    spool = None if output == STDIO_PATH else output.parent
    options = InferOptions(max_side, single_label, on_error, spool)
    job = _Job(segmenter, checkpoint, options, header)
    _run(job, videos, output, launch, resume)


@dataclass(frozen=True)
class _Job:
    """What is done to every video."""

    segmenter: Any
    checkpoint: Any
    options: InferOptions
    header: Any


def _check(
    frames: Path, root: Path | None, output: Path, on_error: str, shard: str, launch: Launch
) -> None:
    """Refuse options that do not go together.

    Raises:
        UsageError: see there.
    """
    from pmvis_core.errors import UsageError
    from pmvis_core.infer import ON_ERROR

    refuse_terminal_input(frames)
    if root is not None and frames.suffix.lower() != ".json":
        raise UsageError("`--root` is for a JSON, `--frames` is none", "leave `--root` out")
    if on_error not in ON_ERROR:
        raise UsageError(f"`--on-error {on_error}`, expected one of {', '.join(ON_ERROR)}")
    if launch.world > 1 and output == STDIO_PATH:
        raise UsageError(f"{launch.world} processes cannot share standard output", "give `-o FILE`")
    if launch.world > 1 and shard != "1/1":
        raise UsageError(
            f"`--shard {shard}` within {launch.world} processes, which share the videos out",
            "leave one of the two out",
        )
    if launch.world > 1 and frames == STDIO_PATH:
        raise UsageError("several processes cannot read one list", "write the list's videos out")


def _device_of(name: str, launch: Launch) -> Any:
    """Return the device; of several GPUs, the one with this process's number."""
    from pmvis_core.devices import find_device

    device = find_device(name)
    alone = launch.world == 1 or device.type != "cuda" or device.index is not None
    return device if alone else find_device(f"cuda:{launch.local_rank}")


def _run(job: _Job, videos: list[FrameSource], output: Path, launch: Launch, resume: bool) -> None:
    """Label the videos into this process's file; the first process joins all files."""
    from pmvis_core.inference.shards import is_finished, merge_shards
    from pmvis_core.tracks_io import TracksWriter

    part = launch.part(output)
    if launch.world > 1 and not resume:
        part.unlink(missing_ok=True)
    if not (launch.world > 1 and resume and is_finished(part, job.header)):
        with TracksWriter(part, job.header, resume=resume) as writer:
            rest = [video for video in videos if video.info.id not in writer.done_ids]
            if len(rest) < len(videos):
                get_console().say(f"{len(videos) - len(rest)} videos were done before")
            live = any(video.live for video in rest)
            total = None if live else sum(video.info.length for video in rest)
            for _ in get_console().progress(_label(job, rest, writer), "frames", total):
                pass
    if launch.world > 1 and launch.rank == 0:
        parts = launch.wait(output)
        merge_shards(parts, output)
        for one in parts:
            one.unlink()


def _label(job: _Job, videos: list[FrameSource], writer: Any) -> Iterator[None]:
    """Label videos one after the other, and yield after each frame."""
    from pmvis_core.infer import VideoInference

    for video in videos:
        with (
            _ended_by_interrupt(video),
            VideoInference(job.segmenter, job.checkpoint, video, job.options) as run,
        ):
            for _ in run:
                yield
            writer.write_pieces(run.pieces(), run.rows_written)


@contextmanager
def _ended_by_interrupt(video: FrameSource) -> Iterator[None]:
    """Let Ctrl-C end a live video as if the camera had; the second Ctrl-C interrupts as usual."""
    if not video.live:
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        video.stop()

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def shard_of(videos: list[Video], shard: str) -> list[Video]:
    """Return every n-th video of ``i/n``, counting from 1.

    Raises:
        UsageError: it is no such pair.
    """
    index, count = parsed_shard(shard)
    return videos[index - 1 :: count]
