"""Swin Transformer backbone (Liu et al., 2021): windowed self-attention with shifted windows.

Notable: windows are padded right and below to whole windows, the shift's wrap-around is masked by
-100, every output map has a LayerNorm of its own, and the relative position index is stored in the
state dict because published checkpoints hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from pmvis_core.nn.base import Backbone

WRAPPED = -100.0
"""Added to attention logits between positions that only the cyclic shift made neighbours."""


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows with a learnt bias per relative position."""

    relative_position_index: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        """Make the bias table of (2 window - 1)^2 rows."""
        super().__init__()
        self.heads = heads
        table = torch.zeros((2 * window - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        self.register_buffer("relative_position_index", _relative_index(window))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within windows.

        Args:
            windows: (B * n, window^2, C).
            mask: (n, window^2, window^2) additive, or None without shift.
        """
        count, area, width = windows.shape
        qkv = self.qkv(windows).view(count, area, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index]
        bias = bias.permute(2, 0, 1)[None]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(count // len(mask), 1, 1, 1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(count, area, width))


class FeedForward(nn.Module):
    """Two linear layers with GELU between, four times as wide inside."""

    def __init__(self, width: int) -> None:
        """Build with the published names."""
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform the last axis."""
        return self.fc2(F.gelu(self.fc1(x)))


class PatchEmbed(nn.Module):
    """Cut an image into 4x4 patches and embed each."""

    def __init__(self, width: int) -> None:
        """Build with the published names."""
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, ceil(H/4), ceil(W/4), C) of a (B, 3, H, W) image."""
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % 4, 0, -height % 4))
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class SwinBlock(nn.Module):
    """Pre-norm attention (shifted on odd blocks) and MLP, both residual."""

    def __init__(self, width: int, heads: int, window: int, shift: int, drop_path: float) -> None:
        """Build with the published names."""
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Transform a map.

        Args:
            x: (B, H, W, C).
            mask: the shift's mask of the padded map, (n, window^2, window^2).
        """
        x = x + self.drop_path(self._attend(self.norm1(x), mask if self.shift else None))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Pad, shift, attend within windows, and undo."""
        batch, height, width, channels = x.shape
        side = self.window
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        padded = x.shape[1:3]
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(batch, padded[0] // side, side, padded[1] // side, side, channels)
        x = self.attn(x.transpose(2, 3).reshape(-1, side * side, channels), mask)
        x = x.view(batch, padded[0] // side, padded[1] // side, side, side, channels)
        x = x.transpose(2, 3).reshape(batch, *padded, channels)
        return torch.roll(x, (self.shift, self.shift), (1, 2))[:, :height, :width]


class PatchMerging(nn.Module):
    """Halve a map: gather 2x2 neighbours, normalise, project to twice the channels."""

    def __init__(self, width: int) -> None:
        """Project 4C to 2C without bias."""
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Merge a (B, H, W, C) map to (B, ceil(H/2), ceil(W/2), 2C)."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class SwinStage(nn.Module):
    """Blocks at one resolution and, but for the last stage, the merging to the next."""

    def __init__(
        self, width: int, heads: int, window: int, drop_paths: Sequence[float], last: bool
    ) -> None:
        """Shift every second block by half a window."""
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(
            SwinBlock(width, heads, window, shift=window // 2 * (index % 2), drop_path=rate)
            for index, rate in enumerate(drop_paths)
        )
        self.downsample = None if last else PatchMerging(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the stage's own map and the input of the next stage, both (B, H, W, C)."""
        mask = _shift_mask(x.shape[1], x.shape[2], self.window, x.device)
        for block in self.blocks:
            x = block(x, mask)
        return x, None if self.downsample is None else self.downsample(x)


class Swin(Backbone):
    """The backbone; gives the maps at strides 8, 16 and 32."""

    def __init__(
        self,
        width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        window: int,
        drop_path: float,
        first_map: int = 1,
    ) -> None:
        """Build the stages; the rate of dropped paths grows linearly with depth.

        Args:
            width: channels of the first stage.
            depths: number of blocks of each stage.
            heads: of each stage.
            window: side of a window in tokens.
            drop_path: rate in the last block.
            first_map: first stage whose map is given.
        """
        super().__init__()
        self.first_map = first_map
        self.channels = (2 * width, 4 * width, 8 * width)
        self.patch_embed = PatchEmbed(width)
        rates = iter(np.linspace(0, drop_path, sum(depths)).tolist())
        self.layers = nn.ModuleList(
            SwinStage(
                width << i, heads[i], window, list(islice(rates, depth)), last=i == len(depths) - 1
            )
            for i, depth in enumerate(depths)
        )
        for index in range(len(depths)):
            self.add_module(f"norm{index}", nn.LayerNorm(width << index))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the normalised maps from stage `first_map` on; IDOL does not use stage 0's."""
        x = self.patch_embed(image)
        maps = []
        for index, layer in enumerate(self.layers):
            out, x = layer(x)
            if index >= self.first_map:
                maps.append(getattr(self, f"norm{index}")(out).permute(0, 3, 1, 2).contiguous())
        return maps


def _relative_index(window: int) -> Tensor:
    """Return, for each pair of positions in a window, its row in the bias table."""
    axis = torch.arange(window)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).flatten(0, 1)
    offset = points[:, None] - points[None] + window - 1
    return offset[..., 0] * (2 * window - 1) + offset[..., 1]


def _shift_mask(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """Return (n, window^2, window^2): 0 within a region of the shifted map, else ``WRAPPED``."""
    regions = []
    for side in (height, width):
        size = side + -side % window
        position = torch.arange(size, device=device)
        regions.append((position >= size - window).int() + (position >= size - window // 2).int())
    label = regions[0][:, None] * 3 + regions[1][None]
    label = label.view(len(regions[0]) // window, window, len(regions[1]) // window, window)
    label = label.transpose(1, 2).reshape(-1, window * window)
    return (label[:, :, None] != label[:, None]).float() * WRAPPED
