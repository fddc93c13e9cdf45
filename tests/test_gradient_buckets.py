"""Gradients of two processes that are added up while they are computed: nothing else changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pmvis_core.errors import DataError
from pmvis_core.training.flat_parameters import FlatParameters
from pmvis_core.training.gradient_buckets import BUCKET_BYTES, GradientBuckets
from pmvis_core.training.learner import Learner, ParameterGroup
from pmvis_core.training.processes import launch, rank_and_world
from pmvis_core.training.run_loop import Steps, _Step

SHARE, PARTS, STEPS = 2, 2, 3
"""Samples that each of two processes looks at together, parts of a batch, and steps."""
SOME = 600
"""Bytes of a bucket that holds several parameters, but not all."""
BAD = 6
"""The sample, of the second process's last part, that holds no numbers where one is to."""


@dataclass(frozen=True)
class Kind:
    """A way to take steps."""

    dtype: torch.dtype = torch.float64
    half: bool = False
    saving: bool = False
    compiled: bool = False
    bucket_bytes: int = SOME
    early: bool = True
    """Whether gradients are exchanged as soon as they can be."""
    bad_step: int | None = None


KINDS = {
    "plain": Kind(),
    "one by one": Kind(bucket_bytes=1),
    "all at once": Kind(bucket_bytes=BUCKET_BYTES),
    "saving": Kind(saving=True, bucket_bytes=1),
    "half": Kind(torch.float32, half=True),
    "compiled": Kind(compiled=True, bucket_bytes=1),
}


class Branching(nn.Module):
    """The first process uses `left`, and in its first part `rare`; the second `right`."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Linear(6, 8)
        self.block = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.left, self.right, self.rare, self.idle = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 1)
        self.to(kind.dtype)
        if kind.compiled:
            self.block.compile(backend="aot_eager", dynamic=True)

    def forward(self, x: Tensor, first: int) -> Tensor:
        """Return (N, 1) for samples of which the first has this number in the batch."""
        hidden = self.stem(x).tanh()
        if self.kind.saving:
            hidden = checkpoint(self.block, hidden, use_reentrant=False)
        else:
            hidden = self.block(hidden)
        return torch.cat([self.branch(row, first + n) for n, row in enumerate(hidden.split(1))])

    def branch(self, row: Tensor, number: int) -> Tensor:
        share = number // SHARE
        branch = self.right if share % 2 else self.left
        out: Tensor = self.head(branch(row) + (self.rare(row) if share == 0 else 0))
        return out


class Watched(Learner):
    """Notes how many of its sums have begun when a backward pass ends."""

    early = True
    begun: list[tuple[int, int]]

    def backward(self, loss: Tensor, *, last: bool = False) -> None:
        super().backward(loss, last=last and self.early)
        if last and self._buckets is not None:
            self.begun.append((len(self._buckets._sums), len(self._buckets._buckets)))


Samples = list[tuple[int, Tensor, Tensor]]


def drawn(bad_step: int | None, dtype: torch.dtype) -> Iterator[Samples]:
    """Yield what a process sees of batches of eight samples in two parts."""
    rank, world = rank_and_world()
    share = 2 * SHARE // world
    for step in range(STEPS):
        x, y = torch.randn(8, 7, generator=torch.manual_seed(step), dtype=dtype).split([6, 1], 1)
        if step == bad_step:
            x[BAD] = torch.nan
        for part in range(PARTS):
            first = (part * world + rank) * share
            yield [(n, x[n : n + 1], y[n : n + 1]) for n in range(first, first + share)]


def made(kind: Kind) -> tuple[Branching, Watched]:
    """Return a network and what trains it, in two groups that lie among each other."""
    torch.manual_seed(0)
    model = Branching(kind)
    named = list(model.named_parameters())
    groups = [
        ParameterGroup([(n, p) for n, p in named if (p.dim() > 1) == wide], weight_decay=0.1)
        for wide in (True, False)
    ]
    learner = Watched(model, groups, clip_norm=1.0, ema_decay=0.5, bucket_bytes=kind.bucket_bytes)
    learner.early, learner.begun = kind.early, []
    return model, learner


def taken(kind: Kind) -> dict[str, Any]:
    """Take steps as every run does, and return all that came of them."""
    model, learner = made(kind)

    def losses(samples: Samples, step: int, first: int) -> dict[str, Tensor]:
        x, y = (torch.cat([sample[n] for sample in samples]) for n in (1, 2))
        with torch.autocast("cpu", torch.bfloat16, enabled=kind.half):
            out = model(x, first)
        return {"loss": (out.to(y) - y).square().mean()}

    steps = Steps[tuple[int, Tensor, Tensor]](
        title="",
        losses=losses,
        rates=lambda _: [1e-2, 1e-2],
        save=lambda path, weights: None,
        name=lambda sample: f"sample {sample[0]}",
    )
    share = 2 * SHARE // rank_and_world()[1]
    step = _Step(PARTS, share, learner, steps, drawn(kind.bad_step, kind.dtype), None)
    lines, said = [], ""
    try:
        for number in range(STEPS):
            lines.append(step(number))
    except DataError as error:
        said = error.message
    weights = {**model.state_dict(), **{f"mean {n}": w for n, w in learner.weights().items()}}
    return {"lines": lines, "weights": weights, "begun": learner.begun, "said": said}


def all_kinds() -> dict[str, dict[str, Any]]:
    """Return what comes of every kind of steps, and of its twin that exchanges at the end."""
    found = {name: taken(kind) for name, kind in KINDS.items()}
    late = {**vars(KINDS["plain"]), "early": False}
    for name, kind in KINDS.items():
        found[f"late {name}"] = taken(Kind(**{**vars(kind), "early": False}))
    found["bad"] = taken(Kind(**{**late, "early": True, "bad_step": 1}))
    return found


def process(out: Path, device: str) -> None:
    """Do everything as one of two processes."""
    found = all_kinds()
    model, learner = made(KINDS["one by one"])
    x = torch.ones(1, 6, dtype=torch.float64)
    learner.backward(model(x, 0).sum(), last=True)
    with pytest.raises(RuntimeError, match="came after its bucket"):
        model(x, 0).sum().backward()
    learner.gradient_norm()
    torch.save(found, out / f"{rank_and_world()[0]}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """Return what each of two processes found."""
    out = tmp_path_factory.mktemp("two")
    launch(partial(process, out), partial(process, out), "cpu", 2)
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """Return what one process finds that looks at twice as many samples together."""
    return all_kinds()


Found = list[dict[str, dict[str, Any]]]


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_equal_one(name: str, two: Found, alone: dict[str, dict[str, Any]]) -> None:
    # bfloat16 rounds the sums of half a batch.
    close = 0.05 if KINDS[name].half else 1e-9
    for found in two:
        for shared, whole in zip(found[name]["lines"], alone[name]["lines"], strict=True):
            assert shared == pytest.approx(whole, rel=max(close, 1e-6))  # logged in float32
        for key, weight in alone[name]["weights"].items():
            torch.testing.assert_close(found[name]["weights"][key], weight, rtol=close, atol=close)
    assert not torch.equal(alone[name]["weights"]["rare.bias"], made(KINDS[name])[0].rare.bias)


@pytest.mark.parametrize("name", KINDS)
def test_an_early_exchange_changes_no_bit(name: str, two: Found) -> None:
    for found in two:
        early, late = found[name], found[f"late {name}"]
        assert early["lines"] == late["lines"]
        assert all(torch.equal(early["weights"][k], w) for k, w in late["weights"].items())
        # Nobody waits for parameters that take no part.
        assert all(begun == buckets for begun, buckets in early["begun"])
        assert all(begun == 0 for begun, _ in late["begun"])
    counts = {kind: two[0][kind]["begun"][0][1] for kind in KINDS}
    assert counts["one by one"] == len(list(Branching(Kind()).parameters()))
    assert 2 < counts["plain"] < counts["one by one"]
    assert counts["all at once"] == 2


def test_both_processes_name_what_is_no_number_in_one(two: Found) -> None:
    said = {found["bad"]["said"] for found in two}
    assert len(said) == 1
    assert f"loss of sample {BAD}" in said.pop()
    for found in two:
        assert len(found["bad"]["lines"]) == 1
        assert all(weight.isfinite().all() for weight in found["bad"]["weights"].values())


def test_buckets_cover_every_gradient_once() -> None:
    model = Branching(Kind())
    named = list(model.named_parameters())
    flats = [FlatParameters(named[4:]), FlatParameters(named[:4])]
    buckets = GradientBuckets(model, flats, SOME)._buckets
    for flat in flats:
        flat.gradient.zero_()
    for bucket in buckets:
        bucket.gradient += 1
        assert bucket.gradient.numel() == sum(p.numel() for p in bucket.parameters)
        assert all(bool((p.grad == 1).all()) for p in bucket.parameters if p.grad is not None)
    assert all(bool((flat.gradient == 1).all()) for flat in flats)
    order = {parameter: number for number, (_, parameter) in enumerate(named)}
    first = [min(order[parameter] for parameter in bucket.parameters) for bucket in buckets]
    assert all(later < sooner for sooner, later in pairwise(first))


def test_buckets_keep_no_model_alive() -> None:
    model = Branching(Kind())
    buckets = GradientBuckets(model, [FlatParameters(list(model.named_parameters()))], 1)
    buckets.open()
    there = weakref.ref(model.stem.weight)
    del model, buckets
    gc.collect()
    assert there() is None
