"""CondInst's dynamic mask head as IDOL uses it (Tian et al., 2020; Wu et al., 2022, section 3.1).

Every query writes the 169 parameters of its own three-layer 1x1 convolution, which runs on eight
shared channels and two relative coordinates at stride 8. Notable: coordinates come first and are
the reference minus the pixel, in pixels; all weights precede all biases; two upsamplings differ
(the aligned one here, stride 8 to 4, and plain bilinear from 4 to 1 at inference).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 8
"""Channels of the mask features and of the dynamic layers."""
WEIGHT_SHAPES = ((CHANNELS, CHANNELS + 2), (CHANNELS, CHANNELS), (1, CHANNELS))
"""(outputs, inputs) of the three dynamic layers."""
PARAMETERS = sum(out * (inp + 1) for out, inp in WEIGHT_SHAPES)
"""Dynamic parameters a query: 169."""
STRIDE_PX = 8
"""Pixels of the network's input per mask feature."""


class MaskBranch(nn.Module):
    """A small top-down pyramid over encoded levels that gives the shared mask features."""

    def __init__(self, dim: int) -> None:
        """Build with the published names; ``dcn`` is an ordinary convolution there too."""
        super().__init__()
        self.lay3 = nn.Conv2d(dim, dim, 3, padding=1)
        self.lay4 = nn.Conv2d(dim, dim, 3, padding=1)
        self.dcn = nn.Conv2d(dim, dim, 3, padding=1)
        self.lay1 = nn.Conv2d(dim, dim // 4, 3, padding=1)
        self.lay2 = nn.Conv2d(dim // 4, CHANNELS, 3, padding=1)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return (B, 8, H/8, W/8), non-negative, of (B, D, ., .) maps at strides 8, 16, 32."""
        stride8, stride16, stride32 = maps
        x = F.relu(self.lay3(stride32), inplace=True)
        x = stride16 + F.interpolate(x, size=stride16.shape[-2:])
        x = F.relu(self.lay4(x), inplace=True)
        x = stride8 + F.interpolate(x, size=stride8.shape[-2:])
        x = F.relu(self.lay1(F.relu(self.dcn(x), inplace=True)), inplace=True)
        return F.relu(self.lay2(x), inplace=True)


def dynamic_masks(
    features: Tensor, parameters: Tensor, centres: Tensor, coordinate_unit_px: float = 1.0
) -> Tensor:
    """Run each instance's own convolutions.

    Args:
        features: (8, h, w), or (N, 8, h, w) with one map an instance, at stride 8.
        parameters: (N, 169) dynamic weights and biases.
        centres: (N, 2) xy reference points in pixels of the network's input.
        coordinate_unit_px: pixels that relative coordinates are measured in; IDOL: 1.

    Returns:
        (N, 2 h, 2 w) mask logits at stride 4.
    """
    height, width = features.shape[-2:]
    weights, biases = _split_parameters(parameters)
    relative = (centres[:, :, None] - pixel_locations(height, width, features)) / coordinate_unit_px
    coordinates, shared = weights[0].split((2, CHANNELS), dim=-1)
    x = torch.matmul(shared, features.flatten(-2)) + torch.bmm(coordinates, relative)
    x = F.relu(x + biases[0], inplace=True)
    x = F.relu(torch.baddbmm(biases[1], weights[1], x), inplace=True)
    x = torch.baddbmm(biases[2], weights[2], x)
    return aligned_upsample(x.view(-1, 1, height, width), 2)[:, 0]


def pixel_locations(height: int, width: int, like: Tensor) -> Tensor:
    """Return (2, h * w) xy pixel centres of a stride-8 map, row-major."""
    y = torch.arange(height, device=like.device, dtype=like.dtype) * STRIDE_PX + STRIDE_PX // 2
    x = torch.arange(width, device=like.device, dtype=like.dtype) * STRIDE_PX + STRIDE_PX // 2
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1]).flatten(1)


def aligned_upsample(x: Tensor, factor: int) -> Tensor:
    """Upsample (N, C, h, w) by a whole factor so that sample centres stay aligned (CondInst)."""
    height, width = x.shape[-2:]
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    size = (factor * height + 1, factor * width + 1)
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    x = F.pad(x, (factor // 2, 0, factor // 2, 0), mode="replicate")
    return x[..., : factor * height, : factor * width]


def _split_parameters(parameters: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Split (N, 169) into (N, out, in) weights and (N, out, 1) biases."""
    sizes = [out * inp for out, inp in WEIGHT_SHAPES] + [out for out, _ in WEIGHT_SHAPES]
    parts = parameters.split(sizes, dim=-1)
    weights = [p.view(-1, *shape) for p, shape in zip(parts[:3], WEIGHT_SHAPES, strict=True)]
    return weights, [p[..., None] for p in parts[3:]]
