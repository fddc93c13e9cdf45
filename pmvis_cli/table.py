"""`pmvis table`: metrics of several runs and seeds as one table, beside the paper's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pmvis_cli.console import get_console
from pmvis_cli.options import JsonFlag


def table(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="A folder a seed, of metrics files.")
    ],
    paper: Annotated[
        str,
        typer.Option(
            "--paper", metavar="2|3|tau|5|6|dropped|rounds", help="Lay it out as this table."
        ),
    ] = "",
    rows: Annotated[
        list[str] | None,
        typer.Option("--row", metavar="ROW=NAME", help="The file of a row; repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Markdown, to keep.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Draw the metrics of several runs as one table: means over seeds with their intervals.

    With --paper the rows, the paper's AP beside ours, and which of its orderings hold.

    Examples:
      pmvis table build/tables/synth/seed0 build/tables/synth/seed1 --paper 3
      pmvis table runs/ -o table.md

    Reads: NAME.metrics.json of `pmvis eval -o` in each folder; a row is a NAME.
    Writes: Markdown on standard output and, with -o, to a file.

    next: `make table3 SEEDS="0 1 2"` makes what it reads
    """
    from pmvis_core.errors import UsageError
    from pmvis_core.files import atomic_write
    from pmvis_core.report.paper_tables import collect, find_table, markdown, plain_table

    files = {}
    for assignment in rows or []:
        key, equals, name = assignment.partition("=")
        if not equals:
            raise UsageError(f"`--row {assignment}` has no `=`", "write it as `--row 4=k4-t0.2`")
        files[key] = name
    layout = find_table(paper) if paper else plain_table(folders)
    result = collect(layout, folders, files)
    text = markdown(result)
    if output is not None:
        with atomic_write(output) as stream:
            stream.write(text)
    if json:
        get_console().emit_json(result)
    else:
        typer.echo(text, nl=False)
