"""Attention of every cell to the window around its place in another map (AOT, section 3.3).

"Associating Objects with Transformers for Video Object Segmentation" (arXiv:2106.02638): the
short-term attention of AOT and DeAOT. Nothing of size cells x window x channels is ever made. The
kernels read every key and value where it lies, forward and backward; in the twin the keys of all
windows of a row of queries are one stretch of memory, so each row is one matrix product, of which
the band is kept. Kernels for CPUs work in float32 and float64, and half types are widened for them;
those for GPUs read and write half types and add up in float32. All sums have one order.

    attended, weights = local_attention(query, key, value, bias, (31, 54))
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pmvis_core.ops.library import Backend, choose, operator

Grid = tuple[int, int]
"""(h, w) of a map whose cells lie row by row."""
_NAME = "local_attention"
_FULL_TYPES = (torch.float32, torch.float64)
_HALF_TYPES = (torch.float16, torch.bfloat16)
_MAX_SIDE = 23
"""Side of a window that the kernels have room for (csrc/ops/local_attention/kernels.h)."""
_MAX_GRID = 65535
"""Rows and maps of a GPU's kernels."""


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    grid: Grid,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the keys of a square window; places outside the map have no weight.

    Differentiable in all four tensors, through sums and weights; neither depends on the number of
    threads.

    Args:
        query: (B, N, D) with N = h * w row by row, already scaled.
        key: (B, N, D).
        value: (B, N, E).
        bias: (B, N, side^2) added to the logits, by the key's row, then column, of the window;
            the side is odd.
        grid: (h, w).
        backend: what carries the call; None for the best.

    Returns:
        (B, N, E) weighted sums of the values, of their type, and (B, N, side^2) weights, float32
        where the values are of a half type, else of their type.

    Raises:
        ValueError: shapes do not fit together.
        ResourceError: the wished backend cannot carry this call.
    """
    _check(query, key, value, bias, grid)
    carrier = choose(_NAME, backend, value.device.type, _obstacle(query, key, value, bias, grid))
    wide = torch.float32 if value.dtype in _HALF_TYPES else value.dtype
    kind = value.dtype if carrier != "torch" and value.device.type != "cpu" else wide
    operands = (query.to(kind), key.to(kind), value.to(kind), bias.to(wide))
    if carrier == "torch":
        sums, weights = local_attention_reference(*operands, grid)
    else:
        sums, weights = operator(_NAME)(*(t.contiguous() for t in operands), *grid)
    return sums.to(value.dtype), weights


def local_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Do the same in plain torch, on any device: the twin and oracle of the kernels."""
    height, width = grid
    side = math.isqrt(bias.shape[-1])
    place, inside = _band(height, width, side, query.device)
    place = place.expand(len(query), -1, -1)
    logits = _by_rows(query, _windows(key, grid, side), grid, transposed=True)
    weights = (logits.gather(-1, place) + bias).masked_fill(~inside, float("-inf")).softmax(-1)
    spread = torch.zeros_like(logits).scatter_add(-1, place, weights)
    return _by_rows(spread, _windows(value, grid, side), grid, transposed=False), weights


def _by_rows(x: Tensor, windows: list[Tensor], grid: Grid, *, transposed: bool) -> Tensor:
    """Multiply the rows of (B, N, K) maps with the matrices of their windows."""
    rows = [
        item.view(*grid, -1) @ (matrices.transpose(1, 2) if transposed else matrices)
        for item, matrices in zip(x, windows, strict=True)
    ]
    return torch.stack(rows).flatten(1, 2)


def _windows(x: Tensor, grid: Grid, side: int) -> list[Tensor]:
    """Return B of (h, side * w, C): for each row the rows around it, as overlapping views."""
    height, width = grid
    channels, around = x.shape[-1], side // 2
    rows = x.reshape(len(x), height, width * channels)
    padded = functional.pad(rows, (0, 0, around, around))
    shape, strides = (height, side * width, channels), (width * channels, channels, 1)
    return [item.as_strided(shape, strides, item.storage_offset()) for item in padded]


@functools.lru_cache(maxsize=8)
def _band(height: int, width: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (N, side^2) places of a window's keys in its row's stretch, and whether they exist."""
    offset = torch.arange(side, device=device)
    rows = torch.arange(height, device=device)[:, None] + offset - side // 2
    columns = torch.arange(width, device=device)[:, None] + offset - side // 2
    row_there = (rows >= 0) & (rows < height)
    column_there = (columns >= 0) & (columns < width)
    inside = row_there[:, None, :, None] & column_there[None, :, None, :]
    place = offset[:, None] * width + columns.clamp(0, width - 1)[:, None, :]
    place = place.expand(height, -1, -1, -1)
    return place.reshape(-1, side * side), inside.reshape(-1, side * side)


def _check(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, grid: Grid) -> None:
    """Check that the shapes fit together: the kernels trust them."""
    height, width = grid
    if height < 1 or width < 1:
        raise ValueError(f"grid is {grid}, expected a positive height and width")
    if query.ndim != 3 or not len(query) or query.shape[1] != height * width:
        raise ValueError(f"query has shape {tuple(query.shape)}, expected (B, {height * width}, D)")
    if key.shape != query.shape:
        raise ValueError(f"key has shape {tuple(key.shape)}, expected {tuple(query.shape)}")
    for name, tensor in (("value", value), ("bias", bias)):
        if tensor.ndim != 3 or tensor.shape[:2] != query.shape[:2]:
            expected = f"({len(query)}, {height * width}, ...)"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
    side = math.isqrt(bias.shape[2])
    if side * side != bias.shape[2] or side % 2 == 0:
        raise ValueError(f"bias has {bias.shape[2]} channels, expected the square of an odd side")


def _obstacle(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, grid: Grid) -> str:
    """Say why no kernel can serve a call."""
    if bias.shape[2] > _MAX_SIDE**2:
        return f"the window is wider than {_MAX_SIDE}"
    if value.dtype not in _FULL_TYPES + _HALF_TYPES:
        return f"there is no kernel for {value.dtype}"
    if any(other.device != value.device for other in (query, key, bias)):
        return "the operands are on different devices"
    if value.device.type != "cpu" and max(len(value), grid[0]) > _MAX_GRID:
        return "there are too many maps or rows"
    return ""


def _shape(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return empty tensors like the forward results."""
    return torch.empty_like(value), torch.empty_like(bias)


def _shape_backward(
    grad: Tensor,
    grad_weights: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return empty tensors like the gradients."""
    return (
        torch.empty_like(query),
        torch.empty_like(key),
        torch.empty_like(value),
        torch.empty_like(weights),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the gradient needs: the weights stand for the bias."""
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.grid = inputs[4:]
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad: Tensor | None, grad_weights: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, bias, height and width (none)."""
    query, key, value, weights = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(value)
    if grad_weights is None:
        grad_weights = weights.new_empty(0)
    operands = (grad.contiguous(), grad_weights.contiguous(), query, key, value, weights)
    return (*operator(f"{_NAME}_backward")(*operands, *ctx.grid), None, None)


torch.library.register_fake(f"pmvis::{_NAME}", _shape)
torch.library.register_fake(f"pmvis::{_NAME}_backward", _shape_backward)
torch.library.register_autograd(f"pmvis::{_NAME}", _backward, setup_context=_save)
torch.library.register_autocast(f"pmvis::{_NAME}", "cpu", torch.float32)
