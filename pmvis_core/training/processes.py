"""One job on several processes: those this module starts, or those that `torchrun` started.

The processes meet at a file, one thread or GPU each. An error of the user's, in whichever process,
is raised in the first one.

    launch(partial(work, shown=True), partial(work, shown=False), "cpu", processes=2)

Within the work `averaged`, `gathered` and `decided_by_first` are what the processes tell each
other; alone they do nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from pmvis_core.errors import PmvisError

FAREWELL_SECONDS = 10.0
"""How long a process that failed may take to hand its error over."""
PATIENCE = timedelta(days=30)
"""How long the processes of a `patient_group` wait for each other: gloo wants a limit, and this is
none. One that has died is noticed at once all the same."""
T = TypeVar("T")
Group = dist.ProcessGroup | None
"""Through which the processes speak; None: the usual one."""
Work = Callable[[str], None]
"""Takes the name of the process's device."""


class Sum(Protocol):
    """A sum over the processes that has begun."""

    def wait(self) -> Any:
        """Wait for it; on a GPU, let what is done next wait."""


def launch(first: Work, other: Work, device: str, processes: int) -> None:
    """Run a job to its end.

    Args:
        first: what this process does; under `torchrun`, what its first one does.
        other: what each further process does; it is pickled.
        device: of the job; several GPUs are counted from 0.
        processes: how many in all; under `torchrun` it decides instead.

    Raises:
        PmvisError: any process raised it.
    """
    if under_torchrun():
        with _torchrun(device) as own:
            (first if is_first() else other)(own)
        return
    if processes == 1:
        first(device)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        failures: Any = mp.get_context("spawn").SimpleQueue()
        arguments = (other, device, processes, meeting, failures)
        others = spawn(_spawned, arguments, processes - 1, join=False, daemon=True)
        try:
            _join(first, device, processes, meeting, 0)
        except RuntimeError as error:  # gloo's, when another process has gone
            others.join(timeout=FAREWELL_SECONDS)
            if failures.empty():
                raise
            raise failures.get() from error
        while not others.join():
            pass


def rank_and_world() -> tuple[int, int]:
    """Return this process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def under_torchrun() -> bool:
    """Tell whether `torchrun` started this process."""
    return dist.is_torchelastic_launched()


def is_first() -> bool:
    """Tell whether this process is the only or the first one, also before they have met."""
    return os.environ["RANK"] == "0" if under_torchrun() else rank_and_world()[0] == 0


def summed(tensor: Tensor) -> Tensor:
    """Add up a tensor of every process in place, and return it."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def start_sum(tensor: Tensor) -> Sum:
    """Begin to add up a tensor of every process in place, of which there are several.

    Until it is waited for, the tensor must not be touched. All processes begin their sums in the
    same order.
    """
    return cast(Sum, dist.all_reduce(tensor, async_op=True))


def averaged(tensor: Tensor) -> Tensor:
    """Average a floating tensor of every process in place, and return it."""
    _, world = rank_and_world()
    return summed(tensor) if world == 1 else summed(tensor).div_(world)


def patient_group() -> Group:
    """Return a group of all processes for work of which nobody knows how long it takes.

    The usual group gives up after minutes. All processes have to come here.
    """
    if rank_and_world()[1] == 1:
        return None
    return cast(dist.ProcessGroup, dist.new_group(timeout=PATIENCE, backend="gloo"))


def gathered(value: T, group: Group = None) -> list[T]:
    """Return every process's value, in their order; values are pickled."""
    _, world = rank_and_world()
    values: list[Any] = [value] * world
    if world > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def decided_by_first(decide: Callable[[], T], group: Group = None) -> T:
    """Return what the first process decides; an error of the user's is raised in all of them."""
    rank, world = rank_and_world()
    told: list[Any] = [None]
    if rank == 0:
        try:
            told = [decide()]
        except PmvisError as error:
            told = [error]
    if world > 1:
        dist.broadcast_object_list(told, group=group)
    if isinstance(told[0], PmvisError):
        raise told[0]
    return told[0]  # type: ignore[no-any-return]


def _spawned(
    index: int, work: Work, device: str, processes: int, meeting: str, failures: Any
) -> None:
    """Run one of the further processes; hand an error of the user's over to the first one."""
    try:
        _join(work, device, processes, meeting, index + 1)
    except PmvisError as error:
        failures.put(error)


def _join(work: Work, device: str, processes: int, meeting: str, rank: int) -> None:
    """Run one process of a group that meets at a file."""
    torch.set_num_threads(1)
    own = f"cuda:{rank}" if device.startswith("cuda") else device
    with _group(own, init_method=meeting, rank=rank, world_size=processes):
        work(own)


@contextmanager
def _torchrun(device: str) -> Iterator[str]:
    """Join the group that torchrun started, and say which device is this process's."""
    own = f"cuda:{os.environ['LOCAL_RANK']}" if device.startswith("cuda") else device
    with _group(own):
        yield own


@contextmanager
def _group(device: str, **meeting: Any) -> Iterator[None]:
    """Belong to a group of processes for a while."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    # Processes meet by a number that torch counts up. Where a group could not be founded it stays
    # counted, and this process would wait for ever for others that begin at zero.
    dist.distributed_c10d._world.group_count = 0
    dist.init_process_group("nccl" if on_gpu else "gloo", **meeting)
    try:
        yield
    finally:
        dist.destroy_process_group()
