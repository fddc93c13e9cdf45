"""`pmvis train-propagator`: the tracker of `refine`, learned from stills alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pmvis_cli.console import get_console
from pmvis_cli.options import Device, JsonFlag, Overwrite, Seed, Settings
from pmvis_cli.train import resolve, validation_of
from pmvis_cli.train_options import (
    Accumulate,
    ConfigFile,
    Images,
    PrintConfig,
    Processes,
    RunFolder,
    Steps,
    TensorBoard,
    ValEvery,
    ValImages,
    ValStills,
)


def train_propagator(
    data: Annotated[
        Path,
        typer.Option(metavar="JSON", help="COCO instances; images with boxes only are left out."),
    ],
    output: RunFolder,
    variant: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="deaott (default), deaots, deaotb, r50_deaotl, aott, …"),
    ] = None,
    crop: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="Side of the clips: 16 k + 1; default: 465."),
    ] = None,
    config: ConfigFile = None,
    settings: Settings = None,
    steps: Steps = None,
    images: Images = None,
    init: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN|FILE", help="Start from a propagator, or ImageNet weights of its encoder."
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    processes: Processes = 1,
    accumulate: Accumulate = None,
    tensorboard: TensorBoard = False,
    val: ValStills = None,
    val_images: ValImages = None,
    val_every: ValEvery = None,
    overwrite: Overwrite = False,
    print_config: PrintConfig = False,
    json: JsonFlag = False,
) -> None:
    """Train the tracker of `refine` on clips made from stills, without any annotated video.

    A still's objects and those of a second one move over it; the masks of the first frame are
    given and those of the others are learned (the first stage of AOT and DeAOT).

    Examples:
      pmvis train-propagator --data maps/train_image.json --init mobilenet_v2.pth -o runs/deaot
      pmvis train-propagator --data train.json --crop 193 --set train.clips_per_batch=2 -o R
      pmvis train-propagator --data train.json --variant r50_deaotl --init r50.pth -o runs/r50
      pmvis train-propagator --data train.json --val val.json --val-every 2000 -o runs/deaot

    Reads: COCO instances with masks and their images.
    Writes: RUN/ with config.toml, run.json, metrics.jsonl and, last, model.safetensors; with
      --val also best.safetensors, unless the last weights are the best. The same command again
      continues an unfinished run.

    next: `pmvis refine raw.tracks.jsonl --method deaot --weights RUN --frames videos/`
    """
    from pmvis_core.devices import find_device
    from pmvis_core.propagator_training.pseudo_clips import StillClips
    from pmvis_core.propagator_training.train import (
        ClipStage,
        PropagatorConfig,
        PropagatorJob,
        check_job,
        train_propagator,
    )
    from pmvis_core.propagator_training.validation import check_clips
    from pmvis_core.training.processes import is_first
    from pmvis_core.training.run_folder import clear_run_folder

    flags = [f"variant={variant}"] if variant else []
    flags += [f"clip.crop={crop}"] if crop else []
    flags += [f"train.accumulate={accumulate}"] if accumulate else []
    defaults = PropagatorConfig()
    resolved = resolve(defaults, config, [*(settings or []), *flags], steps, print_config)
    place = str(find_device(device))
    told = validation_of(val, val_images, val_every, "--val-images")
    job = PropagatorJob(
        ClipStage(data, images), resolved, output, seed, init, place, processes, tensorboard, told
    )
    if overwrite and is_first():
        check_job(job)
        if told is not None:  # while nothing is lost yet
            check_clips(StillClips(told.truth, told.frames, resolved.clip), told)
        clear_run_folder(job)
    console = get_console()
    console.quiet |= not is_first()  # of those that torchrun started
    train_propagator(job, console.progress, lambda report: report.tell(console.say, console.detail))
    if json:
        console.emit_json({"run": str(output), "variant": resolved.variant})
    console.say(f"wrote {output}")
