"""`pmvis convert`: tracks files to YouTube-VIS JSON and back, and COCO stills to both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmvis_cli.console import get_console
from pmvis_cli.options import STDIO_PATH, InputTracks, OutputPath

if TYPE_CHECKING:
    from pmvis_core.formats.ytvis import Dataset, TrackSource

_FORMS = ("tracks", "dataset", "results")


def convert(
    source: InputTracks = STDIO_PATH,
    *,
    to: Annotated[
        str, typer.Option("--to", metavar="tracks|dataset|results", help="The form to write.")
    ],
    output: OutputPath = STDIO_PATH,
    truth: Annotated[
        Path | None,
        typer.Option("--gt", metavar="JSON", help="For a results list: its videos, categories."),
    ] = None,
    videos: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="For a results list: its frames, as `infer` read them."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="For COCO stills: a vocabulary to map them to."),
    ] = None,
) -> None:
    """Convert between tracks files and YouTube-VIS JSON, dataset or results form.

    Examples:
      pmvis convert kept.tracks.jsonl --to dataset -o pseudo.json
      pmvis convert out.tracks.jsonl --to results -o results.json && zip results.zip results.json
      pmvis convert results.json --gt valid.json --to tracks -o out.tracks.jsonl
      pmvis convert instances_val2017.json --target ytvis2019 --to dataset -o stills.json

    Reads: a tracks file, a dataset (videos, annotations, categories) or a results list, plain or
      gzip; masks as RLE, plain runs or polygons. A results list knows no videos: give --gt, or
      --videos, where categories are called by their ids. COCO instances JSON: each picture
      becomes a video of one frame, so that `infer --root IMAGES` and `eval` work on stills.
    Writes: `tracks`: scores without a value become 1 and crowds ignored tracks. `dataset`: what
      other VIS code trains on; it holds all of a tracks file. `results`: what servers score.

    next: `pmvis eval results.json --gt valid.json`
    """
    from pmvis_core.errors import UsageError
    from pmvis_core.formats.coco import StillVideos
    from pmvis_core.formats.ytvis import open_tracks, sniff
    from pmvis_core.formats.ytvis_writer import as_dataset, as_results

    if to not in _FORMS:
        raise UsageError(f"--to is `{to}`, expected one of {', '.join(f'`{f}`' for f in _FORMS)}")
    kind = sniff(source)
    if kind == "results":
        tracks: TrackSource = _from_results(source, truth, videos)
    elif truth or videos:
        raise UsageError("`--gt` and `--videos` are for a results list, this input needs none")
    else:
        tracks = _from_object(source, target) if kind == "dataset" else open_tracks(source)
    if target and not isinstance(tracks, StillVideos):
        raise UsageError("`--target` is for COCO stills, this input needs none")
    if to == "tracks":
        _write_tracks(tracks, output)
    elif to == "dataset":
        _write_json(as_dataset(tracks), output)
    else:
        _write_json(as_results(tracks), output)


def _from_object(source: Path, target: str | None) -> TrackSource:
    """Return a YouTube-VIS dataset or COCO stills, told apart by what they list."""
    from pmvis_core.categories import load_target
    from pmvis_core.formats.coco import StillVideos, from_coco, is_coco
    from pmvis_core.formats.ytvis import dataset_of, read_document, shown
    from pmvis_core.image_sets import in_vocabulary

    document = read_document(source, "dataset")
    if not is_coco(document):
        return dataset_of(document, shown(source))
    stills = from_coco(document, shown(source))
    if target is not None:
        stills = in_vocabulary(stills, load_target(target))
    return StillVideos(shown(source), stills)


def _from_results(source: Path, truth: Path | None, videos: Path | None) -> TrackSource:
    """Return a results list as tracks.

    Raises:
        UsageError: not exactly one of ``truth`` and ``videos`` is given.
    """
    from pmvis_core.errors import UsageError
    from pmvis_core.formats.ytvis import read_results, results_as_tracks

    if (truth is None) == (videos is None):
        raise UsageError(
            "a results list holds no videos: one of `--gt` and `--videos` is needed",
            "`--gt DATASET.json`: the file that the results are for",
        )
    dataset = _described(truth, videos)
    return results_as_tracks(read_results(source, dataset), dataset)


def _described(truth: Path | None, videos: Path | None) -> Dataset:
    """Return the videos and, if known, categories that results are for."""
    from pmvis_core.formats.ytvis import Dataset, read_dataset

    if truth is not None:
        return read_dataset(truth)
    from pmvis_core.video.frames import open_videos

    assert videos is not None
    found = tuple(video.info for video in open_videos(videos))
    return Dataset(f"`{videos}`", (), found, (), annotated=False)


def _write_tracks(tracks: TrackSource, output: Path) -> None:
    """Write a tracks file, video by video."""
    from pmvis_core.tracks_io import TracksWriter

    with TracksWriter(output, tracks.header) as out:
        for video in get_console().progress(tracks, "convert"):
            out.write(video)


def _write_json(value: Any, output: Path) -> None:
    """Write one JSON document."""
    from pmvis_core.files import canonical_json, write_json

    if output == STDIO_PATH:
        sys.stdout.write(canonical_json(value) + "\n")
    else:
        write_json(output, value)
