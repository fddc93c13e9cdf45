"""`pmvis join`: the shards of one run become the file of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pmvis_cli.options import STDIO_PATH, OutputPath


def join(
    shards: Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Shards 1/n to n/n.")],
    output: OutputPath = STDIO_PATH,
) -> None:
    """Join the files that `infer --shard 1/n` to `n/n` wrote, video by video in their first order.

    Examples:
      pmvis join raw.1.tracks.jsonl raw.2.tracks.jsonl -o raw.tracks.jsonl
      pmvis join shards/*.tracks.jsonl | pmvis filter --topk 4 > pseudo.tracks.jsonl

    Reads: the tracks files of all shards of one run, in the order of their numbers.
    Writes: a tracks file, byte for byte that of a run without shards.

    next: `pmvis refine raw.tracks.jsonl --frames videos/`
    """
    from pmvis_core.inference.shards import merge_shards

    merge_shards(shards, output)
