"""A propagator's losses against plain numpy in double precision, their gradients, schedules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pmvis_core.propagator_training.losses import (
    bootstrapped_cross_entropy,
    frame_loss,
    kept_share,
    reference_weight,
    soft_jaccard,
)

Floats = NDArray[np.float64]


def frames(seed: int, ignored: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (3, 5, 6, 7), the last class silent, and labels with ignored pixels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (3, 5, 6, 7))
    logits[:, 4] = -1e10
    labels = rng.integers(0, 3, (3, 6, 7))
    labels[rng.random(labels.shape) < ignored] = 255
    return torch.from_numpy(logits), torch.from_numpy(labels)


def probabilities(logits: torch.Tensor) -> Floats:
    raised = np.exp(logits.numpy() - logits.numpy().max(1, keepdims=True))
    return np.asarray(raised / raised.sum(1, keepdims=True))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 0.5, 0.15]))
def test_cross_entropy_counts_the_hardest_labelled_pixels(seed: int, kept: float) -> None:
    logits, labels = frames(seed)
    expected = []
    for found, true in zip(probabilities(logits), labels.numpy(), strict=True):
        costs = [
            -np.log(found[true[y, x], y, x]) for y, x in zip(*np.nonzero(true != 255), strict=True)
        ]
        number = max(1, int(kept * len(costs)))
        expected.append(np.mean(sorted(costs)[-number:]))
    got = bootstrapped_cross_entropy(logits, labels, kept)
    assert got.item() == pytest.approx(np.mean(expected), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_jaccard_is_the_mean_over_the_classes_that_a_frame_shows(seed: int) -> None:
    logits, labels = frames(seed)
    labels[0][labels[0] == 2] = 1  # a frame with fewer objects
    expected = []
    for found, true in zip(probabilities(logits), labels.numpy(), strict=True):
        parts = []
        for k in set(true[true != 255].tolist()):
            inside, p = true[true != 255] == k, found[k][true != 255]
            hit, false, missed = p[inside].sum(), p[~inside].sum(), (1 - p[inside]).sum()
            parts.append(1 - hit / (hit + false + missed + 1e-6))
        expected.append(np.mean(parts))
    assert soft_jaccard(logits, labels).item() == pytest.approx(np.mean(expected), rel=1e-12)


def test_gradients() -> None:
    logits, labels = frames(1)
    logits = logits[:, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_jaccard(x, labels), logits)
    assert torch.autograd.gradcheck(lambda x: bootstrapped_cross_entropy(x, labels, 0.3), logits)


def test_perfect_and_hopeless_frames() -> None:
    labels = torch.tensor([[[0, 1], [2, 255]]])
    perfect = torch.nn.functional.one_hot(labels.clamp(max=2), 3).permute(0, 3, 1, 2) * 100.0
    assert frame_loss(perfect, labels.to(torch.uint8), 1.0).item() == pytest.approx(0, abs=1e-5)
    wrong = perfect.roll(1, 1)
    assert soft_jaccard(wrong, labels).item() == pytest.approx(1)
    assert frame_loss(wrong, labels, 0.5).item() == pytest.approx(0.5 * (100 + 1))


def test_what_nobody_labelled_has_no_gradient_and_no_loss() -> None:
    logits, labels = frames(3)
    logits.requires_grad_()
    frame_loss(logits, labels, 0.5).backward()
    assert logits.grad is not None
    assert not logits.grad.permute(0, 2, 3, 1)[labels == 255].any()
    nothing = frame_loss(logits, torch.full_like(labels, 255), 0.15)
    assert nothing.item() == 0
    nothing.backward()
    assert logits.grad.isfinite().all()


def test_schedules_start_and_end_where_they_should() -> None:
    assert [kept_share(step, 100) for step in (0, 25, 50, 99)] == pytest.approx(
        [1, 0.575, 0.15, 0.15]
    )
    assert [reference_weight(step, 100) for step in (0, 5, 10, 99)] == pytest.approx([1, 0.5, 0, 0])
    assert kept_share(0, 1) == reference_weight(0, 1) == 1
