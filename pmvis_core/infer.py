"""`infer`: frames in, tracks out, one video at a time (IDOL, section 3.3; PM-VIS+, section III-C).

Every frame is decoded, segmented and handed to the tracker; masks become run lengths at once, so
memory grows with the text of the masks only, not with frames. Each output row is a track under one
category, with that category's probability in every frame, which is what `refine` and `filter` need.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pmvis_core import masks
from pmvis_core.association import UNTRACKED, Detections, OnlineTracker, select_candidates
from pmvis_core.augment import shortest_edge
from pmvis_core.checkpoint import Checkpoint
from pmvis_core.config import TrackerConfig, override
from pmvis_core.files import significant
from pmvis_core.models.idol import IdolPredictions
from pmvis_core.samples import ImageBatch
from pmvis_core.types import RLE, Category, Supervision, Track, VideoTracks
from pmvis_core.video import FrameSource

MASK_STRIDE_PX = 4
PRUNE_AFTER_FRAMES = 9
"""Frames from which short-lived tracks are dropped from the result."""
SHORT_LIVED_FRAMES = 3
"""Appearances below which an absent track is dropped."""


@dataclass
class _Appearances:
    """What one track collects: per frame its class probabilities and its mask."""

    probabilities: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    rles: dict[int, RLE] = field(default_factory=dict)


@torch.no_grad()
def infer_video(checkpoint: Checkpoint, source: FrameSource, device: torch.device) -> VideoTracks:
    """Segment and track the objects of one video.

    Args:
        checkpoint: the model with its vocabulary and thresholds; the model lies on ``device``.
        source: the video's frames.
        device: where the network runs.

    Returns:
        One track per (object, category) whose mean probability passes the row threshold.

    Raises:
        DataError: a frame cannot be read.
    """
    config = checkpoint.tracker
    tracker = OnlineTracker(config)
    found: dict[int, _Appearances] = {}
    frame = 0
    for images in _batches(source.frames(), config.frames_per_batch):
        batch = ImageBatch.of([prepare_image(image, config).to(device) for image in images])
        predictions = checkpoint.model(batch)
        for row, image in enumerate(images):
            _track_frame(predictions, row, image.shape[:2], frame, tracker, found)
            _prune(found, frame)
            frame += 1
    return VideoTracks(
        source.info, tuple(_rows(found, frame, checkpoint.categories, config.row_score))
    )


def prepare_image(image: NDArray[np.uint8], config: TrackerConfig) -> Tensor:
    """Resize an (H, W, 3) RGB frame to the network's size, as (3, h, w) float32 in 0..255."""
    if config.short_side:
        size = (image.shape[0], image.shape[1])
        height, width = shortest_edge(size, config.short_side, config.long_side)
        if (height, width) != size:
            resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
            image = np.asarray(resized)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def with_thresholds(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Checkpoint:
    """Return the checkpoint with some of its tracker's thresholds replaced.

    Raises:
        UsageError: a name is unknown or a value has the wrong type.
    """
    return replace(checkpoint, tracker=override(checkpoint.tracker, settings, "--set"))


def _track_frame(
    predictions: IdolPredictions,
    row: int,
    size: tuple[int, ...],
    frame: int,
    tracker: OnlineTracker,
    found: dict[int, _Appearances],
) -> None:
    """Detect in one frame of a batch, assign ids, and collect what belongs to tracks."""
    probabilities = predictions.logits[-1, row].sigmoid()
    queries = select_candidates(probabilities, predictions.boxes[-1, row], tracker.config)
    logits = predictions.mask_logits(-1, torch.full_like(queries, row), queries)
    detections = Detections(
        probabilities[queries].amax(-1),
        predictions.embeddings[row, queries],
        logits.sigmoid() > 0.5,
    )
    rows, ids = tracker.update(detections)
    kept = [(index, identity) for index, identity in enumerate(ids) if identity != UNTRACKED]
    if not kept:
        return
    chosen = rows[[index for index, _ in kept]]
    height, width = predictions.sizes[row].tolist()
    full = full_size_masks(logits[chosen], (height, width), (size[0], size[1]))
    vectors = probabilities[queries[chosen]].cpu().numpy()
    encoded = masks.encode_many(full.cpu().numpy())
    for (_, identity), vector, rle in zip(kept, vectors, encoded, strict=True):
        appearances = found.setdefault(identity, _Appearances())
        appearances.probabilities[frame] = vector
        appearances.rles[frame] = rle


def full_size_masks(logits: Tensor, resized: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Turn stride-4 mask logits into masks at the original size.

    Args:
        logits: (N, h, w) at stride 4 of the padded frame.
        resized: (height, width) of the frame as the network saw it, without padding.
        original: (height, width) of the video.

    Returns:
        (N, H, W) bool: bilinear to the padded size, cropped, then nearest to the original size.
    """
    size = [MASK_STRIDE_PX * side for side in logits.shape[-2:]]
    full = F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)
    probability = full.sigmoid()[:, :, : resized[0], : resized[1]]
    return F.interpolate(probability, size=original)[:, 0] > 0.5


def _prune(found: dict[int, _Appearances], frame: int) -> None:
    """Drop tracks that were short and are gone; their ids may come back later, as published."""
    if frame < PRUNE_AFTER_FRAMES:
        return
    gone = [
        identity
        for identity, seen in found.items()
        if len(seen.rles) < SHORT_LIVED_FRAMES
        and frame not in seen.rles
        and frame - 1 not in seen.rles
    ]
    for identity in gone:
        del found[identity]


def _rows(
    found: dict[int, _Appearances], length: int, categories: tuple[Category, ...], threshold: float
) -> Iterator[Track]:
    """Yield one track per object and category whose mean probability passes the threshold."""
    number = 0
    for identity, seen in found.items():
        rles = tuple(seen.rles.get(t) for t in range(length))
        means = np.stack(list(seen.probabilities.values())).mean(0, dtype=np.float64)
        for label in np.flatnonzero(means > threshold):
            number += 1
            vectors = (seen.probabilities.get(t) for t in range(length))
            yield Track(
                id=number,
                category_id=categories[label].id,
                score=significant(float(means[label])),
                frame_scores=tuple(
                    None if v is None else significant(float(v[label])) for v in vectors
                ),
                rles=rles,
                instance=identity,
                supervision=Supervision.PSEUDO,
            )


def _batches(frames: Iterable[NDArray[np.uint8]], size: int) -> Iterator[list[NDArray[np.uint8]]]:
    """Group frames into lists of at most ``size``."""
    iterator = iter(frames)
    while batch := list(islice(iterator, size)):
        yield batch
