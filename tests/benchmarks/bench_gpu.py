"""Time the GPU kernels: `python tests/benchmarks/bench_gpu.py`, on a machine with a GPU.

Each row gives the median milliseconds of the kernels and of a peer, in turns in one run, and what
share of the card's copy bandwidth (measured here, bytes read and written) the kernels reach, if
every byte of operands and results crossed once: 100 % is the limit of a kernel that is bound by
memory. Peers of deformable attention are grid_sample's form and, where cupy is, the im2col
formulation (im2col_baseline.cuh); of the others, the twins in torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bench_local_attention
import bench_pairwise
import numpy as np
import torch
from bench_deformable_attention import CASES, composed, make_fused_inputs, make_inputs, traffic
from torch import Tensor

from pmvis_core import native, ops
from pmvis_core.ops import jit

BASELINE = Path(__file__).with_name("im2col_baseline.cuh")
Call = Callable[[], Any]


def milliseconds(runs: int, *functions: Call) -> list[float]:
    """Return the median GPU milliseconds of each function, called in turns after two warm-ups."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(runs + 2):
        for function, kept in zip(functions, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(200_000)  # the host is ahead: launches cost nothing
            start.record()
            function()
            end.record()
            end.synchronize()
            if turn > 1:
                kept.append(start.elapsed_time(end))
    return [statistics.median(kept) for kept in times]


def copy_bandwidth() -> float:
    """Return bytes a second, read and written, of a copy on the device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    (time,) = milliseconds(9, lambda: target.copy_(source))
    return 2 * source.numel() / time * 1e3


def baseline(name: str, dtype: torch.dtype) -> Any:
    """Compile one of the two kernels of the im2col formulation."""
    import cupy

    kernel = f"baseline::{name}<{jit._TYPES[dtype]}>"
    module = cupy.RawModule(
        code=BASELINE.read_text(),
        options=("-std=c++17", f"-I{native.find_kernels()}"),
        name_expressions=(kernel,),
    )
    return module.get_function(kernel)


def run_baseline(kernel: Any, tensors: Sequence[Tensor], place: tuple[Any, ...]) -> None:
    """Launch it: a block for each query and head, a thread for each channel."""
    import cupy

    value, shapes, locations = place
    sizes = jit._sizes(shapes, value, locations)
    grid = (value.shape[0] * locations.shape[1] * value.shape[2], 1, 1)
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        pointers = [np.uint64(tensor.data_ptr()) for tensor in tensors]
        kernel(grid, (value.shape[3], 1, 1), (*pointers, *sizes))


def im2col(call: AttentionCall) -> list[Call]:
    """Return forward and backward of the im2col formulation, checked, or nothing without cupy."""
    value, _, locations, weights, output, grad = call
    # Half of a block is added to the other half, so channels must be a power of two.
    if not importlib.util.find_spec("cupy") or value.shape[3] & (value.shape[3] - 1):
        return []
    kernels = [baseline(name, value.dtype) for name in ("forward", "backward")]
    place = (value, torch.tensor(call.levels), locations)
    result = torch.empty_like(output)
    sums = torch.zeros_like(value, dtype=torch.float32)
    room = (sums, torch.empty_like(locations), torch.empty_like(weights))

    def forward() -> None:
        run_baseline(kernels[0], (value, locations, weights, result), place)

    def backward() -> Tensor:
        sums.zero_()
        run_baseline(kernels[1], (grad, value, locations, weights, *room), place)
        return sums.to(value.dtype)

    forward()
    torch.testing.assert_close(result.float(), output.float(), rtol=2e-2, atol=2e-2)
    backward()
    mine = torch.autograd.grad(output, (value, locations, weights), grad, retain_graph=True)
    for one, other in zip(mine, room, strict=True):
        off = 2e-2 * float(one.float().abs().max())
        torch.testing.assert_close(one.float(), other, rtol=0, atol=off)
    return [forward, backward]


class AttentionCall(NamedTuple):
    """Operands and result on the GPU."""

    value: Tensor
    levels: list[tuple[int, int]]
    locations: Tensor
    weights: Tensor
    output: Tensor
    grad: Tensor


def make_call(case: Any, dtype: torch.dtype) -> AttentionCall:
    """Return a case's call, computed once."""
    value, levels, locations, weights = make_inputs(*case)
    leaves = [
        t.detach().to("cuda", kind).requires_grad_()
        for t, kind in ((value, dtype), (locations, None), (weights, None))
    ]
    output = ops.deformable_attention(leaves[0], levels, *leaves[1:])
    return AttentionCall(leaves[0], levels, *leaves[1:], output, torch.randn_like(output))


def attention_rows(runs: int, dtype: torch.dtype, bandwidth: float) -> None:
    """Print forward and backward of deformable attention."""
    for name, case in CASES.items():
        call = make_call(case, dtype)
        leaves = (call.value, call.locations, call.weights)
        wide = (call.value.float(), call.levels, call.locations, call.weights)
        twin, wide_grad = ops.deformable_attention_reference(*wide), call.grad.float()
        torch.testing.assert_close(call.output.float(), twin, rtol=2e-2, atol=2e-2)

        @torch.no_grad()
        def forward(call: AttentionCall = call) -> None:
            ops.deformable_attention(*call[:4])

        @torch.no_grad()
        def sampled(wide: Any = wide) -> None:
            ops.deformable_attention_reference(*wide)

        def backward(call: AttentionCall = call, leaves: Any = leaves) -> None:
            torch.autograd.grad(call.output, leaves, call.grad, retain_graph=True)

        def sampled_backward(
            twin: Tensor = twin, leaves: Any = leaves, grad: Tensor = wide_grad
        ) -> None:
            torch.autograd.grad(twin, leaves, grad, retain_graph=True)

        other = im2col(call)
        moved = sum(t.numel() * t.element_size() for t in (*leaves, call.output))
        slopes = sum(t.numel() * t.element_size() for t in leaves)
        rows = (
            ("forward", forward, [sampled, *other[:1]], moved),
            ("backward", backward, [sampled_backward, *other[1:]], moved + slopes),
        )
        for kind, mine, peers, number in rows:
            title = f"{name}, {kind}, {str(dtype).removeprefix('torch.')}"
            report(title, runs, mine, peers, number / bandwidth)


def fused_rows(runs: int, dtype: torch.dtype, bandwidth: float) -> None:
    """Print the fused form, padded, against torch's operations before the same kernels."""
    for name, case in CASES.items():
        value, levels, *others = make_fused_inputs(*case, padded=True)
        tensors = [t.detach().cuda() for t in (value.to(dtype), *others) if t is not None]
        leaves = [tensors[place].requires_grad_() for place in (0, 2, 3)]
        arguments = (tensors[0], levels, *tensors[1:])
        output = ops.fused_deformable_attention(*arguments)
        torch.testing.assert_close(output, composed(*arguments), rtol=2e-2, atol=2e-2)
        ones = torch.ones_like(output)

        @torch.no_grad()
        def forward(function: Any, arguments: Any = arguments) -> None:
            function(*arguments)

        def both(
            function: Any, arguments: Any = arguments, leaves: Any = leaves, ones: Any = ones
        ) -> None:
            torch.autograd.grad(function(*arguments), leaves, ones)

        moved = traffic(arguments, output)
        for kind, run, number in zip(("forward", "both ways"), (forward, both), moved, strict=True):
            mine = partial(run, ops.fused_deformable_attention)
            title = f"{name}, fused {kind}, {str(dtype).removeprefix('torch.')}"
            report(title, runs, mine, [partial(run, composed)], number / bandwidth)


def report(name: str, runs: int, mine: Call, peers: Sequence[Call], least: float) -> None:
    """Print one row: times, ratios, and the share of the limit."""
    time, *others = milliseconds(runs, mine, *peers)
    ratios = " ".join(f"{other:9.3f} {other / time:6.1f}" for other in others)
    print(f"{name:44} {time:8.3f} {1e5 * least / time:6.1f} % {ratios}")


def other_rows(runs: int, bandwidth: float) -> None:
    """Print affinity, loss and masks."""
    for name, size in bench_pairwise.IMAGES.items():
        images = bench_pairwise.photos(*size).cuda()
        report(
            f"lab_similarity, {name}",
            runs,
            lambda images=images: ops.lab_similarity(images),
            [lambda images=images: ops.lab_similarity(images, backend="torch")],
            images.numel() * (1 + 32 / 3) / bandwidth,
        )
    random = torch.Generator().manual_seed(1)
    for name, (batch, height, width, number, side) in bench_pairwise.LOSSES.items():
        similarity = ops.lab_similarity(bench_pairwise.photos(batch, height, width)).cuda()
        index = torch.randint(batch, (number,), generator=random).cuda()
        size = torch.tensor([4.0 * width, 4.0 * height])
        sides = (torch.rand(number, 2, generator=random) * 0.6 + 0.7) * side * size
        corner = torch.rand(number, 2, generator=random) * (size - sides).clamp_min(0)
        boxes = torch.cat([corner, corner + sides], 1).cuda()
        logits = torch.randn(number, height, width, generator=random).cuda().requires_grad_()

        def both(
            backend: Any, x: Any = logits, s: Any = similarity, i: Any = index, b: Any = boxes
        ) -> None:
            loss = ops.pairwise_loss(x, s, i, b, bench_pairwise.THRESHOLD, backend=backend)
            torch.autograd.grad(loss, x)

        # Backward reads the slopes and writes the gradient.
        moved = 4 * similarity.numel() + 4 * 4 * logits.numel()
        report(
            f"pairwise_loss, {name}, both ways",
            runs,
            lambda both=both: both(None),
            [lambda both=both: both("torch")],
            moved / bandwidth,
        )
    clip_rows(runs, bandwidth)
    logits = torch.nn.functional.interpolate(
        torch.randn(60, 1, 6, 8, generator=random), (184, 320), mode="bicubic"
    )[:, 0].cuda()
    report(
        "logits_to_rle, 60 of 736x1280",
        runs,
        lambda: ops.logits_to_rle(logits, (736, 1280)),
        [lambda: ops.logits_to_rle(logits, (736, 1280), backend="torch")],
        (4 * logits.numel() + 60 * 736 * 1280 / 4) / bandwidth,
    )
    stack = ops.mask_stack(logits, (736, 1280))
    dense = torch.nn.functional.interpolate(logits[:, None], (736, 1280), mode="bilinear")[:, 0] > 0

    def published_iou() -> Tensor:
        flat = dense.flatten(1)
        common = flat.float() @ flat.float().T
        area = flat.sum(1)
        return common / (area[:, None] + area - common)

    report(
        "mask_iou, 60 x 60 of 736x1280",
        runs,
        lambda: ops.mask_iou(stack, stack),
        [published_iou],
        2 * stack.words.numel() * 4 / bandwidth,
    )


def clip_rows(runs: int, bandwidth: float) -> None:
    """Print pairs and loss of clips."""
    random = torch.Generator().manual_seed(2)
    for name, (frames, height, width, number, side) in bench_pairwise.CLIPS.items():
        images = bench_pairwise.photos(frames, 2 * height, 2 * width).cuda()
        colours = ops.lab_means(images, 2)[None]
        size = torch.tensor([2.0 * width, 2.0 * height])
        corner = torch.rand(number, frames, 2, generator=random) * 8 + size * (1 - side) / 2
        boxes = torch.cat([corner, corner + side * size], 2).cuda()
        cells = ops.clip_cells(boxes, height, width, 2)
        shifts = ops.clip_shifts(boxes, (2 * height, 2 * width), (height, width))
        index = torch.zeros(number, dtype=torch.long, device="cuda")
        logits = torch.randn(number, frames, height, width, generator=random).cuda()
        logits.requires_grad_()
        call = (colours, index, cells, shifts, ops.CLIP_STEPS, bench_pairwise.THRESHOLD)
        pairs = ops.clip_pairs(*call)
        report(
            f"clip_pairs, {name}",
            runs,
            lambda call=call: ops.clip_pairs(*call),
            [lambda call=call: ops.clip_pairs(*call, backend="torch")],
            (4 * colours.numel() + 2 * pairs.numel()) / bandwidth,
        )

        def both(
            backend: Any,
            x: Any = logits,
            p: Any = pairs,
            s: Any = shifts,
            i: Any = index,
        ) -> None:
            loss = ops.clip_pairwise_loss(x, p, s, ops.CLIP_STEPS, i, backend=backend)
            torch.autograd.grad(loss, x)

        # Backward reads the slopes and writes the gradient.
        report(
            f"clip loss, {name}, both ways",
            runs,
            lambda both=both: both(None),
            [lambda both=both: both("torch")],
            (2 * pairs.numel() + 4 * 4 * logits.numel()) / bandwidth,
        )


def window_rows(runs: int, dtype: torch.dtype, bandwidth: float) -> None:
    """Print local attention; the peer is its twin in torch."""
    for name, case in bench_local_attention.CASES.items():
        query, key, value, bias = bench_local_attention.make_operands(*case)
        leaves = [t.detach().to("cuda", dtype).requires_grad_() for t in (query, key, value)]
        leaves.append(bias.detach().cuda().requires_grad_())
        moved = sum(t.numel() * t.element_size() for t in (*leaves, leaves[2], leaves[3]))

        @torch.no_grad()
        def forward(backend: Any, leaves: Any = leaves, grid: Any = case[1]) -> Tensor:
            return ops.local_attention(*leaves, grid, backend=backend)[0]

        def both(backend: Any, leaves: Any = leaves, grid: Any = case[1]) -> None:
            sums, _ = ops.local_attention(*leaves, grid, backend=backend)
            torch.autograd.grad(sums.sum(), leaves)

        torch.testing.assert_close(forward(None), forward("torch"), rtol=2e-2, atol=2e-2)
        # Backward reads the operands once more and writes as many slopes.
        for kind, run, number in (("forward", forward, moved), ("both ways", both, 3 * moved)):
            title = f"local_attention, {name}, {kind}, {str(dtype).removeprefix('torch.')}"
            calls = [lambda run=run, way=way: run(way) for way in (None, "torch")]
            report(title, runs, calls[0], calls[1:], number / bandwidth)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    for name, state, reason in ops.status():
        print(f"{name}: {state}, {reason}")
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e12:.2f} TB/s")
    print(f"{'case':44} {'ms':>8} {'limit':>8} {'torch ms':>9} {'ratio':>6} {'im2col ms':>9} ratio")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        attention_rows(runs, dtype, bandwidth)
        fused_rows(runs, dtype, bandwidth)
        window_rows(runs, dtype, bandwidth)
    other_rows(runs, bandwidth)


if __name__ == "__main__":
    main()
