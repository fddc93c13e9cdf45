"""What every backbone gives."""

from __future__ import annotations

from torch import Tensor, nn


class Backbone(nn.Module):
    """Something that turns an image into three feature maps."""

    channels: tuple[int, int, int]
    """Channels of the maps at strides 8, 16 and 32."""

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return maps (B, C_l, H/s_l, W/s_l) for s = 8, 16, 32 of a (B, 3, H, W) image."""
        raise NotImplementedError
