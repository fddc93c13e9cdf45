"""Tensor operations with native kernels and twins in plain torch.

| operation | what it is |
|---|---|
| `deformable_attention` | weighted sums of a few points of multi-scale maps (arXiv:2010.04159) |
| `fused_deformable_attention` | the same of offsets, logits and padding, as networks have them |
| `lab_similarity` | how alike the colours of neighbouring pixels are (BoxInst, arXiv:2012.02310) |
| `pairwise_loss`, `pairwise_terms` | BoxInst's disagreement of neighbours that look alike |
| `clip_pairs`, `lab_means` | pixels of a clip that look alike, in and across frames (BoxVIS) |
| `clip_pairwise_loss`, `clip_pairwise_terms` | the disagreement of such pixels |
| `local_attention` | attention to the window round a place in another frame (AOT, DeAOT) |
| `logits_to_rle` | run-length encodings of upsampled mask logits above a threshold |
| `mask_stack`, `mask_extents`, `mask_iou` | masks as bits on their device: areas, boxes, overlaps |

Each takes ``backend``: ``"compiled"`` (``_C.so``, ``_C_cuda.so`` on a GPU), ``"jit"`` (the kernels
for GPUs, compiled when first used), ``"torch"`` (the twin, on any device), or None for the best;
``PMVIS_NATIVE`` forces one for the whole process (see `library`). The tests hold all together.

    similarity = lab_similarity(images_uint8)
    loss = pairwise_loss(logits, similarity, image_index, boxes, threshold=0.3)
"""

from pmvis_core.ops.clip_pairwise import (
    CLIP_STEPS,
    clip_cells,
    clip_pairs,
    clip_pairwise_loss,
    clip_pairwise_terms,
    clip_pairwise_terms_reference,
    clip_shifts,
    lab_means,
    lab_means_reference,
)
from pmvis_core.ops.deformable import deformable_attention, deformable_attention_reference
from pmvis_core.ops.fused_deformable import (
    fused_deformable_attention,
    fused_deformable_attention_reference,
)
from pmvis_core.ops.library import Backend, OpStatus, status
from pmvis_core.ops.local_attention import local_attention, local_attention_reference
from pmvis_core.ops.mask_runs import logits_to_rle, logits_to_rle_reference
from pmvis_core.ops.mask_stacks import MaskStack, mask_extents, mask_iou, mask_stack
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
    "CLIP_STEPS",
    "LOGIT_STRIDE",
    "Backend",
    "MaskStack",
    "OpStatus",
    "box_cells",
    "cell_masks",
    "clip_cells",
    "clip_pairs",
    "clip_pairwise_loss",
    "clip_pairwise_terms",
    "clip_pairwise_terms_reference",
    "clip_shifts",
    "deformable_attention",
    "deformable_attention_reference",
    "fused_deformable_attention",
    "fused_deformable_attention_reference",
    "lab_means",
    "lab_means_reference",
    "lab_similarity",
    "lab_similarity_reference",
    "local_attention",
    "local_attention_reference",
    "logits_to_rle",
    "logits_to_rle_reference",
    "mask_extents",
    "mask_iou",
    "mask_stack",
    "pairwise_loss",
    "pairwise_terms",
    "pairwise_terms_reference",
    "rgb_to_lab",
    "status",
]
