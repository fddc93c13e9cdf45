"""From a loss to better weights: AdamW on flat parameters, clipping, a moving average, its state.

Shared by all training loops. Several processes average their gradients, so that their weights stay
the same; the moving average of the weights is what a run saves.

    learner = Learner(model, [ParameterGroup(named, weight_decay=0.03)], clip_norm=5, ema_decay=0)
    norm = learner.step(loss, step, rates=[1e-4])
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pmvis_core.errors import ResourceError
from pmvis_core.files import atomic_write
from pmvis_core.training.flat_parameters import FlatParameters
from pmvis_core.training.processes import rank_and_world

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn alike."""

    named: Sequence[tuple[str, nn.Parameter]]
    """Names and parameters; not empty."""
    weight_decay: float
    """AdamW's."""


class Learner:
    """The optimiser of a model, and what belongs to it."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ParameterGroup],
        *,
        clip_norm: float,
        ema_decay: float,
    ) -> None:
        """Lay the parameters' storage side by side; the model lies on its device already.

        Args:
            model: what learns, and whose other tensors belong to the state.
            groups: its parameters that learn.
            clip_norm: L2 norm that the whole gradient is clipped to.
            ema_decay: of the moving average of the weights; 0 keeps none.
        """
        self.model, self.groups = model, groups
        self.clip_norm, self.ema_decay = clip_norm, ema_decay
        self._flats = [FlatParameters(group.named) for group in groups]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [flat.value], "weight_decay": group.weight_decay}
                for flat, group in zip(self._flats, groups, strict=True)
            ],
            fused=True,
        )
        self._averages = [flat.value.detach().clone() for flat in self._flats if ema_decay]

    def step(self, loss: Tensor, step: int, rates: Sequence[float]) -> Tensor:
        """Take one step and return the norm of the gradient before clipping.

        Args:
            loss: this process's, a number.
            step: how many steps were taken before.
            rates: learning rate of each group.
        """
        self._optimizer.zero_grad(set_to_none=False)
        loss.backward()
        self._average_gradients()
        values = [flat.value for flat in self._flats]
        norm = torch.nn.utils.clip_grad_norm_(values, self.clip_norm)
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._optimizer.step()
        # Early steps weigh more.
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        for flat, average in zip(self._flats, self._averages, strict=False):
            average.lerp_(flat.value.detach(), 1 - decay)
        return norm

    def weights(self) -> dict[str, Tensor]:
        """Return what is saved: the averaged weights if there are any, and the rest."""
        weights = dict(self.model.state_dict())
        for flat, average in zip(self._flats, self._averages, strict=False):
            weights.update(flat.views(average))
        return weights

    def save(self, path: Path, step: int) -> None:
        """Write what a run resumed after ``step`` steps needs."""
        state = {
            "step": step,
            "model": self.model.state_dict(),
            "averages": self._averages,
            "optimizer": self._optimizer.state_dict(),
        }
        with atomic_write(path, "wb") as stream:
            torch.save(state, stream)

    def load(self, path: Path) -> int:
        """Continue from a written state and return its step; no code of the file is ever run.

        Raises:
            ResourceError: the file is something else.
        """
        device = self._flats[0].value.device
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            message = f"`{path}` is no state that pmvis wrote"
            raise ResourceError(message, "remove it to begin the run anew") from error
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._averages = state["averages"]
        logger.info("resumed at step %d", state["step"])
        return int(state["step"])

    def _average_gradients(self) -> None:
        """Average the gradients of all processes."""
        _, world = rank_and_world()
        if world == 1:
            return
        for flat in self._flats:
            dist.all_reduce(flat.gradient)
            flat.gradient /= world
