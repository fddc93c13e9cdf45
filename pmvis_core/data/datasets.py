"""Training data: annotated stills and pseudo-labelled videos, as key/reference pairs.

Every sample is a `KeyReferencePair` (IDOL, section 3.2) whose instances state their `Supervision`.
`CocoImages` makes two independent views of a still; `PseudoVideos` takes two frames of a video. The
masks of both stay in their files until they are drawn (`stills`, `clips`). `streams` turns sources
into endless batches.

    images = CocoImages(Path("train_image.json"), None, IDOL_STILLS)
    mixture = image_mixture(images, box_only_share=3 / 7)
    for pairs in prefetch(batches(mixture, 4, seed=0, start_step=1000, threads=4)):
        ...
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pmvis_core import masks
from pmvis_core.data.augment import AugmentConfig, View, draw_clip, draw_still
from pmvis_core.data.clips import Clip, Clips
from pmvis_core.data.dropped import check_set_aside
from pmvis_core.data.samples import Frame, KeyReferencePair, Targets
from pmvis_core.data.spares import STOP, OnError, judge_missing
from pmvis_core.data.stills import Still, read_picture, read_stills, sorted_categories
from pmvis_core.data.streams import Ledger, Mixture, Source, batches, prefetch
from pmvis_core.errors import DataError
from pmvis_core.formats.tracks_index import open_index
from pmvis_core.types import RLE, Supervision

__all__ = [
    "CocoImages",
    "Mixture",
    "PseudoVideos",
    "Source",
    "annotation_ledger",
    "batches",
    "image_mixture",
    "prefetch",
]

T = TypeVar("T")
Image = NDArray[np.uint8]

_MIN_SIDE_PX = 1e-5
_DUPLICATE_IOU = 0.5
"""Box overlap from which a track that was set aside is taken for one that was kept."""


class CocoImages:
    """Key/reference pairs from stills (facts of IDOL's `coco_clip`).

    Boxes are the transformed and clipped annotation boxes, also where there is a mask. Crowd
    annotations and stills without any other are left out.
    """

    files_a_sample = 1

    def __init__(
        self,
        json: Path,
        images: Path | None,
        augment: AugmentConfig,
        *,
        cache_bytes: int = 0,
        keep_unseen: bool = False,
        on_error: OnError = STOP,
    ) -> None:
        """Read and check the annotations.

        Args:
            json: COCO instances; an annotation without `segmentation` is a box.
            images: folder that `file_name` is relative to; None for the folder of ``json`` or a
                usual one near it (`train2017`).
            augment: what the views may vary.
            cache_bytes: decoded images and masks kept in memory, in bytes.
            keep_unseen: leave rows in the key frame that are not valid there (see `_paired`).
            on_error: whether missing images are an error, or a warning as long as they are few.

        Raises:
            DataError: the file is malformed, an image file is missing, or nothing is left.
        """
        self.augment, self.keep_unseen = augment, keep_unseen
        self.categories, self._stills = read_stills(json, images, on_error)
        self._cache = _Cache[tuple[Image, Image]](cache_bytes)

    def __len__(self) -> int:
        """Return the number of stills."""
        return len(self._stills)

    def split(self) -> tuple[CocoImages, CocoImages]:
        """Return the stills with a mask, and the box-only ones (either may be empty)."""
        masked, box_only = copy(self), copy(self)
        has_mask = self._stills.has_mask
        masked._stills, box_only._stills = (self._stills.where(x) for x in (has_mask, ~has_mask))
        return masked, box_only

    def sample(self, index: int, rng: np.random.Generator) -> KeyReferencePair:
        """Return two independent views of a still.

        Raises:
            DataError: the image cannot be read or has another size than the annotations say.
        """
        still = self._stills[index]
        image, bitmaps = self._cache.get(still.id, partial(_load, still), _pair_bytes)
        views = (draw_still(image.shape[:2], self.augment, rng) for _ in range(2))
        key, reference = (_still_frame(still, image, bitmaps, view) for view in views)
        name = f"image {still.id}, `{still.path}`"
        return replace(_paired(key, reference, self.keep_unseen), name=name)

    def ledger(self) -> Ledger:
        """Return the images and annotations by the image's `source`."""
        return self._stills.ledger()


class PseudoVideos:
    """Key/reference pairs from labelled videos (facts of IDOL's `dataset_mapper`).

    One item is a video: a centre frame, another at most ``max_gap`` away, the earlier is the key.
    Boxes are the tight boxes of the transformed masks. Of several rows of one instance the best
    scored counts. Videos without a track are left out.
    """

    files_a_sample = 2

    def __init__(
        self,
        tracks: Path,
        frames: Path | None,
        augment: AugmentConfig,
        *,
        max_gap: int = 10,
        cache_bytes: int = 0,
        keep_unseen: bool = False,
        on_error: OnError = STOP,
        dropped: str | None = None,
    ) -> None:
        """Open the tracks, whose index is kept if they are many, and find the videos' frames.

        Args:
            tracks: a tracks file or a YouTube-VIS dataset.
            frames: root of the videos' frames; None looks beside ``tracks``.
            augment: what the views may vary.
            max_gap: largest distance of the two frames.
            cache_bytes: decoded frames kept in memory, in bytes.
            keep_unseen: leave rows in the key frame that are not valid there (see `_paired`).
            on_error: whether a video without its frames is an error, or a warning as long as they
                are few.
            dropped: what tracks that `filter` set aside become: ``ignore``, ``background``, or
                None for what the file holds, which is ``ignore`` without asking whether it could.

        Raises:
            DataError: the file is malformed, frames are missing, no track is left, or dropped
                tracks are to be ignored regions and the file was written without them.
        """
        root = frames or (tracks if tracks.suffix == ".json" else tracks.parent)
        index = open_index(tracks)
        header = index.tables.header
        self.augment, self.max_gap, self.keep_unseen = augment, max_gap, keep_unseen
        self.categories = sorted_categories(header.categories)
        self._clips = Clips(index, without_dropped=dropped == "background")
        self.left_out = self._clips.left_out
        """Number of videos without a track."""
        if not self._clips:
            raise DataError(
                f"`{tracks}` holds no track in its {self.left_out} videos, so none to train on",
                "filter less strictly: a lower `--pscore` or a higher `--topk`",
            )
        if dropped == "ignore" and not self._clips.any_aside:
            check_set_aside(header, tracks)
        missing = self._clips.find_frames(root)
        if missing:
            first, share = missing[0], f"{len(missing)} of {len(self._clips)}"
            told = f"{share} videos are without their frames, first: {first.message}"
            judge_missing(told, len(missing), len(self._clips), on_error, first.hint)
        self._cache = _Cache[Image](cache_bytes)

    def __len__(self) -> int:
        """Return the number of videos."""
        return len(self._clips)

    def sample(self, index: int, rng: np.random.Generator) -> KeyReferencePair:
        """Return two frames of a video; a video of one frame gives that frame twice.

        Raises:
            DataError: a frame cannot be read or has another size than the tracks say.
        """
        clip = self._clips[index]
        times = _draw_times(clip.info.length, self.max_gap, rng)
        images = [
            self._cache.get((index, t), partial(clip.frames.__getitem__, t), _image_bytes)
            for t in times
        ]
        views = draw_clip([image.shape[:2] for image in images], self.augment, rng)
        rows = clip.seen(times)
        key, reference = (
            _clip_frame(clip, rows, time, image, view)
            for time, image, view in zip(times, images, views, strict=True)
        )
        name = f"video {clip.info.id}, `{clip.info.name}`, frames {times[0]} and {times[1]}"
        return replace(_paired(key, reference, self.keep_unseen), name=name)

    def ledger(self) -> Ledger:
        """Return the videos and tracks; tracks that `filter` set aside count as `ignored`."""
        return {"videos": self._clips.counts()}


def image_mixture(images: CocoImages, box_only_share: float = 3 / 7) -> Mixture[KeyReferencePair]:
    """Return the image stage's data: masked and box-only stills in the proportion of a run.

    The authors' loader draws from COCO and ImageNet with weights 1 and 0.75, hence 3/7. Where one
    kind is absent, the other gets everything.
    """
    masked, box_only = images.split()
    if not len(masked) or not len(box_only):
        return Mixture([images], [1.0])
    return Mixture([masked, box_only], [1 - box_only_share, box_only_share])


def annotation_ledger(source: Source[Any] | Mixture[Any]) -> dict[str, Any]:
    """Return which labels go into a run, as plain JSON values.

    Returns:
        ``sources`` maps a source's name to its counts; ``human`` counts what people drew in
        stills (``masks``, ``boxes``, ``points``) and in videos (``video_labels``, zero unless
        ground truth is given as pseudo labels); ``pseudo`` counts tracks labelled by a model.
    """
    ledger = source.ledger()
    stills = sum((row for row in ledger.values() if "videos" not in row), Counter())
    clips = sum((row for row in ledger.values() if "videos" in row), Counter())
    kinds = {"masks": Supervision.MASK, "boxes": Supervision.BOX, "points": Supervision.POINT}
    human = {name: stills[kind.value] for name, kind in kinds.items()}
    human["video_labels"] = sum(clips[kind.value] for kind in kinds.values())
    return {
        "sources": {name: dict(sorted(row.items())) for name, row in sorted(ledger.items())},
        "human": human,
        "pseudo": clips[Supervision.PSEUDO.value],
    }


class _Cache(Generic[T]):
    """Keeps what was made until its bytes run out; nothing is ever thrown out again.

    Epochs visit everything equally often, so a part that stays is worth more than the latest.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._left = limit_bytes
        self._kept: dict[Any, T] = {}
        self._lock = threading.Lock()

    def get(self, key: Any, make: Callable[[], T], size: Callable[[T], int]) -> T:
        """Return the value of ``key``, made by ``make`` if it is not kept; ``size`` in bytes."""
        found = self._kept.get(key)
        if found is not None:
            return found
        value = make()
        needed = size(value)
        with self._lock:
            if needed <= self._left and key not in self._kept:
                self._left -= needed
                self._kept[key] = value
        return value


def _load(still: Still) -> tuple[Image, Image]:
    """Return the image and the (N, H, W) masks of its RLE instances (zeros for the others)."""
    image = read_picture(still)
    rles = [instance.rle for instance in still.instances]
    return image, _decode(rles if any(rles) else (), still.size)


def _pair_bytes(pair: tuple[Image, Image]) -> int:
    """Return the bytes of an image and its masks."""
    return pair[0].nbytes + pair[1].nbytes


def _image_bytes(image: Image) -> int:
    """Return the bytes of an image."""
    return image.nbytes


def _decode(rles: Sequence[RLE | None], size: tuple[int, int]) -> Image:
    """Return (N, H, W) uint8 masks, zeros where there is no RLE."""
    out = np.zeros((len(rles), *size), np.uint8)
    for row, rle in enumerate(rles):
        if rle is not None:
            masks.decode(rle, out=out[row])
    return out


def _still_frame(still: Still, image: Image, bitmaps: Image, view: View) -> Frame:
    """Return a view of a still with all its instances."""
    height, width = view.size
    if len(bitmaps):
        seen = view.masks(bitmaps)
    else:
        seen = np.zeros((len(still.instances), height, width), np.uint8)
    for row, instance in enumerate(still.instances):
        if instance.polygons:
            polygons = [view.polygon(polygon).tolist() for polygon in instance.polygons]
            masks.decode(masks.from_polygons(polygons, height, width), out=seen[row])
    boxes = view.boxes(np.array([instance.box for instance in still.instances]))
    kinds = tuple(instance.supervision for instance in still.instances)
    masked = np.array([kind is Supervision.MASK for kind in kinds])
    valid = _filled(boxes) & (seen.any(axis=(1, 2)) | ~masked)
    labels = [instance.label for instance in still.instances]
    return _frame(image, view, _Rows(labels, boxes, seen, kinds, valid), np.empty((0, 4)))


def _clip_frame(clip: Clip, rows: NDArray[np.intp], time: int, image: Image, view: View) -> Frame:
    """Return a view of a video's frame with some of the tracks."""
    size = clip.info.height, clip.info.width
    seen = view.masks(_decode(clip.rles(rows, time), size))
    boxes = _tight_boxes(seen)
    away = [rle for rle in clip.rles(clip.ignored, time) if rle is not None]
    ignored = view.boxes(masks.to_boxes(away))
    # What lies on a known object is its duplicate, no missed object.
    unknown = _filled(ignored) & (_box_iou(ignored, boxes).max(1, initial=0) <= _DUPLICATE_IOU)
    found = _Rows(clip.labels(rows), boxes, seen, clip.supervision(rows), _filled(boxes))
    return _frame(image, view, found, ignored[unknown])


@dataclass(frozen=True)
class _Rows:
    """A view's instances as arrays: boxes xyxy in pixels, masks uint8."""

    labels: list[int]
    boxes: NDArray[np.float64]
    masks: Image
    supervision: tuple[Supervision, ...]
    valid: NDArray[np.bool_]


def _frame(image: Image, view: View, rows: _Rows, ignored: NDArray[np.float64]) -> Frame:
    """Turn a view's arrays into tensors."""
    targets = Targets(
        labels=torch.tensor(rows.labels, dtype=torch.int64),
        boxes=_relative(rows.boxes, view.size),
        masks=torch.from_numpy(rows.masks.view(np.bool_)),
        supervision=rows.supervision,
        valid=torch.from_numpy(rows.valid),
        ignored=_relative(ignored, view.size),
    )
    pixels = np.ascontiguousarray(view.image(image).transpose(2, 0, 1))
    return Frame(torch.from_numpy(pixels), targets, original_height=len(image))


def _paired(key: Frame, reference: Frame, keep_unseen: bool) -> KeyReferencePair:
    """Drop the rows that are not visible in the key from both frames, as IDOL does.

    Where they are visible in the reference they become ignored regions of it: a recipe that
    supervises reference frames too must not learn that nothing is there. Kept instead, they take
    no part in the key's losses, but are there to be counted (`SetCriterion.misplaced_boxes`).
    """
    if keep_unseen:
        return KeyReferencePair(key, reference)
    visible, other = key.targets.valid, reference.targets
    lost = other.boxes[other.valid & ~visible]
    rows = replace(other.select(visible), ignored=torch.cat([other.ignored, lost]))
    return KeyReferencePair(
        replace(key, targets=key.targets.select(visible)), replace(reference, targets=rows)
    )


def _relative(boxes: NDArray[np.float64], size: tuple[int, int]) -> torch.Tensor:
    """Turn (N, 4) xyxy pixels into float32 cxcywh relative to ``size``."""
    corners = boxes / np.array([size[1], size[0]] * 2)
    low, high = corners[:, :2], corners[:, 2:]
    return torch.from_numpy(np.concatenate([(low + high) / 2, high - low], 1).astype(np.float32))


def _filled(boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell which (N, 4) xyxy boxes have an inside."""
    return np.asarray((boxes[:, 2:] - boxes[:, :2] > _MIN_SIDE_PX).all(axis=1))


def _box_iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the (N, M) IoU of (N, 4) and (M, 4) xyxy boxes, 0 for empty ones."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    area_a, area_b = ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (a, b))
    whole = area_a[:, None] + area_b[None] - shared
    return np.asarray(np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0))


def _tight_boxes(bitmaps: Image) -> NDArray[np.float64]:
    """Return the (N, 4) xyxy boxes of (N, H, W) masks, far edge exclusive, zeros if empty."""
    out = np.zeros((len(bitmaps), 4))
    # Any row makes a column's hit, any column a row's.
    for axis, near in ((1, 0), (2, 1)):
        hit: NDArray[np.uint8] = bitmaps.max(axis=axis)
        found = hit.max(axis=1) > 0
        out[found, near] = hit[found].argmax(axis=1)
        out[found, near + 2] = hit.shape[1] - hit[found, ::-1].argmax(axis=1)
    return out


def _draw_times(length: int, max_gap: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw a centre frame and another one near it, in order; the same twice if it is alone."""
    centre = int(rng.integers(length))
    near = range(max(0, centre - max_gap), min(length, centre + max_gap + 1))
    others = [t for t in near if t != centre] or [centre]
    other = others[int(rng.integers(len(others)))]
    return min(centre, other), max(centre, other)
