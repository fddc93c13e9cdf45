"""`pmvis self-train`: label, mend, filter and train again, command by command, while it helps."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmvis_cli.console import Console, get_console
from pmvis_cli.demo import MODEL_FILE, Step, open_folder
from pmvis_cli.options import Device, FramesPath, JsonFlag, Overwrite, Seed, Settings
from pmvis_cli.train import checked_dropped

if TYPE_CHECKING:
    from pmvis_core.self_train import Consistency


@dataclass(frozen=True)
class Recipe:
    """What `self-train` was asked for; paths as they were typed."""

    init: str
    frames: str
    rounds: int
    held_out: float
    seed: int
    gt: str
    device: str
    filter: tuple[str, ...]
    """Words of `filter`."""
    refine: tuple[str, ...]
    """Words of `refine`."""
    train: tuple[str, ...]
    """Words of `train-video`."""


def self_train(
    init: Annotated[
        Path, typer.Option("--init", metavar="RUN", help="The image model that labels first.")
    ],
    frames: FramesPath,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder; an unfinished resumes.")
    ],
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Most rounds.")] = 3,
    topk: Annotated[int, typer.Option(min=0, metavar="K", help="Of `filter`; 0 keeps all.")] = 4,
    pscore: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="TAU", help="Of `filter`.")
    ] = 0.2,
    quality: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="Q", help="Of `filter`; 0 asks for none.")
    ] = 0.0,
    overlap: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, metavar="IOU", help="Of `filter`.")
    ] = None,
    dropped: Annotated[
        str | None, typer.Option(metavar="ignore|background", help="Of `train-video`.")
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="flow|deaot|sam2", help="Of `refine`; `flow` needs no weights.")
    ] = "flow",
    weights: Annotated[
        Path | None, typer.Option(metavar="RUN|FILE", help="Of `refine`: the propagator's.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Of `train-video`: stills to mix in.")
    ] = None,
    preset: Annotated[str, typer.Option(metavar="NAME", help="Of `train-video`.")] = "",
    steps: Annotated[int | None, typer.Option(min=1, help="Of `train-video`, a round.")] = None,
    settings: Settings = None,
    held_out: Annotated[
        float,
        typer.Option(
            min=0.0, max=0.9, metavar="SHARE", help="Videos that judge a round and never train it."
        ),
    ] = 0.2,
    gt: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="Annotated videos: AP a round, for the table only."),
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: JsonFlag = False,
) -> None:
    """Repeat infer, refine, filter and train-video, each time with the model of the round before.

    Stops after N rounds, or when the labels of held-out videos become no more consistent: how far
    the model's tracks agree with themselves propagated both ways, and with those of the model
    before. The most consistent round's model becomes DIR/model.safetensors. Agreement is not
    truth: `--gt` shows AP beside it. Every command is shown as it could be typed; the same
    command again continues.

    Examples:
      pmvis self-train --init runs/image --frames videos/ -o runs/self
      pmvis self-train --init runs/image --frames train.json --gt valid.json --quality 0.5 -o R

    Reads: a model, unlabelled videos, and for `deaot` and `sam2` a propagator's weights.
    Writes: DIR/round-0/ with the labels of RUN, DIR/round-i/ with model and labels of each round,
      result.json, and the final model, so that DIR is a run folder.

    next: `pmvis infer --weights DIR --frames videos/ -o tracks.jsonl`
    """
    console = get_console()
    recipe = Recipe(
        init=str(init),
        frames=str(frames),
        rounds=rounds,
        held_out=held_out,
        seed=seed,
        gt=str(gt or ""),
        device=device,
        filter=(
            *("--topk", str(topk), "--pscore", f"{pscore:g}"),
            *(("--quality", f"{quality:g}") if quality else ()),
            *_given("--overlap", overlap),
            *(("--keep-ignored",) if dropped == "ignore" else ()),
        ),
        refine=(
            *("--method", method, *_given("--weights", weights)),
            *(("--device", device) if method != "flow" else ()),
        ),
        train=(
            *(*_given("--data", data), *_given("--steps", steps)),
            *_given("--dropped", checked_dropped(dropped)),
            *(("--preset", preset) if preset else ()),
            *(word for setting in settings or () for word in ("--set", setting)),
        ),
    )
    open_folder(output, recipe, overwrite, "self-train")
    result = run_rounds(output, recipe, console)
    if json:
        console.emit_json(result)
    else:
        console.table(_table(result), stdout=True)
    console.say(f"the model of round {result['best']} is {output}/{MODEL_FILE}")


def _given(option: str, value: object) -> tuple[str, ...]:
    """Return an option with its value, or nothing for None."""
    return () if value is None else (option, str(value))


def label_steps(folder: Path, recipe: Recipe, number: int) -> list[Step]:
    """Return the commands by which the model of a round labels the videos; round 0 is ``init``."""
    here = folder / f"round-{number}"
    model = here / "model" if number else Path(recipe.init)
    raw, refined, kept = (here / f"{name}.tracks.jsonl" for name in ("raw", "refined", "kept"))
    with_model = ("infer", "--weights", str(model), "--device", recipe.device)
    videos = ("--frames", recipe.frames)
    steps = [
        Step((*with_model, *videos, "--resume", "-o", str(raw)), raw),
        Step(
            ("refine", str(raw), *videos, *recipe.refine, "--resume", "-o", str(refined)), refined
        ),
        Step(("filter", str(refined), *recipe.filter, "-o", str(kept)), kept),
    ]
    if recipe.gt:
        found, metrics = here / "valid.tracks.jsonl", here / "metrics.json"
        steps += [
            Step((*with_model, "--frames", recipe.gt, "--resume", "-o", str(found)), found),
            Step(("eval", str(found), "--gt", recipe.gt, "-o", str(metrics)), metrics),
        ]
    return steps


def train_step(folder: Path, recipe: Recipe, number: int) -> Step:
    """Return the command that trains the model of a round on the labels of the one before."""
    before, run = folder / f"round-{number - 1}", folder / f"round-{number}/model"
    start = before / "model" if number > 1 else Path(recipe.init)
    labels = ("--pseudo", str(before / "learn.tracks.jsonl"), "--frames", recipe.frames)
    numbers = ("--seed", str(recipe.seed + number - 1), "--device", recipe.device)
    words = ("train-video", *labels, "--init", str(start), *recipe.train, *numbers, "-o", str(run))
    return Step(words, run / MODEL_FILE)


def run_rounds(folder: Path, recipe: Recipe, console: Console) -> dict[str, Any]:
    """Run the rounds that are not there yet, and put the final model into the folder.

    Returns:
        ``best``, ``stopped`` (whether before the last round), ``held_out`` (ids) and ``rounds``:
        ``own``, ``kept_on``, ``consistency``, ``tracks`` and, with ``gt``, ``AP`` of each.
    """
    from pmvis_core.files import write_json
    from pmvis_core.self_train import adopt, best_round, consistency, should_stop

    run_steps(label_steps(folder, recipe, 0), console)
    held = _learn_part(folder, recipe, 0, console)
    found: list[Consistency] = []
    for number in range(1, recipe.rounds + 1):
        before, here = folder / f"round-{number - 1}", folder / f"round-{number}"
        run_steps([train_step(folder, recipe, number)], console)
        run_steps(label_steps(folder, recipe, number), console)
        names = (here / "raw.tracks.jsonl", here / "kept.tracks.jsonl")
        found.append(consistency(*names, before / "kept.tracks.jsonl", held))
        console.say(f"round {number}: consistency {found[-1].mean:.3f} on {len(held)} videos")
        if held and should_stop([entry.mean for entry in found]):
            break
        _learn_part(folder, recipe, number, console)
    # nothing held out: nothing to compare by, so the last round counts
    best = best_round([entry.mean for entry in found]) if held else len(found)
    result = {
        "best": best,
        "stopped": len(found) < recipe.rounds,
        "held_out": sorted(held),
        "rounds": [_facts(folder, recipe, 0, None)]
        + [_facts(folder, recipe, n, entry) for n, entry in enumerate(found, start=1)],
    }
    write_json(folder / "result.json", result)
    adopt(folder / f"round-{best}/model", folder)
    return result


def _learn_part(folder: Path, recipe: Recipe, number: int, console: Console) -> frozenset[int]:
    """Write the labels that the next round learns from; return the videos that are held out."""
    from pmvis_core.formats.ytvis import open_tracks
    from pmvis_core.self_train import held_out, write_part

    kept = folder / f"round-{number}/kept.tracks.jsonl"
    learn = kept.with_name("learn.tracks.jsonl")
    held = held_out((video.video.id for video in open_tracks(kept)), recipe.held_out)
    if not learn.exists():
        count = write_part(kept, learn, held)
        console.say(f"{learn}: {count} tracks to learn from, {len(held)} videos held out")
    return held


def _facts(folder: Path, recipe: Recipe, number: int, found: Consistency | None) -> dict[str, Any]:
    """Return a round's row of the result."""
    from pmvis_core.files import read_json, significant
    from pmvis_core.formats.ytvis import open_tracks

    here = folder / f"round-{number}"
    tracks = sum(len(video.tracks) for video in open_tracks(here / "kept.tracks.jsonl"))
    row: dict[str, Any] = {"round": number, "tracks": tracks}
    if found is not None:
        row |= {"own": significant(found.own), "kept_on": significant(found.kept_on)}
        row["consistency"] = significant(found.mean)
    if recipe.gt:
        row["AP"] = read_json(here / "metrics.json", "metrics")["AP"]
    return row


def run_steps(steps: Sequence[Step], console: Console) -> None:
    """Run, one after another, the commands whose products are not there yet.

    Raises:
        PmvisError: a command failed, with its exit code; its own message is above.
    """
    from pmvis_core.errors import PmvisError

    for step in steps:
        if step.product.exists():
            continue
        console.say(f"$ pmvis {shlex.join(step.arguments)}")
        code = _run(step.arguments)
        if code:
            failure = PmvisError(
                f"`pmvis {step.arguments[0]}` failed with exit code {code}, see its message above",
                "the same `pmvis self-train` again continues from there",
            )
            failure.exit_code = code if code > 0 else 128 - code
            raise failure


def _run(arguments: Sequence[str]) -> int:
    """Run a command as a process and return its exit code; whoever ends this one ends it too."""
    command = [sys.executable, "-m", "pmvis_cli.app", *arguments]
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL) as process:
            try:
                return process.wait()
            except BaseException:
                process.terminate()
                raise
    finally:
        signal.signal(signal.SIGTERM, usual)


def _table(result: dict[str, Any]) -> Any:
    """Return a table with a row for each round."""
    from rich.table import Table

    known = ("round", "tracks", "own", "kept_on", "consistency", "AP")
    heads = [head for head in known if any(head in row for row in result["rounds"])]
    table = Table(caption=f"round {result['best']} is the final model")
    for head in heads:
        table.add_column(head.replace("_", " "), justify="right")
    for row in result["rounds"]:
        table.add_row(*(_cell(row.get(head)) for head in heads))
    return table


def _cell(value: float | None) -> str:
    """Return a figure for the table."""
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
