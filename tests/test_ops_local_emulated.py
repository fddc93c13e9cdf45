"""Local attention on the GPU: its kernels and launchers, run on the CPU, against the twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pmvis_core.ops import jit, jit_windows
from tests.emulated import Launcher, needs_compiler, operators
from tests.test_ops_emulated import TYPES, tolerance
from tests.test_ops_local_attention import CASES, Call, make_call, results

pytestmark = needs_compiler

KERNELS = [
    *(f"pmvis::window_scores<{kind}>" for kind in ("float", "pmvis::Bfloat")),
    *(
        f"pmvis::window_sums<{kind}, {lanes}, {gathers}>"
        for kind in ("float", "pmvis::Bfloat")
        for lanes in (1, 4)
        for gathers in ("false", "true")
    ),
]


def typed(case: str, dtype: torch.dtype) -> Call:
    """Return a case as the GPU's kernels take it."""
    return make_call(case).to(dtype, torch.promote_types(dtype, torch.float32))


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return sums and weights of the emulated kernels."""
    return operators().local_attention(*(t.detach() for t in call.leaves), *call.grid)


def backward_operands(call: Call, weights: Tensor) -> tuple[Tensor | int, ...]:
    """Return what the gradient's operator takes."""
    query, key, value, _ = (t.detach() for t in call.leaves)
    return (call.grad, call.grad_weights, query, key, value, weights, *call.grid)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TYPES)
def test_it_equals_its_twin(case: str, dtype: torch.dtype) -> None:
    call = typed(case, dtype)
    sums, weights = forward(call)
    grads = operators().local_attention_backward(*backward_operands(call, weights))
    wide = torch.promote_types(dtype, torch.float32)
    kinds = (dtype, wide, dtype, dtype, dtype, wide)
    expected = results(call.to(torch.float64), backend="torch")
    for got, want, kind in zip((sums, weights, *grads), expected, kinds, strict=True):
        assert got.dtype == kind
        off = max(tolerance(kind), 1e-11)
        torch.testing.assert_close(got.double(), want, rtol=off, atol=5 * off)


def test_weights_without_a_gradient() -> None:
    call = typed("odd", torch.float32)
    _, weights = forward(call)
    operands = list(backward_operands(call, weights))
    operands[1] = torch.zeros_like(weights)
    zeros = operators().local_attention_backward(*operands)
    operands[1] = torch.empty(0)
    none = operators().local_attention_backward(*operands)
    assert all(torch.equal(*pair) for pair in zip(zeros, none, strict=True))


def test_the_order_of_blocks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    call = typed("published window", torch.float32)
    sums, weights = forward(call)
    operands = backward_operands(call, weights)
    first = (sums, weights, *operators().local_attention_backward(*operands))
    monkeypatch.setenv("PMVIS_EMULATE_BACKWARDS", "1")
    again = (*forward(call), *operators().local_attention_backward(*operands))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_the_launchers_refuse_what_they_cannot_read() -> None:
    call = typed("odd", torch.float32)
    good = [*(t.detach() for t in call.leaves), *call.grid]
    for place, wrong, problem in (
        (0, good[0][:1], "query must be|key must be"),
        (0, good[0].double(), "one type"),
        (2, good[2].transpose(0, 1).contiguous().transpose(0, 1), "contiguous"),
        (3, good[3].double(), "float32, or float64"),
        (3, good[3][:, :, :4].contiguous(), "odd side"),
        (4, 6, "query must be"),
    ):
        with pytest.raises(RuntimeError, match=problem):
            operators().local_attention(*good[:place], wrong, *good[place + 1 :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_launches_in_python_is_what_launches_in_cpp(
    dtype: torch.dtype, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "launch", Launcher(KERNELS, tmp_path))
    for case in ("one pixel", "published window", "many channels"):
        call = typed(case, dtype)
        operands = (*(t.detach() for t in call.leaves), *call.grid)
        mine, theirs = jit_windows.local_attention(*operands), forward(call)
        assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))
        back = backward_operands(call, theirs[1])
        for one, other in zip(
            jit_windows.local_attention_backward(*back),
            operators().local_attention_backward(*back),
            strict=True,
        ):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
