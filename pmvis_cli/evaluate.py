"""`pmvis eval`: average precision and recall, as the official evaluators count them, and more."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pmvis_cli.console import get_console
from pmvis_cli.evaluate_options import (
    Against,
    Binary,
    CurvesFile,
    DrawSeed,
    Errors,
    FailUnder,
    FirstFrame,
    Inputs,
    LeastScore,
    Merge,
    Output,
    PerCategory,
    Protocol,
    RegionBoundaryTask,
    Samples,
    ShardOf,
    Strict,
    Subset,
    Threads,
    Truth,
    WithHota,
    Worst,
)
from pmvis_cli.options import STDIO_PATH, JsonFlag, parsed_shard, refuse_terminal_input

if TYPE_CHECKING:
    from pmvis_core.evaluation.request import Report, Request

_ROUNDING = 1e-9
"""The official precision of a flawless start is a hair below 1, which is no reason to fail."""


def evaluate(
    tracks: Inputs = None,
    *,
    truth: Truth = None,
    protocol: Protocol = "ytvis",
    output: Output = None,
    fail_under: FailUnder = None,
    strict: Strict = False,
    threads: Threads = 0,
    json: JsonFlag = False,
    per_category: PerCategory = False,
    errors: Errors = False,
    worst: Worst = 0,
    against: Against = None,
    samples: Samples = 1000,
    seed: DrawSeed = 0,
    curves: CurvesFile = None,
    hota: WithHota = False,
    score: LeastScore = None,
    region_boundary: RegionBoundaryTask = None,
    subset: Subset = None,
    shard: ShardOf = None,
    merge: Merge = False,
    binary: Binary = False,
    first_frame: FirstFrame = 0,
) -> None:
    """Measure tracks against ground truth: AP, AP50, AP75, AR, by size and by category.

    Examples:
      pmvis eval out.tracks.jsonl --gt valid.json
      pmvis infer --weights runs/video --frames valid.json | pmvis eval --gt valid.json --json
      pmvis eval results.json --gt ovis.json --protocol ovis -o metrics.json --fail-under AP50=0.3
      pmvis eval new.json --gt valid.json --against old.json --errors --worst 10 --curves pr.png
      pmvis eval results/ --gt DAVIS/Annotations_unsupervised/480p --jf unsupervised
      pmvis eval results.json --gt valid.json --shard 3/8 -o 3.part; pmvis eval --merge *.part

    Reads: a tracks file, a results list or a YouTube-VIS dataset (annotations without a score
      count with score 1), plain or gzip, and the ground truth; DAVIS folders of PNGs and MOTS
      texts or PNGs, which give J and F, or HOTA, instead of AP.
    Writes: the official table; with --json one object instead. Numbers are from 0 to 1; without
      ground truth they are -1 in the table and null in JSON.

    next: `pmvis view out.tracks.jsonl --frames videos/ -o sheet.png`
    """
    from pmvis_core.errors import UsageError
    from pmvis_core.evaluation.protocol import groups_of
    from pmvis_core.evaluation.request import Request, answer, answer_parts

    groups_of(protocol)
    floors = _floors(fail_under or [])
    paths = tracks or [STDIO_PATH]
    if merge:
        request = Request(truth or STDIO_PATH, paths[0], strict=strict, per_category=per_category)
        _conclude(answer_parts(paths, request), floors, output, curves, json=json)
        return
    if truth is None:
        raise UsageError("no ground truth", "name it with `--gt valid.json`")
    if len(paths) > 1:
        raise UsageError(
            f"{len(paths)} inputs, expected one", "only `--merge` takes several: parts of a run"
        )
    if paths[0] == truth == STDIO_PATH:
        raise UsageError("tracks and ground truth cannot both come from standard input")
    request = Request(
        truth=truth,
        predictions=refuse_terminal_input(paths[0]),
        protocol=protocol,
        strict=strict,
        threads=threads,
        subset=subset,
        per_category=per_category,
        errors=errors,
        worst=worst,
        against=against,
        samples=samples,
        seed=seed,
        hota=hota,
        region_boundary=region_boundary,
        score=score,
        binary=binary,
        first_frame=first_frame,
    )
    if shard is not None:
        _write_part(request, shard, output)
        return
    report = answer(request, get_console().progress)
    _conclude(report, floors, output, curves, json=json)


def _write_part(request: Request, shard: str, output: Path | None) -> None:
    """Match the videos of a shard and write the part.

    Raises:
        UsageError: there is nowhere to write.
    """
    from pmvis_core.errors import UsageError
    from pmvis_core.evaluation.partial import save_part
    from pmvis_core.evaluation.request import shard_of

    if output is None:
        raise UsageError("a shard needs a file to write to", "name it with `-o 3.part`")
    save_part(output, shard_of(request, parsed_shard(shard), get_console().progress))


def _conclude(
    report: Report,
    floors: dict[str, float],
    output: Path | None,
    curves: Path | None,
    *,
    json: bool,
) -> None:
    """Write and print the numbers, and judge them."""
    from pmvis_core.files import write_json

    if output is not None:
        write_json(output, report.as_json())
    if curves is not None:
        _write_curves(report, curves)
    if json:
        get_console().emit_json(report.as_json())
    else:
        sys.stdout.write(report.as_text())
    _judge(report, floors, json=json)


def _write_curves(report: Report, path: Path) -> None:
    """Write the precision-recall curves as numbers or as a picture.

    Raises:
        UsageError: there are none, or the suffix says neither.
    """
    from pmvis_core.errors import UsageError
    from pmvis_core.evaluation.drawing import draw_curves, save_curves
    from pmvis_core.report.page import write_picture

    if report.evaluation is None:
        raise UsageError("`--curves` are those of AP", "give JSON or tracks")
    if path.suffix == ".npz":
        save_curves(path, report.evaluation)
    elif path.suffix in {".png", ".jpg", ".jpeg"}:
        write_picture(path, draw_curves(report.evaluation))
    else:
        raise UsageError(f"`--curves {path}`, expected a name that ends with .npz or .png")


def _floors(texts: list[str]) -> dict[str, float]:
    """Parse ``NAME=VALUE``; a value alone is of AP.

    Raises:
        UsageError: it is neither.
    """
    from pmvis_core.errors import UsageError

    found: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        try:
            found[name if equals else "AP"] = float(value)
        except ValueError:
            raise UsageError(
                f"`--fail-under {text}`, expected a name and a number, as `AP50=0.3`"
            ) from None
        if not 0.0 <= float(value) <= 1.0:
            raise UsageError(f"`--fail-under {text}`, expected a number from 0 to 1")
    return found


def _judge(report: Report, floors: dict[str, float], *, json: bool) -> None:
    """Exit 1 if a number is lower than asked for; with ``json`` stdout already holds its object.

    Raises:
        AnswerIsNo: a number is lower, or has no value.
        UsageError: there is no such number.
    """
    from pmvis_core.errors import AnswerIsNo, UsageError

    failed = []
    for name, least in floors.items():
        if name not in report.numbers:
            known = ", ".join(report.numbers)
            raise UsageError(f"`--fail-under {name}`: no such number here", f"there are {known}")
        value: Any = report.numbers[name]
        if value is None or value < least - _ROUNDING:
            found = f"{name} has no value" if value is None else f"{name} is {value:.4f}"
            failed.append(f"{found}, `--fail-under` asks for {least:g}")
    if not failed:
        return
    problem = AnswerIsNo("; ".join(failed))
    if not json:
        raise problem
    get_console().error(problem.message, problem.hint)
    raise typer.Exit(problem.exit_code)
