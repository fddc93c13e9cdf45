"""Time deformable attention against its twin in torch (grid_sample a level), and the fused form.

    python tests/benchmarks/bench_deformable_attention.py              # one thread, CPU time
    python tests/benchmarks/bench_deformable_attention.py --threads 2  # wall time

Times are medians, what is compared being timed in turns in one run. Ratios above 1 mean that the
compiled kernel is faster. The limit is the share of the bandwidth of a copy (measured here with the
same threads, bytes read and written) that the kernel reaches, if every byte of operands and results
crossed once: 100 % is the limit of a kernel that is bound by memory. Rows of the fused form compare
it with softmax, places and mask in torch before the compiled kernel.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timing import compare
from torch import Tensor

from pmvis_core import ops

CASES = {
    "tiny preset, batch 8": (8, [(12, 16), (6, 8), (3, 4)], 4, 16, 4),
    "IDOL R50, 360x640": (1, [(48, 80), (24, 40), (12, 20), (6, 10)], 8, 32, 4),
    "IDOL R50, 480x854": (1, [(60, 108), (30, 54), (15, 27), (8, 14)], 8, 32, 4),
    "IDOL R50, 720x1280": (1, [(92, 160), (46, 80), (23, 40), (12, 20)], 8, 32, 4),
    "IDOL Swin-L, 800x1333": (1, [(100, 168), (50, 84), (25, 42), (13, 21)], 8, 32, 4),
}
"""Name: batch, levels, heads, channels of a head, points of a level; a query for each token."""
SPREAD = 0.06
"""Standard deviation of the points round the queries' own places, in sides of the map."""
COPIED = 1 << 28
"""Bytes of the copy: far more than fit into any cache."""

Shapes = list[tuple[int, int]]
Arguments = tuple[Any, ...]


class Row(NamedTuple):
    """Two functions of the same arguments, the second being the peer."""

    name: str
    functions: tuple[Callable[..., Tensor], Callable[..., Tensor]]
    arguments: Arguments


def make_inputs(
    batch: int, levels: Shapes, heads: int, channels: int, points: int
) -> tuple[Tensor, Shapes, Tensor, Tensor]:
    """Return seeded inputs whose points spread round the queries' own places."""
    value, _, references, offsets, logits, _ = make_fused_inputs(
        batch, levels, heads, channels, points, padded=False
    )
    sides = torch.tensor(levels).flip(-1)[:, None]
    locations = references[:, :, None, :, None] + offsets.detach() / sides
    weights = logits.detach().flatten(-2).softmax(-1).view_as(logits)
    for tensor in (locations, weights):
        tensor.requires_grad_()
    return value, levels, locations, weights


def make_fused_inputs(
    batch: int, levels: Shapes, heads: int, channels: int, points: int, *, padded: bool
) -> tuple[Tensor, Shapes, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the same as the fused form takes it, the right eighth of each level being padding."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in levels)
    value = torch.randn(batch, tokens, heads, channels, generator=generator)
    centres, hidden = [], []
    for h, w in levels:
        x, y = (torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h
        centres.append(torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).view(-1, 2))
        hidden.append((x > 7 / 8).repeat(h))
    references = torch.cat(centres)[None, :, None].repeat(batch, 1, len(levels), 1)
    spread = torch.randn(batch, tokens, heads, len(levels), points, 2, generator=generator)
    offsets = SPREAD * spread * torch.tensor(levels).flip(-1)[:, None]
    logits = torch.randn(batch, tokens, heads, len(levels), points, generator=generator)
    for tensor in (value, offsets, logits):
        tensor.requires_grad_()
    padding = torch.cat(hidden).repeat(batch, 1) if padded else None
    return value, levels, references, offsets, logits, padding


def composed(
    value: Tensor,
    levels: Shapes,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding: Tensor | None,
) -> Tensor:
    """Do what the fused form does with torch's operations before the compiled kernel."""
    if padding is not None:
        value = value.masked_fill(padding[..., None, None], 0)
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    sides = torch.tensor(levels, device=value.device).flip(-1)[:, None]
    locations = torch.addcmul(references[:, :, None, :, None], offsets, 1 / sides)
    return ops.deformable_attention(value, levels, locations, weights)


def copy_bandwidth(clock: Callable[[], float]) -> float:
    """Return bytes a second, read and written, of a copy."""
    source = torch.zeros(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(9):
        start = clock()
        target.copy_(source)
        times.append(clock() - start)
    return 2 * COPIED / statistics.median(times[1:])


def traffic(arguments: Arguments, output: Tensor) -> tuple[int, int]:
    """Return the bytes of operands and result, and with the gradients' on top."""

    def size(tensors: list[Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    operands = [item for item in arguments if isinstance(item, Tensor)]
    forward = size([*operands, output])
    # Backward reads the operands and the output's gradient, and writes the leaves' gradients.
    return forward, 2 * forward + size([item for item in operands if item.requires_grad])


def report(row: Row, runs: int, clock: Callable[[], float], bandwidth: float) -> None:
    """Print forward, and forward with backward."""
    leaves = [item for item in row.arguments if isinstance(item, Tensor) and item.requires_grad]
    output = row.functions[0](*row.arguments)
    ones = torch.ones_like(output)

    def forward(function: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            function(*row.arguments)

    def both(function: Callable[..., Tensor]) -> None:
        torch.autograd.grad(function(*row.arguments), leaves, ones)

    moved = traffic(row.arguments, output.detach())
    for (kind, run), number in zip(
        (("forward", forward), ("forward + backward", both)), moved, strict=True
    ):
        calls = [lambda run=run, function=function: run(function) for function in row.functions]
        mine, peer = compare(runs, *calls, clock=clock)
        print(
            f"{row.name:30} {kind:18} {1e3 * mine:9.2f} {1e3 * peer:9.2f} {peer / mine:6.1f} "
            f"{number / 1e6:7.1f} {100 * number / bandwidth / mine:6.1f} %",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    for name, state, reason in ops.status():
        print(f"{name}: {state}, {reason}")
    bandwidth = copy_bandwidth(clock)
    print(f"{options.threads} threads; a copy moves {bandwidth / 1e9:.1f} GB/s")
    print(f"{'case':30} {'pass':18} {'pmvis ms':>9} {'peer ms':>9} ratio {'MB':>7}    limit")
    for name, case in CASES.items():
        plain = (ops.deformable_attention, ops.deformable_attention_reference)
        rows = [Row(name, plain, make_inputs(*case))]
        for title, padded in (("fused", False), ("fused, padded", True)):
            arguments = make_fused_inputs(*case, padded=padded)
            rows.append(Row(f"  {title}", (ops.fused_deformable_attention, composed), arguments))
        for row in rows:
            report(row, options.runs, clock, bandwidth)


if __name__ == "__main__":
    main()
