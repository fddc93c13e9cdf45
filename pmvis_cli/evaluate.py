"""`pmvis eval`: average precision and recall, as the official evaluators count them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmvis_cli.console import get_console
from pmvis_cli.options import STDIO_PATH, InputTracks, JsonFlag

if TYPE_CHECKING:
    from pmvis_core.evaluation.curves import Evaluation


def evaluate(
    tracks: InputTracks = STDIO_PATH,
    *,
    truth: Annotated[
        Path,
        typer.Option("--gt", metavar="JSON", help="Ground truth: YouTube-VIS or OVIS JSON."),
    ],
    protocol: Annotated[
        str,
        typer.Option(metavar="ytvis|ovis", help="Whose evaluator; ovis adds occlusion groups."),
    ] = "ytvis",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write the numbers as JSON, too."),
    ] = None,
    fail_under: Annotated[
        float | None,
        typer.Option(metavar="AP", min=0.0, max=1.0, help="Exit 1 if AP is lower (0 to 1)."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse odd input instead of warning.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Measure tracks against ground truth: AP, AP50, AP75, AR, by size and by category.

    Examples:
      pmvis eval out.tracks.jsonl --gt valid.json
      pmvis infer --weights runs/video --frames valid.json | pmvis eval --gt valid.json --json
      pmvis eval results.json --gt ovis.json --protocol ovis -o metrics.json --fail-under 0.2

    Reads: a tracks file, a results list or a YouTube-VIS dataset (annotations without a score
      count with score 1), plain or gzip, and the ground truth.
    Writes: the official table and one line a category; with --json one object instead. Numbers
      are from 0 to 1; without ground truth they are -1 in the table and null in JSON.

    next: `pmvis view out.tracks.jsonl --frames videos/ -o sheet.png`
    """
    from pmvis_core.errors import UsageError
    from pmvis_core.evaluation import average_precision as stage
    from pmvis_core.evaluation.protocol import groups_of
    from pmvis_core.evaluation.tables import metrics
    from pmvis_core.files import write_json
    from pmvis_core.formats.predictions import Doubts, read_predictions
    from pmvis_core.formats.ytvis import read_dataset

    groups_of(protocol)
    if tracks == truth == STDIO_PATH:
        raise UsageError("tracks and ground truth cannot both come from standard input")
    doubts = Doubts()
    dataset = read_dataset(truth)
    stage.check_annotated(dataset)
    predictions = read_predictions(tracks, dataset, doubts)
    evaluation = stage.evaluate(
        dataset,
        predictions,
        protocol,
        strict=strict,
        doubts=doubts,
        progress=get_console().progress,
    )
    if output is not None:
        write_json(output, metrics(evaluation))
    _show(evaluation, json=json)
    _judge(evaluation.summary["AP"], fail_under, json=json)


def _show(evaluation: Evaluation, *, json: bool) -> None:
    """Print the numbers on stdout."""
    from pmvis_core.evaluation.tables import category_table, metrics, official_table

    if json:
        get_console().emit_json(metrics(evaluation))
        return
    sys.stdout.write(f"{official_table(evaluation)}\n\n{category_table(evaluation)}\n")


def _judge(ap: float | None, least: float | None, *, json: bool) -> None:
    """Exit 1 if AP is lower than asked for; with ``json`` stdout already holds its one object.

    Raises:
        AnswerIsNo: AP is lower, or there is none.
    """
    from pmvis_core.errors import AnswerIsNo

    if least is None or (ap is not None and ap >= least):
        return
    found = "AP has no value" if ap is None else f"AP is {ap:.4f}"
    problem = AnswerIsNo(f"{found}, `--fail-under` asks for {least:g}")
    if not json:
        raise problem
    get_console().error(problem.message, problem.hint)
    raise typer.Exit(problem.exit_code)
