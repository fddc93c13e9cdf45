"""Deformable attention: the compiled kernel against its twin, gradients, and golden values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pmvis_core import ops
from tests.ops_runs import digest, needs_kernel, python

Shapes = list[tuple[int, int]]
Call = tuple[Tensor, Shapes, Tensor, Tensor]

LEVELS: Shapes = [(5, 7), (3, 4), (1, 1)]


def make_call(
    channels: int, dtype: torch.dtype = torch.float64, levels: Shapes = LEVELS, points: int = 3
) -> Call:
    """Return seeded inputs whose points lie inside, at the edges and outside."""
    generator = torch.Generator().manual_seed(channels)
    heads, queries, batch = 3, 6, 2
    tokens = sum(height * width for height, width in levels)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    value = draw(batch, tokens, heads, channels)
    locations = 0.5 + 0.6 * draw(batch, queries, heads, len(levels), points, 2)
    weights = draw(batch, queries, heads, len(levels), points)
    for tensor in (value, locations, weights):
        tensor.requires_grad_()
    return value, levels, locations, weights


def with_gradients(function: object, call: Call) -> list[Tensor]:
    """Return the output and the gradients of a seeded sum of it."""
    value, levels, locations, weights = call
    output = function(value, levels, locations, weights)
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return [output, *torch.autograd.grad(output, (value, locations, weights), grad)]


@pytest.mark.parametrize("channels", [1, 3, 4, 8, 16, 24, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@needs_kernel
def test_kernel_equals_its_twin(channels: int, dtype: torch.dtype) -> None:
    call = make_call(channels, dtype)
    widened = tuple(
        t if isinstance(t, list) else t.detach().double().requires_grad_() for t in call
    )
    expected = with_gradients(ops.deformable_attention_reference, widened)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-4
    for got, want in zip(with_gradients(ops.deformable_attention, call), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("channels", [3, 4])
def test_gradcheck(channels: int) -> None:
    value, levels, locations, weights = make_call(channels, levels=[(3, 4), (2, 2)], points=2)
    # Points are kept away from pixel centres, where the slope jumps.
    cells = torch.tensor([[4.0, 3.0], [2.0, 2.0]], dtype=torch.float64)[:, None]
    place = locations.detach() * cells - 0.5
    place = place.floor() + 0.2 + 0.6 * (place - place.floor())
    locations = ((place + 0.5) / cells).requires_grad_()

    def function(v: Tensor, p: Tensor, w: Tensor) -> Tensor:
        return ops.deformable_attention(v, levels, p, w)

    assert torch.autograd.gradcheck(function, (value, locations, weights), fast_mode=True)


@needs_kernel
def test_opcheck() -> None:
    value, levels, locations, weights = make_call(4)
    shapes = torch.tensor(levels)
    result = torch.library.opcheck(
        torch.ops.pmvis.deformable_attention.default, (value, shapes, locations, weights)
    )
    assert set(result.values()) == {"SUCCESS"}
    grad, bound = torch.ones(2, 6, 12, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
    operands = [t.detach() for t in (grad, value, shapes, locations, weights, bound)]
    result = torch.library.opcheck(
        torch.ops.pmvis.deformable_attention_backward.default, tuple(operands)
    )
    assert set(result.values()) == {"SUCCESS"}


@needs_kernel
def test_the_operator_refuses_what_it_cannot_read() -> None:
    value, levels, locations, weights = (
        t if isinstance(t, list) else t.detach() for t in make_call(4)
    )
    operator = torch.ops.pmvis.deformable_attention.default
    shapes = torch.tensor(levels)
    for operands, problem in (
        ((value, shapes + 1, locations, weights), "more tokens"),
        ((value, shapes - 1, locations, weights), "positive height"),
        ((value, shapes.int(), locations, weights), "int64"),
        ((value, shapes, locations.float(), weights), "one type"),
        ((value, shapes, locations[:1], weights), "locations must be"),
        ((value, shapes, locations, weights[:, :2].contiguous()), "weights must be"),
        ((value.transpose(1, 2), shapes, locations, weights), "contiguous"),
        ((value[0], shapes, locations, weights), "dimensions"),
        ((value.half(), shapes, locations.half(), weights.half()), "float32 and float64"),
    ):
        with pytest.raises(RuntimeError, match=problem):
            operator(*operands)


@pytest.mark.parametrize("case", ["E0", "E1", "E2"])
@pytest.mark.parametrize("function", [ops.deformable_attention, ops.deformable_attention_reference])
def test_golden(case: str, function: object, shared: Path) -> None:
    data = np.load(shared / "golden" / "idol" / f"{case}_msdeform.npz")
    levels = [(int(h), int(w)) for h, w in data["spatial_shapes"]]
    names = ("value", "sampling_locations", "attention_weights")
    value, locations, weights = (torch.tensor(data[name]).requires_grad_() for name in names)
    output = function(value, levels, locations, weights)
    grads = torch.autograd.grad(
        output, (value, locations, weights), torch.tensor(data["grad_output"])
    )
    expected = [torch.tensor(data[f"grad_{name}"]) for name in ("value", "locations", "weights")]
    if case != "E2":
        # At a pixel centre rounding decides which one-sided slope is taken (README, part E).
        smooth = ~torch.tensor(np.isin(data["loc_kind"], (1, 3, 4)))
        grads = (grads[0], grads[1] * smooth, grads[2])
        expected[1] = expected[1] * smooth
    torch.testing.assert_close(output, torch.tensor(data["output"]), rtol=1e-10, atol=1e-12)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("place", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@needs_kernel
def test_points_at_no_place_read_nothing(place: float, dtype: torch.dtype) -> None:
    value, levels, locations, weights = make_call(8, dtype)
    locations = torch.full_like(locations, place).requires_grad_()
    output, *grads = with_gradients(ops.deformable_attention, (value, levels, locations, weights))
    assert not output.any()
    assert not any(grad.any() for grad in grads)


def test_empty_batch_and_no_queries() -> None:
    value, levels, locations, weights = make_call(8)
    assert ops.deformable_attention(value[:0], levels, locations[:0], weights[:0]).shape[0] == 0
    output = ops.deformable_attention(value, levels, locations[:, :0], weights[:, :0])
    assert output.shape == (2, 0, 24)
    (grad,) = torch.autograd.grad(output.sum(), value)
    assert not grad.any()


@needs_kernel
def test_many_points_take_the_twin() -> None:
    value, levels, locations, weights = make_call(4, points=100)
    expected = ops.deformable_attention_reference(value, levels, locations, weights)
    got = ops.deformable_attention(value, levels, locations, weights)
    torch.testing.assert_close(got, expected)


def test_shapes_that_do_not_fit_are_named() -> None:
    value, levels, locations, weights = make_call(4)
    for operands, problem in (
        ((value, [(5, 7)], locations, weights), "value has shape"),
        ((value, [(5, 7), (3, 4), (0, 1)], locations, weights), "positive heights"),
        ((value, levels, locations[..., :1], weights), "locations have shape"),
        ((value, levels, locations[0], weights), "locations have shape"),
        ((value, levels, locations, weights[:, 1:]), "weights have shape"),
    ):
        with pytest.raises(ValueError, match=problem):
            ops.deformable_attention(*operands)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [pytest.param("compiled", marks=needs_kernel), "torch"])
def test_half_types_are_computed_in_float32(dtype, backend) -> None:
    value, levels, locations, weights = make_call(8, torch.float32)
    value = value.detach().to(dtype).requires_grad_()
    got = ops.deformable_attention(value, levels, locations, weights, backend=backend)
    wide = ops.deformable_attention(value.double(), levels, locations.double(), weights.double())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wide, rtol=torch.finfo(dtype).eps, atol=1e-4)
    grads = torch.autograd.grad(got.float().sum(), (value, locations, weights))
    assert [grad.dtype for grad in grads] == [dtype, torch.float32, torch.float32]


@needs_kernel
def test_autocast_of_the_operator() -> None:
    value, levels, locations, weights = make_call(8, torch.float32)
    operator, shapes = torch.ops.pmvis.deformable_attention.default, torch.tensor(levels)
    expected = operator(value.bfloat16().float(), shapes, locations, weights)
    with torch.autocast("cpu", torch.bfloat16):
        got = operator(value.bfloat16(), shapes, locations, weights)
        assert ops.deformable_attention(value.bfloat16(), levels, locations, weights).dtype == (
            torch.bfloat16
        )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", [pytest.param("compiled", marks=needs_kernel), "torch"])
def test_compiled_without_graph_breaks(backend) -> None:
    call = make_call(8, torch.float32)

    def function(value: Tensor, levels: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        return ops.deformable_attention(value, levels, locations, weights, backend=backend)

    quick = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, want in zip(with_gradients(quick, call), with_gradients(function, call), strict=True):
        torch.testing.assert_close(got, want)


def digests() -> str:
    """Return a digest of outputs and gradients in both types, for many channel counts."""
    calls = [make_call(n, t) for n in (3, 8, 16, 32, 64) for t in (torch.float32, torch.float64)]
    return digest(t for call in calls for t in with_gradients(ops.deformable_attention, call))


@needs_kernel
def test_both_instruction_sets_give_the_same_bits() -> None:
    script = "from tests.test_ops import digests, ops\nprint(ops.status()[0].state, digests())"
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
