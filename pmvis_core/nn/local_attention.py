"""Attention of every pixel to the window around its place in another frame (AOT, section 3.3).

What it works on; the work itself is an operation of ours (`pmvis_core.ops.local_attention`).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pmvis_core import ops
from pmvis_core.ops.local_attention import Grid

__all__ = ["WINDOW", "Entry", "Grid", "local_attention"]

WINDOW = 15
"""Side of the published windows, in tokens."""


class Entry(NamedTuple):
    """What a block of propagation remembers of frames whose masks are known."""

    key: Tensor
    """(B, T, K)."""
    value: Tensor
    """(B, T, V)."""


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Attend to the keys of a square window; places outside the frame have no weight.

    Args:
        query: (B, N, D) with N = h * w row by row, already scaled.
        key: (B, N, D).
        value: (B, N, E).
        bias: (B, N, side^2) added to the logits, by the key's row, then column, of the window.
        grid: (h, w).

    Returns:
        (B, N, E) weighted sums of the values, and (B, N, side^2) weights, both of their type.
    """
    attended, weights = ops.local_attention(query, key, value, bias, grid)
    return attended, weights.to(value.dtype)
