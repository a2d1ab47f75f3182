"""Optimizers by name, their state by parameter name, and the learning rate and momentum over time.

Another optimizer is a function here and its name in ``OPTIMIZERS``. It returns optimizers that
together hold every trained parameter once. Their state is complete before the first step, so that a
checkpoint can be loaded into it, and it consists of tensors that lie where their parameter lies, so
that the device alone can decide whether a step changes them (see update.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

EPS = 1e-8  # of AdamW


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What an optimizer is made with.

    Attributes:
        learning_rate: of the model's parameters.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        weight_decay: of the model's parameters, in units of the learning rate.
        loss_learning_rate: of the loss's own parameters; by default the model's.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    loss_learning_rate: float | None = None


def adamw(model: nn.Module, loss: nn.Module, hyper: Hyperparameters) -> list[torch.optim.Optimizer]:
    """AdamW in its fused form: one pass over all parameters, no synchronisation.

    Args:
        model: whose parameters are trained.
        loss: its own parameters, if it has any, are trained without weight decay.
        hyper: learning rates, betas and weight decay.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups(model, loss, hyper), lr=hyper.learning_rate,
        betas=(hyper.beta1, hyper.beta2), eps=EPS, weight_decay=hyper.weight_decay, fused=True,
    )  # fmt: skip
    return [with_state(optimizer, _moments)]


OPTIMIZERS: dict[
    str, Callable[[nn.Module, nn.Module, Hyperparameters], list[torch.optim.Optimizer]]
] = {"adamw": adamw}


def parameter_groups(model: nn.Module, loss: nn.Module, hyper: Hyperparameters) -> list[dict]:
    """The model's trained parameters first; the loss's, if it has any, second.

    A group's ``lr_scale`` is the factor that ``set_rates`` applies to its learning rate.
    """
    groups: list[dict] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    learned = list(loss.parameters())
    if learned:
        scale = (hyper.loss_learning_rate or hyper.learning_rate) / hyper.learning_rate
        groups.append({"params": learned, "weight_decay": 0.0, "lr_scale": scale})
    return groups


def with_state(
    optimizer: torch.optim.Optimizer, initial: Callable[[Tensor], dict[str, Tensor]]
) -> torch.optim.Optimizer:
    """Give every parameter of an optimizer the state that precedes its first step.

    Args:
        optimizer: without state.
        initial: parameter -> its state, by the names that the optimizer gives it.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = initial(parameter)
    return optimizer


def _moments(parameter: Tensor) -> dict[str, Tensor]:
    """What AdamW's first step would make; the counter is where the fused kernel expects it."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def optimizer_tensors(
    module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """The state that belongs to a module's parameters, ``parameter/name`` -> tensor."""
    return {
        f"{name}/{key}": value
        for name, parameter in module.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, beta1: float | None) -> None:
    """Set every group's learning rate, in proportion, and the decay of first moments if given.

    The decay is the first of ``betas``; in an optimizer without them, a ``momentum`` that is on.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if beta1 is not None and "betas" in group:
            group["betas"] = (beta1, group["betas"][1])
        elif beta1 is not None and group.get("momentum"):
            group["momentum"] = beta1


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
