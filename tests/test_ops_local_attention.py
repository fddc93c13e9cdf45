"""Local attention: kernel and twin against the definition, gradients, refusals, equal bits."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pmvis_core import ops
from pmvis_core.errors import ResourceError
from pmvis_core.nn import local_attention as tokens
from tests.ops_runs import digest, needs_kernel, python

Grid = tuple[int, int]
CASES: dict[str, tuple[Grid, int, int, int]] = {
    "one pixel": ((1, 1), 15, 3, 4),
    "one pixel, one cell": ((1, 1), 1, 4, 4),
    "one row": ((1, 19), 15, 8, 16),
    "one column": ((21, 1), 5, 2, 1),
    "window larger than the map": ((6, 5), 23, 7, 40),
    "no neighbours": ((3, 6), 1, 5, 16),
    "odd": ((5, 7), 3, 8, 20),
    "published window": ((8, 18), 15, 24, 33),
    "many channels": ((4, 18), 5, 16, 260),
    "no channels of keys": ((2, 3), 3, 0, 2),
}
"""Name: (h, w), side, channels of keys and of values."""


class Call(NamedTuple):
    """Operands, and the gradients of both results."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor
    grid: Grid
    grad: Tensor
    grad_weights: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Return what there are gradients of."""
        return self[:4]

    def to(self, dtype: torch.dtype, wide: torch.dtype | None = None) -> Call:
        """Return the call in a type, and what belongs to windows in another."""
        kinds = (dtype, dtype, dtype, wide or dtype)
        leaves = (
            t.detach().to(k).requires_grad_() for t, k in zip(self.leaves, kinds, strict=True)
        )
        return Call(*leaves, self.grid, self.grad.to(dtype), self.grad_weights.to(wide or dtype))


def make_call(case: str, batch: int = 2) -> Call:
    """Return a case in float64."""
    (height, width), side, depth, channels = CASES[case]
    random = torch.Generator().manual_seed(height * 100 + width)

    def draw(last: int) -> Tensor:
        shape = (batch, height * width, last)
        return torch.randn(shape, generator=random, dtype=torch.float64)

    leaves = [draw(n).requires_grad_() for n in (depth, depth, channels, side * side)]
    return Call(*leaves, (height, width), draw(channels), draw(side * side))


def results(call: Call, function: Any = ops.local_attention, **options: Any) -> list[Tensor]:
    """Return sums, weights, and the gradients through both."""
    found = function(*call[:5], **options)
    grads = torch.autograd.grad(found, call.leaves, (call.grad, call.grad_weights))
    return [*found, *grads]


def definition(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Compute a cell after the other: collect the keys and values there are, softmax, sum."""
    side, (height, width) = math.isqrt(bias.shape[2]), grid
    radius = side // 2
    sums, weights = [], []
    for b, p in ((b, p) for b in range(len(query)) for p in range(height * width)):
        places = {}
        for n in range(side * side):
            y, x = p // width + n // side - radius, p % width + n % side - radius
            if 0 <= y < height and 0 <= x < width:
                places[n] = y * width + x
        there, seen = torch.tensor(list(places)), list(places.values())
        logits = key[b, seen] @ query[b, p] + bias[b, p, there]
        powers = (logits - logits.max().detach()).exp()
        shares = powers / powers.sum()
        sums.append(shares @ value[b, seen])
        row = torch.zeros(side * side, dtype=query.dtype)
        weights.append(row.index_put((there,), shares))
    return torch.stack(sums).view_as(value), torch.stack(weights).view_as(bias)


@functools.cache
def defined(case: str) -> list[Tensor]:
    """Return the results of the definition."""
    return results(make_call(case), definition)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", [pytest.param("compiled", marks=needs_kernel), "torch"])
def test_it_is_the_definition(case: str, backend: str) -> None:
    call = make_call(case)
    for got, want in zip(results(call, backend=backend), defined(case), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
@needs_kernel
def test_the_kernel_in_float32(case: str) -> None:
    call = make_call(case).to(torch.float32)
    expected = results(call.to(torch.float64), backend="torch")
    for got, want in zip(results(call, backend="compiled"), expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [pytest.param("compiled", marks=needs_kernel), "torch"])
@pytest.mark.parametrize("result", [0, 1])
def test_gradcheck(backend: str, result: int) -> None:
    call = make_call("odd", batch=1)

    def function(*leaves: Tensor) -> Tensor:
        return ops.local_attention(*leaves, call.grid, backend=backend)[result]  # type: ignore

    # Only one of the results is asked for, so the other has no gradient at all.
    assert torch.autograd.gradcheck(function, call.leaves, fast_mode=True)


@needs_kernel
def test_what_no_gradient_is_asked_of_gets_none() -> None:
    call = make_call("odd")
    value = call.value.detach()
    sums, _ = ops.local_attention(call.query, call.key.detach(), value, call.bias, call.grid)
    sums.sum().backward()
    assert call.query.grad is not None
    assert call.key.grad is None


@needs_kernel
def test_opcheck() -> None:
    call = make_call("odd")
    operands = (*call.leaves, *call.grid)
    found = torch.library.opcheck(torch.ops.pmvis.local_attention.default, operands)
    assert set(found.values()) == {"SUCCESS"}
    leaves = [t.detach() for t in call.leaves]
    for grad_weights in (call.grad_weights, torch.empty(0, dtype=torch.float64)):
        backward = (call.grad, grad_weights, *leaves[:3], leaves[3].softmax(-1), *call.grid)
        found = torch.library.opcheck(torch.ops.pmvis.local_attention_backward.default, backward)
        assert set(found.values()) == {"SUCCESS"}


@needs_kernel
def test_the_operator_refuses_what_it_cannot_read() -> None:
    call = make_call("odd")
    query, key, value, bias = (t.detach() for t in call.leaves)
    operator = torch.ops.pmvis.local_attention.default
    for operands, problem in (
        ((query, key, value, bias, 5, 8), "query must be"),
        ((query, key, value, bias, 0, 7), "must be positive"),
        ((query, key, value, bias, -5, -7), "must be positive"),
        ((query, key, value, bias, 2**40, 2**40), "must be positive"),
        ((query[0], key, value, bias, 5, 7), "query must be"),
        ((query, key[:, :, :4].contiguous(), value, bias, 5, 7), "key must be"),
        ((query, key, value[:1], bias, 5, 7), "value must be"),
        ((query, key, value, bias[:, :, :4].contiguous(), 5, 7), "odd side"),
        ((query, key, value, bias[:, :, :0].contiguous(), 5, 7), "odd side"),
        ((query, key, value, bias[:, :, :5].contiguous(), 5, 7), "height \\* width, side"),
        ((query, key, value, bias[:1], 5, 7), "height \\* width, side"),
        ((query, key, value, bias[0], 5, 7), "3 dimensions"),
        ((query, key.float(), value, bias, 5, 7), "one type"),
        ((query, key, value, bias.float(), 5, 7), "bias must be"),
        ((query, key.mT.contiguous().mT, value, bias, 5, 7), "contiguous"),
        ((query.half(), key.half(), value.half(), bias.half(), 5, 7), "float32 and float64"),
        ((query, key, value, torch.zeros(2, 35, 625, dtype=query.dtype), 5, 7), "up to 23"),
    ):
        with pytest.raises(RuntimeError, match=problem):
            operator(*operands)
    backward = torch.ops.pmvis.local_attention_backward.default
    good = [call.grad, call.grad_weights, query, key, value, bias, 5, 7]
    for place, wrong, problem in (
        (0, call.grad[:, :, :5].contiguous(), "the gradient must be"),
        (0, call.grad.float(), "the gradient must be"),
        (1, call.grad_weights[:1], "height \\* width, side"),
        (1, call.grad_weights.float(), "weights must be"),
        (5, bias.float(), "weights must be"),
    ):
        with pytest.raises(RuntimeError, match=problem):
            backward(*good[:place], wrong, *good[place + 1 :])


def test_shapes_that_do_not_fit_are_named() -> None:
    query, key, value, bias = make_call("odd").leaves
    for operands, problem in (
        ((query, key, value, bias, (0, 35)), "grid is"),
        ((query, key, value, bias, (5, 6)), "query has shape"),
        ((query[:0], key[:0], value[:0], bias[:0], (5, 7)), "query has shape"),
        ((query, key[:1], value, bias, (5, 7)), "key has shape"),
        ((query, key, value[0], bias, (5, 7)), "value has shape"),
        ((query, key, value, bias[:1], (5, 7)), "bias has shape"),
        ((query, key, value, bias[..., :8], (5, 7)), "bias has 8 channels"),
        ((query, key, value, bias[..., :4], (5, 7)), "bias has 4 channels"),
    ):
        with pytest.raises(ValueError, match=problem):
            ops.local_attention(*operands)


@needs_kernel
def test_what_the_kernel_has_no_room_for_takes_the_twin() -> None:
    wide = torch.randn(1, 6, 625)
    few = torch.randn(1, 6, 2)
    assert ops.local_attention(few, few, few, wide, (2, 3))[1].shape == (1, 6, 625)
    with pytest.raises(ResourceError, match="wider than 23"):
        ops.local_attention(few, few, few, wide, (2, 3), backend="compiled")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [pytest.param("compiled", marks=needs_kernel), "torch"])
def test_half_types_are_computed_in_float32(dtype: torch.dtype, backend: Any) -> None:
    call = make_call("published window").to(dtype, torch.float32)
    sums, weights = ops.local_attention(*call[:5], backend=backend)
    assert (sums.dtype, weights.dtype) == (dtype, torch.float32)
    assert tokens.local_attention(*call[:5])[1].dtype == dtype
    wide = ops.local_attention(*call.to(torch.float64)[:5], backend="torch")
    torch.testing.assert_close(sums.double(), wide[0], rtol=torch.finfo(dtype).eps, atol=1e-4)
    torch.testing.assert_close(weights.double(), wide[1], rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(sums.float().sum(), call.leaves)
    assert [grad.dtype for grad in grads] == [dtype] * 3 + [torch.float32]


@needs_kernel
def test_autocast_of_the_operator() -> None:
    call = make_call("odd").to(torch.float32)
    operator = torch.ops.pmvis.local_attention.default
    halves = [t.detach().bfloat16() for t in call.leaves]
    expected = operator(*(t.float() for t in halves), *call.grid)
    with torch.autocast("cpu", torch.bfloat16):
        got = operator(*halves, *call.grid)
        assert ops.local_attention(*halves, call.grid)[0].dtype == torch.bfloat16
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@needs_kernel
def test_compiled_without_graph_breaks() -> None:
    call = make_call("odd").to(torch.float32)
    quick = torch.compile(ops.local_attention, backend="aot_eager", fullgraph=True)
    for got, want in zip(results(call, quick), results(call), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", [pytest.param("compiled", marks=needs_kernel), "torch"])
def test_what_is_no_number_stays_where_it_is_seen(backend: Any) -> None:
    call = make_call("published window", batch=1)
    query, key, value, bias = (t.detach().float() for t in call.leaves)
    query[0, 0] = math.nan
    sums, weights = ops.local_attention(query, key, value, bias, call.grid, backend=backend)
    assert sums[0, 0].isnan().all()
    assert not sums[0, 1:].isnan().any()
    bias[0, 5] = -math.inf  # but for one place
    bias[0, 5, 225 // 2] = 0
    sums, weights = ops.local_attention(key, key, value, bias, call.grid, backend=backend)
    assert torch.equal(sums[0, 5], value[0, 5])
    assert weights[0, 5].sum() == 1


@needs_kernel
def test_large_logits_do_not_overflow() -> None:
    call = make_call("published window").to(torch.float32)
    query, key, value, bias = (t.detach() for t in call.leaves)
    got = ops.local_attention(100 * query, key, value, 1e4 * bias, call.grid, backend="compiled")
    want = ops.local_attention(100 * query, key, value, 1e4 * bias, call.grid, backend="torch")
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def digests() -> str:
    """Return a digest of results and gradients in both types."""
    calls = [make_call(case).to(t) for case in CASES for t in (torch.float32, torch.float64)]
    return digest(t for call in calls for t in results(call))


@needs_kernel
def test_both_instruction_sets_give_the_same_bits() -> None:
    script = (
        "from tests.test_ops_local_attention import digests, ops\n"
        "row = next(row for row in ops.status() if row.name.startswith('local_attention'))\n"
        "print(row.state, digests())"
    )
    base = python(script, PMVIS_CPU_ISA="base").split()
    best = python(script, PMVIS_CPU_ISA="avx2").split()
    assert base[:2] == ["compiled", "(base)"]
    assert base[2] == best[2]


@needs_kernel
def test_the_number_of_threads_changes_no_bit() -> None:
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
def test_an_item_of_the_batch_does_not_depend_on_the_others() -> None:
    call = make_call("odd").to(torch.float32)
    alone = ops.local_attention(*(t[1:] for t in call.leaves), call.grid)
    both = ops.local_attention(*call[:5])
    assert all(torch.equal(one[0], two[1]) for one, two in zip(alone, both, strict=True))
