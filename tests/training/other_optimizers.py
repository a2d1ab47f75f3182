"""Optimizers unlike AdamW, each as a user would add it: one function that gives it its state."""

import torch
from torch import Tensor, nn

from speed_engine.training.optimizers import (
    Hyperparameters,
    parameter_groups,
    with_state,
)


def sgd(model: nn.Module, loss: nn.Module, hyper: Hyperparameters) -> list[torch.optim.Optimizer]:
    """With momentum; ignores found_inf."""
    groups = parameter_groups(model, loss, hyper)
    optimizer = torch.optim.SGD(groups, lr=hyper.learning_rate, momentum=hyper.beta1)
    return [with_state(optimizer, _momentum)]


def fused_sgd(
    model: nn.Module, loss: nn.Module, hyper: Hyperparameters
) -> list[torch.optim.Optimizer]:
    """Reads found_inf; made without state, its first step would leave what memory held before."""
    groups = parameter_groups(model, loss, hyper)
    optimizer = torch.optim.SGD(groups, lr=hyper.learning_rate, momentum=hyper.beta1, fused=True)
    return [with_state(optimizer, _momentum)]


def nadam(model: nn.Module, loss: nn.Module, hyper: Hyperparameters) -> list[torch.optim.Optimizer]:
    """Its state does not begin at zero."""

    def state(parameter: Tensor) -> dict[str, Tensor]:
        return {
            "step": torch.zeros((), device=parameter.device),
            "mu_product": torch.ones((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    groups = parameter_groups(model, loss, hyper)
    on_gpu = next(model.parameters()).is_cuda  # else its counters would be on the host
    optimizer = torch.optim.NAdam(
        groups, lr=hyper.learning_rate, betas=(hyper.beta1, hyper.beta2), capturable=on_gpu
    )
    return [with_state(optimizer, state)]


def _momentum(parameter: Tensor) -> dict[str, Tensor]:
    return {"momentum_buffer": torch.zeros_like(parameter)}


OTHERS = {"sgd": sgd, "fused_sgd": fused_sgd, "nadam": nadam}
