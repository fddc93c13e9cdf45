"""The embedded benchmark: stills with masks or boxes, unlabelled videos, held-out labelled videos.

Seven shapes on 96 x 128 frames. Four have masks in the still images, three have boxes only, so a
model has to segment them without having seen a mask of theirs. The videos look different from the
stills (darker, colour cast, blur, noise, clutter: `SynthConfig.gap`), which is what pseudo labels
can teach. `SynthConfig.strangers` adds what makes labels go wrong in real videos: things of no
category, look-alikes in the background, occluders. Everything is written in the formats that real
data comes in:

    coco/instances_train.json, coco/train/*.jpg          COCO instances with masks
    imagenet/Annotations/<wnid>/*.xml, imagenet/images/  ImageNet-bbox, VOC XML
    stills_val.json, stills_val/*.jpg                    held-out stills, masks of all categories
    videos/train.json, videos/train/JPEGImages/          unlabelled YouTube-VIS videos
    videos/train_truth.json                              their truth, to measure label quality only
    videos/valid.json, videos/valid/JPEGImages/          held-out YouTube-VIS videos with truth
    target.json                                          the vocabulary and its sources
    synth.json                                           seed and settings

Masks are the visible parts. Every image and video is drawn from a generator of its own, seeded by
(seed, kind, index), so enlarging one part changes no other.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pmvis_core import masks
from pmvis_core.errors import UsageError
from pmvis_core.files import cannot_write, part_path, write_json
from pmvis_core.progress import Progress, silent
from pmvis_core.synthetic.scenes import Clip, Still, SynthConfig, draw_clip, draw_still
from pmvis_core.synthetic.shapes import BOX_CATEGORIES, MASK_CATEGORIES, Frame, Mask
from pmvis_core.types import RLE

__all__ = ["CATEGORIES", "SOURCE_IDS", "STAMP", "WNIDS", "SynthConfig", "draw", "target"]

CATEGORIES = MASK_CATEGORIES + BOX_CATEGORIES
"""The target vocabulary in order; ids count from 1."""
WNIDS = {"square": "n90000001", "ring": "n90000002", "crescent": "n90000003"}
"""Invented WordNet ids of the box-only categories."""
SOURCE_IDS = {"disc": 3, "triangle": 7, "star": 12, "plus": 18}
"""Ids of the mask categories in the COCO file, which are not those of the target."""
DEFAULTS = SynthConfig()
"""The measured design."""
STAMP = "synth.json"
"""Marks a folder as drawn by `draw`."""
_BOX_STILLS, _MASK_STILLS, _VAL_STILLS, _TRAIN_VIDEOS, _VALID_VIDEOS = range(5)


def draw(
    folder: Path,
    seed: int,
    config: SynthConfig = DEFAULTS,
    progress: Progress = silent,
    *,
    overwrite: bool = False,
) -> None:
    """Draw the whole benchmark into ``folder``, which appears when it is complete.

    Args:
        folder: the new folder; it is drawn as ``folder.part`` and renamed.
        seed: the same seed and settings give the same bytes.
        config: sizes and difficulty.
        progress: told about every image and video.
        overwrite: replace a benchmark that lies there already.

    Raises:
        UsageError: something lies there already that may not be replaced.
        ResourceError: the place cannot be written.
    """
    part = part_path(folder)
    _check_free(folder, overwrite)
    _check_free(part, overwrite=True)
    try:
        if part.exists():
            shutil.rmtree(part)
        part.mkdir(parents=True)
        _draw_all(part, seed, config, progress)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error


def _check_free(folder: Path, overwrite: bool) -> None:
    """Refuse to replace what is there, unless it is a benchmark and may be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    stamp = folder / STAMP
    if not stamp.is_file() and not part_path(stamp).is_file():
        raise UsageError(
            f"`{folder}` exists and is no benchmark drawn by `pmvis synth`", "give another `-o`"
        )
    if not overwrite:
        raise UsageError(
            f"`{folder}` holds a benchmark already",
            "give another `-o`, or `--overwrite` to draw it anew",
        )


def _draw_all(folder: Path, seed: int, config: SynthConfig, progress: Progress) -> None:
    """Draw every part; the stamp comes first, so that a part left by a killed run is known."""
    settings = asdict(config)
    if not config.strangers:  # a benchmark without them is the one that was drawn before they came
        del settings["strangers"]
    write_json(folder / STAMP, {"seed": seed, "config": settings})
    _draw_mask_stills(folder, seed, config, progress)
    _draw_box_stills(folder, seed, config, progress)
    _draw_val_stills(folder, seed, config, progress)
    for kind, split in ((_TRAIN_VIDEOS, "train"), (_VALID_VIDEOS, "valid")):
        _draw_videos(folder / "videos", split, kind, seed, config, progress)
    write_json(folder / "target.json", target())


def target() -> dict[str, Any]:
    """Return the custom target vocabulary with its sources, as `map-categories --target` reads."""
    return {
        "name": "synthetic",
        "categories": _vocabulary(),
        "coco": {name: name for name in MASK_CATEGORIES},
        "imagenet": {WNIDS[name]: name for name in BOX_CATEGORIES},
    }


def _vocabulary() -> list[dict[str, Any]]:
    """Return the target categories as JSON objects."""
    return [{"id": i, "name": name} for i, name in enumerate(CATEGORIES, start=1)]


def _draw_mask_stills(folder: Path, seed: int, config: SynthConfig, progress: Progress) -> None:
    """Draw the stills of the mask categories as a COCO data set."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in progress(range(config.mask_stills), "stills with masks", config.mask_stills):
        rng = np.random.default_rng([seed, _MASK_STILLS, index])
        still = draw_still(rng, config, MASK_CATEGORIES)
        name = f"{index + 1:012d}.jpg"
        _write_image(folder / "coco" / "train" / name, still.image, config)
        _add_still(still, name, SOURCE_IDS, images, annotations)
    categories = [{"id": SOURCE_IDS[name], "name": name} for name in MASK_CATEGORIES]
    data = {"images": images, "annotations": annotations, "categories": categories}
    write_json(folder / "coco" / "instances_train.json", data)


def _draw_val_stills(folder: Path, seed: int, config: SynthConfig, progress: Progress) -> None:
    """Draw the held-out stills of all categories, in the target vocabulary."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    ids = {name: i for i, name in enumerate(CATEGORIES, start=1)}
    for index in progress(range(config.val_stills), "held-out stills", config.val_stills):
        rng = np.random.default_rng([seed, _VAL_STILLS, index])
        still = draw_still(rng, config, CATEGORIES)
        name = f"{index + 1:012d}.jpg"
        _write_image(folder / "stills_val" / name, still.image, config)
        _add_still(still, name, ids, images, annotations)
    data = {"images": images, "annotations": annotations, "categories": _vocabulary()}
    write_json(folder / "stills_val.json", data)


def _draw_box_stills(folder: Path, seed: int, config: SynthConfig, progress: Progress) -> None:
    """Draw the stills of the box-only categories as ImageNet-bbox: a folder a WordNet id."""
    root = folder / "imagenet"
    for wnid in WNIDS.values():
        (root / "Annotations" / wnid).mkdir(parents=True)
    for index in progress(range(config.box_stills), "stills with boxes", config.box_stills):
        rng = np.random.default_rng([seed, _BOX_STILLS, index])
        still = draw_still(rng, config, BOX_CATEGORIES)
        wnid = WNIDS[still.names[0]]
        stem = f"{wnid}_{index + 1}"
        _write_image(root / "images" / wnid / f"{stem}.jpg", still.image, config)
        xml = _voc_xml(wnid, stem, still)
        (root / "Annotations" / wnid / f"{stem}.xml").write_text(xml, encoding="utf-8")


def _voc_xml(wnid: str, stem: str, still: Still) -> str:
    """Return a still's boxes as ImageNet writes them: VOC XML, corners 1-based and inclusive."""
    height, width = still.image.shape[:2]
    size = f"<width>{width}</width><height>{height}</height><depth>3</depth>"
    lines = [
        "<annotation>",
        f"\t<folder>{wnid}</folder>",
        f"\t<filename>{stem}</filename>",
        f"\t<size>{size}</size>",
    ]
    for name, mask in zip(still.names, still.masks, strict=True):
        x1, y1, x2, y2 = _corners(mask)
        box = f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        lines.append(f"\t<object><name>{WNIDS[name]}</name><bndbox>{box}</bndbox></object>")
    return "\n".join([*lines, "</annotation>"]) + "\n"


def _add_still(
    still: Still,
    name: str,
    ids: dict[str, int],
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
) -> None:
    """Append a still and its objects to the lists of a COCO file."""
    height, width = still.image.shape[:2]
    image_id = len(images) + 1
    images.append({"id": image_id, "file_name": name, "height": height, "width": width})
    for category, mask in zip(still.names, still.masks, strict=True):
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": ids[category],
                "segmentation": masks.encode(mask),
                "bbox": _xywh(mask),
                "area": int(mask.sum()),
                "iscrowd": 0,
            }
        )


def _draw_videos(
    folder: Path, split: str, kind: int, seed: int, config: SynthConfig, progress: Progress
) -> None:
    """Draw the videos of a split; the truth of training videos goes to a file of its own."""
    count = config.train_videos if split == "train" else config.valid_videos
    videos: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in progress(range(count), f"{split} videos", count):
        rng = np.random.default_rng([seed, kind, index])
        name = f"{split}{index + 1:04d}"
        files = [f"{name}/{t:05d}.jpg" for t in range(config.frames)]
        clip = draw_clip(rng, config, CATEGORIES)
        for file, frame in zip(files, clip.frames, strict=True):
            _write_image(folder / split / "JPEGImages" / file, frame, config)
        size = {"height": config.height, "width": config.width, "length": config.frames}
        videos.append({"id": index + 1, **size, "file_names": files})
        _add_video(index + 1, clip, annotations)
    bare = {"videos": videos, "categories": _vocabulary()}
    labelled = {**bare, "annotations": annotations}
    if split == "train":
        write_json(folder / "train.json", bare)
        write_json(folder / "train_truth.json", labelled)
    else:
        write_json(folder / f"{split}.json", labelled)


def _add_video(video_id: int, clip: Clip, annotations: list[dict[str, Any]]) -> None:
    """Append the tracks of a video to the annotations of a YouTube-VIS file."""
    for name, row in zip(clip.names, clip.masks, strict=True):
        rles: list[RLE | None] = [None if mask is None else masks.encode(mask) for mask in row]
        if not any(rles):
            continue
        some = next(mask for mask in row if mask is not None)
        annotations.append(
            {
                "id": len(annotations) + 1,
                "video_id": video_id,
                "category_id": CATEGORIES.index(name) + 1,
                "iscrowd": 0,
                "height": some.shape[0],
                "width": some.shape[1],
                "length": len(row),
                "segmentations": rles,
                "bboxes": [None if mask is None else _xywh(mask) for mask in row],
                "areas": [None if mask is None else int(mask.sum()) for mask in row],
            }
        )


def _corners(mask: Mask) -> tuple[int, int, int, int]:
    """Return the box (x1, y1, x2, y2) of a mask that is not empty, far edge exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _xywh(mask: Mask) -> list[int]:
    """Return the box of a mask as COCO writes it."""
    x1, y1, x2, y2 = _corners(mask)
    return [x1, y1, x2 - x1, y2 - y1]


def _write_image(path: Path, image: Frame, config: SynthConfig) -> None:
    """Write an RGB image (H, W, 3) as JPEG with full colour resolution."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, config.jpeg_quality]
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    ok, data = cv2.imencode(".jpg", image[:, :, ::-1], [*quality, *sampling])
    assert ok, "OpenCV always encodes a uint8 image"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())
