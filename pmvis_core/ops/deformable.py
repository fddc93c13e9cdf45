"""Multi-scale deformable attention (Deformable DETR, arXiv:2010.04159, Eq. 2 and 3).

Each query samples a few points of every level's map and adds them up with weights. The kernels for
CPUs work in float32 and float64, and maps of a half type are widened for them. Those for GPUs read
and write half types and add up in float32; there, value's gradient is summed in no fixed order
unless `torch.use_deterministic_algorithms` asks for one. `fused_deformable` also takes over what
networks do just before it.

    output = deformable_attention(value, [(48, 80), (24, 40)], locations, weights)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pmvis_core.ops.library import Backend, choose, operator

_NAME = "deformable_attention"
_FULL_TYPES = (torch.float32, torch.float64)
_HALF_TYPES = (torch.float16, torch.bfloat16)
_MAX_POINTS = 256
"""Levels x points that the kernels have room for (csrc/ops/deformable_attention/kernels.h)."""
_MAX_LEVELS, _MAX_SIDE, _MAX_ROWS = 8, 65000, 65535
"""Levels, cells along an axis, and batch x heads of a GPU's kernels (points.cuh there)."""

_ORDERED = frozenset({"cpu"})
"""Devices whose kernels sum up in one order anyway."""


def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Sample feature maps at P points a level for each query and head, and sum with weights.

    Outside a map there are zeros; between pixel centres it is bilinear. Differentiable in all three
    tensors; on the CPU the gradients do not depend on the number of threads.

    Args:
        value: (B, S, M, D) features of all levels, one after the other, each row-major.
        spatial_shapes: L pairs (height, width); their areas sum to S.
        locations: (B, Q, M, L, P, 2) points as xy, 0 and 1 being the edges of the map.
        weights: (B, Q, M, L, P) attention weights.
        backend: what carries the call; None for the best.

    Returns:
        (B, Q, M * D), of the type of ``value``.

    Raises:
        ValueError: shapes do not fit together.
        ResourceError: the wished backend cannot carry this call.
    """
    check_operands(value, spatial_shapes, locations, weights)
    obstacle = obstacle_of(value, spatial_shapes, locations, weights)
    carrier = choose(_NAME, backend, value.device.type, obstacle)
    operands = in_one_type(value, locations, weights)
    if carrier == "torch":
        result = deformable_attention_reference(operands[0], spatial_shapes, *operands[1:])
        return result.to(value.dtype)
    shapes = torch.tensor(spatial_shapes, dtype=torch.int64, device="cpu")
    if value.device.type != "cpu":
        operands = (value, *operands[1:])
    maps, places, gates = (tensor.contiguous() for tensor in operands)
    output: Tensor = operator(_NAME)(maps, shapes, places, gates)
    return output.to(value.dtype)


def deformable_attention_reference(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Do the same in plain torch, on any device: the twin and oracle of the kernels."""
    batch, _, heads, channels = value.shape
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    maps = value.permute(0, 2, 3, 1).flatten(0, 1)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    sampled = []
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        end = start + height * width
        level_map = maps[:, :, start:end].reshape(batch * heads, channels, height, width)
        sampled.append(functional.grid_sample(level_map, grids[:, :, level], align_corners=False))
        start = end
    stacked = torch.stack(sampled, dim=-2)
    gates = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels, points)
    summed = (stacked * gates).sum(dim=(-2, -1))
    return summed.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


def obstacle_of(value: Tensor, spatial_shapes: Sequence[tuple[int, int]], *others: Tensor) -> str:
    """Say why no kernel can serve a call; the last operand is (B, Q, M, L, P)."""
    if others[-1].shape[3] * others[-1].shape[4] > _MAX_POINTS:
        return f"levels x points are more than {_MAX_POINTS}"
    if value.dtype not in _FULL_TYPES + _HALF_TYPES:
        return f"there is no kernel for {value.dtype}"
    if any(other.device != value.device for other in others):
        return "the operands are on different devices"
    return "" if value.device.type == "cpu" else _gpu_obstacle(value, spatial_shapes)


def _gpu_obstacle(value: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> str:
    """Say what is too large for a GPU's kernels."""
    if len(spatial_shapes) > _MAX_LEVELS:
        return f"there are more than {_MAX_LEVELS} levels"
    if max(side for shape in spatial_shapes for side in shape) > _MAX_SIDE:
        return f"a level has more than {_MAX_SIDE} rows or columns"
    slices = (value.shape[3] + 31) // 32  # of channels: at least so many are served together
    many = value.shape[0] * value.shape[2] * slices > _MAX_ROWS
    return "batch x heads x channels are too many" if many else ""


def in_one_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the first one's type, or in float32 if that is a half type."""
    dtype = torch.float32 if tensors[0].dtype in _HALF_TYPES else tensors[0].dtype
    return tuple(tensor.to(dtype) for tensor in tensors)


def _shape(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Return an empty tensor like the forward result."""
    batch, _, heads, channels = value.shape
    return value.new_empty((batch, locations.shape[1], heads * channels))


def _shape_backward(
    grad: Tensor, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor, bound: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors like the gradients."""
    return torch.empty_like(value), torch.empty_like(locations), torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Keep what the gradient needs."""
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    """Return the gradients of value, shapes (none), locations and weights."""
    backward = operator(f"{_NAME}_backward")
    saved = ctx.saved_tensors  # once only: checkpointed activations are handed out no second time
    bound = _bound(grad, saved[3])
    grad_value, grad_locations, grad_weights = backward(grad.contiguous(), *saved, bound)
    return grad_value, None, grad_locations, grad_weights


def _bound(grad: Tensor, weights: Tensor) -> Tensor:
    """Return what no sum of value's gradient exceeds, or nothing where sums need no fixed order.

    With it a GPU sums whole numbers, which is the same in any order. A CPU has one order anyway.
    """
    return largest_sum(grad, weights) if wants_order(grad) else weights.new_empty(0)


def wants_order(grad: Tensor) -> bool:
    """Say whether sums on a tensor's device must be asked for to be the same every time."""
    return grad.device.type not in _ORDERED and torch.are_deterministic_algorithms_enabled()


def largest_sum(grad: Tensor, weights: Tensor) -> Tensor:
    """Return (1,), of the weights' type, which no element of value's gradient exceeds.

    Args:
        grad: (B, Q, M * D) of the output.
        weights: (B, Q, M, L, P).
    """
    if not grad.numel() or not weights.numel():
        return weights.new_zeros(1)
    steepest = grad.abs().amax().to(weights.dtype)
    # A point's four corners share its weight, so no cell gets more than all weights of its head.
    return (weights.abs().sum((1, 3, 4)).amax() * steepest)[None]


def check_operands(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    places: Tensor,
    scores: Tensor,
    names: tuple[str, str] = ("locations", "weights"),
) -> None:
    """Check that the shapes fit together: the kernels trust them.

    Raises:
        ValueError: they do not; places and scores are called by the names.
    """
    levels = len(spatial_shapes)
    if not levels or any(height < 1 or width < 1 for height, width in spatial_shapes):
        raise ValueError(f"levels are {list(spatial_shapes)}, expected positive heights and widths")
    tokens = sum(height * width for height, width in spatial_shapes)
    if value.ndim != 4 or value.shape[1] != tokens:
        raise ValueError(
            f"value has shape {tuple(value.shape)}, expected (B, {tokens}, M, D) for the levels "
            f"{list(spatial_shapes)}"
        )
    batch, _, heads, _ = value.shape
    fixed = [places.shape[d] for d in (0, 2, 3, 5)] if places.ndim == 6 else []
    if fixed != [batch, heads, levels, 2]:
        raise ValueError(
            f"{names[0]} have shape {tuple(places.shape)}, expected "
            f"({batch}, Q, {heads}, {levels}, P, 2)"
        )
    if scores.shape != places.shape[:5]:
        raise ValueError(
            f"{names[1]} have shape {tuple(scores.shape)}, expected {tuple(places.shape[:5])}"
        )


torch.library.register_fake(f"pmvis::{_NAME}", _shape)
torch.library.register_fake(f"pmvis::{_NAME}_backward", _shape_backward)
torch.library.register_autograd(f"pmvis::{_NAME}", _backward, setup_context=_save)
torch.library.register_autocast(f"pmvis::{_NAME}", "cpu", torch.float32)
