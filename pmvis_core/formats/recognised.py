"""Ground truth and predictions for `eval` in whatever form they come, told apart by looking.

A folder is DAVIS (8-bit PNGs) or MOTS (16-bit PNGs or texts), a ``.txt`` is MOTS, and any other
file is left to the readers of JSON and tracks.

    kind = form_of(path)
    truth = read_truth(path, kind)
    found = read_any_predictions(other, form_of(other), truth)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pmvis_core.doubts import Doubts
from pmvis_core.formats.davis import read_davis, read_davis_predictions
from pmvis_core.formats.mots import read_mots, read_mots_predictions
from pmvis_core.formats.predictions import as_prediction, match_videos, read_predictions
from pmvis_core.formats.ytvis import Dataset, open_tracks, read_dataset, sniff
from pmvis_core.formats.ytvis_annotation import Annotation
from pmvis_core.types import VideoInfo

FORMS = ("json", "davis", "mots")
_PNG_DEPTH = slice(24, 25)
"""Where a PNG's header says how many bits a sample has."""


def form_of(path: Path) -> str:
    """Tell what a path holds: ``davis``, ``mots`` or ``json``, which stands for any other file."""
    if path.suffix == ".txt":
        return "mots"
    if not path.is_dir():
        return "json"
    if any(path.glob("*.txt")) or any(path.glob("*/gt/gt.txt")):
        return "mots"
    first = next(path.glob("*/*.png"), None)
    if first is None:
        return "davis"
    with first.open("rb") as stream:
        return "mots" if stream.read(_PNG_DEPTH.stop)[_PNG_DEPTH] == b"\x10" else "davis"


def read_truth(path: Path, form: str, *, binary: bool = False, first_frame: int = 0) -> Dataset:
    """Read ground truth.

    Args:
        path: what `form_of` looked at.
        form: what it said.
        binary: in DAVIS folders 255 is the object, as in DAVIS 2016.
        first_frame: number of the first frame of MOTS texts.

    Raises:
        DataError: it is malformed.
    """
    if form == "davis":
        return read_davis(path, binary=binary)
    if form == "mots":
        return read_mots(path, first_frame=first_frame)
    return read_dataset(path)


def read_any_predictions(
    path: Path,
    form: str,
    truth: Dataset,
    truth_form: str,
    doubts: Doubts,
    *,
    binary: bool = False,
    ends: bool = True,
) -> tuple[Annotation, ...]:
    """Read predictions for a ground truth; against DAVIS folders categories do not matter.

    Args:
        path: what `form_of` looked at.
        form: what it said.
        truth: the ground truth.
        truth_form: its form.
        doubts: where to note oddities.
        binary: as of `read_truth`.
        ends: whether the first and last frame of DAVIS folders must be there.

    Raises:
        DataError: they are malformed, or not of the ground truth's videos.
    """
    if form == "davis":
        return read_davis_predictions(path, truth, binary=binary, ends=ends)
    if form == "mots":
        return read_mots_predictions(path, truth)
    if truth_form != "davis" or sniff(path) == "results":
        return read_predictions(path, truth, doubts)
    source = open_tracks(path)
    videos: list[VideoInfo] = []
    rows: list[Annotation] = []
    for video in source:
        videos.append(video.video)
        rows += [as_prediction(track, video.video.id) for track in video.tracks]
    to_video = match_videos(videos, truth.videos, str(path), doubts)
    return tuple(
        replace(row, id=number, video_id=to_video[row.video_id])
        for number, row in enumerate(rows, start=1)
    )
