"""AOT and DeAOT: the reference's numbers, local attention, and the engine that carries masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pmvis_core.models.deaot import DeAOT, Variant
from pmvis_core.nn.local_attention import local_attention
from pmvis_core.propagation.deaot import (
    DeaotPropagator,
    DeaotSettings,
    group_objects,
    merge_passes,
    network_size,
)
from pmvis_core.propagation.flow import Prediction
from pmvis_core.types import VideoInfo
from tests import parity_deaot


def test_golden_variants(shared: Path) -> None:
    """Weights by name, every stage, and the masks of every frame."""
    some = ("aott", "deaots", "deaott", "r50_deaotl")
    rows = list(parity_deaot.check(shared / "golden/deaot", some))
    assert len(rows) > 50
    assert not [row for row in rows if not row[1]]


@pytest.mark.parametrize(
    ("size", "aligned", "multiple"),
    [
        ((193, 337), (193, 337), (192, 336)),
        ((214, 311), (209, 305), (208, 304)),
        ((480, 854), (481, 849), (480, 848)),
        ((720, 1280), (577, 1041), (592, 1040)),
        ((1080, 1920), (577, 1041), (592, 1040)),
        ((360, 640), (353, 641), (352, 640)),
        ((1280, 720), (1041, 577), (1040, 592)),
        ((24, 24), (17, 17), (32, 32)),
    ],
)
def test_input_sizes_are_the_reference_ones(
    size: tuple[int, int], aligned: tuple[int, int], multiple: tuple[int, int]
) -> None:
    assert network_size(size, 1040, True) == aligned
    assert network_size(size, 1040, False) == multiple


def brute_force(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Attend pixel by pixel."""
    height, width = grid
    side = round(bias.shape[-1] ** 0.5)
    out = torch.zeros_like(value)
    for b in range(len(query)):
        for p in range(height * width):
            logits, values = [], []
            for d in range(side * side):
                y, x = p // width + d // side - side // 2, p % width + d % side - side // 2
                if 0 <= y < height and 0 <= x < width:
                    logits.append(query[b, p] @ key[b, y * width + x] + bias[b, p, d])
                    values.append(value[b, y * width + x])
            weights = torch.stack(logits).softmax(0)
            out[b, p] = (weights[:, None] * torch.stack(values)).sum(0)
    return out


def tensors(grid: tuple[int, int], side: int, batch: int = 2) -> tuple[Tensor, ...]:
    """Make random inputs of local attention in float64."""
    generator = torch.Generator().manual_seed(sum(grid))
    number = grid[0] * grid[1]
    shapes = [(batch, number, 3), (batch, number, 3), (batch, number, 4), (batch, number, side**2)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (5, 1), (4, 7), (9, 3)])
@pytest.mark.parametrize("side", [3, 5])
def test_local_attention_is_the_definition(grid: tuple[int, int], side: int) -> None:
    inputs = tensors(grid, side)
    found, weights = local_attention(*inputs, grid)
    torch.testing.assert_close(found, brute_force(*inputs, grid))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_local_attention_has_the_gradients_of_its_values() -> None:
    inputs = tuple(x.requires_grad_() for x in tensors((3, 4), 3, batch=1))
    assert torch.autograd.gradcheck(lambda *x: local_attention(*x, (3, 4))[0], inputs)


@pytest.fixture(scope="module")
def network() -> DeAOT:
    """Return a small network with fixed random weights."""
    torch.manual_seed(0)
    return DeAOT(Variant("mobilenet_v2", 2, 2)).eval()


FRAMES = parity_deaot.Stack(
    np.random.default_rng(0).integers(0, 256, (7, 40, 56, 3), dtype=np.uint8)
)
PUBLISHED = DeaotSettings()
INFO = VideoInfo(1, "clip", 40, 56, 7)


def squares(number: int) -> dict[int, np.ndarray]:
    """Return masks of objects 100, 101, ... that do not overlap."""
    found = {}
    for i in range(number):
        mask = np.zeros((40, 56), np.uint8)
        row, column = divmod(i, 8)
        mask[6 * row : 6 * row + 5, 7 * column : 7 * column + 6] = 1
        found[100 + i] = mask
    return found


def carried(
    network: DeAOT, objects: dict[int, np.ndarray], settings: DeaotSettings = PUBLISHED
) -> list[dict[int, Prediction]]:
    """Carry objects from the first frame to the last; return the probabilities of each frame."""
    propagator = DeaotPropagator(network, torch.device("cpu"), settings)
    sweep = propagator.open(FRAMES, INFO).sweep()
    assert sweep.advance(0) == {}
    for number, mask in objects.items():
        sweep.add(number, mask)
    return [sweep.advance(t) for t in range(1, 7)]


@pytest.mark.parametrize("number", [1, 10, 13, 40])
def test_any_number_of_objects(network: DeAOT, number: int) -> None:
    objects = squares(number)
    for frame in carried(network, objects):
        assert set(frame) == set(objects)
        assert sum(int(found.mask.sum()) for found in frame.values()) <= 40 * 56
        total = sum(found.probability for found in frame.values())
        assert float(np.max(total)) <= 1 + 1e-4


def test_a_group_that_splits_gives_a_frame_the_same_features_once(network: DeAOT) -> None:
    propagator = DeaotPropagator(network, torch.device("cpu"))
    video = propagator.open(FRAMES, INFO)
    seen: list[int] = []
    encode = network.encode
    network.encode = lambda image: (seen.append(1), encode(image))[1]  # type: ignore[method-assign]
    try:
        for _ in range(3):
            sweep = video.sweep()
            sweep.advance(0)
            sweep.add(1, squares(1)[100])
            sweep.advance(1)
    finally:
        del network.encode  # type: ignore[method-assign]
    assert len(seen) == 2


def test_objects_of_other_key_frames_do_not_compete(network: DeAOT) -> None:
    """A later object must leave the one that is on its way untouched."""
    masks = squares(2)
    alone = carried(network, {100: masks[100]})
    sweep = DeaotPropagator(network, torch.device("cpu")).open(FRAMES, INFO).sweep()
    sweep.advance(0)
    sweep.add(100, masks[100])
    for t in range(1, 7):
        found = sweep.advance(t)
        np.testing.assert_array_equal(found[100].probability, alone[t - 1][100].probability)
        if t == 3:
            sweep.add(101, masks[101])
    assert set(found) == {100, 101}


def test_dropped_objects_are_not_reported_and_an_empty_sweep_is_free(network: DeAOT) -> None:
    sweep = DeaotPropagator(network, torch.device("cpu")).open(FRAMES, INFO).sweep()
    sweep.advance(0)
    for number, mask in squares(2).items():
        sweep.add(number, mask)
    assert set(sweep.advance(1)) == {100, 101}
    sweep.drop(100)
    assert set(sweep.advance(2)) == {101}
    sweep.drop(101)
    assert sweep.advance(3) == {}


def test_duplicates_do_not_travel_together() -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[2:12, 2:12] = 1
    shifted = np.roll(mask, 1, 1)
    half = np.zeros_like(mask)
    half[2:12, 8:18] = 1
    hidden = np.zeros_like(mask)
    hidden[3:6, 3:6] = 1
    waiting = {5: mask, 6: shifted, 7: half, 8: hidden}
    assert group_objects(waiting, DeaotSettings()) == [[5, 7], [6], [8]]


def test_memory_is_thinned_but_the_reference_stays(network: DeAOT) -> None:
    """With room for the reference alone, memory is that of a network that never adds an entry."""
    one = squares(1)
    only = carried(network, one, DeaotSettings(memory_limit=1))
    never = carried(network, one, DeaotSettings(memory_gap=9999))
    every = carried(network, one)
    for a, b in zip(only, never, strict=True):
        np.testing.assert_array_equal(a[100].probability, b[100].probability)
    assert not np.array_equal(every[-1][100].probability, never[-1][100].probability)


def test_merged_passes_are_probabilities() -> None:
    torch.manual_seed(1)
    probability = torch.randn(2, 11, 3, 4, dtype=torch.float64).mul(3).softmax(1)
    merged = merge_passes(probability, 13)
    assert merged.shape == (14, 3, 4)
    torch.testing.assert_close(merged.sum(0), torch.ones(3, 4, dtype=torch.float64))
    single = merge_passes(probability[:1], 4)
    assert torch.equal(single, probability[0, :5])
