"""Attention of every pixel to the window around its place in another frame (AOT, section 3.3).

Nothing of size pixels x window x channels is ever made: the keys of all windows of a row of queries
are one stretch of memory, so each row is one matrix product, of which the band is kept.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 15
"""Side of the published windows, in tokens."""
Grid = tuple[int, int]
"""(h, w) of a map whose tokens lie row by row."""


class Entry(NamedTuple):
    """What a block of propagation remembers of frames whose masks are known."""

    key: Tensor
    """(B, T, K)."""
    value: Tensor
    """(B, T, V)."""


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Attend to the keys of a square window; places outside the frame have no weight.

    Args:
        query: (B, N, D) with N = h * w row by row, already scaled.
        key: (B, N, D).
        value: (B, N, E).
        bias: (B, N, side^2) added to the logits, by the key's row, then column, of the window.
        grid: (h, w).

    Returns:
        (B, N, E) weighted sums of the values, and (B, N, side^2) weights.
    """
    height, width = grid
    side = round(bias.shape[-1] ** 0.5)
    place, inside = _band(height, width, side, query.device)
    place = place.expand(len(query), -1, -1)
    logits = _by_rows(query, _windows(key, grid, side), grid, transposed=True)
    weights = (logits.gather(-1, place) + bias).masked_fill(~inside, float("-inf")).softmax(-1)
    spread = torch.zeros_like(logits).scatter_add(-1, place, weights)
    return _by_rows(spread, _windows(value, grid, side), grid, transposed=False), weights


def _by_rows(
    x: Tensor, windows: list[Tensor], grid: tuple[int, int], *, transposed: bool
) -> Tensor:
    """Multiply the rows of (B, N, K) maps with the matrices of their windows."""
    rows = [
        item.view(*grid, -1) @ (matrices.transpose(1, 2) if transposed else matrices)
        for item, matrices in zip(x, windows, strict=True)
    ]
    return torch.stack(rows).flatten(1, 2)


def _windows(x: Tensor, grid: tuple[int, int], side: int) -> list[Tensor]:
    """Return B of (h, side * w, C): for each row the rows around it, as overlapping views."""
    height, width = grid
    channels, around = x.shape[-1], side // 2
    padded = F.pad(x.reshape(len(x), height, width * channels), (0, 0, around, around))
    shape, strides = (height, side * width, channels), (width * channels, channels, 1)
    return [item.as_strided(shape, strides, item.storage_offset()) for item in padded]


@functools.lru_cache(maxsize=8)
def _band(height: int, width: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (N, side^2) places of a window's keys in its row's stretch, and whether they exist."""
    offset = torch.arange(side, device=device)
    rows = torch.arange(height, device=device)[:, None] + offset - side // 2
    columns = torch.arange(width, device=device)[:, None] + offset - side // 2
    row_there = (rows >= 0) & (rows < height)
    column_there = (columns >= 0) & (columns < width)
    inside = row_there[:, None, :, None] & column_there[None, :, None, :]
    place = offset[:, None] * width + columns.clamp(0, width - 1)[:, None, :]
    place = place.expand(height, -1, -1, -1)
    return place.reshape(-1, side * side), inside.reshape(-1, side * side)
