"""AOT's long short-term transformer: identities are added to the values (Yang et al., 2021).

"Associating Objects with Transformers for Video Object Segmentation", section 3.3. The ancestor of
`gated_propagation`, kept for the published AOT checkpoints, whose parameter names it has. Tokens
are (B, N, C), N = h * w row by row; eight heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmvis_core.nn.local_attention import WINDOW, Entry, Grid, local_attention

HEADS = 8
State = tuple[Tensor]
"""Tokens of a frame, (B, N, C)."""


class RawEntry(NamedTuple):
    """What a block derives from a frame before its mask is known."""

    key: Tensor
    """(B, N, C); queries are the same."""
    content: Tensor
    """(B, N, C) normalised tokens, to which identities are added."""


class SelfAttention(nn.Module):
    """Attention within the frame; positions are added to queries and keys."""

    def __init__(self, width: int) -> None:
        """Build with the published names."""
        super().__init__()
        self.linear_Q = nn.Linear(width, width)
        self.linear_K = nn.Linear(width, width)
        self.linear_V = nn.Linear(width, width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Attend; x (B, N, C), positions (N, C)."""
        placed = x + positions
        out = _attend(self.linear_Q(placed), self.linear_K(placed), self.linear_V(x))
        return self.projection(out)


class LongTermAttention(nn.Module):
    """Attention to every token of the remembered frames."""

    def __init__(self, width: int) -> None:
        """Build with the published names."""
        super().__init__()
        self.projection = nn.Linear(width, width)

    def forward(self, query: Tensor, memory: Entry) -> Tensor:
        """Return (B, N, C)."""
        return self.projection(_attend(query, memory.key, memory.value))


class ShortTermAttention(nn.Module):
    """Attention to a window of the frame before, with relative terms of keys and values."""

    def __init__(self, width: int) -> None:
        """Build with the published names."""
        super().__init__()
        depth = width // HEADS
        self.relative_emb_k = nn.Conv2d(width, HEADS * WINDOW**2, 1, groups=HEADS)
        self.relative_emb_v = nn.Parameter(torch.zeros(HEADS, depth, WINDOW**2))
        nn.init.orthogonal_(self.relative_emb_v.view(width, -1))
        self.projection = nn.Linear(width, width)

    def forward(self, query: Tensor, memory: Entry, grid: Grid) -> Tensor:
        """Return (B, N, C)."""
        split = _split(query)
        table = self.relative_emb_k.weight.view(HEADS, WINDOW**2, -1)
        offsets = self.relative_emb_k.bias
        assert offsets is not None
        bias = split @ table.transpose(1, 2) + offsets.view(HEADS, 1, -1)
        scaled = split * split.shape[-1] ** -0.5
        heads = (scaled, _split(memory.key), _split(memory.value), bias)
        query, key, value, bias = (t.flatten(0, 1) for t in heads)
        out, weights = local_attention(query, key, value, bias, grid)
        out = out.view_as(split)
        weights = weights.view(*split.shape[:3], -1)
        return self.projection(_join(out + weights @ self.relative_emb_v.transpose(1, 2)))


class GridActivation(nn.Module):
    """Group norm over the frame, GELU and a depthwise convolution."""

    def __init__(self, channels: int) -> None:
        """Use 32 groups."""
        super().__init__()
        self.gn = nn.GroupNorm(32, channels)
        self.conv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Activate (B, N, C) tokens."""
        maps = tokens.transpose(1, 2).unflatten(2, grid)
        return self.conv(F.gelu(self.gn(maps))).flatten(2).transpose(1, 2)


class IdTransformerBlock(nn.Module):
    """One block of AOT."""

    def __init__(self, width: int) -> None:
        """Build with the published names."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = SelfAttention(width)
        self.norm2 = nn.LayerNorm(width)
        self.linear_Q = nn.Linear(width, width)
        self.linear_V = nn.Linear(width, width)
        self.long_term_attn = LongTermAttention(width)
        self.short_term_attn = ShortTermAttention(width)
        self.norm3 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.activation = GridActivation(4 * width)
        self.linear2 = nn.Linear(4 * width, width)

    def project(self, state: State, grid: Grid) -> tuple[State, RawEntry]:
        """Attend within the frame; return the tokens, and what to match them with."""
        (x,) = state
        x = x + self.self_attn(self.norm1(x), sine_positions(grid, x.shape[-1], x.device))
        content = self.norm2(x)
        return (x,), RawEntry(self.linear_Q(content), content)

    def remember(self, current: RawEntry, embedding: Tensor) -> Entry:
        """Return the memory of a frame whose identities (B, N, C) are known."""
        return Entry(current.key, self.linear_V(current.content + embedding))

    def forward(
        self, state: State, current: RawEntry, memories: tuple[Entry, Entry], grid: Grid
    ) -> State:
        """Propagate from the long-term and the short-term memory."""
        long, short = memories
        (x,) = state
        x = x + self.long_term_attn(current.key, long)
        x = x + self.short_term_attn(current.key, short, grid)
        return (x + self.linear2(self.activation(self.linear1(self.norm3(x)), grid)),)


def sine_positions(grid: Grid, width: int, device: torch.device) -> Tensor:
    """Return (N, width) position encodings: rows first; sine on even, cosine on odd features."""
    half = width // 2
    rate = 10000 ** (2 * (torch.arange(half, device=device) // 2) / half)
    parts = []
    for side in grid:
        place = torch.arange(side, device=device) / (side - 1 + 1e-6) * 2 * torch.pi
        angle = place[:, None] / rate
        parts.append(torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], -1).flatten(1))
    rows, columns = parts
    height, columns_number = grid
    both = [rows[:, None].expand(-1, columns_number, -1), columns[None].expand(height, -1, -1)]
    return torch.cat(both, -1).flatten(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return multi-head attention of (B, N, C) to (B, T, C)."""
    return _join(F.scaled_dot_product_attention(_split(query), _split(key), _split(value)))


def _split(x: Tensor) -> Tensor:
    """Return (B, heads, N, C / heads)."""
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def _join(x: Tensor) -> Tensor:
    """Undo ``_split``."""
    return x.transpose(1, 2).flatten(2)
