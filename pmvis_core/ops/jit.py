"""The GPU kernels where pmvis was built without them: compiled by cupy on first use, and launched.

The text is that of the compiled library (csrc/*.cuh); what is here does in Python what
csrc/*_cuda.cu do in C++: make room for results, choose a kernel, and count its blocks. Operands
come checked from the functions of this package.

    register(fragment)  # the operators of `library` then run on CUDA tensors
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmvis_core import native
from pmvis_core.errors import ResourceError

Size = tuple[int, int, int]
"""Blocks of a grid, or threads of a block."""

_TYPES = {
    torch.float16: "pmvis::Half",
    torch.bfloat16: "pmvis::Bfloat",
    torch.float32: "float",
    torch.float64: "double",
}
# These are those of the text: csrc/deformable_attention.cuh, pairwise.cuh and mask_runs.cuh.
_THREADS, _QUERIES, _LEVELS = 128, 4, 8
_TILE, _COLOUR_ROWS = (32, 8, 1), 16
_STRIPS = 8


def register(fragment: Any) -> None:
    """Give the operators of a `torch.library.Library` their kernels for CUDA tensors."""
    for name, function in _KERNELS.items():
        fragment.impl(name, function, "CUDA")


def launch(
    text: str, kernel: str, grid: Size, block: Size, arguments: Sequence[Any], shared: int = 0
) -> None:
    """Run a kernel on the current stream of the first tensor's device.

    Args:
        text: file of csrc/ that holds it.
        kernel: its name with what its template takes.
        grid: blocks.
        block: threads of a block.
        arguments: tensors, None for no tensor, and numpy numbers of the types that it declares.
        shared: bytes of shared memory beyond those that it declares.

    Raises:
        ResourceError: cupy cannot compile or load it.
    """
    import cupy

    tensor = next(item for item in arguments if isinstance(item, Tensor))
    index = tensor.device.index
    numbers = tuple(_number(item) for item in arguments)
    with cupy.cuda.Device(index):
        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(index).cuda_stream, index)
        with stream:
            _function(text, kernel, index)(grid, block, numbers, shared_mem=shared)


@functools.lru_cache(maxsize=256)
def _function(text: str, kernel: str, device: int) -> Any:
    """Compile a kernel for a device; cupy keeps what it compiled on the disk."""
    import cupy

    folder = native.find_kernels()
    try:
        module = cupy.RawModule(
            code=f'#include "{text}"\n',
            options=("-std=c++17", f"-I{folder}"),
            name_expressions=(kernel,),
        )
        return module.get_function(kernel)
    except Exception as error:
        raise ResourceError(
            f"cupy cannot compile `{kernel}` of `{text}`: {error}",
            "PMVIS_NATIVE=torch does without; `pmvis doctor` tells what else there is",
        ) from error


def _number(item: Any) -> Any:
    """Return an argument as cupy takes it."""
    if item is None:
        return np.uint64(0)
    return np.uint64(item.data_ptr()) if isinstance(item, Tensor) else item


def deformable_attention(
    value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """Return (B, Q, M * D); see the operator's schema."""
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    output = value.new_empty((batch, queries, heads * channels))
    lanes, group = _lanes(channels, 16 // value.element_size(), (4, 8, 16))
    slices = _blocks(channels, lanes * group)
    if output.numel():
        launch(
            "deformable_attention.cuh",
            f"pmvis::deformable_forward<{_TYPES[value.dtype]}, {lanes}, {group}>",
            (_blocks(queries, _THREADS // group), batch * heads * slices, 1),
            (_THREADS, 1, 1),
            (value, locations, weights, output, *_sizes(shapes, value, locations)),
        )
    return output


def deformable_attention_backward(
    grad: Tensor, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor, bound: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights; see the operator's schema."""
    kind = _TYPES[value.dtype]
    if bound.numel():
        sums, name, limit = torch.zeros_like(value, dtype=torch.int64), "long long", bound
    else:
        sums, name, limit = (
            torch.zeros_like(value, dtype=weights.dtype),
            _TYPES[weights.dtype],
            None,
        )
    slopes, gates = torch.empty_like(locations), torch.empty_like(weights)
    heads, channels = value.shape[2:]
    lanes, group = _lanes(channels, 16 // weights.element_size(), (8, 16))
    if weights.numel() and grad.numel():
        launch(
            "deformable_attention.cuh",
            f"pmvis::deformable_backward<{kind}, {name}, {lanes}, {group}>",
            (_blocks(weights.shape[1], _QUERIES * (_THREADS // group)), len(value) * heads, 1),
            (_THREADS, 1, 1),
            (
                *(grad, value, locations, weights, limit, sums, slopes, gates),
                *_sizes(shapes, value, locations),
            ),
        )
    if sums.dtype == value.dtype or not value.numel():
        return sums.to(value.dtype), slopes, gates
    rounded = torch.empty_like(value)
    launch(
        "deformable_attention.cuh",
        f"pmvis::deformable_round<{kind}, {name}>",
        (min(_blocks(value.numel(), 256), 1 << 20), 1, 1),
        (256, 1, 1),
        (sums, limit, rounded, np.int64(value.numel())),
    )
    return rounded, slopes, gates


def lab_similarity(images: Tensor, kernel: int, dilation: int) -> Tensor:
    """Return (B, K, H, W); see the operator's schema."""
    batch, _, height, width = images.shape
    output = images.new_empty((batch, kernel * kernel - 1, height, width), dtype=torch.float32)
    reach = kernel // 2 * dilation
    cells = (_TILE[0] + 2 * reach) * (_COLOUR_ROWS + 2 * reach)
    if output.numel():
        launch(
            "pairwise.cuh",
            "pmvis::lab_similarity",
            (_blocks(width, _TILE[0]), _blocks(height, _COLOUR_ROWS), batch),
            _TILE,
            (images, output, *map(np.int32, (height, width, kernel // 2, dilation))),
            shared=12 * cells,
        )
    return output


def pairwise_terms(
    logits: Tensor,
    similarity: Tensor,
    image_index: Tensor,
    cells: Tensor,
    valid: Tensor,
    threshold: float,
    dilation: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return terms, edges and slopes; see the operator's schema."""
    number, height, width = logits.shape
    images = len(similarity)
    sizes = [np.int32(size) for size in (height, width, dilation)]
    across, down = _blocks(width, _TILE[0]), _blocks(height, _TILE[1])
    asks = torch.empty((images, height, width), dtype=torch.uint8, device=logits.device)
    terms, edges = logits.new_zeros(number), logits.new_zeros(number)
    gradient = torch.empty_like(logits) if with_gradient else logits.new_empty(0)
    if not logits.numel() or not images:
        return terms, edges, gradient
    gate = valid if valid.numel() else None
    arguments = (similarity, gate, asks, np.float32(threshold), *sizes)
    launch("pairwise.cuh", "pmvis::asked_neighbours", (across, down, images), _TILE, arguments)
    tile_terms = logits.new_empty((number, down * across), dtype=torch.float64)
    tile_edges = logits.new_empty((number, down * across), dtype=torch.int64)
    kind = _TYPES[logits.dtype]
    launch(
        "pairwise.cuh",
        f"pmvis::pairwise_tiles<{kind}>",
        (across, down, number),
        _TILE,
        (
            *(logits, asks, image_index, cells, gradient if with_gradient else None),
            *(tile_terms, tile_edges, np.int32(images), *sizes),
        ),
        shared=3 * logits.element_size() * (_TILE[0] + 2 * dilation) * (_TILE[1] + 2 * dilation),
    )
    launch(
        "pairwise.cuh",
        f"pmvis::pairwise_sums<{kind}>",
        (number, 1, 1),
        (_TILE[0] * _TILE[1], 1, 1),
        (tile_terms, tile_edges, np.int32(down * across), terms, edges),
    )
    return terms, edges, gradient


def mask_events(logits: Tensor, height: int, width: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Return words and counts; see the operator's schema."""
    number, h, w = logits.shape
    strips = _blocks(height, 32)
    words = logits.new_empty((number, width, strips), dtype=torch.int32)
    counts = torch.empty_like(words)
    scales = (np.float32(h) / np.float32(height), np.float32(w) / np.float32(width))
    if words.numel():
        launch(
            "mask_runs.cuh",
            "pmvis::mask_events",
            (_blocks(width, 32), _blocks(strips, _STRIPS), number),
            (32, _STRIPS, 1),
            (
                *(logits, words, counts, *map(np.int32, (h, w, height, width)), *scales),
                np.float32(threshold),
            ),
        )
    return words, counts


def mask_places(words: Tensor, starts: Tensor, number: int, height: int) -> Tensor:
    """Return the places; see the operator's schema."""
    places = words.new_empty(number)
    if number:
        _, width, strips = words.shape
        numbers = (np.int64(words.numel()), *map(np.int32, (strips, width, height)))
        launch(
            "mask_runs.cuh",
            "pmvis::mask_places",
            (_blocks(words.numel(), 256), 1, 1),
            (256, 1, 1),
            (words, starts, places, *numbers),
        )
    return places


def _lanes(channels: int, most: int, groups: Sequence[int]) -> tuple[int, int]:
    """Return the channels of a lane and the lanes of a group."""
    if channels % most:
        return 1, 32
    return most, next((group for group in groups if channels // most <= group), groups[-1])


def _sizes(shapes: Tensor, value: Tensor, locations: Tensor) -> list[Any]:
    """Return the numbers of a call of deformable attention, as its kernels declare them."""
    levels = [height << 32 | width for height, width in shapes.tolist()]
    _, tokens, heads, channels = value.shape
    numbers = (len(levels), tokens, heads, channels, locations.shape[1], locations.shape[4])
    padded = levels + [0] * (_LEVELS - len(levels))
    return [*map(np.int64, padded), *map(np.int32, numbers)]


def _blocks(number: int, each: int) -> int:
    """Return how many blocks cover a number of things."""
    return -(-number // each)


_KERNELS: dict[str, Callable[..., Any]] = {
    "deformable_attention": deformable_attention,
    "deformable_attention_backward": deformable_attention_backward,
    "lab_similarity": lab_similarity,
    "pairwise_terms": pairwise_terms,
    "mask_events": mask_events,
    "mask_places": mask_places,
}
