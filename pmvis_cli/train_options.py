"""The options of `pmvis train-image` and `pmvis train-video`; they share most of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFolder = Annotated[
    Path, typer.Option("-o", "--output", metavar="RUN", help="Run folder; an unfinished resumes.")
]
Preset = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="tiny, mobilenet_v2, resnet50, resnet101 or swin-l; the last three also with the "
        "data set's recipe: -coco, -ytvis2019, -ytvis2021, -ovis; -code behind one of videos is "
        "the authors' schedule.",
    ),
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
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Threads that make samples ahead, each process; default: 0 on a CPU, up to 8 on a "
        "GPU. The samples are the same.",
    ),
]
OnError = Annotated[
    str | None,
    typer.Option(
        metavar="skip|stop",
        help="Broken images: skip and name them, up to a tenth, or stop. Same as --set "
        "train.on_error=...",
    ),
]
Dropped = Annotated[
    str | None,
    typer.Option(
        metavar="ignore|background",
        help="What tracks that `filter --keep-ignored` set aside become; default: ignored regions, "
        "where the file holds any.",
    ),
]
Accumulate = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Take a step's batch in N parts, where memory is short; `train.pairs_per_batch` "
        "stays the whole.",
    ),
]
ScaleSchedule = Annotated[
    bool,
    typer.Option(
        "--scale-schedule",
        help="Where `train.pairs_per_batch` is not the preset's: scale the rate with it, and "
        "steps, milestones and warm-ups against it, but for what you give.",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(metavar="float32|bfloat16", help="What the network computes in; losses: float32."),
]
CheckpointActivations = Annotated[
    bool,
    typer.Option(
        "--checkpoint-activations", help="Less memory for up to a forward pass more; same result."
    ),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the backbone; for long runs on a GPU.")
]
TensorBoard = Annotated[
    bool,
    typer.Option(
        "--tensorboard", help="Losses for TensorBoard too; needs the extra `tensorboard`."
    ),
]
Measure = Annotated[
    bool,
    typer.Option(
        "--measure", help="As --dry-run, and take some steps to say how long and how much memory."
    ),
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
        help="As the authors' code where it is plainly wrong: BoxInst's red and blue swapped, "
        "boxes of unseen instances and empty frames misplaced.",
    ),
]
StillsToLearn = Annotated[
    Path, typer.Option("--data", metavar="JSON", help="train_image.json of `map-categories`.")
]
StillsToMix = Annotated[
    Path | None,
    typer.Option("--data", metavar="JSON", help="Stills to mix in by `train.image_share`."),
]
PseudoLabels = Annotated[
    Path, typer.Option(metavar="TRACKS", help="Pseudo labels: tracks file or YouTube-VIS JSON.")
]
LabelledFrames = Annotated[
    Path | None, typer.Option(metavar="PATH", help="Where the labelled frames lie.")
]
InitBackbone = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Classification weights of the backbone.")
]
MaskLoss = Annotated[
    bool, typer.Option("--mask-loss/--no-mask-loss", help="Mask losses where there are masks.")
]
BoxLoss = Annotated[bool, typer.Option("--box-loss", help="BoxInst losses for box-only instances.")]
BoxLossAll = Annotated[
    bool, typer.Option("--box-loss-all", help="BoxInst losses for every instance.")
]
PseudoMaskLoss = Annotated[
    bool, typer.Option("--mask-loss/--no-mask-loss", help="Mask losses of pseudo masks.")
]
PseudoBoxLoss = Annotated[
    bool, typer.Option("--box-loss/--no-box-loss", help="BoxInst losses of pseudo boxes.")
]
FreezeMaskHead = Annotated[
    bool, typer.Option("--freeze-mask-head", help="Keep the mask branch as initialised.")
]
Val = Annotated[
    Path | None,
    typer.Option(
        metavar="JSON",
        help="Ground truth of videos (YouTube-VIS) to measure AP on in the course of the run: "
        "best.safetensors is then the step of the highest AP. What is learnt stays the same.",
    ),
]
ValFrames = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="Where the frames of `--val` lie, if not beside it."),
]
ValStills = Annotated[
    Path | None,
    typer.Option(
        "--val",
        metavar="JSON",
        help="Held-out stills with masks (COCO instances) to measure J on, on clips made of them: "
        "best.safetensors is then the step of the highest J. What is learnt stays the same.",
    ),
]
ValImages = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where the images of `--val` lie; default: as the JSON says."),
]
ValEvery = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Steps between measurements; default: `train.save_every`."
    ),
]
