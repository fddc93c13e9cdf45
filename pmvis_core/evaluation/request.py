"""One run of `pmvis eval`: what is asked for, and the report that answers it.

    report = answer(Request(Path("valid.json"), Path("results.json"), errors=True))
    report.numbers["AP50"], report.as_json()["errors"], report.as_text()

AP comes from the files' bytes where it can (see `files`); tracks become Python objects only for
what needs them: HOTA, J and F, and the breakdown of errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmvis_core.doubts import Doubts
from pmvis_core.errors import UsageError
from pmvis_core.evaluation.curves import Evaluation, accumulate
from pmvis_core.evaluation.files import Matched, Work, match_files
from pmvis_core.evaluation.tables import category_table, metrics, official_table
from pmvis_core.progress import Progress, silent

if TYPE_CHECKING:
    from pmvis_core.evaluation.partial import Part
    from pmvis_core.formats.ytvis import Dataset
    from pmvis_core.formats.ytvis_annotation import Annotation
    from pmvis_core.types import VideoInfo


@dataclass(frozen=True)
class Request:
    """What is to be measured, and on what."""

    truth: Path
    """Ground truth: YouTube-VIS or OVIS JSON, DAVIS folders, MOTS."""
    predictions: Path
    """Tracks, results list, dataset, DAVIS folders, MOTS."""
    protocol: str = "ytvis"
    """Whose AP: ``ytvis`` or ``ovis``."""
    strict: bool = False
    """Refuse what is odd instead of warning."""
    threads: int = 0
    """How many work natively; 0 for one a processor."""
    subset: Path | None = None
    """Lists the videos that count; see `subset`."""
    per_category: bool = False
    """Show each category in the text, too."""
    errors: bool = False
    """Break the errors down by type."""
    worst: int = 0
    """How many of the worst videos to list."""
    against: Path | None = None
    """Other predictions to compare with."""
    samples: int = 1000
    """Draws of the comparison."""
    seed: int = 0
    """Of the draws."""
    hota: bool = False
    """Measure HOTA, DetA and AssA."""
    region_boundary: str | None = None
    """Measure J and F: ``semi-supervised`` or ``unsupervised``."""
    score: float | None = None
    """Least score of the predictions that HOTA counts."""
    binary: bool = False
    """255 is the object in DAVIS folders."""
    first_frame: int = 0
    """Number of the first frame of MOTS texts."""


@dataclass
class Report:
    """The answer, section by section."""

    numbers: dict[str, float | None] = field(default_factory=dict)
    """Every number that has a name of its own, None where there is no ground truth."""
    evaluation: Evaluation | None = None
    """Where AP was measured."""
    _json: dict[str, Any] = field(default_factory=dict)
    _texts: list[str] = field(default_factory=list)

    def add(self, name: str, numbers: Mapping[str, Any], text: str) -> None:
        """Append a section; one without a name is the top level of the JSON object."""
        if name:
            self._json[name] = dict(numbers)
        else:
            self._json.update(numbers)
        self._texts.append(text)

    def as_json(self) -> dict[str, Any]:
        """Return the numbers as one JSON object."""
        return self._json

    def as_text(self) -> str:
        """Return the tables, parted by empty lines."""
        return "\n\n".join(self._texts) + "\n"


def answer(request: Request, progress: Progress = silent) -> Report:
    """Measure what is asked for.

    Raises:
        DataError: inputs are missing or malformed, or odd with ``strict``.
        UsageError: what is asked for cannot be had of these inputs.
    """
    inputs = _Inputs(request)
    report = Report()
    if inputs.have_ap:
        matched = match_files(inputs.work(request.predictions), inputs.doubts, progress)
        inputs.settle()
        _add_ap(report, request, inputs, matched, progress)
    elif request.errors or request.worst or request.against:
        raise UsageError(
            "the error breakdown, the worst videos and `--against` are about AP, which needs "
            "categories and scores",
            "give ground truth and predictions as JSON or tracks",
        )
    if request.hota or inputs.truth_form == "mots":
        _add_hota(report, request, inputs)
    if inputs.task:
        _add_region_boundary(report, request, inputs)
    return report


def answer_parts(parts: Sequence[Path], request: Request) -> Report:
    """Add up partial evaluations.

    Raises:
        DataError: a part is malformed, missing, or of another run.
    """
    from pmvis_core.evaluation.partial import load_part, merge

    whole = merge([load_part(path) for path in parts])
    doubts = Doubts()
    for kind, examples in whole.doubts.items():
        for example in examples or ("",):
            doubts.add(kind, example)
    doubts.settle(strict=request.strict)
    report = Report()
    _add_summary(report, request, accumulate(whole.categories, whole.matches))
    return report


def shard_of(request: Request, shard: tuple[int, int], progress: Progress = silent) -> Part:
    """Match the videos of one shard; see `partial`.

    Raises:
        DataError: inputs are missing or malformed.
        UsageError: there is no such shard, or no AP to be had of these inputs.
    """
    from pmvis_core.evaluation.partial import Part, videos_of_shard
    from pmvis_core.files import digest_file

    inputs = _Inputs(request)
    if not inputs.have_ap:
        raise UsageError("only AP is evaluated in shards", "give JSON or tracks")
    matched = match_files(inputs.work(request.predictions, shard), inputs.doubts, progress)
    return Part(
        protocol=request.protocol,
        truth=digest_file(request.truth),
        predictions=digest_file(request.predictions),
        shard=shard,
        categories=matched.categories,
        videos=videos_of_shard(matched.video_ids.tolist(), *shard),
        matches=matched.matches,
        doubts=inputs.doubts.examples,
    )


class _Inputs:
    """The inputs of a request, read when they are asked for."""

    def __init__(self, request: Request) -> None:
        """Tell the forms apart."""
        self._request = request
        self.truth_form = _form(request.truth)
        self.form = _form(request.predictions)
        self.have_ap = self.truth_form == self.form == "json"

    @cached_property
    def doubts(self) -> Doubts:
        """What is odd about the inputs."""
        return Doubts()

    def settle(self) -> None:
        """Tell what is odd, once."""
        self.doubts.settle(strict=self._request.strict)

    @property
    def task(self) -> str | None:
        """The task of J and F, None if they are not asked for."""
        by_default = "semi-supervised" if "davis" in (self.truth_form, self.form) else None
        return self._request.region_boundary or by_default

    def work(self, predictions: Path, shard: tuple[int, int] = (1, 1)) -> Work:
        """Return what `match_files` is to do."""
        request = self._request
        return Work(
            request.truth, predictions, request.protocol, threads=request.threads, shard=shard
        )

    @cached_property
    def truth(self) -> Dataset:
        """The ground truth."""
        from pmvis_core.formats.recognised import read_truth

        request = self._request
        return read_truth(
            request.truth, self.truth_form, binary=request.binary, first_frame=request.first_frame
        )

    @cached_property
    def predictions(self) -> tuple[Annotation, ...]:
        """The predictions; what is odd about them has been told with AP, if that was measured."""
        from pmvis_core.formats.recognised import read_any_predictions

        doubts = Doubts()
        found = read_any_predictions(
            self._request.predictions,
            self.form,
            self.truth,
            self.truth_form,
            doubts,
            binary=self._request.binary,
            ends=self.task == "unsupervised",
        )
        if not self.have_ap:
            doubts.settle(strict=self._request.strict)
        return found

    @cached_property
    def chosen(self) -> frozenset[int] | None:
        """The videos of the subset, None for all."""
        from pmvis_core.evaluation.subset import read_subset

        if self._request.subset is None:
            return None
        return read_subset(self._request.subset, self.videos)

    @property
    def videos(self) -> tuple[VideoInfo, ...]:
        """The videos of the ground truth."""
        return self.truth.videos


def _form(path: Path) -> str:
    """Tell the form of a path without loading what only folders need."""
    if path.suffix != ".txt" and not path.is_dir():
        return "json"
    from pmvis_core.formats.recognised import form_of

    return form_of(path)


def _add_ap(
    report: Report, request: Request, inputs: _Inputs, matched: Matched, progress: Progress
) -> None:
    """Add AP and all that follows from the matches."""
    matches = matched.matches
    if request.subset is not None:
        matches = matches.of_videos(inputs.chosen or ())
    _add_summary(report, request, accumulate(matched.categories, matches))
    if request.errors:
        from pmvis_core.evaluation.errors import breakdown, breakdown_json, breakdown_table

        found = breakdown(inputs.truth, inputs.predictions, matches, progress=progress)
        report.add("errors", breakdown_json(found), breakdown_table(found))
    if request.worst:
        from pmvis_core.evaluation.worst import worst_json, worst_table, worst_videos

        names = {video.id: video.name for video in inputs.videos}
        worst = worst_videos(matches, matched.categories, request.worst, names)
        report.add("worst", {"videos": worst_json(worst)}, worst_table(worst))
    if request.against is not None:
        from pmvis_core.evaluation.compare import compare, comparison_json, comparison_table

        other = match_files(inputs.work(request.against), Doubts(), progress).matches
        drawn = inputs.chosen if inputs.chosen is not None else matched.video_ids.tolist()
        comparison = compare(
            matches,
            other if inputs.chosen is None else other.of_videos(inputs.chosen),
            matched.categories,
            drawn,
            samples=request.samples,
            seed=request.seed,
            progress=progress,
        )
        report.add("against", comparison_json(comparison), comparison_table(comparison))


def _add_summary(report: Report, request: Request, evaluation: Evaluation) -> None:
    """Add the official numbers."""
    text = official_table(evaluation)
    if request.per_category:
        text += f"\n\n{category_table(evaluation)}"
    report.evaluation = evaluation
    report.numbers.update(evaluation.summary)
    report.add("", metrics(evaluation), text)


def _add_hota(report: Report, request: Request, inputs: _Inputs) -> None:
    """Add HOTA and its parts."""
    from pmvis_core.evaluation.hota import hota, hota_metrics, hota_table

    rules = {"json": "ytvis"}.get(inputs.truth_form, inputs.truth_form)
    found = hota(inputs.truth, inputs.predictions, rules=rules, score_threshold=request.score)
    if inputs.chosen is not None:
        found = found.of_videos(inputs.chosen)
    report.numbers.update(found.combined.summary)
    text = hota_table(found, per_category=request.per_category)
    report.add("HOTA", hota_metrics(found), text)


def _add_region_boundary(report: Report, request: Request, inputs: _Inputs) -> None:
    """Add J and F."""
    from pmvis_core.evaluation.region_boundary import (
        region_boundary,
        region_boundary_metrics,
        region_boundary_table,
    )

    assert inputs.task is not None
    found = region_boundary(
        inputs.truth,
        inputs.predictions,
        task=inputs.task,
        indexed=inputs.truth_form == inputs.form == "davis",
    )
    if inputs.chosen is not None:
        found = found.of_videos(inputs.chosen)
    report.numbers.update(found.summary)
    text = region_boundary_table(found, per_object=request.per_category)
    report.add("J&F", region_boundary_metrics(found), text)
