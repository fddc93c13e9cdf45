"""IDOL's losses, BoxInst's and the attention operator against reference outputs.

The part of `parity_idol` for ``C*`` (matches, contrasts, losses and gradients of key/reference
pairs), ``D*`` (BoxInst on one photo) and ``E*`` (multi-scale deformable attention in float64).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pmvis_core.data.samples import Frame, ImageBatch, KeyReferencePair, Targets
from pmvis_core.losses import SetCriterion
from pmvis_core.matching import Match, PaddedTargets
from pmvis_core.models.idol import IDOL, IdolPredictions
from pmvis_core.ops import deformable_attention, rgb_to_lab
from pmvis_core.types import Supervision
from pmvis_core.weak_losses import BoxInst, box_masks, projection_loss
from tests.golden_idol import (
    Quantity,
    backbone_of,
    model_for,
    near,
    same,
    to_official_name,
    unpacked,
)

LOSS_TOLERANCE = 6e-5
"""Relative; losses in float32 agree with float64 to 6e-6."""
GRADIENT_TOLERANCE = 6e-3
"""Relative; gradient norms agree to 6e-4."""
EIGHT = [(dy, dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2) if (dy, dx) != (0, 0)]
"""BoxInst's neighbours, in the order of its channels."""


def check_losses(name: str, stored: Any, *, gradients: bool = True) -> Iterator[Quantity]:
    """Compare matches, contrasts, losses and gradients of a batch of pairs."""
    model = model_for(backbone_of(name), stored["pred_logits"].shape[-1])
    videos = len(stored["pred_logits"])
    pairs = [
        KeyReferencePair(stored_frame(stored, v, "key"), stored_frame(stored, v, "ref"))
        for v in range(videos)
    ]
    frames = [p.key for p in pairs] + [p.reference for p in pairs]
    with torch.set_grad_enabled(gradients):
        outputs = model(ImageBatch.of([frame.image for frame in frames]))
    key, reference = outputs.rows(0, videos), outputs.rows(videos, 2 * videos)
    criterion = SetCriterion()
    at_key = PaddedTargets.of([p.key.targets for p in pairs])
    match = criterion.matcher(key.logits, key.boxes, at_key)
    yield near(f"{name} logits", key.logits[-1].detach(), stored["pred_logits"], 4e-4)
    yield near(f"{name} boxes", key.boxes[-1].detach(), stored["pred_boxes"], 2e-5)
    yield from _matches(name, match, at_key, stored)
    yield from _mask_logits(name, key, match, stored)
    there = PaddedTargets.of([p.reference.targets for p in pairs]).where(at_key.present)
    contrast = criterion.matcher.contrast(reference.logits[-1], reference.boxes[-1], there)
    wrong = []
    for v, g in there.present.nonzero().tolist():
        item = f"v{v}_i{int(at_key.present[v, :g].sum())}"
        for kind, found in (("pos", contrast.positives), ("nonneg", ~contrast.negatives)):
            if not np.array_equal(found[v, g], stored[f"reid_{kind}_{item}"]):
                wrong.append(f"{kind}_{item}")
    yield f"{name} contrast sets", not wrong, f"differ: {wrong}"
    items = there.present.nonzero(as_tuple=True)
    positives, negatives = contrast.positives[items], contrast.negatives[items]
    sampled = _stored_samples(stored, negatives)
    anchors = key.embeddings[items[0], match.best[-1][items]]
    yield from _contrasts(name, anchors, reference.embeddings[items[0]], positives, stored)
    with torch.set_grad_enabled(gradients):
        terms = criterion.layer_losses(key, reference, pairs, 0, sampled)
    yield from _losses(name, criterion, terms, stored)
    total = criterion.total({loss: values.sum() for loss, values in terms.items()})
    wanted = float(stored["loss_total"][1])
    off = abs(total.item() - wanted)
    yield f"{name} total", off <= LOSS_TOLERANCE * wanted, f"{total.item():.6f}, off by {off:.1e}"
    if gradients:
        yield from _gradients(name, model, total, stored)


def stored_frame(stored: Any, video: int, view: str) -> Frame:
    """Return the ``key`` or ``ref`` frame of a stored pair, with what is known of it."""
    image, masks, xyxy, classes, ids = (
        torch.from_numpy(stored[f"v{video}_{view}_{part}"])
        for part in ("image", "masks", "boxes_xyxy", "classes", "ids")
    )
    h, w = image.shape[:2]
    boxes = torch.cat([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]], 1)
    boxes = boxes / torch.tensor([w, h, w, h])
    kinds = (Supervision.MASK,) * len(ids)
    targets = Targets(classes, boxes, masks.bool(), kinds, ids >= 0, torch.zeros(0, 4))
    return Frame(image.permute(2, 0, 1).float(), targets, h)


def _matches(name: str, match: Match, at_key: PaddedTargets, stored: Any) -> Iterator[Quantity]:
    """Compare the matcher's answers of every layer and frame."""
    wrong = []
    for layer, v in np.ndindex(match.selected.shape[:2]):
        kept = at_key.present[v].nonzero()[:, 0]
        head = f"match_l{layer}_v{v}"
        found = {
            "selected": match.selected[layer, v],
            "gt": match.instance[(match.layer == layer) & (match.frame == v)],
            "matched_query": match.best[layer, v, kept],
        }
        expected = {part: stored[f"{head}_{part}"] for part in found}
        expected["gt"] = kept.numpy()[expected["gt"].astype(int)]
        wrong += [f"{head}_{p}" for p in found if not np.array_equal(found[p], expected[p])]
    yield f"{name} matches", not wrong, f"{match.selected.sum()} queries; differ: {wrong[:3]}"


def _mask_logits(name: str, key: IdolPredictions, match: Match, stored: Any) -> Iterator[Quantity]:
    """Compare the mask logits of the first matched queries of the last layer."""
    last = len(key.logits) - 1
    for v in range(key.logits.shape[1]):
        if f"pred_masks_v{v}" not in stored:
            continue
        query = match.query[(match.layer == last) & (match.frame == v)]
        expected = stored[f"pred_masks_v{v}"]
        yield same(f"{name} matched v{v}", len(query), stored[f"pred_masks_v{v}_shape"][0])
        query = query[: len(expected)]
        with torch.no_grad():
            masks = key.mask_logits(last, torch.full_like(query, v), query)
        if len(query):
            yield near(f"{name} masks v{v}", masks, expected, 1.3e-3)


def _stored_samples(stored: Any, negatives: Tensor) -> Tensor:
    """Return the drawn auxiliary negatives of (I, Q) negatives, which their ids count."""
    sampled = torch.zeros_like(negatives)
    for i, row in enumerate(negatives):
        sampled[i, row.nonzero()[stored[f"contrast_{i}_sample_ids"], 0]] = True
    return sampled


def _contrasts(
    name: str, anchors: Tensor, others: Tensor, positives: Tensor, stored: Any
) -> Iterator[Quantity]:
    """Compare the products of every contrasted instance, positives first.

    Args:
        name: of the case.
        anchors: (I, E) key embeddings.
        others: (I, Q, E) embeddings of the reference frames.
        positives: (I, Q) bool.
        stored: the file.
    """
    for i, (anchor, embeddings, own) in enumerate(zip(anchors, others, positives, strict=True)):
        outside = ~torch.from_numpy(_nonnegative(stored, i))
        order = torch.cat([own.nonzero()[:, 0], outside.nonzero()[:, 0]])
        dots = (embeddings[order] @ anchor).detach()
        cosines = F.cosine_similarity(embeddings[order], anchor[None]).detach()
        count = int(own.sum())
        drawn = count + torch.from_numpy(stored[f"contrast_{i}_sample_ids"])
        chosen = torch.cat([torch.arange(count), drawn.long()])
        head = f"{name} contrast {i}"
        labels = torch.arange(len(order)) < count
        yield same(f"{head} negatives", int(outside.sum()), stored[f"contrast_{i}_num_neg"])
        yield same(f"{head} labels", labels, stored[f"contrast_{i}_label"])
        yield near(f"{head} products", dots, stored[f"contrast_{i}_dot"], 2e-3)
        yield same(f"{head} drawn", labels[chosen], stored[f"contrast_{i}_aux_label"])
        yield near(f"{head} cosines", cosines[chosen], stored[f"contrast_{i}_aux_cos"], 2e-5)


def _nonnegative(stored: Any, item: int) -> Any:
    """Return the (Q,) queries that are no negatives of the item-th contrasted instance."""
    keys = [key for key in stored.files if key.startswith("reid_nonneg_")]
    return stored[sorted(keys, key=_video_and_instance)[item]]


def _video_and_instance(key: str) -> tuple[int, int]:
    """Return the numbers of ``..._vI_iJ``."""
    _, video, instance = key.rsplit("_", 2)
    return int(video[1:]), int(instance[1:])


def _losses(
    name: str, criterion: SetCriterion, terms: dict[str, Tensor], stored: Any
) -> Iterator[Quantity]:
    """Compare every loss of every layer with the float64 run, and its weight."""
    found: dict[str, float] = {}
    for loss, values in terms.items():
        # Layers are named as DETR does: the last plainly, those before it with their index.
        *auxiliary, last = values.detach().reshape(-1).tolist()
        found |= {loss: last, **{f"{loss}_{i}": value for i, value in enumerate(auxiliary)}}
    names = stored["loss_names"].tolist()
    yield f"{name} loss names", sorted(found) == sorted(names), f"{len(names)} losses"
    weights = asdict(criterion.weights)
    for column, scale in (("unweighted_f64", {}), ("weighted", weights)):
        worst = 0.0
        for loss, wanted in zip(names, stored[f"loss_{column}"].tolist(), strict=True):
            kind = loss.removeprefix("loss_").rstrip("0123456789").rstrip("_")
            ours = found.get(loss, float("nan")) * scale.get(kind, 1.0)
            worst = max(worst, abs(ours - wanted) / max(abs(wanted), 1e-2))
        yield f"{name} losses {column}", worst <= LOSS_TOLERANCE, f"off by {worst:.1e} of a loss"


def _gradients(name: str, model: IDOL, total: Tensor, stored: Any) -> Iterator[Quantity]:
    """Compare the norms of all gradients, and parts of some."""
    norms = dict(zip(stored["grad_names"].tolist(), stored["grad_norms_f64"].tolist(), strict=True))
    learnt = [(to_official_name(n), p) for n, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total, [p for _, p in learnt], allow_unused=True)
    largest, worst, blame, compared = max(norms.values()), 0.0, "", 0
    for (parameter, _), gradient in zip(learnt, gradients, strict=True):
        if parameter not in norms:
            continue
        compared += 1
        ours = 0.0 if gradient is None else gradient.norm().item()
        wanted = max(norms[parameter], 0.0)
        off = abs(ours - wanted) / max(wanted, 2e-4 * largest)
        if off > worst:
            worst, blame = off, parameter
    detail = f"{compared} norms, off by {worst:.1e} of one at most: {blame}"
    yield f"{name} gradient norms", worst <= GRADIENT_TOLERANCE and compared > 300, detail
    by_name = dict(zip((parameter for parameter, _ in learnt), gradients, strict=True))
    for key in stored.files:
        if key.startswith("grad_sub:") and by_name.get(key[9:]) is not None:
            step = int(stored[f"grad_sub_stride:{key[9:]}"])
            part = by_name[key[9:]].flatten()[::step]  # type: ignore[union-attr]
            limit = GRADIENT_TOLERANCE * float(np.abs(stored[key]).max())
            yield near(f"{name} gradient of {key[9:]}", part, stored[key], limit)


def check_boxinst(name: str, stored: Any) -> Iterator[Quantity]:
    """Compare BoxInst's colours, edges, losses and gradients on one photo."""
    height, width = (int(side) // 4 for side in stored["padded_hw"])
    rgb = torch.from_numpy(stored["image_rgb"]).permute(2, 0, 1).float()
    rows = int(stored["orig_height"])
    lab = rgb_to_lab(torch.from_numpy(stored["rgb_down_uint8"]).permute(2, 0, 1).float())
    yield near(f"{name} lab", lab.permute(1, 2, 0), stored["lab"], 1e-4)
    boxinst = BoxInst()
    affinity = boxinst.affinity([rgb], [rows], height, width)
    boxes = torch.from_numpy(stored["boxes_xyxy"])
    inside = box_masks(boxes, height, width)
    yield same(f"{name} boxes", inside, stored["gt_bitmasks"].astype(bool))
    end = rgb.shape[1] - int(stored["bottom_rows_removed"])
    inner = (torch.arange(height) * 4 + 2 < end)[:, None]
    beyond = (torch.arange(width) * 4 + 2 < rgb.shape[2])[None]
    yield same(f"{name} validity", affinity.valid[0], inner & beyond)
    # The stored similarities hold the neighbour's validity as a factor.
    gate = torch.stack([shifted(affinity.valid[0], *offset) for offset in EIGHT])
    similar = affinity.similarity[0] * gate
    yield near(f"{name} similarity", similar, stored["color_similarity"], 2e-5)
    edges = (similar >= boxinst.threshold) & inside[:, None]
    shape = tuple(stored["weights_shape"].tolist())[1:]
    wanted = unpacked(stored["weights_bits"], shape)
    yield same(f"{name} edges", edges, wanted)
    frame = torch.zeros(len(boxes), dtype=torch.long)
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.float64, 1e-11)):
        logits = torch.from_numpy(stored["mask_logits"])[:, 0].to(dtype).requires_grad_()
        terms, count = boxinst.pairwise_loss(logits, affinity, frame, boxes)
        label = f"{name} {str(dtype).removeprefix('torch.')}"
        yield near(f"{label} edges", count.sum(), stored["weights_sum"], 0)
        by_box = (stored["pairwise_map"] * wanted).sum((1, 2, 3))
        yield near(f"{label} terms", terms.detach(), by_box, 2e-6 * float(by_box.max()) + 1e-5)
        losses = {"pairwise": terms.sum() / count.sum()}
        losses["prj"] = projection_loss(logits, inside).mean()
        for part, loss in losses.items():
            yield near(f"{label} {part}", loss.item(), stored[f"loss_{part}_f64"], tolerance)
            (slope,) = torch.autograd.grad(loss, logits)
            expected = stored[f"grad_{part}_f64"][:, 0]
            yield near(f"{label} gradient of {part}", slope, expected, tolerance / 100)


def shifted(x: Tensor, dy: int, dx: int) -> Tensor:
    """Value at (y + dy, x + dx), zeros outside, of a (..., h, w) map; at most two cells."""
    h, w = x.shape[-2:]
    padded = F.pad(x, (2, 2, 2, 2))
    return padded[..., 2 + dy : 2 + dy + h, 2 + dx : 2 + dx + w]


def check_deformable(name: str, stored: Any) -> Iterator[Quantity]:
    """Compare the operator and its gradients, but for slopes that rounding decides."""
    levels = [(int(h), int(w)) for h, w in stored["spatial_shapes"]]
    sources = ("value", "sampling_locations", "attention_weights")
    value, locations, weights = (torch.tensor(stored[n]).requires_grad_() for n in sources)
    output = deformable_attention(value, levels, locations, weights)
    slopes = torch.autograd.grad(
        output, (value, locations, weights), torch.tensor(stored["grad_output"])
    )
    yield near(f"{name} output", output.detach(), stored["output"], 1e-10)
    exact = all(side & (side - 1) == 0 for shape in levels for side in shape)
    for part, slope in zip(("value", "locations", "weights"), slopes, strict=True):
        smooth: Any = True
        if part == "locations" and not exact:
            smooth = ~np.isin(stored["loc_kind"], (1, 3, 4))
        expected = stored[f"grad_{part}"] * smooth
        yield near(f"{name} gradient of {part}", slope.numpy() * smooth, expected, 1e-9)
