"""Colour affinity and pairwise loss: kernels, twins, definitions by loops, and golden values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from pmvis_core import ops
from tests.ops_runs import digest, needs_kernel, python

EIGHT = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
BACKENDS = [pytest.param("compiled", marks=needs_kernel), "torch"]


class Call(NamedTuple):
    """Arguments of `ops.pairwise_terms`."""

    logits: Tensor
    similarity: Tensor
    image_index: Tensor
    boxes: Tensor
    threshold: float
    valid: Tensor | None
    dilation: int


def make_call(
    height: int, width: int, dtype: torch.dtype = torch.float64, dilation: int = 2, seed: int = 0
) -> Call:
    """Return two images and instances inside, at the edges, all over and outside of them."""
    random = torch.Generator().manual_seed(seed)
    boxes = torch.tensor(
        [[0.2, 0.1, 0.7, 0.8], [-0.3, -0.2, 1.4, 1.2], [0.6, 0.5, 2.0, 2.0], [1.5, 1.5, 2.0, 2.0]]
    ) * torch.tensor([4.0 * width, 4.0 * height] * 2)
    tiny = torch.tensor([[5.9, 6.2, 6.1, 6.8], [9.0, 9.0, 2.0, 2.0]])
    boxes = torch.cat([boxes, tiny])
    logits = torch.randn(len(boxes), height, width, generator=random, dtype=torch.float64) * 3
    similarity = torch.rand(2, 8, height, width, generator=random)
    valid = torch.rand(2, height, width, generator=random) < 0.8
    index = torch.tensor([1, 0, 1, 0, 0, 1])
    return Call(logits.to(dtype), similarity, index, boxes, 0.4, valid, dilation)


def run(call: Call, backend: ops.Backend | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return terms, edges, and the gradient of a seeded sum of the terms."""
    logits = call.logits.clone().requires_grad_()
    terms, edges = ops.pairwise_terms(
        logits, *call[1:5], valid=call.valid, dilation=call.dilation, backend=backend
    )
    random = torch.Generator().manual_seed(1)
    weights = torch.rand(len(terms), generator=random, dtype=torch.float64).to(terms.dtype)
    (gradient,) = torch.autograd.grad((terms * weights).sum(), logits)
    return terms.detach(), edges, gradient


def by_pixels(call: Call) -> tuple[list[float], list[int]]:
    """Return terms and edges by the definition, one pair after the other."""
    terms, edges = [], []
    for n, box in enumerate(call.boxes.tolist()):
        frame, p = int(call.image_index[n]), call.logits[n].double().sigmoid()
        height, width = p.shape
        x1, y1, x2, y2 = (math.floor(edge + 1e-3) for edge in box)
        total, count = 0.0, 0
        for y, x in np.ndindex(height, width):
            if not (x1 <= 4 * x + 2 <= x2 and y1 <= 4 * y + 2 <= y2):
                continue
            for k, (dy, dx) in enumerate(EIGHT):
                v, u = y + dy * call.dilation, x + dx * call.dilation
                if not (0 <= v < height and 0 <= u < width):
                    continue
                if call.valid is not None and not call.valid[frame, v, u]:
                    continue
                if call.similarity[frame, k, y, x] >= call.threshold:
                    same = p[y, x] * p[v, u] + (1 - p[y, x]) * (1 - p[v, u])
                    total, count = total - math.log(same), count + 1
        terms.append(total)
        edges.append(count)
    return terms, edges


def photo(batch: int, height: int, width: int) -> Tensor:
    """Return seeded images with plain, dark and noisy parts."""
    random = torch.Generator().manual_seed(height * width)
    images = torch.rand(batch, 3, height, width, generator=random) * 255
    images[:, :, : height // 3] = images[:, :, :1, :1] / 8
    images[:, :, -2:, -3:] = 255
    return images.byte()


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 40), (1, 40, 2), (2, 33, 17), (1, 70, 51)])
@pytest.mark.parametrize("window", [(3, 2), (3, 1), (5, 3)])
@needs_kernel
def test_similarity_kernel_equals_its_twin(size, window):
    images = photo(*size)
    got = ops.lab_similarity(images, *window, backend="compiled")
    expected = ops.lab_similarity(images, *window, backend="torch")
    assert got.dtype == expected.dtype == torch.float32
    assert got.shape == (size[0], window[0] ** 2 - 1, *size[1:])
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_similarity(backend, shared: Path):
    data = np.load(shared / "golden/idol/D_boxinst_160x240.npz")
    images = torch.from_numpy(data["rgb_down_uint8"]).permute(2, 0, 1)[None]
    got = ops.lab_similarity(images, backend=backend)[0].numpy()
    gated = data["color_similarity"]  # zero where the neighbour is not valid
    assert (gated > 0).mean() > 0.8
    np.testing.assert_allclose(np.where(gated > 0, got, 0), gated, atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_beyond_the_image_are_black(backend):
    black = ops.lab_similarity(torch.zeros(1, 3, 5, 6, dtype=torch.uint8), backend=backend)
    assert (black == 1).all()
    white = torch.full((1, 3, 5, 6), 255, dtype=torch.uint8)
    left = ops.lab_similarity(white, backend=backend)[0, 3]
    assert left[:, 2:].min() == 1
    torch.testing.assert_close(left[:, :2], torch.full((5, 2), math.exp(-50)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dilation", [1, 2])
def test_terms_by_the_definition(backend, dilation):
    call = make_call(9, 11, dilation=dilation)
    terms, edges, _ = run(call, backend)
    expected, count = by_pixels(call)
    assert edges.tolist() == count
    assert edges[1] > 200
    assert edges[3] == edges[5] == 0
    np.testing.assert_allclose(terms, expected, rtol=1e-12)
    everywhere = call._replace(valid=None)
    terms, edges, _ = run(everywhere, backend)
    expected, count = by_pixels(everywhere)
    assert edges.tolist() == count
    np.testing.assert_allclose(terms, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size", [(70, 45), (33, 150), (5, 300)])
@needs_kernel
def test_loss_kernel_equals_its_twin(size, dtype, tolerance):
    for seed, dilation in enumerate((1, 2, 3)):
        call = make_call(*size, dtype, dilation, seed)
        wide = call._replace(logits=call.logits.double())
        got, expected = run(call, "compiled"), run(wide, "torch")
        assert torch.equal(got[1].double(), expected[1])
        for mine, twin in zip(got, expected, strict=True):
            torch.testing.assert_close(mine.double(), twin, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    call = make_call(6, 7)

    def loss(logits: Tensor) -> Tensor:
        return ops.pairwise_loss(logits, *call[1:5], valid=call.valid, backend=backend)

    assert torch.autograd.gradcheck(loss, call.logits.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@needs_kernel
def test_logits_of_any_size(dtype):
    values = torch.tensor([0.0, 1e-3, 1.0, 30.0, 79.9, 80.1, 300.0, 1e4, 650.0, 800.0])
    values = torch.cat([values, -values])
    logits = values.to(dtype).repeat(1, 5, 1).roll(3, 2)
    logits[:, ::2] = logits[:, ::2].flip(2)
    similarity, index = torch.ones(1, 8, 5, 20), torch.tensor([0])
    call = Call(logits, similarity, index, torch.tensor([[0.0, 0.0, 80.0, 20.0]]), 0.5, None, 2)
    wide = call._replace(logits=logits.double())
    for mine, twin in zip(run(call, "compiled"), run(wide, "torch"), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine.double(), twin, rtol=2e-6, atol=2e-6)


@needs_kernel
def test_no_number_gives_no_number():
    call = make_call(8, 40, torch.float32)
    call.logits[1, 3, 5] = math.nan
    terms, _, gradient = run(call, "compiled")
    assert terms.isnan().tolist() == [False, True, False, False, False, False]
    touched = gradient[1].isnan().nonzero()
    assert ((touched - torch.tensor([3, 5])).abs() <= 2).all()
    assert len(touched) > 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_is_one_ratio(backend):
    call = make_call(20, 30, torch.float32)
    terms, edges, _ = run(call, backend)
    loss = ops.pairwise_loss(*call[:5], valid=call.valid, backend=backend)
    assert loss.item() == pytest.approx((terms.sum() / edges.sum()).item(), rel=1e-6)
    nothing = call._replace(boxes=call.boxes - 1e4)
    assert ops.pairwise_loss(*nothing[:5], backend=backend) == 0
    none = call._replace(
        logits=call.logits[:0], image_index=call.image_index[:0], boxes=call.boxes[:0]
    )
    assert ops.pairwise_loss(*none[:5], backend=backend) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(backend, dtype):
    call = make_call(12, 20, dtype)
    logits = call.logits.requires_grad_()
    loss = ops.pairwise_loss(logits, *call[1:5], backend=backend)
    exact = call._replace(logits=call.logits.detach().double())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(ops.pairwise_loss(*exact[:5]).item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.dtype == dtype


def test_box_cells_are_the_pixels_of_a_box():
    random = np.random.default_rng(0)
    for box in random.uniform(-20, 120, (50, 4)):
        x1, y1, x2, y2 = np.floor(np.float32(box) + np.float32(1e-3))
        y, x = np.mgrid[:17, :23] * 4 + 2
        expected = (x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)
        cells = ops.box_cells(torch.tensor(box, dtype=torch.float32)[None], 17, 23)
        np.testing.assert_array_equal(ops.cell_masks(cells, 17, 23)[0], expected)


def digests() -> str:
    """Return a digest of what both operators give in both types."""
    tensors = [ops.lab_similarity(photo(2, 75, 61))]
    for dtype in (torch.float32, torch.float64):
        tensors += run(make_call(75, 61, dtype))
    return digest(tensors)


@needs_kernel
def test_the_number_of_threads_changes_no_bit():
    before = torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(digests())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@needs_kernel
def test_both_instruction_sets_give_the_same_bits():
    script = "from tests.test_ops_pairwise import digests\nprint(digests())"
    found = {python(script, PMVIS_CPU_ISA=isa) for isa in ("base", "avx2")}
    assert len(found) == 1


@needs_kernel
def test_opcheck():
    images = photo(2, 7, 9)
    result = torch.library.opcheck(torch.ops.pmvis.lab_similarity.default, (images, 3, 2))
    assert set(result.values()) == {"SUCCESS"}
    call = make_call(7, 9)
    cells, nothing = ops.box_cells(call.boxes, 7, 9), torch.empty(0, dtype=torch.bool)
    for with_gradient in (False, True):
        logits = call.logits.clone().requires_grad_(with_gradient)
        for valid in (call.valid, nothing):
            operands = (logits, call.similarity, call.image_index, cells, valid, 0.4, 2)
            result = torch.library.opcheck(
                torch.ops.pmvis.pairwise_terms.default, (*operands, with_gradient)
            )
            assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_without_graph_breaks(backend):
    call = make_call(9, 12, torch.float32)
    images = photo(2, 9, 12)

    def loss(logits: Tensor, images: Tensor) -> Tensor:
        similarity = ops.lab_similarity(images, backend=backend)
        arguments = (call.image_index, call.boxes, 0.4)
        return ops.pairwise_loss(logits, similarity, *arguments, backend=backend)

    fullgraph = backend == "compiled"  # the twin lists pairs, whose number only data tells
    quick = torch.compile(loss, backend="aot_eager", fullgraph=fullgraph)
    logits = call.logits.requires_grad_()
    expected = loss(logits, images)
    got = quick(logits, images)
    torch.testing.assert_close(got, expected)
    (want,) = torch.autograd.grad(expected, logits)
    (gradient,) = torch.autograd.grad(got, logits)
    torch.testing.assert_close(gradient, want)


@needs_kernel
def test_the_operators_refuse_what_they_cannot_read():
    similar = torch.ops.pmvis.lab_similarity.default
    images = photo(1, 6, 7)
    for operands, problem in (
        ((images.float(), 3, 2), "uint8"),
        ((images[0], 3, 2), r"\(B, 3, H, W\)"),
        ((images.transpose(2, 3), 3, 2), "contiguous"),
        ((images, 4, 2), "odd"),
        ((images, 3, 65), "small"),
    ):
        with pytest.raises(RuntimeError, match=problem):
            similar(*operands)
    call = make_call(6, 7)
    cells = ops.box_cells(call.boxes, 6, 7)
    good = [call.logits, call.similarity, call.image_index, cells, call.valid, 0.4, 2, True]
    for place, wrong, problem in (
        (0, call.logits.half(), "float32 and float64"),
        (0, call.logits[0], r"\(N, H, W\)"),
        (1, call.similarity.double(), "similarity must be"),
        (1, call.similarity[:, :4], "similarity must be"),
        (2, call.image_index + 1, "image index"),
        (2, call.image_index.int(), "indices must be"),
        (3, cells + 8, "beyond the map"),
        (3, cells[:2], "cells must be"),
        (4, call.valid[:1], "valid must be"),
        (6, 17, "dilation"),
    ):
        operands = [*good[:place], wrong, *good[place + 1 :]]
        with pytest.raises(RuntimeError, match=problem):
            torch.ops.pmvis.pairwise_terms.default(*operands)


def test_shapes_that_do_not_fit_are_named():
    call = make_call(6, 7)
    for place, wrong, problem in (
        (0, call.logits.long(), "logits are"),
        (1, call.similarity[:, :4], "similarity has shape"),
        (2, call.image_index[:2], "image indices and boxes"),
        (3, call.boxes[:, :2], "image indices and boxes"),
    ):
        operands = [*call[:place], wrong, *call[place + 1 : 5]]
        with pytest.raises(ValueError, match=problem):
            ops.pairwise_loss(*operands)
    with pytest.raises(ValueError, match="valid has shape"):
        ops.pairwise_loss(*call[:5], valid=call.valid[0])
    with pytest.raises(ValueError, match="images are"):
        ops.lab_similarity(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="kernel and dilation"):
        ops.lab_similarity(photo(1, 4, 4), kernel=2)
