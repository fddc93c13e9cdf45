"""Time deformable attention against its twin in torch (grid_sample a level).

    python tests/benchmarks/bench_deformable_attention.py

Times are medians of process CPU time on one thread, both timed alternately in one run. Ratios
above 1 mean that the compiled kernel is faster.
"""

from __future__ import annotations

import argparse
from typing import Any

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


def make_inputs(
    batch: int, levels: list[tuple[int, int]], heads: int, channels: int, points: int
) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
    """Return seeded inputs whose points spread round the queries' own places."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in levels)
    value = torch.randn(batch, tokens, heads, channels, generator=generator)
    centres = torch.cat(
        [
            torch.stack(
                torch.meshgrid(
                    (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij"
                )[::-1],
                dim=-1,
            ).view(-1, 2)
            for h, w in levels
        ]
    )
    spread = torch.randn(batch, tokens, heads, len(levels), points, 2, generator=generator)
    locations = centres[None, :, None, None, None] + 0.06 * spread
    scores = torch.randn(batch, tokens, heads, len(levels) * points, generator=generator)
    weights = scores.softmax(-1).unflatten(-1, (len(levels), points))
    for tensor in (value, locations, weights):
        tensor.requires_grad_()
    return value, levels, locations, weights


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    for name, state, reason in ops.status():
        print(f"{name}: {state}, {reason}")
    print(f"{'case':24} {'pass':20} {'pmvis ms':>9} {'torch ms':>9} {'ratio':>6}")
    for name, case in CASES.items():
        inputs = make_inputs(*case)
        leaves = (inputs[0], inputs[2], inputs[3])
        ones = torch.ones(case[0], inputs[0].shape[1], case[2] * case[3])

        def forward(function: Any, inputs: Any = inputs) -> None:
            with torch.no_grad():
                function(*inputs)

        def both(
            function: Any, inputs: Any = inputs, leaves: Any = leaves, ones: Any = ones
        ) -> None:
            torch.autograd.grad(function(*inputs), leaves, ones)

        for kind, run in (("forward", forward), ("forward + backward", both)):
            mine, twin = compare(
                runs,
                lambda run=run: run(ops.deformable_attention),
                lambda run=run: run(ops.deformable_attention_reference),
            )
            print(f"{name:24} {kind:20} {1e3 * mine:9.2f} {1e3 * twin:9.2f} {twin / mine:6.1f}")


if __name__ == "__main__":
    main()
