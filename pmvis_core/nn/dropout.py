"""Dropout (Srivastava et al., 2014) that a CPU does not wait for.

torch draws a float32 random number an element, one after the other, and keeps a float32 mask for
the backward pass; in a transformer that is a tenth of a training step. Here an element takes
sixteen random bits and a byte.

    layer = Dropout(0.1)
    x = norm(layer.add(x, attended))  # x + dropout(attended)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 1 << 16
"""Probabilities are multiples of 1 / LEVELS; 0.1 is 0.100006, and the scale goes by the latter."""
_LOWEST = -(1 << 63)


class Dropout(nn.Dropout):
    """``nn.Dropout`` with cheaper random numbers on a CPU; on a GPU torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        """Zero some elements and scale the others, while training."""
        if not self._draws(x):
            return F.dropout(x, self.p, self.training)
        return _Dropout.apply(x, *draw_kept(x, self.p))

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return x + dropout(branch), of one shape, in a pass less."""
        if not self._draws(branch):
            return x + F.dropout(branch, self.p, self.training)
        return _DropoutAdd.apply(x, branch, *draw_kept(branch, self.p))

    def _draws(self, x: Tensor) -> bool:
        """Tell whether there is anything to draw, and for a CPU."""
        return self.training and 0 < self.p < 1 and x.device.type == "cpu"


def draw_kept(like: Tensor, p: float) -> tuple[Tensor, float]:
    """Draw which elements stay, from torch's generator of the CPU.

    Returns:
        uint8 of ``like``'s shape, 0 with probability p rounded to 1 / LEVELS and 1 otherwise, and
        what those that stay are multiplied by.
    """
    level = min(max(round(p * LEVELS), 1), LEVELS - 1)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(_LOWEST, None)
    bits = words.view(torch.int16)[: like.numel()].view(like.shape)
    return (bits >= level - LEVELS // 2).view(torch.uint8), LEVELS / (LEVELS - level)


class _Dropout(torch.autograd.Function):
    """Some elements scaled, the others zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return kept.to(x.dtype).mul_(scale).mul_(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        (kept,) = ctx.saved_tensors
        return kept.to(gradient.dtype).mul_(ctx.scale).mul_(gradient), None, None


class _DropoutAdd(torch.autograd.Function):
    """A residual connection around what is dropped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return torch.addcmul(x, branch, kept.to(branch.dtype), value=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        (kept,) = ctx.saved_tensors
        branch = kept.to(gradient.dtype).mul_(ctx.scale).mul_(gradient)
        return gradient, branch, None, None
