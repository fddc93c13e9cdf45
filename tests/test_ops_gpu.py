"""On a GPU: what carries the operations there against the twins; skipped without a GPU.

tests/benchmarks/gpu.sh runs this for the compiled kernels and, with PMVIS_NATIVE=jit, for cupy's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pmvis_core import masks, ops
from pmvis_core.ops import library
from tests import test_ops, test_ops_masks, test_ops_pairwise
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
