"""Affinity and pairwise loss of clips (STPA of BoxVIS, arXiv:2303.14618, section 3), fused.

Pixels that look alike should both be foreground or both be background: neighbours in a frame of
which one at least lies in the instance's box, and neighbours across a frame and the next, both in
their boxes, where the next frame is read as far away as the box's centre went. Which pairs count
is found once (`clip_pairs`, one bit a pair) and serves the outputs of all decoder layers; terms and
their slopes are computed in one pass (`clip_pairwise_terms`). Nothing of the size of neighbours x
instances x pixels is stored.

    colours = lab_means(images.flatten(0, 1), stride=2).unflatten(0, images.shape[:2])
    shifts = clip_shifts(boxes, (480, 864), colours.shape[-2:])
    cells = clip_cells(boxes, *colours.shape[-2:], stride=2)
    pairs = clip_pairs(colours, video_index, cells, shifts, CLIP_STEPS, threshold=0.3)
    loss = clip_pairwise_loss(logits, pairs, shifts, CLIP_STEPS, video_index)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pmvis_core.ops.library import Backend, choose, operator
from pmvis_core.ops.pairwise import cell_masks, check_images, pair_terms, rgb_to_lab

Step = tuple[int, int, int]
"""Frames (0, or 1 for the next), rows and columns from a pixel to its neighbour."""
CLIP_STEPS: tuple[Step, ...] = (
    *((0, 0, 2), (0, 2, 0), (1, 0, 0)),
    *((1, 0, 2), (1, 2, 0), (1, 0, -2), (1, -2, 0)),
)
"""The published seven neighbours, in cells of the grid."""
MAX_STEPS = 15
"""Neighbours that a pixel's bits have room for."""
_FARTHEST = 1 << 10
"""Rows or columns to a neighbour that the kernels take."""
_NOWHERE = 1 << 24
"""A shift beyond every map."""
_MAX_MAPS = 65535
"""Instances x frames that a GPU's kernels take at once."""
_PAIRS_AT_ONCE = 1 << 14
"""Pairs whose patches the twin compares at a time."""


def lab_means(
    images: Tensor, stride: int, block: int = 1, *, backend: Backend | None = None
) -> Tensor:
    """Return the mean colour in CIE LAB of a block of pixels every ``stride`` pixels.

    With ``block`` 2 and ``stride`` 4 these are every second pixel of the colours at half size.

    Args:
        images: (B, 3, H, W) uint8, RGB.
        stride: pixels from block to block; the first lies in the corner.
        block: its side in pixels, at most ``stride``.
        backend: what carries the call; None for the best.

    Returns:
        (B, 3, h, w) float32, of the blocks that lie inside: L in 0..100, a and b.

    Raises:
        ValueError: the images have another shape or type or are smaller than a block, or there is
            no such block.
        ResourceError: the wished backend cannot carry this call.
    """
    check_images(images)
    if not 1 <= block <= stride or min(images.shape[2:]) < block:
        raise ValueError(
            f"stride and block are {stride} and {block} for images of "
            f"{images.shape[2]}x{images.shape[3]}, expected 1 <= block <= stride, block inside"
        )
    obstacle = (
        "the stride is more than 64" if stride > 64 else _too_many(images.device.type, images)
    )
    if choose("lab_means", backend, images.device.type, obstacle) == "torch":
        return lab_means_reference(images, stride, block)
    means: Tensor = operator("lab_means")(images.contiguous(), stride, block)
    return means


def lab_means_reference(images: Tensor, stride: int, block: int = 1) -> Tensor:
    """Do the same in plain torch, on any device: the twin and oracle of the kernels."""
    wide = torch.float32 if images.device.type == "mps" else torch.float64
    corners = images.unfold(2, block, stride).unfold(3, block, stride)
    rows, columns = corners.shape[2:4]
    size = (len(images), 3, rows * block, columns * block)
    lab = rgb_to_lab(corners.permute(0, 1, 2, 4, 3, 5).reshape(size).to(wide))
    means = lab.view(len(images), 3, rows, block, columns, block).mean((3, 5))
    return means.float()


@torch.no_grad()
def clip_pairs(
    colours: Tensor,
    video_index: Tensor,
    cells: Tensor,
    shifts: Tensor,
    steps: Sequence[Step],
    threshold: float,
    *,
    patches: Tensor | None = None,
    patch_weight: float = 0.5,
    backend: Backend | None = None,
) -> Tensor:
    """Return which pixels of each instance and their neighbours are pairs that should agree.

    The neighbour of (t, y, x) at step (0, dy, dx) is (t, y + dy, x + dx), and one of the two must
    lie in the box; at (1, dy, dx) it is ((t + 1) mod T, y + dy, x + dx), moved by the shift, and
    both must lie in the boxes of their frames. A pair counts where
    exp(-|difference in LAB| / 2) + patch_weight * (mean cosine of the patches) >= threshold.

    Args:
        colours: (B, T, 3, H, W) float32 in LAB; see `lab_means`.
        video_index: (N,) int64, the clip of each instance.
        cells: (N, T, 4) int64 boxes in cells of the grid, x0, y0, x1, y1, far edge exclusive,
            empty where the instance is absent; see `clip_cells`.
        shifts: (N, T, 2) int64 rows and columns from each frame to the next; see `clip_shifts`.
        steps: K neighbours.
        threshold: least similarity of a pair.
        patches: (B, T, C, h, w) features at twice the grid's resolution (h = 2 H or 2 H - 1); the
            patch of a cell is the 3 x 3 vectors around feature (2 y, 2 x), zeros beyond the map.
            None: colours alone decide.
        patch_weight: weight of the patches' similarity.
        backend: what carries the call; None for the best.

    Returns:
        (N, T, H, W) int16, bit k for neighbour k. A clip of one frame has no pairs across frames.

    Raises:
        ValueError: shapes do not fit together.
        ResourceError: the wished backend cannot carry this call.
    """
    call = ClipCall(colours.float(), _unit(patches), video_index, cells, shifts, tuple(steps))
    _check_pairs(call)
    device = colours.device.type
    if choose("clip_pairs", backend, device, _too_many(device, cells)) == "torch":
        return clip_pairs_reference(call, threshold, patch_weight)
    tensors = (t.contiguous() for t in (*call[:2], video_index, cells, shifts))
    pairs: Tensor = operator("clip_pairs")(
        *tensors, _steps_tensor(call.steps), threshold, patch_weight
    )
    return pairs


def clip_pairwise_loss(
    logits: Tensor,
    pairs: Tensor,
    shifts: Tensor,
    steps: Sequence[Step],
    video_index: Tensor,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Return the mean term of each clip's pairs, averaged over the clips that have any.

    Args:
        logits: as the other arguments, of `clip_pairwise_terms`.
        pairs: see there.
        shifts: see there.
        steps: see there.
        video_index: (N,) int64, the clip of each instance.
        backend: what carries the call; None for the best.

    Returns:
        A scalar, differentiable in ``logits``; 0 where there is no pair.
    """
    terms, edges = clip_pairwise_terms(logits, pairs, shifts, steps, backend=backend)
    if not len(logits):
        return terms.sum()
    # As many rooms as instances are enough, whatever the indices are.
    _, clip = video_index.unique(return_inverse=True)
    room = terms.new_zeros(len(terms))
    sums, numbers = room.index_add(0, clip, terms), room.index_add(0, clip, edges)
    return (sums / numbers.clamp_min(1)).sum() / (numbers > 0).sum().clamp_min(1)


def clip_pairwise_terms(
    logits: Tensor,
    pairs: Tensor,
    shifts: Tensor,
    steps: Sequence[Step],
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the disagreement of an instance's pairs, and their number.

    With p and q the foreground probabilities of a pair, a term is -log(p q + (1 - p)(1 - q)).

    Args:
        logits: (N, T, H, W) float on the grid; half types are computed in float32.
        pairs: (N, T, H, W) int16, from `clip_pairs` with the same shifts and steps. Bits of
            neighbours beyond the map do not count.
        shifts: (N, T, 2) int64.
        steps: K neighbours.
        backend: what carries the call; None for the best.

    Returns:
        (N,) sums of terms, differentiable in ``logits``, and (N,) numbers of pairs of their type.

    Raises:
        ValueError: shapes do not fit together.
        ResourceError: the wished backend cannot carry this call.
    """
    _check_terms(logits, pairs, shifts, steps)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    device = logits.device.type
    if choose("clip_pairwise_loss", backend, device, _too_many(device, shifts)) == "torch":
        return clip_pairwise_terms_reference(logits, pairs, shifts, steps)
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    terms, edges, _ = operator("clip_terms")(
        logits.contiguous(),
        pairs.contiguous(),
        shifts.contiguous(),
        _steps_tensor(steps),
        with_gradient,
    )
    return terms, edges


class ClipCall(NamedTuple):
    """Checked operands of `clip_pairs`."""

    colours: Tensor
    """(B, T, 3, H, W) float32."""
    patches: Tensor
    """(B, T, h, w, C) float32 unit vectors, or (0,)."""
    video_index: Tensor
    """(N,)"""
    cells: Tensor
    """(N, T, 4)"""
    shifts: Tensor
    """(N, T, 2)"""
    steps: tuple[Step, ...]
    """K neighbours."""


def clip_pairs_reference(call: ClipCall, threshold: float, patch_weight: float) -> Tensor:
    """Find pairs in plain torch, on any device: the twin and oracle of the kernels."""
    frames, (height, width) = call.colours.shape[1], call.colours.shape[3:]
    number = len(call.cells)
    inside = cell_masks(call.cells.flatten(0, 1), height, width).view(-1, frames, height, width)
    pairs = torch.zeros(number, frames, height, width, dtype=torch.int16, device=inside.device)
    if not pairs.numel():
        return pairs
    pixels = call.colours.permute(0, 1, 3, 4, 2)
    for k, step in enumerate(call.steps):
        if step[0] and frames == 1:
            continue
        candidates = inside if step[0] else inside | _moved(inside, *step[1:])
        here, there = _ends(candidates, call.shifts, step)
        if step[0]:
            both = inside[there]
            here, there = tuple(i[both] for i in here), tuple(i[both] for i in there)
        clip = call.video_index[here[0]]
        apart = pixels[(clip, *here[1:])] - pixels[(clip, *there[1:])]
        similar = (-(apart * apart).sum(-1).sqrt() / 2).exp()
        if call.patches.ndim == 5:
            similar = similar + patch_weight * _patch_similarity(call, here, there)
        chosen = tuple(i[similar >= threshold] for i in here)
        pairs[chosen] += 1 << k
    return pairs


def clip_pairwise_terms_reference(
    logits: Tensor, pairs: Tensor, shifts: Tensor, steps: Sequence[Step]
) -> tuple[Tensor, Tensor]:
    """Do the same as `clip_pairwise_terms` in plain torch, on any device."""
    zeros = logits.new_zeros(len(logits))
    terms, edges = zeros, zeros
    for k, step in enumerate(steps):
        here, there = _ends((pairs >> k & 1).bool(), shifts, step)
        terms = terms + zeros.index_add(0, here[0], pair_terms(logits[here], logits[there]))
        edges = edges + zeros.index_add(0, here[0], torch.ones_like(here[0], dtype=logits.dtype))
    return terms, edges


def clip_cells(boxes: Tensor, height: int, width: int, stride: int, block: int = 1) -> Tensor:
    """Return the cells of a grid whose blocks lie in boxes.

    As published, pixel i of an axis is inside where floor(x1) < i <= ceil(x2), and all pixels of a
    block must be.

    Args:
        boxes: (N, T, 4) xyxy in pixels of the padded clip; 0 0 0 0 where there is none.
        height: of the grid.
        width: likewise.
        stride: pixels from cell to cell.
        block: side of a cell's block in pixels.

    Returns:
        (N, T, 4) int64 first column, first row, and the column and row after the last.
    """
    low = (boxes[..., :2].floor() / stride).floor() + 1
    high = ((boxes[..., 2:].ceil() - (block - 1)) / stride).floor() + 1
    ends = boxes.new_tensor([width, height] * 2)
    return torch.cat([low, high], -1).clamp_min(0).minimum(ends).long()


def clip_shifts(boxes: Tensor, size: tuple[int, int], grid: Sequence[int]) -> Tensor:
    """Return how far the centres of boxes move to the next frame, the last one's being the first.

    Args:
        boxes: (N, T, 4) xyxy in pixels of the padded clip; 0 0 0 0 where there is none.
        size: (height, width) of the padded clip.
        grid: (height, width) of the grid.

    Returns:
        (N, T, 2) int64 rows and columns in cells, rounded; beyond every map where a box is missing
        at either end, or where it moves across the whole map but two cells: there are no pairs
        then.
    """
    cells = boxes.new_tensor([grid[0] / size[0], grid[1] / size[1]])
    centres = (boxes[..., [1, 0]] + boxes[..., [3, 2]]) / 2 * cells
    moves = -(centres - centres.roll(-1, 1)).round()
    present = (boxes[..., 2:] > boxes[..., :2]).all(-1)
    far = moves.abs() >= boxes.new_tensor([side - 2 for side in grid])
    lost = far.any(-1) | ~present | ~present.roll(-1, 1)
    return moves.masked_fill(lost[..., None], _NOWHERE).long()


def _ends(chosen: Tensor, shifts: Tensor, step: Step) -> tuple[tuple[Tensor, ...], ...]:
    """Return (n, t, y, x) of chosen pixels with a neighbour in the map, and of the neighbours."""
    _, frames, height, width = chosen.shape
    n, t, y, x = chosen.nonzero(as_tuple=True)
    shift = shifts[n, t] * step[0]
    v, u = y + step[1] + shift[:, 0], x + step[2] + shift[:, 1]
    good = (v >= 0) & (v < height) & (u >= 0) & (u < width)
    there = (n, (t + step[0]) % max(frames, 1), v, u)
    return tuple(i[good] for i in (n, t, y, x)), tuple(i[good] for i in there)


def _moved(inside: Tensor, dy: int, dx: int) -> Tensor:
    """Return what lies (dy, dx) away from every pixel of (..., h, w), False beyond."""
    height, width = inside.shape[-2:]
    padded = F.pad(inside, (max(-dx, 0), max(dx, 0), max(-dy, 0), max(dy, 0)))
    return padded[..., max(dy, 0) :, max(dx, 0) :][..., :height, :width]


def _patch_similarity(
    call: ClipCall, here: tuple[Tensor, ...], there: tuple[Tensor, ...]
) -> Tensor:
    """Return the mean cosine of the 3 x 3 vectors around both ends of each pair, 0 without one."""
    height, width = call.patches.shape[2:4]
    parts = [call.colours.new_zeros(0)]
    for rows in torch.arange(len(here[0]), device=here[0].device).split(_PAIRS_AT_ONCE):
        clip = call.video_index[here[0][rows]]
        total = call.colours.new_zeros(len(rows))
        for cell in range(9):
            vectors, whole = [], torch.ones_like(rows, dtype=torch.bool)
            for end in (here, there):
                y, x = 2 * end[2][rows] + cell // 3 - 1, 2 * end[3][rows] + cell % 3 - 1
                whole &= (y >= 0) & (y < height) & (x >= 0) & (x < width)
                place = (clip, end[1][rows], y.clamp(0, height - 1), x.clamp(0, width - 1))
                vectors.append(call.patches[place])
            total += (vectors[0] * vectors[1]).sum(-1) * whole
        parts.append(total / 9)
    return torch.cat(parts)


def _unit(patches: Tensor | None) -> Tensor:
    """Return (B, T, h, w, C) float32 unit vectors, or nothing."""
    if patches is None:
        return torch.empty(0)
    if patches.ndim != 5:
        raise ValueError(f"patches have shape {tuple(patches.shape)}, expected (B, T, C, h, w)")
    return F.normalize(patches.float().permute(0, 1, 3, 4, 2), dim=-1).contiguous()


def _steps_tensor(steps: Sequence[Step]) -> Tensor:
    """Return (K, 3) int64 on the CPU."""
    return torch.tensor(steps, dtype=torch.int64, device="cpu").reshape(-1, 3)


def _too_many(device: str, maps: Tensor) -> str:
    """Say that a GPU's kernels cannot take so many maps, instances x frames or images."""
    number = len(maps) if maps.ndim == 4 else maps.shape[0] * maps.shape[1]
    many = device != "cpu" and number > _MAX_MAPS
    return f"there are more than {_MAX_MAPS} maps" if many else ""


def _problems(steps: Sequence[Step]) -> Iterator[str]:
    """Yield what is wrong with steps."""
    if len(steps) > MAX_STEPS:
        yield f"there are {len(steps)} steps, expected at most {MAX_STEPS}"
    for step in steps:
        if len(step) != 3 or step[0] not in (0, 1) or max(map(abs, step[1:])) > _FARTHEST:
            yield (
                f"a step is {tuple(step)}, expected 0 or 1 frames, and rows and columns within "
                f"{_FARTHEST}"
            )


def _check_steps(steps: Sequence[Step]) -> None:
    """Check the steps."""
    for problem in _problems(steps):
        raise ValueError(problem)


def _check_shifts(shifts: Tensor, size: Sequence[int]) -> None:
    """Check the shifts of (N, T) frames."""
    if shifts.shape != (*size, 2) or shifts.dtype != torch.int64:
        raise ValueError(
            f"shifts are {shifts.dtype} of shape {tuple(shifts.shape)}, expected torch.int64 of "
            f"{(*size, 2)}"
        )


def _check_pairs(call: ClipCall) -> None:
    """Check that the operands of `clip_pairs` fit together."""
    _check_steps(call.steps)
    shape = tuple(call.colours.shape)
    if len(shape) != 5 or shape[2] != 3:
        raise ValueError(f"colours have shape {shape}, expected (B, T, 3, H, W)")
    frames, number = shape[1], len(call.video_index)
    if call.video_index.ndim != 1 or call.cells.shape != (number, frames, 4):
        raise ValueError(
            f"video indices and cells have shapes {tuple(call.video_index.shape)} and "
            f"{tuple(call.cells.shape)}, expected (N,) and (N, {frames}, 4)"
        )
    _check_shifts(call.shifts, (number, frames))
    if {call.video_index.dtype, call.cells.dtype} != {torch.int64}:
        raise ValueError(
            f"video indices and cells are {call.video_index.dtype} and {call.cells.dtype}, "
            "expected torch.int64"
        )
    if call.patches.ndim == 5:
        found = (*call.patches.shape[:2], *((side + 1) // 2 for side in call.patches.shape[2:4]))
        if found != (*shape[:2], *shape[3:]):
            raise ValueError(
                f"patches are of {call.patches.shape[2]}x{call.patches.shape[3]} in "
                f"{tuple(call.patches.shape[:2])} frames, expected twice {shape[3]}x{shape[4]} in "
                f"{shape[:2]}"
            )


def _check_terms(logits: Tensor, pairs: Tensor, shifts: Tensor, steps: Sequence[Step]) -> None:
    """Check that the operands of `clip_pairwise_terms` fit together."""
    _check_steps(steps)
    if logits.ndim != 4 or not logits.is_floating_point():
        raise ValueError(
            f"logits are {logits.dtype} of shape {tuple(logits.shape)}, expected float (N, T, H, W)"
        )
    if pairs.shape != logits.shape or pairs.dtype != torch.int16:
        raise ValueError(
            f"pairs are {pairs.dtype} of shape {tuple(pairs.shape)}, expected int16 of "
            f"{tuple(logits.shape)}"
        )
    _check_shifts(shifts, logits.shape[:2])


def _shape_means(images: Tensor, stride: int, block: int) -> Tensor:
    """Return an empty tensor like the means."""
    height, width = ((side - block) // stride + 1 for side in images.shape[2:])
    return images.new_empty((len(images), 3, height, width), dtype=torch.float32)


def _shape_pairs(
    colours: Tensor,
    patches: Tensor,
    video_index: Tensor,
    cells: Tensor,
    shifts: Tensor,
    steps: Tensor,
    threshold: float,
    patch_weight: float,
) -> Tensor:
    """Return an empty tensor like the pairs."""
    size = (*cells.shape[:2], *colours.shape[3:])
    return colours.new_empty(size, dtype=torch.int16)


def _shape_terms(
    logits: Tensor, pairs: Tensor, shifts: Tensor, steps: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors like terms, edges and gradient."""
    gradient = torch.empty_like(logits) if with_gradient else logits.new_empty(0)
    return logits.new_empty(len(logits)), logits.new_empty(len(logits)), gradient


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep the slopes."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Scale the slopes of each instance's terms."""
    (slopes,) = ctx.saved_tensors
    return slopes * grad[:, None, None, None], None, None, None, None


torch.library.register_fake("pmvis::lab_means", _shape_means)
torch.library.register_fake("pmvis::clip_pairs", _shape_pairs)
torch.library.register_fake("pmvis::clip_terms", _shape_terms)
torch.library.register_autograd("pmvis::clip_terms", _backward, setup_context=_save)
