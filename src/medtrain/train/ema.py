"""An exponential moving average of the weights, kept as a second model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from medtrain.config import Ema


class AveragedModel:
    """θ' ← d·θ' + (1 − d)·θ after every optimizer step; θ' begins as θ. Buffers are copied.

    With warm-up, d = min(decay, (1 + t) / (10 + t)) where t counts the updates before this one.
    """

    def __init__(self, model: nn.Module, config: Ema) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.num_updates = 0
        self._config = config

    @property
    def decay(self) -> float:
        """The decay of the next update."""
        t = self.num_updates
        return (
            min(self._config.decay, (1 + t) / (10 + t))
            if self._config.warmup
            else (self._config.decay)
        )

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of `model` after a step."""
        average = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]
        average(
            tuple(self.model.parameters()),
            tuple(parameter.detach() for parameter in model.parameters()),
            self.num_updates,
        )
        self.copy_buffers(model)
        self.num_updates += 1

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        """Take over the buffers of `model`: running statistics belong to no average."""
        for own, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types."""
        return {"model": dict(self.model.state_dict()), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved average."""
        self.model.load_state_dict(state["model"])
        self.num_updates = state["num_updates"]
