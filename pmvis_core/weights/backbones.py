"""Classification weights of other libraries under the names of our backbones.

Layouts: ResNets of torchvision, timm, detectron2 (``stem.conv1.weight``) and Caffe2's Detectron
(``res2_0_branch2a_w``); Swins as published, of timm and of torchvision; MobileNetV2 of torchvision
and the flat one of early files. The backbone may also sit inside a detector, below any prefix.
Notable: Caffe2's networks saw BGR without division by the standard deviation; their first
convolution is rewritten so that it gives the same numbers for our images.

    renamed = backbone_weights(torchvision.models.resnet50().state_dict())
    assert backbone_kind({name: tensor.shape for name, tensor in renamed.items()}) == "resnet50"
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pmvis_core.data.samples import PIXEL_STD

logger = logging.getLogger(__name__)

_FIRST_TENSORS = (
    "stem.conv1.weight",
    "stem.0.weight",
    "conv1_w",
    "patch_embed.proj.weight",
    "features.0.0.weight",
    "conv1.weight",
)
"""The first tensor of each layout; it tells where in a file the backbone lies."""
_RESNETS: dict[tuple[int, ...], str] = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101"}
_SWINS: dict[tuple[object, ...], str] = {(192, (2, 2, 18, 2), 529): "swin_l"}
"""(channels, blocks a stage, rows of the position table) -> name."""
_FLAT_MOBILENET = {
    True: {0: "0.0", 1: "0.1", 3: "1", 4: "2"},
    False: {0: "0.0", 1: "0.1", 3: "1.0", 4: "1.1", 6: "2", 7: "3"},
}
"""Index in the flat layout to torchvision's, for the first block (no expansion) and the others."""
_CAFFE2_LAYERS = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_CAFFE2_PARTS = {
    "w": "weight",
    "bn_s": "norm.weight",
    "bn_b": "norm.bias",
    "bn_rm": "norm.running_mean",
    "bn_riv": "norm.running_var",
}
_NORM_EPSILON = 1e-5
"""Of a frozen batch norm."""


def backbone_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the backbone in a file, under our backbones' names.

    Args:
        tensors: all of a file; what lies outside of the backbone's prefix is left out.

    Returns:
        Also tensors that our backbones do not have, such as a classifier's, under their own names.
    """
    inside = _below_prefix(tensors)
    if "conv1_w" in inside:
        return _from_caffe2(inside)
    rename = _layout(inside)
    found = {rename(name): tensor for name, tensor in inside.items()}
    for name, tensor in found.items():
        if name.endswith("relative_position_index") and tensor.dim() == 1:
            side = math.isqrt(len(tensor))
            found[name] = tensor.view(side, side)
    return found


def backbone_kind(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Return which of our backbones has tensors of these names and shapes, or None.

    Args:
        shapes: shapes by our names.
    """
    if "res2.0.conv3.weight" in shapes:
        return _RESNETS.get(tuple(_count(shapes, f"res{stage}.") for stage in (2, 3, 4, 5)))
    table = shapes.get("layers.0.blocks.0.attn.relative_position_bias_table")
    if table is not None and "patch_embed.proj.weight" in shapes:
        blocks = tuple(_count(shapes, f"layers.{stage}.blocks.") for stage in range(4))
        return _SWINS.get((shapes["patch_embed.proj.weight"][0], blocks, table[0]))
    if "features.17.conv.2.weight" in shapes:
        return "mobilenet_v2"
    return "tiny" if "stages.0.norm3.weight" in shapes else None


def _count(names: Mapping[str, object], prefix: str) -> int:
    """Return how many numbers follow a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def _below_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors beside a backbone's first one, without their common prefix."""
    for first in _FIRST_TENSORS:
        found = [name for name in tensors if name == first or name.endswith(f".{first}")]
        if found:
            prefix = min(found, key=len).removesuffix(first)
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return dict(tensors)


def _layout(names: Mapping[str, object]) -> Callable[[str], str]:
    """Return how to rename a file's tensors."""
    if "features.1.0.attn.qkv.weight" in names:
        return _from_torchvision_swin
    if "layers.3.downsample.reduction.weight" in names:
        return _from_timm_swin
    if "features.1.conv.0.weight" in names:
        return _from_flat_mobilenet
    return _from_torchvision_resnet if "layer1.0.conv1.weight" in names else str


def _from_torchvision_resnet(name: str) -> str:
    """Rename ``layer1.0.bn1.weight`` to ``res2.0.conv1.norm.weight``."""
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    name = re.sub(r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}.", name)
    name = name.replace(".downsample.0.", ".shortcut.").replace(".downsample.1.", ".shortcut.norm.")
    return re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)


def _from_flat_mobilenet(name: str) -> str:
    """Rename ``features.2.conv.3.weight`` to ``features.2.conv.1.0.weight``."""
    block = re.fullmatch(r"(features\.(\d+)\.conv)\.(\d)\.(\w+)", name)
    place = _FLAT_MOBILENET[block[2] == "1"].get(int(block[3])) if block else None
    return f"{block[1]}.{place}.{block[4]}" if block and place else name


def _from_timm_swin(name: str) -> str:
    """Move a merging from the stage that it leads to, to the stage that it follows."""
    return re.sub(
        r"^layers\.(\d)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", name
    )


def _from_torchvision_swin(name: str) -> str:
    """Rename ``features.1.0.mlp.3.bias`` to ``layers.0.blocks.0.mlp.fc2.bias``."""
    name = name.replace("features.0.0.", "patch_embed.proj.")
    name = name.replace("features.0.2.", "patch_embed.norm.")
    name = name.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
    name = re.sub(
        r"^features\.([1357])\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}.", name
    )
    return re.sub(
        r"^features\.([246])\.", lambda m: f"layers.{int(m[1]) // 2 - 1}.downsample.", name
    )


def _from_caffe2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Detectron's tensors, and adapt them to our images and norms."""
    logger.warning(
        "Caffe2's ResNets halve the size in a stage's first 1x1 convolution, ours in its 3x3: the "
        "weights are a start, not the same network"
    )
    found = {_from_caffe2_name(name): tensor for name, tensor in tensors.items()}
    # Their scale and bias hold the statistics already.
    for name in [n for n in found if n.endswith(".norm.weight")]:
        norm = name.removesuffix("weight")
        found.setdefault(f"{norm}running_mean", torch.zeros_like(found[name]))
        found.setdefault(f"{norm}running_var", torch.ones_like(found[name]) - _NORM_EPSILON)
    stem = found["stem.conv1.weight"]
    found["stem.conv1.weight"] = stem.flip(1) * stem.new_tensor(PIXEL_STD)[:, None, None]
    return found


def _from_caffe2_name(name: str) -> str:
    """Rename ``res2_0_branch2a_bn_s`` to ``res2.0.conv1.norm.weight``."""
    part = "|".join(_CAFFE2_PARTS)
    stem = re.fullmatch(rf"(?:res_)?conv1_({part})", name)
    if stem:
        return f"stem.conv1.{_CAFFE2_PARTS[stem[1]]}"
    block = re.fullmatch(rf"(res\d)_(\d+)_branch(1|2[abc])_({part})", name)
    if not block:
        return name
    return f"{block[1]}.{block[2]}.{_CAFFE2_LAYERS[block[3]]}.{_CAFFE2_PARTS[block[4]]}"
