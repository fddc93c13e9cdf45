"""`pmvis synth`: draw the micro-benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pmvis_cli.console import get_console
from pmvis_cli.options import Overwrite, Seed


def synth(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the benchmark.")
    ],
    seed: Seed = 0,
    gap: Annotated[
        float | None,
        typer.Option(
            "--gap",
            min=0.0,
            max=5.0,
            help="How far the videos' look is from the stills': 0 is the same, 1.75 the default.",
        ),
    ] = None,
    clutter: Annotated[
        float | None,
        typer.Option(
            "--clutter",
            min=0.0,
            max=5.0,
            help="Things of no category and occluders in the videos: 0 is none, 1 is many.",
        ),
    ] = None,
    train_videos: Annotated[
        int | None, typer.Option("--train-videos", min=0, help="Unlabelled videos.")
    ] = None,
    valid_videos: Annotated[
        int | None, typer.Option("--valid-videos", min=0, help="Held-out labelled videos.")
    ] = None,
    stills: Annotated[
        tuple[int, int] | None,
        typer.Option("--stills", metavar="MASKS BOXES", help="Stills with masks, with boxes."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw the micro-benchmark: seven shapes, three of which have boxes but no masks.

    Writes stills with masks (COCO), stills with boxes (ImageNet-bbox), unlabelled videos,
    held-out labelled videos (YouTube-VIS) and the target vocabulary. The same seed gives the same
    bytes. Examples:

        pmvis synth -o synth/ --seed 0
        pmvis synth -o easy/ --gap 0.5 --train-videos 40
        pmvis synth -o hard/ --clutter 1

    Next: pmvis map-categories --target synth/target.json --coco synth/coco/instances_train.json
          --imagenet-bbox synth/imagenet/Annotations -o data/
    """
    from pmvis_core.synthetic.benchmark import SynthConfig, draw

    chosen = {
        "gap": gap,
        "strangers": clutter,
        "train_videos": train_videos,
        "valid_videos": valid_videos,
        "mask_stills": None if stills is None else stills[0],
        "box_stills": None if stills is None else stills[1],
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    config = SynthConfig(**given)  # type: ignore[arg-type]
    console = get_console()
    draw(output, seed, config, console.progress, overwrite=overwrite)
    console.say(
        f"drew {config.mask_stills} + {config.box_stills} stills, {config.train_videos} unlabelled "
        f"and {config.valid_videos} held-out videos into `{output}`"
    )
