"""`pmvis self-train`: label, mend, filter and train again, command by command, while it helps."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmvis_cli.children import run_command
from pmvis_cli.console import Console, get_console
from pmvis_cli.demo import MODEL_FILE, Step, open_folder
from pmvis_cli.options import Device, FramesPath, JsonFlag, Overwrite, Seed, Settings
from pmvis_cli.train import checked_dropped

if TYPE_CHECKING:
    from rich.table import Table

    from pmvis_core.self_train import Judge

Init = Annotated[
    Path, typer.Option("--init", metavar="RUN", help="The image model that labels first: round 0.")
]
Folder = Annotated[
    Path, typer.Option("-o", "--output", metavar="DIR", help="Folder; an unfinished resumes.")
]
Rounds = Annotated[
    int, typer.Option(min=1, metavar="N", help="Most rounds; a higher N continues a folder.")
]
Patience = Annotated[
    int, typer.Option(min=1, metavar="N", help="Rounds in a row without clear gain that end it.")
]
TopK = Annotated[int, typer.Option(min=0, metavar="K", help="Of `filter`; 0 keeps all.")]
PScore = Annotated[float, typer.Option(min=0.0, max=1.0, metavar="TAU", help="Of `filter`.")]
Quality = Annotated[
    float, typer.Option(min=0.0, max=1.0, metavar="Q", help="Of `filter`; 0 asks for none.")
]
Overlap = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, metavar="IOU", help="Of `filter`.")
]
Dropped = Annotated[str | None, typer.Option(metavar="ignore|background", help="Of `train-video`.")]
Method = Annotated[
    str, typer.Option(metavar="flow|deaot|sam2", help="Of `refine`; `flow` needs no weights.")
]
Weights = Annotated[
    Path | None, typer.Option(metavar="RUN|FILE", help="Of `refine`: the propagator's.")
]
RefinePScore = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, metavar="TAU", help="Of `refine`: leave out lower scores, to save time."
    ),
]
Data = Annotated[
    Path | None, typer.Option(metavar="JSON", help="Of `train-video`: stills to mix in.")
]
Preset = Annotated[str, typer.Option(metavar="NAME", help="Of `train-video`.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Of `train-video`, a round.")]
InferSettings = Annotated[
    list[str] | None,
    typer.Option("--infer-set", metavar="NAME=VALUE", help="As --set, but of `infer`, each round."),
]
HeldOut = Annotated[
    float,
    typer.Option(
        min=0.0, max=0.9, metavar="SHARE", help="Videos that judge a round and never train it."
    ),
]
Truth = Annotated[
    Path | None,
    typer.Option(metavar="JSON", help="Annotated videos: AP a round, for the table only."),
]
TruthFrames = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Frames of --gt, if not beside it.")
]


@dataclass(frozen=True)
class Recipe:
    """What decides the rounds' files; paths as they were typed."""

    init: str
    model: str
    """Digest of the model in ``init``."""
    frames: str
    held_out: float
    seed: int
    gt: str
    device: str
    topk: int
    overlap: float | None
    infer: tuple[str, ...]
    """Words of `infer`."""
    refine: tuple[str, ...]
    """Words of `refine`."""
    filter: tuple[str, ...]
    """Words of `filter`, besides ``topk`` and ``overlap``."""
    train: tuple[str, ...]
    """Words of `train-video`."""
    measure: tuple[str, ...]
    """Words of the `infer` whose tracks `eval` measures."""


def self_train(
    init: Init,
    frames: FramesPath,
    output: Folder,
    rounds: Rounds = 3,
    patience: Patience = 1,
    topk: TopK = 4,
    pscore: PScore = 0.2,
    quality: Quality = 0.0,
    overlap: Overlap = None,
    dropped: Dropped = None,
    method: Method = "flow",
    weights: Weights = None,
    refine_pscore: RefinePScore = 0.0,
    data: Data = None,
    preset: Preset = "",
    steps: Steps = None,
    settings: Settings = None,
    infer_settings: InferSettings = None,
    held_out: HeldOut = 0.2,
    gt: Truth = None,
    gt_frames: TruthFrames = None,
    device: Device = "auto",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: JsonFlag = False,
) -> None:
    """Repeat infer, refine, filter and train-video, each time with the model of the round before.

    Stops after N rounds, or when the labels of held-out videos become no more consistent, beyond
    the noise: how far a model's masks agree with their propagation both ways in time, over as many
    of its best labels as RUN has there. The most consistent round's model becomes
    DIR/model.safetensors; if that is round 0, it is RUN's. Agreement is not truth: `--gt` shows AP
    beside it. Every command is shown as it could be typed; the same command again continues.

    Examples:
      pmvis self-train --init runs/image --frames videos/ -o runs/self
      pmvis self-train --init runs/image --frames train.json --gt valid.json --quality 0.5 -o R

    Reads: a model, unlabelled videos, and for `deaot` and `sam2` a propagator's weights.
    Writes: DIR/round-0/ with the labels of RUN, DIR/round-i/ with model and labels of each round,
      result.json, and the final model, so that DIR is a run folder.

    next: `pmvis infer --weights DIR --frames videos/ -o tracks.jsonl`
    """
    console = get_console()
    recipe = Recipe(
        init=str(init),
        model=_digest_of(init),
        frames=str(frames),
        held_out=held_out,
        seed=seed,
        gt=str(gt or ""),
        device=device,
        topk=topk,
        overlap=overlap,
        infer=_repeated("--set", infer_settings),
        refine=_refine_words(method, weights, refine_pscore, device),
        filter=_filter_words(pscore, quality, checked_dropped(dropped), refine_pscore),
        train=(
            *(*_given("--data", data), *_given("--steps", steps), *_given("--dropped", dropped)),
            *(*_given("--preset", preset or None), *_repeated("--set", settings)),
        ),
        measure=_given("--root", gt_frames),
    )
    open_folder(output, recipe, overwrite, "self-train")
    result = run_rounds(output, recipe, rounds, patience, console)
    if json:
        console.emit_json(result)
    else:
        console.table(_table(result), stdout=True)
    console.say(f"the model of {_named(result['best'])} is {output}/{MODEL_FILE}")


def _digest_of(model: Path) -> str:
    """Return what tells one model from another under the same name; `infer` says if it is none."""
    from pmvis_core.files import digest_file

    file = model / MODEL_FILE if model.is_dir() else model
    return digest_file(file) if file.is_file() else "absent"


def _refine_words(method: str, weights: Path | None, pscore: float, device: str) -> tuple[str, ...]:
    """Return the words of `refine`."""
    words = ("--method", method, *_given("--weights", weights))
    return (
        *words,
        *_given("--pscore", pscore or None),
        *_given("--device", device, method != "flow"),
    )


def _filter_words(
    pscore: float, quality: float, dropped: str | None, refined_from: float
) -> tuple[str, ...]:
    """Return the words of `filter`, besides K and overlap.

    Raises:
        UsageError: tracks are to be set aside that `refine` leaves out.
    """
    from pmvis_core.errors import UsageError

    if dropped == "ignore" and refined_from:
        raise UsageError(
            "`--dropped ignore` needs every track, and `--refine-pscore` leaves some out",
            "leave one of the two out",
        )
    words = ("--pscore", f"{pscore:g}", *_given("--quality", quality or None))
    return (*words, *(("--keep-ignored",) if dropped == "ignore" else ()))


def _given(option: str, value: object, wanted: bool = True) -> tuple[str, ...]:
    """Return an option with its value, or nothing for None or one that is not wanted."""
    return () if value is None or not wanted else (option, str(value))


def _repeated(option: str, values: Sequence[str] | None) -> tuple[str, ...]:
    """Return an option once for each value."""
    return tuple(word for value in values or () for word in (option, value))


def _named(number: int) -> str:
    """Return how a person calls a round."""
    return f"round {number}" if number else "round 0 (the one that was given)"


def label_steps(folder: Path, recipe: Recipe, number: int) -> list[Step]:
    """Return the commands by which the model of a round labels the videos; round 0 is ``init``."""
    here = folder / f"round-{number}"
    model = here / "model" if number else Path(recipe.init)
    raw, refined, kept = (here / f"{name}.tracks.jsonl" for name in ("raw", "refined", "kept"))
    with_model = ("infer", "--weights", str(model), *recipe.infer, "--device", recipe.device)
    frames, best = ("--frames", recipe.frames), ("--topk", str(recipe.topk))
    rule = (*best, *_given("--overlap", recipe.overlap), *recipe.filter)
    refine = ("refine", str(raw), *frames, *recipe.refine, "--resume", "-o", str(refined))
    steps = [
        Step((*with_model, *frames, "--resume", "-o", str(raw)), raw),
        Step(refine, refined),
        Step(("filter", str(refined), *rule, "-o", str(kept)), kept),
    ]
    if recipe.gt:
        found, metrics = here / "valid.tracks.jsonl", here / "valid.metrics.json"
        with_truth = ("--frames", recipe.gt, *recipe.measure)
        steps += [
            Step((*with_model, *with_truth, "--resume", "-o", str(found)), found),
            Step(("eval", str(found), "--gt", recipe.gt, "-o", str(metrics)), metrics),
        ]
    return steps


def train_step(folder: Path, recipe: Recipe, number: int) -> Step:
    """Return the command that trains the model of a round on the labels of the one before."""
    before, run = folder / f"round-{number - 1}", folder / f"round-{number}/model"
    start = before / "model" if number > 1 else Path(recipe.init)
    labels = ("--pseudo", str(before / "learn.tracks.jsonl"), "--frames", recipe.frames)
    numbers = ("--seed", str(recipe.seed + number - 1), "--device", recipe.device)
    words = ("train-video", *labels, "--init", str(start), *recipe.train, *numbers, "-o", str(run))
    return Step(words, run / MODEL_FILE)


def run_rounds(
    folder: Path, recipe: Recipe, rounds: int, patience: int, console: Console
) -> dict[str, Any]:
    """Run the rounds that are not there yet, and put the final model into the folder.

    Returns:
        ``best``, ``stopped`` (whether before the last round), ``held_out`` (ids), ``labels`` (over
        how many the consistency is) and ``rounds``: ``round``, ``tracks``, ``consistency``,
        ``gain`` (over the best before), ``noise`` (its standard error), ``kept_on`` and, with
        ``gt``, ``AP`` of each.

    Raises:
        AnswerIsNo: the model that was given finds nothing to learn from.
        PmvisError: see `run_steps`.
    """
    from pmvis_core.files import write_json
    from pmvis_core.filter import FilterRule
    from pmvis_core.self_train import Judge, best_round, should_stop

    run_steps(label_steps(folder, recipe, 0), console)
    rule = FilterRule(recipe.topk, overlap=recipe.overlap)
    judge = Judge.of(folder / "round-0/kept.tracks.jsonl", recipe.held_out, rule)
    if not judge.labels:
        console.say(
            f"no label of {len(judge.held)} held-out videos to judge by: the last round counts"
        )
    rows: list[dict[str, Any]] = []
    _judge_round(folder, recipe, judge, rows, console)
    for number in range(1, rounds + 1):
        if not _learn_part(folder, number - 1, judge, console):
            break
        run_steps([train_step(folder, recipe, number)], console)
        run_steps(label_steps(folder, recipe, number), console)
        _judge_round(folder, recipe, judge, rows, console)
        gains = [(row["gain"], row["noise"]) for row in rows[1:] if judge.labels]
        if should_stop(gains, patience):
            break
    values = [row["consistency"] for row in rows] if judge.labels else []
    # with nothing to judge by, the last round that found anything counts
    best = best_round(values) if values else max(row["round"] for row in rows if row["tracks"])
    result = {
        "best": best,
        "stopped": len(rows) <= rounds,
        "held_out": sorted(judge.held),
        "labels": judge.labels,
        "rounds": rows,
    }
    write_json(folder / "result.json", result)
    _adopt(folder, recipe, best)
    return result


def _learn_part(folder: Path, number: int, judge: Judge, console: Console) -> int:
    """Write the labels that the next round learns from, and return how many there are.

    Raises:
        AnswerIsNo: the model that was given has none.
    """
    from pmvis_core.errors import AnswerIsNo
    from pmvis_core.self_train import count_tracks, write_part

    kept = folder / f"round-{number}/kept.tracks.jsonl"
    learn = kept.with_name("learn.tracks.jsonl")
    if not learn.exists():
        write_part(kept, learn, judge.held)
    count = count_tracks(learn)
    console.say(f"{learn}: {count} tracks to learn from, {len(judge.held)} videos held out")
    if not count and not number:
        raise AnswerIsNo(
            f"`{kept}` holds no track to learn from",
            "filter less strictly (`--pscore`, `--topk`, `--quality`) with `--overwrite`, or train "
            "the image model for longer",
        )
    return count


def _judge_round(
    folder: Path, recipe: Recipe, judge: Judge, rows: list[dict[str, Any]], console: Console
) -> None:
    """Add a row of the result to those of the rounds before it."""
    from pmvis_core.files import read_json, significant
    from pmvis_core.self_train import best_round, count_tracks

    number = len(rows)
    here = folder / f"round-{number}"
    kept, refined = here / "kept.tracks.jsonl", here / "refined.tracks.jsonl"
    row: dict[str, Any] = {"round": number, "tracks": count_tracks(kept)}
    if judge.labels:
        row["consistency"] = significant(judge.consistency(refined))
        rests = f"on {judge.labels} labels of {len(judge.held)} videos"
        console.say(f"round {number}: consistency {row['consistency']:.3f} {rests}")
    if number and judge.labels:
        best = best_round([row["consistency"] for row in rows])
        row["gain"] = significant(row["consistency"] - rows[best]["consistency"])
        row["noise"] = significant(judge.noise(folder / f"round-{best}" / refined.name, refined))
    if number:
        before = folder / f"round-{number - 1}" / kept.name
        row["kept_on"] = significant(judge.agreement(before, kept))
    if recipe.gt:
        row["AP"] = read_json(here / "valid.metrics.json", "metrics")["AP"]
    rows.append(row)


def _adopt(folder: Path, recipe: Recipe, number: int) -> None:
    """Make the folder a run folder with the model of a round.

    Raises:
        PmvisError: see `run_steps`.
    """
    from pmvis_core.self_train import adopt

    source = folder / f"round-{number}/model" if number else Path(recipe.init)
    if source.is_dir():
        adopt(source, folder)
        return
    # a file may be IDOL's own, of which a copy would be no model of ours
    model = folder / MODEL_FILE
    _run(Step(("convert-weights", str(source), str(model)), model))


def run_steps(steps: Sequence[Step], console: Console) -> None:
    """Run, one after another, the commands whose products are not there yet.

    Raises:
        PmvisError: see `_run`.
    """
    for step in steps:
        if not step.product.exists():
            console.say(f"$ pmvis {shlex.join(step.arguments)}")
            _run(step)


def _run(step: Step) -> None:
    """Run a command.

    Raises:
        PmvisError: it failed, with its exit code; its own message is above.
    """
    from pmvis_core.errors import PmvisError

    code = run_command(step.arguments)
    if code:
        failure = PmvisError(
            f"`pmvis {step.arguments[0]}` failed with exit code {code}, see its message above",
            "the same `pmvis self-train` again continues from there",
        )
        failure.exit_code = code if code > 0 else 128 - code
        raise failure


def _table(result: dict[str, Any]) -> Table:
    """Return a table with a row for each round."""
    from rich.table import Table

    known = ("round", "tracks", "consistency", "gain", "noise", "kept_on", "AP")
    heads = [head for head in known if any(head in row for row in result["rounds"])]
    rests = f"consistency over {result['labels']} labels; " if result["labels"] else ""
    table = Table(caption=f"{rests}{_named(result['best'])} is the final model")
    for head in heads:
        table.add_column(head.replace("_", " "), justify="right")
    for row in result["rounds"]:
        table.add_row(*(_cell(row.get(head)) for head in heads))
    return table


def _cell(value: float | None) -> str:
    """Return a figure for the table."""
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
