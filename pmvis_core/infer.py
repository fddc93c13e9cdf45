"""`infer`: frames in, tracks out, one video at a time (IDOL, section 3.3; PM-VIS+, section III-C).

A thread reads and resizes frames ahead; the network takes them in batches, the tracker one by one.
Only masks that belong to tracks become pixels, and run lengths at once, on disk: memory holds a few
frames and the living tracks, however long the video is. Each output row is a track under one
category, with that category's probability in every frame, which is what `refine` and `filter` need.

    with VideoInference(segmenter, checkpoint, source) as run:
        for frame in run:
            ...
        writer.write_pieces(run.pieces(), run.rows_written)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pmvis_core import masks, ops
from pmvis_core.association import UNTRACKED, Detections, OnlineTracker, select_candidates
from pmvis_core.checkpoint import Checkpoint
from pmvis_core.config import TrackerConfig, override
from pmvis_core.data.augment import shortest_edge
from pmvis_core.data.streams import prefetch
from pmvis_core.errors import DataError
from pmvis_core.files import significant
from pmvis_core.inference.segmenter import FrameSegmenter
from pmvis_core.inference.track_spool import Summary, TrackSpool
from pmvis_core.models.idol import IdolPredictions
from pmvis_core.tracks_json import stream_track, stream_video
from pmvis_core.types import RLE, Supervision, Track, VideoInfo, VideoTracks
from pmvis_core.video.image_files import Frame
from pmvis_core.video.sources import FrameSource, kept_info

logger = logging.getLogger(__name__)

MASK_STRIDE_PX = 4
PRUNE_AFTER_FRAMES = 9
"""Frames from which short-lived tracks are dropped from the result."""
SHORT_LIVED_FRAMES = 3
"""Appearances below which an absent track is dropped."""
ON_ERROR = ("stop", "skip", "blank")
"""What may become of a broken frame: the run ends; the video goes on without it; or it keeps its
place, without any mask."""


@dataclass(frozen=True)
class InferOptions:
    """What a run adds to the model's own thresholds."""

    max_side: int = 0
    """Cap of the longer side that the network sees, in pixels; 0: the model's own."""
    single_label: bool = False
    """One row a track, of its best category, instead of one for every category above
    ``row_score``."""
    on_error: str = "stop"
    """One of `ON_ERROR`."""
    spool: Path | None = None
    """Folder for what does not fit in memory; None: the system's for temporary files."""


@dataclass(frozen=True)
class _Prepared:
    """A frame on its way to the network."""

    t: int
    """Its place in the video."""
    size: tuple[int, int]
    """(height, width) of the original."""
    image: Tensor | None
    """(3, h, w) uint8 at the network's size; None: the frame is broken and left blank."""


class VideoInference:
    """The labelling of one video: iterate over its frames, then read the rows."""

    def __init__(
        self,
        segmenter: FrameSegmenter,
        checkpoint: Checkpoint,
        source: FrameSource,
        options: InferOptions = InferOptions(),
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            segmenter: the network, made of the checkpoint's model.
            checkpoint: vocabulary and thresholds.
            source: the video's frames.
            options: see there.
        """
        self.config = checkpoint.tracker
        self.categories = checkpoint.categories
        self.options = options
        self.source = source
        self.rows = 0
        """Rows that `pieces` has written so far."""
        self._segmenter = segmenter
        self._tracker = OnlineTracker(self.config)
        self._spool = TrackSpool(len(self.categories), options.spool)
        self._kept: Sequence[int] = ()
        self._length = 0

    @property
    def info(self) -> VideoInfo:
        """The video as far as it was taken: frames that were skipped are not of it."""
        info = self.source.info
        if self.source.live:
            return replace(info, length=self._length)
        return kept_info(info, self._kept)

    def rows_written(self) -> int:
        """Return how many rows `pieces` has written."""
        return self.rows

    def __iter__(self) -> Iterator[int]:
        """Work through the video and yield the number of frames done, after each.

        Raises:
            DataError: a frame cannot be read, and errors are not to be passed over.
        """
        faults = _Faults(self.source.info, self.options.on_error)
        frames = prefetch(_batches(self._prepared(faults), self._batch_size), depth=1)
        for batch in frames:
            images = [frame.image for frame in batch if frame.image is not None]
            predictions = self._segmenter(images) if images else None
            for row, frame in enumerate(batch):
                self._take(predictions, row, frame)
                self._length += 1
                yield self._length
        self._kept = faults.kept(self._length)
        faults.tell()
        if not self._length:
            info = self.source.info
            raise DataError(f"video {info.id} `{info.name}`: none of its frames could be read")

    def _prepared(self, faults: _Faults) -> Iterator[_Prepared]:
        """Yield the frames at the network's size, without those that are skipped."""
        height, width = self.source.info.height, self.source.info.width
        size = network_size((height, width), self.config, self.options.max_side)
        for t, reading in enumerate(self.source.readings()):
            if not isinstance(reading, DataError):
                yield _Prepared(t, (height, width), prepare_image(reading, size))
            elif faults.blank(t, reading):
                yield _Prepared(t, (height, width), None)

    def _batch_size(self, frame: _Prepared) -> int:
        """Return how many frames like this one go through the network together."""
        if frame.image is None:
            return 1
        height, width = frame.image.shape[1:]
        return self._segmenter.frames_at_once((height, width), self.config.frames_per_batch)

    @torch.inference_mode()
    def _take(self, predictions: IdolPredictions | None, row: int, frame: _Prepared) -> None:
        """Hand a frame's detections to the tracker, and what belongs to tracks to the spool."""
        t = self._length
        if predictions is None:
            self._tracker.skip_frame()
        else:
            self._collect(predictions, row, frame.size, t)
        for identity, track in list(self._spool.alive.items()):
            unseen = t - track.last_frame
            if track.number >= SHORT_LIVED_FRAMES:
                if unseen >= self.config.max_gap_frames:
                    self._spool.end(identity)
            elif t >= PRUNE_AFTER_FRAMES and unseen >= 2:
                # As published: only from the result; the tracker may bring the id back.
                self._spool.drop(identity)

    def _collect(
        self, predictions: IdolPredictions, row: int, size: tuple[int, int], t: int
    ) -> None:
        """Detect in one frame of a batch, assign ids, and spool the masks of tracks."""
        probabilities = predictions.logits[-1, row].sigmoid()
        queries = select_candidates(probabilities, predictions.boxes[-1, row], self.config)
        logits = predictions.mask_logits(-1, torch.full_like(queries, row), queries)
        detections = Detections(
            probabilities[queries].amax(-1), predictions.embeddings[row, queries], logits > 0
        )
        rows, ids = self._tracker.update(detections)
        kept = [(index, identity) for index, identity in enumerate(ids) if identity != UNTRACKED]
        if not kept:
            return
        chosen = rows[[index for index, _ in kept]].to(logits.device)
        height, width = predictions.sizes[row].tolist()
        encoded = encode_masks(logits[chosen], (height, width), size)
        vectors = probabilities[queries[chosen]].cpu().numpy()
        for (_, identity), vector, rle in zip(kept, vectors, encoded, strict=True):
            self._spool.add(identity, t, vector, rle["counts"])

    def pieces(self) -> Iterator[str]:
        """Yield the text of the video's line in pieces; see `TracksWriter.write_pieces`."""
        info = self.info
        yield from stream_video(info, (self._row_text(row, info.length) for row in self._rows()))

    def tracks(self) -> VideoTracks:
        """Return all rows in memory, which suits short videos."""
        info = self.info
        rows = tuple(self._row_track(row, info) for row in self._rows())
        return VideoTracks(info, rows)

    def _rows(self) -> Iterator[_Row]:
        """Yield one row per object and category whose score passes the threshold."""
        number = 0
        for summary in self._spool.summaries():
            scores = summary.scores(self.config.score_type)
            above = np.flatnonzero(scores > self.config.row_score)
            for label in [int(scores.argmax())] if self.options.single_label else above.tolist():
                number += 1
                self.rows = number
                head = Track(
                    id=number,
                    category_id=self.categories[label].id,
                    score=significant(float(scores[label])),
                    frame_scores=(),
                    rles=(),
                    instance=summary.identity,
                    supervision=Supervision.PSEUDO,
                )
                yield _Row(head, self._appearances(summary, label))

    def _appearances(
        self, summary: Summary, label: int
    ) -> Callable[[], Iterator[tuple[int, float, str]]]:
        """Return a function that reads (frame, score, run lengths) of a track under a category."""

        def read() -> Iterator[tuple[int, float, str]]:
            for seen in self._spool.appearances(summary):
                yield seen.frame, significant(float(seen.probabilities[label])), seen.counts

        return read

    @staticmethod
    def _row_text(row: _Row, length: int) -> Iterator[str]:
        """Yield a row's text in pieces."""
        return stream_track(row.head, length, row.appearances)

    @staticmethod
    def _row_track(row: _Row, info: VideoInfo) -> Track:
        """Return a row with its frames."""
        scores: list[float | None] = [None] * info.length
        rles: list[RLE | None] = [None] * info.length
        for t, score, counts in row.appearances():
            scores[t] = score
            rles[t] = RLE(size=[info.height, info.width], counts=counts)
        return replace(row.head, frame_scores=tuple(scores), rles=tuple(rles))

    def __enter__(self) -> VideoInference:
        """Return the run itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what was spooled."""
        self._spool.close()


@dataclass(frozen=True)
class _Row:
    """A track under one category."""

    head: Track
    """Everything but its frames."""
    appearances: Callable[[], Iterator[tuple[int, float, str]]]
    """Reads (frame, score, run lengths)."""


class _Faults:
    """The broken frames of one video."""

    def __init__(self, info: VideoInfo, on_error: str) -> None:
        """Remember what is to become of them."""
        self._info = info
        self._on_error = on_error
        self._places: list[int] = []
        self._shown: set[str] = set()

    def blank(self, t: int, error: DataError) -> bool:
        """Take note of a broken frame; tell whether it keeps its place.

        Raises:
            DataError: the error itself, where it is to end the run.
        """
        if self._on_error == "stop":
            raise error
        if str(error) not in self._shown and len(self._shown) < 10:
            self._shown.add(str(error))
            fate = "left out" if self._on_error == "skip" else "left blank"
            logger.warning("%s; the frame is %s", error, fate)
        if t < self._info.length:
            self._places.append(t)
        return self._on_error == "blank" and t < self._info.length

    def kept(self, length: int) -> Sequence[int]:
        """Return the frames that stay in the video, of which there are ``length``."""
        if self._on_error == "blank" or not self._places:
            return range(length)
        lost = set(self._places)
        return [t for t in range(length + len(lost)) if t not in lost]

    def tell(self) -> None:
        """Sum up."""
        if self._places:
            logger.warning(
                "video %d `%s`: %d of %d frames are broken",
                self._info.id,
                self._info.name,
                len(self._places),
                self._info.length,
            )


def infer_video(
    checkpoint: Checkpoint,
    source: FrameSource,
    device: torch.device,
    options: InferOptions = InferOptions(),
) -> VideoTracks:
    """Segment and track the objects of one video, with all its rows in memory.

    Args:
        checkpoint: the model, which is arranged for inference, its vocabulary and thresholds.
        source: the video's frames.
        device: where the network runs.
        options: what to do with the video.

    Returns:
        One track per (object, category) whose score passes the row threshold.

    Raises:
        DataError: a frame cannot be read.
    """
    segmenter = FrameSegmenter(checkpoint.model, device)
    with VideoInference(segmenter, checkpoint, source, options) as run:
        for _ in run:
            pass
        return run.tracks()


def network_size(
    size: tuple[int, int], config: TrackerConfig, max_side: int = 0
) -> tuple[int, int]:
    """Return the (height, width) at which the network sees frames of (height, width)."""
    short = config.short_side or min(size)
    long = config.long_side if config.short_side else max(size)
    return shortest_edge(size, short, min(long, max_side or long))


def prepare_image(image: Frame, size: tuple[int, int]) -> Tensor:
    """Resize an (H, W, 3) RGB frame to (h, w), as (3, h, w) uint8.

    As published, by PIL's bilinear filter, which averages when it shrinks.
    """
    if image.shape[:2] != size:
        height, width = size
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        image = np.array(resized)
    return torch.from_numpy(image).permute(2, 0, 1)


def with_thresholds(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Checkpoint:
    """Return the checkpoint with some of its tracker's thresholds replaced.

    Raises:
        UsageError: a name is unknown or a value has the wrong type.
    """
    return replace(checkpoint, tracker=override(checkpoint.tracker, settings, "--set"))


def full_size_masks(logits: Tensor, resized: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Turn stride-4 mask logits into masks at the original size.

    Args:
        logits: (N, h, w) at stride 4 of the padded frame.
        resized: (height, width) of the frame as the network saw it, without padding.
        original: (height, width) of the video.

    Returns:
        (N, H, W) bool: bilinear to the padded size, cropped, then nearest to the original size.
        A probability above 0.5 is a logit above 0, so no sigmoid is taken.
    """
    rows, columns = _places(resized, original, logits.device)
    if logits.device.type != "cpu":
        return _enlarge(logits)[:, rows[:, None], columns]
    out = torch.zeros(len(logits), *original, dtype=torch.bool)
    for mask, logit in zip(out, logits, strict=True):
        _paste(mask, logit, resized, rows, columns)
    return out


def encode_masks(logits: Tensor, resized: tuple[int, int], original: tuple[int, int]) -> list[RLE]:
    """Encode what `full_size_masks` gives; from a GPU only the ends of runs cross to the host."""
    if logits.device.type == "cpu":
        return masks.encode_many(full_size_masks(logits, resized, original).numpy())
    picks = _places(resized, original, logits.device)
    return ops.logits_to_rle(logits, _enlarged_size(logits), picks=picks)


def _enlarged_size(logits: Tensor) -> tuple[int, int]:
    """Return (height, width) of the padded frame to which (N, h, w) logits belong."""
    return MASK_STRIDE_PX * logits.shape[-2], MASK_STRIDE_PX * logits.shape[-1]


def _enlarge(logits: Tensor) -> Tensor:
    """Return (N, height, width) bool of (N, h, w) logits at the size of the padded frame."""
    size = _enlarged_size(logits)
    full = F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)
    return full[:, 0] > 0


def _paste(
    mask: Tensor, logit: Tensor, resized: tuple[int, int], rows: Tensor, columns: Tensor
) -> None:
    """Enlarge the part of (h, w) logits that has anything above 0, into an (H, W) bool mask.

    One cell more on each side has a say in the part's pixels; one further makes its own edge,
    where there is nothing beyond to mix with, the same as in the whole.
    """
    inside = logit > 0
    bounds = []
    for axis in (1, 0):
        places = inside.any(axis).nonzero()
        if not len(places):
            return
        first, last = int(places[0]), int(places[-1])
        bounds.append((max(first - 2, 0), min(last + 3, logit.shape[1 - axis])))
    (top, bottom), (left, right) = bounds
    part = _enlarge(logit[None, top:bottom, left:right])[0]
    high = _within(rows, MASK_STRIDE_PX * top, MASK_STRIDE_PX * bottom)
    wide = _within(columns, MASK_STRIDE_PX * left, MASK_STRIDE_PX * right)
    lines = part.index_select(0, rows[high] - MASK_STRIDE_PX * top)
    mask[high, wide] = lines.index_select(1, columns[wide] - MASK_STRIDE_PX * left)


def _within(places: Tensor, start: int, stop: int) -> slice:
    """Return where ascending ``places`` lie in [start, stop)."""
    first, last = torch.searchsorted(places, torch.tensor([start, stop])).tolist()
    return slice(first, last)


def _places(
    resized: tuple[int, int], original: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the (H,) rows and (W,) columns of the enlarged logits that make the final mask."""
    rows, columns = (
        _nearest(size, wanted, device) for size, wanted in zip(resized, original, strict=True)
    )
    return rows, columns


def _nearest(size: int, wanted: int, device: torch.device) -> Tensor:
    """Return the (wanted,) places of an axis of ``size`` that nearest-neighbour resizing takes."""
    line = torch.arange(size, dtype=torch.float32, device=device)
    return F.interpolate(line[None, None], size=wanted)[0, 0].long()


def _batches(
    frames: Iterator[_Prepared], size_for: Callable[[_Prepared], int]
) -> Iterator[list[_Prepared]]:
    """Group frames in a row that are all whole or all blank."""
    for whole, run in groupby(frames, lambda frame: frame.image is not None):
        batch: list[_Prepared] = []
        for frame in run:
            batch.append(frame)
            if len(batch) >= (size_for(frame) if whole else 1):
                yield batch
                batch = []
        if batch:
            yield batch
