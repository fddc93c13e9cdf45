"""How fast `refine --method deaot` is, stage by stage, and how much memory it holds. Run by hand.

    python tests/benchmarks/bench_deaot.py speed [--threads 1] [--frames 12] [--device cpu]
    python tests/benchmarks/bench_deaot.py memory [--frames 3000] [--limit 8]

`speed`: median CPU seconds a tracked frame (on a GPU wall seconds) of random weights on random
frames, of each variant and size, with 3 and 10 objects; `plain` is the network not arranged for
speed, in the same run. `memory`: resident memory along a long video, with and without a limit.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pmvis_core.allocator import keep_freed_memory
from pmvis_core.models.deaot import build_deaot
from pmvis_core.propagation.deaot import DeaotPropagator, DeaotSettings, DeaotSweep, DeaotVideo
from pmvis_core.types import VideoInfo

SIZES = ((193, 337), (480, 854))
VARIANTS = ("deaott", "r50_deaotl")
STAGES = ("encode", "refer", "track", "output", "identities", "remember")


class Noise:
    """Random frames, each made when it is asked for."""

    def __init__(self, size: tuple[int, int], length: int) -> None:
        """Keep the size (height, width)."""
        self._size, self._length = size, length

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """Yield all frames."""
        return (self[t] for t in range(self._length))

    def __getitem__(self, t: int) -> NDArray[np.uint8]:
        """Return a frame."""
        rng = np.random.default_rng(t)
        return rng.integers(0, 256, (*self._size, 3), dtype=np.uint8)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--limit", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    if options.what == "speed":
        speed(torch.device(options.device), options.precision, options.frames or 12)
    else:
        memory(options.frames or 3000, options.limit)


def speed(device: torch.device, precision: str, frames: int) -> None:
    """Print a table of stages."""
    head = f"{'variant':12}{'size':>10}{'objects':>8}{'plain':>8}{'frame':>8}"
    print(head + "".join(f"{stage:>11}" for stage in STAGES))
    for variant in VARIANTS:
        for size in SIZES:
            for objects in (3, 10):
                rows = [
                    frame_times(variant, size, objects, frames, device, settings)
                    for settings in (
                        DeaotSettings(arranged=False),
                        DeaotSettings(precision=precision),
                    )
                ]
                (plain, _), (arranged, stages) = rows
                shown = "".join(f"{stages[stage]:11.4f}" for stage in STAGES)
                where = f"{size[0]}x{size[1]}"
                print(
                    f"{variant:12}{where:>10}{objects:8}{plain:8.3f}{arranged:8.3f}{shown}",
                    flush=True,
                )


def frame_times(
    variant: str,
    size: tuple[int, int],
    objects: int,
    frames: int,
    device: torch.device,
    settings: DeaotSettings,
) -> tuple[float, dict[str, float]]:
    """Return the median seconds of a tracked frame, and mean seconds of its stages."""
    clock = Clock(device)
    sweep = started(variant, size, objects, frames, device, settings, clock)
    sweep.advance(1)
    clock.spent.clear()
    whole = []
    for t in range(2, frames):
        start = clock.now()
        sweep.advance(t)
        whole.append(clock.now() - start)
    return statistics.median(whole), defaultdict(
        float, {name: spent / len(whole) for name, spent in clock.spent.items()}
    )


class Clock:
    """Sums up the time that functions take: CPU seconds, or wall seconds of a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Start at nothing."""
        self._gpu = device.type == "cuda"
        self.spent: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        """Return seconds; on a GPU after all work is done."""
        if not self._gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def watch(self, owner: Any, method: str, stage: str) -> None:
        """Let a method of an object be timed."""
        plain: Callable[..., Any] = getattr(owner, method)

        @wraps(plain)
        def timed(*arguments: Any) -> Any:
            start = self.now()
            result = plain(*arguments)
            self.spent[stage] += self.now() - start
            return result

        setattr(owner, method, timed)


def started(
    variant: str,
    size: tuple[int, int],
    objects: int,
    frames: int,
    device: torch.device,
    settings: DeaotSettings,
    clock: Clock | None = None,
) -> DeaotSweep:
    """Return a pass whose objects lie in its first frame."""
    torch.manual_seed(0)
    propagator = DeaotPropagator(build_deaot(variant), device, settings)
    video = propagator.open(Noise(size, frames), VideoInfo(1, "noise", *size, frames))
    sweep = DeaotSweep(video)
    if clock is not None:
        watch_stages(clock, video, sweep)
    sweep.advance(0)
    height, width = size
    for i in range(objects):
        mask = np.zeros(size, np.uint8)
        row, column = divmod(i, 5)
        mask[row * height // 2 :, column * width // 5 :][: height // 3, : width // 6] = 1
        sweep.add(i, mask)
    return sweep


def watch_stages(clock: Clock, video: DeaotVideo, sweep: DeaotSweep) -> None:
    """Time the stages of a frame."""
    for stage in ("encode", "refer", "track", "remember"):
        clock.watch(video.network, stage, stage)
    clock.watch(video, "identities", "identities")
    clock.watch(sweep, "_probabilities", "output")


def memory(frames: int, limit: int) -> None:
    """Print resident memory along a video of 65 x 97 pixels, memory gap 5."""
    print(f"{'limit':>8}{'frame':>8}{'resident MiB':>14}")
    for bound in (limit, None):
        settings = DeaotSettings(memory_gap=5, memory_limit=bound, cached_bytes=64 << 20)
        sweep = started("deaotl", (65, 97), 3, frames, torch.device("cpu"), settings)
        for t in range(1, frames):
            sweep.advance(t)
            if (t + 1) % (frames // 6) == 0:
                print(f"{bound or 'none':>8}{t + 1:8}{resident_mib():14.0f}", flush=True)


def resident_mib() -> float:
    """Return the memory that this process holds now."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
