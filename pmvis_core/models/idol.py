"""IDOL: an online video instance segmenter on deformable DETR (Wu et al., 2022).

One frame in; for each query come out class logits, a box, a mask (through a dynamic head) and an
embedding that tells it apart from the other objects of the video. Frames are independent: time
enters through contrastive training and through the tracker (``pmvis_core/association.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmvis_core.config import ModelConfig
from pmvis_core.data.samples import ImageBatch
from pmvis_core.nn.backbones import build_backbone
from pmvis_core.nn.base import Backbone
from pmvis_core.nn.dynamic_mask import PARAMETERS, MaskBranch, dynamic_masks
from pmvis_core.nn.transformer import (
    MLP,
    DecoderStates,
    DeformableTransformer,
    Memory,
    SinePosition,
    TransformerShape,
)

REID_LAYERS = 3


class IDOL(nn.Module):
    """Backbone, deformable transformer, and heads for class, box, mask and re-identification."""

    def __init__(self, backbone: Backbone, config: ModelConfig, classes: int) -> None:
        """Assemble the network.

        Args:
            backbone: gives maps at strides 8, 16 and 32.
            config: sizes of everything behind it.
            classes: K, without a background class.
        """
        super().__init__()
        dim = config.hidden_dim
        self.config = config
        self.backbone = backbone
        self.input_proj = _input_projections(backbone.channels, dim, config.levels)
        self.position = SinePosition(dim)
        self.transformer = DeformableTransformer(
            TransformerShape(
                dim,
                config.levels,
                config.heads,
                config.points,
                config.feedforward_dim,
                config.dropout,
                config.encoder_layers,
                config.decoder_layers,
            )
        )
        self.query_embed = nn.Embedding(config.queries, 2 * dim)
        self.class_embed = nn.ModuleList(
            nn.Linear(dim, classes) for _ in range(config.decoder_layers)
        )
        self.bbox_embed = nn.ModuleList(
            MLP((dim, dim, dim, 4)) for _ in range(config.decoder_layers)
        )
        self.controller = MLP((dim, dim, dim, PARAMETERS))
        self.mask_head = MaskBranch(dim)
        self.reid_embed_head = MLP((*(dim,) * REID_LAYERS, config.reid_dim))
        self._initialise()

    def _initialise(self) -> None:
        """Set the published initial values, or the preset's."""
        prior = self.config.class_prior
        for head in self.class_embed:
            nn.init.constant_(cast(nn.Linear, head).bias, -math.log((1 - prior) / prior))
        box_layers = [cast(MLP, head).last for head in self.bbox_embed]
        for layer in box_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        box_layers[0].bias.data[2:] = self.config.initial_box_logit
        for parameter in self.controller.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
        if self.config.query_grid:
            self._spread_queries(*self.config.query_grid)

    def _spread_queries(self, rows: int, columns: int) -> None:
        """Start the queries' reference points on a grid instead of at random places.

        The first two entries of a query's position hold the logits of its point and the
        reference layer selects them, so that both stay free to learn.
        """
        y = (torch.arange(rows) + 0.5) / rows
        x = (torch.arange(columns) + 0.5) / columns
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).flatten(0, 1)
        with torch.no_grad():
            self.query_embed.weight[:, :2] = torch.logit(grid)
            self.transformer.reference_points.weight.copy_(torch.eye(2, self.config.hidden_dim))

    def forward(self, images: ImageBatch, masked: int | None = None) -> IdolPredictions:
        """Predict for every frame of a batch; masks for the first ``masked`` of them, or all."""
        return self.decode(self.encode(images, masked))

    def encode(self, images: ImageBatch, masked: int | None = None) -> Encoded:
        """Turn pixels into tokens that know their surroundings, and into mask features.

        Args:
            images: B frames.
            masked: how many of the first get mask features; None: all.
        """
        maps, paddings = self._project(images)
        memory = Memory.of(paddings, images.padded)
        positions = [self.position(padding, memory.any_padding) for padding in paddings]
        tokens = self.transformer.encode(maps, positions, memory)
        mask_features = self.mask_head(_unflatten(tokens[:masked], memory.shapes[:3]))
        return Encoded(tokens, memory, mask_features, images.sizes)

    def decode(self, encoded: Encoded) -> IdolPredictions:
        """Let the queries look at the tokens, and read off what each has found."""
        decoded = self.transformer.decode(
            self.query_embed.weight, encoded.tokens, encoded.memory, self.bbox_embed
        )
        logits = torch.stack(
            [head(state) for head, state in zip(self.class_embed, decoded.states, strict=True)]
        )
        return IdolPredictions(
            logits=logits,
            boxes=decoded.boxes,
            embeddings=self.reid_embed_head(decoded.states[-1]),
            sizes=encoded.sizes,
            decoded=decoded,
            mask_features=encoded.mask_features,
            controller=self.controller,
            coordinate_unit_px=self.config.mask_coordinate_unit_px,
        )

    def _project(self, images: ImageBatch) -> tuple[list[Tensor], list[Tensor]]:
        """Return the levels' (B, D, H_l, W_l) maps and (B, H_l, W_l) padding masks."""
        features = self.backbone(images.tensor)
        maps = [
            projection(feature)
            for projection, feature in zip(self.input_proj, features, strict=False)
        ]
        paddings = [_resize_padding(images.padding, m) for m in maps]
        x = features[-1]
        for extra in self.input_proj[len(features) :]:
            x = extra(x)
            maps.append(x)
            # As published: from the stride-8 mask, not from the full one.
            paddings.append(_resize_padding(paddings[0], x))
        return maps, paddings


@dataclass(frozen=True)
class Encoded:
    """A batch of frames as its queries see it."""

    tokens: Tensor
    """(B, S, D) of all levels, one after the other."""
    memory: Memory
    """Their geometry."""
    mask_features: Tensor
    """(B, 8, H/8, W/8) of the padded batch, or of its first frames alone."""
    sizes: Tensor
    """(B, 2) unpadded (height, width)."""


@dataclass(frozen=True)
class IdolPredictions:
    """What the network says of a batch; Ld decoder layers, the last is the answer."""

    logits: Tensor
    """(Ld, B, Q, K) class logits."""
    boxes: Tensor
    """(Ld, B, Q, 4) cxcywh relative to the unpadded image."""
    embeddings: Tensor
    """(B, Q, E) of the last layer, not normalised."""
    sizes: Tensor
    """(B, 2) unpadded (height, width)."""
    decoded: DecoderStates
    """The decoder's states and references."""
    mask_features: Tensor
    """(B, 8, H/8, W/8) of the padded batch, or of its first frames alone."""
    controller: MLP
    """Writes the dynamic parameters of a state."""
    coordinate_unit_px: float
    """Unit of the mask head's relative coordinates."""

    def mask_logits(self, layer: Tensor | int, batch: Tensor, query: Tensor) -> Tensor:
        """Return (N, H/4, W/4) mask logits of chosen queries over the padded frame.

        Args:
            layer: decoder layer of each, (N,) or one for all; negative counts from the end.
            batch: (N,) row in the batch.
            query: (N,) query.
        """
        parameters = self.controller(self.decoded.states[layer, batch, query])
        # The reference before the layer's own refinement, as published.
        xy = self.decoded.references[layer, batch, query]
        centres = xy * self.sizes[batch].flip(-1)
        features = self.mask_features
        features = features[0] if len(self.sizes) == 1 else features[batch]
        return dynamic_masks(features, parameters, centres, self.coordinate_unit_px)

    def in_float32(self) -> IdolPredictions:
        """Return the same with every half-precision tensor widened."""
        states, boxes, references = (
            x.float() for x in (self.decoded.states, self.decoded.boxes, self.decoded.references)
        )
        return replace(
            self,
            logits=self.logits.float(),
            boxes=self.boxes.float(),
            embeddings=self.embeddings.float(),
            decoded=DecoderStates(states, boxes, references),
            mask_features=self.mask_features.float(),
        )

    def rows(self, start: int, stop: int) -> IdolPredictions:
        """Return the predictions of some frames of the batch."""
        part = slice(start, stop)
        decoded = self.decoded
        return IdolPredictions(
            self.logits[:, part],
            self.boxes[:, part],
            self.embeddings[part],
            self.sizes[part],
            DecoderStates(
                decoded.states[:, part], decoded.boxes[:, part], decoded.references[:, part]
            ),
            self.mask_features[part],
            self.controller,
            self.coordinate_unit_px,
        )


def build_idol(config: ModelConfig, classes: int) -> IDOL:
    """Build IDOL with its backbone from a config.

    Raises:
        UsageError: its sizes do not fit each other.
    """
    config.check()
    return IDOL(build_backbone(config.backbone), config, classes)


def _input_projections(channels: tuple[int, ...], dim: int, levels: int) -> nn.ModuleList:
    """Build a 1x1 projection a map, and 3x3 stride-2 ones of raw maps for further levels."""
    layers = [nn.Conv2d(inputs, dim, 1) for inputs in channels]
    inputs = channels[-1]
    for _ in range(levels - len(channels)):
        layers.append(nn.Conv2d(inputs, dim, 3, 2, 1))
        inputs = dim
    for layer in layers:
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
    groups = min(32, dim // 8)
    return nn.ModuleList(nn.Sequential(layer, nn.GroupNorm(groups, dim)) for layer in layers)


def _resize_padding(padding: Tensor, like: Tensor) -> Tensor:
    """Resize a (B, H, W) bool mask to a map's size by nearest neighbour."""
    return F.interpolate(padding[:, None].float(), size=like.shape[-2:])[:, 0].bool()


def _unflatten(tokens: Tensor, shapes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Return the first levels of (B, S, D) tokens as (B, D, H_l, W_l) maps."""
    sizes = [h * w for h, w in shapes]
    parts = tokens[:, : sum(sizes)].split(sizes, 1)
    return [p.transpose(1, 2).unflatten(2, hw) for p, hw in zip(parts, shapes, strict=True)]
