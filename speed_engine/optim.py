"""The optimizer, its learning rate, and its state by parameter name."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def adamw(
    model: nn.Module, *, learning_rate: float, beta1: float, beta2: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW in its fused form: one pass over all parameters, no synchronisation."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay, fused=True
    )


def linear_warmup(learning_rate: float, warmup_steps: int) -> Callable[[int], float]:
    """Step number, from 1 -> learning rate: a linear rise, then constant."""
    return lambda step: learning_rate * min(1.0, step / max(warmup_steps, 1))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state as one flat dictionary, ``parameter/moment`` -> tensor."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Inverse of ``optimizer_tensors``; the parameters of ``model`` must be the same ones."""
    parameters = dict(model.named_parameters())
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        parameter = parameters[name]
        # AdamW's step counter stays where the fused kernel expects it: with its parameter.
        optimizer.state[parameter][key] = value.to(parameter.device)
