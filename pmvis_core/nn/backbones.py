"""Image backbones: ResNet, MobileNetV2, Swin and a tiny one, all giving strides 8, 16 and 32.

Parameter names of ResNet and Swin are those of the published IDOL checkpoints below their backbone
prefix, so that loading them is a rename of the prefix (``pmvis_core/weights/official.py``). Batch
norm is frozen everywhere, as in IDOL; the tiny backbone, trained from scratch on small batches,
uses group norm.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.ops import FrozenBatchNorm2d

from pmvis_core.nn.base import Backbone
from pmvis_core.nn.swin import Swin


class ConvNorm(nn.Conv2d):
    """A convolution without bias followed by a frozen batch norm called ``norm``."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        """Pad so that stride 1 keeps the size."""
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.norm = FrozenBatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise, in one go."""
        if not isinstance(self.norm, FrozenBatchNorm2d):  # see `fold_frozen_norms`
            return super().forward(x)
        return convolve_normed(x, self, self.norm)


def convolve_normed(x: Tensor, conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> Tensor:
    """Return norm(conv(x)) by a convolution alone, whose weights carry the norm's scale.

    Its gradient reaches the weights through the scale; maps are neither passed over again nor kept.
    """
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def fold_frozen_norms(module: nn.Module) -> None:
    """Write every frozen batch norm into the convolution before it, for inference.

    The result is the same but for rounding; afterwards the norms pass their input through, and the
    state dict has other names.
    """
    last: nn.Module | None = module if isinstance(module, nn.Conv2d) else None
    for name, child in list(module.named_children()):
        fold_frozen_norms(child)
        if isinstance(child, FrozenBatchNorm2d) and isinstance(last, nn.Conv2d):
            scale = child.weight.double() * (child.running_var.double() + child.eps).rsqrt()
            bias = child.bias.double() - child.running_mean.double() * scale
            weight = last.weight.detach().double() * scale[:, None, None, None]
            last.weight = nn.Parameter(weight.to(last.weight.dtype), requires_grad=False)
            last.bias = nn.Parameter(bias.to(last.weight.dtype), requires_grad=False)
            module.register_module(name, nn.Identity())
        last = child if isinstance(child, nn.Conv2d) else last


class NormedLayers(nn.Sequential):
    """Layers one after the other; a convolution and the frozen norm behind it are one."""

    @classmethod
    def like(cls, module: nn.Module) -> nn.Module:
        """Return a module whose sequences, and those inside them, are of this kind."""
        for name, child in module.named_children():
            module.register_module(name, cls.like(child))
        if isinstance(module, nn.Sequential):
            return cls(OrderedDict(module.named_children()))
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        around: list[nn.Module | None] = [None, *self, None]
        for number, layer in enumerate(self, 1):
            before, behind = around[number - 1], around[number + 1]
            if isinstance(layer, nn.Conv2d) and isinstance(behind, FrozenBatchNorm2d):
                x = convolve_normed(x, layer, behind)
            elif not (isinstance(before, nn.Conv2d) and isinstance(layer, FrozenBatchNorm2d)):
                x = layer(x)
        return x


class Bottleneck(nn.Module):
    """ResNet's 1x1, 3x3 (with the stride), 1x1 block."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int) -> None:
        """Add a projection shortcut where the shape changes."""
        super().__init__()
        self.conv1 = ConvNorm(inputs, middle, 1)
        self.conv2 = ConvNorm(middle, middle, 3, stride)
        self.conv3 = ConvNorm(middle, outputs, 1)
        self.shortcut = ConvNorm(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(block(x) + shortcut(x))."""
        skip = x if self.shortcut is None else self.shortcut(x)
        x = F.relu(self.conv1(x), inplace=True)
        x = F.relu(self.conv2(x), inplace=True)
        return F.relu(self.conv3(x) + skip, inplace=True)


class Stem(nn.Module):
    """ResNet's first convolution and pooling, down to stride 4."""

    def __init__(self) -> None:
        """Build with the published name."""
        super().__init__()
        self.conv1 = ConvNorm(3, 64, 7, 2)

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, 64, H/4, W/4)."""
        return F.max_pool2d(F.relu(self.conv1(image), inplace=True), 3, 2, 1)


class ResNet(Backbone):
    """ResNet-50/101 (He et al., 2016); stem and res2 are frozen as in detectron2's FREEZE_AT 2."""

    channels = (512, 1024, 2048)
    res2: nn.Sequential
    res3: nn.Sequential
    res4: nn.Sequential
    res5: nn.Sequential

    def __init__(self, blocks: Sequence[int]) -> None:
        """Build the stages.

        Args:
            blocks: number of bottlenecks in res2..res5: (3, 4, 6, 3) or (3, 4, 23, 3).
        """
        super().__init__()
        self.stem = Stem()
        inputs = 64
        for index, count in enumerate(blocks):
            outputs = 256 << index
            stage = [
                Bottleneck(
                    inputs if b == 0 else outputs,
                    outputs // 4,
                    outputs,
                    stride=2 if b == 0 and index > 0 else 1,
                )
                for b in range(count)
            ]
            self.add_module(f"res{index + 2}", nn.Sequential(*stage))
            inputs = outputs
        self.stem.requires_grad_(False)
        self.res2.requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return res3, res4, res5."""
        res3 = self.res3(self.res2(self.stem(image)))
        res4 = self.res4(res3)
        return [res3, res4, self.res5(res4)]


class MobileNetV2(Backbone):
    """MobileNetV2 (Sandler et al., 2018) with frozen batch norm, without its classifier."""

    channels = (32, 96, 320)

    def __init__(self) -> None:
        """Keep the features up to the last inverted residual."""
        super().__init__()
        features = mobilenet_v2(norm_layer=FrozenBatchNorm2d).features[:18]
        self.features = cast(NormedLayers, NormedLayers.like(features))
        self.features[:4].requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the outputs of blocks 6, 13 and 17."""
        stride8 = self.features[:7](image)
        stride16 = self.features[7:14](stride8)
        return [stride8, stride16, self.features[14:](stride16)]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with group norm and a projection shortcut; halves the size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Group norm has 8 groups."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, 2, bias=False)
        self.norm3 = nn.GroupNorm(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(block(x) + shortcut(x))."""
        skip = self.norm3(self.shortcut(x))
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)) + skip)


class TinyResNet(Backbone):
    """A half-million-parameter residual network that learns from scratch in minutes on a CPU."""

    channels = (64, 96, 128)

    def __init__(self, stem: int = 24, widths: Sequence[int] = (32, 64, 96, 128)) -> None:
        """One block a stage, strides 4, 8, 16, 32; channels must be multiples of 8."""
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 5, 2, 2, bias=False), nn.GroupNorm(8, stem), nn.ReLU()
        )
        inputs = (stem, *widths[:-1])
        self.stages = nn.ModuleList(map(BasicBlock, inputs, widths))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the last three stages."""
        x = self.stages[0](self.stem(image))
        maps = []
        for stage in self.stages[1:]:
            x = stage(x)
            maps.append(x)
        return maps


class SwinLarge(Swin):
    """Swin-L with window 12 (Liu et al., 2021), as IDOL's strongest checkpoints use it."""

    def __init__(self) -> None:
        """Fix the published sizes."""
        super().__init__(
            width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12, drop_path=0.3
        )


def build_backbone(name: str) -> Backbone:
    """Build a backbone by its name in a preset.

    Raises:
        KeyError: the name is none of ``BACKBONES``.
    """
    return BACKBONES[name]()


def _resnet50() -> ResNet:
    """Build ResNet-50."""
    return ResNet((3, 4, 6, 3))


def _resnet101() -> ResNet:
    """Build ResNet-101."""
    return ResNet((3, 4, 23, 3))


BACKBONES = {
    "resnet50": _resnet50,
    "resnet101": _resnet101,
    "swin_l": SwinLarge,
    "mobilenet_v2": MobileNetV2,
    "tiny": TinyResNet,
}
"""Every backbone there is."""
