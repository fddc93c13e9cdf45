"""On a GPU: what carries the operations there against the twins; skipped without a GPU.

tests/benchmarks/gpu.sh runs this for the compiled kernels and, with PMVIS_NATIVE=jit, for cupy's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pmvis_core import infer, masks, ops
from pmvis_core.ops import library
from tests import (
    test_ops,
    test_ops_clip_pairwise,
    test_ops_fused,
    test_ops_local_attention,
    test_ops_masks,
    test_ops_pairwise,
)
from tests.test_ops_emulated import TYPES, neighbours, tolerance

CARRIER: ops.Backend = "compiled" if library.GPU.loaded else "jit"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(
        not (library.GPU.loaded or library.JIT.loaded),
        reason=f"no GPU kernels: {library.GPU.reason}; {library.JIT.reason}",
    ),
]


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Ask torch for results that are always the same."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def attend(call: test_ops.Call, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return output and gradients of the GPU's kernels, and of the twin in float64 on the CPU."""
    value, levels, locations, weights = (t if isinstance(t, list) else t.detach() for t in call)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    typed = (value.to(dtype), locations.to(wide), weights.to(wide))
    leaves = [t.cuda().requires_grad_() for t in typed]
    output = ops.deformable_attention(leaves[0], levels, *leaves[1:], backend=CARRIER)
    random = torch.Generator().manual_seed(7)
    grad = torch.randn(output.shape, generator=random, dtype=torch.float64).to(dtype)
    got = [output, *torch.autograd.grad(output, leaves, grad.cuda())]
    exact = [t.double().requires_grad_() for t in typed]
    expected = ops.deformable_attention_reference(exact[0], levels, *exact[1:])
    return got, [expected, *torch.autograd.grad(expected, exact, grad.double())]


@pytest.mark.parametrize("channels", [1, 3, 8, 20, 32, 64, 72])
@pytest.mark.parametrize("dtype", TYPES)
def test_attention_equals_its_twin(channels, dtype):
    for call in (test_ops.make_call(channels, points=7), neighbours(300)):
        for mine, twin in zip(*attend(call, dtype), strict=True):
            off = max(tolerance(mine.dtype), 1e-11)
            torch.testing.assert_close(mine.double().cpu(), twin, rtol=off, atol=5 * off)


@pytest.mark.parametrize("channels", [3, 8, 32, 72])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [2, 4])
def test_fused_attention_equals_its_twin(channels, dtype, size):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for padded in (False, True):
        call = test_ops_fused.make_call(channels, size, padded=padded, points=7)
        call = call.to(wide, value=dtype)
        there = [t.detach().cuda().requires_grad_() for t in call.leaves]
        padding = None if call.padding is None else call.padding.cuda()
        output = ops.fused_deformable_attention(
            there[0], call.levels, *there[1:], padding, backend=CARRIER
        )
        grad = torch.ones_like(output)
        got = [output, *torch.autograd.grad(output, there, grad)]
        exact = call.to(torch.float64)
        expected = ops.fused_deformable_attention(*exact, backend="torch")
        wanted = [expected, *torch.autograd.grad(expected.sum(), exact.leaves)]
        for mine, twin in zip(got, wanted, strict=True):
            off = max(tolerance(mine.dtype), 1e-11)
            torch.testing.assert_close(mine.double().cpu(), twin, rtol=off, atol=5 * off)


@pytest.mark.parametrize("dtype", TYPES)
def test_deterministic_attention(deterministic, dtype):
    first, expected = attend(neighbours(3000), dtype)
    for _ in range(3):
        again, _ = attend(neighbours(3000), dtype)
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    for mine, twin in zip(first, expected, strict=True):
        off = max(tolerance(mine.dtype), 1e-11)
        torch.testing.assert_close(mine.double().cpu(), twin, rtol=off, atol=50 * off)


def test_attention_in_torch_compile_and_opcheck():
    value, levels, locations, weights = (
        t if isinstance(t, list) else t.detach().float().cuda() for t in test_ops.make_call(8)
    )
    quick = torch.compile(ops.deformable_attention, backend="aot_eager", fullgraph=True)
    want = ops.deformable_attention(value, levels, locations, weights)
    torch.testing.assert_close(quick(value, levels, locations, weights), want)
    operator = torch.ops.pmvis.deformable_attention.default
    operands = (value.requires_grad_(), torch.tensor(levels), locations, weights)
    found = torch.library.opcheck(operator, operands, test_utils=("test_schema", "test_faketensor"))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", test_ops_local_attention.CASES)
@pytest.mark.parametrize("dtype", TYPES)
def test_windows_equal_their_twin(case, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    call = test_ops_local_attention.make_call(case).to(dtype, wide)
    there = call._replace(
        **{name: t.cuda() for name, t in call._asdict().items() if isinstance(t, Tensor)}
    )
    leaves = [t.detach().requires_grad_() for t in there.leaves]
    got = test_ops_local_attention.results(
        test_ops_local_attention.Call(*leaves, *there[4:]), backend=CARRIER
    )
    expected = test_ops_local_attention.results(call.to(torch.float64), backend="torch")
    for mine, twin in zip(got, expected, strict=True):
        off = max(tolerance(mine.dtype), 1e-11)
        torch.testing.assert_close(mine.double().cpu(), twin, rtol=off, atol=5 * off)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 33, 17), (2, 200, 301)])
@pytest.mark.parametrize("window", [(3, 2), (5, 3)])
def test_similarity_equals_its_twin(size, window):
    images = test_ops_pairwise.photo(*size)
    got = ops.lab_similarity(images.cuda(), *window, backend=CARRIER)
    expected = ops.lab_similarity(images, *window, backend="torch")
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype, off", [(torch.float32, 5e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size", [(35, 45), (5, 300), (120, 214)])
def test_loss_equals_its_twin(size, dtype, off):
    for seed, dilation in enumerate((1, 2, 8)):
        call = test_ops_pairwise.make_call(*size, dtype, dilation, seed)
        there = call._replace(
            **{name: getattr(call, name).cuda() for name in call._fields[:4]},
            valid=call.valid.cuda(),
        )
        logits = there.logits.clone().requires_grad_()
        terms, edges = ops.pairwise_terms(
            logits, *there[1:5], valid=there.valid, dilation=dilation, backend=CARRIER
        )
        (slopes,) = torch.autograd.grad(terms.sum(), logits)
        exact = call.logits.double().requires_grad_()
        expected = ops.pairwise_terms(
            exact, *call[1:5], valid=call.valid, dilation=dilation, backend="torch"
        )
        wanted = (*expected, torch.autograd.grad(expected[0].sum(), exact)[0])
        for mine, twin in zip((terms, edges, slopes), wanted, strict=True):
            torch.testing.assert_close(mine.double().cpu(), twin.double(), rtol=off, atol=off)


@pytest.mark.parametrize("size", [(90, 123), (720, 1280), (33, 1)])
def test_masks_are_those_of_the_twin(size):
    logits = test_ops_masks.blobs(7, 90, 160)
    got = ops.logits_to_rle(logits.cuda(), size, 0.1, backend=CARRIER)
    for mine, twin in zip(got, ops.logits_to_rle(logits, size, 0.1, backend="torch"), strict=True):
        apart = masks.decode(mine) != masks.decode(twin)
        assert apart.sum() <= 1e-4 * apart.size + 1
    assert ops.logits_to_rle(logits[:0].cuda(), size, backend=CARRIER) == []


@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("dtype, off", [(torch.float32, 5e-6), (torch.float64, 1e-12)])
def test_clips_equal_their_twins(patches, dtype, off):
    images = test_ops_pairwise.photo(2, 121, 87)
    means = ops.lab_means(images.cuda(), 4, 2, backend=CARRIER)
    expected = ops.lab_means(images, 4, 2, backend="torch")
    torch.testing.assert_close(means.cpu(), expected, rtol=1e-5, atol=2e-5)
    clips = test_ops_clip_pairwise.make_clips(70, 90, patches=patches)
    clips = clips._replace(logits=clips.logits.to(dtype))
    there = clips._replace(
        **{name: value.cuda() for name, value in clips._asdict().items() if hasattr(value, "cuda")}
    )
    pairs = test_ops_clip_pairwise.find_pairs(clips, "torch")
    apart = test_ops_clip_pairwise.find_pairs(there, CARRIER).cpu() != pairs
    assert apart.sum() <= 1e-3 * pairs.numel()
    logits, exact = there.logits.requires_grad_(), clips.logits.double().requires_grad_()
    got = ops.clip_pairwise_terms(logits, pairs.cuda(), there.shifts, clips.steps, backend=CARRIER)
    wanted = ops.clip_pairwise_terms(exact, pairs, clips.shifts, clips.steps, backend="torch")
    slopes = torch.autograd.grad(got[0].sum(), logits)[0]
    expected_slopes = torch.autograd.grad(wanted[0].sum(), exact)[0]
    for mine, twin in zip((*got, slopes), (*wanted, expected_slopes), strict=True):
        torch.testing.assert_close(
            mine.detach().double().cpu(), twin.detach().double(), rtol=off, atol=4 * off
        )


def test_stacks_equal_their_twin():
    logits = test_ops_masks.blobs(7, 90, 160)
    stack = ops.mask_stack(logits.cuda(), (720, 1280), 0.1, backend=CARRIER)
    dense = torch.nn.functional.interpolate(logits[:, None], (720, 1280), mode="bilinear")[:, 0]
    exact = ops.mask_stack(dense > 0.1)
    assert (stack.words.cpu() != exact.words).sum() <= 1e-4 * exact.words.numel() + 1
    packed = ops.mask_stack((dense > 0.1).cuda(), backend=CARRIER)
    assert torch.equal(packed.words.cpu(), exact.words)
    for mine, twin in zip(
        ops.mask_extents(packed, backend=CARRIER), ops.mask_extents(exact), strict=True
    ):
        assert torch.equal(mine.cpu(), twin)
    ious = ops.mask_iou(packed, packed, backend=CARRIER)
    assert torch.equal(ious.cpu(), ops.mask_iou(exact, exact))


@pytest.mark.parametrize("original", [(720, 405), (61, 97), (33, 1)])
def test_inference_encodes_what_it_does_on_a_cpu(original):
    logits, resized = test_ops_masks.blobs(4, 24, 32), (90, 121)
    logits = (logits * 2).round() / 2  # many pixels lie at the threshold itself
    got = infer.encode_masks(logits.cuda(), resized, original)
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert got == infer.encode_masks(logits, resized, original)
