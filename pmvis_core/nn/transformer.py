"""Deformable DETR's transformer (Zhu et al., 2021): positions, attention, encoder, decoder.

Names of parameters are the published ones. Notable: in a decoder layer ``norm2`` follows
self-attention and ``norm1`` cross-attention; a query embedding's first half is its position, its
second half its first content; references are relative to the unpadded image and scaled by the
valid ratio of each level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmvis_core.nn.dropout import Dropout
from pmvis_core.ops import fused_deformable_attention

TEMPERATURE = 10000


class SinePosition(nn.Module):
    """Sine encoding of pixel positions, normalised to 2 pi over the unpadded area."""

    def __init__(self, dim: int) -> None:
        """Give half of ``dim`` to y and half to x."""
        super().__init__()
        self.axis_dim = dim // 2

    def forward(self, padding: Tensor, any_padding: bool) -> Tensor:
        """Return (B, dim, H, W) encodings, y before x.

        Args:
            padding: (B, H, W) bool mask.
            any_padding: whether the batch has any; without it, all frames share one encoding.
        """
        if any_padding:
            return sine_encoding(padding, self.axis_dim)
        height, width = padding.shape[1:]
        shared = _unpadded_encoding(height, width, self.axis_dim, padding.device)
        return shared.expand(len(padding), -1, -1, -1)


def sine_encoding(padding: Tensor, axis_dim: int) -> Tensor:
    """Encode a (B, H, W) padding mask as (B, 2 axis_dim, H, W)."""
    inside = (~padding).float()
    y, x = inside.cumsum(1), inside.cumsum(2)
    y = (y - 0.5) / (y[:, -1:] + 1e-6) * 2 * math.pi
    x = (x - 0.5) / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    exponent = torch.arange(axis_dim, device=padding.device) // 2 * 2 / axis_dim
    angles = torch.stack((y, x), dim=1)[..., None] / TEMPERATURE**exponent
    waves = torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1)
    return waves.flatten(-2).permute(0, 1, 4, 2, 3).flatten(1, 2)


@lru_cache(maxsize=8)
def _unpadded_encoding(height: int, width: int, axis_dim: int, device: torch.device) -> Tensor:
    """Return the (1, 2 axis_dim, H, W) encoding of a frame without padding."""
    with torch.inference_mode(False):
        empty = torch.zeros(1, height, width, dtype=torch.bool, device=device)
        return sine_encoding(empty, axis_dim)


class MultiScaleDeformableAttention(nn.Module):
    """Each query looks at a few sampled points on every level."""

    def __init__(self, dim: int, levels: int, heads: int, points: int) -> None:
        """Initialise offsets to ``heads`` directions at distances 1..points."""
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the published initial values."""
        theta = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack((theta.cos(), theta.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)[:, None]
        grid = direction[:, None, None] * steps
        grid = grid.expand(self.heads, self.levels, self.points, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.data = grid.flatten().clone()
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, references: Tensor, memory: Memory, values: Tensor) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, D) with positions added.
            references: (B, Q, L, 2) xy, around which offsets are pixels of their level, or
                (B, Q, L, 4) cxcywh, where the farthest of P points reaches half a side; per level,
                in [0, 1] of the padded map.
            memory: geometry of the levels.
            values: (B, S, D) what is sampled.

        Returns:
            (B, Q, D).
        """
        shape = (*query.shape[:2], self.heads, self.levels, self.points)
        out = fused_deformable_attention(
            self.value_proj(values).unflatten(-1, (self.heads, -1)),
            memory.shapes,
            references,
            self.sampling_offsets(query).view(*shape, 2),
            self.attention_weights(query).view(shape),
            memory.padding if memory.any_padding else None,
        )
        return self.output_proj(out)


@dataclass(frozen=True)
class Memory:
    """Geometry of the flattened feature levels."""

    shapes: tuple[tuple[int, int], ...]
    """(height, width) of each level."""
    padding: Tensor
    """(B, S) bool, True on padding."""
    any_padding: bool
    """Whether any of it is True."""
    valid_ratios: Tensor
    """(B, L, 2) share of each level that is not padding, as (x, y)."""
    wh: Tensor
    """(L, 2) float, (width, height) of each level."""

    @classmethod
    def of(cls, paddings: Sequence[Tensor], any_padding: bool) -> Memory:
        """Collect (B, H_l, W_l) padding masks."""
        shapes = tuple((int(p.shape[1]), int(p.shape[2])) for p in paddings)
        ratios = [
            torch.stack(((~p[:, 0]).float().mean(1), (~p[:, :, 0]).float().mean(1)), -1)
            for p in paddings
        ]
        flat = torch.cat([p.flatten(1) for p in paddings], 1)
        wh = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32, device=flat.device)
        return cls(shapes, flat, any_padding, torch.stack(ratios, 1), wh)

    def pixel_centres(self) -> Tensor:
        """Return (B, S, L, 2) xy of every position, on every level, in [0, 1] of the padded map."""
        device = self.wh.device
        points = []
        for level, (height, width) in enumerate(self.shapes):
            y = torch.arange(height, device=device) + 0.5
            x = torch.arange(width, device=device) + 0.5
            grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).flatten(0, 1)
            points.append(grid[None] / (self.valid_ratios[:, None, level] * self.wh[level]))
        return torch.cat(points, 1)[:, :, None] * self.valid_ratios[:, None]


class EncoderLayer(nn.Module):
    """Deformable self-attention over all levels and a feed-forward network, post-norm."""

    def __init__(
        self, dim: int, levels: int, heads: int, points: int, hidden: int, dropout: float
    ) -> None:
        """Build with the published names."""
        super().__init__()
        self.self_attn = MultiScaleDeformableAttention(dim, levels, heads, points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, references: Tensor, memory: Memory) -> Tensor:
        """Transform (B, S, D) features, each at its own place in references (B, S, L, 2)."""
        attended = self.self_attn(x + position, references, memory, x)
        x = self.norm1(self.dropout.add(x, attended))
        hidden = self.linear2(self.dropout(F.relu(self.linear1(x), inplace=True)))
        return self.norm2(self.dropout.add(x, hidden))


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable cross-attention, feed-forward, post-norm."""

    def __init__(
        self, dim: int, levels: int, heads: int, points: int, hidden: int, dropout: float
    ) -> None:
        """Build with the published names."""
        super().__init__()
        self.cross_attn = MultiScaleDeformableAttention(dim, levels, heads, points)
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, position: Tensor, references: Tensor, memory: Memory, values: Tensor
    ) -> Tensor:
        """Transform (B, Q, D) queries that look at (B, S, D) values around references."""
        query = x + position
        attended = self.self_attn(query, query, x, need_weights=False)[0]
        x = self.norm2(self.dropout.add(x, attended))
        attended = self.cross_attn(x + position, references, memory, values)
        x = self.norm1(self.dropout.add(x, attended))
        hidden = self.linear2(self.dropout(F.relu(self.linear1(x), inplace=True)))
        return self.norm3(self.dropout.add(x, hidden))


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, dims: Sequence[int]) -> None:
        """Build ``len(dims) - 1`` layers."""
        super().__init__()
        self.layers = nn.ModuleList(map(nn.Linear, dims[:-1], dims[1:]))

    @property
    def last(self) -> nn.Linear:
        """Return the output layer."""
        return cast(nn.Linear, self.layers[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return the last layer's output, without an activation."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x), inplace=True)
        return self.layers[-1](x)


class LayerStack(nn.Module):
    """Layers under the published name ``layers``."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Keep the layers in order."""
        super().__init__()
        self.layers = nn.ModuleList(layers)


@dataclass(frozen=True)
class TransformerShape:
    """The numbers of a deformable transformer."""

    dim: int
    levels: int
    heads: int
    points: int
    hidden: int
    dropout: float
    encoder_layers: int
    decoder_layers: int


class DeformableTransformer(nn.Module):
    """Encoder over feature levels and decoder of queries with iterative box refinement."""

    def __init__(self, shape: TransformerShape) -> None:
        """Build with the published names and initial values."""
        super().__init__()
        sizes = (shape.dim, shape.levels, shape.heads, shape.points, shape.hidden, shape.dropout)
        self.level_embed = nn.Parameter(torch.empty(shape.levels, shape.dim))
        self.encoder = LayerStack([EncoderLayer(*sizes) for _ in range(shape.encoder_layers)])
        self.decoder = LayerStack([DecoderLayer(*sizes) for _ in range(shape.decoder_layers)])
        self.reference_points = nn.Linear(shape.dim, 2)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MultiScaleDeformableAttention):
                module.reset_parameters()
        nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)

    def encode(self, maps: Sequence[Tensor], positions: Sequence[Tensor], memory: Memory) -> Tensor:
        """Return (B, S, D) encoded features of (B, D, H_l, W_l) maps, level after level."""
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        embedded = [
            p.flatten(2).transpose(1, 2) + self.level_embed[level]
            for level, p in enumerate(positions)
        ]
        position = torch.cat(embedded, 1)
        places = memory.pixel_centres()
        for layer in self.encoder.layers:
            x = layer(x, position, places, memory)
        return x

    def decode(
        self, queries: Tensor, values: Tensor, memory: Memory, box_heads: nn.ModuleList
    ) -> DecoderStates:
        """Run the decoder.

        Args:
            queries: (Q, 2 D) query embeddings: position, then content.
            values: (B, S, D) encoded features.
            memory: their geometry.
            box_heads: one box head a layer, which refine the references.
        """
        batch = values.shape[0]
        position, x = (half.expand(batch, -1, -1) for half in queries.chunk(2, dim=-1))
        reference = self.reference_points(position).sigmoid()
        states, boxes, references = [], [], []
        for layer, head in zip(self.decoder.layers, box_heads, strict=True):
            ratios = memory.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)
            scaled = reference[:, :, None] * ratios[:, None]
            x = layer(x, position, scaled, memory, values)
            box = refine_box(head(x), reference)
            states.append(x)
            boxes.append(box)
            references.append(reference[..., :2])
            reference = box.detach()
        return DecoderStates(torch.stack(states), torch.stack(boxes), torch.stack(references))


@dataclass(frozen=True)
class DecoderStates:
    """What each decoder layer leaves; Ld is the number of layers."""

    states: Tensor
    """(Ld, B, Q, D) query states."""
    boxes: Tensor
    """(Ld, B, Q, 4) refined boxes, cxcywh relative to the unpadded image."""
    references: Tensor
    """(Ld, B, Q, 2) xy centres that each layer started from, relative to the unpadded image."""


def refine_box(delta: Tensor, reference: Tensor) -> Tensor:
    """Add (..., 4) deltas to a (..., 2) or (..., 4) reference in logit space."""
    logit = inverse_sigmoid(reference)
    if reference.shape[-1] == 2:
        logit = F.pad(logit, (0, 2))
    return (delta + logit).sigmoid()


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the logit of x in [0, 1], each side clamped at ``eps``."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
