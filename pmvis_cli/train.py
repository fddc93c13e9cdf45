"""`pmvis train-image` and `pmvis train-video`: two stages, one run loop."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from pmvis_cli.console import get_console
from pmvis_cli.options import Device, JsonFlag, Overwrite, Seed, Settings
from pmvis_cli.train_options import (
    Accumulate,
    BoxLoss,
    BoxLossAll,
    CheckpointActivations,
    Compile,
    ConfigFile,
    Dropped,
    DryRun,
    FreezeMaskHead,
    Images,
    Init,
    InitBackbone,
    LabelledFrames,
    MaskLoss,
    Measure,
    OnError,
    Precision,
    Preset,
    PrintConfig,
    Processes,
    PseudoBoxLoss,
    PseudoLabels,
    PseudoMaskLoss,
    ReferenceQuirks,
    RunFolder,
    ScaleSchedule,
    Steps,
    StillsToLearn,
    StillsToMix,
    TensorBoard,
    Val,
    ValEvery,
    ValFrames,
    Workers,
)

if TYPE_CHECKING:
    from rich.table import Table

    from pmvis_core.training.run_folder import TrainJob, Validation

Config = TypeVar("Config")
"""A frozen dataclass of a run's numbers."""


def train_image(
    data: StillsToLearn,
    output: RunFolder,
    preset: Preset = "resnet50",
    config: ConfigFile = None,
    settings: Settings = None,
    steps: Steps = None,
    images: Images = None,
    init: Init = None,
    init_backbone: InitBackbone = None,
    mask_loss: MaskLoss = True,
    box_loss: BoxLoss = False,
    box_loss_all: BoxLossAll = False,
    freeze_mask_head: FreezeMaskHead = False,
    reference_quirks: ReferenceQuirks = False,
    seed: Seed = 0,
    device: Device = "auto",
    processes: Processes = 1,
    workers: Workers = None,
    on_error: OnError = None,
    accumulate: Accumulate = None,
    scale_schedule: ScaleSchedule = False,
    precision: Precision = None,
    checkpoint_activations: CheckpointActivations = False,
    compile_backbone: Compile = False,
    tensorboard: TensorBoard = False,
    val: Val = None,
    val_frames: ValFrames = None,
    val_every: ValEvery = None,
    overwrite: Overwrite = False,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
    measure: Measure = False,
    json: JsonFlag = False,
) -> None:
    """Train IDOL on single images as key/reference pairs: masks where there are masks.

    Examples:
      pmvis train-image --data maps/train_image.json -o runs/image
      pmvis train-image --data maps/train_image.json --preset tiny --processes 2 -o runs/tiny
      pmvis train-image --data maps/train_image.json --preset swin-l-ovis --init coco.pth -o R
      pmvis train-image --data maps/train_image.json --val valid.json --val-every 500 -o runs/image

    Reads: the training JSON of `map-categories` and its images.
    Writes: RUN/ with config.toml, run.json, metrics.jsonl and, last, model.safetensors; with
      --val also best.safetensors, unless the last weights are the best. The same command again
      continues an unfinished run.

    next: `pmvis infer --weights RUN --frames videos/ -o raw.tracks.jsonl`
    """
    from pmvis_core.systems.pmvis import ImageStage
    from pmvis_core.systems.presets import IMAGE_PRESETS, find_preset
    from pmvis_core.training.run_folder import TrainJob

    settings = _with_options(
        settings,
        reference_quirks=reference_quirks or None,
        on_error=on_error,
        accumulate=accumulate,
        precision=precision,
        checkpoint_activations=checkpoint_activations or None,
        compile=compile_backbone or None,
    )
    found = find_preset(IMAGE_PRESETS, preset)
    resolved = resolve(found, config, settings, steps, print_config, scale_schedule)
    _refuse_unlearnt_masks(mask_loss or box_loss or box_loss_all, init)
    stage = ImageStage(data, images, box_loss, freeze_mask_head, mask_loss, box_loss_all)
    job = TrainJob(stage, resolved, output, seed, init, init_backbone, device, processes)
    validation = validation_of(val, val_frames, val_every)
    job = replace(job, tensorboard=tensorboard, validation=validation)
    run(job, overwrite, dry_run or measure, json, workers, measure)


def train_video(
    pseudo: PseudoLabels,
    output: RunFolder,
    frames: LabelledFrames = None,
    init: Init = None,
    preset: Preset = "",
    config: ConfigFile = None,
    settings: Settings = None,
    steps: Steps = None,
    mask_loss: PseudoMaskLoss = True,
    box_loss: PseudoBoxLoss = True,
    data: StillsToMix = None,
    images: Images = None,
    dropped: Dropped = None,
    reference_quirks: ReferenceQuirks = False,
    seed: Seed = 0,
    device: Device = "auto",
    processes: Processes = 1,
    workers: Workers = None,
    on_error: OnError = None,
    accumulate: Accumulate = None,
    scale_schedule: ScaleSchedule = False,
    precision: Precision = None,
    checkpoint_activations: CheckpointActivations = False,
    compile_backbone: Compile = False,
    tensorboard: TensorBoard = False,
    val: Val = None,
    val_frames: ValFrames = None,
    val_every: ValEvery = None,
    overwrite: Overwrite = False,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
    measure: Measure = False,
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
    from pmvis_core.systems.pmvis import VideoStage
    from pmvis_core.systems.presets import VIDEO_PRESETS, find_preset
    from pmvis_core.training.run_folder import TrainJob

    _refuse_unlearnt_masks(mask_loss or box_loss, init)
    chosen = find_preset(VIDEO_PRESETS, preset or _preset_for(init))
    settings = _with_options(
        settings,
        reference_quirks=reference_quirks or None,
        on_error=on_error,
        accumulate=accumulate,
        precision=precision,
        checkpoint_activations=checkpoint_activations or None,
        compile=compile_backbone or None,
    )
    resolved = resolve(chosen, config, settings, steps, print_config, scale_schedule)
    stage = VideoStage(pseudo, frames, mask_loss, box_loss, data, images, checked_dropped(dropped))
    job = TrainJob(stage, resolved, output, seed, init, None, device, processes)
    validation = validation_of(val, val_frames, val_every)
    job = replace(job, tensorboard=tensorboard, validation=validation)
    run(job, overwrite, dry_run or measure, json, workers, measure)


def validation_of(
    truth: Path | None, frames: Path | None, every: int | None, place: str = "--val-frames"
) -> Validation | None:
    """Return what `--val` and its companions say.

    Args:
        truth: `--val`.
        frames: where its frames or images lie.
        every: `--val-every`.
        place: the option of ``frames``.

    Raises:
        UsageError: a companion is alone.
    """
    from pmvis_core.errors import UsageError
    from pmvis_core.training.run_folder import Validation

    if truth is not None:
        return Validation(truth, frames, every)
    for name, value in ((place, frames), ("--val-every", every)):
        if value is not None:
            raise UsageError(f"`{name}` is for `--val`, which is missing", "give `--val JSON`")
    return None


def checked_dropped(dropped: str | None) -> str | None:
    """Return what `--dropped` says, checked.

    Raises:
        UsageError: it is neither of the two.
    """
    from pmvis_core.errors import UsageError

    if dropped not in (None, "ignore", "background"):
        raise UsageError(f"`--dropped {dropped}`, expected `ignore` or `background`")
    return dropped


def _refuse_unlearnt_masks(taught: bool, init: Path | None) -> None:
    """Refuse to train a model that would never learn a mask.

    Raises:
        UsageError: no loss teaches masks, and no model that knows them is given.
    """
    from pmvis_core.errors import UsageError

    if not taught and init is None:
        raise UsageError(
            "without mask losses and without BoxInst's masks are without any loss",
            "start from a model that has learnt them: `--init RUN`",
        )


def _with_options(settings: list[str] | None, **options: Any) -> list[str]:
    """Return the settings, with those of [train] that have an option of their own, if given."""
    given = [(name, value) for name, value in options.items() if value is not None]
    return [*(settings or []), *(f"train.{name}={_as_toml(value)}" for name, value in given)]


def _as_toml(value: Any) -> str:
    """Return a value as `--set` takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


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
    scale_schedule: bool = False,
) -> Config:
    """Layer file, environment and flags over a preset; print the result and stop if asked.

    With ``scale_schedule`` what nobody gave is made to suit the batch (`config.scaled_schedule`).

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
    if scale_schedule:
        resolved, origins = scaled(preset, resolved, origins)
    if print_config:
        typer.echo(to_toml(resolved, origins), nl=False)
        raise typer.Exit
    return resolved


def scaled(
    preset: Config, resolved: Config, origins: dict[str, str]
) -> tuple[Config, dict[str, str]]:
    """Return a config with its schedule scaled to its batch, and where its values come from.

    Args:
        preset: what the values started from, with a ``train`` section.
        resolved: the preset with settings over it.
        origins: of the settings that somebody gave, by dotted name; they stay.
    """
    from dataclasses import asdict

    from pmvis_core.config import TrainConfig, scaled_schedule

    before: TrainConfig = preset.train  # type: ignore[attr-defined]
    chosen: TrainConfig = resolved.train  # type: ignore[attr-defined]
    given = {name.removeprefix("train.") for name in origins if name.startswith("train.")}
    fitted = scaled_schedule(before, chosen, given)
    old, new = asdict(chosen), asdict(fitted)
    changed = {f"train.{name}": "--scale-schedule" for name in new if new[name] != old[name]}
    return replace(resolved, train=fitted), origins | changed  # type: ignore[type-var]


def run(
    job: TrainJob,
    overwrite: bool,
    dry_run: bool,
    json: bool,
    workers: int | None = None,
    measure: bool = False,
) -> None:
    """Train a job, or print its plan, with ``measure`` after some steps that are thrown away."""
    from pmvis_core.devices import find_device, usual_workers
    from pmvis_core.train import plan, train
    from pmvis_core.training.processes import is_first
    from pmvis_core.training.run_folder import clear_run_folder

    console = get_console()
    console.quiet |= not is_first()  # of those that torchrun started
    device = find_device(job.device)
    if workers is None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", job.processes))  # torchrun's
        workers = usual_workers(device, here)
    job = replace(job, device=str(device), workers=workers)
    if dry_run:
        facts = plan(job)
        if measure:
            from pmvis_core.training.estimate import measured

            facts["estimate"] = measured(job)
        if json:
            console.emit_json(facts)
        else:
            console.table(plan_table(facts), stdout=True)
        return
    if overwrite and is_first():
        _refuse_bad_validation(job)
        clear_run_folder(job)
    train(job, console.progress, lambda report: report.tell(console.say, console.detail))
    console.say(f"wrote {job.out}")


def _refuse_bad_validation(job: TrainJob) -> None:
    """Look at the videos to validate on while nothing is lost yet.

    Raises:
        DataError: they are not fit.
    """
    from pmvis_core.training.validation import find_held_out

    if job.validation is not None:
        find_held_out(job.validation, None)


def plan_table(facts: dict[str, Any]) -> Table:
    """Draw a plan: what is trained on what, by which losses."""
    from rich.table import Table

    table = Table(title=facts["title"], caption=facts["caption"], title_justify="left")
    for name in ("source", "supervision", "annotations", "losses"):
        table.add_column(name, justify="right" if name == "annotations" else "left")
    if "estimate" in facts:
        from pmvis_core.training.estimate import in_words

        table.caption = f"{facts['caption']}\n{in_words(facts['estimate'])}"
    for row in facts["rows"]:
        table.add_row(
            row["source"], row["supervision"], str(row["annotations"]), ", ".join(row["losses"])
        )
    return table
