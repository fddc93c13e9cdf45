"""`pmvis filter`: keep the tracks that can be trusted, and tell why the others went."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from pmvis_cli.console import Console, get_console
from pmvis_cli.options import (
    STDIO_PATH,
    InputTracks,
    JsonFlag,
    parsed_list,
    refuse_terminal_output,
)

if TYPE_CHECKING:
    from pmvis_core.filter import FilterOutcome, FilterRule, SweepCell
    from pmvis_core.formats.ytvis import TrackSource


def filter_tracks(
    tracks: InputTracks = STDIO_PATH,
    topk: Annotated[
        str, typer.Option(metavar="K", help="Tracks kept in a video, best first; 0 keeps all.")
    ] = "0",
    pscore: Annotated[
        str, typer.Option(metavar="TAU", help="Least mean score of a track, from 0 to 1.")
    ] = "0",
    quality: Annotated[
        str,
        typer.Option(metavar="Q", help="Least agreement that `refine` measured, from 0 to 1."),
    ] = "0",
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", help="Where to write; `-` is stdout."),
    ] = STDIO_PATH,
    overlap: Annotated[
        float | None,
        typer.Option(
            metavar="IOU", min=0.0, max=1.0, help="Drop what lies on a better track by more."
        ),
    ] = None,
    keep_ignored: Annotated[
        bool,
        typer.Option(
            "--keep-ignored", help="Set dropped tracks aside: neither object nor background."
        ),
    ] = False,
    explain: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON lines: every dropped track with its reason."),
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Count what a grid of K and TAU would keep; write nothing."),
    ] = False,
    fail_empty: Annotated[
        bool, typer.Option("--fail-empty", help="Exit 1 if no track is kept.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Keep each video's tracks with mean score TAU or more, and of those the K best.

    --quality keeps those on which the image model and the propagation agree (mean IoU Q or more).

    Examples:
      pmvis filter raw.tracks.jsonl --topk 4 --pscore 0.2 -o kept.tracks.jsonl
      pmvis refine raw.tracks.jsonl --frames videos/ | pmvis filter --topk 4 > kept.tracks.jsonl
      pmvis filter raw.tracks.jsonl --sweep --topk 0:5 --pscore 0,.1,.2,.3

    Reads: a tracks file or YouTube-VIS JSON; no picture, no network.
    Writes: a tracks file; with --explain why each track went; with --sweep a table only
      (--topk, --pscore and --quality take lists `0,1,2` and ranges `1:5`, `0:1:0.1`).

    next: `pmvis train-video --pseudo kept.tracks.jsonl --frames videos/ --init RUN -o RUN2`
    """
    from pmvis_core.filter import FilterRule
    from pmvis_core.formats.ytvis import open_tracks

    console = get_console()
    topks = parsed_list(topk, "--topk", int)
    pscores = parsed_list(pscore, "--pscore", float)
    qualities = parsed_list(quality, "--quality", float)
    if sweep:
        _show_sweep(open_tracks(tracks), topks, pscores, qualities, overlap, as_json=json)
        return
    _refuse_lists(topks, pscores, qualities, as_json=json)
    rule = FilterRule(topks[0], pscores[0], overlap, keep_ignored, qualities[0])
    refuse_terminal_output(output)
    kept, dropped = _run(console, open_tracks(tracks), rule, output, explain)
    console.say(f"filter: kept {kept} of {kept + dropped} tracks")
    if fail_empty and not kept:
        from pmvis_core.errors import AnswerIsNo

        raise AnswerIsNo(
            f"no track is kept of {dropped}", "lower `--pscore`; `--sweep` shows what would stay"
        )


def _run(
    console: Console, source: TrackSource, rule: FilterRule, output: Path, explain: Path | None
) -> tuple[int, int]:
    """Filter video by video; return how many tracks stay and how many go."""
    from pmvis_core.filter import filter_tracks as filter_video
    from pmvis_core.tracks_io import TracksWriter

    kept = dropped = 0
    header = source.header.extended("filter", **rule.as_json())
    names = {category.id: category.name for category in header.categories}
    with TracksWriter(output, header) as out, _explanations(explain) as notes:
        for video in console.progress(source, "filter"):
            outcome = filter_video(video, rule)
            out.write(outcome.kept)
            kept += len(outcome.kept.tracks)
            dropped += len(outcome.dropped)
            if notes is not None:
                notes.writelines(_notes(outcome, names))
    return kept, dropped


@contextmanager
def _explanations(path: Path | None) -> Iterator[IO[str] | None]:
    """Open the file of reasons if one is asked for."""
    if path is None:
        yield None
        return
    from pmvis_core.files import atomic_write

    with atomic_write(path) as stream:
        yield stream


def _notes(outcome: FilterOutcome, names: dict[int, str]) -> Iterator[str]:
    """Yield a JSON line for each dropped track of a video."""
    from pmvis_core.files import canonical_json

    info = outcome.kept.video
    for entry in outcome.dropped:
        line: dict[str, Any] = {
            "video_id": info.id,
            "video": info.name,
            "track": entry.track.id,
            "category": names[entry.track.category_id],
            "score": entry.track.score,
            "rule": entry.rule,
            "reason": entry.reason,
        }
        yield canonical_json(line) + "\n"


def _refuse_lists(*lists: list[Any], as_json: bool) -> None:
    """Refuse what only a sweep can do.

    Raises:
        UsageError: several values, or `--json`, without `--sweep`.
    """
    from pmvis_core.errors import UsageError

    if any(len(values) > 1 for values in lists):
        raise UsageError(
            "several values of `--topk`, `--pscore` or `--quality`", "add `--sweep`, or give one"
        )
    if as_json:
        raise UsageError("`--json` is for `--sweep`; tracks are JSON lines already")


def _show_sweep(
    source: TrackSource,
    topks: list[int],
    pscores: list[float],
    qualities: list[float],
    overlap: float | None,
    *,
    as_json: bool,
) -> None:
    """Count a grid and print it to stdout."""
    from pmvis_core.filter import sweep

    console = get_console()
    cells = sweep(console.progress(source, "filter --sweep"), topks, pscores, overlap, qualities)
    if as_json:
        console.emit_json({"cells": [asdict(cell) for cell in cells]})
    else:
        console.table(_sweep_table(cells), stdout=True)


def _sweep_table(cells: list[SweepCell]) -> Any:
    """Return a table with a row for each choice of K, tau and quality."""
    from rich.table import Table

    table = Table()
    for heading in ("topk", "pscore", "quality", "tracks", "videos", "categories"):
        table.add_column(heading, justify="right")
    for cell in cells:
        shares = f"{cell.pscore:g}", f"{cell.quality:g}"
        table.add_row(*map(str, (cell.topk, *shares, cell.tracks, cell.videos, cell.categories)))
    return table
