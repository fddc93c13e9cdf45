"""IDOL against reference outputs: every stage of the network, and the names of its weights.

A folder is laid out like the golden one; files are told by their names: ``A*`` single images,
``F*`` images through Swin-L, ``names_shapes*.json``, ``weights_check.json``; losses and operators
(``C*``, ``D*``, ``E*``) are in `parity_idol_losses`, videos and images after the network (``B*``,
``G*``, ``T*``, ``V*``) in `parity_idol_tracks`. Sizes, classes and settings are the files' own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmvis_core.config import ModelConfig
from pmvis_core.data.samples import ImageBatch
from pmvis_core.models.idol import IDOL, IdolPredictions, build_idol
from pmvis_core.weights.official import to_official, to_official_name
from tests.golden_idol import Quantity, backbone_of, model_for, near, same
from tests.parity_idol_losses import check_boxinst, check_deformable, check_losses
from tests.parity_idol_tracks import check_assembly, check_clip, check_images, check_tracker

TOLERANCE = {
    "norm_input_sub": 1e-6,
    "stem_sub": 2e-5,
    "res2_sub": 3e-5,
    "res3_sub": 5e-5,
    "res4_sub": 7e-5,
    "res5_sub": 7e-5,
    "mean_std": 2e-6,
    "input_proj": 4e-5,
    "pos": 2e-6,
    "encoder_layer": 8e-5,
    "memory": 1e-4,
    "hs": 2e-4,
    "init_reference": 2e-6,
    "boxes_per_layer": 2e-5,
    "logits_per_layer": 4e-4,
    "pred_logits": 4e-4,
    "pred_boxes": 2e-5,
    "pred_inst_embed": 2e-4,
    "mask_feats": 2e-4,
    "mask_params_top": 6e-5,
    "mask_logits": 1.3e-3,
    "pred_masks": 1.3e-3,
}
"""Ten times the float32 noise that the golden files state, by the beginning of an array's name."""
SWIN_FACTOR = 5
"""Swin-L's deeper sums are noisier."""


def check(golden: Path, names: Collection[str] | None = None) -> Iterator[Quantity]:
    """Yield (quantity, equal, detail) for every file of a folder, or those of some stems."""
    checks: list[tuple[str, Callable[[str, Any], Iterator[Quantity]]]] = [
        ("A*.npz", check_image),
        ("B*.npz", check_clip),
        ("C*.npz", check_losses),
        ("D*.npz", check_boxinst),
        ("E*.npz", check_deformable),
        ("F*.npz", check_image),
        ("G*.npz", check_images),
        ("T*.npz", check_tracker),
        ("V*.npz", check_assembly),
        ("names_shapes*.json", check_names),
        ("weights_check*.json", check_weights),
    ]
    for pattern, function in checks:
        for path in sorted(golden.glob(pattern)):
            if names is None or path.stem in names:
                stored = json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)
                yield from function(path.stem, stored)


@torch.no_grad()
def check_image(name: str, stored: Any) -> Iterator[Quantity]:
    """Compare every stored stage of one batch of images."""
    backbone = backbone_of(name)
    model = model_for(backbone, stored["pred_logits"].shape[-1])
    singles = sorted(key for key in stored.files if key.startswith("image"))
    images = [torch.from_numpy(stored[key]).permute(2, 0, 1).float() for key in singles]
    batch = ImageBatch.of(images)
    found = _recorded(model, batch, 4 if backbone == "swin_l" else 8)
    found |= _masks(found.pop("out"), stored)
    height, width = (max(sizes) for sizes in zip(*(i.shape[1:] for i in images), strict=True))
    found["norm_input_sub"] = batch.tensor[:, :, :height:4, :width:4]
    for key in stored.files:
        if key in singles or key == "top_queries":
            continue
        if key.endswith("_shape"):
            yield same(f"{name} {key}", found[key], stored[key])
            continue
        kind = "mean_std" if key.endswith("_mean_std") else key
        limit = next((v for start, v in TOLERANCE.items() if kind.startswith(start)), None)
        if limit is None or key not in found:
            yield f"{name} {key}", False, "nothing to compare it with"
            continue
        limit *= SWIN_FACTOR if backbone == "swin_l" else 1
        yield near(f"{name} {key}", found[key], stored[key], limit)


def _recorded(model: IDOL, batch: ImageBatch, step: int) -> dict[str, Any]:
    """Run the network and return its stages under the golden names, thinned like them.

    Args:
        model: the network.
        batch: its input.
        step: every which channel of the backbone's maps is stored.
    """
    stages: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            stages.setdefault(name, []).append(output.clone())

        return hook

    modules: dict[str, Any] = {f"proj{i}": p for i, p in enumerate(model.input_proj)}
    modules |= {f"layer{i}": layer for i, layer in enumerate(model.transformer.encoder.layers)}
    modules["position"] = model.position
    backbone: Any = model.backbone
    resnet = hasattr(backbone, "stem")
    if resnet:
        modules |= {part: getattr(backbone, part) for part in ("stem", "res2")}
    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    out = model(batch)
    for hook in hooks:
        hook.remove()
    if resnet:
        maps = [stages["res2"][0], *backbone(batch.tensor)]
    else:
        backbone.first_map = 0
        maps = backbone(batch.tensor)
        backbone.first_map = 1
    found: dict[str, Any] = {"out": out}
    for index, full in enumerate(maps, 2):
        found[f"res{index}_shape"] = full.shape
        found[f"res{index}_mean_std"] = torch.stack((full.mean(), full.std(correction=0)))
        found[f"res{index}_sub"] = full[:, ::step]
    every = 2 * step if resnet else step
    found["res2_sub"] = maps[0][:, ::every, ::2, ::2]
    if resnet:
        found["stem_sub"] = stages["stem"][0][:, ::8, ::2, ::2]
    for level, position in enumerate(stages["position"]):
        found[f"input_proj_{level}"] = stages[f"proj{level}"][0][:, ::2]
        found[f"pos_{level}"] = position[:, ::4]
    layers = [stages[f"layer{i}"][0] for i in range(len(model.transformer.encoder.layers))]
    found |= {f"encoder_layer_{i}_sub": x[:, ::2, ::16] for i, x in enumerate(layers)}
    found["memory"] = layers[-1][:, :, ::2]
    return found | _answers(out)


def _answers(out: IdolPredictions) -> dict[str, Any]:
    """Return what the decoder and the heads say, under the golden names."""
    return {
        "hs_sub": out.decoded.states[..., ::8],
        "hs_last": out.decoded.states[-1],
        "init_reference": out.decoded.references[0],
        "boxes_per_layer": out.boxes,
        "logits_per_layer": out.logits,
        "pred_logits": out.logits[-1],
        "pred_boxes": out.boxes[-1],
        "pred_inst_embed": out.embeddings,
        "pred_inst_embed_sub": out.embeddings[:, ::4],
        "mask_feats": out.mask_features,
    }


def _masks(out: IdolPredictions, stored: Any) -> dict[str, Any]:
    """Return the dynamic parameters and masks of the queries that are stored."""
    frames, queries = out.logits.shape[1:3]
    if "top_queries" in stored:
        chosen = torch.from_numpy(stored["top_queries"])
    else:
        chosen = torch.arange(0, queries, 30).expand(frames, -1)
    rows = torch.arange(frames)[:, None].expand_as(chosen)
    masks = out.mask_logits(-1, rows.flatten(), chosen.flatten()).unflatten(0, chosen.shape)
    return {
        "mask_params_top": out.controller(out.decoded.states[-1, rows, chosen]),
        "mask_logits_up_top": masks,
        # The aligned upsampling passes every logit on, one row and column further on.
        "mask_logits_low_top": masks[..., 1::2, 1::2],
        "pred_masks_sub": masks[:, :, None],
    }


def check_names(name: str, rows: list[dict[str, Any]]) -> Iterator[Quantity]:
    """Compare names, order-free, shapes, types and what learns of an official state dict."""
    shapes = {row["name"]: tuple(row["shape"]) for row in rows}
    heads = [key for key in shapes if key.endswith("class_embed.0.weight")]
    if any("patch_embed" in key for key in shapes):
        backbone = "swin_l"
    else:
        backbone = "resnet101" if any("res4.22." in key for key in shapes) else "resnet50"
    config = ModelConfig(backbone=backbone)
    model = build_idol(config, shapes[heads[0]][0])
    official = to_official(model.state_dict(), config)
    ours = {key: tuple(tensor.shape) for key, tensor in official.items()}
    lost, extra = sorted(shapes.keys() - ours.keys()), sorted(ours.keys() - shapes.keys())
    detail = f"{len(shapes)} names; lost {lost[:2]}, extra {extra[:2]}"
    yield f"{name} names", not lost and not extra, detail
    wrong = [key for key in shapes if ours.get(key) != shapes[key]]
    yield f"{name} shapes", not wrong, f"differ: {wrong[:2]}"
    types = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in official.items()}
    wrong = [row["name"] for row in rows if types.get(row["name"]) != row["dtype"]]
    yield f"{name} types", not wrong, f"differ: {wrong[:2]}"
    aliases = [(row["name"], row["alias_of"]) for row in rows if row.get("alias_of")]
    wrong = [a for a, b in aliases if not torch.equal(official[a], official[b])]
    yield f"{name} aliases", not wrong, f"{len(aliases)} aliases; differ: {wrong[:2]}"
    learns = {to_official_name(key): p.requires_grad for key, p in model.named_parameters()}
    plain = [row for row in rows if not row.get("alias_of")]
    wrong = [r["name"] for r in plain if learns.get(r["name"], False) != r["trainable"]]
    yield f"{name} what learns", not wrong, f"differ: {wrong[:2]}"


def check_weights(name: str, stored: dict[str, list[float]]) -> Iterator[Quantity]:
    """Compare the first and last value and the sum of every tensor of R50 with 40 classes."""
    model = model_for("resnet50", 40)
    official = to_official(model.state_dict(), ModelConfig())
    worst, lost = 0.0, sorted(stored.keys() - official.keys())
    for key in stored.keys() & official.keys():
        values = official[key].double().flatten()
        ours = (values[0].item(), values[-1].item(), values.sum().item())
        worst = max(worst, *(abs(a - b) for a, b in zip(ours, stored[key], strict=True)))
    yield f"{name} values", not lost and worst <= 1e-6, f"off by {worst:.1e}; lost {lost[:2]}"
