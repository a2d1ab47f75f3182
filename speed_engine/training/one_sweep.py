"""AdamW's update in one sweep over memory: clip, moments, parameters and averages in one kernel.

It works on the state of ``torch.optim.AdamW``, so that either way of updating continues the
other's run, and it follows the same rule for gradients that are not finite.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from speed_engine.ops import adamw_ema
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.sharding import local, whole
from speed_engine.training.update import Update


class OneSweep(Update):
    """As ``Update``, and with its arguments; parameters may be distributed (FSDP2).

    Raises:
        UserError: the optimizer is not AdamW, or a parameter is not float32.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        names = [type(optimizer).__name__ for optimizer in self.optimizers]
        if names != ["AdamW"]:
            raise UserError(
                f"optimizer.update=one_sweep is AdamW; {', '.join(names)} needs "
                "optimizer.update=separate."
            )
        self._groups, self._state = self.optimizers[0].param_groups, self.optimizers[0].state
        self._steps = [self._counts(group["params"]) for group in self._groups]

    def _counts(self, parameters: list[Tensor]) -> Tensor:
        """(T,) counts of updates, of which the state holds views: the kernel takes one vector."""
        steps = torch.zeros(len(parameters), device=parameters[0].device)
        for parameter, step in zip(parameters, steps, strict=True):
            if parameter.dtype != torch.float32:
                raise UserError(
                    f"optimizer.update=one_sweep needs float32 parameters; one of shape "
                    f"{tuple(parameter.shape)} is {parameter.dtype}: use separate."
                )
            step.copy_(self._state[parameter]["step"])
            self._state[parameter]["step"] = step
        return steps

    def _apply(self, step: int) -> tuple[Tensor, Tensor]:
        gradients = [_gradients(group["params"]) for group in self._groups]
        norms = [_norm(tensors) for tensors in gradients]
        finite = torch.stack(norms).isfinite().all()
        followed = [average.averages for average in self.averages.values()]
        decays = [average.decay(step) for average in self.averages.values()]
        for i, group in enumerate(self._groups):
            states = [self._state[parameter] for parameter in group["params"]]
            adamw_ema(
                _local(group["params"]),
                _local(gradients[i]),
                _local([state["exp_avg"] for state in states]),
                _local([state["exp_avg_sq"] for state in states]),
                followed if i == 0 else [],  # the loss's parameters, second, have no averages
                self._steps[i],
                torch.where(finite, norms[i], math.nan),
                learning_rate=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                max_norm=self.grad_clip if i == 0 else math.inf,
                decays=decays if i == 0 else [],
            )
        return norms[0], finite


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    """Raises UserError where a parameter has none."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            raise UserError(
                f"a parameter of shape {tuple(parameter.shape)} has no gradient, and "
                "optimizer.update=one_sweep updates all of them: freeze it, or use separate."
            )
        gradients.append(parameter.grad)
    return gradients


def _norm(gradients: list[Tensor]) -> Tensor:
    """() float32 norm over all tensors, of all ranks where they are distributed."""
    if local(gradients[0]) is not gradients[0]:
        return whole(nn.utils.get_total_norm(gradients))
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.stack(norms))


def _local(tensors: list[Tensor]) -> list[Tensor]:
    return [local(tensor) for tensor in tensors]
