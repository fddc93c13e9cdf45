"""Adding up the gradients of several processes while they are still being computed.

The flat gradients are cut into buckets, from their ends: layers used last get their gradients
first. As soon as all gradients of a bucket are there, its sum over the processes begins, and the
backward pass goes on (Li et al., 2020, section 3.2: PyTorch Distributed). Here nothing is copied: a
bucket is a stretch of a flat gradient.

Every process begins the sums in the same order, whatever order its gradients come in. Parameters
that take no part in a process's loss (no masks here, no reference there) are known as soon as its
first gradient is there, so that nobody waits for them; they add the zeros that a step starts from.

    buckets = GradientBuckets(model, flats)
    buckets.open()      # before the last backward pass of a step
    loss.backward()
    buckets.average()   # the flat gradients are the means over the processes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from pmvis_core.training.flat_parameters import FlatParameters
from pmvis_core.training.processes import Sum, rank_and_world, start_sum

BUCKET_BYTES = 25 * 2**20
"""From which on a bucket is full; DistributedDataParallel's default."""


@dataclass
class _Bucket:
    """A stretch of a flat gradient that is summed at once."""

    gradient: Tensor
    """(n,) a view."""
    parameters: tuple[nn.Parameter, ...]
    """Whose gradient it is."""
    missing: int = 0
    """How many of them still wait for their gradient in this backward pass."""


class GradientBuckets:
    """Averages flat gradients over the processes; all of them make the same calls."""

    def __init__(
        self, model: nn.Module, flats: Sequence[FlatParameters], bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        """Cut the gradients and watch the parameters; the processes have met already.

        Args:
            model: lists its parameters in the order of their use, roughly: the nearer, the better
                does the exchange hide behind the backward pass.
            flats: its parameters that learn; the same in every process.
            bucket_bytes: from which on a bucket is full.
        """
        self._flats = [flat.gradient for flat in flats]
        place = {parameter: number for number, parameter in enumerate(model.parameters())}
        cut = [bucket for flat in flats for bucket in _cut(flat, bucket_bytes)]
        # The gradient of what is used first comes last.
        cut.sort(key=lambda bucket: -min(place[parameter] for parameter in bucket.parameters))
        self._buckets = cut
        self._sums: list[Sum] = []
        self._is_open = self._knows_absent = False
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket.parameters:
                # A hook that held this object would keep it and the parameters for ever.
                hook = partial(_tell, WeakMethod(self._arrived), number)
                parameter.register_post_accumulate_grad_hook(hook)

    def open(self) -> None:
        """Begin a sum as soon as its bucket is full in the backward pass that comes now."""
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        self._is_open, self._knows_absent = True, False

    def average(self) -> None:
        """Turn the gradients into their means over the processes: begin what is left, and wait.

        It may follow without `open` as well; then nothing was exchanged before.
        """
        self._is_open = False
        for bucket in self._buckets[len(self._sums) :]:
            self._sums.append(start_sum(bucket.gradient))
        for pending in self._sums:
            pending.wait()
        self._sums = []
        _, world = rank_and_world()
        for gradient in self._flats:
            gradient.div_(world)

    def _arrived(self, number: int) -> None:
        """Note that a parameter of a bucket has its whole gradient of this pass.

        Raises:
            RuntimeError: its bucket is being summed already, so that this gradient would be lost.
        """
        if not self._is_open:
            return
        if number < len(self._sums):
            raise RuntimeError("a gradient came after its bucket: a second backward pass?")
        if not self._knows_absent:
            self._knows_absent = True
            for bucket in self._buckets:
                bucket.missing -= sum(not _takes_part(p) for p in bucket.parameters)
        self._buckets[number].missing -= 1
        # All processes sum the buckets in this one order.
        while len(self._sums) < len(self._buckets):
            bucket = self._buckets[len(self._sums)]
            if bucket.missing:
                return
            self._sums.append(start_sum(bucket.gradient))


def _tell(arrived: WeakMethod[Callable[[int], None]], number: int, _: Tensor) -> None:
    """Call a method, if its object is still there."""
    method = arrived()
    if method is not None:
        method(number)


def _cut(flat: FlatParameters, bucket_bytes: int) -> Iterator[_Bucket]:
    """Yield stretches of a flat gradient, the last parameters first."""
    stop = start = len(flat.gradient)
    members: list[nn.Parameter] = []
    for parameter in reversed(flat.parameters):
        members.append(parameter)
        start -= parameter.numel()
        if (stop - start) * flat.gradient.element_size() >= bucket_bytes or not start:
            yield _Bucket(flat.gradient[start:stop], tuple(members))
            stop, members = start, []


def _takes_part(parameter: nn.Parameter) -> bool:
    """Tell, within a backward pass, whether it leads to a parameter."""
    # As `torch.autograd.graph.register_multi_grad_hook` does, which fires a gradient too early.
    return torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
