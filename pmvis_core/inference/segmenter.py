"""The network arranged for inference: norms folded, memory laid out for speed, precision chosen.

The same arithmetic as `models.idol.IDOL`, whose golden tests hold it to the reference's numbers.
In float32 the answers differ from the trained network's by rounding only. In bfloat16 or float16
the backbone, the encoder and the mask branch are computed in that type; the decoder, which refines
positions, and all heads stay in float32.

    segmenter = FrameSegmenter(checkpoint.model, torch.device("cpu"), precision="bf16")
    predictions = segmenter([frame])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from pmvis_core.allocator import keep_freed_memory
from pmvis_core.data.samples import ImageBatch
from pmvis_core.errors import ResourceError
from pmvis_core.models.idol import IDOL, Encoded, IdolPredictions
from pmvis_core.nn.backbones import fold_frozen_norms

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_BATCH_PX = 1 << 17
"""Pixels that a CPU takes at once: small frames gain from company, large ones fall out of cache."""


class FrameSegmenter:
    """Runs the network on frames, in the way that suits the device."""

    def __init__(
        self, model: IDOL, device: torch.device, precision: str = "fp32", compiled: bool = False
    ) -> None:
        """Arrange a model; it is changed for good, and cannot be trained any more.

        Args:
            model: in evaluation mode.
            device: where it is to run.
            precision: fp32, bf16 or fp16; float16 needs a GPU.
            compiled: let `torch.compile` write kernels for the encoder; on a GPU they are recorded
                as a graph. The first frames of each size then take a minute.

        Raises:
            ResourceError: the device cannot do it.
        """
        if precision not in PRECISIONS or (precision == "fp16" and device.type == "cpu"):
            raise ResourceError(
                f"precision `{precision}` is not for {device.type}",
                "use fp32, bf16 or, on a GPU, fp16",
            )
        keep_freed_memory()
        fold_frozen_norms(model.backbone)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = device
        self.dtype = PRECISIONS[precision]
        self._encode: Any = model.encode
        if compiled:
            mode = "reduce-overhead" if device.type == "cuda" else "default"
            self._encode = torch.compile(model.encode, mode=mode, dynamic=False)

    def frames_at_once(self, size: tuple[int, int], most: int) -> int:
        """Return how many frames of (height, width) to give in one call, at most ``most``."""
        if self.device.type != "cpu":
            return most
        return max(1, min(most, CPU_BATCH_PX // (size[0] * size[1])))

    @torch.inference_mode()
    def __call__(self, frames: Sequence[Tensor]) -> IdolPredictions:
        """Predict for (3, h, w) uint8 or float frames in 0..255, all of one size."""
        images = ImageBatch.of([self._load(frame) for frame in frames])
        tensor = images.tensor.contiguous(memory_format=torch.channels_last)
        images = replace(images, tensor=tensor)
        lower = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=lower):
            encoded: Encoded = self._encode(images)
        full = replace(
            encoded, tokens=encoded.tokens.float(), mask_features=encoded.mask_features.float()
        )
        return cast(IDOL, self.model).decode(full)

    def _load(self, frame: Tensor) -> Tensor:
        """Bring a frame to the device while it is small, and make numbers of it there."""
        if self.device.type == "cuda":
            frame = frame.pin_memory().to(self.device, non_blocking=True)
        return frame.float()
