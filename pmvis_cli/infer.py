"""`pmvis infer`: label videos with a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from pmvis_cli.console import get_console
from pmvis_cli.options import STDIO_PATH, Device, FramesPath, OutputPath, Resume, Settings, Shard

Video = TypeVar("Video")
Weights = Annotated[
    Path,
    typer.Option("--weights", metavar="RUN", help="Run folder, or a `model.safetensors` of pmvis."),
]


def infer(
    weights: Weights,
    frames: FramesPath,
    output: OutputPath = STDIO_PATH,
    root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where a JSON's frames are, if not beside it."),
    ] = None,
    settings: Settings = None,
    shard: Shard = "1/1",
    device: Device = "auto",
    resume: Resume = False,
) -> None:
    """Detect, segment and track the objects of videos, frame by frame.

    Examples:
      pmvis infer --weights runs/image --frames videos/ -o raw.tracks.jsonl
      pmvis infer --weights runs/image --frames clip.mp4 | pmvis filter --topk 4 > clip.tracks.jsonl
      pmvis infer --weights runs/image --frames ovis/train.json --set mask_nms=0.3 --resume -o F

    Reads: a model of `train-image` or `train-video`; frames from a folder, a folder of folders,
      a video file, or a YouTube-VIS JSON.
    Writes: a tracks file, one video a line; each row has its category's score in every frame.

    next: `pmvis refine raw.tracks.jsonl --frames videos/`
    """
    from pmvis_core.checkpoint import MODEL_FILE, load_model
    from pmvis_core.config import parse_settings
    from pmvis_core.devices import find_device
    from pmvis_core.errors import UsageError
    from pmvis_core.files import digest_file
    from pmvis_core.infer import infer_video, with_thresholds
    from pmvis_core.tracks_io import TracksHeader, TracksWriter
    from pmvis_core.video import open_videos

    console = get_console()
    if root is not None and frames.suffix.lower() != ".json":
        raise UsageError("`--root` is for a JSON, `--frames` is none", "leave `--root` out")
    target = find_device(device)
    checkpoint = with_thresholds(load_model(weights), parse_settings(settings or []))
    checkpoint.model.to(target)
    videos = shard_of(open_videos(frames, root), shard)
    file = weights / MODEL_FILE if weights.is_dir() else weights
    header = TracksHeader(checkpoint.categories).extended(
        "infer", weights=digest_file(file), settings=parse_settings(settings or [])
    )
    console.say(f"{len(videos)} videos, {len(checkpoint.categories)} categories, on {target}")
    with TracksWriter(output, header, resume=resume) as writer:
        rest = [v for v in videos if v.info.id not in writer.done_ids]
        for video in console.progress(rest, "infer", len(rest)):
            writer.write(infer_video(checkpoint, video, target))


def shard_of(videos: list[Video], shard: str) -> list[Video]:
    """Return every n-th video of ``i/n``, counting from 1; shards concatenate with `cat`.

    Raises:
        UsageError: it is no such pair.
    """
    from pmvis_core.errors import UsageError

    index, slash, count = shard.partition("/")
    valid = slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)
    if not valid:
        raise UsageError(f"`--shard {shard}`, expected `i/n` with 1 <= i <= n, such as `1/4`")
    return videos[int(index) - 1 :: int(count)]
