"""A run's losses and scores: ``metrics.jsonl``, which outlives kills, and TensorBoard's events.

The means of every few steps make a line. What was added up since the last line belongs to a run's
state, so that a resumed run writes the lines that an unbroken one writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pmvis_core.errors import ResourceError
from pmvis_core.files import atomic_write, canonical_json, significant
from pmvis_core.training.states import room_for


class MetricsLog:
    """Writes the mean losses of every few steps; a resumed run drops lines after its state."""

    def __init__(
        self, path: Path, step: int, every: int, state: Mapping[str, Any] | None = None
    ) -> None:
        """Keep the lines up to ``step``.

        Args:
            path: ``metrics.jsonl``.
            step: steps done.
            every: so many steps make a line.
            state: what `state` returned after that step; None at the start of a run.
        """
        self.path, self.every = path, every
        self._sums: dict[str, float] = dict((state or {}).get("sums", {}))
        self._count: int = (state or {}).get("count", 0)
        self._board: Any = None
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= step]
            with atomic_write(path) as stream:
                stream.writelines(f"{canonical_json(line)}\n" for line in kept)

    def show_on_board(self, folder: Path, step: int) -> None:
        """Write every further line for TensorBoard too.

        Args:
            folder: for its event files.
            step: steps done; what is there of later ones is not shown any more.

        Raises:
            ResourceError: tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ResourceError(
                "`--tensorboard` needs the package tensorboard, which is not installed",
                'pip install "pmvis[tensorboard]"',
            ) from error
        self._board = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, step: int, losses: Mapping[str, float], rate: float) -> None:
        """Take in the losses of a step, counted from 0, and write a line when it is due."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        if (step + 1) % self.every:
            return
        means = {name: significant(value / self._count) for name, value in self._sums.items()}
        self.note(step + 1, {"learning_rate": significant(rate), **means})
        self._sums, self._count = {}, 0

    def note(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write a line of its own after so many steps."""
        line = {"step": step, **numbers}
        with room_for(self.path), self.path.open("a") as stream:
            stream.write(canonical_json(line) + "\n")
        if self._board is not None:
            for name, value in line.items():
                self._board.add_scalar(name, value, step)

    def state(self) -> dict[str, Any]:
        """Return what was added up since the last line."""
        return {"sums": self._sums, "count": self._count}

    def close(self) -> None:
        """Write what TensorBoard's writer still holds."""
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the whole lines of a ``metrics.jsonl``; what was cut off may leave half of one."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and math.isfinite(line.get("step", math.nan)):
            lines.append(line)
    return lines
