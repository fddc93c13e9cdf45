"""A model's parameters as views of a few flat tensors.

A network of many small tensors spends more time on dispatching optimiser, clipping, averaging and
all-reduce than on their arithmetic. With flat storage each of these is one operation, and the
network itself does not notice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FlatParameters:
    """Some parameters, and their gradients, each side by side in one tensor."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Move the parameters' storage; they stay what the model uses.

        Args:
            named: names and parameters of one type on one device; not empty.
        """
        self.names = [name for name, _ in named]
        self.shapes = [parameter.shape for _, parameter in named]
        flat = torch.cat([parameter.detach().flatten() for _, parameter in named])
        self.value = nn.Parameter(flat)
        self.gradient = torch.zeros_like(flat)
        self.value.grad = self.gradient
        values, gradients = self.views(self.value.data), self.views(self.gradient)
        for name, parameter in named:
            parameter.data = values[name]
            parameter.grad = gradients[name]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the parts of a flat tensor of the same length, by name and in shape."""
        parts = flat.split([shape.numel() for shape in self.shapes])
        named = zip(self.names, parts, self.shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in named}
