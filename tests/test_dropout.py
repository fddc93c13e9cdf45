"""Dropout: its rate, its scale, its gradient, and that a seed decides it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pmvis_core.nn.dropout import LEVELS, Dropout


def test_it_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    out = Dropout(0.1)(torch.ones(1000, 1003))
    level = round(0.1 * LEVELS)
    assert out.unique().tolist() == [0.0, pytest.approx(LEVELS / (LEVELS - level))]
    share = float((out == 0).float().mean())
    assert share == pytest.approx(0.1, abs=6 * (0.09 / out.numel()) ** 0.5)


@pytest.mark.parametrize("p", [1e-9, 0.5, 1 - 1e-9])
def test_neighbours_are_dropped_independently(p: float) -> None:
    torch.manual_seed(1)
    dropped = Dropout(p)(torch.ones(400_000)) == 0
    expected = min(max(p, 1 / LEVELS), 1 - 1 / LEVELS)
    for distance in (1, 2, 3, 4, 5):  # four elements share a random word
        both = float((dropped[distance:] & dropped[:-distance]).float().mean())
        assert both == pytest.approx(expected**2, abs=6 * expected / 400_000**0.5)


@pytest.mark.parametrize("shape", [(), (0, 5), (1,), (7, 3), (2, 3, 5)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    assert Dropout(0.5)(x).shape == x.shape
    assert Dropout(0.5).add(x, x).shape == x.shape


def test_any_layout() -> None:
    layer, x = Dropout(0.5), torch.randn(5, 4)
    torch.manual_seed(4)
    expected = layer(x)
    torch.manual_seed(4)
    assert torch.equal(layer(x.T.contiguous().T), expected)


def test_the_sum_is_that_of_a_residual_connection() -> None:
    layer, x, branch = Dropout(0.3), torch.randn(6, 9), torch.randn(6, 9)
    torch.manual_seed(2)
    expected = x + layer(branch)
    torch.manual_seed(2)
    torch.testing.assert_close(layer.add(x, branch), expected)


@pytest.mark.parametrize("add", [False, True])
def test_gradients(add: bool) -> None:
    layer = Dropout(0.4)

    def run(x: Tensor, branch: Tensor) -> Tensor:
        torch.manual_seed(3)
        return layer.add(x, branch) if add else layer(x) + branch

    parts = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(run, parts)


def test_half_precision_stays_so() -> None:
    layer = Dropout(0.2)
    branch = torch.randn(8, 8, dtype=torch.bfloat16, requires_grad=True)
    assert layer(branch).dtype == torch.bfloat16
    out = layer.add(torch.randn(8, 8), branch)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert branch.grad is not None
    assert branch.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_ends_are_torch_s(p: float) -> None:
    x = torch.randn(5, 5)
    assert torch.equal(Dropout(p)(x), x * (1 - p))
    assert torch.equal(Dropout(p).add(x, x), x + x * (1 - p))


def test_evaluation_draws_nothing() -> None:
    x, state = torch.randn(5), torch.get_rng_state()
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.5).eval().add(x, x), 2 * x)
    assert torch.equal(torch.get_rng_state(), state)
