"""The training losses of IDOL and PM-VIS+, decided instance by instance.

What an instance is supervised by (``types.Supervision``) decides what it takes part in:

| supervision | class, box, re-id | mask focal + dice | BoxInst (``box_loss``) |
|---|---|---|---|
| MASK | yes | yes | ``all`` |
| BOX | yes | no | ``box``, ``all`` |
| PSEUDO | yes | weighted by ``mask_weight_pseudo`` | ``box``, ``all`` |

The image stage of PM-VIS+ is ``box_loss="none"`` (the paper's best), ``"box"`` (BoxInst for the
box-only instances) or ``"all"``, with or without mask losses; its video stage is ``"box"``: pseudo
masks get mask losses times 0.5 and BoxInst's. The published code decides per batch, from the first
file's path, and so needs batches of one kind; here kinds mix freely.

Every term is computed for all decoder layers at once, and each layer's sum is divided by

| loss | divided by | layers |
|---|---|---|
| ce | matched queries (a plain sum over all queries and categories is divided) | all |
| bbox, giou | matched queries | all |
| mask, dice | matched queries that have a mask; a mask's focal loss is its pixels' mean | all |
| prj | matched queries that BoxInst teaches | all |
| pairwise | edges of alike neighbours in their boxes, over all of them: one ratio | all |
| reid, reid_aux | instances that were contrasted | last |

at least 1. Matched queries, not instances. In batches of one kind the mask terms' number is the
published one; where kinds mix, an instance without a mask must not dilute the others'. The numbers
are those of the pairs in one call unless ``divisors`` adds up those of several processes
(`training.normalisers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from operator import or_
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pmvis_core.data.samples import Frame, KeyReferencePair, Targets
from pmvis_core.errors import DataError
from pmvis_core.matching import (
    FOCAL_ALPHA,
    FOCAL_GAMMA,
    Match,
    OptimalTransportMatcher,
    PaddedTargets,
    paired_giou,
    pairwise_iou,
    to_xyxy,
)
from pmvis_core.reid_losses import (
    contrastive_loss,
    cosine_loss,
    draw_negatives,
    euclidean_lengths,
    negative_keys,
)
from pmvis_core.types import Supervision
from pmvis_core.weak_losses import STRIDE, BoxInst, box_masks, projection_loss

BoxLoss = Literal["none", "box", "all"]
"""Who gets BoxInst's losses: nobody; BOX and PSEUDO instances; every instance."""
Divisors = Callable[[Tensor], Tensor]
"""Takes the (D,) numbers that a call's terms would be divided by, returns what divides them."""
_Sums = dict[str, tuple[Tensor, Tensor]]
"""Of each term: the sum, and what it is divided by; (Ld,) a layer, or scalars."""
_IGNORED_IOU = 0.5
"""Overlap with an ignored region from which an unmatched query is not called background."""


class Predictions(Protocol):
    """What a network says of a batch; Ld decoder layers, the last is the answer."""

    @property
    def logits(self) -> Tensor:
        """(Ld, B, Q, K) class logits."""

    @property
    def boxes(self) -> Tensor:
        """(Ld, B, Q, 4) cxcywh relative to the unpadded frame."""

    @property
    def embeddings(self) -> Tensor:
        """(B, Q, E) of the last layer, not normalised."""

    def mask_logits(self, layer: Tensor | int, batch: Tensor, query: Tensor) -> Tensor:
        """Return (N, H/4, W/4) mask logits of chosen (layer, frame, query) triples."""


@dataclass(frozen=True)
class LossWeights:
    """What ``loss_<field>`` is multiplied by in the sum; the defaults are IDOL's and PM-VIS+'s."""

    ce: float = 2.0
    """Sigmoid focal loss of the class logits."""
    bbox: float = 5.0
    """Absolute difference of cxcywh boxes."""
    giou: float = 2.0
    """One minus the generalised IoU of boxes."""
    mask: float = 2.0
    """Sigmoid focal loss of the mask logits; times 0.5 for pseudo masks."""
    dice: float = 5.0
    """Dice loss of the masks; times 0.5 for pseudo masks."""
    reid: float = 2.0
    """Contrastive loss of embeddings."""
    reid_aux: float = 3.0
    """Squared error of cosine similarities."""
    prj: float = 2.0
    """BoxInst's projection term. BoxInst has 1, and the paper says nothing; 2, IDOL's mask weight,
    is the authors' code, which made the published figures."""
    pairwise: float = 2.0
    """BoxInst's pairwise term, after its warm-up; 2 for the same reason."""


def at_least_one(numbers: Tensor) -> Tensor:
    """Return what divides the terms of a call on its own: their numbers, where there are any."""
    return numbers.clamp_min(1)


@dataclass(frozen=True)
class SetCriterion:
    """IDOL's criterion; holds no state, so a resumed run needs only its step number."""

    weights: LossWeights = field(default_factory=LossWeights)
    """Of the sum."""
    matcher: OptimalTransportMatcher = field(default_factory=OptimalTransportMatcher)
    """Assigns queries to instances."""
    supervise_reference: bool = False
    """Detection and mask losses on the reference frames too; IDOL: on the key frames only."""
    mask_loss: bool = True
    """Whether MASK and PSEUDO instances get mask losses."""
    box_loss: BoxLoss = "none"
    """Who gets BoxInst's losses."""
    mask_weight_pseudo: float = 0.5
    """Times the mask losses of PSEUDO instances."""
    boxinst: BoxInst = field(default_factory=BoxInst)
    """Settings of BoxInst."""
    misplaced_boxes: bool = False
    """Give BoxInst the wrong boxes where the published code does, to compare only: the i-th visible
    instance of a frame gets the box of the i-th instance, visible or not, and no frame of a batch
    behind one without any instance gets boxes. Wants frames that keep their invisible rows."""
    seed: int = 0
    """With the step and a pair's number, decides the random negatives."""
    divisors: Divisors = at_least_one
    """What the terms are divided by, all at once."""

    def __call__(
        self,
        key: Predictions,
        reference: Predictions,
        pairs: Sequence[KeyReferencePair],
        step: int,
        sampled: Tensor | None = None,
        first: int = 0,
    ) -> dict[str, Tensor]:
        """Return the unweighted losses, each summed over the decoder layers.

        Args:
            key: predictions of the pairs' key frames.
            reference: predictions of their reference frames, padded to the same size.
            pairs: B pairs, on any device.
            step: optimiser steps done before this one.
            sampled: (I, Q) bool auxiliary negatives of the contrasted instances, in the order of
                (pair, instance), in place of random ones.
            first: number of the first of the pairs in the step's whole batch, so that a pair has
                the same negatives in whatever process and part of the batch it is.

        Returns:
            Scalars by their published names; ``loss_mask`` and ``loss_dice``, ``loss_prj`` and
            ``loss_pairwise`` only where the options ask for them.

        Raises:
            DataError: an instance is supervised by a point only.
        """
        terms = self.layer_losses(key, reference, pairs, step, sampled, first)
        return {name: value.sum() for name, value in terms.items()}

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of what ``__call__`` returned."""
        weights = {f"loss_{name}": weight for name, weight in asdict(self.weights).items()}
        return torch.stack([weights[name] * value for name, value in losses.items()]).sum()

    def layer_losses(
        self,
        key: Predictions,
        reference: Predictions,
        pairs: Sequence[KeyReferencePair],
        step: int,
        sampled: Tensor | None = None,
        first: int = 0,
    ) -> dict[str, Tensor]:
        """Return the unweighted losses, (Ld,) a layer but for the two scalars of re-id.

        The arguments are those of ``__call__``.
        """
        frames = [pair.key for pair in pairs] + [pair.reference for pair in pairs]
        targets = _pad(frames, key.logits.device)
        views = [key, reference] if self.supervise_reference else [key]
        view = _View.of(views, frames[: len(views) * len(pairs)], targets)
        match = self.matcher(view.logits, view.boxes, view.targets)
        sums = _detection_losses(view, match) | self._mask_losses(view, match, step)
        best, there = match.best[-1, : len(pairs)], targets.rows(len(pairs), None)
        drawn = (self.seed, step, first) if sampled is None else sampled
        sums |= self._contrastive((key, reference), there, best, drawn)
        return self._divided(sums)

    def _divided(self, sums: _Sums) -> dict[str, Tensor]:
        """Divide each term's sum, all by one call of ``divisors``."""
        numbers = [number.to(total.dtype).reshape(-1) for total, number in sums.values()]
        parts = self.divisors(torch.cat(numbers)).split([len(number) for number in numbers])
        return {
            name: total / part.view(total.shape)
            for (name, (total, _)), part in zip(sums.items(), parts, strict=True)
        }

    def _mask_losses(self, view: _View, match: Match, step: int) -> _Sums:
        """Return the mask and BoxInst losses."""
        names = ["loss_mask", "loss_dice"] if self.mask_loss else []
        names += ["loss_prj", "loss_pairwise"] if self.box_loss != "none" else []
        nothing = view.logits.new_zeros(len(view.logits))
        losses = dict.fromkeys(names, (nothing, nothing))
        roles = self._roles(view)[:, match.frame, match.instance]
        kept = roles.any(0).nonzero()[:, 0]
        if len(kept) == 0:  # the mask head is left alone
            return losses
        rows, (weight, weak) = _Rows.of(view, match).at(kept), roles[:, kept]
        logits = view.mask_logits(rows, match.query[kept])
        full, boxed = weight.nonzero()[:, 0], weak.nonzero()[:, 0]
        if len(full):
            some = logits.index_select(0, full)
            losses |= _full_mask_losses(view, rows.at(full), some, weight[full])
        if len(boxed):
            some = logits.index_select(0, boxed)
            boxes = self._weak_boxes(view, rows.at(boxed))
            losses |= _boxinst_losses(view, rows.at(boxed), some, boxes, self.boxinst)
            terms, edges = losses["loss_pairwise"]
            losses["loss_pairwise"] = terms * self.boxinst.warmup(step), edges
        return losses

    def _roles(self, view: _View) -> Tensor:
        """Return the (2, B, G) weights of mask losses and of BoxInst's."""
        full = {Supervision.MASK: 1.0, Supervision.PSEUDO: self.mask_weight_pseudo}
        weak = {Supervision.MASK: float(self.box_loss == "all")}
        weak |= dict.fromkeys((Supervision.BOX, Supervision.PSEUDO), float(self.box_loss != "none"))
        weights, boxed = [], []
        for frame in view.frames:
            kinds = frame.targets.supervision
            filler = [0.0] * (view.targets.labels.shape[1] - len(kinds))
            weights.append([self.mask_loss * full.get(k, 0.0) for k in kinds] + filler)
            boxed.append([weak[k] for k in kinds] + filler)
        roles = torch.tensor([weights, boxed], device=view.logits.device)
        if self.misplaced_boxes:
            empty = [len(frame.targets) == 0 for frame in view.frames]
            roles[1, torch.tensor(list(accumulate(empty, or_)))] = 0
        return roles

    def _weak_boxes(self, view: _View, rows: _Rows) -> Tensor:
        """Return the (N, 4) relative cxcywh boxes that BoxInst fills for some rows."""
        instance = rows.instance
        if self.misplaced_boxes:
            instance = view.targets.present.cumsum(1)[rows.frame, instance] - 1
        return view.targets.boxes[rows.frame, instance]

    def _contrastive(
        self,
        views: tuple[Predictions, Predictions],
        targets: PaddedTargets,
        best: Tensor,
        sampled: Tensor | tuple[int, int, int],
    ) -> _Sums:
        """Return the re-identification losses (IDOL, section 3.2).

        Args:
            views: predictions of the key and of the reference frames.
            targets: the instances in the reference frames.
            best: (B, G) the cheapest key query of each instance, -1 without one.
            sampled: as in ``__call__``, or the seeds to draw them with (`negative_keys`).
        """
        key, reference = views
        targets = targets.where(best >= 0)
        contrast = self.matcher.contrast(reference.logits[-1], reference.boxes[-1], targets)
        items = targets.present.nonzero(as_tuple=True)
        positives, negatives = contrast.positives[items], contrast.negatives[items]
        if not isinstance(sampled, Tensor):
            keys = negative_keys(contrast.negatives.shape, sampled)
            sampled = draw_negatives(positives, negatives, keys.to(negatives.device)[items])
        queries = best.clamp_min(0)[..., None].expand(-1, -1, key.embeddings.shape[-1])
        anchors = key.embeddings.gather(1, queries)
        dots = (anchors @ reference.embeddings.mT)[items]
        norms = euclidean_lengths(anchors), euclidean_lengths(reference.embeddings)
        lengths = norms[0][:, :, None] * norms[1][:, None]
        reid = contrastive_loss(dots, positives, negatives)
        auxiliary = cosine_loss(dots / lengths[items], positives, sampled)
        count = reid.new_tensor(len(positives))
        return {"loss_reid": (reid.sum(), count), "loss_reid_aux": (auxiliary.sum(), count)}


def sigmoid_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the focal loss (Lin et al., 2017, equation 5) of logits with bool targets.

    Elementwise; alpha and gamma are those of the matcher's costs.
    """
    return _SigmoidFocal.apply(logits, targets)  # type: ignore[no-any-return]


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - (2 |P T| + 1) / (|P| + |T| + 1) of every mask.

    Args:
        logits: (N, h, w).
        targets: (N, h, w) bool.

    Returns:
        (N,) in [0, 1).
    """
    p = logits.sigmoid().flatten(1)
    t = targets.flatten(1).to(p.dtype)
    return 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)


@dataclass(frozen=True)
class _View:
    """The frames that detection losses look at, with what was predicted for them."""

    predictions: Sequence[Predictions]
    """Of the key frames, and of the reference frames where they are supervised too."""
    logits: Tensor
    boxes: Tensor
    frames: Sequence[Frame]
    targets: PaddedTargets

    @classmethod
    def of(
        cls, views: Sequence[Predictions], frames: Sequence[Frame], targets: PaddedTargets
    ) -> _View:
        """Join the predictions; ``targets`` may hold further frames behind them."""
        logits = torch.cat([v.logits for v in views], 1)
        boxes = torch.cat([v.boxes for v in views], 1)
        return cls(views, logits, boxes, frames, targets.rows(0, len(frames)))

    def mask_logits(self, rows: _Rows, query: Tensor) -> Tensor:
        """Return the (N, h, w) mask logits of some matched queries."""
        batch = len(self.frames) // len(self.predictions)
        logits, places = [], []
        for turn, predictions in enumerate(self.predictions):
            here = (rows.frame // batch == turn).nonzero()[:, 0]
            if len(here):
                frame = rows.frame[here] - turn * batch
                logits.append(predictions.mask_logits(rows.layer[here], frame, query[here]))
                places.append(here)
        return torch.cat(logits).index_select(0, torch.cat(places).argsort())


@dataclass(frozen=True)
class _Rows:
    """Some matched queries: their decoder layer, frame and row of the targets, each (N,)."""

    layer: Tensor
    frame: Tensor
    instance: Tensor
    layers: int

    @classmethod
    def of(cls, view: _View, match: Match) -> _Rows:
        """Return all matched queries."""
        return cls(match.layer, match.frame, match.instance, len(view.logits))

    def at(self, index: Tensor) -> _Rows:
        """Return the rows at an (M,) int64 index."""
        return _Rows(self.layer[index], self.frame[index], self.instance[index], self.layers)

    def sum(self, values: Tensor) -> Tensor:
        """Sum (N,) values by layer, (Ld,)."""
        return values.new_zeros(self.layers).index_add(0, self.layer, values)

    def mean(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the average of (N,) values by layer is made of, (Ld,) each."""
        return self.sum(values), self.count()

    def count(self) -> Tensor:
        """Return how many there are in each layer, (Ld,) int64."""
        return torch.bincount(self.layer, minlength=self.layers)


def _pad(frames: Sequence[Frame], device: torch.device) -> PaddedTargets:
    """Pad the frames' targets, refusing points."""
    for frame in frames:
        if Supervision.POINT in frame.targets.supervision:
            raise DataError(
                "an instance is annotated by a point only, expected a box or a mask",
                "turn points into pseudo masks first (`pmvis refine`)",
            )
    return PaddedTargets.of([frame.targets for frame in frames], device)


def _detection_losses(view: _View, match: Match) -> _Sums:
    """Return the class, L1 and GIoU losses."""
    rows = _Rows.of(view, match)
    targets = torch.zeros_like(view.logits, dtype=torch.bool)
    labels = view.targets.labels[rows.frame, rows.instance]
    targets[rows.layer, rows.frame, match.query, labels] = True
    focal = sigmoid_focal_loss(view.logits, targets)
    neutral = _neutral_queries(view, match)
    if neutral is not None:
        focal = focal * ~neutral[..., None]
    boxes = view.boxes[rows.layer, rows.frame, match.query]
    wanted = view.targets.boxes[rows.frame, rows.instance]
    return {
        "loss_ce": (focal.sum((1, 2, 3)), rows.count()),
        "loss_bbox": rows.mean((boxes - wanted).abs().sum(-1)),
        "loss_giou": rows.mean(1 - paired_giou(to_xyxy(boxes), to_xyxy(wanted))),
    }


@torch.no_grad()
def _neutral_queries(view: _View, match: Match) -> Tensor | None:
    """Return the (Ld, B, Q) queries that are neither objects nor background, None without any.

    They answer for no instance and overlap a region that the data set (or `filter
    --keep-ignored`) set aside: whether something is there is not known.
    """
    if not any(len(frame.targets.ignored) for frame in view.frames):
        return None
    regions = pad_sequence([frame.targets.ignored for frame in view.frames], True)
    overlap = pairwise_iou(to_xyxy(regions.to(view.boxes)), to_xyxy(view.boxes))[0].amax(-2)
    return (overlap > _IGNORED_IOU) & ~match.selected


def _full_mask_losses(view: _View, rows: _Rows, logits: Tensor, weight: Tensor) -> _Sums:
    """Return the mask focal and dice losses of N rows with (N, h, w) logits and (N,) weights."""
    masks = _gather_masks([frame.targets for frame in view.frames], rows, logits)
    focal = sigmoid_focal_loss(logits, masks).mean((1, 2))
    return {
        "loss_mask": rows.mean(focal * weight),
        "loss_dice": rows.mean(dice_loss(logits, masks) * weight),
    }


def _gather_masks(targets: Sequence[Targets], rows: _Rows, logits: Tensor) -> Tensor:
    """Return the (N, h, w) bool masks of some rows where their logits lie, padded with False.

    Masks are sampled and not averaged: every fourth pixel from the third on, as published.
    """
    height, width = logits.shape[1:]
    most = max(len(t) for t in targets)
    bank = logits.new_zeros(len(targets), most, height, width, dtype=torch.bool)
    for slot, t in zip(bank, targets, strict=True):
        masks = t.masks[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]
        slot[: len(t), : masks.shape[1], : masks.shape[2]] = masks
    return bank[rows.frame, rows.instance]


def _boxinst_losses(
    view: _View, rows: _Rows, logits: Tensor, relative: Tensor, boxinst: BoxInst
) -> _Sums:
    """Return BoxInst's losses of N rows with (N, h, w) logits and (N, 4) relative cxcywh boxes.

    The pairwise term is one ratio over all instances of a layer, the projection term a mean.
    """
    height, width = logits.shape[1:]
    images = [frame.image.to(logits.device) for frame in view.frames]
    sides = torch.tensor([[i.shape[2], i.shape[1]] * 2 for i in images], device=logits.device)
    boxes = to_xyxy(relative) * sides[rows.frame]
    heights = [frame.original_height for frame in view.frames]
    affinity = boxinst.affinity(images, heights, height, width)
    terms, edges = boxinst.pairwise_loss(logits, affinity, rows.frame, boxes)
    inside = box_masks(boxes, height, width)
    return {
        "loss_prj": rows.mean(projection_loss(logits, inside)),
        "loss_pairwise": (rows.sum(terms), rows.sum(edges)),
    }


class _SigmoidFocal(torch.autograd.Function):
    """The focal loss with its derivative in closed form: one saved tensor instead of eight."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Return alpha_t wrong^gamma surprise, with wrong = 1 - p_t and surprise = -log p_t."""
        signed = torch.where(targets, logits, -logits)
        wrong = torch.sigmoid(-signed)
        surprise = -F.logsigmoid(signed)
        alpha = torch.where(targets, FOCAL_ALPHA, 1 - FOCAL_ALPHA).to(logits.dtype)
        scale = alpha * wrong**FOCAL_GAMMA
        slope = scale * (FOCAL_GAMMA * (1 - wrong) * surprise + wrong)
        ctx.save_for_backward(torch.where(targets, -slope, slope))
        return scale * surprise

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient with respect to the logits."""
        (slope,) = ctx.saved_tensors
        return gradient * slope, None
