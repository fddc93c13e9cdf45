"""IDOL's online tracker: a memory bank of embeddings and bi-softmax matching (section 3.3).

Notable, as published: candidates above the selection threshold pass a per-class box NMS and a
class-agnostic mask NMS; tracks and detections are matched greedily in score order; a track is
remembered by its last few embeddings, the newer and surer ones weighing more; where several tracks
fit a detection, the one seen in more frames is preferred. `TrackerConfig` can switch each of these
off, down to a plain momentum embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from pmvis_core.config import TrackerConfig

UNTRACKED = -1
"""The id of a detection that neither joins nor starts a track."""
BOTH_EMPTY = 1e-6
"""Added to intersection and union of masks, so that two empty masks count as the same."""


@dataclass(frozen=True)
class Detections:
    """Candidates of one frame, best first."""

    scores: Tensor
    """(N,) highest class probability."""
    embeddings: Tensor
    """(N, E)."""
    masks: Tensor
    """(N, h, w) bool at stride 4 of the padded frame."""


def select_candidates(probabilities: Tensor, boxes: Tensor, config: TrackerConfig) -> Tensor:
    """Choose the queries of a frame that go to the tracker.

    Args:
        probabilities: (Q, K) class probabilities.
        boxes: (Q, 4) cxcywh relative.
        config: thresholds.

    Returns:
        (N,) queries, best first: those above the threshold after per-class box NMS, or the
        single best one if none is above it.
    """
    scores, labels = probabilities.max(-1)
    above = (scores > config.select_score).nonzero()[:, 0]
    if not len(above):
        return scores.argmax()[None]
    corners = box_convert(boxes[above], "cxcywh", "xyxy")
    return above[batched_nms(corners, scores[above], labels[above], config.box_nms)]


def mask_nms(masks: Tensor, threshold: float) -> Tensor:
    """Suppress masks that overlap a better one.

    Args:
        masks: (N, h, w) bool, best first.
        threshold: IoU above which the worse one goes, whatever its class.

    Returns:
        (N,) bool on the CPU, True for those kept.
    """
    flat = masks.flatten(1).float()
    intersection = flat @ flat.T
    area = flat.sum(1)
    union = area[:, None] + area[None] - intersection
    overlaps = ((intersection + BOTH_EMPTY) / (union + BOTH_EMPTY) > threshold).cpu().numpy()
    keep = np.ones(len(masks), np.bool_)
    for row in range(len(masks)):
        if keep[row]:
            keep[row + 1 :] &= ~overlaps[row, row + 1 :]
    return torch.from_numpy(keep)


@dataclass
class _Tracklet:
    """What the bank remembers of one track."""

    id: int
    last_frame: int
    momentum_embedding: Tensor
    seen_frames: int = 0
    embeddings: list[Tensor] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def remember(self, embedding: Tensor, score: float, frame: int, config: TrackerConfig) -> None:
        """Append an appearance and forget the oldest beyond the memory."""
        self.embeddings = [*self.embeddings, embedding][-config.memory_frames :]
        self.scores = [*self.scores, score][-config.memory_frames :]
        self.momentum_embedding = self.momentum_embedding.lerp(embedding, config.momentum)
        self.seen_frames += 1
        self.last_frame = frame

    def memory(self, config: TrackerConfig) -> Tensor:
        """Return the (E,) embedding that detections are compared with."""
        if not config.long_match:
            return self.momentum_embedding
        weight = torch.tensor(self.scores)
        if config.temporal_weight:
            n = len(self.scores)
            weight = weight + torch.arange(1, n + 1) / n
        return (torch.stack(self.embeddings) * weight[:, None]).sum(0) / weight.sum()


class OnlineTracker:
    """Gives detections the ids of the objects they belong to, frame by frame.

    Its own state lies on the CPU, as its numbers are few and its decisions one after the other.
    """

    def __init__(self, config: TrackerConfig) -> None:
        """Start with an empty bank at frame 0."""
        self.config = config
        self.tracklets: list[_Tracklet] = []
        self.frame = 0
        self._next_id = 0

    def update(self, detections: Detections) -> tuple[Tensor, list[int]]:
        """Take the next frame.

        Args:
            detections: its candidates, best first.

        Returns:
            (n,) rows kept by mask NMS, on the CPU, and the track id of each (``UNTRACKED`` for
            none).
        """
        rows = mask_nms(detections.masks, self.config.mask_nms).nonzero()[:, 0]
        scores = detections.scores.cpu()[rows].tolist()
        embeddings = detections.embeddings.cpu()[rows]
        starts_above = self.config.new_score if self.tracklets else self.config.init_score
        matched = self._match(embeddings)
        ids = []
        for index, score, embedding in zip(matched, scores, embeddings, strict=True):
            tracklet = self.tracklets[index] if index is not None else None
            if tracklet is None and score > starts_above:
                tracklet = _Tracklet(self._next_id, self.frame, embedding)
                self._next_id += 1
                self.tracklets.append(tracklet)
            if tracklet is not None:
                tracklet.remember(embedding, score, self.frame, self.config)
            ids.append(UNTRACKED if tracklet is None else tracklet.id)
        self.skip_frame()
        return rows, ids

    def _match(self, embeddings: Tensor) -> list[int | None]:
        """Return, for each (n, E) embedding, the index of the tracklet it joins."""
        if not self.tracklets or not len(embeddings):
            return [None] * len(embeddings)
        memory = torch.stack([tracklet.memory(self.config) for tracklet in self.tracklets])
        logits = embeddings @ memory.T
        similarity = ((logits.softmax(1) + logits.softmax(0)) / 2).numpy()
        seen = np.array([t.seen_frames for t in self.tracklets], np.float32)
        matched: list[int | None] = []
        for row in range(len(similarity)):
            fits = similarity[row] > self.config.match_score
            weighted = similarity[row]
            if self.config.frame_weight and fits.sum() > 1:
                weighted = weighted * np.where(fits, seen, seen[fits].mean())
            best = int(weighted.argmax())
            if weighted[best] > self.config.match_score:
                matched.append(best)
                similarity[row + 1 :, best] = 0
            else:
                matched.append(None)
        return matched

    def skip_frame(self) -> None:
        """Let a frame pass of which nothing is known."""
        self._forget()
        self.frame += 1

    def _forget(self) -> None:
        """Remove tracklets that have not been seen for too long."""
        oldest = self.frame - self.config.max_gap_frames
        self.tracklets = [t for t in self.tracklets if t.last_frame > oldest]
