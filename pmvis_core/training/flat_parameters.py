"""A model's parameters as views of a few flat tensors.

A network of many small tensors spends more time on dispatching optimiser, clipping, averaging and
all-reduce than on their arithmetic. With flat storage each of these is one operation, and the
network itself does not notice. Weights of convolutions that lie channels last stay so.
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
        self.parameters = [parameter for _, parameter in named]
        self.shapes = [parameter.shape for parameter in self.parameters]
        self._last = [_is_channels_last(parameter) for parameter in self.parameters]
        flat = torch.cat(
            [
                (p.detach().permute(0, 2, 3, 1) if last else p.detach()).flatten()
                for p, last in zip(self.parameters, self._last, strict=True)
            ]
        )
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
        named = zip(self.names, parts, self.shapes, self._last, strict=True)
        return {name: _shaped(part, shape, last) for name, part, shape, last in named}


def _is_channels_last(parameter: Tensor) -> bool:
    """Tell whether a parameter's channels lie last in memory, and not the usual way."""
    if parameter.dim() != 4 or parameter.is_contiguous():
        return False
    return parameter.is_contiguous(memory_format=torch.channels_last)


def _shaped(part: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """Return a flat part in its shape."""
    if not channels_last:
        return part.view(shape)
    outputs, inputs, height, width = shape
    return part.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
