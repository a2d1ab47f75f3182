"""The optimizer, its learning rate and momentum over time, and its state by parameter name."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


def adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    loss: nn.Module | None = None,
    loss_learning_rate: float | None = None,
) -> torch.optim.AdamW:
    """AdamW in its fused form: one pass over all parameters, no synchronisation.

    Args:
        model: whose parameters are trained.
        learning_rate: of the model.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        weight_decay: of the model, in units of the learning rate.
        loss: a loss with parameters of its own, trained without weight decay.
        loss_learning_rate: theirs; by default the model's.
    """
    groups: list[dict] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    learned = [] if loss is None else list(loss.parameters())
    if learned:
        scale = (loss_learning_rate or learning_rate) / learning_rate
        groups.append({"params": learned, "weight_decay": 0.0, "lr_scale": scale})
    return torch.optim.AdamW(
        groups, lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay, fused=True
    )


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, beta1: float | None) -> None:
    """Set every group's learning rate, in proportion, and the decay of first moments if given."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if beta1 is not None:
            group["betas"] = (beta1, group["betas"][1])


def linear_warmup(learning_rate: float, warmup_steps: int) -> Callable[[int], float]:
    """Step number, from 1 -> learning rate: a linear rise, then constant."""
    return lambda step: learning_rate * min(1.0, step / max(warmup_steps, 1))


class Momentum(NamedTuple):
    """Both are functions of the step number, from 1."""

    beta1: Callable[[int], float]
    compensation: Callable[[int], float]  # factor of the learning rate


def steady(beta1: float, steps: int) -> Momentum:
    """The same momentum throughout."""
    return Momentum(lambda step: beta1, lambda step: 1.0)


def demon(beta1: float, steps: int) -> Momentum:
    """MDLRC: momentum decays to zero over the run, the learning rate is compensated.

    beta_t = b (1 - p) / ((1 - b) + b (1 - p)), p = share of the run (Chen et al. 2019, Demon), and
    lr_t = lr (1 - b) / (1 - beta_t) = lr (1 - b p), which keeps the weight lr (1 - beta) of each
    new gradient. The most consistent reading of arXiv 2404.07946; no code of its authors is public.
    """

    def decayed(step: int) -> float:
        left = beta1 * (1 - (step - 1) / steps)
        return left / ((1 - beta1) + left)

    return Momentum(decayed, lambda step: 1 - beta1 * (step - 1) / steps)


def geometric(beta1: float, steps: int) -> Momentum:
    """MDLRC as a third party has it: beta_t = max(b 0.9995**t, 0.4), no compensation."""
    floor = min(beta1, 0.4)
    return Momentum(lambda step: max(beta1 * 0.9995 ** (step - 1), floor), lambda step: 1.0)


MOMENTUM_DECAYS: dict[str, Callable[[float, int], Momentum]] = {
    "none": steady,
    "demon": demon,
    "geometric": geometric,
}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state as one flat dictionary, ``parameter/moment`` -> tensor; complete at any time."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for key, value in _state(optimizer, parameter).items():
                tensors[f"{name}/{key}"] = value
    return tensors


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter; what its first step would make, if it had none."""
    state = optimizer.state[parameter]
    if not state:
        # The counter stays where the fused kernel expects it: with its parameter.
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
