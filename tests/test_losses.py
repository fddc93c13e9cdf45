"""The criterion against the published losses and a float64 loop over layers, frames and queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pmvis_core.data.samples import Frame, KeyReferencePair, Targets
from pmvis_core.errors import DataError
from pmvis_core.losses import (
    LossWeights,
    SetCriterion,
    dice_loss,
    sigmoid_focal_loss,
)
from pmvis_core.matching import OptimalTransportMatcher, PaddedTargets, to_xyxy
from pmvis_core.reid_losses import contrastive_loss, draw_negatives, negative_keys
from pmvis_core.types import Supervision
from pmvis_core.weak_losses import BoxInst, box_masks, projection_loss
from tests.golden_idol import assert_equal
from tests.parity_idol_losses import check_losses

MASK, BOX, PSEUDO, POINT = (Supervision(kind) for kind in ("mask", "box", "pseudo", "point"))
_LAYERS, _QUERIES, _CLASSES, _SIDES = 2, 8, 3, (16, 24)
_MATCHER = OptimalTransportMatcher(loose_candidates=4)


@dataclass
class _Outputs:
    """Predictions as free tensors; a query's mask is made of its own logits."""

    logits: Tensor
    boxes: Tensor
    embeddings: Tensor
    masks: Tensor

    @classmethod
    def random(cls, frames: int, seed: int, queries: int = _QUERIES) -> _Outputs:
        draw = torch.Generator().manual_seed(seed)
        boxes = torch.rand(_LAYERS, frames, queries, 4, generator=draw, dtype=torch.float64)
        boxes = boxes * 0.4 + torch.tensor([0.3, 0.3, 0.1, 0.1])
        shape = (_LAYERS, frames, queries)
        logits, embeddings, masks = (
            torch.randn(*s, generator=draw, dtype=torch.float64)
            for s in (
                (*shape, _CLASSES),
                (frames, queries, 5),
                (*shape, _SIDES[0] // 4, _SIDES[1] // 4),
            )
        )
        return cls(logits, boxes, embeddings, masks)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.logits, self.boxes, self.embeddings, self.masks

    def mask_logits(self, layer: Tensor | int, batch: Tensor, query: Tensor) -> Tensor:
        assert len(batch)
        return self.masks[layer, batch, query]


def _frame(
    kinds: Sequence[Supervision], seed: int, size: tuple[int, int] = _SIDES, valid: str = ""
) -> Frame:
    """A frame whose instances' masks are discs in their boxes; `valid` as a string of 0 and 1."""
    draw = torch.Generator().manual_seed(seed)
    n, (h, w) = len(kinds), size
    boxes = torch.rand(n, 4, generator=draw) * 0.3 + 0.3
    y, x = torch.arange(h)[:, None] + 0.5, torch.arange(w)[None] + 0.5
    masks = torch.zeros(n, h, w, dtype=torch.bool)
    for g, (box, kind) in enumerate(zip(boxes, kinds, strict=True)):
        if kind in (MASK, PSEUDO):
            masks[g] = ((x / w - box[0]) / box[2]) ** 2 + ((y / h - box[1]) / box[3]) ** 2 < 0.25
    shown = torch.tensor([c == "1" for c in valid or "1" * n], dtype=torch.bool)
    labels = torch.randint(0, _CLASSES, (n,), generator=draw).masked_fill(~shown, _CLASSES)
    image = torch.rand(3, h, w, generator=draw) * 20 + 100
    targets = Targets(labels, boxes, masks, tuple(kinds), shown, torch.zeros(0, 4))
    return Frame(image, targets, 4 * h)


def _pairs() -> list[KeyReferencePair]:
    """Two pairs of all kinds, of two sizes; one instance leaves and one enters."""
    first, second = (MASK, BOX, PSEUDO), (PSEUDO, MASK)
    return [
        KeyReferencePair(_frame(first, 0, valid="101"), _frame(first, 1)),
        KeyReferencePair(_frame(second, 2, (14, 21)), _frame(second, 3, (13, 22), valid="01")),
    ]


def _giou_by_definition(a: Tensor, b: Tensor) -> Tensor:
    def area(x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor) -> Tensor:
        return (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)

    inner = area(*torch.maximum(a[:2], b[:2]), *torch.minimum(a[2:], b[2:]))
    outer = area(*torch.minimum(a[:2], b[:2]), *torch.maximum(a[2:], b[2:]))
    union = area(*a) + area(*b) - inner
    return inner / (union + 1e-7) - (outer - union) / (outer + 1e-7)


def _focal_by_definition(logit: Tensor, target: Tensor) -> Tensor:
    p = logit.sigmoid()
    return torch.where(target, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())


def _mask_target(targets: Targets, g: int) -> Tensor:
    padded = torch.zeros(_SIDES, dtype=torch.bool)
    padded[: targets.masks.shape[1], : targets.masks.shape[2]] = targets.masks[g]
    return padded[2::4, 2::4]


def _detection_by_loops(
    views: list[tuple[_Outputs, list[Frame]]], criterion: SetCriterion, warmup: float
) -> dict[str, Tensor]:
    """All losses but re-id's, written with loops; the matches are the matcher's."""
    names = ("ce", "bbox", "giou", "mask", "dice", "prj", "pairwise")
    total = {f"loss_{name}": torch.zeros((), dtype=torch.float64) for name in names}
    for layer in range(_LAYERS):
        sums = dict.fromkeys(total, torch.zeros((), dtype=torch.float64))
        matched = masked = weak = edges = 0.0
        for out, frames in views:
            targets = PaddedTargets.of([f.targets for f in frames])
            match = criterion.matcher(out.logits, out.boxes, targets)
            onehot = torch.zeros(len(frames), _QUERIES, _CLASSES, dtype=torch.bool)
            for at in (match.layer == layer).nonzero()[:, 0].tolist():
                b, q, g = int(match.frame[at]), int(match.query[at]), int(match.instance[at])
                t = frames[b].targets
                kind = t.supervision[g]
                matched += 1
                onehot[b, q, t.labels[g]] = True
                box, logits = out.boxes[layer, b, q], out.masks[layer, b, q]
                sums["loss_bbox"] = sums["loss_bbox"] + (box - t.boxes[g]).abs().sum()
                giou = _giou_by_definition(to_xyxy(box), to_xyxy(t.boxes[g]).double())
                sums["loss_giou"] = sums["loss_giou"] + 1 - giou
                if kind in (MASK, PSEUDO):
                    weight, masked = 1.0 if kind is MASK else 0.5, masked + 1
                    target = _mask_target(t, g)
                    focal = _focal_by_definition(logits, target).mean()
                    p, both = logits.sigmoid(), logits.sigmoid()[target].sum()
                    dice = 1 - (2 * both + 1) / (p.sum() + target.sum() + 1)
                    sums["loss_mask"] = sums["loss_mask"] + weight * focal
                    sums["loss_dice"] = sums["loss_dice"] + weight * dice
                if kind in (BOX, PSEUDO):
                    weak += 1
                    h, w = frames[b].image.shape[1:]
                    pixels = to_xyxy(t.boxes[g]) * torch.tensor([w, h, w, h])
                    inside = box_masks(pixels[None], *logits.shape)
                    affinity = criterion.boxinst.affinity(
                        [frames[b].image], [frames[b].original_height], *logits.shape
                    )
                    frame, here = torch.tensor([0]), pixels[None]
                    terms, count = criterion.boxinst.pairwise_loss(
                        logits[None], affinity, frame, here
                    )
                    sums["loss_prj"] = sums["loss_prj"] + projection_loss(logits[None], inside)[0]
                    sums["loss_pairwise"] = sums["loss_pairwise"] + warmup * terms[0]
                    edges += count.item()
            focal = _focal_by_definition(out.logits[layer], onehot)
            sums["loss_ce"] = sums["loss_ce"] + focal.sum()
        counts = {"loss_mask": masked, "loss_dice": masked, "loss_prj": weak}
        counts["loss_pairwise"] = edges
        for name, value in sums.items():
            total[name] = total[name] + value / max(1.0, counts.get(name, matched))
    return total


def _reid_by_loops(
    key: _Outputs, reference: _Outputs, pairs: list[KeyReferencePair], sampled: Tensor
) -> dict[str, Tensor]:
    """IDOL's two contrastive losses, embedding by embedding."""
    at_key = PaddedTargets.of([p.key.targets for p in pairs])
    best = _MATCHER(key.logits, key.boxes, at_key).best[-1]
    there = PaddedTargets.of([p.reference.targets for p in pairs]).where(at_key.present)
    chosen = _MATCHER.contrast(reference.logits[-1], reference.boxes[-1], there)
    losses, auxiliary = [], []
    for b, g in there.present.nonzero().tolist():
        k = key.embeddings[b, best[b, g]]
        v = reference.embeddings[b]
        total = torch.ones((), dtype=torch.float64)
        for p in chosen.positives[b, g].nonzero()[:, 0]:
            for n in chosen.negatives[b, g].nonzero()[:, 0]:
                total = total + (k @ v[n] - k @ v[p]).exp()
        losses.append(total.log())
        errors = []
        for q in range(_QUERIES):
            cosine = F.cosine_similarity(k, v[q], 0)
            if chosen.positives[b, g, q]:
                errors.append((cosine - 1) ** 2)
            elif sampled[len(auxiliary), q]:
                errors.append(cosine**2)
        auxiliary.append(torch.stack(errors).mean())
    means = [torch.stack(values).mean() for values in (losses, auxiliary)]
    return dict(zip(("loss_reid", "loss_reid_aux"), means, strict=True))


@pytest.mark.parametrize("supervise_reference", [False, True])
def test_losses_and_gradients_equal_loops(supervise_reference):
    pairs, key, reference = _pairs(), _Outputs.random(2, 0), _Outputs.random(2, 1)
    leaves = [t.requires_grad_() for t in (*key.tensors, *reference.tensors)]
    criterion = SetCriterion(
        matcher=_MATCHER,
        supervise_reference=supervise_reference,
        box_loss="box",
        boxinst=BoxInst(warmup_steps=4, bottom_rows=1),
    )
    sampled = torch.zeros(3, _QUERIES, dtype=torch.bool)
    sampled[:, 1::3] = True
    losses = criterion(key, reference, pairs, 1, sampled)
    views = [(key, [p.key for p in pairs])]
    if supervise_reference:
        views.append((reference, [p.reference for p in pairs]))
    expected = _detection_by_loops(views, criterion, 0.5)
    expected |= _reid_by_loops(key, reference, pairs, sampled)
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert value.item() > 0, name
        # 1e-7, not less: the targets' boxes are float32.
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-7), name
        found = torch.autograd.grad(losses[name], leaves, retain_graph=True, allow_unused=True)
        wanted = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        for leaf, f, w in zip(leaves, found, wanted, strict=True):
            nothing = torch.zeros_like(leaf)
            torch.testing.assert_close(
                nothing if f is None else f, nothing if w is None else w, rtol=1e-6, atol=1e-8
            )


def test_total_passes_gradcheck():
    pairs, key, reference = _pairs()[:1], _Outputs.random(1, 4), _Outputs.random(1, 5)
    criterion = SetCriterion(matcher=_MATCHER, box_loss="box", boxinst=BoxInst(warmup_steps=1))

    def total(*tensors: Tensor) -> Tensor:
        key_now, reference_now = _Outputs(*tensors[:4]), _Outputs(*tensors[4:])
        return criterion.total(criterion(key_now, reference_now, pairs, 0))

    leaves = [t.requires_grad_() for t in (*key.tensors, *reference.tensors)]
    assert torch.autograd.gradcheck(total, leaves, fast_mode=True)


def test_elementwise_losses_pass_gradcheck():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=draw, dtype=torch.float64) * 4
    targets = torch.rand(3, 4, 5, generator=draw) > 0.5
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, targets), logits)
    assert torch.autograd.gradcheck(lambda x: dice_loss(x, targets), logits)
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, targets), _focal_by_definition(logits, targets)
    )
    extreme = torch.tensor([-200.0, 200.0], requires_grad=True)
    loss = sigmoid_focal_loss(extreme, torch.tensor([True, False]))
    loss.sum().backward()
    assert loss.tolist() == [50.0, 150.0]
    assert extreme.grad is not None
    assert extreme.grad.tolist() == [-0.25, 0.75]


def test_contrastive_loss_without_negatives_is_zero():
    dots = torch.randn(2, 4, requires_grad=True)
    positives = torch.tensor([[True, False, False, False]] * 2)
    negatives = torch.stack([~positives[0], torch.zeros(4, dtype=torch.bool)])
    loss = contrastive_loss(dots, positives, negatives)
    loss.sum().backward()
    assert loss[0] > 0
    assert loss[1] == 0
    assert dots.grad is not None
    assert dots.grad.isfinite().all()


def _names(**options: object) -> set[str]:
    criterion = SetCriterion(matcher=_MATCHER, **options)  # type: ignore[arg-type]
    return set(criterion(_Outputs.random(2, 0), _Outputs.random(2, 1), _pairs(), 0))


def test_options_decide_the_terms():
    plain = {"loss_ce", "loss_bbox", "loss_giou", "loss_reid", "loss_reid_aux"}
    assert _names() == plain | {"loss_mask", "loss_dice"}
    assert _names(mask_loss=False) == plain
    assert _names(mask_loss=False, box_loss="box") == plain | {"loss_prj", "loss_pairwise"}


@pytest.mark.parametrize(
    "kind, box_loss, masked, weak",
    [
        (MASK, "none", 1.0, False),
        (MASK, "box", 1.0, False),
        (MASK, "all", 1.0, True),
        (BOX, "none", 0.0, False),
        (BOX, "box", 0.0, True),
        (PSEUDO, "none", 0.5, False),
        (PSEUDO, "box", 0.5, True),
    ],
)
def test_supervision_decides_who_takes_part(kind, box_loss, masked, weak):
    def frame(of: Supervision) -> Frame:
        made = _frame((MASK, MASK), 0)
        return replace(made, targets=replace(made.targets, supervision=(of, of)))

    key, reference = _Outputs.random(1, 0), _Outputs.random(1, 1)
    criterion = SetCriterion(matcher=_MATCHER, box_loss=box_loss)
    full = criterion(key, reference, [KeyReferencePair(frame(MASK), frame(MASK))], 0)
    losses = criterion(key, reference, [KeyReferencePair(frame(kind), frame(kind))], 0)
    assert losses["loss_ce"] == full["loss_ce"]
    assert losses["loss_dice"].item() == pytest.approx(masked * full["loss_dice"].item())
    assert losses["loss_mask"].item() == pytest.approx(masked * full["loss_mask"].item())
    assert (losses.get("loss_prj", torch.zeros(())) > 0) == weak


def test_masks_are_averaged_over_the_instances_that_have_them():
    """A box-only neighbour in the batch must not dilute the mask losses."""
    both = _frame((MASK, BOX), 7)
    alone = replace(both, targets=both.targets.select(torch.tensor([True, False])))
    key, reference = _Outputs.random(1, 2), _Outputs.random(1, 3)
    match = _MATCHER(key.logits, key.boxes, PaddedTargets.of([both.targets]))
    criterion = SetCriterion(matcher=_MATCHER)
    found = criterion.layer_losses(key, reference, [KeyReferencePair(both, both)], 0)["loss_dice"]
    for layer in range(_LAYERS):
        rows = (match.layer == layer) & (match.instance == 0)
        logits = key.masks[layer, 0, match.query[rows]]
        target = _mask_target(alone.targets, 0).expand(logits.shape)
        assert found[layer].item() == pytest.approx(dice_loss(logits, target).mean().item())


def test_ignored_regions_are_not_background():
    frame = _frame((MASK,), 0)
    key, reference = _Outputs.random(1, 0), _Outputs.random(1, 1)
    criterion = SetCriterion(matcher=_MATCHER)
    match = _MATCHER(key.logits, key.boxes, PaddedTargets.of([frame.targets]))
    free = int((~match.selected[0, 0]).nonzero()[0, 0])
    taken = int(match.selected[0, 0].nonzero()[0, 0])
    others = [q for q in range(_QUERIES) if q not in (free, taken)]
    key.boxes[:, 0, others] = torch.tensor([0.9, 0.9, 0.1, 0.1], dtype=torch.float64)
    match = _MATCHER(key.logits, key.boxes, PaddedTargets.of([frame.targets]))
    plain = criterion.layer_losses(key, reference, [KeyReferencePair(frame, frame)], 0)["loss_ce"]
    ignored = key.boxes[0, 0, [free, taken]].float()
    marked = replace(frame, targets=replace(frame.targets, ignored=ignored))
    found = criterion.layer_losses(key, reference, [KeyReferencePair(marked, frame)], 0)["loss_ce"]
    assert not match.selected[0, 0, free]
    assert match.selected[0, 0, taken]
    nothing = torch.zeros(_CLASSES, dtype=torch.bool)
    missing = sigmoid_focal_loss(key.logits[0, 0, free], nothing).sum() / match.selected[0].sum()
    assert (plain[0] - found[0]).item() == pytest.approx(missing.item(), rel=1e-9)


def test_the_same_step_draws_the_same_negatives():
    key, reference = _Outputs.random(2, 0, 60), _Outputs.random(2, 1, 60)
    matcher = OptimalTransportMatcher(candidates=1, loose_candidates=1)

    def auxiliary(seed: int, step: int) -> float:
        criterion = SetCriterion(matcher=matcher, seed=seed)
        return criterion(key, reference, _pairs(), step)["loss_reid_aux"].item()

    assert auxiliary(0, 5) == auxiliary(0, 5)
    assert len({auxiliary(0, 5), auxiliary(0, 6), auxiliary(1, 5)}) == 3


def test_drawn_negatives_are_ten_a_positive():
    positives = torch.zeros(3, 50, dtype=torch.bool)
    positives[0, :2] = positives[1, :9] = positives[2, :1] = True
    negatives = torch.zeros_like(positives)
    negatives[:, 10:45] = True
    drawn = draw_negatives(positives, negatives, negative_keys((1, 3, 50), (0, 0, 0))[0])
    assert drawn.sum(1).tolist() == [20, 35, 10]
    assert not (drawn & ~negatives).any()


def _weak_by_published_lists(key: _Outputs, frames: list[Frame], boxinst: BoxInst) -> list[float]:
    """BoxInst with the published code's lists of boxes, which hold invisible instances too."""
    targets = PaddedTargets.of([f.targets for f in frames])
    match = _MATCHER(key.logits, key.boxes, targets)
    lists: list[list[Tensor]] = []
    for frame in frames:
        if not len(frame.targets):
            break
        lists.append(list(frame.targets.boxes))
    total = [0.0, 0.0]
    for layer in range(_LAYERS):
        prj, terms, edges = [], [], 0.0
        for at in (match.layer == layer).nonzero()[:, 0].tolist():
            b, q, g = int(match.frame[at]), int(match.query[at]), int(match.instance[at])
            if b >= len(lists):
                continue
            frame = frames[b]
            number = [i for i, seen in enumerate(frame.targets.valid) if seen].index(g)
            h, w = frame.image.shape[1:]
            pixels = (to_xyxy(lists[b][number]) * torch.tensor([w, h, w, h]))[None]
            logits = key.masks[layer, b, q][None]
            affinity = boxinst.affinity([frame.image], [frame.original_height], *logits.shape[1:])
            sums, count = boxinst.pairwise_loss(logits, affinity, torch.tensor([0]), pixels)
            inside = box_masks(pixels, *logits.shape[1:])
            prj.append(projection_loss(logits, inside).item())
            terms.append(sums.item())
            edges += count.item()
        total[0] += sum(prj) / max(len(prj), 1)
        total[1] += sum(terms) / max(edges, 1.0)
    return total


def test_misplaced_boxes_are_the_published_ones():
    kinds, boxinst = (BOX, BOX, BOX), BoxInst(warmup_steps=1, bottom_rows=1)
    frames = [
        _frame(kinds, 0, valid="011"),
        _frame(kinds, 1, (14, 21), valid="101"),
        _frame((), 2),
        _frame(kinds, 3),
    ]
    pairs = [KeyReferencePair(frame, frame) for frame in frames]
    key, reference = _Outputs.random(4, 0), _Outputs.random(4, 1)
    published = SetCriterion(
        matcher=_MATCHER, box_loss="box", boxinst=boxinst, misplaced_boxes=True
    )
    right = replace(published, misplaced_boxes=False)
    found, plain = (made(key, reference, pairs, 0) for made in (published, right))
    expected = _weak_by_published_lists(key, frames, boxinst)
    for name, value in zip(("loss_prj", "loss_pairwise"), expected, strict=True):
        assert found[name].item() == pytest.approx(value, rel=1e-7)
        assert found[name] != plain[name]
    others = set(plain) - {"loss_prj", "loss_pairwise"}
    assert all(found[name] == plain[name] for name in others)


def test_empty_key_frames_still_teach_what_is_background():
    pair = KeyReferencePair(_frame((MASK,), 0, valid="0"), _frame((MASK,), 1))
    nothing = KeyReferencePair(_frame((), 0), _frame((), 1))
    key, reference = _Outputs.random(2, 0), _Outputs.random(2, 1)
    for tensor in key.tensors:
        tensor.requires_grad_()
    criterion = SetCriterion(matcher=_MATCHER, box_loss="all")
    losses = criterion(key, reference, [pair, nothing], 0)
    criterion.total(losses).backward()
    assert losses.pop("loss_ce") > 0
    assert all(value == 0 for value in losses.values())
    assert key.logits.grad is not None
    assert key.logits.grad.isfinite().all()


def test_points_are_refused():
    frame = _frame((POINT,), 0)
    with pytest.raises(DataError, match="point"):
        SetCriterion()(
            _Outputs.random(1, 0), _Outputs.random(1, 1), [KeyReferencePair(frame, frame)], 0
        )


def test_total_weighs_every_term():
    weights = LossWeights()
    terms = {f"loss_{name}": torch.ones(()) for name in vars(weights)}
    assert SetCriterion().total(terms) == 2 + 5 + 2 + 2 + 5 + 2 + 3 + 2 + 2


@pytest.mark.parametrize(
    "name, gradients",
    [("C1_losses_pair", False), ("C2_losses_batch2", True), ("C3_losses_empty_key", False)],
)
def test_published_matches_losses_and_gradients(shared: Path, name, gradients):
    stored = np.load(shared / f"golden/idol/{name}.npz")
    assert_equal(check_losses(name, stored, gradients=gradients))
