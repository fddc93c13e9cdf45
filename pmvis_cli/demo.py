"""`pmvis demo`: the whole paper on pictures that it draws itself, command by command."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pmvis_cli.console import Console, get_console
from pmvis_cli.options import JsonFlag, Overwrite, Seed

MODELS = ("image", "video", "control")
LABELS = ("raw", "refined", "kept")
MODEL_FILE = "model.safetensors"
FURTHER = "--init {image} --steps {video_steps} --seed {seed}"
GENTLE = "--set train.learning_rate=7e-4 --set train.warmup_steps=50"
"""What the control shares with the video stage's preset."""
COMMANDS = (
    ("synth -o {data} --seed {seed} --gap {gap}", "drawn", ""),
    (
        "map-categories --target {data}/target.json --coco {data}/coco/instances_train.json"
        " --imagenet-bbox {data}/imagenet/Annotations -o {maps}",
        "stills",
        "drawn",
    ),
    (
        "train-image --data {stills} --preset tiny --steps {image_steps} --seed {seed}"
        " --processes {processes} -o {image}",
        "image_weights",
        "stills",
    ),
    (
        "infer --weights {image} --frames {train} --set row_score=0.2 -o {raw}",
        "raw",
        "image_weights",
    ),
    (
        f"train-image --data {{stills}} --preset tiny {FURTHER} {GENTLE} -o {{control}}",
        "control_weights",
        "image_weights",
    ),
    ("refine {raw} --frames {train} -o {refined}", "refined", "raw"),
    (
        "filter {refined} --topk {topk} --pscore {pscore} --overlap 0.5 -o {kept}",
        "kept",
        "refined",
    ),
    (
        f"train-video --pseudo {{kept}} --frames {{train}} --data {{stills}} {FURTHER}"
        " -o {video}",
        "video_weights",
        "kept",
    ),
)
"""Command, what it makes, and what it needs; names in braces are files and numbers of the demo."""
MEASUREMENTS = (
    ("infer --weights {run} --frames {valid} -o {tracks}", "tracks", "run_weights"),
    ("eval {tracks} --gt {valid} -o {metrics}", "metrics", "tracks"),
)
"""The same, for each model."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
"""One thread a command, since two run at once."""
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Recipe:
    """The numbers of a demo; the defaults are the measured ones (docs/performance.md)."""

    seed: int
    gap: float
    image_steps: int
    video_steps: int
    topk: int
    pscore: float
    processes: int


@dataclass(frozen=True)
class Step:
    """One command, and the files before and after it."""

    arguments: tuple[str, ...]
    product: Path
    """Appears when the command is done."""
    needs: tuple[Path, ...] = ()
    """Products of earlier steps that it reads."""


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for everything it makes.")
    ] = Path("demo"),
    seed: Seed = 0,
    gap: Annotated[
        float, typer.Option(min=0.0, max=5.0, help="How far the videos' look is from the images'.")
    ] = 1.75,
    image_steps: Annotated[int, typer.Option(min=1, help="Steps of the image model.")] = 2000,
    video_steps: Annotated[
        int, typer.Option(min=1, help="Steps of the video model, and of its control.")
    ] = 450,
    topk: Annotated[int, typer.Option(min=0, help="Tracks kept in a video.")] = 3,
    pscore: Annotated[float, typer.Option(min=0.0, max=1.0, help="Least score kept.")] = 0.35,
    processes: Annotated[int, typer.Option(min=1, help="Processes of the image stage.")] = 2,
    overwrite: Overwrite = False,
    json: JsonFlag = False,
) -> None:
    """Run PM-VIS+ from images to an AP table on a drawn micro-benchmark, in minutes on a CPU.

    Draws images with masks, images with boxes only and videos; trains on the images, labels the
    unlabelled videos, mends and filters the labels, trains on them, and measures three models on
    held-out videos: image, video, and a control that spent the video stage's steps on images.
    Every command is shown as it could be typed; the same command again continues.

    Examples:
      pmvis demo
      pmvis demo --seed 1 -o demo1

    Writes: DIR/ with every stage's files, result.md, result.json, sheet.png and overlay.mp4.

    next: `pmvis view DIR/video.tracks.jsonl --frames DIR/data/videos/valid.json -o more.png`
    """
    console = get_console()
    recipe = Recipe(seed, gap, image_steps, video_steps, topk, pscore, processes)
    open_folder(output, recipe, overwrite)
    begun = time.monotonic()
    run(plan(output, recipe), recipe.processes, console)
    summarise(output, console, json)
    console.say(f"the demo took {time.monotonic() - begun:.0f} s; look at {output}/sheet.png")


def open_folder(folder: Path, recipe: object, overwrite: bool, command: str = "demo") -> None:
    """Start the folder of a command of commands, or continue one made with the same options.

    Args:
        folder: for everything that it makes; COMMAND.json in it says what it was made with.
        recipe: the options, a dataclass.
        overwrite: remove what the same command made there before.
        command: whose folder it is.

    Raises:
        UsageError: it holds something else.
    """
    import shutil

    from pmvis_core.errors import UsageError
    from pmvis_core.files import canonical_json, write_json

    stamp = folder / f"{command.replace('-', '_')}.json"
    if overwrite and stamp.exists():
        shutil.rmtree(folder)
    if stamp.exists() and stamp.read_text() != canonical_json(vars(recipe)) + "\n":
        raise UsageError(
            f"`{folder}` was made by `pmvis {command}` with other options",
            "give another `-o`, or `--overwrite`",
        )
    if not stamp.exists() and folder.exists() and any(folder.iterdir()):
        raise UsageError(
            f"`{folder}` is not empty and was not made by `pmvis {command}`", "give another `-o`"
        )
    write_json(stamp, vars(recipe))


def plan(folder: Path, recipe: Recipe) -> list[Step]:
    """Return the commands in an order in which they can run."""
    places = {
        "data": folder / "data",
        "maps": folder / "maps",
        "drawn": folder / "data/synth.json",
        "stills": folder / "maps/train_image.json",
        "train": folder / "data/videos/train.json",
        "valid": folder / "data/videos/valid.json",
        **{name: folder / f"{name}.tracks.jsonl" for name in LABELS},
        **{name: folder / name for name in MODELS},
        **{f"{name}_weights": folder / name / MODEL_FILE for name in MODELS},
    }
    steps = [
        make_step(command, product, needs, {**places, **vars(recipe)})
        for command, product, needs in COMMANDS
    ]
    for name in MODELS:
        places["run"], places["run_weights"] = places[name], places[f"{name}_weights"]
        places["tracks"] = folder / f"{name}.tracks.jsonl"
        places["metrics"] = folder / f"{name}.metrics.json"
        steps += [make_step(*row, places) for row in MEASUREMENTS]
    return steps


def make_step(command: str, product: str, needs: str, words: Mapping[str, object]) -> Step:
    """Fill in a row of `COMMANDS` or `MEASUREMENTS`."""
    arguments = tuple(word.format(**words) for word in command.split())
    paths = [Path(str(words[name])) for name in (product, *needs.split())]
    return Step(arguments, paths[0], tuple(paths[1:]))


def run(steps: Sequence[Step], workers: int, console: Console) -> None:
    """Run the commands whose products are not there yet, some side by side.

    Args:
        steps: in an order in which they can run.
        workers: how many may run at once, with one thread each.
        console: shows each command; of those that run at once, one shows its progress.

    Raises:
        PmvisError: a command failed; its own message is above.
    """
    waiting = [step for step in steps if not step.product.exists()]
    running: dict[subprocess.Popen[bytes], Step] = {}
    try:
        while waiting or running:
            ready = [s for s in waiting if all(need.exists() for need in s.needs)]
            for step in ready[: workers - len(running)]:
                waiting.remove(step)
                running[start(step, bool(running), console)] = step
            time.sleep(POLL_SECONDS)
            for process in [p for p in running if p.poll() is not None]:
                check(running.pop(process), process.returncode)
    finally:
        for process in running:
            process.terminate()


def start(step: Step, quiet: bool, console: Console) -> subprocess.Popen[bytes]:
    """Start a command as a process of its own."""
    console.say(f"$ pmvis {shlex.join(step.arguments)}")
    command = [sys.executable, "-m", "pmvis_cli.app", *(["-q"] if quiet else []), *step.arguments]
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def check(step: Step, code: int) -> None:
    """Pass a command's failure on.

    Raises:
        PmvisError: with the command's own exit code.
    """
    from pmvis_core.errors import PmvisError

    if code:
        failure = PmvisError(
            f"`pmvis {step.arguments[0]}` failed with exit code {code}, see its message above",
            "the same `pmvis demo` again continues from there",
        )
        failure.exit_code = code
        raise failure


def summarise(folder: Path, console: Console, json: bool) -> None:
    """Write and show the tables, the contact sheet and the overlay video."""
    from pmvis_core.demo import measure, write_pictures
    from pmvis_core.files import canonical_json, write_json

    result = measure(folder)
    write_json(folder / "result.json", result)
    write_pictures(folder, result)
    if json:
        console.emit_json(result)
        return
    typer.echo((folder / "result.md").read_text(), nl=False)
    console.detail(canonical_json(result))
