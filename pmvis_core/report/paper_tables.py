"""The tables of PM-VIS+ with our figures beside the paper's, over several seeds.

A run of a table is a folder with ``NAME.metrics.json`` of `eval` for each row, a folder a seed. The
figures of a row are means over the seeds with a 95 % interval (Student); what the paper claims are
orderings of rows, which are tested on the differences seed by seed, for what a seed draws (weights,
order, on the drawn benchmark the data too) moves all rows together.

A row whose model could not be made has a metrics file that says only why (`NONE`).

A control is a model that spent the video stage's steps on images. The paper has none; here none of
its tables that show a video stage goes without. Two tables go beyond the paper: what becomes of
tracks that a filter drops, and rounds of self-training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from pmvis_core.errors import DataError, UsageError
from pmvis_core.files import read_json, significant

METRICS = ("AP", "AP50", "AP75", "AR1", "AR10")
"""The columns: keys of a metrics file."""
SUFFIX = ".metrics.json"
"""End of a metrics file's name."""
NONE = "none"
"""Key of a metrics file that has no figures: why it has none."""
ROUNDS = 3
"""Rounds of self-training that their table shows."""
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """One setting."""

    key: str
    """Its name, and its file's unless told otherwise."""
    caption: str
    """What a reader sees."""
    paper: str = ""
    """The paper's AP on YouTube-VIS 2019 with R50, in percent; empty where it is not known here."""


@dataclass(frozen=True)
class Claim:
    """One setting is better than another."""

    better: str
    """Key of a row."""
    worse: str
    """Key of a row."""
    of_paper: bool = True
    """Whether the paper's figures say so; else it is what a fair comparison asks for."""


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper as far as its figures are known."""

    title: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]


_IMAGE = Row("image", "image model, no video stage", "41.9")
_CONTROL = Row("control", "control: as many more steps on images")
_NO_PAPER = replace(_IMAGE, paper="")
"""The image model in a table that the paper has not."""
_AHEAD = (Claim("both", "image"), Claim("both", "control", of_paper=False))


def _claims(better: str, worse: Sequence[str], of_paper: bool = True) -> tuple[Claim, ...]:
    """Return that one row beats several."""
    return tuple(Claim(better, key, of_paper) for key in worse)


TABLES = {
    "2": PaperTable(
        "Table II: supervision of the image stage",
        (
            Row("masks", "masks where there are masks", "41.9"),
            Row("masks-boxinst-all", "the same, and BoxInst on everything", "40.4"),
            Row("masks-boxinst-box", "the same, and BoxInst on boxes only", "40.3"),
            Row("frozen", "masks, mask head frozen", "40.5"),
            Row("boxinst", "no masks, BoxInst on everything", "37.3"),
        ),
        _claims("masks", ("masks-boxinst-all", "masks-boxinst-box", "frozen", "boxinst"))
        + tuple(
            Claim(key, "boxinst") for key in ("masks-boxinst-all", "masks-boxinst-box", "frozen")
        ),
    ),
    "3": PaperTable(
        "Table III: K of TopK (0: no filter at all)",
        (
            _IMAGE,
            _CONTROL,
            Row("0", "K = 0", "41.2"),
            Row("1", "K = 1", "36.9"),
            *(Row(str(k), f"K = {k}", "44.7") for k in (2, 3, 4)),
            Row("5", "K = 5"),
        ),
        (
            *_claims("4", ("0", "1", "image")),
            Claim("0", "1"),
            Claim("image", "0"),
            Claim("4", "control", of_paper=False),
        ),
    ),
    "tau": PaperTable(
        "PScore: least mean score tau, K = 4 (the paper's table is missing; its text has these)",
        (
            _IMAGE,
            _CONTROL,
            Row("none", "no PScore", "40.9 (inferred from the text)"),
            Row("low", "a lower tau", ">= 42.8"),
            Row("chosen", "the chosen tau (paper: 0.2)", "44.7"),
            Row("high", "a higher tau", ">= 42.8"),
        ),
        (
            *_claims("chosen", ("none", "low", "high", "image")),
            Claim("low", "none"),
            Claim("high", "none"),
            Claim("chosen", "control", of_paper=False),
        ),
    ),
    "5": PaperTable(
        "Table V: losses of the video stage",
        (
            _IMAGE,
            _CONTROL,
            Row("neither", "class, box and re-id losses only"),
            Row("boxinst", "BoxInst", "43.3 or 40.2"),
            Row("mask", "mask losses", "43.3 or 40.2"),
            Row("both", "mask losses and BoxInst", "44.7"),
        ),
        (*_claims("both", ("mask", "boxinst")), *_AHEAD),
    ),
    "6": PaperTable(
        "Table VI: a better image model makes a better video model",
        tuple(
            Row(f"{model}{stage}", f"{caption}{what}")
            for model, caption in (
                ("early", "a quarter of the image steps"),
                ("boxinst", "no masks, BoxInst on everything"),
                ("masks", "masks where there are masks"),
            )
            for stage, what in (
                ("", ": image model"),
                ("-video", ": video"),
                ("-control", ": control"),
            )
        ),
        (
            *_claims("masks-video", ("early-video", "boxinst-video")),
            *(
                Claim(f"{model}-video", f"{model}{other}", of_paper=not other)
                for model in ("early", "boxinst", "masks")
                for other in ("", "-control")
            ),
        ),
    ),
    "dropped": PaperTable(
        "Tracks that the filter drops, of the same labels (beyond the paper)",
        (
            _NO_PAPER,
            _CONTROL,
            Row("background", "background, as in the paper"),
            Row("ignore", "ignored regions"),
        ),
        _claims("ignore", ("background", "image", "control"), of_paper=False)
        + _claims("background", ("image", "control"), of_paper=False),
    ),
    "rounds": PaperTable(
        "Rounds of self-training (beyond the paper)",
        (
            _NO_PAPER,
            replace(_CONTROL, caption="control: as many more steps on images as one round"),
            Row("control-all", "control: as many as all rounds"),
            *(Row(str(i), f"round {i}") for i in range(1, ROUNDS + 1)),
        ),
        (
            *_claims("1", ("image", "control"), of_paper=False),
            *(Claim(str(i), str(i - 1), of_paper=False) for i in range(2, ROUNDS + 1)),
            Claim(str(ROUNDS), "control-all", of_paper=False),
        ),
    ),
}
"""By the names that `pmvis table --paper` takes."""


def find_table(name: str) -> PaperTable:
    """Return a table by its number.

    Raises:
        UsageError: there is none.
    """
    if name not in TABLES:
        raise UsageError(f"no table `{name}`", f"known: {', '.join(TABLES)}")
    return TABLES[name]


def plain_table(folders: Sequence[Path]) -> PaperTable:
    """Return a table without figures of the paper: a row for each metrics file of a folder.

    Raises:
        DataError: there is none.
    """
    stems = sorted({p.name.removesuffix(SUFFIX) for f in folders for p in f.glob(f"*{SUFFIX}")})
    if not stems:
        raise DataError(
            f"no `*{SUFFIX}` in `{folders[0]}`", "`pmvis eval … -o NAME.metrics.json` writes one"
        )
    return PaperTable("", tuple(Row(stem, stem) for stem in stems), ())


def collect(
    table: PaperTable, folders: Sequence[Path], files: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Gather a table's figures.

    Args:
        table: what to look for; rows without a file in any folder are left out.
        folders: one a seed.
        files: file names (without `SUFFIX`) of rows that are not called by their key.

    Returns:
        ``title``, ``seeds``; ``rows``: ``key``, ``caption``, ``paper`` and, for each of `METRICS`,
        ``mean``, ``low``, ``high`` and the ``runs``, in percent; ``claims``: ``better``, ``worse``,
        ``of_paper``, the same of their difference in AP, and ``verdict``; ``without``: ``key``,
        ``caption`` and ``reason`` of rows that a seed has no figures for.

    Raises:
        UsageError: ``files`` names a row that the table has not.
        DataError: a row is there for some seeds only, or a file is no metrics file.
    """
    files = files or {}
    keys = [row.key for row in table.rows]
    for key in files:
        if key not in keys:
            raise UsageError(f"the table has no row `{key}`", f"known: {', '.join(keys)}")
    rows: list[dict[str, Any]] = []
    without: list[dict[str, str]] = []
    for row in table.rows:
        name = files.get(row.key, row.key) + SUFFIX
        found = [folder / name for folder in folders if (folder / name).exists()]
        if found and len(found) < len(folders):
            missing = next(folder / name for folder in folders if folder / name not in found)
            raise DataError(
                f"`{missing}` is missing, {len(found)} of {len(folders)} seeds have it",
                "run that seed to its end, or leave it out",
            )
        reason = _reason(found)
        if reason:
            without.append({"key": row.key, "caption": row.caption, "reason": reason})
        elif found:
            figures = {m: _spread(_percents(found, m)) for m in METRICS}
            facts = {"key": row.key, "caption": row.caption, "paper": row.paper}
            rows.append({**facts, **figures})
    if not rows and not without:
        raise DataError(f"`{folders[0]}` holds no file of this table", "run its Make target first")
    aps = {row["key"]: row["AP"]["runs"] for row in rows}
    claims = [
        _tested(claim, aps) for claim in table.claims if claim.better in aps and claim.worse in aps
    ]
    result = {"title": table.title, "seeds": len(folders), "rows": rows}
    return {**result, "claims": claims, "without": without}


def markdown(result: Mapping[str, Any]) -> str:
    """Return what `collect` returned as Markdown: the figures, and what holds of the claims."""
    lines = [f"**{result['title']}**", ""] if result["title"] else []
    with_paper = any(row["paper"] for row in result["rows"])
    heads = ["", *(["paper AP"] if with_paper else []), *METRICS]
    lines += [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
    for row in result["rows"]:
        cells = [row["caption"], *([row["paper"]] if with_paper else [])]
        lines.append(
            _line([*cells, _shown(row["AP"]), *(f"{row[m]['mean']:.1f}" for m in METRICS[1:])])
        )
    for row in result["without"]:
        lines += ["", f"No figures for `{row['caption']}`: {row['reason']}."]
    seeds = result["seeds"]
    if result["claims"]:
        captions = {row["key"]: row["caption"] for row in result["rows"]}
        heads = ["better", "than", "the paper says so", "difference in AP", "seeds", "verdict"]
        lines += ["", _line(heads), _line(["---", "---", "---", "---:", "---:", "---"])]
        for claim in result["claims"]:
            cells = [captions[claim["better"]], captions[claim["worse"]]]
            cells += ["yes" if claim["of_paper"] else "-", _shown(claim, sign="+")]
            lines.append(_line([*cells, f"{claim['wins']} of {seeds}", claim["verdict"]]))
    note = "one seed" if seeds == 1 else f"mean of {seeds} seeds [95 % interval of the mean]"
    return "\n".join([*lines, "", f"Percent; {note}.", ""])


def _reason(files: Sequence[Path]) -> str:
    """Return why some of the files have no figures, and which; empty where all have."""
    reasons: dict[str, list[str]] = {}
    for file in files:
        document = read_json(file, "metrics")
        if isinstance(document, dict) and NONE in document:
            reasons.setdefault(str(document[NONE]), []).append(file.parent.name)
    return "; ".join(f"{reason} ({', '.join(names)})" for reason, names in reasons.items())


def _percents(files: Sequence[Path], metric: str) -> list[float]:
    """Return a metric of several files in percent."""
    values = []
    for file in files:
        document = read_json(file, "metrics")
        value = document.get(metric) if isinstance(document, dict) else None
        if not isinstance(value, int | float):
            raise DataError(f"`{file}` has no `{metric}`", "`pmvis eval … -o` writes such files")
        values.append(100.0 * value)
    return values


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, interval of the mean (None for one value) and the values."""
    count = len(values)
    mean = sum(values) / count
    low = high = None
    if count > 1:
        variance = sum((value - mean) ** 2 for value in values) / (count - 1)
        reach = float(stdtrit(count - 1, (1 + _CONFIDENCE) / 2)) * (variance / count) ** 0.5
        low, high = significant(mean - reach), significant(mean + reach)
    runs = [significant(value) for value in values]
    return {"mean": significant(mean), "low": low, "high": high, "runs": runs}


def _tested(claim: Claim, aps: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return whether a claim holds, by the differences of each seed."""
    pairs = zip(aps[claim.better], aps[claim.worse], strict=True)
    difference = _spread([better - worse for better, worse in pairs])
    low = difference["low"]
    if difference["mean"] <= 0:
        verdict = "does not hold"
    elif low is None:
        verdict = "holds on this seed"
    else:
        verdict = "holds" if low > 0 else "holds in the mean, within the noise"
    names = {"better": claim.better, "worse": claim.worse, "of_paper": claim.of_paper}
    wins = sum(run > 0 for run in difference["runs"])
    return {**names, **difference, "wins": wins, "verdict": verdict}


def _shown(spread: Mapping[str, Any], sign: str = "") -> str:
    """Return a mean and its interval with one decimal."""
    mean, *ends = (
        f"{value:{sign}.1f}"
        for value in (spread["mean"], spread["low"], spread["high"])
        if value is not None
    )
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def _line(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
