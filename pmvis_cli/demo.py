"""`pmvis demo`: the whole paper on pictures that it draws itself, command by command."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pmvis_cli.console import Console, get_console
from pmvis_cli.options import JsonFlag, Overwrite, Seed

MODELS = ("image", "video", "control")
LABELS = ("raw", "refined", "kept")
MODEL_FILE = "model.safetensors"
GENTLE = "--set train.learning_rate=5e-4 --set train.warmup_steps=50"
"""What the control shares with the video stage's preset."""
STAMP = "demo.json"
"""What the demo was made with; a folder with another one is not continued."""


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
    """One command and the file or folder that appears when it is done."""

    arguments: tuple[str, ...]
    product: Path


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for everything it makes.")
    ] = Path("demo"),
    seed: Seed = 0,
    gap: Annotated[
        float, typer.Option(min=0.0, max=5.0, help="How far the videos' look is from the images'.")
    ] = 2.0,
    image_steps: Annotated[int, typer.Option(min=1, help="Steps of the image model.")] = 2400,
    video_steps: Annotated[
        int, typer.Option(min=1, help="Steps of the video model, and of its control.")
    ] = 700,
    topk: Annotated[int, typer.Option(min=0, help="Tracks kept in a video.")] = 3,
    pscore: Annotated[float, typer.Option(min=0.0, max=1.0, help="Least score kept.")] = 0.3,
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
    for group in plan(output, recipe):
        run_group(group, console)
    summarise(output, console, json)
    console.say(f"the demo took {time.monotonic() - begun:.0f} s; look at {output}/sheet.png")


def open_folder(folder: Path, recipe: Recipe, overwrite: bool) -> None:
    """Start a demo's folder, or continue one that was made with the same numbers.

    Raises:
        UsageError: it holds something else.
    """
    import shutil
    from dataclasses import asdict

    from pmvis_core.errors import UsageError
    from pmvis_core.files import canonical_json, write_json

    stamp = folder / STAMP
    if overwrite and stamp.exists():
        shutil.rmtree(folder)
    if stamp.exists() and stamp.read_text() != canonical_json(asdict(recipe)) + "\n":
        raise UsageError(
            f"`{folder}` holds a demo with other numbers", "give another `-o`, or `--overwrite`"
        )
    if not stamp.exists() and folder.exists() and any(folder.iterdir()):
        raise UsageError(f"`{folder}` is not empty and holds no demo", "give another `-o`")
    write_json(stamp, asdict(recipe))


def plan(folder: Path, recipe: Recipe) -> list[list[Step]]:
    """Return the commands in order; those of one group run side by side."""
    places = {
        "data": folder / "data",
        "maps": folder / "maps",
        "stills": folder / "maps/train_image.json",
        "train": folder / "data/videos/train.json",
        "valid": folder / "data/videos/valid.json",
        **{name: folder / name for name in MODELS},
        **{name: folder / f"{name}.tracks.jsonl" for name in LABELS},
    }

    def step(command: str, product: Path) -> Step:
        words = (word.format(**places, **vars(recipe)) for word in command.split())
        return Step(tuple(words), product)

    def infer(model: str, videos: str, output: Path) -> Step:
        command = f"infer --weights {{{model}}} --frames {{{videos}}} -o"
        return Step((*step(command, output).arguments, str(output)), output)

    def evaluate(model: str) -> Step:
        metrics = folder / f"{model}.metrics.json"
        tracks = str(folder / f"{model}.tracks.jsonl")
        return Step(("eval", tracks, "--gt", str(places["valid"]), "-o", str(metrics)), metrics)

    further = "--init {image} --steps {video_steps} --seed {seed}"
    return [
        [step("synth -o {data} --seed {seed} --gap {gap}", places["data"] / "synth.json")],
        [
            step(
                "map-categories --target {data}/target.json --coco {data}/coco/instances_train.json"
                " --imagenet-bbox {data}/imagenet/Annotations -o {maps}",
                places["stills"],
            )
        ],
        [
            step(
                "train-image --data {stills} --preset tiny --steps {image_steps} --seed {seed}"
                " --processes {processes} -o {image}",
                places["image"] / MODEL_FILE,
            )
        ],
        [
            infer("image", "train", places["raw"]),
            infer("image", "valid", folder / "image.tracks.jsonl"),
        ],
        [step("refine {raw} --frames {train} -o {refined}", places["refined"])],
        [
            step(
                "filter {refined} --topk {topk} --pscore {pscore} --overlap 0.5 --keep-ignored"
                " -o {kept}",
                places["kept"],
            )
        ],
        [
            step(
                f"train-video --pseudo {{kept}} --frames {{train}} {further} -o {{video}}",
                places["video"] / MODEL_FILE,
            ),
            step(
                f"train-image --data {{stills}} --preset tiny {further} {GENTLE} -o {{control}}",
                places["control"] / MODEL_FILE,
            ),
        ],
        [infer(model, "valid", folder / f"{model}.tracks.jsonl") for model in ("video", "control")],
        [evaluate(model) for model in MODELS],
    ]


def run_group(steps: Sequence[Step], console: Console) -> None:
    """Run the commands whose products are not there yet, side by side.

    Raises:
        PmvisError: a command failed; its own message is above.
    """
    from pmvis_core.errors import PmvisError

    waiting = [step for step in steps if not step.product.exists()]
    environment = os.environ if len(waiting) == 1 else {**os.environ, "OMP_NUM_THREADS": "1"}
    started = []
    for index, step in enumerate(waiting):
        console.say(f"$ pmvis {shlex.join(step.arguments)}")
        quiet = ("-q",) if index else ()
        command = [sys.executable, "-m", "pmvis_cli.app", *quiet, *step.arguments]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    codes = [process.wait() for process in started]
    for step, code in zip(waiting, codes, strict=True):
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
