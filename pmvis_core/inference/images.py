"""One image, without a tracker: IDOL's COCO mode, which judges its pre-training.

The best (query, category) pairs of a frame become instances; a query may stand under several
categories. Notable, as published: of two queries with the same best category the weaker goes where
their boxes overlap; what remains is ranked over all categories together, without a threshold.

    predictions = segmenter([prepare_image(image, size)])
    instances = segment_image(predictions, 0, size, image.shape[:2])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from pmvis_core.infer import full_size_masks
from pmvis_core.losses import Predictions

BOX_NMS = 0.7
"""IoU of boxes above which the weaker of two queries with one best category goes."""
MOST_INSTANCES = 100
"""Pairs of query and category that are kept."""


@dataclass(frozen=True)
class ImageInstances:
    """What was found in one image, best first."""

    scores: Tensor
    """(N,) class probability."""
    labels: Tensor
    """(N,) int64 0-based category."""
    boxes: Tensor
    """(N, 4) xyxy in pixels of the original image, clipped to it."""
    masks: Tensor
    """(N, H, W) bool at the original size."""


@torch.inference_mode()
def segment_image(
    predictions: Predictions,
    row: int,
    resized: tuple[int, int],
    original: tuple[int, int],
    most: int = MOST_INSTANCES,
) -> ImageInstances:
    """Read the instances of one frame off the network's predictions.

    Args:
        predictions: of a batch.
        row: the frame's place in the batch.
        resized: (height, width) at which the network saw it, without padding.
        original: (height, width) of the image, which the answer refers to.
        most: pairs that are kept.

    Returns:
        At most ``most`` instances; boxes that are empty at the original size are left out.
    """
    probabilities = predictions.logits[-1, row].sigmoid()
    best, label = probabilities.max(-1)
    corners = box_convert(predictions.boxes[-1, row], "cxcywh", "xyxy")
    kept = batched_nms(corners, best, label, BOX_NMS)
    pairs = probabilities[kept].flatten()
    scores, places = pairs.topk(min(most, len(pairs)))
    classes = probabilities.shape[-1]
    queries, labels = kept[places // classes], places % classes
    height, width = original
    sides = corners.new_tensor([width, height, width, height])
    boxes = corners[queries].clamp(0, 1) * sides
    full = (boxes[:, 2:] > boxes[:, :2]).all(1)
    queries, labels, scores, boxes = queries[full], labels[full], scores[full], boxes[full]
    # Under several categories a query has the same mask.
    distinct, which = queries.unique(return_inverse=True)
    logits = predictions.mask_logits(-1, torch.full_like(distinct, row), distinct)
    return ImageInstances(scores, labels, boxes, full_size_masks(logits, resized, original)[which])
