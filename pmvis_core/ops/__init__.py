"""Tensor operations with native kernels and twins in plain torch.

| operation | what it is |
|---|---|
| `deformable_attention` | weighted sums of a few points of multi-scale maps (arXiv:2010.04159) |
| `lab_similarity` | how alike the colours of neighbouring pixels are (BoxInst, arXiv:2012.02310) |
| `pairwise_loss`, `pairwise_terms` | BoxInst's disagreement of neighbours that look alike |
| `logits_to_rle` | run-length encodings of upsampled mask logits above a threshold |

Each takes ``backend``: ``"compiled"`` (``_C.so``, ``_C_cuda.so`` on a GPU), ``"jit"`` (the kernels
for GPUs, compiled when first used), ``"torch"`` (the twin, on any device), or None for the best;
``PMVIS_NATIVE`` forces one for the whole process (see `library`). The tests hold all together.

    similarity = lab_similarity(images_uint8)
    loss = pairwise_loss(logits, similarity, image_index, boxes, threshold=0.3)
"""

from pmvis_core.ops.deformable import deformable_attention, deformable_attention_reference
from pmvis_core.ops.library import Backend, OpStatus, status
from pmvis_core.ops.mask_runs import logits_to_rle, logits_to_rle_reference
from pmvis_core.ops.pairwise import (
    LOGIT_STRIDE,
    box_cells,
    cell_masks,
    lab_similarity,
    lab_similarity_reference,
    pairwise_loss,
    pairwise_terms,
    pairwise_terms_reference,
    rgb_to_lab,
)

__all__ = [
    "LOGIT_STRIDE",
    "Backend",
    "OpStatus",
    "box_cells",
    "cell_masks",
    "deformable_attention",
    "deformable_attention_reference",
    "lab_similarity",
    "lab_similarity_reference",
    "logits_to_rle",
    "logits_to_rle_reference",
    "pairwise_loss",
    "pairwise_terms",
    "pairwise_terms_reference",
    "rgb_to_lab",
    "status",
]
