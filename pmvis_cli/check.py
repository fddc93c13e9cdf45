"""`pmvis check`: every fault of a submission at once, and the zip that servers take."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmvis_cli.console import get_console
from pmvis_cli.options import STDIO_PATH, InputTracks, JsonFlag

if TYPE_CHECKING:
    from pmvis_core.submission.report import Example, Report

_STYLES = {"fault": "bold red", "warning": "bold yellow", "fix": "bold cyan", "sound": "bold green"}

_USUAL_LIMIT_BYTES = 300_000_000
"""What CodaLab takes unless a competition's organisers raise it."""


def check(
    source: InputTracks = STDIO_PATH,
    *,
    truth: Annotated[
        Path | None,
        typer.Option("--gt", metavar="JSON", help="The dataset that the submission is for."),
    ] = None,
    videos: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="The same without annotations, or a folder of videos."),
    ] = None,
    pack: Annotated[
        Path | None,
        typer.Option("--pack", metavar="ZIP", help="Write the zip to upload, if all is sound."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Count warnings as faults.")] = False,
    json: JsonFlag = False,
) -> None:
    r"""Find every fault of a submission to a challenge server, and pack what is sound.

    Examples:
      pmvis check results.json --videos valid.json
      pmvis check results.json --videos valid.json --strict --pack results.zip
      pmvis infer --weights runs/video --frames valid.json \
        | pmvis check - --videos valid.json --pack results.zip
      pmvis check results.json --gt valid.json --json | jq '.findings[] | {kind, count}'

    Reads: a results list; or a tracks file or dataset, which become one (as `convert --to results`
      makes it, under the ids of the expected videos and categories). Plain or gzip. What it is
      for: --gt or --videos, the published JSON, whose annotations are not read; or a folder with
      a folder of frames or a video file for each video, with ids from 1 in natural order.
    Writes: each kind of fault with its first places (entries and frames count from 0) and what to
      do; with --json one object. Exit 1 if there is a fault. --pack: a zip with `results.json`.

    next: upload results.zip, or `pmvis eval results.json --gt train.json`
    """
    from pmvis_core.errors import UsageError
    from pmvis_core.submission import check as stage
    from pmvis_core.submission import files
    from pmvis_core.submission.report import FAULT

    if (truth is None) == (videos is None):
        raise UsageError(
            "what the submission is for is unknown: one of `--gt` and `--videos` is needed",
            "`--videos valid.json`: the published file of the set that was labelled",
        )
    place = truth or videos
    assert place is not None
    if source == place == STDIO_PATH:
        raise UsageError("submission and videos cannot both come from standard input")
    if pack is not None and pack.suffix.lower() != ".zip":
        raise UsageError(f"--pack is `{pack}`, expected a name that ends in `.zip`")
    expected = files.read_expected(place)
    submission = files.open_submission(source, expected)
    report = stage.check(submission, expected, strict=strict, progress=get_console().progress)
    size = files.pack(submission, report, pack) if pack is not None and report.sound else None
    if json:
        packed = None if size is None else {"file": str(pack), "bytes": size}
        get_console().emit_json({**report.as_json(), "packed": packed})
    else:
        show_lines(_lines(report))
    hint = None if pack is None else f"`{pack}` was not written"
    judge(report.name, report.kinds(FAULT), hint, json=json)
    if size is not None:
        _tell_packed(pack, size)


def show_lines(lines: Iterable[tuple[str, str]]) -> None:
    """Print the lines of a report on stdout, in colours if that is a terminal.

    Args:
        lines: each with its label or none.
    """
    if not sys.stdout.isatty():
        told = (f"{label}: {text}" if label else text for label, text in lines)
        sys.stdout.write("\n".join(told) + "\n")
        return
    from rich.text import Text

    for label, text in lines:
        style = _STYLES.get(label.strip(), "")
        head = Text.assemble((f"{label}:", style), " ") if label else Text()
        get_console().table(head.append(text), stdout=True)


def _lines(report: Report) -> Iterator[tuple[str, str]]:
    """Yield the lines of a report, each with its label or none."""
    from pmvis_core.submission.report import counted

    parts = [counted(report.videos, "video"), counted(report.predictions, "prediction")]
    yield (
        "",
        f"{report.name} for {report.expected}: "
        + ", ".join([*parts, counted(report.masks, "mask")]),
    )
    for finding in report.findings:
        yield "", ""
        extent = f": {finding.extent}" if finding.extent else ""
        yield finding.severity, f"{finding.kind.what}{extent} ({finding.kind.name})"
        for example in finding.examples:
            if told := _told(example):
                yield "", f"  {told}"
        if finding.count > len(finding.examples):
            yield "", "  …"
        yield "  fix", finding.kind.fix
    if report.sound:
        yield "", ""
        yield "sound", "fit to be submitted"


def _told(example: Example) -> str:
    """Return an example as a line."""
    return ": ".join(filter(None, (example.place, example.text)))


def judge(name: str, faults: int, hint: str | None, *, json: bool) -> None:
    """Exit 1 if there is a fault; with ``json`` stdout already holds its one object.

    Args:
        name: of what was checked, as messages call it.
        faults: how many kinds of them there are.
        hint: what follows from them.
        json: whether the report was printed as JSON.

    Raises:
        AnswerIsNo: there is one.
    """
    from pmvis_core.errors import AnswerIsNo
    from pmvis_core.submission.report import counted

    if not faults:
        return
    problem = AnswerIsNo(f"{name} is not sound: {counted(faults, 'kind')} of faults", hint)
    if not json:
        raise problem
    get_console().error(problem.message, problem.hint)
    raise typer.Exit(problem.exit_code)


def _tell_packed(path: Path | None, size: int) -> None:
    """Say what was written, and whether a server may find it too large."""
    console = get_console()
    console.say(f"packed `{path}`: {size / 1e6:.1f} MB")
    if size > _USUAL_LIMIT_BYTES:
        console.warn(
            f"`{path}` has {size / 1e6:.0f} MB; CodaLab takes 300 MB unless the organisers raised "
            "that: keep fewer predictions a video, for example with `pmvis filter --topk 10`"
        )
