"""Options that several commands share, so that they look and behave the same everywhere.

A command writes ``def refine(tracks: InputTracks = STDIO_PATH, output: OutputPath = STDIO_PATH)``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

STDIO_PATH = Path("-")
"""Standard input or output."""


def refuse_terminal_input(path: Path) -> Path:
    """Return ``path`` unless it is standard input and nobody pipes anything into it.

    Raises:
        UsageError: reading would wait for ever at the keyboard.
    """
    if path == STDIO_PATH and sys.stdin is not None and sys.stdin.isatty():
        from pmvis_core.errors import UsageError

        raise UsageError(
            "no input: standard input is a terminal",
            "name a tracks file, or pipe one in; `--help` shows examples",
        )
    return path


def refuse_terminal_output(path: Path) -> Path:
    """Return ``path`` unless it is standard output and that is a terminal.

    Raises:
        UsageError: masks would be spilt over the screen.
    """
    if path == STDIO_PATH and sys.stdout.isatty():
        from pmvis_core.errors import UsageError

        raise UsageError(
            "output is a terminal; use `-o FILE` or pipe", "for example `-o out.tracks.jsonl`"
        )
    return path


def _checked_input(ctx: typer.Context, path: Path) -> Path:
    """Check an input while options are parsed, but not while the shell completes them."""
    return path if ctx.resilient_parsing else refuse_terminal_input(path)


def _checked_output(ctx: typer.Context, path: Path) -> Path:
    """Check an output while options are parsed, but not while the shell completes them."""
    return path if ctx.resilient_parsing else refuse_terminal_output(path)


InputTracks = Annotated[
    Path,
    typer.Argument(
        metavar="[TRACKS]",
        help="Tracks file or YouTube-VIS JSON; `-` is standard input.",
        callback=_checked_input,
    ),
]
"""A tracks file, by default standard input."""

OutputPath = Annotated[
    Path,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        help="Where to write; `-` is standard output.",
        callback=_checked_output,
    ),
]
"""A file that appears whole or not at all, by default standard output."""

FramesPath = Annotated[
    Path,
    typer.Option(
        "--frames",
        metavar="PATH",
        help="Folder of frames, folder of such folders, video file, or YouTube-VIS JSON.",
    ),
]
"""Where the pictures are."""

Device = Annotated[
    str,
    typer.Option("--device", metavar="auto|cpu|cuda[:i]", help="Where the networks run."),
]
"""The device by name; ``auto`` takes a GPU if there is one."""

Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
"""The same seed, device class and version give the same bytes."""

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is already in the output folder.")
]
"""Leave to write over an existing folder."""

Resume = Annotated[
    bool, typer.Option("--resume", help="Continue where an interrupted run stopped.")
]
"""Leave to continue from ``NAME.part``."""

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="One setting by its name; repeatable."),
]
"""Settings over those of a preset or a model, such as ``train.steps=100``."""

Shard = Annotated[
    str,
    typer.Option(
        "--shard",
        metavar="i/n",
        help="Work on every n-th video; `pmvis join` puts shards together.",
    ),
]
"""Which part of the videos, counting from 1."""

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
"""Report as JSON, errors included."""


def prepare_folder(folder: Path, *, overwrite: bool, owned: tuple[str, ...]) -> None:
    """Refuse to mix outputs with what is already in a folder.

    Args:
        folder: the output folder; it need not exist.
        overwrite: allow replacing.
        owned: names of the files that the command is going to write.

    Raises:
        UsageError: the folder already holds one of them, or it is a file.
    """
    from pmvis_core.errors import UsageError

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`{folder}` is a file, expected a folder", "give another `-o`")
    present = [name for name in owned if (folder / name).exists()]
    if present and not overwrite:
        raise UsageError(
            f"`{folder}` already holds `{present[0]}`", "give another `-o`, or `--overwrite`"
        )


def parsed_shard(text: str) -> tuple[int, int]:
    """Parse ``i/n``, 1 <= i <= n.

    Raises:
        UsageError: it is something else.
    """
    from pmvis_core.errors import UsageError

    index, slash, count = text.partition("/")
    numbers = (int(index), int(count)) if index.isdigit() and count.isdigit() else (0, 0)
    if not slash or not 1 <= numbers[0] <= numbers[1]:
        raise UsageError(f"`--shard {text}`, expected `i/n` with 1 <= i <= n, such as `1/4`")
    return numbers


def parsed_list(text: str, what: str, number: Any) -> list[Any]:
    """Parse ``0,1,2``, ``1:5`` (both ends) or ``0:1:0.25`` (with a step).

    Args:
        text: what the user typed.
        what: the option's name for messages.
        number: ``int`` or ``float``.

    Raises:
        UsageError: it is none of these.
    """
    from pmvis_core.errors import UsageError

    values: list[Any] = []
    try:
        for piece in text.split(","):
            if ":" not in piece:
                values.append(number(piece))
                continue
            first, last, step = (*map(number, piece.split(":")), number(1))[:3]
            count = int((last - first) / step + 1e-9)
            values += [number(round(first + i * step, 10)) for i in range(count + 1)]
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"{what} is `{text}`, expected a number, a list `0,1,2` or a range `1:5`"
        ) from error
    if not values:
        raise UsageError(f"{what} is `{text}`, which holds no value")
    return values
