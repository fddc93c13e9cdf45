"""Trading time for memory: activations that are computed again instead of kept.

checkpoint_activations(model)  # in place; parameters keep their names
"""

from __future__ import annotations

from functools import partial
from typing import cast

from torch import nn
from torch.utils.checkpoint import checkpoint

from pmvis_core.nn.backbones import Bottleneck
from pmvis_core.nn.swin import SwinBlock
from pmvis_core.nn.transformer import DecoderLayer, EncoderLayer

SEGMENTS = (Bottleneck, SwinBlock, EncoderLayer, DecoderLayer)
"""What is computed again as a whole, dropout included: layers that hold far more than they pass
on. Where a network has none of them (the small backbones) everything is kept."""


def checkpoint_activations(model: nn.Module) -> int:
    """Let every segment keep its inputs only until its gradient is due; return how many there are.

    Segments without a parameter that learns keep nothing anyway and are left alone.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, SEGMENTS) and any(p.requires_grad for p in module.parameters()):
            whole = partial(checkpoint, cast(nn.Module, module).forward, use_reentrant=False)
            object.__setattr__(module, "forward", whole)
            count += 1
    return count
