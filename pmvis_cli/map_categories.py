"""`pmvis map-categories`: COCO and ImageNet-bbox become one file in a target vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmvis_cli.console import Console, get_console
from pmvis_cli.options import JsonFlag, Overwrite, prepare_folder

if TYPE_CHECKING:
    from pmvis_core.categories import Target
    from pmvis_core.image_sets import SourceReport
    from pmvis_core.types import Category

CATEGORIES_FILE = "categories.json"
TRAINING_FILE = "train_image.json"
FORMAT_VERSION = 1
NAMED = 5
"""How many of a list are named before the rest are only counted."""

TITLES = {"coco": "COCO", "imagenet": "ImageNet-bbox"}


BoxSource = Annotated[
    Path | None,
    typer.Option(metavar="DIR|JSON", help="Boxes only: a folder of VOC XML, or COCO-style JSON."),
]
HideMasks = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=0,
        help="Hide the masks of every N-th picture of --coco: more box-only data; 0: none.",
    ),
]
TargetName = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE", help="ytvis2019, ytvis2021, ovis, or a JSON or TOML vocabulary."
    ),
]


def map_categories(
    target: TargetName,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the two files.")
    ],
    coco: Annotated[
        Path | None, typer.Option(metavar="JSON", help="COCO instances, with masks.")
    ] = None,
    imagenet_bbox: BoxSource = None,
    coco_images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pictures of --coco, if not beside it.")
    ] = None,
    imagenet_images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Pictures of --imagenet-bbox, if not beside it."),
    ] = None,
    custom: Annotated[
        bool, typer.Option("--custom", help="Match by names instead of the target's own maps.")
    ] = False,
    hide_masks: HideMasks = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 if a target category has no annotation.")
    ] = False,
    json: JsonFlag = False,
    overwrite: Overwrite = False,
) -> None:
    r"""Map the categories of COCO and ImageNet-bbox to a vocabulary and merge both.

    Examples:
      pmvis map-categories --target ytvis2019 --coco instances_train2017.json \
        --imagenet-bbox imagenet/Annotations -o data/ytvis2019
      pmvis map-categories --target my.toml --coco my.json -o data/my --strict
      pmvis map-categories --target ovis --custom --coco my.json -o data/ovis

    Reads: COCO instances JSON (masks); VOC XML or COCO-style JSON (boxes only).
    Writes: DIR/categories.json (the map, to be reviewed), DIR/train_image.json
      (COCO JSON; no `segmentation` = box only); Table I on standard output.

    next: `pmvis train-image --data DIR/train_image.json -o RUN`
    """
    from pmvis_core import categories, files, image_sets
    from pmvis_core.errors import AnswerIsNo, UsageError
    from pmvis_core.formats.coco import write_coco

    console = get_console()
    wanted = categories.load_target(target)
    if coco is None and imagenet_bbox is None:
        raise UsageError("no source given", "give `--coco`, `--imagenet-bbox`, or both")
    if hide_masks and coco is None:
        raise UsageError("`--hide-masks` is for `--coco`, which is not given")
    prepare_folder(output, overwrite=overwrite, owned=(CATEGORIES_FILE, TRAINING_FILE))
    sources = [
        image_sets.read_source(kind, path, images)
        for kind, path, images in (
            (categories.COCO, coco, coco_images),
            (categories.IMAGENET, imagenet_bbox, imagenet_images),
        )
        if path is not None
    ]
    if hide_masks:
        sources[0] = image_sets.hide_masks(sources[0], hide_masks)
    dataset, reports = image_sets.merge_sources(wanted, sources, output, by_name=custom)
    lacking = categories.without_source(wanted, {i for r in reports for i in r.reached})
    summary = _summary(wanted, reports, lacking)
    description = f"pmvis map-categories: {wanted.name}"
    files.write_json(output / CATEGORIES_FILE, summary)
    write_coco(output / TRAINING_FILE, dataset, description)
    if json:
        console.emit_json(summary)
    else:
        console.table(_table_one(wanted, reports), stdout=True)
    for report in reports:
        _tell(console, report, by_name=custom or report.source.kind not in wanted.maps)
    if lacking:
        message = f"{len(lacking)} of {len(wanted.categories)} target categories have no " + (
            f"annotation: {_some([category.name for category in lacking], all_of_them=True)}"
        )
        if strict:
            raise AnswerIsNo(message, "add a source that has them, or leave `--strict` out")
        console.warn(message)


def _summary(
    target: Target, reports: list[SourceReport], lacking: tuple[Category, ...]
) -> dict[str, Any]:
    """Return the content of ``categories.json``."""
    return {
        "pmvis_categories": FORMAT_VERSION,
        "target": target.name,
        "categories": [{"id": c.id, "name": c.name} for c in target.categories],
        "sources": {report.source.kind: report.as_json() for report in reports},
        "without_source": [category.name for category in lacking],
        "images": sum(report.images for report in reports),
        "annotations": sum(report.annotations for report in reports),
    }


def _table_one(target: Target, reports: list[SourceReport]) -> Any:
    """Return the paper's Table I: per source the classes ``source / target`` and the counts."""
    from rich.table import Table

    table = Table(title=f"{target.name}: {len(target.categories)} categories", title_justify="left")
    table.add_column("source")
    for heading in ("classes", "images", "annotations", "missing images"):
        table.add_column(heading, justify="right")
    for report in reports:
        classes = f"{report.categories.classes} / {report.categories.targets}"
        numbers = (report.images, report.annotations, len(report.missing))
        table.add_row(TITLES[report.source.kind], classes, *map(str, numbers))
    table.add_section()
    reached = len({i for report in reports for i in report.categories.target_ids.values()})
    sums = (
        sum(report.images for report in reports),
        sum(report.annotations for report in reports),
        sum(len(report.missing) for report in reports),
    )
    classes = f"{sum(report.categories.classes for report in reports)} / {reached}"
    table.add_row("total", classes, *map(str, sums))
    hidden = sum(report.hidden for report in reports)
    if hidden:
        table.caption = f"{hidden} images of COCO are box-only: their masks were hidden"
    return table


def _tell(console: Console, report: SourceReport, *, by_name: bool) -> None:
    """Name on stderr what was left out or merged."""
    title = TITLES[report.source.kind]
    for wanted, merged in report.categories.many_to_one.items():
        console.say(f"{title}: {' + '.join(merged)} -> {wanted} (many to one)")
    unmatched = report.categories.unmatched
    if unmatched:
        names = [entry.category.name for entry in unmatched]
        console.say(f"{title}: {len(names)} categories without a target: {_some(names, True)}")
    if by_name:
        for entry in unmatched:
            if entry.suggestions:
                near = ", ".join(f"`{name}`" for name in entry.suggestions)
                console.say(f"{title}: `{entry.category.name}` is near {near}; map it in a FILE")
    if not report.categories.classes:
        console.warn(f"{title}: not one category maps to the target; try `--custom`")
    if report.missing:
        console.warn(
            f"{title}: {len(report.missing)} images are missing and were left out: "
            f"{_some(list(report.missing), False)}"
        )


def _some(names: list[str], all_of_them: bool) -> str:
    """Return a list for a sentence, whole or its beginning."""
    if all_of_them or len(names) <= NAMED:
        return ", ".join(names)
    return f"{', '.join(names[:NAMED])}, … ({len(names) - NAMED} more)"
