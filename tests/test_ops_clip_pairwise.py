"""Affinity and pairwise loss of clips: kernels, twins, and definitions by loops."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pmvis_core import ops
from pmvis_core.ops.clip_pairwise import _steps_tensor, _unit
from tests.ops_runs import digest, needs_kernel, python
from tests.test_ops_pairwise import photo

BACKENDS = [pytest.param("compiled", marks=needs_kernel), "torch"]
STEPS = (*ops.CLIP_STEPS, (0, -1, 2), (1, 3, -3))


class Clips(NamedTuple):
    """Arguments of `ops.clip_pairs`, and logits."""

    colours: Tensor
    video_index: Tensor
    cells: Tensor
    shifts: Tensor
    steps: tuple[tuple[int, int, int], ...]
    threshold: float
    patches: Tensor | None
    logits: Tensor


def make_clips(
    height: int, width: int, frames: int = 3, *, patches: bool = False, seed: int = 0
) -> Clips:
    """Return two clips, and instances inside, all over, at the edge, and absent now and then."""
    random = torch.Generator().manual_seed(seed)
    colours = torch.randn(2, frames, 3, height, width, generator=random)
    parts = torch.tensor([[0.2, 0.1, 0.7, 0.8], [0.0, 0.0, 1.0, 1.0], [0.5, 0.6, 1.0, 1.0]])
    boxes = parts[:, None] + torch.rand(3, frames, 1, generator=random) * 0.2
    boxes = boxes.clamp_max(1) * torch.tensor([width, height] * 2)
    boxes[0, 0] = 0
    cells = boxes.round().long()
    tiny = cells[:1] + torch.tensor([0, 0, 1, 1]) - cells[:1] % 2
    cells = torch.cat([cells, tiny.clamp_max(min(height, width))])
    shifts = torch.randint(-3, 4, (4, frames, 2), generator=random)
    shifts[1, -1] = 1 << 24
    features = None
    if patches:
        features = torch.randn(2, frames, 5, 2 * height - 1, 2 * width, generator=random)
        features += torch.randn(2, frames, 5, 1, 1, generator=random) * 2
    logits = torch.randn(4, frames, height, width, generator=random, dtype=torch.float64) * 3
    index = torch.tensor([1, 0, 1, 0])
    return Clips(colours, index, cells, shifts, STEPS, 0.3, features, logits)


def find_pairs(clips: Clips, backend: ops.Backend | None = None) -> Tensor:
    """Return the pairs of clips."""
    return ops.clip_pairs(*clips[:6], patches=clips.patches, patch_weight=0.5, backend=backend)


def run_terms(
    clips: Clips, pairs: Tensor, backend: ops.Backend | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return terms, edges, and the gradient of a weighted sum of the terms."""
    logits = clips.logits.clone().requires_grad_()
    terms, edges = ops.clip_pairwise_terms(
        logits, pairs, clips.shifts, clips.steps, backend=backend
    )
    weights = torch.arange(1, len(terms) + 1, dtype=terms.dtype)
    (gradient,) = torch.autograd.grad((terms * weights).sum(), logits)
    return terms.detach(), edges, gradient


def similarity(clips: Clips, video: int, a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Return the similarity of two (t, y, x), in float64."""
    lab = clips.colours[video].double()
    apart = lab[a[0], :, a[1], a[2]] - lab[b[0], :, b[1], b[2]]
    similar = math.exp(-float(apart.norm()) / 2)
    if clips.patches is None:
        return similar
    features, total = clips.patches[video].double(), 0.0
    for dy, dx in np.ndindex(3, 3):
        ends = [(t, 2 * y + dy - 1, 2 * x + dx - 1) for t, y, x in (a, b)]
        if all(0 <= y < features.shape[2] and 0 <= x < features.shape[3] for _, y, x in ends):
            one, other = (features[t, :, y, x] for t, y, x in ends)
            total += float(F.cosine_similarity(one, other, dim=0))
    return similar + 0.5 * total / 9


def by_pixels(clips: Clips) -> tuple[list[float], list[int], Tensor]:
    """Return terms, edges and pairs by the definition, one pair after the other."""
    number, frames, height, width = clips.logits.shape
    pairs = torch.zeros(clips.logits.shape, dtype=torch.int16)
    terms, edges = [0.0] * number, [0] * number
    p = clips.logits.sigmoid()

    def inside(n: int, t: int, y: int, x: int) -> bool:
        x0, y0, x1, y1 = clips.cells[n, t].tolist()
        return x0 <= x < x1 and y0 <= y < y1

    for n, t, y, x in np.ndindex(number, frames, height, width):
        for k, (step, dy, dx) in enumerate(clips.steps):
            if step and frames == 1:
                continue
            shift = clips.shifts[n, t].tolist() if step else (0, 0)
            there = ((t + step) % frames, y + dy + shift[0], x + dx + shift[1])
            if not (0 <= there[1] < height and 0 <= there[2] < width):
                continue
            boxed = (inside(n, t, y, x), inside(n, *there))
            if not (all(boxed) if step else any(boxed)):
                continue
            video = int(clips.video_index[n])
            if similarity(clips, video, (t, y, x), there) >= clips.threshold:
                a, b = p[n, t, y, x], p[n][there]
                terms[n] -= math.log(a * b + (1 - a) * (1 - b))
                edges[n] += 1
                pairs[n, t, y, x] |= 1 << k
    return terms, edges, pairs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_pairs_and_terms_by_the_definition(backend, patches, frames):
    if patches and frames == 2:
        pytest.skip("patches are the same for any number of frames")
    clips = make_clips(6, 9, frames, patches=patches)
    if patches:
        clips = clips._replace(threshold=0.5)
    expected, count, pairs = by_pixels(clips)
    assert count[1] > (20 if frames == 1 else 100)
    assert torch.equal(find_pairs(clips, backend), pairs)
    terms, edges, _ = run_terms(clips, pairs, backend)
    assert edges.tolist() == count
    np.testing.assert_allclose(terms, expected, rtol=1e-12)


def test_patches_decide_where_colours_do_not():
    clips = make_clips(6, 9, patches=True)
    with_patches = find_pairs(clips._replace(threshold=0.75))
    without = find_pairs(clips._replace(threshold=0.75, patches=None))
    assert (with_patches != without).any()


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (33, 47), (20, 80)])
@needs_kernel
def test_kernels_equal_their_twins(size):
    for seed, patches in enumerate((False, True)):
        clips = make_clips(*size, 4, patches=patches, seed=seed)
        pairs = find_pairs(clips, "torch")
        apart = find_pairs(clips, "compiled") != pairs
        assert apart.sum() <= 1e-3 * pairs.numel()  # similarities at the threshold itself
        for dtype, off in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
            typed = clips._replace(logits=clips.logits.to(dtype))
            wide = clips._replace(logits=typed.logits.double())
            for mine, twin in zip(
                run_terms(typed, pairs, "compiled"), run_terms(wide, pairs, "torch"), strict=True
            ):
                torch.testing.assert_close(mine.double(), twin, rtol=off, atol=4 * off)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride, block", [(1, 1), (2, 1), (4, 2), (5, 3)])
def test_means_are_those_of_the_whole_image(backend, stride, block):
    images = photo(2, 21, 34)
    lab = ops.rgb_to_lab(images.double())
    means = F.avg_pool2d(lab, block, stride)
    got = ops.lab_means(images, stride, block, backend=backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), means, rtol=1e-5, atol=2e-5)


def test_half_size_and_then_every_second_pixel():
    images = photo(1, 32, 48)
    half = F.interpolate(
        ops.rgb_to_lab(images.double()), scale_factor=0.5, mode="bilinear", align_corners=False
    )
    got = ops.lab_means(images, 4, 2)
    torch.testing.assert_close(got.double(), half[..., ::2, ::2], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    clips = make_clips(4, 5)
    pairs = find_pairs(clips)

    def loss(logits: Tensor) -> Tensor:
        rest = (pairs, clips.shifts, clips.steps, clips.video_index)
        return ops.clip_pairwise_loss(logits, *rest, backend=backend)

    assert torch.autograd.gradcheck(loss, clips.logits.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_is_the_mean_of_the_clips_that_have_pairs(backend):
    clips = make_clips(7, 9)
    pairs = find_pairs(clips)
    rest = (clips.shifts, clips.steps)
    terms, edges, _ = run_terms(clips, pairs, backend)
    of_0, of_1 = ((clips.video_index == video) for video in (0, 1))
    expected = [float(terms[of].sum() / edges[of].sum()) for of in (of_0, of_1)]

    def loss(pairs: Tensor) -> float:
        return ops.clip_pairwise_loss(
            clips.logits, pairs, *rest, clips.video_index * 7 + 3, backend=backend
        ).item()

    assert loss(pairs) == pytest.approx(sum(expected) / 2, rel=1e-12)
    assert loss(pairs * of_1[:, None, None, None]) == pytest.approx(expected[1], rel=1e-12)
    assert loss(torch.zeros_like(pairs)) == 0
    none = (clips.logits[:0], pairs[:0], clips.shifts[:0], clips.steps, clips.video_index[:0])
    assert ops.clip_pairwise_loss(*none, backend=backend) == 0
    without = find_pairs(clips._replace(video_index=none[4], cells=clips.cells[:0], shifts=none[2]))
    assert without.shape == (0, *pairs.shape[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_of_neighbours_beyond_the_map_do_not_count(backend):
    clips = make_clips(5, 20)
    pairs = torch.full(clips.logits.shape, (1 << len(STEPS)) - 1, dtype=torch.int16)
    terms, edges, gradient = run_terms(clips, pairs, backend)
    spatial = 4 * 3 * (5 * 18 + 3 * 20 + 4 * 18)
    few = ops.clip_pairwise_terms(
        clips.logits, pairs & 0b10000011, clips.shifts, STEPS, backend=backend
    )
    assert int(few[1].sum()) == spatial
    assert (edges >= few[1]).all()
    assert terms.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(backend, dtype):
    clips = make_clips(7, 9)
    pairs, rest = find_pairs(clips), (clips.shifts, clips.steps, clips.video_index)
    logits = clips.logits.to(dtype).requires_grad_()
    loss = ops.clip_pairwise_loss(logits, pairs, *rest, backend=backend)
    exact = ops.clip_pairwise_loss(logits.detach().double(), pairs, *rest)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.dtype == dtype


def digests() -> str:
    """Return a digest of what the operators give in both types."""
    clips = make_clips(33, 61, patches=True)
    pairs = find_pairs(clips)
    tensors = [ops.lab_means(photo(2, 75, 61), 4, 2), pairs]
    for dtype in (torch.float32, torch.float64):
        tensors += run_terms(clips._replace(logits=clips.logits.to(dtype)), pairs)
    return digest(tensors)


@needs_kernel
def test_threads_and_instruction_sets_change_no_bit():
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(digests())
    finally:
        torch.set_num_threads(before)
    script = "from tests.test_ops_clip_pairwise import digests\nprint(digests())"
    found |= {python(script, PMVIS_CPU_ISA=isa) for isa in ("base", "avx2")}
    assert len(found) == 1


def operands(clips: Clips) -> tuple[object, ...]:
    """Return the operands of the operator that finds pairs."""
    steps = _steps_tensor(clips.steps)
    patches = _unit(clips.patches)
    return (clips.colours, patches, *clips[1:4], steps, clips.threshold, 0.5)


@needs_kernel
def test_opcheck_and_compile():
    images = photo(2, 7, 9)
    checks = [(torch.ops.pmvis.lab_means.default, (images, 2, 1))]
    clips = make_clips(5, 6, patches=True)
    checks.append((torch.ops.pmvis.clip_pairs.default, operands(clips)))
    pairs, steps = find_pairs(clips), _steps_tensor(clips.steps)
    for with_gradient in (False, True):
        logits = clips.logits.clone().requires_grad_(with_gradient)
        call = (logits, pairs, clips.shifts, steps, with_gradient)
        checks.append((torch.ops.pmvis.clip_terms.default, call))
    for operator, call in checks:
        assert set(torch.library.opcheck(operator, call).values()) == {"SUCCESS"}

    def terms(logits: Tensor) -> Tensor:
        return ops.clip_pairwise_terms(logits, pairs, clips.shifts, clips.steps)[0]

    quick = torch.compile(terms, backend="aot_eager", fullgraph=True)
    logits = clips.logits.requires_grad_()
    torch.testing.assert_close(quick(logits), terms(logits))


def test_published_boxes_and_shifts():
    # Pixels 5 .. 12 of an axis are cells 3 .. 6 at stride 2; blocks of 2 at stride 4 are cell 2.
    boxes = torch.tensor([[[4.7, 4.0, 11.3, 12.0], [0.0, 0.0, 0.0, 0.0], [8.0, 0.0, 400.0, 9.0]]])
    assert ops.clip_cells(boxes, 12, 16, 2)[0, 0].tolist() == [3, 3, 7, 7]
    assert ops.clip_cells(boxes, 12, 16, 4, 2)[0, 0].tolist() == [2, 2, 3, 3]
    missing = ops.clip_cells(boxes, 12, 16, 2)[0, 1].tolist()
    assert missing[0] >= missing[2]
    assert ops.clip_cells(boxes, 12, 16, 2)[0, 2].tolist() == [5, 1, 16, 5]
    moving = torch.tensor([[[0.0, 0.0, 8.0, 8.0], [6.0, 2.0, 14.0, 10.0]]])
    shifts = ops.clip_shifts(moving, (24, 32), (12, 16))
    assert shifts.tolist() == [[[1, 3], [-1, -3]]]
    across = torch.tensor([[[0.0, 0.0, 2.0, 8.0], [28.0, 0.0, 30.0, 8.0], [0.0] * 4]])
    assert (ops.clip_shifts(across, (24, 32), (12, 16)).abs() > 1 << 20).all()


def test_a_moving_object_is_compared_with_itself():
    random = torch.Generator().manual_seed(0)
    colours = torch.rand(1, 2, 3, 12, 16, generator=random) * 100
    colours[0, 1, :, 2:8, 5:11] = colours[0, 0, :, 1:7, 2:8]
    boxes = torch.tensor([[[3.0, 1.0, 14.0, 13.0], [9.0, 3.0, 20.0, 15.0]]])
    shifts = ops.clip_shifts(boxes, (24, 32), (12, 16))
    cells = ops.clip_cells(boxes, 12, 16, 2)
    assert cells.tolist() == [[[2, 1, 8, 7], [5, 2, 11, 8]]]
    pairs = ops.clip_pairs(colours, torch.tensor([0]), cells, shifts, [(1, 0, 0)], 0.9)
    assert int(pairs[0, 0].sum()) == 36
    assert int(pairs[0, 1].sum()) == 36
    still = ops.clip_pairs(colours, torch.tensor([0]), cells, shifts * 0, [(1, 0, 0)], 0.9)
    assert not still.any()


@needs_kernel
def test_the_operators_refuse_what_they_cannot_read():
    clips = make_clips(5, 6, patches=True)
    good = list(operands(clips))
    steps = good[5]
    assert isinstance(steps, Tensor)
    for place, wrong, problem in (
        (0, clips.colours.double(), "colours must be"),
        (1, _unit(clips.patches)[:, :, 1:-2].contiguous(), "patches must be"),
        (2, clips.video_index + 1, "video index"),
        (2, clips.video_index.int(), "indices must be"),
        (3, clips.cells + 8, "beyond the map"),
        (3, clips.cells[:2], "cells must be"),
        (4, clips.shifts[:2], "shifts must be"),
        (4, clips.shifts * (1 << 40), "a shift is too large"),
        (5, steps + 2, "a step is"),
        (5, steps.repeat(3, 1), "at most 15"),
    ):
        with pytest.raises(RuntimeError, match=problem):
            torch.ops.pmvis.clip_pairs.default(*good[:place], wrong, *good[place + 1 :])
    call = [clips.logits, find_pairs(clips), clips.shifts, steps, True]
    for place, wrong, problem in (
        (0, clips.logits.half(), "float32 and float64"),
        (0, clips.logits[0], r"\(N, T, H, W\)"),
        (1, call[1].int(), "pairs must be"),
        (2, clips.shifts[:, :1], "shifts must be"),
        (3, steps[:, :2], "steps must be"),
    ):
        with pytest.raises(RuntimeError, match=problem):
            torch.ops.pmvis.clip_terms.default(*call[:place], wrong, *call[place + 1 :])
    with pytest.raises(RuntimeError, match="stride"):
        torch.ops.pmvis.lab_means.default(photo(1, 5, 6), 2, 3)


def test_shapes_that_do_not_fit_are_named():
    clips = make_clips(5, 6, patches=True)
    for field, wrong, problem in (
        ("colours", clips.colours[0], "colours have shape"),
        ("cells", clips.cells[:2], "video indices and cells"),
        ("cells", clips.cells.int(), "are torch.int64 and torch.int32"),
        ("shifts", clips.shifts[:, :2], "shifts are"),
        ("shifts", clips.shifts.int(), "shifts are torch.int32"),
        ("steps", (*STEPS, *STEPS), "at most 15"),
        ("steps", ((2, 0, 0),), r"a step is \(2, 0, 0\)"),
        ("patches", clips.patches[0], "patches have shape"),
        ("patches", clips.patches[..., :4], "patches are of 9x4"),
    ):
        with pytest.raises(ValueError, match=problem):
            find_pairs(clips._replace(**{field: wrong}))
    pairs = find_pairs(clips)
    for call, problem in (
        ((clips.logits[0], pairs, clips.shifts), "logits are"),
        ((clips.logits, pairs.int(), clips.shifts), "pairs are"),
        ((clips.logits, pairs, clips.shifts[:2]), "shifts are"),
    ):
        with pytest.raises(ValueError, match=problem):
            ops.clip_pairwise_terms(*call, STEPS)
    with pytest.raises(ValueError, match="stride and block"):
        ops.lab_means(photo(1, 5, 6), 2, 3)
    with pytest.raises(ValueError, match="images are"):
        ops.lab_means(photo(1, 5, 6)[0], 2)
