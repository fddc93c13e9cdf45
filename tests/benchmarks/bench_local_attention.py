"""Time local attention against its twin in torch and against the unfolded form.

    python tests/benchmarks/bench_local_attention.py [--threads 1] [--runs 5]

The unfolded form lays out the window of every cell, keys and values, and is written here. Times are
medians of process CPU time, pmvis and the twin in turns in one run; the unfolded form, which takes
seconds, is timed once after a warm-up. Ratios above 1 mean that pmvis is faster. Memory is what one
call adds to the process at its peak.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_pairwise import peak_mb
from timing import compare
from torch import Tensor

from pmvis_core import ops

CASES = {
    "DeAOT, 193x337": (1, (13, 22), 128, 1024),
    "DeAOT, 480x854": (1, (31, 54), 128, 1024),
    "DeAOT, 720x1280": (1, (37, 66), 128, 1024),
    "AOT, 480x854": (8, (31, 54), 32, 32),
}
"""Name: maps (engines, or heads), cells, channels of keys and of values; the window is 15 x 15."""
WINDOW = 15


def make_operands(batch: int, grid: tuple[int, int], depth: int, channels: int) -> list[Tensor]:
    """Return seeded query, key, value and bias."""
    random = torch.Generator().manual_seed(0)
    cells = grid[0] * grid[1]
    shapes = [(batch, cells, number) for number in (depth, depth, channels, WINDOW**2)]
    query, *others = (torch.randn(shape, generator=random) for shape in shapes)
    return [tensor.requires_grad_() for tensor in (query * depth**-0.5, *others)]


def unfolded(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Do the same with the windows of all cells laid out."""

    def lay_out(x: Tensor) -> Tensor:
        maps = x.transpose(1, 2).unflatten(2, grid)
        windows = F.unfold(maps, WINDOW, padding=WINDOW // 2)
        return windows.view(len(x), x.shape[2], WINDOW**2, -1)

    outside = lay_out(torch.ones_like(query[:1, :, :1]))[:, 0].transpose(1, 2) == 0
    logits = torch.einsum("bnc,bckn->bnk", query, lay_out(key)) + bias
    weights = logits.masked_fill(outside, float("-inf")).softmax(-1)
    return torch.einsum("bnk,bckn->bnc", weights, lay_out(value)), weights


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    forms: list[Callable[..., Any]] = [
        ops.local_attention,
        ops.local_attention_reference,
        unfolded,
    ]
    head = f"{'case':18}{'pass':20}{'pmvis ms':>9}{'torch ms':>9}{'ratio':>6}"
    print(head + f"{'unfold ms':>10}{'ratio':>6}   MB added, in the same order")
    for name, case in CASES.items():
        leaves, grid = make_operands(*case), case[1]
        expected = unfolded(*leaves, grid)[0]
        torch.testing.assert_close(ops.local_attention(*leaves, grid)[0], expected)

        @torch.no_grad()
        def forward(form: Any, leaves: Any = leaves, grid: Any = grid) -> None:
            form(*leaves, grid)

        def both(form: Any, leaves: Any = leaves, grid: Any = grid) -> None:
            torch.autograd.grad(form(*leaves, grid)[0].sum(), leaves)

        for kind, run in (("forward", forward), ("forward + backward", both)):
            calls = [lambda run=run, form=form: run(form) for form in forms]
            times = compare(options.runs, *calls[:2]) + compare(1, calls[2])
            mine, twin, laid_out = (1e3 * time for time in times)
            memory = " ".join(f"{peak_mb(call):7.0f}" for call in calls)
            row = f"{name:18}{kind:20}{mine:9.2f}{twin:9.2f}{twin / mine:6.1f}"
            print(f"{row}{laid_out:10.2f}{laid_out / mine:6.1f}   {memory}")


if __name__ == "__main__":
    main()
