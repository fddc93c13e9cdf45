"""Encoders of AOT and DeAOT: maps at strides 4, 8 and 16, and the one that is propagated.

Parameter names are those of the published checkpoints. Batch norm is frozen; nothing is halved
beyond stride 16.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50, resnet101
from torchvision.ops import FrozenBatchNorm2d

from pmvis_core.nn.swin import Swin


class VosEncoder(nn.Module):
    """Something that turns an image into four feature maps."""

    channels: tuple[int, int, int, int]
    """Of the maps at strides 4, 8 and 16, and of the last."""

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return maps at strides 4, 8, 16 and 16 of a (B, 3, H, W) image."""
        raise NotImplementedError


class MobileNetEncoder(VosEncoder):
    """MobileNetV2 whose last stage is dilated instead of halved."""

    channels = (24, 32, 96, 1280)

    def __init__(self) -> None:
        """Stem and first stage are not trained."""
        super().__init__()
        self.features = mobilenet_v2(norm_layer=FrozenBatchNorm2d).features
        for index, dilation in ((14, 1), (15, 2), (16, 2), (17, 2)):
            block: Any = self.features[index]
            depthwise = block.conv[1][0]
            depthwise.stride = (1, 1)
            depthwise.dilation = depthwise.padding = (dilation, dilation)
        self.features[:4].requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the outputs of blocks 3, 6, 13 and 18."""
        maps = []
        first = 0
        for last in (4, 7, 14, 19):
            image = self.features[first:last](image)
            maps.append(image)
            first = last
        return maps


class ResNetEncoder(VosEncoder):
    """ResNet without its last stage; the stride 16 map is also the last."""

    channels = (256, 512, 1024, 1024)

    def __init__(self, depth: int) -> None:
        """Build ResNet-50 or ResNet-101; stem and first stage are not trained."""
        super().__init__()
        whole = {50: resnet50, 101: resnet101}[depth](norm_layer=FrozenBatchNorm2d)
        self.conv1, self.bn1 = whole.conv1, whole.bn1
        self.layer1, self.layer2, self.layer3 = whole.layer1, whole.layer2, whole.layer3
        for part in (self.conv1, self.layer1):
            part.requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return layer1, layer2, layer3 and layer3."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(image))), 3, 2, 1)
        stride4 = self.layer1(x)
        stride8 = self.layer2(stride4)
        stride16 = self.layer3(stride8)
        return [stride4, stride8, stride16, stride16]


class SwinEncoder(Swin):
    """Swin-B without its last stage; the stride 16 map is also the last."""

    def __init__(self) -> None:
        """Fix the published sizes."""
        super().__init__(
            width=128, depths=(2, 2, 18), heads=(4, 8, 16), window=7, drop_path=0.3, first_map=0
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the normalised maps of the three stages, and the last once more."""
        maps = super().forward(image)
        return [*maps, maps[-1]]


def _resnet50() -> ResNetEncoder:
    """Build ResNet-50."""
    return ResNetEncoder(50)


def _resnet101() -> ResNetEncoder:
    """Build ResNet-101."""
    return ResNetEncoder(101)


ENCODERS = {
    "mobilenet_v2": (MobileNetEncoder, MobileNetEncoder.channels),
    "resnet50": (_resnet50, ResNetEncoder.channels),
    "resnet101": (_resnet101, ResNetEncoder.channels),
    "swin_b": (SwinEncoder, (128, 256, 512, 512)),
}
"""How to build each encoder, and its channels at strides 4, 8 and 16 and of the last map."""
