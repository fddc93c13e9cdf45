"""The learner's state: what it holds, and which states it takes over."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pmvis_core.errors import ResourceError
from pmvis_core.training.learner import Learner, ParameterGroup


def network() -> nn.Sequential:
    """Return layers of which the first two could change places unnoticed."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))


def learner_of(model: nn.Module, *, turned: bool = False) -> Learner:
    """Return a learner of a model, its parameters turned round or not."""
    named = list(model.named_parameters())
    group = ParameterGroup(named[::-1] if turned else named, weight_decay=0.1)
    return Learner(model, [group], clip_norm=0.5, ema_decay=0.9)


def step(learner: Learner, number: int) -> float:
    """Take a step of two parts and return the norm of its gradient."""
    x = torch.randn(8, 4, generator=torch.manual_seed(number))
    learner.start()
    for part, half in enumerate(x.chunk(2)):
        learner.backward(learner.model(half).square().mean() / 2, last=part == 1)
    norm = float(learner.gradient_norm())
    learner.update(number, [1e-2])
    return norm


@pytest.mark.parametrize("old", [False, True])
def test_a_state_is_taken_over_to_the_last_bit(old: bool) -> None:
    learner = learner_of(network())
    step(learner, 0)
    state = copy.deepcopy(learner.state())
    if old:  # states were written before the order of parameters was
        del state["layout"]
    again = learner_of(network())
    again.load(state)
    assert [step(again, number) for number in (1, 2)] == [step(learner, n) for n in (1, 2)]
    theirs = learner.weights()
    assert all(torch.equal(weight, theirs[name]) for name, weight in again.weights().items())


def test_moments_of_another_order_are_refused() -> None:
    learner = learner_of(network())
    step(learner, 0)
    turned = learner_of(network(), turned=True)
    before = {name: weight.clone() for name, weight in turned.weights().items()}
    with pytest.raises(ResourceError, match="lie in another order") as caught:
        turned.load(learner.state())
    assert "--overwrite" in str(caught.value.hint)
    assert all(torch.equal(weight, before[name]) for name, weight in turned.weights().items())
