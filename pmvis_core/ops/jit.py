"""The GPU kernels where pmvis was built without them: compiled by cupy on first use, and launched.

The text is that of the compiled library (csrc/ops); what is here does in Python what the
files operators.cu do in C++: make room for results, choose a kernel, and count its blocks. Operands
come checked from the functions of this package.

    register(fragment, KERNELS)  # the operators of `library` then run on CUDA tensors
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
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
_DEFORMABLE = "ops/deformable_attention/kernels.cuh"
_PAIRWISE = "ops/pairwise/kernels.cuh"
_CLIPS = "ops/clip_pairwise/kernels.cuh"
_MASKS = "ops/mask_runs/stacks.cuh"
# These are those of the text.
_THREADS, _QUERIES, _LEVELS = 128, 4, 8
_TILE, _COLOUR_ROWS = (32, 8, 1), 16
_STRIPS, _FOLD = 8, 256
_STEPS, _STEP_OFFSET = 16, 1 << 11


def register(fragment: Any, kernels: Mapping[str, Callable[..., Any]]) -> None:
    """Give the operators of a `torch.library.Library` their kernels for CUDA tensors."""
    for name, function in kernels.items():
        fragment.impl(name, function, "CUDA")


def launch(
    text: str, kernel: str, grid: Size, block: Size, arguments: Sequence[Any], shared: int = 0
) -> None:
    """Run a kernel on the current stream of the first tensor's device.

    Args:
        text: file below csrc/ that holds or includes it.
        kernel: its name with what its template takes.
        grid: blocks.
        block: threads of a block.
        arguments: tensors, None for no tensor, and numpy numbers of the types that it declares.
        shared: bytes of shared memory beyond those that it declares.

    Raises:
        ValueError: the tensors are on different devices.
        ResourceError: cupy cannot compile or load it.
    """
    import cupy

    devices = {item.device for item in arguments if isinstance(item, Tensor)}
    if len(devices) != 1:
        raise ValueError(f"`{kernel}`: tensors are on {sorted(map(str, devices))}, expected one")
    index = devices.pop().index
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
    return _attend(value, shapes, None, locations, weights, None)


def fused_deformable_attention(
    value: Tensor,
    shapes: Tensor,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding: Tensor,
) -> Tensor:
    """Return (B, Q, M * D); see the operator's schema."""
    return _attend(value, shapes, references, offsets, logits, padding)


def _attend(
    value: Tensor,
    shapes: Tensor,
    references: Tensor | None,
    places: Tensor,
    scores: Tensor,
    padding: Tensor | None,
) -> Tensor:
    """Return (B, Q, M * D), fused where there are references."""
    batch, _, heads, channels = value.shape
    queries = places.shape[1]
    output = value.new_empty((batch, queries, heads * channels))
    lanes, group = _lanes(channels, 16 // value.element_size(), (4, 8, 16))
    slices = _blocks(channels, lanes * group)
    if output.numel():
        kinds = f"{_TYPES[value.dtype]}, {lanes}, {group}, {_word(references is not None)}"
        launch(
            _DEFORMABLE,
            f"pmvis::deformable_forward<{kinds}>",
            (_blocks(queries, _THREADS // group), batch * heads * slices, 1),
            (_THREADS, 1, 1),
            (
                *(value, references, places, scores, _some(padding), output),
                *_sizes(shapes, value, places, references),
            ),
        )
    return output


def deformable_attention_backward(
    grad: Tensor, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor, bound: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights; see the operator's schema."""
    operands = (value, shapes, None, locations, weights, None)
    sums, _, slopes, gates = _attend_backward(grad, *operands, bound, False)
    return sums, slopes, gates


def fused_deformable_attention_backward(
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
    """Return the gradients of value, references, offsets, logits; see the operator's schema."""
    operands = (value, shapes, references, offsets, logits, padding)
    return _attend_backward(grad, *operands, bound, with_references)


def _attend_backward(
    grad: Tensor,
    value: Tensor,
    shapes: Tensor,
    references: Tensor | None,
    places: Tensor,
    scores: Tensor,
    padding: Tensor | None,
    bound: Tensor,
    with_references: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of value, references (each head's), places and scores."""
    sums = torch.zeros_like(value, dtype=torch.int64 if bound.numel() else scores.dtype)
    name = "long long" if bound.numel() else _TYPES[scores.dtype]
    slopes, gates = torch.empty_like(places), torch.empty_like(scores)
    shares = scores.new_empty(0)
    if references is not None and with_references:
        shares = scores.new_empty((*scores.shape[:4], references.shape[3]))
    heads, channels = value.shape[2:]
    lanes, group = _lanes(channels, 16 // scores.element_size(), (8, 16))
    if scores.numel() and grad.numel():
        fused = _word(references is not None)
        launch(
            _DEFORMABLE,
            f"pmvis::deformable_backward<{_TYPES[value.dtype]}, {name}, {lanes}, {group}, {fused}>",
            (_blocks(scores.shape[1], _QUERIES * (_THREADS // group)), len(value) * heads, 1),
            (_THREADS, 1, 1),
            (
                *(grad, value, references, places, scores, _some(padding), _some(bound)),
                *(sums, _some(shares), slopes, gates),
                *_sizes(shapes, value, places, references),
            ),
        )
    else:
        for slope in (slopes, gates, shares):
            slope.zero_()
    return _rounded(sums, value, bound), shares, slopes, gates


def _rounded(sums: Tensor, value: Tensor, bound: Tensor) -> Tensor:
    """Return sums, whole multiples where there is a bound, in the type of value."""
    if sums.dtype == value.dtype or not value.numel():
        return sums.to(value.dtype)
    output = torch.empty_like(value)
    kinds = f"{_TYPES[value.dtype]}, {_TYPES.get(sums.dtype, 'long long')}"
    launch(
        _DEFORMABLE,
        f"pmvis::deformable_round<{kinds}>",
        (min(_blocks(value.numel(), 256), 1 << 20), 1, 1),
        (256, 1, 1),
        (sums, _some(bound), output, np.int64(value.numel())),
    )
    return output


def lab_similarity(images: Tensor, kernel: int, dilation: int) -> Tensor:
    """Return (B, K, H, W); see the operator's schema."""
    batch, _, height, width = images.shape
    output = images.new_empty((batch, kernel * kernel - 1, height, width), dtype=torch.float32)
    reach = kernel // 2 * dilation
    cells = (_TILE[0] + 2 * reach) * (_COLOUR_ROWS + 2 * reach)
    if output.numel():
        launch(
            _PAIRWISE,
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
    launch(_PAIRWISE, "pmvis::asked_neighbours", (across, down, images), _TILE, arguments)
    tile_terms = logits.new_empty((number, down * across), dtype=torch.float64)
    tile_edges = logits.new_empty((number, down * across), dtype=torch.int64)
    kind = _TYPES[logits.dtype]
    launch(
        _PAIRWISE,
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
        _PAIRWISE,
        f"pmvis::pairwise_sums<{kind}>",
        (number, 1, 1),
        (_TILE[0] * _TILE[1], 1, 1),
        (tile_terms, tile_edges, np.int32(down * across), terms, edges),
    )
    return terms, edges, gradient


def lab_means(images: Tensor, stride: int, block: int) -> Tensor:
    """Return (B, 3, h, w); see the operator's schema."""
    height, width = images.shape[2:]
    rows, columns = (height - block) // stride + 1, (width - block) // stride + 1
    means = images.new_empty((len(images), 3, rows, columns), dtype=torch.float32)
    if means.numel():
        sizes = map(np.int32, (height, width, rows, columns, stride, block))
        _launch_tiles("lab_means", (rows, columns, len(images)), (images, means, *sizes))
    return means


def clip_pairs(
    colours: Tensor,
    patches: Tensor,
    video_index: Tensor,
    cells: Tensor,
    shifts: Tensor,
    steps: Tensor,
    threshold: float,
    patch_weight: float,
) -> Tensor:
    """Return (N, T, H, W); see the operator's schema."""
    number, frames = cells.shape[:2]
    videos, _, _, height, width = colours.shape
    pairs = colours.new_empty((number, frames, height, width), dtype=torch.int16)
    around = patches.shape[2:] if patches.numel() else (0, 0, 0)
    sizes = map(np.int32, (videos, frames, height, width, *around, len(steps)))
    weights = map(np.float32, (threshold, patch_weight))
    gate = patches if patches.numel() else None
    tensors = (colours, gate, video_index, cells, shifts, pairs)
    if pairs.numel():
        arguments = (*tensors, *sizes, *weights, *_packed(steps))
        _launch_tiles("clip_pairs", (height, width, number * frames), arguments)
    return pairs


def clip_terms(
    logits: Tensor, pairs: Tensor, shifts: Tensor, steps: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return terms, edges and slopes; see the operator's schema."""
    number, frames, height, width = logits.shape
    count = frames * _blocks(width, _TILE[0]) * _blocks(height, _TILE[1])
    terms, edges = logits.new_zeros(number), logits.new_zeros(number)
    gradient = torch.empty_like(logits) if with_gradient else logits.new_empty(0)
    if not logits.numel():
        return terms, edges, gradient
    tile_terms = logits.new_empty((number, count), dtype=torch.float64)
    tile_edges = logits.new_empty((number, count), dtype=torch.int64)
    kind = _TYPES[logits.dtype]
    sizes = map(np.int32, (frames, height, width, len(steps)))
    tensors = (logits, pairs, shifts, gradient if with_gradient else None, tile_terms, tile_edges)
    arguments = (*tensors, *sizes, *_packed(steps))
    _launch_tiles(f"clip_tiles<{kind}>", (height, width, number * frames), arguments)
    launch(
        _PAIRWISE,
        f"pmvis::pairwise_sums<{kind}>",
        (number, 1, 1),
        (_TILE[0] * _TILE[1], 1, 1),
        (tile_terms, tile_edges, np.int32(count), terms, edges),
    )
    return terms, edges, gradient


def _launch_tiles(kernel: str, size: Size, arguments: Sequence[Any]) -> None:
    """Run a kernel of clips with a thread for each cell of maps of (height, width, number)."""
    grid = (_blocks(size[1], _TILE[0]), _blocks(size[0], _TILE[1]), size[2])
    launch(_CLIPS, f"pmvis::{kernel}", grid, _TILE, arguments)


def _packed(steps: Tensor) -> list[Any]:
    """Return the neighbours of clips as their kernels declare them, two in a number."""
    packed = [0] * (_STEPS // 2)
    for k, (frames, dy, dx) in enumerate(steps.tolist()):
        bits = frames << 24 | (dy + _STEP_OFFSET) << 12 | (dx + _STEP_OFFSET)
        packed[k // 2] |= bits << (32 * (k % 2))
    return [np.int64(number) for number in packed]


def mask_events(
    logits: Tensor,
    rows: Tensor,
    columns: Tensor,
    height: int,
    width: int,
    threshold: float,
    changes: bool,
) -> tuple[Tensor, Tensor]:
    """Return words and counts; see the operator's schema."""
    number, h, w = logits.shape
    picked = rows.numel() > 0
    size = (len(rows), len(columns)) if picked else (height, width)
    words = logits.new_empty((number, size[1], _blocks(size[0], 32)), dtype=torch.int32)
    counts = torch.empty_like(words)
    scales = (np.float32(h) / np.float32(height), np.float32(w) / np.float32(width))
    picks = (rows, columns) if picked else (None, None)
    numbers = (*map(np.int32, (h, w, *size)), *scales, np.float32(threshold), np.int32(changes))
    if words.numel():
        _launch_words("mask_events", words, (logits, *picks, words, counts, *numbers))
    return words, counts


def mask_pack(masks: Tensor) -> Tensor:
    """Return the words; see the operator's schema."""
    number, height, width = masks.shape
    words = masks.new_empty((number, width, _blocks(height, 32)), dtype=torch.int32)
    if words.numel():
        _launch_words("mask_pack", words, (masks, words, np.int32(height), np.int32(width)))
    return words


def _launch_words(kernel: str, words: Tensor, arguments: Sequence[Any]) -> None:
    """Run a kernel with a thread for each word."""
    number, width, strips = words.shape
    grid = (_blocks(width, 32), _blocks(strips, _STRIPS), number)
    launch(_MASKS, f"pmvis::{kernel}", grid, (32, _STRIPS, 1), arguments)


def mask_extents(words: Tensor) -> Tensor:
    """Return areas and boxes; see the operator's schema."""
    number, width, strips = words.shape
    extents = words.new_empty((number, 5), dtype=torch.int64)
    if number:
        arguments = (words, extents, np.int32(strips), np.int32(width))
        launch(_MASKS, "pmvis::mask_extents", (number, 1, 1), (_FOLD, 1, 1), arguments)
    return extents


def mask_overlaps(words: Tensor, others: Tensor) -> Tensor:
    """Return common pixels; see the operator's schema."""
    overlaps = words.new_empty((len(words), len(others)), dtype=torch.int64)
    if overlaps.numel():
        grid = (len(others), len(words), 1)
        arguments = (words, others, overlaps, np.int32(words.shape[1] * words.shape[2]))
        launch(_MASKS, "pmvis::mask_overlaps", grid, (_FOLD, 1, 1), arguments)
    return overlaps


def mask_places(words: Tensor, starts: Tensor, number: int, height: int) -> Tensor:
    """Return the places; see the operator's schema."""
    places = words.new_empty(number)
    if number:
        _, width, strips = words.shape
        numbers = (np.int64(words.numel()), *map(np.int32, (strips, width, height)))
        launch(
            _MASKS,
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


def _some(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor that is not empty, else None."""
    return tensor if tensor is not None and tensor.numel() else None


def _word(value: bool) -> str:
    """Return what C++ calls it."""
    return "true" if value else "false"


def _sizes(
    shapes: Tensor, value: Tensor, locations: Tensor, references: Tensor | None = None
) -> list[Any]:
    """Return the numbers of a call of deformable attention, as its kernels declare them."""
    levels = [height << 32 | width for height, width in shapes.tolist()]
    _, tokens, heads, channels = value.shape
    size = 0 if references is None else references.shape[3]
    queries, points = locations.shape[1], locations.shape[4]
    numbers = (len(levels), tokens, heads, channels, queries, points, size)
    padded = levels + [0] * (_LEVELS - len(levels))
    return [*map(np.int64, padded), *map(np.int32, numbers)]


def _blocks(number: int, each: int) -> int:
    """Return how many blocks cover a number of things."""
    return -(-number // each)


KERNELS: dict[str, Callable[..., Any]] = {
    "clip_pairs": clip_pairs,
    "clip_terms": clip_terms,
    "deformable_attention": deformable_attention,
    "deformable_attention_backward": deformable_attention_backward,
    "lab_means": lab_means,
    "fused_deformable_attention": fused_deformable_attention,
    "fused_deformable_attention_backward": fused_deformable_attention_backward,
    "lab_similarity": lab_similarity,
    "pairwise_terms": pairwise_terms,
    "mask_events": mask_events,
    "mask_extents": mask_extents,
    "mask_overlaps": mask_overlaps,
    "mask_pack": mask_pack,
    "mask_places": mask_places,
}
