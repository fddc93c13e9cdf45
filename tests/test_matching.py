"""SimOTA against the published matches and against loops over images, instances and queries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou

from pmvis_core.data.samples import Targets
from pmvis_core.matching import (
    Match,
    OptimalTransportMatcher,
    PaddedTargets,
    paired_giou,
    pairwise_iou,
    to_xyxy,
)
from pmvis_core.types import Supervision
from tests.parity_idol_losses import stored_frame

_PAIRS = ("C1_losses_pair", "C2_losses_batch2", "C3_losses_empty_key")


def _targets(labels: Tensor, boxes: Tensor, valid: Tensor | None = None) -> Targets:
    n = len(labels)
    valid = torch.ones(n, dtype=torch.bool) if valid is None else valid
    masks = torch.zeros(n, 8, 8, dtype=torch.bool)
    return Targets(labels, boxes, masks, (Supervision.MASK,) * n, valid, torch.zeros(0, 4))


def _random_boxes(n: int, random: torch.Generator, shape: tuple[int, ...] = ()) -> Tensor:
    centre = torch.rand(*shape, n, 2, generator=random) * 0.5 + 0.25
    return torch.cat([centre, torch.rand(*shape, n, 2, generator=random) * 0.4 + 0.05], -1)


def _costs_by_loops(logits: Tensor, boxes: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """IDOL's (Q, G) costs and IoUs of one image, query by query."""
    cost = torch.zeros(len(boxes), len(targets))
    iou = torch.zeros_like(cost)
    for q, box in enumerate(boxes):
        cx, cy = box[0], box[1]
        near_any = False
        for g, (label, target) in enumerate(zip(targets.labels, targets.boxes, strict=True)):
            p = logits[q, label].sigmoid()
            yes = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
            no = 0.75 * p**2 * -(1 - p + 1e-8).log()
            ious = pairwise_iou(to_xyxy(target)[None], to_xyxy(box)[None])
            iou[q, g] = ious[0][0, 0]
            dx, dy = cx - target[0], cy - target[1]
            inside = dx.abs() < target[2] / 2 and dy.abs() < target[3] / 2
            near = dx.abs() < 2.5 / 32 and dy.abs() < 2.5 / 32
            near_any = bool(near_any or inside or near)
            cost[q, g] = yes - no - 3 * ious[1][0, 0] + 100 * (not (inside and near))
        if not near_any:
            cost[q] += 10000
    return cost, iou


def _assign_by_loops(cost: Tensor, iou: Tensor, candidates: int) -> list[set[int]]:
    """The (changed) costs' queries of each instance, with the published retry."""
    queries, instances = cost.shape
    owned: list[set[int]] = []
    for g in range(instances):
        best = sorted(iou[:, g].tolist(), reverse=True)[:candidates]
        k = max(1, int(torch.tensor(best).sum()))
        owned.append(set(cost[:, g].argsort()[:k].tolist()))

    def owners(q: int) -> list[int]:
        return [g for g in range(instances) if q in owned[g]]

    def settle(contested: list[int]) -> None:
        for q in contested:
            cheapest = int(cost[q].argmin())
            for g in range(instances):
                owned[g].discard(q)
            owned[cheapest].add(q)

    contested = [q for q in range(queries) if len(owners(q)) > 1]
    settle(contested)
    for _ in range(8):
        missing = [g for g in range(instances) if not owned[g]]
        if not missing:
            break
        for q in range(queries):
            if owners(q):
                cost[q] += 100000
        for g in missing:
            owned[g].add(int(cost[:, g].argmin()))
        if any(len(owners(q)) > 1 for q in range(queries)):
            settle(contested)
    return owned


def _assert_image(
    match: Match, layer: int, frame: int, cost: Tensor, owned: list[set[int]]
) -> None:
    """Compare one image's match with the loops' answer."""
    rows = ((match.layer == layer) & (match.frame == frame)).nonzero()[:, 0]
    expected = {}
    for g, queries in reversed(list(enumerate(owned))):
        expected |= dict.fromkeys(queries, g)
    found = zip(match.query[rows].tolist(), match.instance[rows].tolist(), strict=True)
    assert list(found) == sorted(expected.items())
    assert match.selected[layer, frame].nonzero()[:, 0].tolist() == sorted(expected)
    best = [min(own, key=lambda q: cost[q, g].item()) if own else -1 for g, own in enumerate(owned)]
    assert match.best[layer, frame, : len(owned)].tolist() == best
    assert (match.best[layer, frame, len(owned) :] == -1).all()


@pytest.mark.parametrize("queries, most", [(40, 4), (12, 6), (6, 4), (3, 5)])
@pytest.mark.parametrize("seed", range(6))
def test_layers_and_ragged_images_equal_loops(queries, most, seed):
    """Few queries for many instances bring contests and retries."""
    random = torch.Generator().manual_seed(seed)
    counts = [most, 1, 0, most - 1]
    targets = [
        _targets(torch.randint(0, 5, (n,), generator=random), _random_boxes(n, random))
        for n in counts
    ]
    logits = torch.randn(2, 4, queries, 5, generator=random) * 2
    boxes = _random_boxes(queries, random, (2, 4))
    match = OptimalTransportMatcher()(logits, boxes, PaddedTargets.of(targets))
    for layer, frame in np.ndindex(2, 4):
        cost, iou = _costs_by_loops(logits[layer, frame], boxes[layer, frame], targets[frame])
        owned = _assign_by_loops(cost, iou, 10)
        _assert_image(match, layer, frame, cost, owned)


@pytest.mark.parametrize("seed", range(4))
def test_contrast_equals_loops(seed):
    random = torch.Generator().manual_seed(seed)
    targets = [
        _targets(torch.randint(0, 3, (n,), generator=random), _random_boxes(n, random))
        for n in (5, 2)
    ]
    logits, boxes = torch.randn(2, 24, 3, generator=random), _random_boxes(24, random, (2,))
    matcher = OptimalTransportMatcher(loose_candidates=18)
    contrast = matcher.contrast(logits, boxes, PaddedTargets.of(targets))
    for frame, target in enumerate(targets):
        cost, iou = _costs_by_loops(logits[frame], boxes[frame], target)
        positives = _assign_by_loops(cost, iou, 10)
        loosened = _assign_by_loops(cost, iou, 18)
        for g in range(len(target)):
            assert set(contrast.positives[frame, g].nonzero()[:, 0].tolist()) == positives[g]
            negatives = set(contrast.negatives[frame, g].nonzero()[:, 0].tolist())
            assert negatives == set(range(24)) - loosened[g]
    assert not contrast.negatives[1, 2:].any()


@pytest.mark.parametrize("name", _PAIRS)
def test_published_matches_of_the_last_layer(shared: Path, name: str):
    stored = np.load(shared / f"golden/idol/{name}.npz")
    videos = range(len(stored["pred_logits"]))
    targets = [stored_frame(stored, v, "key").targets for v in videos]
    logits, boxes = (torch.from_numpy(stored[f"pred_{n}"])[None] for n in ("logits", "boxes"))
    match = OptimalTransportMatcher()(logits, boxes, PaddedTargets.of(targets))
    for v, target in enumerate(targets):
        kept = target.valid.nonzero()[:, 0]
        np.testing.assert_array_equal(match.selected[0, v], stored[f"match_l5_v{v}_selected"])
        instance = match.instance[match.frame == v]
        np.testing.assert_array_equal(instance, kept[stored[f"match_l5_v{v}_gt"]])
        np.testing.assert_array_equal(
            match.best[0, v, kept], stored[f"match_l5_v{v}_matched_query"]
        )


def test_absent_rows_change_nothing():
    """A row that its frame does not show may hold anything, even a label out of range."""
    random = torch.Generator().manual_seed(0)
    labels, boxes = torch.tensor([1, 2]), _random_boxes(2, random)
    ghost = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    padded = _targets(
        torch.tensor([1, 99, 2]),
        torch.cat([boxes[:1], ghost, boxes[1:]]),
        torch.tensor([True, False, True]),
    )
    logits, queries = torch.randn(1, 1, 20, 4, generator=random), _random_boxes(20, random, (1, 1))
    matcher = OptimalTransportMatcher()
    plain = matcher(logits, queries, PaddedTargets.of([_targets(labels, boxes)]))
    other = matcher(logits, queries, PaddedTargets.of([padded]))
    assert torch.equal(plain.query, other.query)
    assert torch.equal(plain.instance, other.instance.div(2, rounding_mode="floor"))
    assert other.best[0, 0].tolist() == [plain.best[0, 0, 0], -1, plain.best[0, 0, 1]]


def test_more_instances_than_queries_end():
    random = torch.Generator().manual_seed(0)
    targets = PaddedTargets.of(
        [_targets(torch.zeros(9, dtype=torch.long), _random_boxes(9, random))]
    )
    logits, boxes = torch.zeros(1, 1, 2, 1), _random_boxes(2, random, (1, 1))
    match = OptimalTransportMatcher()(logits, boxes, targets)
    assert match.selected.all()
    assert len(match.query) == 2


def test_no_instances_at_all():
    empty = _targets(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))
    targets = PaddedTargets.of([empty, empty])
    logits, boxes = torch.zeros(3, 2, 5, 4), torch.full((3, 2, 5, 4), 0.5)
    match = OptimalTransportMatcher()(logits, boxes, targets)
    assert not match.selected.any()
    assert len(match.layer) == 0
    assert match.best.tolist() == [[[-1], [-1]]] * 3
    contrast = OptimalTransportMatcher().contrast(logits[0], boxes[0], targets)
    assert not (contrast.positives | contrast.negatives).any()


def test_iou_equals_torchvision():
    random = torch.Generator().manual_seed(0)
    a, b = (to_xyxy(_random_boxes(7, random)).double() for _ in range(2))
    expected = generalized_box_iou(a, b)
    torch.testing.assert_close(pairwise_iou(a, b)[1], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(paired_giou(a, b), expected.diagonal(), atol=1e-4, rtol=0)
    nothing = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    assert pairwise_iou(nothing, nothing)[0].item() == 0
