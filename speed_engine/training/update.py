"""One update of all that is trained: clip, step the optimizers, follow with the averages.

    all gradients finite, on every process     everything changes
    otherwise                                  nothing does: no parameter, no optimizer state, its
                                               step counters included, no average

The device decides, without the host waiting for it. The rule holds for every optimizer: one that
reads ``found_inf`` on the device, as PyTorch's fused ones do for GradScaler, skips by itself. Any
other is run on gradients that are made harmless, and what it changed is then put back; for that
time its parameters and its state are held twice.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from speed_engine.runtime.sharding import local, whole
from speed_engine.training.ema import Ema, average_group
from speed_engine.training.optimizers import optimizer_tensors, set_rates


class Update:
    """Updates a model, and the parameters of its loss, from their gradients.

    Args:
        model: its gradients are clipped; with several processes laid out by ``distribute``.
        loss: with parameters of its own, if any; their gradients are equal on every process.
        optimizers: as an entry of ``OPTIMIZERS`` makes them.
        averages: of the model, by name.
        learning_rate: step number, from 1 -> learning rate.
        beta1: step number, from 1 -> decay of first moments; by default the optimizers' own.
        grad_clip: largest gradient norm of the model; inf never clips.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        averages: Mapping[str, Ema],
        *,
        learning_rate: Callable[[int], float],
        beta1: Callable[[int], float] | None = None,
        grad_clip: float,
    ) -> None:
        self.model, self.loss, self.optimizers, self.averages = model, loss, optimizers, averages
        self.learning_rate, self.beta1, self.grad_clip = learning_rate, beta1, grad_clip

    @torch.no_grad()
    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """Update from the gradients, and drop them.

        Args:
            step: number of the optimizer step, from 1; steps that were skipped count.

        Returns:
            () norm of the model's gradient, of all processes, before clipping; () bool, whether
            all gradients were finite, the same on every process.
        """
        for optimizer in self.optimizers:
            set_rates(optimizer, self.learning_rate(step), self.beta1 and self.beta1(step))
        norm, finite = self._apply(step)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return norm, finite

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that updates carry on, for checkpoints: group -> name -> tensor."""
        averages = {
            average_group(name): average.model.state_dict()
            for name, average in self.averages.items()
        }
        return averages | {
            "optimizer": optimizer_tensors(self.model, self.optimizers),
            "objective_optimizer": optimizer_tensors(self.loss, self.optimizers),
        }

    def _apply(self, step: int) -> tuple[Tensor, Tensor]:
        norm = whole(self._clip())
        finite = norm.isfinite()
        for parameter in self.loss.parameters():
            if parameter.grad is not None:
                finite = finite & parameter.grad.isfinite().all().to(norm.device)
        for optimizer in self.optimizers:
            _step_where(finite, optimizer)
        for average in self.averages.values():
            average.update(step, finite)
        return norm, finite

    def _clip(self) -> Tensor:
        """() gradient norm, before clipping; without a limit the gradients are read only."""
        if self.grad_clip == math.inf:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            return nn.utils.get_total_norm(gradients)
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)


def _step_where(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step that changes nothing where ``finite``, () bool on the device, is False."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # what GradScaler asks, too
        optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        return
    before = {place: tensor.clone() for place, tensor in _changed_by(optimizer).items()}
    for parameter in _parameters(optimizer):
        if parameter.grad is not None:  # a decomposition of NaN may raise
            local(parameter.grad).masked_fill_(~finite, 0.0)
    optimizer.step()
    after = _changed_by(optimizer)
    if after.keys() != before.keys():
        raise RuntimeError(
            f"{type(optimizer).__name__} made state in its first step, which a skipped step could "
            "not take back and a resumed run would lack; give it that state by `with_state`."
        )
    for place, tensor in after.items():
        torch.where(finite, tensor, before[place], out=tensor)


def _changed_by(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """Parameters ("") and their state, of this process, by number and name."""
    tensors = {}
    for i, parameter in enumerate(_parameters(optimizer)):
        tensors[i, ""] = local(parameter.detach())
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[i, key] = local(value)
    return tensors


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
