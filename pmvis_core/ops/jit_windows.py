"""The GPU kernels of local attention, launched through cupy; see `jit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmvis_core.ops import jit

_WINDOWS = "ops/local_attention/kernels.cuh"
# These are those of the text.
_CELLS, _SCORERS = 8, 128


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return sums and weights; see the operator's schema."""
    grid = (height, width)
    weights = _window_scores(query, key, bias, None, grid)
    return _window_sums(value, weights, grid, gathers=False), weights


def local_attention_backward(
    grad: Tensor,
    grad_weights: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and bias; see the operator's schema."""
    grid = (height, width)
    slopes = _window_scores(grad, value, jit._some(grad_weights), weights, grid)
    grad_query = _window_sums(key, slopes, grid, gathers=False)
    grad_key = _window_sums(query, slopes, grid, gathers=True)
    return grad_query, grad_key, _window_sums(grad, weights, grid, gathers=True), slopes


def _window_scores(
    query: Tensor, key: Tensor, terms: Tensor | None, weights: Tensor | None, grid: tuple[int, int]
) -> Tensor:
    """Return (B, N, side^2): weights of the terms or, where there are weights, slopes."""
    like = terms if weights is None else weights
    assert like is not None
    output = torch.empty_like(like)
    side = round(output.shape[2] ** 0.5)
    if output.numel():
        jit.launch(
            _WINDOWS,
            f"pmvis::window_scores<{jit._TYPES[query.dtype]}>",
            (jit._blocks(grid[1], _CELLS), grid[0], len(query)),
            (_SCORERS, 1, 1),
            (query, key, terms, weights, output, *map(np.int32, (*grid, query.shape[2], side))),
            shared=output.element_size() * _CELLS * side * side,
        )
    return output


def _window_sums(
    values: Tensor, weights: Tensor, grid: tuple[int, int], *, gathers: bool
) -> Tensor:
    """Return (B, N, C) like the values."""
    output = torch.empty_like(values)
    channels, side = values.shape[2], round(weights.shape[2] ** 0.5)
    lanes = 4 if channels % 4 == 0 and channels >= 256 and values.data_ptr() % 32 == 0 else 1
    vectors = jit._blocks(channels, lanes)
    threads = min(128, 32 * jit._blocks(vectors, 32))
    if output.numel():
        jit.launch(
            _WINDOWS,
            f"pmvis::window_sums<{jit._TYPES[values.dtype]}, {lanes}, {jit._word(gathers)}>",
            (jit._blocks(grid[1], _CELLS) * jit._blocks(vectors, threads), grid[0], len(values)),
            (threads, 1, 1),
            (values, weights, output, *map(np.int32, (*grid, channels, side))),
            shared=weights.element_size() * _CELLS * side * (_CELLS + side - 1),
        )
    return output


KERNELS: dict[str, Callable[..., Any]] = {
    "local_attention": local_attention,
    "local_attention_backward": local_attention_backward,
}
