"""Tensor operations with a compiled kernel and a twin in plain torch.

`deformable_attention` samples a few points of multi-scale feature maps for each query and adds
them up with weights (Deformable DETR, arXiv:2010.04159, Eq. 2 and 3). On the CPU in float32 and
float64 it runs in ``_C.so``; otherwise, or where that library is absent, its twin
`deformable_attention_reference` does the same with `grid_sample`. The tests hold the two together.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pmvis_core import native

_OP = "pmvis::deformable_attention"
_KERNEL_TYPES = (torch.float32, torch.float64)
_MAX_POINTS = 256
"""Levels x points that the kernel has room for (csrc/deformable_attention.h)."""


class OpStatus(NamedTuple):
    """What carries an operation, for `pmvis doctor`."""

    name: str
    """The operation."""
    state: str
    """``compiled (avx2)``, ``compiled (base)`` or ``torch``."""
    reason: str
    """Where the kernel lies, or why there is none."""


def deformable_attention(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sample feature maps at P points a level for each query and head, and sum with weights.

    Outside a map there are zeros; between pixel centres it is bilinear. Differentiable in all three
    tensors; the gradients do not depend on the number of threads.

    Args:
        value: (B, S, M, D) features of all levels, one after the other, each row-major.
        spatial_shapes: L pairs (height, width); their areas sum to S.
        locations: (B, Q, M, L, P, 2) points as xy, 0 and 1 being the edges of the map.
        weights: (B, Q, M, L, P) attention weights.

    Returns:
        (B, Q, M * D).

    Raises:
        ValueError: shapes do not fit together.
    """
    _check(value, spatial_shapes, locations, weights)
    tensors = (value, locations, weights)
    on_cpu = all(t.device.type == "cpu" and t.dtype == value.dtype for t in tensors)
    few = weights.shape[3] * weights.shape[4] <= _MAX_POINTS
    if not (on_cpu and few and value.dtype in _KERNEL_TYPES and _library().loaded):
        return deformable_attention_reference(value, spatial_shapes, locations, weights)
    shapes = torch.tensor(spatial_shapes, dtype=torch.int64)
    operator: Any = torch.ops.pmvis.deformable_attention.default
    result: Tensor = operator(
        value.contiguous(), shapes, locations.contiguous(), weights.contiguous()
    )
    return result


def deformable_attention_reference(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Do the same in plain torch, on any device: the twin and oracle of the kernel."""
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


def status() -> list[OpStatus]:
    """Return what carries each operation, and why."""
    library = _library()
    state = f"compiled ({library.isa})" if library.loaded else "torch"
    found = [OpStatus("deformable_attention on the CPU", state, library.reason)]
    if torch.cuda.is_available():
        reason = "there is no GPU kernel in this version; grid_sample does the work"
        found.append(OpStatus("deformable_attention on the GPU", "torch", reason))
    return found


class _Library(NamedTuple):
    """The state of ``_C.so`` in this process."""

    loaded: bool
    isa: str
    reason: str


@functools.cache
def _library() -> _Library:
    """Load ``_C.so`` once and register its gradient and shape functions."""
    path, reason = native.find_library("_C.so")
    if path is None:
        return _Library(False, "", reason)
    try:
        torch.ops.load_library(str(path))
        handle = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        return _Library(False, "", f"`{path}` does not load: {error}")
    if not hasattr(torch.ops.pmvis, "deformable_attention_backward"):
        return _Library(False, "", f"torch {torch.__version__} refused the operators of `{path}`")
    handle.pmvis_isa.restype = ctypes.c_char_p
    torch.library.register_fake(_OP, _shape)
    torch.library.register_fake(f"{_OP}_backward", _shape_backward)
    torch.library.register_autograd(_OP, _backward, setup_context=_save)
    return _Library(True, handle.pmvis_isa().decode(), str(path))


def _shape(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Return an empty tensor like the forward result."""
    batch, _, heads, channels = value.shape
    return value.new_empty((batch, locations.shape[1], heads * channels))


def _shape_backward(
    grad: Tensor, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors like the gradients."""
    return torch.empty_like(value), torch.empty_like(locations), torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Keep what the gradient needs."""
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    """Return the gradients of value, shapes (none), locations and weights."""
    operator: Any = torch.ops.pmvis.deformable_attention_backward.default
    grad_value, grad_locations, grad_weights = operator(grad.contiguous(), *ctx.saved_tensors)
    return grad_value, None, grad_locations, grad_weights


def _check(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> None:
    """Check that the shapes fit together: the kernel trusts them."""
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
    fixed = [locations.shape[d] for d in (0, 2, 3, 5)] if locations.ndim == 6 else []
    if fixed != [batch, heads, levels, 2]:
        raise ValueError(
            f"locations have shape {tuple(locations.shape)}, expected "
            f"({batch}, Q, {heads}, {levels}, P, 2)"
        )
    if weights.shape != locations.shape[:5]:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}, expected {tuple(locations.shape[:5])}"
        )
