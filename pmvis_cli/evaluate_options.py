"""The options of `pmvis eval`, which has more of them than other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MORE = "What else to measure"
_WHICH = "Which videos"
_FORMS = "Folders"

Inputs = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="TRACKS",
        help="Tracks, results list, dataset, DAVIS or MOTS; `-` is standard input. With "
        "`--merge` the files of all shards.",
        show_default=False,
    ),
]
"""The predictions, or the parts to merge."""

Truth = Annotated[
    Path | None,
    typer.Option(
        "--gt", metavar="PATH", help="Ground truth: YouTube-VIS or OVIS JSON, DAVIS, MOTS."
    ),
]
"""The ground truth."""

Protocol = Annotated[
    str,
    typer.Option(metavar="ytvis|ovis", help="Whose evaluator; ovis adds occlusion groups."),
]
"""Whose AP."""

Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE", help="Write the numbers as JSON, too."),
]
"""Where the numbers go as JSON."""

FailUnder = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Exit 1 if a number is lower, as `AP50=0.3`."),
]
"""Floors for numbers by name."""

Strict = Annotated[bool, typer.Option("--strict", help="Refuse odd input instead of warning.")]
"""Leave to refuse."""

Threads = Annotated[int, typer.Option(min=0, help="How many to use; 0 for one a processor.")]
"""Of the compiled evaluator."""

PerCategory = Annotated[
    bool,
    typer.Option("--per-category", help="Show each category, too.", rich_help_panel=_MORE),
]
"""Longer tables."""

Errors = Annotated[
    bool,
    typer.Option(
        "--errors", help="Count each type of error and what it costs.", rich_help_panel=_MORE
    ),
]
"""The error breakdown."""

Worst = Annotated[
    int,
    typer.Option(metavar="N", min=0, help="List the N worst videos.", rich_help_panel=_MORE),
]
"""How many videos to list."""

Against = Annotated[
    Path | None,
    typer.Option(
        metavar="OTHER",
        help="Compare with other predictions: paired bootstrap over videos.",
        rich_help_panel=_MORE,
    ),
]
"""Predictions to compare with."""

Samples = Annotated[
    int,
    typer.Option(metavar="N", min=0, help="Draws of the comparison.", rich_help_panel=_MORE),
]
"""Of the bootstrap."""

DrawSeed = Annotated[int, typer.Option(min=0, help="Seed of the draws.", rich_help_panel=_MORE)]
"""Of the bootstrap."""

CurvesFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Precision-recall curves as numbers (.npz) or as a picture (.png).",
        rich_help_panel=_MORE,
    ),
]
"""Where the curves go."""

WithHota = Annotated[
    bool, typer.Option("--hota", help="HOTA, DetA and AssA.", rich_help_panel=_MORE)
]
"""Whether HOTA is wanted."""

LeastScore = Annotated[
    float | None,
    typer.Option(
        help="Least score of the predictions that HOTA counts; with all of a submission's it "
        "is low, for one an object is what it expects.",
        rich_help_panel=_MORE,
    ),
]
"""For HOTA."""

RegionBoundaryTask = Annotated[
    str | None,
    typer.Option(
        "--jf",
        metavar="TASK",
        help="J and F: `semi-supervised` or `unsupervised`.",
        rich_help_panel=_MORE,
    ),
]
"""Whether J and F are wanted, and how objects are assigned."""

Subset = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Count these videos only: ids or names, one a line, or JSON.",
        rich_help_panel=_WHICH,
    ),
]
"""Which videos count."""

ShardOf = Annotated[
    str | None,
    typer.Option(
        metavar="i/n",
        help="Match every n-th video and write a part to `-o`.",
        rich_help_panel=_WHICH,
    ),
]
"""Which part of the videos is matched."""

Merge = Annotated[
    bool,
    typer.Option("--merge", help="Add up the parts of all shards.", rich_help_panel=_WHICH),
]
"""Whether the inputs are parts."""

Binary = Annotated[
    bool,
    typer.Option(
        "--binary", help="DAVIS 2016: 255 is the object, not void.", rich_help_panel=_FORMS
    ),
]
"""How DAVIS folders are read."""

FirstFrame = Annotated[
    int,
    typer.Option(
        min=0,
        help="Number of the first frame in MOTS texts: 1 in MOTSChallenge.",
        rich_help_panel=_FORMS,
    ),
]
"""How MOTS texts are read."""
