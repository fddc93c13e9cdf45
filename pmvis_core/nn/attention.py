"""Attention of one head with wide values, as DeAOT's propagation needs it (Yang and Yang, 2022).

Keys have 128 channels, values 1,024 and a memory thousands of tokens, so that neither torch's flash
kernel for the CPU fits nor the whole matrix of weights into a cache. Where nothing is to be
differentiated, queries are taken some hundred at a time: a fifth faster, and the matrix is never
there as a whole.

    attended = attend(query, memory.key, memory.value)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 320
"""Queries at a time on the CPU: few enough for the cache, enough for the matrix product."""


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(query key^T / sqrt(K)) value.

    The result for an item of the batch does not depend on the others.

    Args:
        query: (B, N, K).
        key: (B, T, K).
        value: (B, T, V).

    Returns:
        (B, N, V).
    """
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.device.type != "cpu" or query.dtype != torch.float32 or differentiated:
        return F.scaled_dot_product_attention(query, key, value)
    out = query.new_empty(*query.shape[:2], value.shape[2])
    scaled = query * query.shape[2] ** -0.5
    for item in range(len(query)):
        turned = key[item].T
        for first in range(0, query.shape[1], CHUNK):
            weights = (scaled[item, first : first + CHUNK] @ turned).softmax(-1)
            torch.mm(weights, value[item], out=out[item, first : first + CHUNK])
    return out
