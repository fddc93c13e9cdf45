"""`pmvis check-data`: every fault of training data at once, before training meets it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmvis_cli.check import judge, show_lines
from pmvis_cli.console import get_console
from pmvis_cli.options import JsonFlag

if TYPE_CHECKING:
    from pmvis_core.data_check import Report


def check_data(
    data: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="COCO JSON, YouTube-VIS JSON or a tracks file."),
    ],
    *,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the images; default: beside the JSON."),
    ] = None,
    frames: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Where the videos' frames lie; default: beside FILE."),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Read the heads of image files only.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=0, help="Threads that read images; 0: one a processor.")
    ] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Count warnings as faults.")] = False,
    json: JsonFlag = False,
) -> None:
    r"""Find every fault of training data: annotations, images, frames of videos.

    Examples:
      pmvis check-data maps/train_image.json
      pmvis check-data annotations/instances_train2017.json --images train2017 --fast
      pmvis check-data kept.tracks.jsonl --frames videos/ --strict
      pmvis check-data train.json --json | jq '.findings[] | {kind, count}'

    Reads: COCO instances (stills), a YouTube-VIS data set or a tracks file (videos), and every
      image file that they name.
    Writes: each kind of fault with its first places (entries and frames count from 0) and what to
      do; with --json one object. Exit 1 if there is a fault.

    next: `pmvis train-image --data FILE -o RUN`, or `pmvis train-video --pseudo FILE -o RUN`
    """
    from pmvis_core.data_check import check_stills, check_videos
    from pmvis_core.data_check.kinds import is_stills
    from pmvis_core.errors import UsageError
    from pmvis_core.submission.report import FAULT

    stills = is_stills(data)
    if images is not None and not stills:
        raise UsageError("`--images` is for stills, and these are videos", "give `--frames`")
    if frames is not None and stills:
        raise UsageError("`--frames` is for videos, and these are stills", "give `--images`")
    look = check_stills if stills else check_videos
    report = look(
        data,
        images if stills else frames,
        fast=fast,
        strict=strict,
        workers=workers,
        progress=get_console().progress,
    )
    if json:
        get_console().emit_json(report.as_json())
    else:
        show_lines(_lines(report))
    hint = "training skips broken images, up to a tenth (`--on-error`), and stops at other faults"
    judge(report.name, report.kinds(FAULT), hint, json=json)


def _lines(report: Report) -> Iterator[tuple[str, str]]:
    """Yield the lines of a report, each with its label or none."""
    from pmvis_core.submission.report import counted

    looked_at = ", ".join(counted(count, unit) for unit, count in report.counts.items())
    yield "", f"{report.name}: {looked_at}"
    for finding in report.findings:
        yield "", ""
        extent = f": {finding.extent}" if finding.extent else ""
        yield finding.severity, f"{finding.kind.what}{extent} ({finding.kind.name})"
        for example in finding.examples:
            yield "", f"  {example}"
        if finding.count > len(finding.examples):
            yield "", "  …"
        yield "  fix", finding.kind.fix
    if report.sound:
        yield "", ""
        yield "sound", "fit to be trained on"
