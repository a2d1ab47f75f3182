"""Exponential moving average (EMA) of the parameters: the model that images are drawn from."""

import copy

import torch
from torch import Tensor, nn

from speed_engine.runtime.sharding import local


class Ema:
    """Keeps ``average <- decay average + (1 - decay) parameters`` in float32.

    The decay warms up as (1 + step) / (10 + step), so that early averages do not carry the
    initialisation: with a constant 0.9999 it would still weigh 37 % after 10,000 steps.

    Args:
        model: whose parameters are followed; buffers are copied once.
        decay: the final share kept per step, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False).float()
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Average these parameters; call it when they, or the average's own, were laid out anew."""
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        trained = [(average, parameter) for average, parameter in pairs if parameter.requires_grad]
        self.averages = [local(average) for average, _ in trained]
        self._parameters = [local(parameter.detach()) for _, parameter in trained]

    def decay_at(self, step: int) -> float:
        """Share kept in optimizer step ``step`` (from 1)."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int, finite: Tensor | None = None) -> None:
        """Take in the parameters after optimizer step ``step`` (from 1).

        Args:
            step: its number.
            finite: () bool on the device, False where the step was skipped and leaves the average
                as it is; None takes every step.
        """
        share = 1 - self.decay_at(step)
        if finite is None:
            torch._foreach_lerp_(self.averages, self._parameters, share)  # pyright: ignore[reportPrivateImportUsage]
            return
        weight = torch.where(finite, share, 0.0)
        torch._foreach_lerp_(self.averages, self._parameters, [weight] * len(self.averages))  # pyright: ignore[reportPrivateImportUsage]
