"""From a loss to better weights: AdamW on flat parameters, clipping, a moving average, its state.

Shared by all training loops. Several processes average their gradients, so that their weights stay
the same, while the last part's are still being computed (`gradient_buckets`); the moving average of
the weights is what a run saves.

    learner = Learner(model, [ParameterGroup(named, weight_decay=0.03)], clip_norm=5, ema_decay=0)
    learner.start()
    learner.backward(loss, last=True)  # once for every part of the batch
    norm = learner.gradient_norm()
    learner.update(step, rates=[1e-4])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pmvis_core.errors import ResourceError
from pmvis_core.training.flat_parameters import FlatParameters
from pmvis_core.training.gradient_buckets import BUCKET_BYTES, GradientBuckets
from pmvis_core.training.processes import rank_and_world


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
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Lay the parameters' storage side by side; the model lies on its device already.

        If there are several processes, they have met.

        Args:
            model: what learns, and whose other tensors belong to the state.
            groups: its parameters that learn.
            clip_norm: L2 norm that the whole gradient is clipped to.
            ema_decay: of the moving average of the weights; 0 keeps none.
            bucket_bytes: of gradients that several processes exchange at a time.
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
        several = rank_and_world()[1] > 1
        self._buckets = GradientBuckets(model, self._flats, bucket_bytes) if several else None

    def start(self) -> None:
        """Begin a step: forget the gradient of the last one."""
        self._optimizer.zero_grad(set_to_none=False)

    def backward(self, loss: Tensor, *, last: bool = False) -> None:
        """Add the gradient of a part of this process's batch.

        Args:
            loss: a number; the parts' losses add up to the batch's.
            last: no part follows but `gradient_norm`, in all processes alike. They exchange what is
                ready in the meantime, so that `own_gradient_is_finite` has no meaning afterwards.
        """
        if last and self._buckets is not None:
            self._buckets.open()
        loss.backward()

    def gradient_norm(self) -> Tensor:
        """Average the gradient over the processes, clip it, and return its norm before that.

        It is the same number in every process, and not finite where any process's gradient is not.
        """
        if self._buckets is not None:
            self._buckets.average()
        return torch.nn.utils.clip_grad_norm_([flat.value for flat in self._flats], self.clip_norm)

    def own_gradient_is_finite(self) -> bool:
        """Tell whether this process's gradient holds finite numbers only."""
        return all(bool(flat.gradient.isfinite().all()) for flat in self._flats)

    def weights_are_finite(self) -> bool:
        """Tell whether all weights that learn are finite numbers."""
        return all(bool(flat.value.isfinite().all()) for flat in self._flats)

    def update(self, step: int, rates: Sequence[float]) -> None:
        """Let the weights follow the gradient.

        Args:
            step: how many steps were taken before.
            rates: learning rate of each group.
        """
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._optimizer.step()
        # Early steps weigh more.
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        for flat, average in zip(self._flats, self._averages, strict=False):
            average.lerp_(flat.value.detach(), 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """Return what is saved: the averaged weights if there are any, and the rest."""
        weights = dict(self.model.state_dict())
        for flat, average in zip(self._flats, self._averages, strict=False):
            weights.update(flat.views(average))
        return {name: weight.contiguous() for name, weight in weights.items()}

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs; the tensors are those that learn, no copies."""
        return {
            "model": self.model.state_dict(),
            "averages": self._averages,
            "optimizer": self._optimizer.state_dict(),
            "layout": [flat.names for flat in self._flats],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned.

        Raises:
            ResourceError: the parameters lie in another order there.
        """
        layout = [flat.names for flat in self._flats]
        # States of before this was written down have the one order that there was.
        if state.get("layout", layout) != layout:
            raise ResourceError(
                "the state's parameters lie in another order: another version of pmvis wrote it",
                "finish the run with that version, or begin it anew with `--overwrite`",
            )
        device = self._flats[0].value.device
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._averages = [average.to(device) for average in state["averages"]]
