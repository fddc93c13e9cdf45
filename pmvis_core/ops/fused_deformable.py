"""Deformable attention with what networks do just before it (Deformable DETR, arXiv:2010.04159).

Networks predict offsets round reference points, logits of the weights, and know which tokens are
padding. The kernels take these as they are: neither the places, nor the weights, nor a masked copy
of the features is ever stored for the gradient. Offsets are measured as the published code does
(section 4.1 and appendix A.4): in cells of the level round a point, and round a box so that the
farthest of P points, offset by P, reaches half a side.

    output = fused_deformable_attention(value, shapes, references, offsets, logits, padding)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pmvis_core.ops.deformable import (
    check_operands,
    deformable_attention_reference,
    in_one_type,
    obstacle_of,
    wants_order,
)
from pmvis_core.ops.library import Backend, choose, operator

_NAME = "fused_deformable_attention"


def fused_deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    value_padding: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Sample feature maps round references, and sum with the softmax of logits.

    The same as `deformable_attention` of ``references + offsets * unit`` and of the logits' softmax
    over the L x P points, with zeros for the value of padding; differentiable in all but that.

    Args:
        value: (B, S, M, D) features of all levels, one after the other, each row-major.
        spatial_shapes: L pairs (height, width); their areas sum to S.
        reference_points: (B, Q, L, 2) xy, the unit of offsets being a cell of the level, or
            (B, Q, L, 4) cxcywh, the unit being half a side divided by P; in [0, 1] of the map.
        sampling_offsets: (B, Q, M, L, P, 2) xy.
        attention_logits: (B, Q, M, L, P).
        value_padding: (B, S) bool, True on padding; None where there is none.
        backend: what carries the call; None for the best.

    Returns:
        (B, Q, M * D), of the type of ``value``.

    Raises:
        ValueError: shapes do not fit together.
        ResourceError: the wished backend cannot carry this call.
    """
    check_operands(value, spatial_shapes, sampling_offsets, attention_logits, ("offsets", "logits"))
    _check(value, reference_points, sampling_offsets, value_padding)
    padding = value.new_empty(0, dtype=torch.bool) if value_padding is None else value_padding
    operands = (value, reference_points, sampling_offsets, attention_logits)
    obstacle = obstacle_of(value, spatial_shapes, padding, *operands[1:])
    carrier = choose(_NAME, backend, value.device.type, obstacle)
    wide, references, offsets, logits = (tensor.contiguous() for tensor in in_one_type(*operands))
    if carrier == "torch":
        result = fused_deformable_attention_reference(
            wide, spatial_shapes, references, offsets, logits, value_padding
        )
        return result.to(value.dtype)
    shapes = torch.tensor(spatial_shapes, dtype=torch.int64, device="cpu")
    maps = wide if value.device.type == "cpu" else value.contiguous()
    output: Tensor = operator(_NAME)(
        maps, shapes, references, offsets, logits, padding.contiguous()
    )
    return output.to(value.dtype)


def fused_deformable_attention_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    value_padding: Tensor | None = None,
) -> Tensor:
    """Do the same in plain torch, on any device: the twin and oracle of the kernels."""
    if value_padding is not None:
        value = value.masked_fill(value_padding[..., None, None], 0)
    weights = attention_logits.flatten(-2).softmax(-1).view_as(attention_logits)
    centres = reference_points[:, :, None, :, None, :2]
    if reference_points.shape[-1] == 4:
        units = reference_points[:, :, None, :, None, 2:] * (0.5 / sampling_offsets.shape[4])
    else:
        sides = torch.tensor(spatial_shapes, dtype=centres.dtype, device=centres.device)
        units = (1 / sides.flip(-1))[:, None]
    locations = torch.addcmul(centres, sampling_offsets, units)
    return deformable_attention_reference(value, spatial_shapes, locations, weights)


def _check(value: Tensor, references: Tensor, offsets: Tensor, padding: Tensor | None) -> None:
    """Check what `check_operands` does not know of."""
    batch, queries, _, levels = offsets.shape[:4]
    if references.ndim != 4 or references.shape[-1] not in (2, 4):
        raise ValueError(
            f"references have shape {tuple(references.shape)}, expected "
            f"({batch}, {queries}, {levels}, 2 or 4)"
        )
    if references.shape[:3] != (batch, queries, levels):
        raise ValueError(
            f"references have shape {tuple(references.shape)}, expected "
            f"({batch}, {queries}, {levels}, {references.shape[-1]})"
        )
    if padding is not None and (padding.shape != value.shape[:2] or padding.dtype != torch.bool):
        raise ValueError(
            f"padding is {padding.dtype} of shape {tuple(padding.shape)}, expected torch.bool of "
            f"{tuple(value.shape[:2])}"
        )


def _shape(
    value: Tensor,
    shapes: Tensor,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding: Tensor,
) -> Tensor:
    """Return an empty tensor like the forward result."""
    batch, _, heads, channels = value.shape
    return value.new_empty((batch, offsets.shape[1], heads * channels))


def _shape_backward(
    grad: Tensor,
    value: Tensor,
    shapes: Tensor,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding: Tensor,
    bound: Tensor,
    with_references: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return empty tensors like the gradients."""
    each_head = (*offsets.shape[:4], references.shape[3]) if with_references else (0,)
    return (
        torch.empty_like(value),
        references.new_empty(each_head),
        torch.empty_like(offsets),
        torch.empty_like(logits),
    )


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Keep what the gradient needs."""
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, Tensor, Tensor, None]:
    """Return the gradients of value, references, offsets and logits; none of shapes, padding."""
    saved = ctx.saved_tensors  # once only: checkpointed activations are handed out no second time
    bound = _bound(grad, saved[4])
    wanted = ctx.needs_input_grad[2]
    backward = operator(f"{_NAME}_backward")
    grads = backward(grad.contiguous(), *saved, bound, wanted)
    # Each head has its share, so that nobody adds up in another order.
    references = grads[1].sum(2) if wanted else None
    return grads[0], None, references, grads[2], grads[3], None


def _bound(grad: Tensor, logits: Tensor) -> Tensor:
    """Return what no sum of value's gradient exceeds; see `deformable`."""
    return largest_fused_sum(grad, logits) if wants_order(grad) else logits.new_empty(0)


def largest_fused_sum(grad: Tensor, logits: Tensor) -> Tensor:
    """Return (1,), of the logits' type, which no element of value's gradient exceeds.

    Args:
        grad: (B, Q, M * D) of the output.
        logits: (B, Q, M, L, P).
    """
    if not grad.numel() or not logits.numel():
        return logits.new_zeros(1)
    # A query's weights are 1 together; the half allows for their rounding. They are none where a
    # logit is none, and so must the bound be.
    bound = grad.abs().amax().to(logits.dtype) * (logits.shape[1] + 0.5)
    return (bound + 0 * logits.amax())[None]


torch.library.register_fake(f"pmvis::{_NAME}", _shape)
torch.library.register_fake(f"pmvis::{_NAME}_backward", _shape_backward)
torch.library.register_autograd(f"pmvis::{_NAME}", _backward, setup_context=_save)
torch.library.register_autocast(f"pmvis::{_NAME}", "cpu", torch.float32)
