"""One job on several processes: those this module starts, or those that `torchrun` started.

The processes meet at a file, one thread or GPU each. An error of the user's, in whichever process,
is raised in the first one.

    launch(partial(work, shown=True), partial(work, shown=False), "cpu", processes=2)
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import spawn

from pmvis_core.errors import PmvisError

FAREWELL_SECONDS = 10.0
"""How long a process that failed may take to hand its error over."""
Work = Callable[[str], None]
"""Takes the name of the process's device."""


def launch(first: Work, other: Work, device: str, processes: int) -> None:
    """Run a job to its end.

    Args:
        first: what this process does.
        other: what each further process does; it is pickled.
        device: of the job; several GPUs are counted from 0.
        processes: how many in all; under `torchrun` it decides instead.

    Raises:
        PmvisError: any process raised it.
    """
    if processes == 1 or dist.is_torchelastic_launched():
        with _torchrun():
            first(_own_device(device))
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


def _own_device(device: str) -> str:
    """Return the GPU that is this process's among those that torchrun started."""
    if dist.is_torchelastic_launched() and device == "cuda":
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


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
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=processes)
    try:
        work(f"cuda:{rank}" if backend == "nccl" else device)
    finally:
        dist.destroy_process_group()


@contextmanager
def _torchrun() -> Iterator[None]:
    """Join the group that torchrun started, if it did."""
    if not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
