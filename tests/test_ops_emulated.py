"""The GPU's kernels and their launchers, run on the CPU, against the twins."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pmvis_core import infer, masks, ops
from pmvis_core.ops import deformable, fused_deformable, mask_runs
from pmvis_core.types import RLE
from tests import (
    test_ops,
    test_ops_clip_pairwise,
    test_ops_fused,
    test_ops_masks,
    test_ops_pairwise,
)
from tests.emulated import needs_compiler, operators
from tests.ops_runs import needs_kernel

pytestmark = needs_compiler

HALVES = (torch.float16, torch.bfloat16)
TYPES = (torch.float32, torch.float64, *HALVES)
LEVELS = [(5, 7), (3, 4), (1, 1)]


def run_attention(
    call: test_ops.Call, dtype: torch.dtype, *, fixed: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Return output and gradients of the emulated kernels, and of the twin in float64."""
    value, levels, locations, weights = (t if isinstance(t, list) else t.detach() for t in call)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    value, locations, weights = value.to(dtype), locations.to(wide), weights.to(wide)
    shapes = torch.tensor(levels)
    output = operators().deformable_attention(value, shapes, locations, weights)
    random = torch.Generator().manual_seed(7)
    grad = torch.randn(output.shape, generator=random, dtype=torch.float64).to(dtype)
    bound = deformable.largest_sum(grad, weights) if fixed else weights.new_empty(0)
    operands = (grad, value, shapes, locations, weights, bound)
    got = [output, *operators().deformable_attention_backward(*operands)]
    leaves = [t.double().requires_grad_() for t in (value, locations, weights)]
    expected = ops.deformable_attention_reference(leaves[0], levels, *leaves[1:])
    return got, [expected, *torch.autograd.grad(expected, leaves, grad.double())]


def tolerance(dtype: torch.dtype) -> float:
    """Return what a result of a type may be off."""
    return {torch.float64: 1e-11, torch.float32: 2e-4}.get(dtype, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("channels", [1, 3, 8, 20, 32, 64, 72])
@pytest.mark.parametrize("dtype", TYPES)
def test_attention_equals_its_twin(channels: int, dtype: torch.dtype):
    call = test_ops.make_call(channels, points=7)
    for fixed in (False, True):
        got, expected = run_attention(call, dtype, fixed=fixed)
        assert [t.dtype for t in got[2:]] == [torch.promote_types(dtype, torch.float32)] * 2
        for mine, twin, of in zip(got, expected, (dtype, dtype, None, None), strict=True):
            off = tolerance(of or mine.dtype)
            torch.testing.assert_close(mine.double(), twin, rtol=off, atol=max(off, 1e-11) * 5)


def neighbours(queries: int) -> test_ops.Call:
    """Return a call whose neighbouring queries look at the same or the next cell."""
    random = torch.Generator().manual_seed(3)
    levels = [(6, 40), (3, 20), (1, 5)]
    tokens = sum(height * width for height, width in levels)
    value = torch.randn(1, tokens, 2, 8, generator=random, dtype=torch.float64)
    centres = torch.stack(
        [(torch.arange(queries) % 40 + 0.7) / 40, torch.full((queries,), 0.4)], -1
    )
    spread = 0.05 * torch.randn(1, 1, 2, 3, 4, 2, generator=random, dtype=torch.float64)
    locations = centres.double()[None, :, None, None, None] + spread
    weights = torch.randn(1, queries, 2, 3, 4, generator=random, dtype=torch.float64)
    return value, levels, locations, weights


@pytest.mark.parametrize("queries", [1, 5, 40, 67])
def test_gradients_of_queries_that_share_cells(queries: int):
    for dtype in (torch.float64, torch.float32):
        for mine, twin in zip(*run_attention(neighbours(queries), dtype), strict=True):
            off = 1e-11 if dtype == torch.float64 else 2e-4
            torch.testing.assert_close(mine.double(), twin, rtol=off, atol=off)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_sums_do_not_depend_on_the_order_of_blocks(dtype, monkeypatch: pytest.MonkeyPatch):
    value, levels, locations, weights = (
        t if isinstance(t, list) else t.to(dtype) for t in neighbours(150)
    )
    grad = torch.randn(1, 150, 16, dtype=dtype, generator=torch.Generator().manual_seed(0))
    found = []
    for bound in (deformable.largest_sum(grad, weights), weights.new_empty(0)):
        operands = (grad, value, torch.tensor(levels), locations, weights, bound)
        sums = [operators().deformable_attention_backward(*operands)]
        monkeypatch.setenv("PMVIS_EMULATE_BACKWARDS", "1")
        sums.append(operators().deformable_attention_backward(*operands))
        monkeypatch.delenv("PMVIS_EMULATE_BACKWARDS")
        assert all(torch.equal(*pair) for pair in list(zip(*sums, strict=True))[1:])
        found.append(torch.equal(sums[0][0], sums[1][0]))
    assert found == [True, False]


def test_gradients_that_are_no_numbers_stay_none():
    call = [t if isinstance(t, list) else t.detach().float() for t in test_ops.make_call(8)]
    value, levels, locations, weights = call
    grad = torch.full((2, 6, 24), math.inf)
    operands = (grad, value, torch.tensor(levels), locations, weights)
    bound = deformable.largest_sum(grad, weights)
    sums = operators().deformable_attention_backward(*operands, bound)[0]
    assert sums.isnan().all()


@pytest.mark.parametrize("place", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_points_at_no_place_read_nothing(place: float):
    value, levels, locations, weights = test_ops.make_call(8)
    got, _ = run_attention(
        (value, levels, torch.full_like(locations, place), weights), torch.float32
    )
    assert not any(t.any() for t in got)


@pytest.mark.parametrize("case", ["E0", "E1", "E2"])
def test_golden_attention(case: str, shared: Path):
    data = np.load(shared / "golden" / "idol" / f"{case}_msdeform.npz")
    names = ("value", "sampling_locations", "attention_weights")
    value, locations, weights = (torch.tensor(data[name]) for name in names)
    shapes = torch.tensor(data["spatial_shapes"]).long()
    output = operators().deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(output, torch.tensor(data["output"]), rtol=1e-10, atol=1e-12)
    grads = list(
        operators().deformable_attention_backward(
            torch.tensor(data["grad_output"]),
            value,
            shapes,
            locations,
            weights,
            weights.new_empty(0),
        )
    )
    expected = [torch.tensor(data[f"grad_{name}"]) for name in ("value", "locations", "weights")]
    if case != "E2":
        # At a pixel centre rounding decides which one-sided slope is taken (README, part E).
        smooth = ~torch.tensor(np.isin(data["loc_kind"], (1, 3, 4)))
        grads[1], expected[1] = grads[1] * smooth, expected[1] * smooth
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_attention_without_queries_or_batch():
    value, levels, locations, weights = (
        t if isinstance(t, list) else t.detach().float() for t in test_ops.make_call(8)
    )
    shapes, nothing = torch.tensor(levels), torch.empty(0)
    run = operators().deformable_attention
    assert run(value[:0], shapes, locations[:0], weights[:0]).shape == (0, 6, 24)
    few = (locations[:, :0].contiguous(), weights[:, :0].contiguous())
    assert run(value, shapes, *few).shape == (2, 0, 24)
    grads = operators().deformable_attention_backward(
        torch.empty(2, 0, 24), value, shapes, *few, nothing
    )
    assert not grads[0].any()


def test_the_launchers_refuse_what_they_cannot_read():
    value, levels, locations, weights = (
        t if isinstance(t, list) else t.detach().float() for t in test_ops.make_call(4)
    )
    shapes = torch.tensor(levels)
    good = [value, shapes, locations, weights]
    for place, wrong, problem in (
        (0, value.double(), "float32, or float64"),
        (0, value.long(), "float type"),
        (0, value.transpose(1, 2), "contiguous"),
        (0, value[0], "dimensions"),
        (1, shapes + 1, "as many tokens"),
        (1, shapes - 1, "positive height"),
        (1, shapes.int(), "int64"),
        (2, locations[:1], "locations must be"),
        (3, weights[:, :2].contiguous(), "weights must be"),
    ):
        with pytest.raises(RuntimeError, match=problem):
            operators().deformable_attention(*good[:place], wrong, *good[place + 1 :])


def run_fused(
    call: test_ops_fused.Call, dtype: torch.dtype, *, fixed: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Return output and gradients of the emulated kernels, and of the twin in float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    call = call.to(wide, value=dtype)
    output = operators().fused_deformable_attention(*call.operands)
    random = torch.Generator().manual_seed(7)
    grad = torch.randn(output.shape, generator=random, dtype=torch.float64).to(dtype)
    bound = torch.empty(0, dtype=wide)
    if fixed:
        bound = fused_deformable.largest_fused_sum(grad, call.logits.detach())
    backward = operators().fused_deformable_attention_backward
    found = list(backward(grad, *call.operands, bound, True))
    none = backward(grad, *call.operands, bound, False)
    assert none[1].numel() == 0
    assert all(torch.equal(found[place], none[place]) for place in (2, 3))
    found[1] = found[1].sum(2)
    exact = call.to(torch.float64)
    expected = ops.fused_deformable_attention(*exact, backend="torch")
    return [output, *found], [
        expected,
        *torch.autograd.grad(expected, exact.leaves, grad.double()),
    ]


@pytest.mark.parametrize("channels", [1, 8, 20, 32, 72])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [2, 4])
def test_fused_attention_equals_its_twin(channels: int, dtype: torch.dtype, size: int):
    for padded, points in ((False, 1), (True, 7)):
        call = test_ops_fused.make_call(channels, size, padded=padded, points=points)
        got, expected = run_fused(call, dtype, fixed=padded)
        types = (dtype, dtype, *[torch.promote_types(dtype, torch.float32)] * 3)
        assert [t.dtype for t in got] == list(types)
        for mine, twin in zip(got, expected, strict=True):
            off = max(tolerance(mine.dtype), 1e-11)
            torch.testing.assert_close(mine.double(), twin, rtol=off, atol=off * 5)


@needs_kernel
def test_fused_attention_of_what_is_no_number():
    call = test_ops_fused.make_call(8).to(torch.float32)
    offsets, logits = call.offsets.detach().clone(), call.logits.detach().clone()
    offsets[0, 0] = math.nan
    logits[0, 1, 0, 0, 0] = math.nan
    logits[0, 2] = -math.inf
    logits[0, 3, 1, 1] = -math.inf
    operands = call._replace(offsets=offsets, logits=logits).operands
    got = operators().fused_deformable_attention(*operands)
    expected = torch.ops.pmvis.fused_deformable_attention(*operands)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=1e-5, equal_nan=True)
    assert not got[0, 0].any()
    assert got[0, 1].isnan().sum() == 8
    assert got[0, 2].isnan().all()


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Ask torch for results that are always the same."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("fused", [False, True])
def test_torch_asks_for_sums_in_one_order(fused, deterministic, monkeypatch: pytest.MonkeyPatch):
    """Through autograd's rules, as on a GPU: the order of the blocks changes no bit."""
    value, levels, locations, weights = (
        t if isinstance(t, list) else t.detach().float() for t in neighbours(150)
    )
    module: Any = fused_deformable if fused else deformable
    monkeypatch.setattr(module, "operator", lambda name: getattr(operators(), name))
    monkeypatch.setattr(deformable, "_ORDERED", frozenset())
    operands = [value, torch.tensor(levels), locations, weights]
    if fused:
        offsets = torch.randn(locations.shape, generator=torch.Generator().manual_seed(1))
        references = torch.full((1, 150, 3, 2), 0.4)
        operands[2:] = [references, offsets, weights, torch.empty(0, dtype=torch.bool)]
    grad = torch.randn(1, 150, 16, generator=torch.Generator().manual_seed(0))
    context = SimpleNamespace(saved_tensors=operands, needs_input_grad=(True,) * 6)

    def gradients(backwards: str) -> list[Tensor]:
        with monkeypatch.context() as patch:
            patch.setenv("PMVIS_EMULATE_BACKWARDS", backwards)
            if not backwards:
                patch.delenv("PMVIS_EMULATE_BACKWARDS")
            return [t for t in module._backward(context, grad) if t is not None]

    same = [torch.equal(*pair) for pair in zip(gradients(""), gradients("1"), strict=True)]
    assert all(same)
    torch.use_deterministic_algorithms(False)
    same = [torch.equal(*pair) for pair in zip(gradients(""), gradients("1"), strict=True)]
    assert same == [False, *[True] * (len(same) - 1)]


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 40), (2, 33, 17)])
@pytest.mark.parametrize("window", [(3, 2), (5, 3), (3, 16)])
def test_similarity_equals_its_twin(size, window):
    images = test_ops_pairwise.photo(*size)
    got = operators().lab_similarity(images, *window)
    expected = ops.lab_similarity(images, *window, backend="torch")
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)


def test_every_byte_has_its_linear_light():
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).repeat(1, 3, 1, 1)
    tinted = torch.cat([grey, grey.roll(1, 3)], 2)
    torch.testing.assert_close(
        operators().lab_similarity(tinted, 3, 1),
        ops.lab_similarity(tinted, 3, 1, backend="torch"),
        rtol=2e-5,
        atol=1e-7,
    )


def run_terms(call: test_ops_pairwise.Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return terms, edges and slopes of the emulated kernels."""
    valid = torch.empty(0, dtype=torch.bool) if call.valid is None else call.valid
    cells = ops.box_cells(call.boxes, *call.logits.shape[1:])
    operands = (call.logits, call.similarity, call.image_index, cells, valid, call.threshold)
    found: Any = operators().pairwise_terms(*operands, call.dilation, True)
    without = operators().pairwise_terms(*operands, call.dilation, False)
    assert torch.equal(found[0], without[0]) or found[0].isnan().any()
    assert without[2].numel() == 0
    return found


def twin_terms(call: test_ops_pairwise.Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return terms, edges and slopes of the twin in float64."""
    logits = call.logits.double().requires_grad_()
    terms, edges = ops.pairwise_terms(
        logits, *call[1:5], valid=call.valid, dilation=call.dilation, backend="torch"
    )
    return terms.detach(), edges, torch.autograd.grad(terms.sum(), logits)[0]


@pytest.mark.parametrize("dtype, off", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size", [(35, 45), (5, 70)])
def test_terms_equal_their_twin(size, dtype, off):
    for seed, dilation in enumerate((1, 2, 8)):
        call = test_ops_pairwise.make_call(*size, dtype, dilation, seed)
        for one in (call, call._replace(valid=None)):
            for mine, twin in zip(run_terms(one), twin_terms(one), strict=True):
                torch.testing.assert_close(mine.double(), twin, rtol=off, atol=off)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_any_size(dtype):
    values = torch.tensor([0.0, 1e-3, 1.0, 30.0, 79.9, 80.1, 300.0, 1e4, 650.0, 800.0])
    values = torch.cat([values, -values])
    logits = values.to(dtype).repeat(1, 5, 1).roll(3, 2)
    logits[:, ::2] = logits[:, ::2].flip(2)
    box, index = torch.tensor([[0.0, 0.0, 80.0, 20.0]]), torch.tensor([0])
    call = test_ops_pairwise.Call(logits, torch.ones(1, 8, 5, 20), index, box, 0.5, None, 2)
    for mine, twin in zip(run_terms(call), twin_terms(call), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine.double(), twin, rtol=2e-6, atol=2e-6)


def test_what_is_no_number_or_no_image_gives_none():
    call = test_ops_pairwise.make_call(8, 40, torch.float32)
    call.logits[1, 3, 5] = math.nan
    terms, _, gradient = run_terms(call)
    assert terms.isnan().tolist() == [False, True, False, False, False, False]
    assert 1 < gradient[1].isnan().sum() <= 25
    astray = test_ops_pairwise.make_call(8, 40, torch.float32)
    terms, edges, gradient = run_terms(astray._replace(image_index=astray.image_index * 9 - 1))
    assert terms.isnan().all()
    assert not edges.any()
    assert not gradient.any()


@pytest.mark.parametrize("stride, block", [(1, 1), (4, 2)])
def test_colour_means_equal_their_twin(stride, block):
    images = test_ops_pairwise.photo(2, 21, 34)
    torch.testing.assert_close(
        operators().lab_means(images, stride, block),
        ops.lab_means(images, stride, block, backend="torch"),
        rtol=1e-5,
        atol=2e-5,
    )


@pytest.mark.parametrize("frames, patches", [(1, False), (3, False), (2, True)])
def test_pairs_of_clips_equal_their_twin(frames: int, patches: bool):
    clips = test_ops_clip_pairwise.make_clips(12, 37, frames, patches=patches)
    pairs = operators().clip_pairs(*test_ops_clip_pairwise.operands(clips))
    expected = test_ops_clip_pairwise.find_pairs(clips, "torch")
    assert expected.any()
    assert (pairs != expected).sum() <= 1e-3 * pairs.numel()
    astray = clips._replace(video_index=clips.video_index * 9 - 1)
    assert not operators().clip_pairs(*test_ops_clip_pairwise.operands(astray)).any()


@pytest.mark.parametrize("dtype, off", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_terms_of_clips_equal_their_twin(dtype, off):
    clips = test_ops_clip_pairwise.make_clips(12, 37)
    for pairs in (
        test_ops_clip_pairwise.find_pairs(clips, "torch"),
        torch.full(clips.logits.shape, -1, dtype=torch.int16),  # neighbours beyond the map as well
    ):
        logits = clips.logits.to(dtype)
        steps = torch.tensor(clips.steps)
        got = operators().clip_terms(logits, pairs, clips.shifts, steps, True)
        without = operators().clip_terms(logits, pairs, clips.shifts, steps, False)
        assert torch.equal(got[0], without[0])
        assert without[2].numel() == 0
        wide = logits.double().requires_grad_()
        terms, edges = ops.clip_pairwise_terms(
            wide, pairs, clips.shifts, clips.steps, backend="torch"
        )
        expected = (terms, edges, *torch.autograd.grad(terms.sum(), wide))
        for mine, twin in zip(got, expected, strict=True):
            torch.testing.assert_close(mine.double(), twin.detach(), rtol=off, atol=4 * off)


@pytest.mark.parametrize("size", [(90, 123), (20, 30), (7, 200), (1, 1), (33, 1), (300, 5)])
def test_masks_are_those_of_the_twin(size, monkeypatch: pytest.MonkeyPatch):
    emulated = operators()
    monkeypatch.setattr(mask_runs, "operator", lambda name: getattr(emulated, name))
    logits = test_ops_masks.blobs(3, 20, 30)
    logits[1] = -1
    got = mask_runs._through_events(logits, size, 0.2)
    assert same_masks(got, ops.logits_to_rle(logits, size, 0.2, backend="torch"))
    assert masks.area(got[1]) == 0
    assert mask_runs._through_events(logits[:0], size, 0.2) == []


def same_masks(found: list[RLE], expected: list[RLE]) -> bool:
    """Tell whether masks are the same, but for rounding where torch does not fuse operations."""
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        return found == expected
    pairs = zip(found, expected, strict=True)
    return all((masks.decode(a) != masks.decode(b)).mean() < 1e-3 for a, b in pairs)


@pytest.mark.parametrize("original", [(720, 405), (61, 97), (33, 1)])
def test_inference_encodes_what_it_does_on_a_cpu(original, monkeypatch: pytest.MonkeyPatch):
    emulated = operators()
    monkeypatch.setattr(mask_runs, "operator", lambda name: getattr(emulated, name))
    logits, resized = test_ops_masks.blobs(4, 24, 32), (90, 121)
    logits = (logits * 2).round() / 2  # many pixels lie at the threshold itself
    picks = infer._places(resized, original, logits.device)
    got = mask_runs._through_events(logits, infer._enlarged_size(logits), 0.0, picks)
    assert same_masks(got, infer.encode_masks(logits, resized, original))


@pytest.mark.parametrize("size", [(1, 1), (33, 5), (31, 40), (300, 40)])
def test_stacks_equal_their_twin(size):
    random = torch.Generator().manual_seed(size[0])
    dense = torch.rand(5, *size, generator=random) < torch.linspace(0, 0.3, 5)[:, None, None]
    stack, few = ops.mask_stack(dense), ops.mask_stack(dense[1:4])
    assert torch.equal(operators().mask_pack(dense), stack.words)
    found = operators().mask_extents(stack.words)
    areas, boxes = ops.mask_extents(stack)
    assert torch.equal(found[:, 0], areas)
    assert torch.equal(found[:, 1:], boxes)
    common = (dense[:, None] & dense[None, 1:4]).sum((2, 3))
    assert torch.equal(operators().mask_overlaps(stack.words, few.words), common)


def test_bits_of_logits_equal_their_twin():
    logits, nothing = test_ops_masks.blobs(3, 20, 30), torch.empty(0, dtype=torch.int32)
    words, counts = operators().mask_events(logits, nothing, nothing, 77, 90, 0.1, False)
    stack = ops.mask_stack(logits, (77, 90), 0.1)
    assert (words != stack.words).sum() <= 2
    full = ops.MaskStack(words, (77, 90))
    assert torch.equal(counts.sum((1, 2)), ops.mask_extents(full)[0])
