"""Published IDOL checkpoints: names of tensors, the architecture they imply, and vocabularies.

A file of IDOL or PM-VIS holds a state dict below ``model``; its names are ours with prefixes, plus
36 aliases (the decoder lists the box heads a second time). It says neither what network nor what
categories it was made for: the first follows from names and shapes, the second from the number of
classes, which 40 leaves open between YouTube-VIS 2019 and 2021. Notable: the files of our tensors
measure the mask head's coordinates in pixels of any size, the published network in pixels, so the
unit goes into the weights on the way out.

    config, classes = infer_architecture(shapes)
    vocabulary = choose_vocabulary(classes, "", Path("idol_ytvis21_r50.pth"))
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pmvis_core.categories import BUILTIN_TARGETS, load_target
from pmvis_core.config import ModelConfig, TrackerConfig
from pmvis_core.errors import DataError, ResourceError
from pmvis_core.nn.dynamic_mask import CHANNELS, WEIGHT_SHAPES
from pmvis_core.types import Category
from pmvis_core.weights.backbones import backbone_kind

logger = logging.getLogger(__name__)

PUBLISHED_BACKBONES = ("resnet50", "resnet101", "swin_l")
"""Backbones that IDOL's own code can build."""
PUBLISHED_HEADS = 8
"""Attention heads; shapes give only their product with the points."""
LEVEL_EMBED = "transformer.level_embed"
"""A tensor that every IDOL has, and nothing else."""

_PREFIXES = (
    ("backbone.", "detr.detr.backbone.0.backbone."),
    ("controller.", "detr.controller."),
    ("mask_head.", "detr.mask_head."),
    ("reid_embed_head.", "detr.reid_embed_head."),
    ("", "detr.detr."),
)
_ALIAS = "detr.detr.transformer.decoder.bbox_embed."
_NOT_IN_WEIGHTS = ("dropout", "class_prior", "initial_box_logit", "query_grid")
"""Settings that count in training only."""
_SHOWN_CATEGORIES = 3

_COCO_GAPS = frozenset([12, 26, 29, 30, 45, 66, 68, 69, 71, 83])
_COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,"
    "banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
COCO = tuple(
    Category(number, name)
    for number, name in zip(
        (i for i in range(1, 91) if i not in _COCO_GAPS), _COCO_NAMES, strict=True
    )
)
"""COCO's 80 categories with their published ids."""


def to_official_name(name: str) -> str:
    """Return the name that a tensor of ours has in a published IDOL checkpoint."""
    ours, theirs = next(pair for pair in _PREFIXES if name.startswith(pair[0]))
    return theirs + name[len(ours) :]


def from_official_name(name: str) -> str | None:
    """Return our name of a tensor of a published checkpoint; None for an alias or a stranger."""
    for ours, theirs in _PREFIXES:
        if name.startswith(theirs) and not name.startswith(_ALIAS):
            return ours + name[len(theirs) :]
    return None


@dataclass(frozen=True)
class OfficialTensors:
    """A published checkpoint's tensors, sorted out."""

    tensors: Mapping[str, Tensor]
    """By our names."""
    aliased: tuple[str, ...]
    """Names in the file that repeat another tensor."""
    unexpected: tuple[str, ...]
    """Names in the file that no tensor of IDOL has, such as PM-VIS's ``criterion._iter``."""


def is_idol(names: Mapping[str, object]) -> bool:
    """Tell a whole IDOL, under its published names or under ours, from other weights."""
    return LEVEL_EMBED in names or to_official_name(LEVEL_EMBED) in names


def from_official(tensors: Mapping[str, Tensor]) -> OfficialTensors:
    """Sort out the tensors of a file by their names; our own names are taken as they are.

    An alias counts where the tensor that it repeats is absent; where both are there and differ, the
    other one wins, as when IDOL's own code loads the file.
    """
    if LEVEL_EMBED in tensors:
        return OfficialTensors(dict(tensors), (), ())
    found = {from_official_name(name): tensor for name, tensor in tensors.items()}
    named = {name: tensor for name, tensor in found.items() if name is not None}
    aliased = tuple(name for name in tensors if name.startswith(_ALIAS))
    for name in aliased:
        kept = named.setdefault(f"bbox_embed.{name.removeprefix(_ALIAS)}", tensors[name])
        if kept is not tensors[name] and not torch.equal(kept, tensors[name]):
            logger.warning("`%s` differs from the box head that it repeats; left out", name)
    strangers = (n for n in tensors if from_official_name(n) is None and n not in aliased)
    return OfficialTensors(named, aliased, tuple(strangers))


def to_official(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return a model's tensors as a published checkpoint holds them, aliases included.

    Args:
        tensors: by our names.
        config: what they belong to.

    Raises:
        DataError: IDOL's own code could not build this network.
    """
    if config.backbone not in PUBLISHED_BACKBONES:
        raise DataError(
            f"IDOL has no backbone `{config.backbone}`, so no official file can hold this model",
            f"its backbones are {', '.join(PUBLISHED_BACKBONES)}",
        )
    theirs, _ = infer_architecture({name: tensor.shape for name, tensor in tensors.items()})
    kept = {"mask_coordinate_unit_px": 1.0, **{k: getattr(theirs, k) for k in _NOT_IN_WEIGHTS}}
    ours = {**asdict(config), **kept}
    wrong = [f"{name} {ours[name]}" for name, v in asdict(theirs).items() if v != ours[name]]
    if wrong:
        raise DataError(f"an official file cannot express {', '.join(wrong)}")
    found = {}
    for name, tensor in _in_pixels(tensors, config.mask_coordinate_unit_px).items():
        found[to_official_name(name)] = tensor
        if name.startswith("bbox_embed."):
            found[f"{_ALIAS}{name.removeprefix('bbox_embed.')}"] = tensor
    return found


def _in_pixels(tensors: Mapping[str, Tensor], unit_px: float) -> dict[str, Tensor]:
    """Return the tensors with the unit of relative coordinates in the controller's last layer."""
    outputs, inputs = WEIGHT_SHAPES[0]
    row = torch.arange(outputs * inputs)
    of_coordinates = row[row % inputs < inputs - CHANNELS]
    found = dict(tensors)
    if unit_px != 1.0:
        last = max(n for n in found if re.fullmatch(r"controller\.layers\.\d+\.weight", n))
        for name in (last, last.replace("weight", "bias")):
            found[name] = found[name].clone()
            found[name][of_coordinates] /= unit_px
    return found


def infer_architecture(
    shapes: Mapping[str, Sequence[int]], where: str = "the model"
) -> tuple[ModelConfig, int]:
    """Return the network that tensors of these shapes belong to, and its number of classes.

    Args:
        shapes: shapes by our names.
        where: what to call their source in messages.

    Raises:
        ResourceError: the backbone is none of IDOL's, or a tensor that tells is missing.
    """
    prefix = "backbone."
    backbone = backbone_kind(
        {n.removeprefix(prefix): shape for n, shape in shapes.items() if n.startswith(prefix)}
    )
    if backbone not in PUBLISHED_BACKBONES:
        raise ResourceError(
            f"{where} holds an IDOL on the backbone {backbone or 'of another kind'}, expected one "
            f"of {', '.join(PUBLISHED_BACKBONES)}",
            "other models of pmvis are read from their run folder or `model.safetensors`",
        )
    try:
        levels, dim = shapes[LEVEL_EMBED]
        layer = "transformer.encoder.layers.0."
        samples = shapes[f"{layer}self_attn.attention_weights.weight"][0]
        config = ModelConfig(
            backbone=backbone,
            hidden_dim=dim,
            levels=levels,
            heads=PUBLISHED_HEADS,
            points=samples // (PUBLISHED_HEADS * levels),
            feedforward_dim=shapes[f"{layer}linear1.weight"][0],
            encoder_layers=_layers(shapes, "encoder"),
            decoder_layers=_layers(shapes, "decoder"),
            queries=shapes["query_embed.weight"][0],
            reid_dim=shapes["reid_embed_head.layers.2.weight"][0],
        )
        return config, shapes["class_embed.0.weight"][0]
    except KeyError as error:
        raise ResourceError(f"{where} lacks `{to_official_name(error.args[0])}`") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ResourceError(f"{where} holds tensors of impossible shapes") from error


def _layers(names: Mapping[str, object], part: str) -> int:
    """Return how many layers the encoder or the decoder has."""
    pattern = re.compile(rf"transformer\.{part}\.layers\.(\d+)\.")
    return len({found[1] for found in map(pattern.match, names) if found})


@dataclass(frozen=True)
class Vocabulary:
    """What a class head's outputs are called."""

    name: str
    """Built-in (`VOCABULARIES`), or the file's."""
    categories: tuple[Category, ...]
    """Output k is the k-th."""
    assumed: bool = False
    """Whether another built-in vocabulary has as many categories and nothing spoke for this one."""


VOCABULARIES = ("coco", *BUILTIN_TARGETS)
"""Built-in vocabularies."""


def find_vocabulary(spec: str) -> Vocabulary:
    """Return a vocabulary by its built-in name, or from a file (`categories.load_target`)."""
    if spec == "coco":
        return Vocabulary(spec, COCO)
    target = load_target(spec)
    return Vocabulary(target.name, target.categories)


def fitting_vocabularies(classes: int) -> list[Vocabulary]:
    """Return the built-in vocabularies of so many categories."""
    return [v for v in map(find_vocabulary, VOCABULARIES) if len(v.categories) == classes]


def choose_vocabulary(
    classes: int, spec: str, file: Path, wanted: tuple[Category, ...] = ()
) -> Vocabulary:
    """Name the outputs of a class head.

    Args:
        classes: how many there are.
        spec: a built-in name or a file; empty: by the number of classes, and where that leaves two,
            by what the names of the file and its folder say (``ytvis21``).
        file: the weights.
        wanted: preferred where nothing else decides.

    Raises:
        DataError: the vocabulary has another number of categories, or none has this one.
    """
    if spec:
        return _checked(find_vocabulary(spec), classes, file)
    fitting = fitting_vocabularies(classes)
    if not fitting:
        known = ", ".join(f"{n} {len(find_vocabulary(n).categories)}" for n in VOCABULARIES)
        raise DataError(
            f"`{file}` tells {classes} categories apart, and no known vocabulary has as many "
            f"({known})",
            "name them by `--categories FILE`, or start a new class head by `train-image --init`",
        )
    spoken = "/".join(file.parts[-2:]).lower()
    year = re.search(r"(?:vis|yt|youtube)[-_]?(?:20)?(19|21)(?!\d)", spoken)
    hinted = [v for v in fitting if year and v.name == f"ytvis20{year[1]}"]
    hinted = hinted or [v for v in fitting if v.categories == wanted]
    chosen = (hinted or fitting)[0]
    return replace(chosen, assumed=len(fitting) > 1 and not hinted)


def _checked(vocabulary: Vocabulary, classes: int, file: Path) -> Vocabulary:
    """Return a vocabulary that fits a class head."""
    count = len(vocabulary.categories)
    if count != classes:
        fitting = [f"`--categories {v.name}`" for v in fitting_vocabularies(classes)]
        raise DataError(
            f"`{file}` tells {classes} categories apart, `{vocabulary.name}` names {count} "
            f"({shown_names(vocabulary.categories)})",
            (f"give {' or '.join(fitting)}; " if fitting else "")
            + "to learn other categories, `train-image --init` starts a new class head",
        )
    return vocabulary


def shown_names(categories: Sequence[Category]) -> str:
    """Return the first names of a vocabulary for a message."""
    names = ", ".join(category.name for category in categories[:_SHOWN_CATEGORIES])
    return names + (", …" if len(categories) > _SHOWN_CATEGORIES else "")


def published_thresholds(vocabulary: str, backbone: str) -> TrackerConfig:
    """Return the settings of inference that IDOL publishes for a data set.

    Args:
        vocabulary: a built-in name; any other gets YouTube-VIS's settings.
        backbone: COCO's frames are larger for Swin-L.
    """
    if vocabulary == "ovis":
        return TrackerConfig(short_side=720, mask_nms=0.3, new_score=0.3)
    if vocabulary == "coco":
        return TrackerConfig(short_side=800 if backbone == "swin_l" else 640)
    return TrackerConfig()
