"""`pmvis train-image` and `pmvis train-video`: two stages, one run loop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pmvis_cli.console import get_console
from pmvis_cli.options import Device, JsonFlag, Overwrite, Seed, Settings

if TYPE_CHECKING:
    from rich.table import Table

    from pmvis_core.training.run_folder import TrainJob

Config = TypeVar("Config")
"""A frozen dataclass of a run's numbers."""
RunFolder = Annotated[
    Path, typer.Option("-o", "--output", metavar="RUN", help="Run folder; an unfinished resumes.")
]
Preset = Annotated[
    str,
    typer.Option(metavar="NAME", help="tiny, mobilenet_v2, resnet50, resnet101 or swin-l."),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="TOML", help="Settings over the preset's.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Same as --set train.steps=N.")]
Images = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of the images; default: as the JSON says."),
]
Init = Annotated[
    Path | None,
    typer.Option(
        "--init",
        metavar="RUN|FILE",
        help="Start from a model of pmvis or IDOL, or a backbone.",
    ),
]
Processes = Annotated[
    int, typer.Option(min=1, help="Processes on this machine, one thread or GPU each.")
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the settings and their origins, and stop.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print which losses apply to what, and stop.")
]

ReferenceQuirks = Annotated[
    bool,
    typer.Option(
        "--reference-quirks",
        help="As the authors' code where it is plainly wrong: BoxInst's red and blue swapped.",
    ),
]


def train_image(
    data: Annotated[
        Path, typer.Option(metavar="JSON", help="train_image.json of `map-categories`.")
    ],
    output: RunFolder,
    preset: Preset = "resnet50",
    config: ConfigFile = None,
    settings: Settings = None,
    steps: Steps = None,
    images: Images = None,
    init: Init = None,
    init_backbone: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Classification weights of the backbone."),
    ] = None,
    box_loss: Annotated[
        bool, typer.Option("--box-loss", help="BoxInst losses for box-only instances.")
    ] = False,
    freeze_mask_head: Annotated[
        bool, typer.Option("--freeze-mask-head", help="Keep the mask branch as initialised.")
    ] = False,
    reference_quirks: ReferenceQuirks = False,
    seed: Seed = 0,
    device: Device = "auto",
    processes: Processes = 1,
    overwrite: Overwrite = False,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
    json: JsonFlag = False,
) -> None:
    """Train IDOL on single images as key/reference pairs: masks where there are masks.

    Examples:
      pmvis train-image --data maps/train_image.json -o runs/image
      pmvis train-image --data maps/train_image.json --preset tiny --processes 2 -o runs/tiny
      pmvis train-image --data maps/train_image.json --preset swin-l --set train.steps=9000 -o R

    Reads: the training JSON of `map-categories` and its images.
    Writes: RUN/ with config.toml, run.json, metrics.jsonl and, last, model.safetensors.
      The same command again continues an unfinished run.

    next: `pmvis infer --weights RUN --frames videos/ -o raw.tracks.jsonl`
    """
    from pmvis_core.systems.pmvis import ImageStage
    from pmvis_core.systems.presets import IMAGE_PRESETS, find_preset
    from pmvis_core.training.run_folder import TrainJob

    settings = _with_quirks(settings, reference_quirks)
    resolved = resolve(find_preset(IMAGE_PRESETS, preset), config, settings, steps, print_config)
    stage = ImageStage(data, images, box_loss, freeze_mask_head)
    job = TrainJob(stage, resolved, output, seed, init, init_backbone, device, processes)
    run(job, overwrite, dry_run, json)


def train_video(
    pseudo: Annotated[
        Path, typer.Option(metavar="TRACKS", help="Pseudo labels: tracks file or YouTube-VIS JSON.")
    ],
    output: RunFolder,
    frames: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where the labelled frames lie.")
    ] = None,
    init: Init = None,
    preset: Preset = "",
    config: ConfigFile = None,
    settings: Settings = None,
    steps: Steps = None,
    mask_loss: Annotated[
        bool, typer.Option("--mask-loss/--no-mask-loss", help="Mask losses of pseudo masks.")
    ] = True,
    box_loss: Annotated[
        bool, typer.Option("--box-loss/--no-box-loss", help="BoxInst losses of pseudo boxes.")
    ] = True,
    data: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="Stills to mix in by `train.image_share`."),
    ] = None,
    images: Images = None,
    reference_quirks: ReferenceQuirks = False,
    seed: Seed = 0,
    device: Device = "auto",
    processes: Processes = 1,
    overwrite: Overwrite = False,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
    json: JsonFlag = False,
) -> None:
    """Train on pseudo labels of videos, with mask losses and BoxInst losses together.

    Examples:
      pmvis train-video --pseudo kept.tracks.jsonl --frames videos/ --init runs/image -o runs/video
      pmvis train-video --pseudo valid.json --frames videos/ --init runs/image --no-box-loss -o R

    Reads: tracks (or YouTube-VIS JSON), their frames, and the model to start from.
    Writes: RUN/ as `train-image` does.

    next: `pmvis infer --weights RUN --frames videos/ | pmvis eval --gt valid.json`
    """
    from pmvis_core.errors import UsageError
    from pmvis_core.systems.pmvis import VideoStage
    from pmvis_core.systems.presets import VIDEO_PRESETS, find_preset
    from pmvis_core.training.run_folder import TrainJob

    if not mask_loss and not box_loss:
        raise UsageError("`--no-mask-loss` and `--no-box-loss` leave masks without any loss")
    chosen = find_preset(VIDEO_PRESETS, preset or _preset_for(init))
    settings = _with_quirks(settings, reference_quirks)
    resolved = resolve(chosen, config, settings, steps, print_config)
    stage = VideoStage(pseudo, frames, mask_loss, box_loss, data, images)
    job = TrainJob(stage, resolved, output, seed, init, None, device, processes)
    run(job, overwrite, dry_run, json)


def _with_quirks(settings: list[str] | None, reference_quirks: bool) -> list[str]:
    """Return the settings, with the published mistakes where they are asked for."""
    quirks = ["train.reference_quirks=true"] if reference_quirks else []
    return [*(settings or []), *quirks]


def _preset_for(init: Path | None) -> str:
    """Return the preset that fits the initial weights."""
    from pmvis_core.checkpoint import preset_for
    from pmvis_core.training.run_folder import preset_of

    if init is not None and init.is_dir():
        return preset_of(init)
    return (preset_for(init) if init is not None else None) or "resnet50"


def resolve(
    preset: Config,
    config: Path | None,
    settings: list[str] | None,
    steps: int | None,
    print_config: bool,
) -> Config:
    """Layer file, environment and flags over a preset; print the result and stop if asked.

    Raises:
        UsageError: a setting is unknown or of the wrong type.
    """
    from pmvis_core.config import environment_settings, layer, parse_settings, read_toml, to_toml

    file = {k: v for k, v in read_toml(config).items() if k != "preset"} if config else {}
    flags = parse_settings(settings or []) | ({"train.steps": steps} if steps else {})
    layers = [
        (f"config {config}", file),
        ("environment", environment_settings(preset, os.environ)),
        ("command line", flags),
    ]
    resolved, origins = layer(preset, layers)
    if print_config:
        typer.echo(to_toml(resolved, origins), nl=False)
        raise typer.Exit
    return resolved


def run(job: TrainJob, overwrite: bool, dry_run: bool, json: bool) -> None:
    """Train a job, or print its plan."""
    from dataclasses import replace

    from pmvis_core.devices import find_device
    from pmvis_core.train import plan, train
    from pmvis_core.training.run_folder import clear_run_folder

    console = get_console()
    job = replace(job, device=str(find_device(job.device)))
    if dry_run:
        facts = plan(job)
        if json:
            console.emit_json(facts)
        else:
            console.table(plan_table(facts), stdout=True)
        return
    if overwrite:
        clear_run_folder(job)
    train(job, console.progress, lambda report: report.tell(console.say, console.detail))
    console.say(f"wrote {job.out}")


def plan_table(facts: dict[str, Any]) -> Table:
    """Draw a plan: what is trained on what, by which losses."""
    from rich.table import Table

    table = Table(title=facts["title"], caption=facts["caption"], title_justify="left")
    for name in ("source", "supervision", "annotations", "losses"):
        table.add_column(name, justify="right" if name == "annotations" else "left")
    for row in facts["rows"]:
        table.add_row(
            row["source"], row["supervision"], str(row["annotations"]), ", ".join(row["losses"])
        )
    return table
