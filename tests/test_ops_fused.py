"""Fused deformable attention: the compiled kernel against its twin, gradients, refusals."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pmvis_core import ops
from pmvis_core.ops import fused_deformable
from tests.ops_runs import digest, needs_kernel, python

LEVELS = [(5, 7), (3, 4), (1, 1)]
FULL = (torch.float32, torch.float64)


class Call(NamedTuple):
    """Operands of `fused_deformable_attention`, in its order."""

    value: Tensor
    levels: list[tuple[int, int]]
    references: Tensor
    offsets: Tensor
    logits: Tensor
    padding: Tensor | None

    def to(self, dtype: torch.dtype, *, value: torch.dtype | None = None) -> Call:
        """Return the call in another type, its tensors being leaves."""
        names = ("value", "references", "offsets", "logits")
        kinds = (value or dtype, dtype, dtype, dtype)
        return self._replace(
            **{
                name: getattr(self, name).detach().to(kind).requires_grad_()
                for name, kind in zip(names, kinds, strict=True)
            }
        )

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the gradient is taken of."""
        return self.value, self.references, self.offsets, self.logits

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """What the operator takes."""
        padding = torch.empty(0, dtype=torch.bool) if self.padding is None else self.padding
        leaves = [leaf.detach() for leaf in self.leaves]
        return (leaves[0], torch.tensor(self.levels), *leaves[1:], padding)


def make_call(channels: int, size: int = 2, *, padded: bool = True, points: int = 3) -> Call:
    """Return a seeded call in float64 whose points lie inside, at the edges and outside."""
    random = torch.Generator().manual_seed(channels + size)
    batch, queries, heads, levels = 2, 6, 3, len(LEVELS)
    tokens = sum(height * width for height, width in LEVELS)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    references = 0.5 + 0.3 * draw(batch, queries, levels, size)
    call = Call(
        draw(batch, tokens, heads, channels),
        LEVELS,
        references,
        2 * draw(batch, queries, heads, levels, points, 2),
        3 * draw(batch, queries, heads, levels, points),
        torch.rand(batch, tokens, generator=random) < 0.3 if padded else None,
    )
    return call.to(torch.float64)


def with_gradients(call: Call, backend: str | None = None) -> list[Tensor]:
    """Return the output and the gradients of a seeded sum of it."""
    output = ops.fused_deformable_attention(*call, backend=backend)
    random = torch.Generator().manual_seed(7)
    grad = torch.randn(output.shape, generator=random, dtype=torch.float64).to(output.dtype)
    return [output, *torch.autograd.grad(output, call.leaves, grad)]


@pytest.mark.parametrize("channels", [1, 3, 8, 16, 24, 32, 64])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("padded", [False, True])
@needs_kernel
def test_kernel_equals_its_twin(channels: int, size: int, padded: bool):
    for points in (3, 4):
        call = make_call(channels, size, padded=padded, points=points)
        expected = with_gradients(call, "torch")
        for dtype, off in ((torch.float64, 1e-12), (torch.float32, 3e-4)):
            got = with_gradients(call.to(dtype))
            for mine, twin in zip(got, expected, strict=True):
                torch.testing.assert_close(mine.double(), twin, rtol=off, atol=off)


@pytest.mark.parametrize("size", [2, 4])
def test_twin_is_the_formula_spelled_out(size: int):
    call = make_call(4, size)
    b, q, m, level, p = 1, 4, 2, 1, 2
    height, width = LEVELS[level]
    x, y = call.references[b, q, level, :2].tolist()
    dx, dy = call.offsets[b, q, m, level, p].tolist()
    if size == 2:
        place = (x + dx / width, y + dy / height)
    else:
        w, h = call.references[b, q, level, 2:].tolist()
        place = (x + dx / 3 * w * 0.5, y + dy / 3 * h * 0.5)
    shares = call.logits[b, q, m].flatten().exp()
    weight = (shares[level * 3 + p] / shares.sum()).item()
    column, row = place[0] * width - 0.5, place[1] * height - 0.5
    expected = torch.zeros(4, dtype=torch.float64)
    for j in range(height):
        for i in range(width):
            near = max(0.0, 1 - abs(column - i)) * max(0.0, 1 - abs(row - j))
            token = LEVELS[0][0] * LEVELS[0][1] + j * width + i
            if not call.padding[b, token]:
                expected += weight * near * call.value[b, token, m]
    only = torch.full_like(call.logits, -1e3)
    only[b, q, m, level, p] = call.logits[b, q, m, level, p]
    alone = ops.fused_deformable_attention(*call._replace(logits=only)).view(2, 6, 3, 4)
    torch.testing.assert_close(alone[b, q, m] * weight, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("channels", [3, 4])
def test_gradcheck(size: int, channels: int):
    call = make_call(channels, size)
    # Points are kept away from pixel centres, where the slope jumps.
    centres = torch.full_like(call.references, 0.5)
    centres[..., 2:] = 0.4
    unit = torch.tensor(LEVELS, dtype=torch.float64).flip(-1)[:, None] * 0.4 * 0.5 / 3
    unit = torch.ones_like(unit) if size == 2 else unit
    middle = torch.tensor(LEVELS, dtype=torch.float64).flip(-1)[:, None] * 0.5 - 0.5
    place = middle + call.offsets.detach() * unit
    place = place.floor() + 0.2 + 0.6 * (place - place.floor())
    offsets = ((place - middle) / unit).requires_grad_()

    def function(*leaves: Tensor) -> Tensor:
        return ops.fused_deformable_attention(leaves[0], LEVELS, *leaves[1:], call.padding)

    leaves = (call.value, centres.requires_grad_(), offsets, call.logits)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("size", [2, 4])
@needs_kernel
def test_opcheck(size: int):
    call = make_call(4, size)
    forward = torch.ops.pmvis.fused_deformable_attention.default
    value, shapes, *others = call.operands
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in (value, *others)]
    found = torch.library.opcheck(forward, (leaves[0], shapes, *leaves[1:]))
    assert set(found.values()) == {"SUCCESS"}
    grad, bound = torch.ones(2, 6, 12, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
    backward = torch.ops.pmvis.fused_deformable_attention_backward.default
    for wanted in (True, False):
        found = torch.library.opcheck(backward, (grad, *call.operands, bound, wanted))
        assert set(found.values()) == {"SUCCESS"}


def test_nobody_asks_for_the_gradient_of_references():
    call = make_call(8)
    wanted = with_gradients(call)
    references = call.references.detach()
    output = ops.fused_deformable_attention(*call._replace(references=references))
    random = torch.Generator().manual_seed(7)
    grad = torch.randn(output.shape, generator=random, dtype=torch.float64)
    got = torch.autograd.grad(output, (call.value, call.offsets, call.logits), grad)
    for mine, same in zip(got, (wanted[1], *wanted[3:]), strict=True):
        torch.testing.assert_close(mine, same, rtol=1e-13, atol=1e-13)


@needs_kernel
def test_the_operator_refuses_what_it_cannot_read():
    value, shapes, references, offsets, logits, padding = make_call(4).operands
    operator = torch.ops.pmvis.fused_deformable_attention.default
    for operands, problem in (
        ((value, shapes + 1, references, offsets, logits, padding), "more tokens"),
        ((value, shapes, references.float(), offsets, logits, padding), "references must be"),
        ((value, shapes, references[:, 1:], offsets, logits, padding), "references must be"),
        ((value, shapes, references[..., :1], offsets, logits, padding), "references must be"),
        ((value, shapes, references, offsets[:1], logits, padding), "locations must be"),
        ((value, shapes, references, offsets, logits[:, 1:], padding), "must be"),
        ((value, shapes, references, offsets, logits, padding[:, 1:]), "padding must be"),
        ((value, shapes, references, offsets, logits, padding.double()), "padding must be"),
    ):
        with pytest.raises(RuntimeError, match=problem):
            operator(*(tensor.contiguous() for tensor in operands))


def test_shapes_that_do_not_fit_are_named():
    call = make_call(4)
    for wrong, problem in (
        ({"references": call.references[0]}, "references have shape .*2 or 4"),
        ({"references": call.references[..., :1]}, "references have shape .*2 or 4"),
        ({"references": call.references[:, 1:]}, "references have shape .*expected .2, 6, 3, 2"),
        ({"offsets": call.offsets[..., :1]}, "offsets have shape"),
        ({"logits": call.logits[:, 1:]}, "logits have shape"),
        ({"padding": call.padding[:, 1:]}, "padding is torch.bool of shape"),
        ({"padding": call.padding.int()}, "padding is torch.int32"),
        ({"levels": LEVELS[:2]}, "value has shape"),
    ):
        with pytest.raises(ValueError, match=problem):
            ops.fused_deformable_attention(*call._replace(**wrong))


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("backend", [pytest.param("compiled", marks=needs_kernel), "torch"])
def test_logits_of_any_size(dtype: torch.dtype, backend: str):
    call = make_call(8).to(dtype)
    logits = call.logits.detach().clone()
    logits[0, 0] = 1e4 * logits[0, 0]
    logits[0, 1] = -1e30
    logits[0, 2, :, 0] = -math.inf
    logits[0, 3, 0, 1, 2] = math.nan
    logits[0, 4, 1, 2, 0] = math.inf
    logits[0, 5] = -math.inf
    call = call._replace(logits=logits.requires_grad_())
    output = ops.fused_deformable_attention(*call, backend=backend).view(2, 6, 3, 8)
    nothing = output.isnan().all(-1)
    assert nothing.equal(output.isnan().any(-1))
    assert nothing[0].tolist() == [
        *([False] * 3 for _ in range(3)),
        [True, False, False],
        [False, True, False],
        [True] * 3,
    ]
    assert not nothing[1].any()
    sound = call._replace(logits=logits[:, :3], **of_queries(call, slice(3)))
    expected = ops.fused_deformable_attention(*sound.to(torch.float64), backend="torch")
    off = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(output[:, :3].flatten(2).double(), expected, rtol=off, atol=off)


def of_queries(call: Call, some: slice) -> dict[str, Tensor]:
    """Return references and offsets of some queries."""
    return {"references": call.references[:, some], "offsets": call.offsets[:, some]}


@pytest.mark.parametrize("place", [math.nan, math.inf, -math.inf, 1e30, -1e30])
@pytest.mark.parametrize("size", [2, 4])
@needs_kernel
def test_points_at_no_place_read_nothing(place: float, size: int):
    call = make_call(8, size)
    call = call._replace(offsets=torch.full_like(call.offsets, place).requires_grad_())
    output, value, _, offsets, _ = with_gradients(call)
    assert not output.any()
    assert not value.any()
    assert not offsets[..., :].nan_to_num().any()


def test_all_padding_and_nothing_to_do():
    call = make_call(8)
    hidden = with_gradients(call._replace(padding=torch.ones_like(call.padding)))
    assert not any(tensor.any() for tensor in hidden)
    none = call._replace(logits=call.logits[:, :0], **of_queries(call, slice(0)))
    output = ops.fused_deformable_attention(*none)
    assert output.shape == (2, 0, 24)
    (grad,) = torch.autograd.grad(output.sum(), call.value)
    assert not grad.any()
    empty = Call(call.value[:0], LEVELS, *(t[:0] for t in call.leaves[1:]), call.padding[:0])
    assert ops.fused_deformable_attention(*empty).shape == (0, 6, 24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [pytest.param("compiled", marks=needs_kernel), "torch"])
def test_half_types_are_computed_in_float32(dtype: torch.dtype, backend: str):
    call = make_call(8).to(torch.float32, value=dtype)
    got = with_gradients(call, backend)
    assert [tensor.dtype for tensor in got] == [dtype, dtype, *[torch.float32] * 3]
    expected = ops.fused_deformable_attention(*call.to(torch.float64), backend="torch")
    torch.testing.assert_close(got[0].double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


@needs_kernel
def test_autocast_of_the_operator():
    call = make_call(8).to(torch.float32)
    operator = torch.ops.pmvis.fused_deformable_attention.default
    value, *others = call.operands
    expected = operator(value.bfloat16().float(), *others)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(operator(value.bfloat16(), *others), expected)


@pytest.mark.parametrize("backend", [pytest.param("compiled", marks=needs_kernel), "torch"])
def test_compiled_without_graph_breaks(backend: str):
    for call in (make_call(8), make_call(8, 4, padded=False)):
        quick = torch.compile(ops.fused_deformable_attention, backend="aot_eager", fullgraph=True)
        output = quick(*call, backend=backend)
        want = with_gradients(call, backend)
        random = torch.Generator().manual_seed(7)
        grad = torch.randn(output.shape, generator=random, dtype=torch.float64)
        got = [output, *torch.autograd.grad(output, call.leaves, grad)]
        for mine, same in zip(got, want, strict=True):
            torch.testing.assert_close(mine, same)


def test_no_sum_exceeds_the_bound():
    call = make_call(8)
    grad = torch.randn(2, 6, 24, dtype=torch.float64)
    output = ops.fused_deformable_attention(*call)
    (sums,) = torch.autograd.grad(output, call.value, grad)
    assert sums.abs().max() <= fused_deformable.largest_fused_sum(grad, call.logits)
    call.logits.detach()[0, 0, 0, 0, 0] = torch.nan
    assert fused_deformable.largest_fused_sum(grad, call.logits).isnan().all()


def digests() -> str:
    """Return a digest of outputs and gradients, for many kinds of calls."""
    calls = [
        make_call(channels, size, padded=padded, points=points).to(dtype)
        for channels, points in ((3, 1), (8, 3), (32, 4))
        for size in (2, 4)
        for padded in (False, True)
        for dtype in FULL
    ]
    return digest(tensor for call in calls for tensor in with_gradients(call))


@needs_kernel
def test_both_instruction_sets_give_the_same_bits():
    script = (
        "from tests.test_ops_fused import digests, ops\nprint(ops.status()[0].state, digests())"
    )
    base = python(script, PMVIS_CPU_ISA="base").split()
    best = python(script, PMVIS_CPU_ISA="avx2").split()
    assert base[:2] == ["compiled", "(base)"]
    assert base[2] == best[2]


@needs_kernel
def test_the_number_of_threads_changes_no_bit():
    before = torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(digests())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
