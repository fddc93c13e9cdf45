"""AOT and DeAOT: masks of several objects, carried from reference frames through a video.

Yang et al., "Associating Objects with Transformers" (2021); Yang and Yang, "Decoupling Features in
Hierarchical Propagation" (2022). An identification embedding marks up to ten objects at once;
blocks of attention carry it from remembered frames to the next; a small FPN decodes it to logits.

    network = build_deaot("r50_deaotl").eval()
    features = network.encode(image)
    memory = network.refer(features, one_hot)                # of the frame whose mask is given
    logits, current = network.track(later, memory, memory)   # (B, 11, h, w) at stride 4
    short = network.remember(current, one_hot_of_the_result)

Parameter names are those of the published checkpoints. Notable: the background is an identity too;
the last map of the encoder is propagated, its stride 16 map is a shortcut of the decoder; group
norms look at the whole frame, so frames must not be padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmvis_core.nn.gated_propagation import GatedPropagationBlock
from pmvis_core.nn.id_transformer import IdTransformerBlock
from pmvis_core.nn.local_attention import Entry
from pmvis_core.nn.vos_encoders import ENCODERS

WIDTH = 256
IDENTITIES = 10
"""Objects that one pass carries; the background is one identity more."""
STRIDE_PX = 16
UNUSED = -1e10
UNUSED_HALF = -1e4
"""Logits of an identity that no object has, in float32 and in half precision."""


@dataclass(frozen=True)
class Variant:
    """One published configuration."""

    encoder: str
    """Key of ``ENCODERS``."""
    blocks: int
    """Number of propagation blocks."""
    memory_gap: int
    """Frames between two entries of the long-term memory, 9999 for the reference alone."""
    decoupled: bool = True
    """DeAOT rather than AOT."""
    align_corners: bool = True
    """Sides are 16 k + 1 pixels and corners coincide in all resizing; else 16 k."""


_ONLY_REFERENCE = 9999
VARIANTS = {
    "deaott": Variant("mobilenet_v2", 1, _ONLY_REFERENCE),
    "deaots": Variant("mobilenet_v2", 2, _ONLY_REFERENCE),
    "deaotb": Variant("mobilenet_v2", 3, _ONLY_REFERENCE),
    "deaotl": Variant("mobilenet_v2", 3, 5),
    "r50_deaotl": Variant("resnet50", 3, 5),
    "swinb_deaotl": Variant("swin_b", 3, 5, align_corners=False),
    "aott": Variant("mobilenet_v2", 1, _ONLY_REFERENCE, decoupled=False),
    "aots": Variant("mobilenet_v2", 2, _ONLY_REFERENCE, decoupled=False),
    "aotb": Variant("mobilenet_v2", 3, _ONLY_REFERENCE, decoupled=False),
    "aotl": Variant("mobilenet_v2", 3, 5, decoupled=False),
    "r50_aotl": Variant("resnet50", 3, 5, decoupled=False),
    "r101_aotl": Variant("resnet101", 3, 5, decoupled=False),
    "swinb_aotl": Variant("swin_b", 3, 5, decoupled=False, align_corners=False),
}
"""The published variants by the names of their checkpoints."""


class Features(NamedTuple):
    """What the encoder gives for a frame; no object plays a part in it."""

    shortcuts: tuple[Tensor, Tensor, Tensor]
    """What the decoder adds: (B, C_l, h_l, w_l) at strides 4, 8 and 16; C is 128, 256 and 256."""
    tokens: Tensor
    """(B, N, 256) projected last map, row by row."""
    grid: tuple[int, int]
    """(h, w) of the tokens."""


Memory = list[Entry]
"""What each block remembers."""


class DeAOT(nn.Module):
    """The network: encoder, identification bank, propagation, decoder."""

    def __init__(self, variant: Variant, dropout: float = 0.1, drop_path: float = 0.1) -> None:
        """Build a variant; the rates matter in training only."""
        super().__init__()
        self.variant = variant
        build, channels = ENCODERS[variant.encoder]
        self.encoder = build()
        self.encoder_projector = nn.Conv2d(channels[-1], WIDTH, 1)
        self.LSTT: GatedPropagation | IdTransformer
        if variant.decoupled:
            self.LSTT = GatedPropagation(variant.blocks, dropout, drop_path)
        else:
            self.LSTT = IdTransformer(variant.blocks)
        self.decoder = FpnDecoder(self.LSTT.outputs, channels[:3], variant.align_corners)
        kernel = STRIDE_PX + 1 if variant.align_corners else STRIDE_PX
        self.patch_wise_id_bank = nn.Conv2d(
            IDENTITIES + 1, WIDTH, kernel, STRIDE_PX, kernel // 2 if kernel % 2 else 0
        )
        nn.init.orthogonal_(self.patch_wise_id_bank.weight.flatten(1), gain=kernel**-2)
        self.id_norm = nn.LayerNorm(WIDTH) if variant.decoupled else None

    def encode(self, image: Tensor) -> Features:
        """Encode a (B, 3, H, W) image, normalised, whose sides suit the variant."""
        *shortcuts, last = self.encoder(image)
        tokens = self.encoder_projector(last)
        grid = (tokens.shape[2], tokens.shape[3])
        adapted = self.decoder.adapt(shortcuts)
        return Features(adapted, tokens.flatten(2).transpose(1, 2), grid)

    def embed(self, identities: Tensor) -> Tensor:
        """Turn one-hot identities, background first, into (B, N, 256) tokens.

        Args:
            identities: (B, 11, H, W), or fewer where no pixel has the last ones.
        """
        bank = self.patch_wise_id_bank
        weight = bank.weight[:, : identities.shape[1]]
        maps = F.conv2d(identities, weight, bank.bias, STRIDE_PX, bank.padding)
        tokens = maps.flatten(2).transpose(1, 2)
        return tokens if self.id_norm is None else self.id_norm(tokens)

    def refer(self, features: Features, identities: Tensor) -> Memory:
        """Return the memory of a frame whose identities (B, 11, H, W) are given."""
        return self.LSTT.refer(features, self.embed(identities))

    def track(self, features: Features, long: Memory, short: Memory) -> tuple[Tensor, list[Any]]:
        """Find the objects in a frame.

        Args:
            features: of the frame; batch size 1 or that of the memories.
            long: what to remember of the reference frames and of some later ones.
            short: what to remember of the frame before.

        Returns:
            (B, 11, H / 4, W / 4) logits, and what ``remember`` needs once the mask is known.
        """
        tokens, current = self.LSTT.track(features, long, short)
        maps = tokens.transpose(1, 2).unflatten(2, features.grid)
        return self.decoder(maps, features.shortcuts), current

    def remember(self, current: list[Any], identities: Tensor) -> Memory:
        """Return the memory of a tracked frame whose identities (B, 11, H, W) are decided."""
        return self.LSTT.remember(current, self.embed(identities))

    def upsample(self, logits: Tensor, objects: Sequence[int], size: tuple[int, int]) -> Tensor:
        """Bring logits to an output size and silence identities that no object has.

        Args:
            logits: (B, 11, h, w).
            objects: B numbers of objects.
            size: (height, width) in pixels.
        """
        number = torch.tensor(objects, device=logits.device)[:, None, None, None]
        channel = torch.arange(logits.shape[1], device=logits.device)[None, :, None, None]
        silent = torch.where(
            channel > number, UNUSED if logits.dtype == torch.float32 else UNUSED_HALF, logits
        )
        return F.interpolate(
            silent, size=size, mode="bilinear", align_corners=self.variant.align_corners
        )


class Propagation(nn.Module):
    """The blocks between encoder and decoder."""

    def __init__(self, layers: Sequence[nn.Module], norms: Sequence[nn.Module]) -> None:
        """Give the blocks, and what normalises their outputs."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.decoder_norms = nn.ModuleList(norms)

    def start(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return the state before the first block."""
        raise NotImplementedError

    def finish(self, tokens: Tensor, states: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """Return what the decoder reads, of the first tokens and the state after each block."""
        raise NotImplementedError

    def refer(self, features: Features, embedding: Tensor) -> Memory:
        """Match a frame of known identities (B, N, 256) with itself; return its memory."""
        entries: Memory = []

        def of_itself(index: int, current: Any) -> tuple[Entry, Entry]:
            entries.append(self._block(index).remember(current, embedding))
            return entries[-1], entries[-1]

        self._run(features, len(embedding), of_itself)
        return entries

    def track(self, features: Features, long: Memory, short: Memory) -> tuple[Tensor, list[Any]]:
        """Return (B, N, C) for the decoder, and what ``remember`` needs."""
        batch = len(short[0].key)
        states, current = self._run(features, batch, lambda i, _: (long[i], short[i]))
        return self.finish(features.tokens.expand(batch, -1, -1), states), current

    def remember(self, current: list[Any], embedding: Tensor) -> Memory:
        """Return the memory of a frame with its identities' embedding (B, N, 256)."""
        return [self._block(i).remember(known, embedding) for i, known in enumerate(current)]

    def _run(
        self,
        features: Features,
        batch: int,
        memories: Callable[[int, Any], tuple[Entry, Entry]],
    ) -> tuple[list[tuple[Tensor, ...]], list[Any]]:
        """Return the state after each block, and what each derived from the frame."""
        state = self.start(features.tokens.expand(batch, -1, -1))
        states, currents = [], []
        for index in range(len(self.layers)):
            block = self._block(index)
            state, current = block.project(state, features.grid)
            state = block(state, current, memories(index, current), features.grid)
            states.append(state)
            currents.append(current)
        return states, currents

    def _block(self, index: int) -> Any:
        """Return a block."""
        return self.layers[index]


class GatedPropagation(Propagation):
    """DeAOT's blocks; only the output of the last one is normalised and decoded."""

    outputs = 2 * WIDTH

    def __init__(self, blocks: int, dropout: float, drop_path: float) -> None:
        """Build with the published names."""
        layers = [
            GatedPropagationBlock(WIDTH, first=i == 0, dropout=dropout, drop_path=drop_path)
            for i in range(blocks)
        ]
        super().__init__(layers, [HalvesNorm(2 * WIDTH)])

    def start(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Begin without identities."""
        return tokens, torch.zeros_like(tokens)

    def finish(self, tokens: Tensor, states: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """Return (B, N, 512)."""
        return self.decoder_norms[0](torch.cat(states[-1], -1))


class HalvesNorm(nn.Module):
    """Group norm of two groups over all tokens of a frame: each branch by itself."""

    def __init__(self, channels: int) -> None:
        """Build with the published name."""
        super().__init__()
        self.gn = nn.GroupNorm(2, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise (B, N, C)."""
        return self.gn(tokens.transpose(1, 2)).transpose(1, 2)


class IdTransformer(Propagation):
    """AOT's blocks; every output is normalised by itself and decoded, with the frame's tokens."""

    def __init__(self, blocks: int) -> None:
        """Build with the published names."""
        layers = [IdTransformerBlock(WIDTH) for _ in range(blocks)]
        super().__init__(layers, [nn.LayerNorm(WIDTH) for _ in range(blocks)])
        self.outputs = WIDTH * (blocks + 1)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, WIDTH))  # published, never read

    def start(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Begin with the frame's tokens."""
        return (tokens,)

    def finish(self, tokens: Tensor, states: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """Return (B, N, 256 (blocks + 1))."""
        normed = [norm(x) for norm, (x,) in zip(self.decoder_norms, states, strict=True)]
        return torch.cat([tokens, *normed], -1)


class ConvGroupNorm(nn.Module):
    """A convolution with bias, then a group norm of 8 groups."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        """Keep the size."""
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        self.gn = nn.GroupNorm(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, and cut below zero."""
        return F.relu(self.gn(self.conv(x)))


class FpnDecoder(nn.Module):
    """From propagated tokens and the encoder's maps to logits at stride 4."""

    def __init__(self, inputs: int, channels: Sequence[int], align_corners: bool) -> None:
        """Build with the published names; ``channels`` of the maps at strides 4, 8 and 16."""
        super().__init__()
        self.align_corners = align_corners
        self.conv_in = ConvGroupNorm(inputs, WIDTH, 1)
        self.conv_16x = ConvGroupNorm(WIDTH, WIDTH, 3)
        self.conv_8x = ConvGroupNorm(WIDTH, WIDTH // 2, 3)
        self.conv_4x = ConvGroupNorm(WIDTH // 2, WIDTH // 2, 3)
        self.adapter_16x = nn.Conv2d(channels[2], WIDTH, 1)
        self.adapter_8x = nn.Conv2d(channels[1], WIDTH, 1)
        self.adapter_4x = nn.Conv2d(channels[0], WIDTH // 2, 1)
        self.conv_out = nn.Conv2d(WIDTH // 2, IDENTITIES + 1, 1)

    def adapt(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Project the encoder's maps of strides 4, 8 and 16; no object plays a part in it."""
        stride4, stride8, stride16 = maps
        return self.adapter_4x(stride4), self.adapter_8x(stride8), self.adapter_16x(stride16)

    def forward(self, x: Tensor, shortcuts: Sequence[Tensor]) -> Tensor:
        """Decode (B, inputs, h, w) with the adapted maps of strides 4, 8 and 16."""
        stride4, stride8, stride16 = shortcuts
        x = self.conv_16x(self.conv_in(x) + stride16)
        x = self.conv_8x(self._resized(x, stride8) + stride8)
        x = self.conv_4x(self._resized(x, stride4) + stride4)
        return self.conv_out(x)

    def _resized(self, x: Tensor, like: Tensor) -> Tensor:
        """Resize to the size of another map."""
        size = like.shape[-2:]
        return F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners)


def build_deaot(name: str) -> DeAOT:
    """Build a variant by its name.

    Raises:
        KeyError: the name is none of ``VARIANTS``.
    """
    return DeAOT(VARIANTS[name])
