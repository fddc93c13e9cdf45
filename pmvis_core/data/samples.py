"""What the network eats: frames with targets, key/reference pairs, padded batches.

Images are RGB, 0..255, float32 until `ImageBatch` normalises and pads them (ImageNet mean and
standard deviation; zero padding right and below, after normalisation, to the batch's largest frame
and then to a multiple of 32).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pmvis_core.types import Supervision

PIXEL_MEAN = (123.675, 116.280, 103.530)
PIXEL_STD = (58.395, 57.120, 57.375)


@dataclass(frozen=True)
class Targets:
    """The instances of one frame; rows agree between the frames of a pair."""

    labels: Tensor
    """(N,) int64, 0-based category."""
    boxes: Tensor
    """(N, 4) float32, cxcywh relative to the unpadded frame, in [0, 1]."""
    masks: Tensor
    """(N, H, W) bool at the frame's size; all False for instances without a mask."""
    supervision: tuple[Supervision, ...]
    """(N,) what each row is supervised by."""
    valid: Tensor
    """(N,) bool, False where the instance is not visible in this frame."""
    ignored: Tensor
    """(M, 4) float32, cxcywh relative: regions that are neither object nor background."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.supervision)

    def select(self, rows: Tensor) -> Targets:
        """Return the rows where the (N,) bool ``rows`` is True; ignored regions stay."""
        kept = tuple(s for s, keep in zip(self.supervision, rows.tolist(), strict=True) if keep)
        return Targets(
            self.labels[rows],
            self.boxes[rows],
            self.masks[rows],
            kept,
            self.valid[rows],
            self.ignored,
        )

    def to(self, device: torch.device) -> Targets:
        """Return the targets with their tensors on ``device``."""
        return Targets(
            self.labels.to(device),
            self.boxes.to(device),
            self.masks.to(device),
            self.supervision,
            self.valid.to(device),
            self.ignored.to(device),
        )


@dataclass(frozen=True)
class Frame:
    """One augmented image and what is known of it."""

    image: Tensor
    """(3, H, W) float32, RGB, 0..255."""
    targets: Targets
    """Its instances."""
    original_height: int
    """Rows of the image before augmentation (BoxInst ignores a strip measured in them)."""

    def to(self, device: torch.device) -> Frame:
        """Return the frame on ``device``."""
        return Frame(self.image.to(device), self.targets.to(device), self.original_height)


@dataclass(frozen=True)
class KeyReferencePair:
    """Two views of the same instances (IDOL, section 3.2)."""

    key: Frame
    """Supervised by detection losses; its embeddings are contrasted with the reference's."""
    reference: Frame
    """The other view."""
    name: str = ""
    """What it was made from, for messages."""

    def to(self, device: torch.device) -> KeyReferencePair:
        """Return the pair on ``device``."""
        return KeyReferencePair(self.key.to(device), self.reference.to(device), self.name)


@dataclass(frozen=True)
class ImageBatch:
    """Normalised images padded to a common size."""

    tensor: Tensor
    """(B, 3, H, W) float32, H and W multiples of 32."""
    padding: Tensor
    """(B, H, W) bool, True on padding."""
    sizes: Tensor
    """(B, 2) int64, unpadded (height, width)."""
    padded: bool = True
    """Whether any frame has padding, as far as is known without looking at the tensors."""

    @classmethod
    def of(cls, images: Sequence[Tensor], divisor: int = 32) -> ImageBatch:
        """Normalise and pad (3, h, w) images in 0..255."""
        mean = images[0].new_tensor(PIXEL_MEAN)[:, None, None]
        std = images[0].new_tensor(PIXEL_STD)[:, None, None]
        sizes = [(int(i.shape[-2]), int(i.shape[-1])) for i in images]
        height, width = (-(-max(side) // divisor) * divisor for side in zip(*sizes, strict=True))
        tensor = images[0].new_zeros(len(images), 3, height, width)
        padding = torch.ones(len(images), height, width, dtype=torch.bool, device=tensor.device)
        for row, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
            tensor[row, :, :h, :w] = (image - mean) / std
            padding[row, :h, :w] = False
        padded = any(size != (height, width) for size in sizes)
        return cls(tensor, padding, torch.tensor(sizes, device=tensor.device), padded)
