"""DeAOT's gated propagation module: two branches that share one attention (Yang and Yang, 2022).

"Decoupling Features in Hierarchical Propagation for Video Object Segmentation", section 4. A visual
branch x and an identity branch y of a frame are updated by what the reference frames (long-term),
the frame before (short-term, in a window) and the frame itself hold; attention is computed once,
from the visual branch, and its one head carries the values of both. Parameter names are those of
the published checkpoints. Tokens are (B, N, C), N = h * w row by row.

Notable: keys are the queries; values pass SiLU; the relative term reads the unscaled query; the
first block has no identities yet, and its identity gate is one; no position encoding anywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from pmvis_core.nn.attention import attend
from pmvis_core.nn.local_attention import WINDOW, Entry, Grid, local_attention

State = tuple[Tensor, Tensor]
"""Visual and identity tokens of a frame, (B, N, C) each."""


class Current(NamedTuple):
    """What a block derives from a frame before its mask is known."""

    key: Tensor
    """(B, N, K); queries are the same."""
    value: Tensor
    """(B, N, V)."""
    identity: Tensor | None
    """(B, N, C) normalised identity tokens, None in the first block."""
    gate: Tensor
    """(B, N, V + W) that multiplies what is attended to."""


class GatedOutput(nn.Module):
    """Gate attended values, mix them in space channel by channel, and project."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        """Use a 5x5 depthwise convolution."""
        super().__init__()
        self.dw_conv = DepthwiseConv(inputs, dropout)
        self.projection = nn.Linear(inputs, outputs)

    def finish(self, attended: Tensor, gate: Tensor, grid: Grid) -> Tensor:
        """Return (B, N, outputs) of attended values and gate, both (B, N, inputs)."""
        return self.projection(self.dw_conv(attended * gate, grid))


class DepthwiseConv(nn.Module):
    """A 5x5 convolution of each channel of a token map, and 2-d dropout."""

    def __init__(self, channels: int, dropout: float) -> None:
        """Keep the size; there is no bias."""
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Convolve (B, N, C) tokens on their grid."""
        maps = tokens.transpose(1, 2).unflatten(2, grid)
        return self.dropout(self.conv(maps)).flatten(2).transpose(1, 2)


class ShortTerm(GatedOutput):
    """Short-term propagation: attention to a window of the frame before."""

    def __init__(self, keys: int, inputs: int, outputs: int, dropout: float) -> None:
        """Add the relative term, a projection of the query."""
        super().__init__(inputs, outputs, dropout)
        self.relative_emb_k = nn.Conv2d(keys, WINDOW**2, 1)

    def forward(self, query: Tensor, memory: Entry, gate: Tensor, grid: Grid) -> Tensor:
        """Return (B, N, outputs)."""
        bias = F.linear(query, self.relative_emb_k.weight.flatten(1), self.relative_emb_k.bias)
        scaled = query * query.shape[-1] ** -0.5
        attended, _ = local_attention(scaled, memory.key, memory.value, bias, grid)
        return self.finish(attended, gate, grid)


class LongTerm(GatedOutput):
    """Long-term propagation: attention to every token of the remembered frames."""

    def forward(self, query: Tensor, memory: Entry, gate: Tensor, grid: Grid) -> Tensor:
        """Return (B, N, outputs)."""
        attended = attend(query, memory.key, memory.value)
        return self.finish(attended, gate, grid)


class SelfPropagation(GatedOutput):
    """Propagation within the frame, from both branches at once."""

    def __init__(self, width: int, keys: int, expanded: int, dropout: float) -> None:
        """Project each branch on its own to values and gates."""
        super().__init__(2 * expanded, 2 * width, dropout)
        self.linear_QK = nn.Linear(2 * width, keys)
        self.linear_V1 = nn.Linear(width, expanded)
        self.linear_V2 = nn.Linear(width, expanded)
        self.linear_U1 = nn.Linear(width, expanded)
        self.linear_U2 = nn.Linear(width, expanded)

    def forward(self, visual: Tensor, identity: Tensor, grid: Grid) -> Tensor:
        """Return (B, N, 2 C) of both normalised branches, each (B, N, C)."""
        query = self.linear_QK(torch.cat([visual, identity], -1))
        value = F.silu(torch.cat([self.linear_V1(visual), self.linear_V2(identity)], -1))
        gate = F.silu(torch.cat([self.linear_U1(visual), self.linear_U2(identity)], -1))
        attended = attend(query, query, value)
        return self.finish(attended, gate, grid)


class GatedPropagationBlock(nn.Module):
    """One block of DeAOT."""

    def __init__(self, width: int, *, first: bool, dropout: float, drop_path: float) -> None:
        """Build with the published names.

        Args:
            width: channels of each branch.
            first: no identity tokens come in yet.
            dropout: rate of the 2-d dropout in the gated outputs.
            drop_path: rate at which the propagation within the frame is left out in training.
        """
        super().__init__()
        self.keys, self.expanded = width // 2, 2 * width
        self.norm1 = nn.LayerNorm(width)
        self.linear_QV = nn.Linear(width, self.keys + self.expanded)
        self.linear_U = nn.Linear(width, self.expanded)
        self.linear_ID_V = nn.Linear(width if first else 2 * width, self.expanded)
        self.id_norm1 = None if first else nn.LayerNorm(width)
        self.linear_ID_U = None if first else nn.Linear(width, self.expanded)
        both = 2 * self.expanded
        self.long_term_attn = LongTerm(both, 2 * width, dropout)
        self.short_term_attn = ShortTerm(self.keys, both, 2 * width, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.id_norm2 = nn.LayerNorm(width)
        self.self_attn = SelfPropagation(width, self.keys, self.expanded, dropout)
        self.drop_path = StochasticDepth(drop_path, "row")

    def project(self, state: State, grid: Grid) -> tuple[State, Current]:
        """Return the tokens as they came, and what the frame gives before its mask is known."""
        visual, identity = state
        normed = self.norm1(visual)
        key, value = self.linear_QV(normed).split([self.keys, self.expanded], -1)
        gate = self.linear_U(normed)
        if self.id_norm1 is None or self.linear_ID_U is None:
            gates = torch.cat([F.silu(gate), torch.ones_like(gate)], -1)
            return state, Current(key, F.silu(value), None, gates)
        context = self.id_norm1(identity)
        gates = F.silu(torch.cat([gate, self.linear_ID_U(context)], -1))
        return state, Current(key, F.silu(value), context, gates)

    def remember(self, current: Current, embedding: Tensor) -> Entry:
        """Return the memory of a frame whose identities are known.

        Args:
            current: from ``project``.
            embedding: (B, N, C) of its identities.
        """
        known = [embedding] if current.identity is None else [current.identity, embedding]
        identity = F.silu(self.linear_ID_V(torch.cat(known, -1)))
        return Entry(current.key, torch.cat([current.value, identity], -1))

    def forward(
        self, state: State, current: Current, memories: tuple[Entry, Entry], grid: Grid
    ) -> State:
        """Propagate from the long-term and the short-term memory, then within the frame."""
        long, short = memories
        change = self.long_term_attn(current.key, long, current.gate, grid)
        change = change + self.short_term_attn(current.key, short, current.gate, grid)
        visual, identity = _add(state, change)
        within = self.self_attn(self.norm2(visual), self.id_norm2(identity), grid)
        return _add((visual, identity), self.drop_path(within))


def _add(state: State, change: Tensor) -> State:
    """Add each half of (B, N, 2 C) to its branch."""
    first, second = change.chunk(2, -1)
    return state[0] + first, state[1] + second
